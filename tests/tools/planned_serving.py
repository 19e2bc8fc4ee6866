"""Run by test_plan.py with libtpu: an engine of a small model, sized for eight chips that are not there."""

import dataclasses
import json
import sys

from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.layers import Precision
from jvlm.planning import serving
from jvlm.planning.chips import Topology
from jvlm.planning.serving import Load
from tests.parallel import models

DECODER = TransformerConfig(
    vocab_size=4096, hidden_size=1024, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=128, intermediate_size=2048
)
LOADS = {
    "few slots": Load(prompt=900, patches=0, answer=100, image=0, slots=64),
    "long prompts": Load(prompt=200_000, patches=0, answer=20, image=0, slots=10_000),
}


def main() -> None:
    """A JSON object: load -> what the plan says, and its text."""
    precision = Precision(param_dtype="bfloat16", compute_dtype="bfloat16")
    config = dataclasses.replace(models.qwen2_5_vl(), decoder=DECODER, precision=precision)
    found = {}
    for name, load in LOADS.items():
        plan = serving.plan(config, None, Topology.parse("v5e:2x4"), load)
        found[name] = plan.values() | {"text": plan.text(None, 1.2), "limit": plan.prefill.compiled.limit}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
