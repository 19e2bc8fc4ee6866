"""What bitsandbytes computes on a CPU, for tests/training/test_adam_8bit.py.

    python -m tests.training.adam_8bit_golden [--check]

Writes tests/golden/adam_8bit.npz, or compares it with what this version of bitsandbytes gives. bitsandbytes has no
8-bit optimizer for CPUs: here are its map, its quantisation, and the AdamW of its CUDA kernel on top of them in torch.
The quantisation is the one that bitsandbytes has for float64: it takes the nearest value, as its CUDA kernel does; its
CPU kernel for float32 takes values up to four codes away.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

PATH = Path(__file__).resolve().parents[1] / "golden" / "adam_8bit.npz"
SHAPE, BLOCK, STEPS = (2, 4096), 256, 5
RATE, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-8


def numbers(seed: int) -> np.ndarray:
    """Numbers of very different sizes, as moments have."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=SHAPE) * 10.0 ** rng.uniform(-6, 1, SHAPE)).astype(np.float32)


def made() -> dict[str, np.ndarray]:
    """Maps, codes and scales of some numbers, and parameters after some steps of AdamW."""
    import torch
    from bitsandbytes import functional

    def quantize(values, signed):
        codes, scale = torch.ops.bitsandbytes.quantize_blockwise(values.double(), maps[signed], BLOCK)
        return codes, scale.reshape(SHAPE[0], -1)

    maps = {True: functional.create_dynamic_map(signed=True), False: functional.create_dynamic_map(signed=False)}
    found = {"signed_map": maps[True].numpy(), "unsigned_map": maps[False].numpy()}
    for signed, name in ((True, "signed"), (False, "unsigned")):
        values = torch.tensor(numbers(0)) if signed else torch.tensor(numbers(0) ** 2)
        codes, scale = quantize(values, signed)
        found |= {f"{name}_codes": codes.numpy(), f"{name}_scale": scale.numpy()}
    parameter, moments = torch.tensor(numbers(1)), [torch.zeros(SHAPE), torch.zeros(SHAPE)]
    for step in range(1, STEPS + 1):
        gradient = torch.tensor(numbers(1 + step))
        first = BETAS[0] * moments[0] + (1 - BETAS[0]) * gradient
        second = BETAS[1] * moments[1] + (1 - BETAS[1]) * gradient * gradient
        update = (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)
        parameter = parameter - RATE * (update + DECAY * parameter)
        for number, (moment, signed) in enumerate(((first, True), (second, False))):
            codes, scale = quantize(moment, signed)
            moments[number] = functional.dequantize_blockwise(
                codes, absmax=scale.flatten(), code=maps[signed], blocksize=BLOCK
            )
    return {**found, "parameter": parameter.numpy()}


def main() -> int:
    found = made()
    if "--check" not in sys.argv:
        np.savez_compressed(PATH, **found)
        return 0
    with np.load(PATH) as golden:
        # torch rounds otherwise on another CPU, and a step may take a parameter from about RATE to nearly nothing
        different = [
            name for name in golden.files if not np.allclose(golden[name], found[name], rtol=1e-6, atol=1e-6 * RATE)
        ]
    print(f"different from {PATH.name}: {different or 'nothing'}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
