"""How fast a compiled step can be at best, and what that costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.training import compiled_step, flops, trainable
from jvlm.training.config import Experiment

from .chips import Topology
from .measure import AxisTraffic, Compiled


@dataclasses.dataclass(frozen=True)
class SegmentLengths:
    """What is assumed to be in the sequences, since planning reads no data: sequences are full.

    Attributes:
      conversation: tokens of each conversation, which sets the cost of the decoder's attention.
      image: patches of each image or frame, which sets the cost of the tower's.
    """

    conversation: int
    image: int

    def counts(self, template: VLM, sequences: int, seq_len: int, max_patches: int) -> flops.Counts:
        """Of so many full sequences."""
        encoder = template.config.encoder
        window = encoder.window_patches or self.image
        images, tokens = _pieces(sequences, max_patches, self.image), sequences * seq_len
        if template.config.placeholders_per_image is None:
            vision_tokens = sequences * max_patches // template.config.connector.patches_per_token
        else:
            vision_tokens = len(images) * template.config.placeholders_per_image
        vision_tokens = min(vision_tokens, tokens)
        return flops.Counts(
            _pieces(sequences, seq_len, self.conversation),
            images,
            _pieces(sequences, max_patches, window),
            vision_tokens,
            tokens - vision_tokens,
        )


def _pieces(sequences: int, length: int, piece: int) -> np.ndarray:
    piece = min(piece, length) or 1
    sequence = [piece] * (length // piece) + ([length % piece] if length % piece else [])
    return np.array(sequence * sequences, np.int64)


@dataclasses.dataclass(frozen=True)
class Roofline:
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


def roofline(experiment: Experiment, compiled: Compiled, topology: Topology, lengths: SegmentLengths) -> Roofline:
    """Return the roofline of a compiled training step."""
    template, data = compiled_step.template_of(experiment), experiment.data
    counts = lengths.counts(
        template, data.batch_size * experiment.gradient_accumulation_steps, data.seq_len, data.max_patches
    )
    is_trainable = trainable.from_config(experiment.optimizer, template.adapters)
    trained = flops.Trained.of(template, trainable.select(is_trainable, vlm.variables(template)))
    ranks = flops.adapter_ranks(template)
    has_backward = flops.has_backward(trained, ranks)
    # A kernel's products are not in the program's text. Its backward pass makes five products for the forward's two,
    # which are made once more unless the policy keeps what came of them.
    passes = 4.5 if experiment.model.precision.remat == "full" else 3.5
    work = flops.forward(template, counts)
    kernels = sum((passes if has_backward[part] else 1) * work[part].attention for part in work)
    # so are experts' products: forward, again, and by rows and matrices
    passes = 1 + has_backward["decoder"] * (
        1 + trained.shares["decoder"] + (experiment.model.precision.remat != "none")
    )
    kernels += passes * flops.experts(template, counts.tokens)
    parts = flops.training(template, counts, trained, ranks)
    return assess(parts, kernels, counts.tokens, len(counts.images), compiled, topology)


def assess(
    parts: flops.Parts, kernels: float, tokens: int, images: int, compiled: Compiled, topology: Topology
) -> Roofline:
    """Return the roofline of a compiled program that needs ``parts``; ``kernels`` is FLOP that its kernels execute."""
    chip, chips = topology.chip, topology.chips
    executed = compiled.flops + kernels / chips
    compute = executed / chip.flops
    hbm = compiled.hbm / chip.hbm_bandwidth
    network = _network(compiled.axis_traffic, topology)
    best = max(compute, hbm, network)
    peak = parts.total / (chips * chip.flops)
    return Roofline(
        arithmetic={part: getattr(parts, part) for part in flops.PARTS},
        executed=executed,
        compute=compute,
        hbm=hbm,
        network=network,
        mfu=peak / best,
        mfu_serial=peak / (compute + hbm + network),
        tokens_per_second=tokens / best,
        images_per_second=images / best,
        tokens=tokens,
        images=images,
    )


def _network(axis_traffic: Sequence[AxisTraffic], topology: Topology) -> float:
    """Seconds of the busiest links. Axes of a torus have links of their own; those of GPUs share them."""
    seconds: Counter[str] = Counter()
    for one in axis_traffic:
        seconds[one.network if topology.switched else one.axes] += one.seconds
    return max(seconds.values(), default=0.0)
