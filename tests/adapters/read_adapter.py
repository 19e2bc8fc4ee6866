"""What one version of PEFT makes of adapters: a program that writes logits. See `every_peft`.

python read_adapter.py REQUEST: a JSON list of {"base": folder, "adapter": folder, "inputs": safetensors, "out":
safetensors for the the logits}.
"""

import inspect
import json
import sys
import warnings

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


def main(request: str) -> None:
    with open(request) as file:
        cases = json.load(file)
    for case in cases:
        with open(f"{case['base']}/config.json") as file:
            architecture = getattr(transformers, json.load(file)["architectures"][0])
        model = architecture.from_pretrained(case["base"], torch_dtype=torch.float32).eval()
        with warnings.catch_warnings():
            # PEFT warns of keys that it misses, and goes on with new matrices in their place
            warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
            adapted = peft.PeftModel.from_pretrained(model, case["adapter"]).eval()
        inputs = {name: v if v.is_floating_point() else v.long() for name, v in load_file(case["inputs"]).items()}
        if "mm_token_type_ids" not in inspect.signature(architecture.forward).parameters:  # transformers before 5
            inputs.pop("mm_token_type_ids", None)
        with torch.no_grad():
            save_file({"logits": adapted(**inputs).logits.float().contiguous()}, case["out"])
    print(json.dumps({"peft": peft.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
