"""What of a model is quantised, and how."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Literal

from jvlm.errors import UserError
from jvlm.validation import check_fields

Kind = Literal["nf4", "int8", "fp8"]


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Frozen matrices in fewer bits, under adapters (QLoRA, arXiv 2305.14314).

    Embeddings, norms, biases, the head and routers of experts are never quantised.

    Attributes:
      kind: "nf4" is bitsandbytes' 4-bit NormalFloat in blocks of 64 inputs; "int8" has a scale for each output, as has
        "fp8" (e4m3).
      double: quantise the scales of nf4 too, to 8 bits in blocks of 256: 4.13 bits a weight in place of 4.5.
      targets: patterns of the dotted paths of linear layers ("decoder.blocks.*"), and of the matrices of experts
        ("decoder.blocks.*.mlp.gate"); the default is those of the language model's layers.
    """

    kind: Kind = "nf4"
    double: bool = True
    targets: tuple[str, ...] = ("decoder.blocks.*",)

    def __post_init__(self):
        check_fields(self, "quantize.", {})
        if not self.targets:
            raise UserError("quantize.targets is empty, so nothing would be quantised; leave quantize out instead")

    def matches(self, path: str) -> bool:
        """Return whether the layer at a dotted path, without ``.kernel``, or the matrix of experts is quantised."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.targets)
