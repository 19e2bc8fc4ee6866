"""The command that every worker runs, wherever it was launched."""

from __future__ import annotations

from collections.abc import Sequence

# `jvlm train` calls jax.distributed.initialize(), which finds the other workers by itself on Cloud TPU, GKE and SLURM.
DISTRIBUTED = ("--distributed", "true")


def command(config: str, name: str, output: str, fields: Sequence[str]) -> tuple[str, ...]:
    """`jvlm train` as one of many processes, in the run folder OUTPUT/NAME."""
    return ("jvlm", "train", config, "--name", name, "--output_root", output, *DISTRIBUTED, *fields)
