"""Make the tokenizers of the papers in miniature from the data: 1,010 entries and the special tokens of a family.

    python -m tools.mini.make_tokenizer mini_data configs/mini/tokenizers

Needs transformers. Those in the repository are of the data of seed 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from jvlm.data.readers.array_record import SHARD_SUFFIX
from jvlm.families.idefics2.chat_format import TEMPLATE as IDEFICS2_TEMPLATE
from jvlm.families.qwen2_5_vl.chat_format import CHATML
from tools.make_easy_vqa import SPECIAL_TOKENS, train_tokenizer
from tools.mini.make_data import shard

VOCABULARY = 1010
IDEFICS2_TOKENS = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
# folder, special tokens in the order of their ids, settings
KINDS = (
    (
        "qwen",
        SPECIAL_TOKENS,
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
            "additional_special_tokens": SPECIAL_TOKENS[3:],
        },
    ),
    (
        "idefics2",
        IDEFICS2_TOKENS,
        {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "chat_template": IDEFICS2_TEMPLATE,
            "additional_special_tokens": IDEFICS2_TOKENS[3:],
        },
    ),
)


def texts(example: dict[str, Any]) -> Iterator[str]:
    """Yield what lies between the special tokens where an example is rendered."""
    for block in example.get("document", ()):
        if block["type"] == "text":
            yield block["text"]
    if "text" in example:
        yield example["text"].replace("<image>", "")
    boxes = (example.get("objects") or {}).get("bbox") or [""]
    for message in example.get("messages", ()):
        words = message["content"].replace("<image>", "").replace("<video>", "")
        yield from (f"{message['role']}\n", words.replace("<bbox>", str(boxes[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    files = sorted(options.data.glob(f"train_*{SHARD_SUFFIX}"))
    words = [text for file in files for example in shard(file) for text in texts(example)]
    words += ["system\nYou are a helpful assistant.", "\n"] * 20_000
    words += [str(number) for number in range(10, 100)] * 5000
    for name, special, settings in KINDS:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(words, VOCABULARY, special), model_max_length=4096, **settings
        )
        tokenizer.save_pretrained(str(options.target / name))
        print(name, len(tokenizer), {token: tokenizer.convert_tokens_to_ids(token) for token in special})


if __name__ == "__main__":
    main()
