"""The arithmetic of a training step, and its share of what the devices could do (MFU). See docs/mfu.md.

Configurations of encoders, connectors and decoders declare their own (`jvlm.models.arithmetic`); here it is added up.

A multiplication and its addition are two. Only what the result needs is counted: real patches and tokens, each query
with the keys of its own segment (half of them where attention is causal), the head at the loss tokens,
backward passes only where something is trained. Not counted: recomputation, norms, activations and the update.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from jvlm.adapters.base_matrices import matrices
from jvlm.adapters.layers import is_adapter_path
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import DecoderConfig
from jvlm.models.vlm import TOWERS, VLM
from jvlm.training import optimizer
from jvlm.weights.vocabulary import EMBEDDING, HEAD

PARTS = (*TOWERS, "head")
SCORE = "decoder.score.kernel"
_MATRIX = re.compile(r"(\.kernel|\.mlp\.(gate|up|down))$")


def counts_of(batches: Iterable[PackedBatch]) -> Counts:
    """Return the counts of one or more batches of host arrays."""
    counts = [_count(batch) for batch in batches]
    none = np.zeros(0, np.int64)
    lengths = [np.concatenate([none, *(getattr(c, n) for c in counts)]) for n in ("segments", "images", "windows")]
    return Counts(*lengths, sum(c.vision_tokens for c in counts), sum(c.targets for c in counts))


def _count(batch: PackedBatch) -> Counts:
    segments, weights = np.asarray(batch.segment_ids), np.asarray(batch.loss_weights)
    is_target = (weights[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    return Counts(
        _lengths(segments),
        _lengths(batch.patch_segment_ids),
        _lengths(batch.patch_window_ids),
        int((np.asarray(batch.vision_index) >= 0).sum()),
        int(is_target.sum()),
    )


def _lengths(ids_BN) -> np.ndarray:
    counts = [np.bincount(row)[1:] for row in np.asarray(ids_BN) if row.size]
    lengths = np.concatenate([np.zeros(0, np.int64), *counts])
    return lengths[lengths > 0]


@dataclasses.dataclass(frozen=True)
class Parts:
    """FLOP of each part of the model."""

    encoder: float
    connector: float
    decoder: float
    head: float

    @property
    def total(self) -> float:
        return self.encoder + self.connector + self.decoder + self.head


@dataclasses.dataclass(frozen=True)
class Trained:
    """What of a model is trained; adapters are counted by themselves (`adapter_ranks`).

    Attributes:
      shares: part -> share of the weights of its matrices that are trained, each of which has a gradient.
      moving: the towers of which anything is trained, if it is only norms or the embedding.
      embedding: whether the embedding table is, or rows of it.
    """

    shares: Mapping[str, float]
    moving: frozenset[str]
    embedding: bool

    @classmethod
    def towers(cls, *names: str) -> Trained:
        """Return these towers as a whole, the head with the decoder."""
        shares = {part: float(("decoder" if part == "head" else part) in names) for part in PARTS}
        return cls(shares, frozenset(names), "decoder" in names)

    @classmethod
    def of(cls, template: VLM, trainable: Iterable[str]) -> Trained:
        """Return what is at these paths of a model; adapters among them are left out."""
        every = set(trainable)
        paths = {path for path in every if not is_adapter_path(path)}
        known = {path: (_part(path, template), math.prod(m.shape)) for path, m in matrices(template).items()}
        sizes, own = Counter(), Counter()
        for path, (part, size) in known.items():
            sizes[part] += size
            own[part] += size * (path in paths)
        moving = frozenset(optimizer.tower_of(path) for path in paths)
        # a tower of another package may name its matrices otherwise
        shares = {part: own[part] / sizes[part] if sizes[part] else float(part in moving) for part in PARTS}
        return cls(shares, moving, EMBEDDING in paths or any(".token_rows." in path for path in every))


def _part(path: str, template: VLM) -> str | None:
    """Return the part whose products a parameter is in; None for one that is in none (norms, an embedding table)."""
    if path in (HEAD, SCORE) or (path == EMBEDDING and getattr(template.config.decoder, "tie_word_embeddings", False)):
        return "head"
    return optimizer.tower_of(path) if _MATRIX.search(path) else None


def forward(template: VLM, counts: Counts) -> dict[str, Work]:
    """Return what each part computes in a forward pass, as the configurations declare it.

    Raises:
      TypeError: the configuration of an encoder, connector or decoder that does not declare its arithmetic.
    """
    model = template.config
    encoder, connector, decoder = model.encoder, model.connector, model.decoder
    return {
        "encoder": encoder.work(counts),
        "connector": connector.work(counts, encoder.hidden_size, decoder.hidden_size),
        "decoder": decoder.work(counts, connector.tokens_per_image),
        "head": Work((Product(counts.targets, decoder.hidden_size, _outputs(decoder)),)),
    }


def _outputs(decoder: DecoderConfig) -> int:
    """Return what the head gives for each token: logits of all words, or the scores of a model with ``labels``."""
    return getattr(decoder, "labels", None) or decoder.vocab_size


def training(template: VLM, counts: Counts, trained: Trained, adapter_rank: Mapping[str, float] | None = None) -> Parts:
    """One forward and backward pass.

    Args:
      trained: a gradient goes back through a frozen tower only if something before it is trained, and never to its
        weights.
      adapter_rank: of low-rank adapters on all weights of a tower; they are trained, and their own products count.
    """
    ranks, work = adapter_rank or {}, forward(template, counts)
    before, parts = _gradient_before(trained, ranks), {}
    for part in PARTS:
        rank = 0 if part == "head" else ranks.get(part, 0)
        inside = part in trained.moving or trained.shares[part] > 0
        parts[part] = _both_ways(work[part], before[part], inside, trained.shares[part], rank)
    return Parts(**parts)


def _gradient_before(trained: Trained, ranks: Mapping[str, float]) -> dict[str, bool]:
    """Return for each part whether what comes into it needs a gradient."""
    moves = {tower: tower in trained.moving or ranks.get(tower, 0) > 0 for tower in TOWERS}
    return {
        "encoder": False,
        "connector": moves["encoder"],
        "decoder": moves["encoder"] or moves["connector"] or trained.embedding,
        "head": any(moves.values()),
    }


def has_backward(trained: Trained, adapter_rank: Mapping[str, float]) -> dict[str, bool]:
    """Return for each part whether a gradient goes through it, or into it; arguments as in `training`."""
    before = _gradient_before(trained, adapter_rank)
    own = {part: part in trained.moving or trained.shares[part] > 0 or adapter_rank.get(part, 0) > 0 for part in PARTS}
    return {part: before[part] or own[part] for part in PARTS}


def inference(template: VLM, counts: Counts) -> Parts:
    """One forward pass with the head at ``counts.targets`` tokens."""
    return Parts(**{part: work.total for part, work in forward(template, counts).items()})


def decoding(template: VLM, sequences: int, cache_len: int) -> tuple[Parts, float]:
    """Return one step of generation, each new token after ``cache_len`` others; and how much of it is attention.

    Images were read with the prompt: the encoder and the connector have nothing to do.
    """
    model = template.config
    work = model.decoder.decode_work(sequences, cache_len, model.connector.tokens_per_image)
    head = Product(sequences, model.decoder.hidden_size, _outputs(model.decoder))
    return Parts(0.0, 0.0, work.total, head.flops), work.attention


def experts(template: VLM, tokens: int) -> float:
    """Return what grouped products compute of the decoder's forward pass over so many tokens."""
    model = template.config
    work = model.decoder.decode_work(tokens, 1, model.connector.tokens_per_image)
    return sum(product.flops for product in work.products if product.grouped)


