"""A run on Cloud TPU VMs: what is asked for, and the exact gcloud commands. Nothing here runs anything.

Reference: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import train

# https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX"
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# Accelerator types of these count TensorCores, two a chip; the others count chips.
COUNT_CORES = ("v4", "v5p")
STATE_FOLDER = Path("runs") / "launch"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A run on TPU VMs.

    Attributes:
      name: of the queued resource, of its nodes, and of the run.
      accelerator: such as "v5p-128" (128 cores, 64 chips), "v6e-256", "v5litepod-16".
      slices: nodes of that type, joined over the data-centre network.
      tier: "spot" is cheap and may be taken away, "reserved" uses your reservation, "on-demand" neither.
      config, fields: as given to `jvlm train`.
      output: the run's parent folder, on gs:// so that a new machine finds the checkpoints.
      revision: commit that is shipped.
      extra_create, extra_ssh: flags passed on to gcloud as they are.
    """

    name: str
    accelerator: str
    zone: str
    config: str
    output: str
    revision: str
    fields: tuple[str, ...] = ()
    slices: int = 1
    tier: str = "on-demand"
    project: str | None = None
    runtime: str | None = None
    valid_until: str | None = None
    extra_create: tuple[str, ...] = ()
    extra_ssh: tuple[str, ...] = ()

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,58}[a-z0-9])?", self.name):
            raise ValueError(f"--name {self.name!r}: small letters, digits and -, from a letter on, 60 at most")
        generation, _, count = self.accelerator.partition("-")
        if generation == "tpu7x":
            raise ValueError("tpu7x is not served by queued resources; use launch/gke.py")
        if generation not in RUNTIMES or not count.isdigit():
            known = ", ".join(f"{g}-N" for g in RUNTIMES)
            raise ValueError(
                f"--type {self.accelerator!r} is none of {known}; N counts cores for {' and '.join(COUNT_CORES)}"
            )
        if self.slices < 1:
            raise ValueError(f"--slices must be at least 1, got {self.slices}")
        if not self.output.startswith("gs://"):
            raise ValueError(
                f"--output {self.output!r} is on the TPU's own disk, which goes when the TPU goes, and its checkpoints "
                "with it; give a folder on gs://"
            )

    @property
    def chips(self) -> int:
        """Of all slices; what is paid for."""
        generation, _, count = self.accelerator.partition("-")
        return int(count) // (2 if generation in COUNT_CORES else 1) * self.slices

    @property
    def folder(self) -> Path:
        """Where the launcher keeps what it needs to go on: spec.json, the archive, logs of failures."""
        return STATE_FOLDER / self.name

    @property
    def train(self) -> tuple[str, ...]:
        """The command of each worker."""
        return train.command(self.config, self.name, self.output, self.fields)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "spec.json").write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, name: str) -> Spec:
        """Return the spec saved under a name. Raises FileNotFoundError naming those there are."""
        path = STATE_FOLDER / name / "spec.json"
        if not path.is_file():
            known = ", ".join(sorted(p.parent.name for p in STATE_FOLDER.glob("*/spec.json"))) or "none"
            raise FileNotFoundError(f"no run {name!r} was launched from this folder; known: {known}")
        values = json.loads(path.read_text())
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def _resource(self, verb: str, *flags: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self._where(), *flags]

    def create(self) -> list[str]:
        runtime = self.runtime or RUNTIMES[self.accelerator.partition("-")[0]]
        nodes = [f"--node-id={self.name}"]
        if self.slices > 1:
            nodes = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        tier = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[self.tier]
        until = [f"--valid-until-duration={self.valid_until}"] if self.valid_until else []
        flags = [f"--accelerator-type={self.accelerator}", f"--runtime-version={runtime}", *nodes, *tier, *until]
        return self._resource("create", *flags, *self.extra_create, "--quiet")

    def describe(self) -> list[str]:
        return self._resource("describe", "--format=json")

    def delete(self) -> list[str]:
        """With its nodes (--force), which is what stops the bill."""
        return self._resource("delete", "--force", "--quiet")

    def copy(self, archive: Path) -> list[str]:
        everywhere = ["--worker=all", "--node=all"]
        head = ["gcloud", "compute", "tpus", "queued-resources", "scp", str(archive), f"{self.name}:"]
        return [*head, *self._where(), *everywhere, *self.extra_ssh, "--quiet"]

    def _ssh(self, command: str, everywhere: bool) -> list[str]:
        who = ["--worker=all", "--node=all"] if everywhere else ["--worker=0", "--node=0"]
        return self._resource("ssh", *who, *self.extra_ssh, "--quiet", f"--command={command}")

    def unpack(self, archive: Path) -> list[str]:
        folder = f"jvlm-{self.revision[:12]}"
        return self._ssh(
            f"mkdir -p {folder} && tar -xzf {archive.name} -C {folder} && ln -sfn {folder} jvlm-code", True
        )

    def worker(self, *argv: str, everywhere: bool = True) -> list[str]:
        """launch/worker.sh with arguments, on every worker or on worker 0 of slice 0 alone."""
        return self._ssh(f"bash jvlm-code/launch/worker.sh {shlex.join(argv)}", everywhere)

    def bill(self) -> str:
        """Return what costs money for as long as the resource exists, and the command that ends it."""
        return f"{self.chips} chips ({self.accelerator} x {self.slices}) are billed until: {shlex.join(self.delete())}"
