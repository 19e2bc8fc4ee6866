"""How fast a compiled step can be at best, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jvlm.models import vlm
from jvlm.models.vlm import TOWERS, VLM
from jvlm.training import flops
from jvlm.training.config import Experiment

from .chips import Topology
from .program import Compiled


@dataclasses.dataclass(frozen=True)
class Load:
    """What is assumed to be in the rows, since planning reads no data: rows are full.

    Attributes:
      conversation: tokens of each conversation, which sets the cost of the decoder's attention.
      image: patches of each image or frame, which sets the cost of the tower's.
    """

    conversation: int
    image: int

    def counts(self, experiment: Experiment, template: VLM) -> flops.Counts:
        """Of one step: all accumulated batches."""
        data, encoder = experiment.data, experiment.model.encoder
        rows = data.rows * experiment.accumulation
        window = getattr(encoder, "window_patches", self.image)
        features = min(
            rows * data.row_patches // getattr(encoder, "spatial_merge_size", 1) ** 2, rows * data.row_tokens
        )
        tokens = rows * data.row_tokens
        return flops.Counts(
            _pieces(rows, data.row_tokens, self.conversation),
            _pieces(rows, data.row_patches, self.image),
            _pieces(rows, data.row_patches, window),
            features,
            tokens - features,
        )


def _pieces(rows: int, length: int, piece: int) -> np.ndarray:
    piece = min(piece, length) or 1
    row = [piece] * (length // piece) + ([length % piece] if length % piece else [])
    return np.array(row * rows, np.int64)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least, by what limits it, each as if the others were free.

    Attributes:
      arithmetic: FLOP that the result needs, by part (jvlm.training.flops), of the whole step.
      executed: FLOP that a chip executes, recomputation included.
      overlapped: the slowest of the three; nothing can be faster.
      serial: their sum, as if nothing ran beside anything else.
    """

    arithmetic: Mapping[str, float]
    executed: float
    compute: float
    hbm: float
    network: float
    mfu: float
    mfu_serial: float
    tokens_per_second: float
    images_per_second: float
    tokens: int
    images: int

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.hbm, self.network)

    @property
    def serial(self) -> float:
        return self.compute + self.hbm + self.network

    @property
    def limited_by(self) -> str:
        return max(("compute", "hbm", "network"), key=lambda name: getattr(self, name))


def bound(experiment: Experiment, compiled: Compiled, topology: Topology, load: Load, training: bool = True) -> Bound:
    """The roofline of a compiled step."""
    template = vlm.abstract(experiment.model)
    counts = load.counts(experiment, template)
    learnt = {tower: experiment.optimizer.rate_of(tower) > 0 for tower in TOWERS}
    parts = flops.training(template, counts, learnt) if training else flops.inference(template, counts)
    chip, chips = topology.chip, topology.chips
    # A kernel's products are not in the program's text. Its backward pass makes five products for the forward's two.
    attention = sum(work.attention for work in flops.forward(template, counts).values())
    executed = compiled.flops + attention * (3.5 if training else 1.0) / chips
    compute = executed / chip.flops
    hbm = compiled.hbm / chip.hbm_bandwidth
    # different axes use different links, and may talk at once
    network = max((wire.seconds for wire in compiled.wires), default=0.0)
    best = max(compute, hbm, network)
    peak = parts.total / (chips * chip.flops)
    images = len(counts.frames)
    return Bound(
        arithmetic={part: getattr(parts, part) for part in flops.PARTS},
        executed=executed,
        compute=compute,
        hbm=hbm,
        network=network,
        mfu=peak / best,
        mfu_serial=peak / (compute + hbm + network),
        tokens_per_second=counts.tokens / best,
        images_per_second=images / best,
        tokens=counts.tokens,
        images=images,
    )
