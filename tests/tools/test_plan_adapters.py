"""What jvlm plan says of adapters on a quantised base, against XLA's own account of the compiled step."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import pytest

from jvlm.adapters.config import AdapterConfig
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.planning import measure
from jvlm.planning.chips import Topology
from jvlm.planning.plan import assumed_lengths, plan_training, trained_and_frozen
from jvlm.quantization.config import QuantizationConfig
from jvlm.training import compiled_step, flops
from jvlm.units import GIB
from tests import support
from tests.parallel import models
from tools import plan_finetune

RANK, LAYERS, WIDTH, HIDDEN, KV = 4, 2, 64, 128, 16
FLOAT32, BFLOAT16 = 4, 2
# inputs, outputs of a layer's matrices: q, k, v, out, gate, up, down
MATRICES = [(WIDTH, WIDTH), (WIDTH, KV), (WIDTH, KV), (WIDTH, WIDTH), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
WEIGHTS = LAYERS * sum(d_in * d_out for d_in, d_out in MATRICES)
PAIRS = LAYERS * sum(RANK * (d_in + d_out) for d_in, d_out in MATRICES)


@pytest.fixture(scope="module")
def experiment():
    plain = models.experiment("qwen2_5_vl", ParallelConfig(data=1))
    precision = Precision(param_dtype="bfloat16", compute_dtype="float32", remat="full")
    decoder = dataclasses.replace(plain.model.decoder, intermediate_size=HIDDEN)
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, decoder=decoder, precision=precision),
        adapter=AdapterConfig(rank=RANK, targets=("decoder",)),
        quantize=QuantizationConfig("nf4", double=False),
    )


@pytest.fixture(scope="module")
def planned(experiment):
    """(plan, XLA's account of the memory): the step is compiled for this CPU as if it were a chip."""
    step = compiled_step.compile_step(experiment, jax.devices()[:1])
    compiled = step.lower().compile()
    parts = {name: getattr(step, name) for name in ("layout", "state", "batches")}
    lowered = types.SimpleNamespace(compile=lambda: compiled)
    topology = Topology.parse("v5e:1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "devices_of", lambda topology: jax.devices()[:1])
        patch.setattr(measure, "available_memory", lambda topology, device: 16 * GIB)
        fake = types.SimpleNamespace(**parts, lower=lambda: lowered)
        patch.setattr(measure.compiled_step, "compile_step", lambda experiment, devices: fake)
        plan = plan_training(experiment, topology, assumed_lengths(experiment))
    return plan, compiled.memory_analysis()


def test_base_adapters_and_optimizer_state_are_counted_apart_and_are_the_steps_arguments(planned, experiment):
    plan, account = planned
    memory = plan.compiled.memory
    scales = LAYERS * len(MATRICES)
    assert memory.adapters == FLOAT32 * (PAIRS + scales)
    assert memory.optimizer == 2 * FLOAT32 * PAIRS + 2 * FLOAT32  # moments; two counts of steps
    parameters = sum(vlm.parameter_counts(vlm.abstract(experiment.model)).values())
    codes = WEIGHTS / 2 + FLOAT32 * WEIGHTS / 64  # two weights a byte, a scale for 64 of them
    assert memory.parameters == codes + BFLOAT16 * (parameters - WEIGHTS)
    step_count = FLOAT32
    total = memory.parameters + memory.adapters + memory.optimizer + memory.batch + step_count
    assert total == account.argument_size_in_bytes


def test_temporaries_and_activations_are_what_the_compiler_needs_beside_the_arguments(planned):
    plan, account = planned
    memory = plan.compiled.memory
    fresh = account.output_size_in_bytes - account.alias_size_in_bytes
    assert memory.activations > 0
    assert memory.activations + memory.temporary <= account.temp_size_in_bytes + fresh


def test_frozen_matrices_cost_four_flop_and_those_before_every_adapter_two(planned, experiment):
    plan, _ = planned
    template = vlm.abstract(experiment.model)
    data, lengths = experiment.data, assumed_lengths(experiment)
    counts = lengths.counts(template, data.batch_size, data.seq_len, data.max_patches)
    work = flops.forward(template, counts)
    own = 3 * 2 * counts.tokens * PAIRS
    found = plan.roofline.arithmetic
    assert found["decoder"] == pytest.approx(2 * work["decoder"].linear + 3 * work["decoder"].attention + own)
    assert found["encoder"] == pytest.approx(work["encoder"].total)
    assert found["head"] == pytest.approx(2 * work["head"].total)
    # kernels: attention is recomputed and has a backward pass in the decoder alone
    kernels = plan.roofline.executed - plan.compiled.flops
    assert kernels == pytest.approx(4.5 * work["decoder"].attention + work["encoder"].attention)


def test_the_plan_says_what_is_frozen_quantised_and_trained(planned, experiment):
    plan, _ = planned
    said = trained_and_frozen(experiment)
    assert f"quantised: {WEIGHTS:,} weights as nf4, 0.00 GiB, 4.50 bits each" in said
    assert f"adapters: LoRA of rank {RANK} on {LAYERS * len(MATRICES)} matrices, {PAIRS:,} parameters" in said
    assert "4 FLOP a parameter and token" in said
    assert "(base 0.00, adapters 0.00, optimizer 0.00, " in plan.text(experiment, None)
    trains_all = dataclasses.replace(experiment, adapter=None, quantize=None)
    assert trained_and_frozen(trains_all) == ""


def test_a_share_of_a_gpu_is_read_from_jaxs_own_variable(monkeypatch):
    topology, device = Topology.parse("l4:1"), jax.devices()[0]
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert measure.available_memory(topology, device) == 0.75 * topology.chip.hbm
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert measure.available_memory(topology, device) == 0.9 * topology.chip.hbm
    for wrong in ("1.5", "0", "half"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION is '{wrong}'"):
            measure.available_memory(topology, device)


@pytest.mark.parametrize(("name", "shape"), [("v5e:1", (1, 1)), ("v5p:1", (1, 1, 1)), ("l4:1", (1, 1))])
def test_one_chip_is_named_without_its_torus(name, shape):
    topology = Topology.parse(name)
    assert (topology.shape, topology.chips) == (shape, 1)


def test_every_recipe_that_names_chips_fits_them_as_it_is_now():
    """The table of docs/results/finetune_memory.md: `make plan-finetune` makes rows that are missing or out of date."""
    rows = json.loads(plan_finetune.ROWS.read_text())
    known = plan_finetune.recipes()
    assert len(known) == 15
    assert sum(len(experiment.topologies) for experiment in known.values()) >= 10
    for name, experiment in known.items():
        for topology in experiment.topologies:
            row = rows[f"{name} {topology}"]
            assert row["fits"], (name, topology)
            assert row["settings"] == plan_finetune.settings(experiment), (name, topology)
    assert plan_finetune.table(rows) in plan_finetune.TABLE.read_text()
    for recipe, most in (("lora", 20), ("qlora", 10)):
        of_7b = {name: row for name, row in rows.items() if name.startswith(f"qwen2_5_vl_7b_{recipe} ")}
        assert of_7b, recipe
        assert all(row["peak"] < most * GIB for row in of_7b.values() if row["fits"]), recipe


# Recipe, GPUs, most GiB of one; DoRA of a 7B model is to take at most 20, and LoRA with it. What LoRA and QLoRA take on
# one GPU is in the table above.
PROMISED = [
    pytest.param("qwen2_5_vl_7b_dora", 1, 20.0, id="DoRA on one GPU of 24 GB"),
    pytest.param("qwen2_5_vl_7b_qlora", 4, 6.0, id="QLoRA split over four"),
]
PARAMETERS, QUANTISED = 8_292_166_656, 6_525_288_448  # Qwen2.5-VL-7B, and matrices of its language model
ADAPTERS = 20_185_088  # of rank 8
COLUMNS = 28 * (2 * 3584 + 2 * 512 + 2 * 18944 + 3584)  # whose lengths DoRA learns


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "chips", "most"), PROMISED)
def test_a_7b_model_with_adapters_fits_what_is_promised(tmp_path, monkeypatch, recipe, chips, most):
    """The whole step as the shipped recipe has it; the base is divided among chips, and adapters in part."""
    path: Path = tmp_path / "plan.json"
    split = ("--data.batch_size", str(chips), "--gradient_accumulation_steps", str(16 // chips))
    command = ("tools/plan.py", f"finetune/{recipe}", "--topology", f"l4:{chips}", "--json", str(path), *split)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    done = support.with_compiler("gpu-compiler", *command, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (found,) = json.loads(path.read_text())
    assert found["fits"]
    assert found["peak"] < most * GIB
    base = BFLOAT16 * PARAMETERS
    if recipe.endswith("qlora"):  # codes of half a byte, a scale of a byte for 64; what quantises scales is little
        base = QUANTISED * (0.5 + 1 / 64) + BFLOAT16 * (PARAMETERS - QUANTISED)
    # norms, biases and scales of scales are whole on each chip; of adapters only the side of the model's width is split
    assert base / chips <= found["memory"]["parameters"] < 1.02 * base / chips
    whole = FLOAT32 * (ADAPTERS + COLUMNS * recipe.endswith("_dora"))
    adapters = found["memory"]["adapters"]
    assert whole <= adapters < 1.01 * whole if chips == 1 else whole / chips <= adapters < 0.8 * whole
    assert found["memory"]["optimizer"] == pytest.approx(2 * adapters, rel=1e-3)
