"""Run by test_compile.py with a compiler: the engine's programs, compiled for devices that are not there."""

import dataclasses
import json
import sys

from jvlm.inference.abstract import BatchShape
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.layers import Precision
from jvlm.planning import generation
from jvlm.planning.chips import Topology
from jvlm.planning.measure import bytes_of, measure
from tests.parallel import models

SIZES = BatchShape(batch_size=64, prompt_len=128, max_patches=0, cache_len=4096)
DECODER = TransformerConfig(
    vocab_size=32000, hidden_size=1024, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=128, intermediate_size=2048
)


def main(name: str) -> None:
    """A JSON object: program -> whether it fits, and bytes of a chip."""
    topology = Topology.parse(name)
    precision = Precision(param_dtype="bfloat16", compute_dtype="bfloat16")
    config = dataclasses.replace(models.qwen2_5_vl(), decoder=DECODER, precision=precision)
    planned, found = generation.prepare(config, None, topology, SIZES), {}
    parameters, cache = bytes_of(planned.decoder_leaves), bytes_of(planned.cache)
    lowering = {"prefill": planned.lower_prefill, "draw": planned.lower_draw, "copy": planned.lower_copy}
    for program, lower in lowering.items():
        resident = parameters if program == "copy" else 0.0
        one = measure(lower, planned.layout.mesh, topology, parameters=parameters, cache=cache, resident=resident)
        found[program] = {"fits": one.fits, "temporary": one.memory.temporary, "cache": one.memory.cache}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
