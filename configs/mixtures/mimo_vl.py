"""MiMo-VL's four stages as trees of the kinds of data that each has (arXiv 2506.03569, table 1); fill in files.

    from jvlm import configs
    mixture = configs.module("mixtures/mimo_vl").mixture(3, {"text": ("text.jsonl",), ...})

Which kinds a stage adds is published; their shares are not. All kinds have weight 1 here, which is no value of the
paper's: set the weights that suit your data (``weights``, or ``--data.mixture.members.text.weight 0.1``).
"""

from collections.abc import Mapping

from jvlm.data.mixture.config import Mixture, Source

ADDED = {
    1: ("captions",),
    2: ("interleaved",),
    3: ("text", "ocr", "grounding", "qa", "video", "gui", "instruction", "reasoning"),
    4: ("long_text", "long_documents", "high_resolution", "long_video", "long_reasoning"),
}


def kinds(stage: int) -> tuple[str, ...]:
    """Return the kinds of data of a stage: those it adds, and all of the stages before."""
    return tuple(name for number in range(1, stage + 1) for name in ADDED[number])


def mixture(stage: int, files: Mapping[str, tuple[str, ...]] = {}, weights: Mapping[str, float] = {}) -> Mixture:
    """Return the mixture of a stage, from 1 to 4.

    Args:
      files: of kinds of data, by name.
      weights: of kinds; 0 leaves one out. What is not given is 1.

    Raises:
      ValueError: a stage, or a kind of data, that there is not.
    """
    if stage not in ADDED:
        raise ValueError(f"MiMo-VL has stages 1 to 4, not {stage}")
    known = kinds(stage)
    unknown = {*files, *weights} - set(known)
    if unknown:
        raise ValueError(f"unknown kinds {sorted(unknown)}; stage {stage} has {', '.join(known)}")
    return Mixture(members={name: Source(files.get(name, ()), weights.get(name, 1.0)) for name in known})
