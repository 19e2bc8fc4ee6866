"""Which linear layers of a model adapters may be put on."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class AdapterTargets:
    """Regular expressions by tower; each must match the whole dotted path of a linear layer, without ``.kernel``.

    Attributes:
      encoder: of the vision tower, as ``encoder\\.blocks\\.layer\\.attention\\.out``.
      connector: of the connector.
      decoder: of the language model.
    """

    encoder: tuple[str, ...]
    connector: tuple[str, ...]
    decoder: tuple[str, ...]

    def matches(self, path: str) -> bool:
        """Return whether adapters may be put on the linear layer at a dotted path."""
        tower = path.partition(".")[0]
        patterns = {"encoder": self.encoder, "connector": self.connector, "decoder": self.decoder}.get(tower, ())
        return any(re.fullmatch(pattern, path) for pattern in patterns)


# A layer of a stack, and one of several in a repeated pattern of layers (mixtures of experts, cross-attention).
_LAYER = r"blocks\.layer\.(pattern\.\d+\.)?"

# Targets of the shared towers, for the records of families that use them.
VIT = (rf"encoder\.{_LAYER}attention\.(q|k|v|out)", rf"encoder\.{_LAYER}mlp\.(up|down)")
FUSED_VIT = (rf"encoder\.{_LAYER}attention\.(qkv_by_head|out)", rf"encoder\.{_LAYER}mlp\.(gate|up|down)")
PERCEIVER = (
    r"connector\.projection\.(gate|up|down)",
    rf"connector\.{_LAYER}attention\.(q|k|v|out)",
    rf"connector\.{_LAYER}mlp\.(gate|up|down)",
)
PROJECTOR = (r"connector\.projector\.maps\.\d+",)
TRANSFORMER = (rf"decoder\.{_LAYER}attention\.(q|k|v|out)", rf"decoder\.{_LAYER}mlp\.(gate|up|down)")
CROSS_ATTENTION = (rf"decoder\.{_LAYER}cross\.attention\.(q|k|v|out)", rf"decoder\.{_LAYER}cross\.mlp\.(gate|up|down)")
