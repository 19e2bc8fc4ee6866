"""The Cauldron as Idefics2 was fine-tuned on it (arXiv 2405.02246, table 14), to import into a config.

    from jvlm import configs
    mixture = configs.module("mixtures/cauldron").mixture({"vqav2": ("cauldron/vqav2/*.parquet",), ...})

A weight is how often a set is gone through in one pass over the mixture (unit "times"). These are the proportions of
Hugging Face's training code for it (M4, MIX_8); with the sets' answer tokens they give table 14 for 58 of its 59 lines.
"""

from collections.abc import Mapping

from jvlm.data.mixture.config import Mixture, Source

TIMES = {
    "screen2words": 0.5,
    "vistext": 0.3,
    "textcaps": 1,
    "localized_narratives": 0.04,
    "ny_cc_explanation": 0.05,
    "ny_cc_matching": 0.01,
    "ny_cc_ranking": 0.01,
    "vqav2": 0.7,
    "visual7w": 1,
    "okvqa": 2,
    "cocoqa": 1,
    "vsr": 4,
    "rendered_text": 0.04,
    "iam": 1,
    "textvqa": 2,
    "st_vqa": 2,
    "diagram_image_to_text": 1,
    "docvqa": 2,
    "infographic_vqa": 2,
    "chartqa": 2,
    "visualmrc": 1,
    "ai2d": 4,
    "figureqa": 0.03,
    "dvqa": 0.1,
    "plotqa": 0.015,
    "ocrvqa": 0.03,
    "scienceqa": 2,
    "aokvqa": 1,
    "nlvr2": 1,
    "iconqa": 2,
    "clevr": 0.1,
    "clevr_math": 0.2,
    "tallyqa": 0.15,
    "mapqa": 0.01,
    "mimic_cgd": 0.02,
    "spot_the_diff": 0.5,
    "hateful_memes": 1,
    "intergps": 4,
    "geomverse": 0.3,
    "vqarad": 2,
    "websight": 0.0002,
    "datikz": 0.0001,
    "raven": 1.25,
    "lima": 0.25,
    "openhermes": 0.01,
    "orca_math": 0.005,
    "metamathqa": 0.01,
    "math_instruct": 0.01,
    "camel_ai_math": 0.0005,
    "atlas_math_sets": 0.0015,
    "goat": 0.001,
    "dolly": 0.1,
    "tabmwp": 0.25,
    "tqa": 4,
    "hitab": 1,
    "multihiertt": 1,
    "robut_sqa": 0.1,
    "tat_qa": 1.5,
    "chart2text": 0.3,
    "finqa": 0.8,
    "robut_wikisql": 0.02,
    "robut_wtq": 0.015,
}


def mixture(files: Mapping[str, tuple[str, ...]] = {}, times: Mapping[str, float] = {}) -> Mixture:
    """Return the mixture.

    Args:
      files: of sets, by name.
      times: of sets, in the place of `TIMES`; 0 leaves one out.

    Raises:
      ValueError: a set that there is not.
    """
    unknown = {*files, *times} - set(TIMES)
    if unknown:
        raise ValueError(f"unknown sets {sorted(unknown)}; known: {', '.join(TIMES)}")
    weights = {**TIMES, **times}
    return Mixture(unit="times", members={name: Source(files.get(name, ()), w) for name, w in weights.items()})
