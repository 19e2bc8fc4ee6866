"""Merging an adapter that was trained on a quantised base: into the base as it was, or into its dequantised values.

The two are different models. The base as it was is what is usually published; the dequantised values are what the
adapter was trained on, quantisation error included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from jvlm.adapters.attach import detach, extract
from jvlm.adapters.merge import merge
from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.quantization.kernels import quantized_kernels
from jvlm.quantization.model import dequantized

Into = Literal["base", "dequantized"]


@dataclasses.dataclass(frozen=True)
class MergeError:
    """How far a merged model is from the model that was trained, over the tokens of examples.

    Attributes:
      difference: root mean square of the difference of logits, as a share of that of the trained model's logits.
      largest: largest difference of a logit.
      same_token: share of the tokens whose most likely next token is the same.
    """

    difference: float
    largest: float
    same_token: float

    def __str__(self) -> str:
        return (
            f"logits differ by {100 * self.difference:.2f} %, at most {self.largest:.3g}; "
            f"{100 * self.same_token:.1f} % of the most likely tokens are the same"
        )


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Both ways of merging, measured, and the one that was taken."""

    into: Into
    base: MergeError
    dequantized: MergeError

    def __str__(self) -> str:
        names = {"base": "the base as it was", "dequantized": "the dequantised base"}
        lines = [f"merged into {names[self.into]}; against the model that was trained:"]
        return "\n".join([*lines, f"  {names['base']}: {self.base}", f"  {names['dequantized']}: {self.dequantized}"])


def merge_quantized(
    model: VLM, base: VLM, examples: Iterable[PackedBatch], *, into: Into = "base"
) -> tuple[VLM, MergeReport]:
    """Return the merged model, without quantised kernels, and how far both ways of merging are from ``model``.

    Args:
      model: with a quantised base and adapters, as it was trained.
      base: the model that was quantised, in the dtype that the merged one shall have.
      examples: batches to compare the logits on.
      into: which of the two is returned.

    Raises:
      UserError: a model whose base is not quantised; no examples.
    """
    if next(quantized_kernels(model), None) is None:
        raise UserError("the model's base is not quantised: merge its adapters with jvlm.adapters.merge")
    batches, weights = list(examples), extract(model)
    if not batches:
        raise UserError("no examples to compare the merged models on")
    expected = [_logits(model, batch) for batch in batches]
    into_base = merge(base, weights)
    errors = {"base": _error(expected, into_base, batches)}
    into_values = merge(dequantized(detach(model), base.config.precision.param_dtype), weights)
    errors["dequantized"] = _error(expected, into_values, batches)
    return into_base if into == "base" else into_values, MergeReport(into, **errors)


def _logits(model: VLM, batch: PackedBatch) -> Float[np.ndarray, "T V"]:
    """Logits of the tokens that are not padding."""
    return np.asarray(model(batch))[np.asarray(batch.segment_ids) > 0]


def _error(expected: Sequence[np.ndarray], merged: VLM, batches: Sequence[PackedBatch]) -> MergeError:
    squares = own = largest = same = count = 0.0
    for logits, batch in zip(expected, batches, strict=True):
        merged_logits = _logits(merged, batch)
        difference = (merged_logits - logits).astype(np.float64)
        squares, own = squares + np.square(difference).sum(), own + np.square(logits, dtype=np.float64).sum()
        largest = max(largest, float(np.abs(difference).max()))
        same, count = same + float((merged_logits.argmax(-1) == logits.argmax(-1)).sum()), count + len(logits)
    return MergeError(float(np.sqrt(squares / own)), largest, same / count)
