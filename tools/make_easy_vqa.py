"""Build the demo's shards and tokenizer from the easy-VQA set (https://github.com/vzhou842/easy-VQA, MIT).

    python tools/make_easy_vqa.py easy_vqa.tar configs/mimo_vl/easy_vqa_data

One example an image: all its questions as turns of one conversation, and among them "where is the shape?" with a box
read off the pixels, answered in MiMo's JSON form.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jvlm.data.readers.array_record import SHARD_SUFFIX, write_shard
from jvlm.families.qwen2_5_vl.chat_format import CHATML

# What the official generator draws with.
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
# How much of its box a shape fills.
FILLED = {"circle": 0.785, "rectangle": 1.0, "triangle": 0.5}
VOCABULARY = 530  # before the special tokens: bytes, numbers to 99, and the phrases that questions are made of
FIRST_WEIGHT, BOX_WEIGHT = 3.0, 5.0  # of the turns that cannot be answered from what was said before
# In a stage's conversations, of an answer of two tokens: a box has fifteen, of weight 1.
ANSWER_WEIGHT, SECOND_WEIGHT = 4.0, 2.0
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def find_shape(image: Image.Image) -> tuple[tuple[str, str], list[int]]:
    """(colour, kind) as far as the pixels tell, and (x1, y1, x2, y2) of the one shape, edges at half coverage."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    values, counts = np.unique(border, axis=0, return_counts=True)
    background = values[counts.argmax()]
    inside = np.abs(pixels - background).max(-1) > 40
    name, colour = min(COLOURS.items(), key=lambda c: np.median(np.abs(pixels[inside] - np.asarray(c[1])).sum(-1)))
    direction = np.asarray(colour, np.float32) - background
    coverage = np.clip(((pixels - background) @ direction) / (direction @ direction), 0, 1)
    ys, xs = np.nonzero(coverage > 0.5)
    x1, y1, x2, y2 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    filled = coverage[y1:y2, x1:x2].mean()
    kind = min(FILLED, key=lambda k: abs(FILLED[k] - filled))
    return (name, kind), [x1, y1, x2, y2]


def told(asked: list[tuple[str, str]], words) -> str | None:
    """Return colour or kind that the image's own answers give, if they do; a clipped shape can mislead the pixels."""
    return next((answer for _, answer in asked if answer in words), None)


def turns(seed: str, asked: list[tuple[str, str]], name: str) -> list[tuple[str, str, float]]:
    """(question, answer, loss weight) of an image's turns: all its questions, and one for the box.

    Answers give one another away ("is there a circle?" - "yes"), so only what comes first must be seen. The first
    three turns ask for place, shape and colour in random order, and weigh more; the rest follows in random order.
    """
    draw = random.Random(seed)
    order = draw.sample(asked, len(asked))

    def about(words) -> tuple[str, str] | None:
        fitting = (t for t in order if t[1] in words or (t[1] in ("yes", "no") and any(f" {w}" in t[0] for w in words)))
        return next(fitting, None)

    where = ("where is the shape?", f'```json\n[{{"bbox_2d": <bbox>, "label": "{name}"}}]\n```')
    first = [t for t in (where, about(FILLED), about(COLOURS)) if t is not None]
    rest = [t for t in order if t not in first]
    draw.shuffle(first)
    return [(*t, BOX_WEIGHT if t is where else FIRST_WEIGHT) for t in first] + [(*t, 1.0) for t in rest]


def examples(archive: tarfile.TarFile, split: str):
    """Yield the conversations of one split, in order of the image's number."""
    asked = defaultdict(list)
    for question, answer, number in json.load(archive.extractfile(f"easy_vqa/{split}/questions.json")):
        asked[number].append((question, answer))
    for number in sorted(asked):
        image = Image.open(archive.extractfile(f"easy_vqa/{split}/images/{number}.png")).convert("RGB")
        seen, box = find_shape(image)
        name = " ".join(told(asked[number], words) or word for words, word in zip((COLOURS, FILLED), seen, strict=True))
        messages = []
        for question, reply, weight in turns(f"{split}{number}", asked[number], name):
            messages.append({"role": "user", "content": ("" if messages else "<image>") + question})
            messages.append({"role": "assistant", "content": reply, "loss_scale": weight})
        yield {
            "id": f"easy-vqa-{split}-{number}",
            "messages": messages,
            "images": [{"bytes": as_webp(image), "path": f"{split}/{number}.webp"}],
            "objects": {"bbox": [box]},
        }


