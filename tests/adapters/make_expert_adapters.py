"""What PEFT makes of adapters of experts: a program that writes folders, what each adds, and logits. See `every_peft`.

python make_expert_adapters.py REQUEST: a JSON list of {"base": folder of a mixture, "settings": of LoraConfig, "out":
folder of the adapter, "inputs": safetensors or null}. It writes ``expected.safetensors``: what is added to each adapted
parameter of experts, by its name, outputs before inputs; and "logits" where there are inputs.
"""

import json
import sys

import peft
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file


def main(request: str) -> None:
    with open(request) as file:
        cases = json.load(file)
    for case in cases:
        torch.manual_seed(0)
        if case["inputs"] is None:  # the weights of the base do not matter
            with open(f"{case['base']}/config.json") as file:
                values = json.load(file)
            kind = getattr(transformers, values["architectures"][0])
            model = kind(kind.config_class(**values))
        else:
            with open(f"{case['base']}/config.json") as file:
                kind = getattr(transformers, json.load(file)["architectures"][0])
            model = kind.from_pretrained(case["base"], torch_dtype=torch.float32)
        adapted = peft.get_peft_model(model.eval(), peft.LoraConfig(**case["settings"])).eval()
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.copy_(torch.randn(value.shape) / 4)
        adapted.save_pretrained(case["out"])
        expected = {}
        for name, module in adapted.named_modules():
            if isinstance(module, ParamWrapper):
                where = name.removeprefix("base_model.model.").replace(".base_layer", "")
                expected[f"{where}.{module.parameter_name}"] = module.get_delta_weight("default").contiguous()
        if case["inputs"] is not None:
            inputs = {name: v if v.is_floating_point() else v.long() for name, v in load_file(case["inputs"]).items()}
            with torch.no_grad():
                expected["logits"] = adapted(**inputs).logits.float().contiguous()
        save_file({name: value.detach() for name, value in expected.items()}, f"{case['out']}/expected.safetensors")
    print(json.dumps({"peft": peft.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