def _both_ways(work: Work, gradient_wanted: bool, inside: bool, share: float, rank: float) -> float:
    """Forward and backward FLOP of a part.

    Args:
      gradient_wanted: what comes into the part needs a gradient.
      inside: something of the part is trained, if it is a norm.
      share: of its matrices' weights that are trained.
    """
    flops = work.total
    if rank:
        flops += sum(2.0 * p.uses * rank * (p.d_in + p.d_out) for p in work.products)
    if not (gradient_wanted or inside or rank):
        return flops
    flops += 2 * work.attention
    for product in work.products:
        inputs = gradient_wanted or not product.entry
        adapter = 2.0 * product.uses * rank
        flops += inputs * product.flops + share * product.flops
        flops += adapter * (product.d_in + product.d_out) + adapter * (product.d_out + inputs * product.d_in)
    return flops


def of_batch(template: VLM, batches: Iterable[PackedBatch], trained: Trained) -> Parts:
    """`training` of one or more batches of host arrays, with the adapters that the template has."""
    return training(template, counts_of(batches), trained, adapter_ranks(template))


def adapter_ranks(template: VLM) -> dict[str, float]:
    """Return the rank that adapters on all matrices of a tower would have, for as much arithmetic as its own take.

    Adapters of one matrix take rank x (d_in + d_out) for each vector, so their ranks are averaged with these weights;
    those of the embedding table, where nothing but the second matrix is multiplied, and of the head are left out.
    """
    if template.adapters is None:
        return {}
    adapted = matrices(template)
    ranks = {}
    for tower in TOWERS:
        sizes = {
            path: sum(matrix.shape[-2:])
            for path, matrix in adapted.items()
            if path.startswith(f"{tower}.") and _MATRIX.search(path) and path != HEAD
        }
        total = sum(size * math.prod(adapted[path].shape[:-2]) for path, size in sizes.items())
        own = sum(sizes[g.path] * sum(g.ranks) for g in template.adapters.groups if g.path in sizes)
        if own:
            ranks[tower] = own / total
    return ranks
