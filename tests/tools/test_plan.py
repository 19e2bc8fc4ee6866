"""tools/plan.py and its parts, with the TPU's compiler and no TPU."""

import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvlm import configs
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.planning import chart, compilers, hlo, measure
from jvlm.planning.chips import Topology, smaller
from jvlm.planning.measure import Compiled, Memory
from jvlm.planning.plan import assumed_lengths
from jvlm.planning.report import Plan
from jvlm.units import GIB
from tests import support

with_compiler = functools.partial(support.with_compiler, "tpu-compiler")


@pytest.fixture(scope="module")
def known():
    """What is read off a compiled program whose products and collectives can be counted by hand."""
    done = with_compiler("-m", "tests.tools.planned_program")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_products_count_as_often_as_their_loop_runs(known):
    assert known["flops"] == 7 * 2 * 256 * 512 * 512
    assert known["mesh"] == {"outer": 4, "inner": 4}


def test_a_program_is_lowered_as_on_the_chip_and_not_as_on_this_machine(known):
    assert known["targets"] == ["tpu"]


def test_an_argument_that_nothing_reads_hides_no_temporary_memory(known):
    temporary, matrix = known["unread argument"]
    assert temporary >= matrix  # the result is one, and another is between the products


def test_bytes_are_counted_by_kind_and_mesh_axis(known):
    bfloat16, float32 = 2, 4  # XLA casts the weight to what the product wants before it sends it
    gathered = 7 * (512 * 512 * bfloat16) * 3 / 4
    summed = 7 * 2 * (256 * 512 * float32) * 3 / 4
    assert known["axis_traffic"]["outer"]["kinds"] == {"all-gather": gathered}
    assert known["axis_traffic"]["inner"]["kinds"] == {"all-reduce": summed}
    for one in known["axis_traffic"].values():
        assert one["network"] == "ici"
        assert one["bandwidth"] == 45e9  # four chips in a line of a torus that is not closed: one link each way


def test_what_slices_send_each_other_is_found(known):
    (one,) = known["slices"]
    assert (one["axes"], one["network"]) == ("data", "dcn")
    assert one["kinds"] == {"all-reduce": 256 * 512 * 4}  # two of them: half is sent, and half of the sum comes back


def test_memory_traffic_is_that_of_the_arguments_and_what_does_not_stay_on_the_chip(known):
    arguments = (256 * 512 + 7 * 128 * 512) * 4
    everything = 7 * 2 * (512 * 512 + 3 * 256 * 512) * 4
    assert arguments < known["hbm"] < everything


def test_a_program_that_is_too_large_is_measured_against_what_the_compiler_gives(known):
    assert known["limit"] == pytest.approx(15.75 * GIB)
    fits, needed = known["refused"]
    assert not fits
    assert needed >= 256 * GIB  # the product of 2^18 x 2^18 in float32


@pytest.mark.slow
def test_the_newest_compiler_makes_what_can_be_counted_of_the_same_program(known):
    done = support.with_compiler("tpu-compiler-newest", "-m", "tests.tools.planned_program")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiler"] != known["compiler"]
    assert "asks for libtpu" in found["compiler"]
    for name in ("flops", "axis_traffic", "limit", "slices"):
        assert found[name] == known[name], name


def test_a_plan_names_its_compiler(known):
    assert re.fullmatch(rf"libtpu 0\.0\.\d+(\.\d+)?, jax {re.escape(jax.__version__)}", known["compiler"])
    assert known["unread"] == ""


@pytest.mark.parametrize(("version", "warned"), [("0.0.42.1", False), ("0.0.42", False), ("0.0.52", True)])
def test_a_compiler_that_jax_does_not_ask_for_is_warned_of(monkeypatch, version, warned):
    monkeypatch.setattr(compilers.importlib.metadata, "version", lambda name: {"libtpu": version}[name])
    asked = ['libtpu==0.0.42.*; extra == "tpu"', 'requests; extra == "tpu"']
    monkeypatch.setattr(compilers.importlib.metadata, "requires", lambda name: {"jax": asked}[name])
    said = compilers.describe(Topology.parse("v5e:4x4"))
    assert said.startswith(f"libtpu {version}, jax {jax.__version__}")
    assert ("asks for libtpu==0.0.42.*" in said) == warned


