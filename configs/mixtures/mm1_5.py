"""MM1.5's fine-tuning mixture (arXiv 2409.20566, section 3.3), to import into a config; fill in the files.

    from jvlm import configs
    mixture = configs.module("mixtures/mm1_5").mixture({"single/general": ("llava.jsonl",), ...})

A category's weight is what its ablation calls alpha: samples for each sample of the general one. Text-rich's is not
published; 3.3 gives the published 37.2 %. Single images, several images and text alone are 80:10:10.
"""

from collections.abc import Mapping

from jvlm.data.mixture.config import Mixture, Source

ALPHA = {"general": 1.0, "text_rich": 3.3, "refer_ground": 2.0, "math": 0.5, "code": 0.2, "science": 0.1}
SINGLE, MULTI, TEXT = 0.8, 0.1, 0.1


def mixture(
    files: Mapping[str, tuple[str, ...]] = {},
    *,
    alpha: Mapping[str, float] = {},
    single: float = SINGLE,
    multi: float = MULTI,
    text: float = TEXT,
) -> Mixture:
    """Return the mixture, or that of an ablation: a weight of 0 leaves a category out.

    Args:
      files: of "single/general", "single/text_rich", ..., "multi" and "text".
      alpha: of categories of single images, in the place of `ALPHA`.
      single, multi, text: weights of the three kinds.

    Raises:
      ValueError: files or an alpha of a category that there is not.
    """
    weights = {**ALPHA, **alpha}
    known = {*(f"single/{name}" for name in ALPHA), "multi", "text"}
    if set(files) - known or set(alpha) - set(ALPHA):
        raise ValueError(f"unknown: {sorted({*files} - known | {*alpha} - {*ALPHA})}; known: {sorted(known)}")
    categories = {name: Source(files.get(f"single/{name}", ()), weight) for name, weight in weights.items()}
    return Mixture(
        members={
            "single": Mixture(weight=single, members=categories),
            "multi": Source(files.get("multi", ()), multi),
            "text": Source(files.get("text", ()), text),
        }
    )


def base(files: Mapping[str, tuple[str, ...]] = {}) -> Mixture:
    """Return the ablation's base mixture: single images alone, without referring and grounding."""
    return mixture(files, alpha={"refer_ground": 0.0}, multi=0.0, text=0.0)


def single_image(files: Mapping[str, tuple[str, ...]] = {}) -> Mixture:
    """Return the ablation's single-image mixture: the base, with referring and grounding."""
    return mixture(files, multi=0.0, text=0.0)
