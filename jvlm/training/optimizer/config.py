"""The settings of an optimizer: which, how fast each parameter moves, and how that changes over the steps."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from typing import Literal

from jvlm.errors import UserError
from jvlm.models.vlm import TOWERS
from jvlm.validation import check_fields

Kind = Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon"]
# What of an adapter LoRA+ trains faster: everything that begins at the output's side.
_LORA_PLUS = (".adapter.b", ".adapter.magnitude", ".adapter.bias")


def tower_of(path: str) -> str:
    """Return the tower of a dotted parameter path."""
    return path.partition(".")[0]


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns matches a dotted parameter path."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with its learning rates and schedule. Weight decay is decoupled in all of them.

    Attributes:
      kind: "adamw". "adamw_8bit" keeps AdamW's moments of large matrices in 8 bits, by blocks of at most 256 values on
        bitsandbytes' dynamic scale (Dettmers et al., arXiv 2110.02861): 2 bytes a parameter instead of 8. "adafactor"
        keeps rows' and columns' means of squared gradients and no momentum (arXiv 1804.04235), as transformers' with
        ``scale_parameter=False``. "lion" moves by the sign of its momentum (arXiv 2302.06675; its authors take a third
        to a tenth of AdamW's learning rate, three to ten times its weight decay, and betas of 0.9 and 0.99). "muon"
        moves matrices along their orthogonalised momentum (Jordan et al., 2024), at the size of AdamW's steps (arXiv
        2502.16982), so that learning rates are of the same order; embeddings, the output matrix, position tables, norms
        and biases stay with AdamW. A small model trained from nothing learns faster by it.
      learning_rate: peak; used by every tower that has none of its own.
      encoder_lr: peak of the encoder's; 0 freezes it (no gradient, no state, no change). None is ``learning_rate``.
      connector_lr: peak of the connector's; as encoder_lr.
      decoder_lr: peak of the decoder's; as encoder_lr.
      lr_pattern: (pattern of dotted paths, peak) of parameters with a learning rate of their own, as
        ("decoder.embedding", 1e-6); the first match counts, before the tower's. 0 freezes.
      lora_plus_ratio: factor on the learning rate of adapters' second matrices, magnitudes and biases (LoRA+, arXiv
        2402.12354); 16 is its authors' choice, with about half the learning rate. None is 1.
      schedule: after the warm-up, "cosine" or "linear" decay to the end, "constant", or "wsd": constant, and decay at
        the end (warm-up, stable, decay; arXiv 2404.06395).
      warmup_ratio: share of the steps with linear warm-up.
      warmup_steps: their number, in place of ``warmup_ratio``.
      decay_ratio: share of the steps in which "wsd" decays.
      decay_shape: how it decays: "linear", "cosine" or "1-sqrt".
      min_lr_ratio: learning rate at the end, as a share of the peak.
      train: patterns of the dotted paths of parameters to train, as "connector.*"; empty is all of them.
      freeze: patterns of those to freeze. Both on top of learning rates of 0.
      weight_decay: of matrices; norms and biases have none.
      no_decay: patterns of further parameters without weight decay, as "connector.*".
      beta1: decay of the mean of gradients (AdamW; Lion: share of it in the step).
      beta2: decay of the mean of squared gradients (AdamW; Lion: of the mean of gradients).
      eps: added to AdamW's denominator.
      muon_beta: momentum of Muon.
      adafactor_decay: exponent of Adafactor's second moment: its decay in step t is 1 - t ** -adafactor_decay.
      adafactor_clip: largest root mean square of Adafactor's step of a matrix, before the learning rate.
      max_grad_norm: largest norm of the whole gradient.
      encoder_max_grad_norm: largest norm of the encoder's gradient, applied before that of the whole; None sets none.
      connector_max_grad_norm: the same of the connector's.
      decoder_max_grad_norm: the same of the decoder's.
      ema_decay: keep a moving average of the trained parameters in float32, with this decay a step; None keeps none.
      use_ema: validate, score and export that average, where there is one, in place of the last parameters.
    """

    kind: Kind = "adamw"
    learning_rate: float = 1e-5
    encoder_lr: float | None = None
    connector_lr: float | None = None
    decoder_lr: float | None = None
    lr_pattern: tuple[tuple[str, float], ...] = ()
    lora_plus_ratio: float | None = None
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    decay_ratio: float = 0.1
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    min_lr_ratio: float = 0.0
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95
    adafactor_decay: float = 0.8
    adafactor_clip: float = 1.0
    max_grad_norm: float = 1.0
    encoder_max_grad_norm: float | None = None
    connector_max_grad_norm: float | None = None
    decoder_max_grad_norm: float | None = None
    ema_decay: float | None = None
    use_ema: bool = True

    def __post_init__(self):
        shares = dict.fromkeys(("warmup_ratio", "decay_ratio", "min_lr_ratio", "adafactor_decay"), "[0, 1]")
        rates = dict.fromkeys(("learning_rate", "encoder_lr", "connector_lr", "decoder_lr", "weight_decay"), "[0, inf)")
        betas = dict.fromkeys(("beta1", "beta2", "muon_beta", "ema_decay"), "[0, 1)")
        norms = ("max_grad_norm", *(f"{tower}_max_grad_norm" for tower in TOWERS))
        positive = dict.fromkeys(("eps", "adafactor_clip", *norms), "(0, inf)")
        rest = {"warmup_steps": "[0, inf)", "lora_plus_ratio": "[1, inf)"}
        check_fields(self, "optimizer.", {**shares, **rates, **betas, **positive, **rest})
        for pattern, rate in self.lr_pattern:
            if not 0 <= rate < math.inf:
                raise UserError(
                    f"optimizer.lr_pattern: the learning rate of {pattern!r} must be at least 0, got {rate}"
                )
        if not any(self.rate_of(tower) for tower in TOWERS) and not any(rate for _, rate in self.lr_pattern):
            raise UserError(
                "every tower is frozen, so nothing would be trained: optimizer.learning_rate is "
                f"{self.learning_rate}, and encoder_lr, connector_lr and decoder_lr are {self.encoder_lr}, "
                f"{self.connector_lr} and {self.decoder_lr}; give one of them a rate above 0"
            )

    def rate_of(self, tower: str) -> float:
        """Return the peak learning rate of "encoder", "connector" or "decoder"."""
        own = getattr(self, f"{tower}_lr")
        return self.learning_rate if own is None else own

    def group_of(self, path: str) -> tuple[str, float]:
        """Return the group of a parameter and its peak learning rate.

        A group is a pattern of ``lr_pattern``, or else a tower; parameters that LoRA+ trains faster are another one.
        """
        pairs = [pair for pair in self.lr_pattern if fnmatch.fnmatchcase(path, pair[0])]
        name, rate = pairs[0] if pairs else (tower_of(path), self.rate_of(tower_of(path)))
        if self.lora_plus_ratio is not None and path.endswith(_LORA_PLUS):
            return f"{name} lora+", rate * self.lora_plus_ratio
        return name, rate

    def groups(self, paths: Iterable[str]) -> dict[str, float]:
        """Return the peak learning rate of each group of parameters, in the order of the paths."""
        return dict(map(self.group_of, paths))

    def warmup(self, steps: int) -> int:
        """Return the steps of warm-up in a run of so many steps."""
        return round(self.warmup_ratio * steps) if self.warmup_steps is None else self.warmup_steps