def test_a_program_that_cannot_be_printed_has_memory_and_no_bound(monkeypatch):
    """As with libtpu 0.0.52 and jaxlib 0.10.2, whose printer refuses an instruction of more operands than it knows."""

    class Unprintable:
        def __init__(self, compiled):
            self.memory_analysis = compiled.memory_analysis

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: async-update expects 1 operand; sees 3")

    argument = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    lowered = jax.jit(lambda x: x @ x).lower(argument)
    lower = lambda: types.SimpleNamespace(compile=lambda: Unprintable(lowered.compile()))  # noqa: E731
    monkeypatch.setattr(measure, "available_memory", lambda topology, device: 16 * GIB)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    found = measure.measure(lower, mesh, Topology.parse("v5e:1"), parameters=64 * 64 * 4.0)
    assert found.fits
    assert not found.readable
    assert found.memory.peak >= 64 * 64 * 4
    plan = Plan(Topology.parse("v5e:1"), found, None)
    said = plan.text(configs.load("mimo_vl/stage1"), None)
    assert "async-update expects 1 operand; sees 3" in said
    assert "use the compiler that jax asks for" in said
    assert "MFU" not in said
    assert plan.values()["unread"] == found.unread


@pytest.mark.parametrize(
    ("left", "right", "result", "how", "flops"),
    [
        # four rows of a batch as a window that meets one place at a time
        ("8,16,1", "4,32,8", "4,32,16", "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=fb0_0oi->0fb", 4 * 32 * 8),
        ("1,32,8", "8,16,1", "1,32,16", "window={size=1}, dim_labels=0bf_io0->0bf", 32 * 8),
        # summed over the batch: a weight's gradient
        ("4,8,32", "4,8,16", "32,16,1", "window={size=4}, dim_labels=0fb_0io->bf0", 4 * 8 * 32),
        # a real convolution: nine places, less those beyond the edge
        ("1,5,5,3", "3,3,3,16", "1,5,5,16", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 13 * 13 * 3),
    ],
)
def test_products_that_are_written_as_convolutions(left, right, result, how, flops):
    text = (
        "ENTRY %main (a: f32[1]) -> f32[1] {\n"
        f"  %a = f32[{left}]{{0}} parameter(0)\n  %b = f32[{right}]{{0}} parameter(1)\n"
        f"  ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {how}\n}}"
    )
    assert hlo.read(text).flops == 2 * 16 * flops


def test_a_loop_whose_length_is_data_counts_as_often_as_its_name_promises_at_most():
    def turns(count, x, w):
        return jax.lax.fori_loop(0, count, lambda _, x: x @ w, x)

    def named(count, x, w):
        with jax.named_scope("at_most_5_times"):
            return turns(count, x, w)

    square = jnp.ones((16, 16))
    once, often = (hlo.read(jax.jit(f).lower(3, square, square).compile().as_text()).flops for f in (turns, named))
    assert (once, often) == (2 * 16**3, 5 * 2 * 16**3)


def test_a_branch_counts_as_often_as_it_is_said_to_be_taken():
    branch = (
        "%{0} (p: f32[8]) -> f32[8] {{\n  %p.{0} = f32[8]{{0}} parameter(0)\n"
        "  ROOT %s.{0} = f32[8]{{0}} all-reduce(%p.{0}), replica_groups={{{{0,1}}}}, "
        'metadata={{op_name="part/{0}/sum"}}\n}}\n'
    )
    text = (
        branch.format("often")
        + branch.format("rarely")
        + (
            "ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {\n  %i = s32[] parameter(0)\n  %x = f32[8]{0} parameter(1)\n"
            "  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%often, %rarely}\n}"
        )
    )
    assert [one.times for one in hlo.read(text).collectives] == [1, 1]
    found = hlo.read(text, {"part/often": 0.75, "part/rarely": 0.25}).collectives
    assert {one.name: one.times for one in found} == {"s.often": 0.75, "s.rarely": 0.25}


@pytest.mark.parametrize("name", ["v5p:4x4", "v5e:4x4x4", "v100:8", "h100:2x2x8", "h200:8*2", "v5p-128", "v6e:16"])
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(UserError, match=re.escape(name)):
        Topology.parse(name)


@pytest.mark.parametrize(
    "names",
    [
        ["v5p:4x4x4*2", "v5p:4x4x4", "v5p:2x4x4", "v5p:2x2x4", "v5p:2x2x2", "v5p:1x2x2"],
        ["h200:4x8", "h200:2x8", "h200:1x8"],
    ],
)
def test_topologies_halve_down_to_a_machine(names):
    found, topology = [], Topology.parse(names[0])
    while topology:
        found.append(topology.name)
        topology = smaller(topology)
    assert found == names


