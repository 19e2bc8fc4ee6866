"""Peak arithmetic of accelerators, for the MFU of training and the bounds of planning."""

from __future__ import annotations

# Dense bfloat16 FLOP/s of a chip. TPUs: https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. GPUs: NVIDIA's data
# sheets of A100, H100, H200 (SXM) and DGX B200, half of what is given for sparse matrices.
PEAK_FLOPS = {
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
    "tpu7x": 2307e12,
    "l4": 121e12,
    "a100": 312e12,
    "h100": 989e12,
    "h100 pcie": 756e12,
    "h200": 989e12,
    "b200": 2250e12,
}
# Part of JAX's ``device_kind`` in lower case, the first that is found; its chip; JAX devices of a chip: cores that are
# not joined.
_DEVICE_KINDS = (
    ("tpu v4", "v4", 1),
    ("tpu v5p", "v5p", 1),
    ("tpu v5 lite", "v5e", 1),
    ("tpu v5e", "v5e", 1),
    ("tpu v5", "v5p", 1),
    ("tpu v6 lite", "v6e", 1),
    ("tpu v6e", "v6e", 1),
    ("tpu7x", "tpu7x", 2),
    ("tpu v7", "tpu7x", 2),
    ("h200", "h200", 1),
    ("h100 pcie", "h100 pcie", 1),
    ("h100", "h100", 1),
    ("b200", "b200", 1),
    ("a100", "a100", 1),
    ("nvidia l4", "l4", 1),
)


def peak_flops(device_kind: str) -> float | None:
    """Return the bfloat16 FLOP/s of a JAX device; None where it is not known."""
    kind = device_kind.lower()
    return next((PEAK_FLOPS[chip] / devices for part, chip, devices in _DEVICE_KINDS if part in kind), None)
