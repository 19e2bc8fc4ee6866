"""Run by test_plan.py with libtpu: steps of decoding of small models, compiled for eight chips that are not there."""

import dataclasses
import json
import sys

from jvlm.adapters.several import AdapterRoom
from jvlm.inference.abstract import BatchShape
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.planning import generation
from jvlm.planning.chips import Topology
from jvlm.quantization.config import QuantizationConfig
from tests.parallel import models

SIZES = BatchShape(batch_size=32, prompt_len=16, max_patches=0, cache_len=16384)
PLACES, RANK = 2, 16  # adapters beside a quantised base
DECODER = TransformerConfig(
    vocab_size=4096, hidden_size=1024, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=128, intermediate_size=2048
)
# fewer key heads than chips, and a vocabulary that eight do not divide
CASES = {
    "even": DECODER,
    "odd": dataclasses.replace(DECODER, num_kv_heads=4, vocab_size=4097),
    "experts": dataclasses.replace(DECODER, mlp=MoEConfig(every=2, experts=8, intermediate_size=8192)),
}


def main() -> None:
    """A JSON object: case -> what the plan says."""
    topology, asked = Topology.parse("v5e:2x4"), ParallelConfig(tensor=8, rules="serving")
    found = {}
    for name, decoder in CASES.items():
        precision = Precision(param_dtype="bfloat16", compute_dtype="bfloat16")
        config = dataclasses.replace(models.qwen2_5_vl(), decoder=decoder, precision=precision)
        found[name] = generation.plan(config, asked, topology, SIZES, "decode", 0).values()
    config = dataclasses.replace(models.qwen2_5_vl(), decoder=DECODER, precision=precision)
    served = generation.template_of(config, QuantizationConfig("nf4"), PLACES, AdapterRoom(RANK))
    found["served"] = generation.plan(config, asked, topology, SIZES, "decode", 0, served).values()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