def as_webp(image: Image.Image) -> bytes:
    """Return the same pixels in less than half of PNG's bytes."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def stage_conversations(example) -> dict[str, list[dict]]:
    """Return the conversations of one image for each stage of the demo: "where", "shapes" and "questions".

    Each is short, so that its first answer, which must be seen, is a large part of the loss: in a long conversation
    most answers follow from earlier ones. A place and a kind of shape are learned quickly where little else is asked,
    and hardly at all where everything is; so they come first, one after the other.

    - where: the box.
    - shapes: the kind of shape, up to two questions of yes or no about it, and the box.
    - questions: the box, kind and colour, and up to three questions of yes or no about each; behind a question about
      the shape comes one about the colour, and the other way round, so that neither answer gives the other away.
    """
    messages, draw = example["messages"], random.Random(example["id"])
    turns = [
        (q["content"].removeprefix("<image>"), a["content"]) for q, a in zip(messages[::2], messages[1::2], strict=True)
    ]
    box = next(turn for turn in turns if "<bbox>" in turn[1])
    rest = draw.sample([turn for turn in turns if turn is not box], len(turns) - 1)
    of_shape = [t for t in rest if t[1] in FILLED or any(kind in t[0] for kind in FILLED)]
    of_colour = [t for t in rest if t not in of_shape]
    judged, judged_colour = ([t for t in group if t[1] in ("yes", "no")] for group in (of_shape, of_colour))
    named, named_colour = ([t for t in group if t[1] not in ("yes", "no")][:1] for group in (of_shape, of_colour))

    def conversation(name: str, *asked: tuple[str, str]) -> dict:
        messages = []
        for (question, answer), weight in zip(asked, (ANSWER_WEIGHT, SECOND_WEIGHT), strict=False):
            messages.append({"role": "user", "content": ("" if messages else "<image>") + question})
            messages.append(
                {"role": "assistant", "content": answer, "loss_scale": 1.0 if "<bbox>" in answer else weight}
            )
        boxes = {"objects": example["objects"]} if box in asked else {}
        return {"id": f"{example['id']}-{name}", "messages": messages, "images": example["images"], **boxes}

    def pairs(name: str, firsts: list, others: list) -> list[dict]:
        return [
            conversation(f"{name}-{number}", first, *([draw.choice(others)] if others else []))
            for number, first in enumerate(firsts[:3])
        ]

    where = conversation("where", box)
    return {
        "where": [where],
        "shapes": [where, *(conversation(f"shape-{n}", turn) for n, turn in enumerate(named + judged[:2]))],
        "questions": [
            where,
            *(conversation(f"name-{n}", turn) for n, turn in enumerate(named + named_colour)),
            *pairs("judge-shape", judged, of_colour),
            *pairs("judge-colour", judged_colour, of_shape),
        ],
    }


def held_out_parts(examples: list[dict]) -> dict[str, list[dict]]:
    """Return the conversations of "shapes" of the official test images, in two parts without a common image: every
    third image to choose settings of a run by, the others to report it with."""
    parts: dict[str, list[dict]] = {"shapes_validation": [], "shapes_test": []}
    for number, example in enumerate(examples):
        part = "shapes_test" if number % 3 else "shapes_validation"
        parts[part] += stage_conversations(example)["shapes"]
    return parts


def chat_texts(example) -> list[str]:
    """Return what lies between the special tokens when an example is rendered, roles included."""
    box = str(example["objects"]["bbox"][0])
    contents = [m["content"].replace("<image>", "").replace("<bbox>", box) for m in example["messages"]]
    roles = [f"{m['role']}\n" for m in example["messages"]]
    return ["system\nYou are a helpful assistant.", "\n", *contents, *roles]


def train_tokenizer(texts: list[str], vocabulary: int, special: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Return a byte-level BPE of Qwen's kind (any text encodable), with numbers to 99, small enough for the demo."""
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
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(arguments.archive) as archive:
        splits = {split: list(examples(archive, split)) for split in ("train", "test")}
        for name in ("LICENSE", "README.md"):
            text = archive.extractfile(f"easy_vqa/{name}").read()
            (arguments.target / f"easy_vqa_{name}").write_bytes(text)
    for split, content in splits.items():
        print(split, write_shard(arguments.target / f"{split}{SHARD_SUFFIX}", content), "images")
    stages = [stage_conversations(example) for example in splits["train"]]
    # in order of the images: those that come again then take hardly any space
    parts = {stage: [c for image in stages for c in image[stage]] for stage in stages[0]}
    for name, conversations in (parts | held_out_parts(splits["test"])).items():
        print(name, write_shard(arguments.target / f"{name}{SHARD_SUFFIX}", conversations), "conversations")
    texts = [text for example in splits["train"] for text in chat_texts(example)]
    texts += [str(n) for n in range(10, 100)] * 5000  # often enough for each to be one token
    tokenizer = train_tokenizer(texts, VOCABULARY)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=4096,
    )
    fast.save_pretrained(str(arguments.target / "tokenizer"))
    print("tokenizer", len(fast), "tokens:", {t: fast.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS})


if __name__ == "__main__":
    main()
