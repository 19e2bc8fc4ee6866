"""What PEFT and transformers answer, token by token: a program. See `demo_in_peft`.

python -m tests.adapters.answer_in_peft REQUEST: JSON, {"cases": [{"base": folder, "adapter": folder or null}],
"messages": as templates take them, "images": a path for each conversation, "max_new_tokens": ..., "never": tokens that
no answer has}. It prints the ids of the prompts and of each case's answers.
"""

import json
import sys
import warnings

# first: it registers what torchvision needs before anything imports that
from tests.weights.read_export import processor_of

# isort: split
import peft
import torch
import transformers
from PIL import Image


def answers(case, prompts, limit, never):
    model = transformers.AutoModelForImageTextToText.from_pretrained(case["base"], dtype=torch.float32).eval()
    if case["adapter"]:
        with warnings.catch_warnings():
            # PEFT warns of keys that it misses, and goes on with new matrices in their place
            warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
            model = peft.PeftModel.from_pretrained(model, case["adapter"]).eval()
    with torch.no_grad():
        settings = {"do_sample": False, "max_new_tokens": limit, "suppress_tokens": never}
        outs = [model.generate(**inputs, **settings) for inputs in prompts]
    return [out[0, len(inputs["input_ids"][0]) :].tolist() for out, inputs in zip(outs, prompts, strict=True)]


def main(path):
    with open(path) as file:
        request = json.load(file)
    processor = processor_of(request["cases"][0]["base"])
    prompts = []
    for image in request["images"]:
        text = processor.apply_chat_template(request["messages"], add_generation_prompt=True)
        prompts.append(processor(text=[text], images=[Image.open(image)], return_tensors="pt"))
    result = {
        "versions": [peft.__version__, transformers.__version__],
        "prompts": [inputs["input_ids"][0].tolist() for inputs in prompts],
        "answers": [answers(case, prompts, request["max_new_tokens"], request["never"]) for case in request["cases"]],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
