"""An adapter apart from its base: what files hold, in the paths and layouts of jvlm's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from jvlm.adapters.config import AdapterConfig


@dataclasses.dataclass(frozen=True, order=True)
class Target:
    """One matrix that an adapter stands beside.

    Attributes:
      path: dotted path of its parameter, as `jvlm.models.vlm.parameters` gives it
        ("decoder.blocks.layer.attention.q.kernel", "decoder.embedding", "encoder.patch_embed.kernel").
      index: along the leading axes of that parameter: (layer,), (layer, expert), or () for a single matrix.
    """

    path: str
    index: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one matrix, [in, out] as jvlm stores kernels; of an embedding table [vocab, width] alike.

    The adapted matrix is ``W + scale * a @ b``, with ``magnitude`` its columns scaled to those lengths (DoRA; for an
    embedding table too, where a column is a dimension of the width). In an adapter of attention whose outputs jvlm
    stores in another order than the file, ``b``, ``magnitude`` and ``bias`` are in jvlm's order.

    Attributes:
      alpha: before division by the rank; ``scale`` has the quotient.
    """

    a: Float[np.ndarray, "i r"]
    b: Float[np.ndarray, "r o"]
    scale: float
    alpha: float
    magnitude: Float[np.ndarray, " o"] | None = None
    bias: Float[np.ndarray, " o"] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows that replace those of an embedding table [vocab, width], or columns of a head's kernel [width, vocab]."""

    token_ids: Int[np.ndarray, " n"]
    rows: Float[np.ndarray, "n d"]


@dataclasses.dataclass(frozen=True)
class AdapterWeights:
    """All of an adapter.

    Attributes:
      config: with which it was made.
      low_rank: by the matrix that each stands beside.
      parameters: path -> whole parameters that take the place of the base's (``train_modules``, ``bias``); one layer of
        a stack where the index says so.
      token_rows: path -> rows of an embedding table or head.
    """

    config: AdapterConfig
    low_rank: Mapping[Target, LowRank]
    parameters: Mapping[Target, np.ndarray] = dataclasses.field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict)
