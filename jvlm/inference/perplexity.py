"""The perplexity of texts under a language model: that of a whole model, or a language model's folder alone."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import jvlm
from jvlm import json_files
from jvlm.data.mrope import mrope_positions
from jvlm.data.tokenizers import load_tokenizer
from jvlm.errors import UserError
from jvlm.models import registry
from jvlm.models.batch import PackedBatch
from jvlm.models.layers import Precision
from jvlm.weights import backbones

_BATCH = 8
_LEAST = 64
_BLOCK = 256


class TextPerplexity:
    """Gives e to the mean loss of a token of each of some texts, each text by itself.

    Texts are tokenized with the tokenizer's beginning of text, if it has one; the first token has no loss. A text of
    one token has no perplexity: infinity.

    Args:
      path: a folder or run that `jvlm.load` takes, whose encoder is not used; or the folder of a language model of the
        kinds of docs/backbones.md.
      max_tokens: of a text that count; the rest is left out.

    Attributes:
      identity: tells the model, its files and ``max_tokens`` from others.

    Raises:
      UserError: no model that can be used.
    """

    def __init__(self, path: str | Path, max_tokens: int = 1024):
        if max_tokens < 2:
            raise UserError(f"max_tokens is {max_tokens}; it must be at least 2")
        self.path, self.max_tokens = path, max_tokens
        files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if Path(path).is_dir() else []
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self.identity = hashlib.sha256(repr((str(path), stats, max_tokens)).encode()).hexdigest()
        if _is_language_model(Path(path)):
            config = backbones.read_config(path)
            precision = Precision()
            self._tokenizer = load_tokenizer(path)
            decoder = registry.build(config, precision=precision, rngs=nnx.Rngs(0))
            values = backbones.load(path, config, precision)
            nnx.update(decoder, nnx.from_flat_state([(tuple(name.split(".")[1:]), v) for name, v in values.items()]))
        else:
            model, processor = jvlm.load(path)
            self._tokenizer, decoder = processor.tokenizer, model.decoder
        self._graph, self._state = nnx.split(decoder)

    def __reduce__(self):  # loaded where it is unpickled
        return type(self), (self.path, self.max_tokens)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Return the perplexity of each text."""
        ids = [np.asarray(self._tokenizer(text)["input_ids"], np.int32)[: self.max_tokens] for text in texts]
        # texts of about one length together, so that little is padded; each length is compiled once
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        result = [math.inf] * len(ids)
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            length = max(_LEAST, 1 << (max(len(ids[i]) for i in some) - 1).bit_length())
            losses = np.asarray(_losses(self._graph, self._state, _batch([ids[i] for i in some], length)))
            for row, i in enumerate(some):
                if len(ids[i]) > 1:
                    result[i] = math.exp(min(float(losses[row]) / (len(ids[i]) - 1), 700.0))
        return result


def _is_language_model(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file():
        return False
    kind = json_files.read_object(config).get("model_type")
    return any(kind in one.model_types for one in backbones.backbones() if one.tower == "decoder")


def _batch(ids: Sequence[np.ndarray], length: int) -> PackedBatch:
    """One text in each sequence, and no images; always as many sequences."""
    tokens = np.zeros((_BATCH, length), np.int32)
    segments = np.zeros((_BATCH, length), np.int32)
    positions = np.zeros((_BATCH, length, 3), np.int32)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one
        segments[row, : len(one)] = 1
        positions[row, : len(one)] = mrope_positions(len(one), ())
    return PackedBatch(
        tokens=tokens,
        segment_ids=segments,
        positions=positions,
        loss_weights=(segments > 0).astype(np.float32),
        patches=np.zeros((_BATCH, 0, 1), np.uint8),
        patch_segment_ids=np.zeros((_BATCH, 0), np.int32),
        patch_window_ids=np.zeros((_BATCH, 0), np.int32),
        patch_positions=np.zeros((_BATCH, 0, 2), np.int32),
        vision_index=np.full((_BATCH, length), -1, np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _losses(graph: nnx.GraphDef, state: nnx.State, batch: PackedBatch) -> Float[Array, " B"]:
    """The sum of the losses of each sequence, float32; logits of a block of positions exist at a time."""
    decoder = nnx.merge(graph, state)
    hidden = decoder(decoder.fuse(decoder.embed(batch.tokens), None, batch)).hidden
    targets = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    counted = jnp.pad(batch.segment_ids[:, 1:] > 0, ((0, 0), (0, 1)))

    def blocks(x: Array) -> Array:
        block = min(_BLOCK, x.shape[1])
        return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // block, block, *x.shape[2:]), 1, 0)

    def add(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden_BTD, targets_BT, counted_BT = xs
        logits = decoder.logits(hidden_BTD).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
        return total + ((jax.nn.logsumexp(logits, -1) - chosen) * counted_BT).sum(-1), None

    return jax.lax.scan(add, jnp.zeros(hidden.shape[0], jnp.float32), tuple(map(blocks, (hidden, targets, counted))))[0]
