"""The model card of an adapter's folder: README.md, as the Hub reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jvlm
from jvlm.adapters.peft_readers import READERS, reader_problems
from jvlm.adapters.weights import AdapterWeights
from jvlm.models.vlm import VLMConfig

FILE = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_EXAMPLE = """```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("%s")
model = PeftModel.from_pretrained(base, "FOLDER OF THIS CARD")
```
"""


def hub_id(name: str | None) -> str | None:
    """Return the name of a base if it is an id on the Hub ("ORG/NAME"), else None: the Hub refuses paths."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def text(weights: AdapterWeights, config: VLMConfig, base_name: str | None) -> str:
    """Return the card: the base if it is on the Hub, tags, and what the adapter is."""
    base, dora = hub_id(base_name), any(low.magnitude is not None for low in weights.low_rank.values())
    kind = "DoRA" if dora else "LoRA"
    tags = [*([f"base_model:adapter:{base}"] if base else []), "lora", "transformers", "jvlm"]
    head = [*([f"base_model: {json.dumps(base)}"] if base else []), *(["base_model_relation: adapter"] if base else [])]
    head += [
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    ranks = sorted({low.rank for low in weights.low_rank.values()})
    rows = {
        "kind": f"{kind} (rsLoRA)" if weights.config.use_rslora else kind,
        "base": base or "not on the Hub",
        "family": config.family,
        "adapted matrices": str(len(weights.low_rank)),
        "ranks": ", ".join(map(str, ranks)) or "none",
        "modules trained whole": ", ".join(weights.config.train_modules) or "none",
        "rows of tokens": str(sum(len(rows.token_ids) for rows in weights.token_rows.values())),
    }
    lines = ["---", *head, "---", "", f"# {kind} adapter", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "| other programs | what they make of it |", "| --- | --- |"]
    for reader in READERS:
        problems = reader_problems(weights, config, reader)
        lines.append(f"| {reader} | {'; '.join(problems) or 'read as it is'} |")
    lines += [
        "",
        f"Written by jvlm {jvlm.__version__}. It loads with PEFT:",
        "",
        _EXAMPLE % (base or "FOLDER OF THE BASE"),
    ]
    return "\n".join(lines)
