"""Why the scores of a prompt are not finite numbers."""

from __future__ import annotations

from typing import Any

from jvlm.errors import UserError
from jvlm.models.vlm import VLM
from jvlm.weights.finite import BrokenWeights, not_finite


def error(model: VLM, origin: Any, token: int) -> UserError:
    """Return the error of a prompt whose scores for the ``token``-th token of its answer are not finite.

    Only now are the weights looked through.
    """
    named = f" for {origin}" if origin is not None and origin.number is not None else ""
    problem = f"the model's scores{named} are not finite numbers (token {token} of the answer): "
    tensors = not_finite(model)
    if tensors:
        shown = "\n  ".join(tensors[:5])
        more = f"\n  and {len(tensors) - 5} more" if len(tensors) > 5 else ""
        return BrokenWeights(
            f"{problem}{len(tensors)} tensors hold NaN or infinity. Take an earlier checkpoint, or copy the folder "
            f"again:\n  {shown}{more}"
        )
    dtype = model.config.precision.compute_dtype
    return UserError(f"{problem}all weights are, so this input overflows {dtype}; try another precision.compute_dtype")
