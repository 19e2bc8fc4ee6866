"""The card of a model (README.md): what it was made from and with, in the form that hubs read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

import jvlm
from jvlm.hub.ids import of_cache, parse_id
from jvlm.json_files import read_object_if_there

Relation = Literal["adapter", "finetune", "merge", "quantized"]
CARD = "README.md"
GGUF = "gguf"  # tag of a repository of GGUF files


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says. Fields that nothing is known about are left out of it.

    Attributes:
      base_model: id of the model that this one was made from; a folder of a disk is never named.
      relation: how it was made from that.
      license: of the base, as its card has it.
      datasets: ids of those that it was trained on.
      tags: beside those that follow from the rest.
      scores: metric -> value, of the evaluation.
      evaluated_on: name of the data that they were measured on.
    """

    base_model: str | None = None
    relation: Relation = "finetune"
    license: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluated_on: str = "held-out examples"

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the values of the card's YAML, for a repository of this name."""
        is_adapter = self.relation == "adapter"
        library = "gguf" if GGUF in self.tags else "peft" if is_adapter else "transformers"
        values: dict[str, Any] = {"library_name": library}
        values["pipeline_tag"] = "image-text-to-text"
        tags = ["jvlm", *self.tags]
        if self.license:
            values["license"] = self.license
        if self.base_model:
            values["base_model"] = self.base_model
            values["base_model_relation"] = self.relation
            tags.append(f"base_model:{self.relation}:{self.base_model}")
        if is_adapter:
            tags += ["lora", "transformers"]
        values["tags"] = list(dict.fromkeys(tags))
        if self.datasets:
            values["datasets"] = list(self.datasets)
        if self.scores:
            dataset = {"name": self.evaluated_on, "type": next(iter(self.datasets), "custom")}
            metrics = [{"type": metric, "value": value} for metric, value in self.scores.items()]
            results = [{"task": {"type": "image-text-to-text"}, "dataset": dataset, "metrics": metrics}]
            values["model-index"] = [{"name": name, "results": results}]
        return values

    def text(self, repo: str) -> str:
        """Return README.md for a repository."""
        name = repo.partition("/")[2] or repo
        front = yaml.safe_dump(self.metadata(name), sort_keys=False, allow_unicode=True)
        made = {"adapter": "an adapter of", "merge": "merged from", "quantized": "quantised from"}
        words = made.get(self.relation, "fine-tuned from")
        lines = [f"# {name}", ""]
        base = f"[{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_model else "another model"
        lines.append(f"A vision-language model, {words} {base} with jvlm {jvlm.__version__}.")
        if self.scores:
            lines += ["", f"| {self.evaluated_on} | score |", "| --- | --- |"]
            lines += [f"| {metric} | {value:.4g} |" for metric, value in self.scores.items()]
        lines += ["", "## Use", "", f"```{'shell' if GGUF in self.tags else 'python'}", *_use(repo, self), "```", ""]
        return f"---\n{front}---\n\n" + "\n".join(lines)


def _use(repo: str, card: Card) -> list[str]:
    if GGUF in card.tags:
        return [f"hf download {repo} --local-dir .", "llama-server -m NAME.gguf --mmproj mmproj-NAME.gguf"]
    if card.relation != "adapter":
        return ["import jvlm", "", f'model, processor = jvlm.load("{repo}")']
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText",
        "",
        f'base = AutoModelForImageTextToText.from_pretrained("{card.base_model or "BASE"}")',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
    ]


def of_folder(folder: Path, **facts: Any) -> Card:
    """Return a card from what a folder's files say: an adapter or a model, its base if that has an id.

    Args:
      facts: fields of `Card` that are known otherwise, which count.
    """
    adapter = read_object_if_there(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path")
    values: dict[str, Any] = {"relation": "adapter" if adapter else "finetune"}
    if not adapter and "quantization_config" in read_object_if_there(folder / "config.json"):
        values["relation"] = "quantized"
    if not adapter and not (folder / "config.json").is_file() and any(folder.glob("*.gguf")):
        values["tags"] = (GGUF,)
    values["base_model"] = base_id(base) if base else None
    return Card(**{**values, **{key: value for key, value in facts.items() if value is not None}})


def base_id(source: str | None) -> str | None:
    """Return the id of a model's folder, if it is one on the Hub or lies in its cache; None for other folders."""
    hub_id = None if source is None else of_cache(source) or (None if Path(source).exists() else parse_id(source))
    return hub_id.repo if hub_id else None


def license_of(folder: Path | None) -> str | None:
    """Return the license that a folder's own card names; None where it says nothing."""
    path = None if folder is None else folder / CARD
    if path is None or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        values = yaml.safe_load(text.split("---", 2)[1])
    except yaml.YAMLError:  # a card that cannot be read says nothing
        return None
    license = values.get("license") if isinstance(values, dict) else None
    return license if isinstance(license, str) else None
