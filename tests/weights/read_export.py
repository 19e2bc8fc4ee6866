"""What one version of transformers makes of an exported folder: a program that prints JSON. See `every_transformers`.

python -m tests.weights.read_export FOLDER REQUEST: a request is JSON, {"messages": as templates take them, "images":
paths, "texts": for the tokenizer alone}.
"""

import json
import sys

# first: transformers imports torchvision, for its functions of pixels
import tests.torchvision_operators  # noqa: F401

# isort: split
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

if transformers.__version__.startswith("4.57"):
    # From 4.55 on, until 5, a patch at the edge of two cells of the position table is put into the one before: every
    # patch of a square tile of Idefics3's and SmolVLM's (their issue 41190). Without that they compute what we do.
    BUCKETS = torch.bucketize
    torch.bucketize = lambda places, *rest, **more: BUCKETS(places + 2e-6, *rest, **more)


def processor_of(folder: str):
    """The processor that resizes with Pillow."""
    major, minor = map(int, transformers.__version__.split(".")[:2])
    processor = AutoProcessor.from_pretrained(folder)
    if minor > 49 or major > 4:
        # torchvision resizes otherwise than Pillow, and given to AutoProcessor this would choose a tokenizer too
        choice = {"backend": "pil"} if major > 4 else {"use_fast": False}
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, **choice)
    return processor


def main(folder: str, request: str) -> None:
    with open(request) as file:
        example = json.load(file)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), processor_of(folder)
    text = processor.apply_chat_template(example["messages"], add_generation_prompt=True)
    of_tokenizer = tokenizer.apply_chat_template(example["messages"], add_generation_prompt=True, tokenize=False)
    images = [Image.open(path) for path in example["images"]]
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    result = {
        "version": transformers.__version__,
        "tokenizer": [tokenizer(t)["input_ids"] for t in example["texts"]],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "prompt": text,
        "tokenizer_prompt": of_tokenizer,
        "ids": inputs["input_ids"][0].tolist(),
        "logits": logits.tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
