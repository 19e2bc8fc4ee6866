"""A language model's folder as what `jvlm rlhf` trains: text alone, and a run's folder as its result."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jvlm import families, json_files
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.data.tokenizers import load_tokenizer
from jvlm.training import processors
from jvlm.weights import backbones, run_dir


class Source(NamedTuple):
    """What training starts from.

    Attributes:
      processor: of the model.
      language_model: the folder, where it holds a language model alone; None where it holds a whole model.
    """

    processor: Processor
    language_model: str | None


def source_of(place: str) -> Source:
    """Return what a folder, or an id on the Hub, holds. Raises UserError for one that holds neither."""
    folder = run_dir.local(place)
    if not is_language_model(folder):
        return Source(processors.load(folder), None)
    tokenizer = load_tokenizer(folder)
    family = families.of_language_models()
    family.prepare_tokenizer(tokenizer)
    return Source(Processor(tokenizer, family.text_config(folder), ProcessorConfig()), str(folder))


def is_language_model(folder: Path) -> bool:
    """Return whether a folder holds a language model alone."""
    path = folder / "config.json"
    if run_dir.is_run(folder) or not path.is_file():
        return False
    kind = json_files.read_object(path).get("model_type")
    texts = {name for one in backbones.backbones() if one.tower == "decoder" for name in one.model_types}
    return kind in texts and kind not in families.model_types()
