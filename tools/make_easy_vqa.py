"""Build the demo's shards and tokenizer from the easy-VQA set (https://github.com/vzhou842/easy-VQA, MIT).

    python tools/make_easy_vqa.py easy_vqa.tar configs/mimo_vl/easy_vqa_data

One row a picture: all its questions as turns of one conversation, in random order, and among them "where is the ...?"
with a box read off the pixels, answered in MiMo's JSON form.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jvlm.data.shards import SHARD_SUFFIX, write_shard
from jvlm.data.template import QWEN_TEMPLATE

# What the official generator draws with, so that "the red shape" can be named for every picture.
COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")
VOCABULARY = 530  # before the special tokens: bytes, numbers to 99, and the phrases that questions are made of
BOX_WEIGHT = 3.0  # of the one turn about a box against a dozen about words
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def find_shape(image: Image.Image) -> tuple[str, list[int]]:
    """Colour name and (x1, y1, x2, y2) of the one shape, edges at half coverage."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    values, counts = np.unique(border, axis=0, return_counts=True)
    background = values[counts.argmax()]
    inside = np.abs(pixels - background).max(-1) > 40
    name, colour = min(
        COLOURS.items(), key=lambda item: np.median(np.abs(pixels[inside] - np.asarray(item[1])).sum(-1))
    )
    direction = np.asarray(colour, np.float32) - background
    coverage = ((pixels - background) @ direction) / (direction @ direction)
    ys, xs = np.nonzero(coverage > 0.5)
    return name, [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def find_kind(questions: list[tuple[str, str]], colour: str) -> str | None:
    """The shape's kind if the picture's own questions tell it; None if they don't."""
    for question, answer in questions:
        if answer in SHAPES:
            return answer
        for shape in SHAPES:
            asks = f" {shape}" in question
            says_no = " not " in question or "is no " in question
            if asks and answer in ("yes", "no") and (answer == "yes") != says_no:
                return shape
            if asks and answer in COLOURS and question.startswith("what"):
                return shape
    return None


def turns(seed: str, asked: list[tuple[str, str]], label: str) -> list[tuple[str, str]]:
    """The picture's questions in random order, with one for the box among them.

    Half the pictures ask for "the shape", anywhere. The others name it, which gives the other answers away: most of
    them at the end, a quarter at the start, so that a model has seen the question asked of a bare picture too.
    """
    draw = random.Random(seed)
    order = draw.sample(asked, len(asked))
    named = draw.random() < 0.5
    name = label if named else "shape"
    place = draw.choices((0, len(order)), (1, 3))[0] if named else draw.randint(0, len(order))
    answer = f'```json\n[{{"bbox_2d": <bbox>, "label": "{name}"}}]\n```'
    return [*order[:place], (f"where is the {name}?", answer), *order[place:]]


def rows(archive: tarfile.TarFile, split: str):
    """The conversations of one split, in order of the picture's number."""
    asked = defaultdict(list)
    for question, answer, number in json.load(archive.extractfile(f"easy_vqa/{split}/questions.json")):
        asked[number].append((question, answer))
    for number in sorted(asked):
        png = archive.extractfile(f"easy_vqa/{split}/images/{number}.png").read()
        colour, box = find_shape(Image.open(io.BytesIO(png)))
        kind = find_kind(asked[number], colour) or "shape"
        label = f"{colour} {kind}"
        messages = []
        for index, (question, reply) in enumerate(turns(f"{split}{number}", asked[number], label)):
            messages.append({"role": "user", "content": ("" if index else "<image>") + question})
            weight = {"loss_scale": BOX_WEIGHT} if "<bbox>" in reply else {}
            messages.append({"role": "assistant", "content": reply, **weight})
        yield {
            "id": f"easy-vqa-{split}-{number}",
            "messages": messages,
            "images": [{"bytes": png, "path": f"{split}/{number}.png"}],
            "objects": {"bbox": [box]},
        }


def chat_texts(row) -> list[str]:
    """What lies between the special tokens when a row is rendered, roles included."""
    box = str(row["objects"]["bbox"][0])
    contents = [m["content"].replace("<image>", "").replace("<bbox>", box) for m in row["messages"]]
    roles = [f"{m['role']}\n" for m in row["messages"]]
    return ["system\nYou are a helpful assistant.", "\n", *contents, *roles]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of Qwen's kind (any text encodable), with numbers to 99, small enough for the demo."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\p{N}{1,2}|[^\p{N}]+")
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(arguments.archive) as archive:
        splits = {split: list(rows(archive, split)) for split in ("train", "test")}
        for name in ("LICENSE", "README.md"):
            text = archive.extractfile(f"easy_vqa/{name}").read()
            (arguments.target / f"easy_vqa_{name}").write_bytes(text)
    for split, content in splits.items():
        print(split, write_shard(arguments.target / f"{split}{SHARD_SUFFIX}", content), "pictures")
    texts = [text for row in splits["train"] for text in chat_texts(row)]
    texts += [str(n) for n in range(10, 100)] * 5000  # often enough for each to be one token
    tokenizer = train_tokenizer(texts, VOCABULARY)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN_TEMPLATE,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=4096,
    )
    fast.save_pretrained(str(arguments.target / "tokenizer"))
    print("tokenizer", len(fast), "tokens:", {t: fast.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS})


if __name__ == "__main__":
    main()
