"""Device time of a profiled program by the part of the model that its instructions belong to."""

from __future__ import annotations

import collections
import re
from pathlib import Path

from jax.profiler import ProfileData

_PARTS = ("encoder", "connector", "decoder", "loss", "update")
_KINDS = ("segment_attention", "attention", "mlp", "norm")
# containers, whose time is that of the instructions in them
_CONTAINERS = ("while", "call", "conditional", "command_buffer")


def parts_of_instructions(program_text: str) -> dict[str, str]:
    """Return instruction name -> part ("decoder/mlp") from a compiled program's text and its op names."""
    parts = {}
    for line in program_text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if name:
            parts[name[1]] = part_of_scope(scope[1]) if scope else "rest"
    return parts


def part_of_scope(scope: str) -> str:
    """Return the part that a scope such as "jit(step)/transpose(jvp(decoder))/mlp/dot_general" names."""
    words = re.findall(r"\w+", scope)
    part = next((p for p in _PARTS if p in words), None)
    if part is None:
        return "rest"
    kind = next((k for k in _KINDS if any(w == k or (k == "segment_attention" and w.startswith(k)) for w in words)), "")
    return f"{part}/{kind}" if kind else part


def device_seconds(folder: Path, program_text: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return (seconds by part, seconds by kernel) on the first device in a trace that `jax.profiler.trace` wrote.

    Raises:
      FileNotFoundError: the folder holds no trace.
    """
    found = sorted(folder.rglob("*.xplane.pb"))
    if not found:
        raise FileNotFoundError(f"no trace under {folder}")
    parts = parts_of_instructions(program_text)
    # kernels carry their instruction's name with other signs
    parts |= {re.sub(r"\W", "_", name): part for name, part in parts.items()}
    by_part: collections.Counter[str] = collections.Counter()
    by_kernel: collections.Counter[str] = collections.Counter()
    planes = list(ProfileData.from_file(str(found[0])).planes)
    gpu = next((plane for plane in planes if "GPU:0" in plane.name), None)
    for plane in [gpu] if gpu else planes:
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", event.name))
                if name.startswith(_CONTAINERS) or (gpu is None and name not in parts):
                    continue
                seconds = event.duration_ns / 1e9
                by_part[parts.get(name) or parts.get(event.name) or "rest"] += seconds
                by_kernel[event.name] += seconds
    return dict(by_part), dict(by_kernel)
