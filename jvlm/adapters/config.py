"""What adapters a run puts on its model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.validation import check_fields

# How new matrices begin. "pissa" and "olora" take a part of the base away, which then differs from what was loaded.
Init = Literal["default", "gaussian", "pissa", "olora"]
Bias = Literal["none", "all", "lora_only"]


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685) and its relatives; names and meaning are PEFT's where PEFT has the field.

    Attributes:
      rank: of the two matrices.
      alpha: an adapter's output is scaled by alpha / rank, or alpha / sqrt(rank) with ``use_rslora``.
      dropout: share of the adapter branch's inputs that is dropped in training.
      use_rslora: see ``alpha`` (arXiv 2312.03732).
      use_dora: learn the length of each output's row apart from its direction (DoRA, arXiv 2402.09353).
      init: how the matrices begin: "default" (Kaiming uniform and zeros), "gaussian", "pissa" or "olora".
      targets: what gets an adapter; each entry is a tower and role as `jvlm.families.adapters` names them
        ("decoder.attention", "encoder.mlp", "connector", "patch_embed", "embed", "head"), the last part of a Hugging
        Face module name ("q_proj"), "all-linear", or "re:" and a regular expression over the whole module name.
      exclude: entries as in ``targets`` that get none.
      rank_pattern: (pattern of module names, rank) for modules with a rank of their own; the first match counts.
      alpha_pattern: the same for alpha.
      bias: which biases of the base are trained too.
      lora_bias: give the second matrix a bias.
      train_modules: modules that are trained whole beside the adapters ("connector"); PEFT's modules_to_save.
      train_tokens: tokens whose rows of the embedding, and of an untied head, are trained; as text or id.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: Init = "default"
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    bias: Bias = "none"
    lora_bias: bool = False
    train_modules: tuple[str, ...] = ()
    train_tokens: tuple[str | int, ...] = ()

    def __post_init__(self):
        check_fields(self, "adapter.", {"rank": "[1, inf)", "alpha": "(0, inf)", "dropout": "[0, 1)"})
