"""transformers' greedy answers to an example: the oracle of generation."""

from __future__ import annotations

from typing import Any

from tests.support import Tiny, hf_inputs

MEDIA = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")


def oracle_tokens(tiny: Tiny, example: dict[str, Any], max_new_tokens: int, **options: Any) -> list[int]:
    """New tokens, the one that stops included, of transformers' own generation loop for one example."""
    inputs = hf_inputs(tiny, example, generation_prompt=True)
    never = [tiny.config[name] for name in MEDIA]
    never += range(len(tiny.processor.tokenizer), tiny.config["vocab_size"])
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    found = tiny.torch_model.generate(
        **inputs, max_new_tokens=max_new_tokens, suppress_tokens=never, **(plain | options)
    )
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def prompt(text: str, **media: Any) -> dict[str, Any]:
    """An example of one user turn."""
    return {"messages": [{"role": "user", "content": text}], **media}
