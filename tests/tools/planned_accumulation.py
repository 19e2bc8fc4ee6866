"""Run by test_plan.py with libtpu: a step of two micro-batches, compiled for chips that are not there."""

import dataclasses

from jvlm import configs
from jvlm.planning.chips import Topology
from jvlm.planning.measure import compile_step


def main() -> None:
    """Print whether the step compiles and fits."""
    experiment = configs.load("finetune/qwen2_5_vl_7b_full")
    model = experiment.model
    decoder = dataclasses.replace(
        model.decoder, num_layers=2, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64,
        mrope_section=(8, 12, 12), vocab_size=152064,
    )  # fmt: skip
    encoder = dataclasses.replace(
        model.encoder, depth=2, hidden_size=128, intermediate_size=256, num_heads=2, fullatt_block_indexes=(1,)
    )
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(model, decoder=decoder, encoder=encoder),
        data=dataclasses.replace(experiment.data, seq_len=512, max_patches=1024, batch_size=8),
        gradient_accumulation_steps=2,
        steps=10,
    )
    print(compile_step(experiment, Topology.parse("v6e:2x4")).fits)


if __name__ == "__main__":
    main()