def test_the_picture_shows_each_part_in_proportion(tmp_path):
    memory = Memory(parameters=8 * GIB, optimizer=0.0, batch=0.0, temporary=4 * GIB, code=0.0)
    compiled = Compiled({}, memory, True, 16 * GIB, 0.0, 0.0, (), 0.0)
    chart.draw(tmp_path / "plan.png", "one", [("v5e:4x4", compiled)])
    pixels = np.asarray(Image.open(tmp_path / "plan.png"))
    row = pixels[chart.TOP + chart.BAR // 2, chart.LEFT : chart.WIDTH - chart.RIGHT]
    colours = {name: tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for name, c in chart.COLOURS.items()}
    wide = {name: int((row == colour).all(axis=-1).sum()) for name, colour in colours.items()}
    assert wide["parameters"] == pytest.approx(2 * wide["temporary"], abs=3)
    assert wide["parameters"] == pytest.approx(len(row) / 2, abs=3)


@pytest.fixture(scope="module")
def stages():
    """Bytes on each chip of the four MiMo-VL stages, on each pod that they name."""
    done = support.with_compiler("tpu-compiler gpu-compiler", "-m", "tests.tools.planned_stages")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


SMALL = """
--model.decoder.num_layers 2 --model.decoder.hidden_size 256 --model.decoder.intermediate_size 512
--model.decoder.num_heads 4 --model.decoder.num_kv_heads 2 --model.decoder.head_dim 64
--model.decoder.mrope_section 8 12 12 --model.encoder.depth 2 --model.encoder.hidden_size 128
--model.encoder.intermediate_size 256 --model.encoder.num_heads 2 --model.encoder.fullatt_block_indexes 1
--data.seq_len 512 --data.max_patches 1024 --data.batch_size 8 --gradient_accumulation_steps 2 --steps 10
""".split()


@pytest.mark.slow
def test_a_step_of_two_micro_batches_compiles_on_several_chips_and_stores_parts_on_each(tmp_path):
    """A small model; `make plan` compiles every stage of MiMo-VL for the pods it names, minutes each."""
    config = "finetune/qwen2_5_vl_7b_full"
    command = [config, *SMALL, "--topology", "v6e:2x4", "--json", str(tmp_path / "plan.json")]
    done = with_compiler("tools/plan.py", *command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    count = sum(vlm.parameter_counts(vlm.abstract(configs.load(config, SMALL).model)).values())
    least = 4 * count / 8  # norms and biases are whole on each chip
    assert least <= found["memory"]["parameters"] < 1.2 * least
    assert found["memory"]["optimizer"] == pytest.approx(2 * found["memory"]["parameters"], rel=1e-2)


def test_every_stage_lies_on_the_pods_it_names_with_room_for_its_activations(stages):
    """Compiling them takes minutes each: `make plan` does."""
    assert {key.split()[0] for key in stages} == {"stage1", "stage2", "stage3", "stage4"}
    for key, sizes in stages.items():
        assert sizes["state"] + sizes["frozen"] + sizes["batches"] < sizes["limit"] / 4, key


def test_what_is_learnt_is_stored_with_its_moments_and_everything_is_split(stages):
    parameters, connector, vit = 8_306_217_216, 47_196_416, 636_401_664  # as published
    for key, sizes in stages.items():
        stage = key.split()[0]
        parts = sizes["chips"] // (4 if stage == "stage4" else 1)  # its `context` axis stores nothing
        learnt = {"stage1": connector, "stage2": connector + vit}.get(stage, parameters)
        for part, published in (("state", 3 * 4 * learnt), ("frozen", 4 * (parameters - learnt))):
            # norms and biases are whole on each chip: little, but many times
            assert published <= sizes[part] * parts <= 1.2 * published, (key, part)


@pytest.fixture(scope="module")
def decoding():
    """Plans of a step of decoding on eight chips, for models of two layers; see planned_generation."""
    done = with_compiler("-m", "tests.tools.planned_generation")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


BFLOAT16, FLOAT32, CHIPS = 2, 4, 8
PAGE = 128  # tokens, on TPUs
ROWS, PLACES, LAYERS, WIDTH, HEADS, HEAD, HIDDEN = 32, 16384, 2, 1024, 8, 128, 2048
DENSE = 3 * WIDTH * HIDDEN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kv_heads", "vocabulary", "mlps"),
    [
        ("even", 8, 4096, 2 * DENSE),
        ("odd", 4, 4097, 2 * DENSE),
        ("experts", 8, 4096, DENSE + 8 * (3 * WIDTH * 8192 + WIDTH)),
    ],
)
def test_a_step_of_decoding_reads_parameters_and_cache_once_and_copies_neither(
    decoding, case, kv_heads, vocabulary, mlps
):
    plan = decoding[case]
    cache = LAYERS * 2 * ROWS * PLACES * HEAD * BFLOAT16  # one key head a chip: four are stored twice
    unused = LAYERS * 2 * PAGE * HEAD * BFLOAT16  # the page that rows without a request write to
    assert plan["memory"]["cache"] == cache + unused
    assert plan["memory"]["temporary"] < cache / 100
    matrices = LAYERS * WIDTH * 2 * (HEADS + kv_heads) * HEAD + mlps + WIDTH * vocabulary
    read = matrices * BFLOAT16 / CHIPS + cache
    assert read < plan["hbm"] < 1.05 * read
    assert plan["flops"] == pytest.approx(2 * ROWS * matrices / CHIPS, rel=1e-3)
    attention = 4 * LAYERS * ROWS * PLACES * HEADS * HEAD
    unchosen = 6 * 3 * WIDTH * 8192 if case == "experts" else 0  # of eight, two are needed, and all are computed
    assert sum(plan["roofline"]["arithmetic"].values()) == 2 * ROWS * (matrices - unchosen) + attention
    assert plan["roofline"]["tokens"] == ROWS


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kv_heads", "vocabulary"), [("even", 8, 4096), ("odd", 4, 4097)])
def test_a_step_of_decoding_gathers_no_parameter(decoding, case, kv_heads, vocabulary):
    (one,) = decoding[case]["axis_traffic"]
    # after attention and MLP of each layer; and the token's embedding, or the scores where the vocabulary is not split
    around = 2 * (CHIPS - 1) / CHIPS
    last = WIDTH * BFLOAT16 if case == "even" else vocabulary * FLOAT32
    assert one["kinds"]["all-reduce"] == pytest.approx(around * ROWS * (2 * LAYERS * WIDTH * BFLOAT16 + last), rel=0.01)
    key_matrix = WIDTH * kv_heads * HEAD * BFLOAT16
    assert sum(size for kind, size in one["kinds"].items() if kind != "all-reduce") < key_matrix


@pytest.mark.slow
def test_a_quantised_base_and_room_for_adapters_are_counted_as_they_are_stored(decoding):
    memory, plain = (decoding[case]["memory"] for case in ("served", "even"))
    heads = HEADS * HEAD
    ends = 4 * (WIDTH + heads) + 3 * (WIDTH + HIDDEN)  # inputs and outputs of q, k, v, out, gate, up and down
    places, rank = 2 + 1, 16  # with an empty one
    assert memory["adapters"] == LAYERS * places * rank * ends * FLOAT32 / CHIPS
    matrices = LAYERS * (4 * WIDTH * heads + DENSE) / CHIPS
    others = plain["parameters"] - matrices * BFLOAT16
    assert 0.5 * matrices < memory["parameters"] - others < 0.6 * matrices  # four bits, and scales
    assert memory["cache"] == plain["cache"]


@pytest.mark.slow
def test_a_search_for_better_steps_of_decoding_is_refused_by_name():
    done = with_compiler("tools/plan.py", "mimo_vl/stage4", "--what", "decode", "--suggest", "1")
    assert done.returncode == 2
    assert "--suggest looks for better training steps; it cannot be given with --what decode" in done.stderr


@pytest.mark.parametrize("config", ["align/mimo_vl_7b_reward_model", "align/mimo_vl_7b_dpo"])
def test_lengths_are_assumed_for_tasks_whose_batches_hold_more_than_the_packed_one(config):
    experiment = configs.load(config)
    lengths = assumed_lengths(experiment)
    assert lengths.conversation == experiment.data.seq_len
    assert 0 < lengths.image <= experiment.data.max_patches


@pytest.mark.slow
def test_an_engine_is_sized_by_memory_and_slots_and_its_bound_is_named():
    done = with_compiler("-m", "tests.tools.planned_serving")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    few, long = found["few slots"], found["long prompts"]
    # keys and values of 2 layers, 8 heads of 128, 128 tokens, bfloat16; all heads of a page on the chips of its group
    chips = 8 // few["groups"]
    assert few["page_bytes"] == pytest.approx(2 * 2 * 8 * 128 * 128 * 2 / chips, rel=0.02)
    assert few["slots"] == 64
    assert "limited by --slots" in few["text"]
    assert long["slots"] < 10_000
    assert "limited by pages" in long["text"]
    for one in (few, long):
        used = one["pages"] * one["page_bytes"] + one["prefill"]["memory"]["parameters"]
        assert 0.8 * one["limit"] < used < one["limit"]
        answer = one["load"]["answer"]
        rate = 1 / sum(one["parts"].values())
        assert one["requests_per_second"] == pytest.approx(rate)
        assert one["time_per_token"] == pytest.approx(one["slots"] / rate / answer)
        assert one["bound"] == max(one["parts"], key=one["parts"].get)
        assert f"bound by {one['bound']}" in one["text"]
    assert few["bound"].endswith("of decoding")
    assert long["bound"].endswith("of prefill")
