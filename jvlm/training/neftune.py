"""NEFTune: uniform noise on the input embeddings in training (Jain et al., arXiv 2310.05914).

The noise of a token is drawn from U(-m, m) with m = alpha / sqrt(L d), where d is the width of the embeddings and L the
length of the token's conversation. In a packed sequence each conversation has its own L, so that packing changes
nothing; a run without packing has as L what transformers has without padding.

Axes: B sequences, S tokens, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jvlm.models.batch import PackedBatch

Where = Literal["text", "merged"]


@dataclasses.dataclass(frozen=True)
class EmbeddingNoise:
    """The noise of one pass over a batch; equal keys give equal noise, however the batch is spread over devices.

    Attributes:
      alpha: scale; 0 changes nothing.
      where: "text" adds noise before vision tokens are put in: what placeholders get is then overwritten. "merged" adds
        it afterwards, to vision tokens too.
    """

    rng: PRNGKeyArray
    alpha: float
    where: Where = "text"

    def of_text(self, embeddings: Float[Array, "B S D"], batch: PackedBatch) -> Float[Array, "B S D"]:
        return self._added(embeddings, batch) if self.where == "text" else embeddings

    def of_merged(self, embeddings: Float[Array, "B S D"], batch: PackedBatch) -> Float[Array, "B S D"]:
        return self._added(embeddings, batch) if self.where == "merged" else embeddings

    def _added(self, embeddings: Float[Array, "B S D"], batch: PackedBatch) -> Float[Array, "B S D"]:
        with jax.named_scope("neftune"):
            bounds = magnitudes(jnp.asarray(batch.segment_ids), embeddings.shape[-1], self.alpha)
            uniform = jax.random.uniform(self.rng, embeddings.shape, jnp.float32, -1.0, 1.0)
            return embeddings + (bounds[..., None] * uniform).astype(embeddings.dtype)


def magnitudes(segment_ids: Int[Array, "B S"], width: int, alpha: float) -> Float[Array, "B S"]:
    """Return the largest noise of each token, alpha / sqrt(L d); 0 for padding."""
    S = segment_ids.shape[1]
    lengths = jax.vmap(lambda ids: jnp.zeros(S + 1, jnp.int32).at[ids].add(1)[ids])(segment_ids)
    return jnp.where(segment_ids > 0, alpha / jnp.sqrt(lengths.astype(jnp.float32) * width), 0.0)
