"""``jvlm plan``: what a step needs on TPUs or GPUs that are not here."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from jvlm import configs
from jvlm.cli.experiment import split_words
from jvlm.errors import UserError
from jvlm.options import FLAT, parse, parse_with

if TYPE_CHECKING:
    from jvlm.inference.abstract import BatchShape
    from jvlm.models.vlm import VLM
    from jvlm.planning.report import Plan
    from jvlm.planning.roofline import SegmentLengths
    from jvlm.planning.serving import Load
    from jvlm.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to compile, for which chips, and what to write.

    Attributes:
      what: the step to compile.
      topology: v5p:4x4x4, v6e:16x16*2 for two slices, h200:8x8 for eight machines of eight GPUs; none takes the
        config's.
      network: GB/s of a chip between machines of GPUs, or between slices; None takes the chip's data sheet.
      conversation: tokens of a conversation; None takes the longest there may be.
      image: patches of an image; None takes the most there may be.
      batch_size: prefill and decode: sequences that run together.
      prompt: prefill and serve: tokens of a prompt; None takes a packed sequence of the config.
      patches: prefill and serve: patches of a prompt; None takes those of a packed sequence of the config.
      cache_len: prefill and decode: tokens that the cache has room for; None takes the prompt's.
      answer: serve: tokens of an answer.
      slots: serve: most answers that are decoded together, on all chips.
      quantization: not of training: hold the matrices of the language model in 8 bits (int8, fp8) or 4 (nf4), as
        `jvlm serve` does; None leaves them.
      max_loras: not of training: adapters at once for which there is room, beside the base.
      max_lora_rank: largest rank of adapters where room is kept.
      enable_tower_connector_lora: room for adapters in the vision tower and the connector too.
      enable_expert_lora: room for adapters on all experts too.
      price: of a chip-hour; the plan then tells what the run costs.
      suggest: minutes in which to try other topologies, settings and batches of the training step.
      collectives: folder of earlier lists of collectives, to compare this program's with.
      update: write the lists of --collectives instead of comparing.
      json: JSON file to write.
      chart: PNG file to write.
    """

    what: Literal["train", "prefill", "decode", "serve"] = "train"
    topology: tuple[str, ...] = ()
    network: float | None = None
    conversation: int | None = None
    image: int | None = None
    batch_size: int = 8
    prompt: int | None = None
    patches: int | None = None
    cache_len: int | None = None
    answer: int = 256
    slots: int = 256
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    max_loras: int = 0
    max_lora_rank: int = 16
    enable_tower_connector_lora: bool = False
    enable_expert_lora: bool = False
    price: float | None = None
    suggest: float | None = None
    collectives: Path | None = None
    update: bool = False
    json: Path | None = None
    chart: Path | None = None


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Compile an experiment's steps for TPUs or GPUs that are not here; print what they need and how fast they may be.

        jvlm plan mimo_vl/stage4 --price 4.2 --chart plan.png --topology v5p:4x4x4 v6e:16x16
        jvlm plan mimo_vl/stage4 --topology h200:8x8 --network 25
        jvlm plan mimo_vl/stage4 --topology v5p:4x4x4 --suggest 20 --data.batch_size 64
        jvlm plan mimo_vl/stage4 --what decode --topology v5e:2x4 --batch_size 64 --cache_len 8192
        jvlm plan mimo_vl/stage4 --what decode --topology h100:1 --quantization nf4 --max_loras 8 --cache_len 8192
        jvlm plan mimo_vl/stage4 --what prefill --topology v5e:2x4 --batch_size 1 --prompt 32768 --patches 65536
        jvlm plan mimo_vl/stage4 --what serve --topology v6e:1 --prompt 5120 --patches 16384 --answer 256

    It needs their compilers and no TPU or GPU (pip install libtpu, or jax-cuda13-pjrt and jax-cuda13-plugin of jax's
    version). Memory is the compiler's. Times are bounds from the chips' data sheets: nothing was measured, and
    no run will be faster. Fields of the experiment are options too: `jvlm plan CONFIG --help` lists them.

    Attributes:
      config: a Python file with get_config(), or the name of a shipped one, as `jvlm configs` lists them.
      options: what to compile, for which chips, and what to write.
    """

    config: Positional[str]
    options: Annotated[PlanOptions, FLAT] = PlanOptions()


def run(words: list[str]) -> int:
    from jvlm.planning.environment import WITHOUT_A_GPU, WITHOUT_A_TPU

    os.environ.update(WITHOUT_A_TPU | WITHOUT_A_GPU)  # before JAX is imported
    words = [word for word in words if word != "--"]
    options, config, fields = split_words(PlanOptions, words, "jvlm plan")
    if config is None:
        parse(PlanCommand, words, "jvlm plan")  # prints the help
    from jvlm.planning import generation
    from jvlm.planning.plan import plannable

    experiment = configs.load(config)
    if options.what != "train":
        experiment = generation.served(experiment)
    _, experiment = parse_with(PlanCommand(config, options), experiment, fields, f"jvlm plan {config}")
    experiment = plannable(experiment, config)
    mesh_given = any(word.startswith("--parallel.") for word in fields)
    plans, changed = _plans(options, experiment, config, mesh_given)
    if options.json:
        options.json.write_text(json.dumps([plan.values() for plan in plans], indent=2) + "\n")
    if options.chart:
        from jvlm.planning import chart

        bars = [(plan.topology.name, plan.compiled) for plan in plans]
        step = "training" if options.what == "train" else options.what
        chart.draw(options.chart, f"{experiment.name}: memory of a chip, {step}", bars)
    return 0 if all(plan.fits for plan in plans) and not changed else 1


def _plans(options: PlanOptions, experiment: Experiment, config: str, mesh_given: bool) -> tuple[list[Plan], bool]:
    """Print the plan of each topology; returns them, and whether collectives differ from what is written down."""
    from jvlm.planning import generation, serving, suggest
    from jvlm.planning.chips import Topology
    from jvlm.planning.plan import assumed_lengths, plan_training, trained_and_frozen

    if options.suggest and options.what != "train":
        raise UserError(f"--suggest looks for better training steps; it cannot be given with --what {options.what}")
    if options.what == "serve" and (options.collectives or options.chart):
        raise UserError("--collectives and --chart are of one step: give --what prefill or --what decode")
    names = options.topology or experiment.topologies
    if not names:
        raise UserError(f"{config} names no topologies; give --topology v5p:4x4x4")
    topologies = [Topology.parse(n, None if options.network is None else 1e9 * options.network) for n in names]
    lengths = assumed_lengths(experiment, options.conversation, options.image)
    sizes = load = template = None
    if options.what == "train":
        _check_training(options)
        print(_training_header(experiment, lengths))
        print(trained_and_frozen(experiment))
    elif options.what == "serve":
        load, template = _load(options, experiment, lengths), _template(options, experiment)
        print(_serving_header(experiment, options, load))
    else:
        sizes = _sizes(options, experiment)
        template = _template(options, experiment)
        print(_generation_header(experiment, options, sizes, lengths))
    plans, changed = [], False
    for topology in topologies:
        mesh = experiment.parallel if mesh_given else None
        if options.what == "train":
            plan = plan_training(experiment, topology, lengths)
        elif load is not None:
            plan = serving.plan(experiment.model, mesh, topology, load, template)
        else:
            plan = generation.plan(experiment.model, mesh, topology, sizes, options.what, lengths.image, template)
        plans.append(plan)
        print(plan.text(experiment, options.price), flush=True)
        if options.collectives and plan.compiled.unread:
            raise UserError(f"--collectives: {plan.compiled.compiler} makes programs that cannot be read")
        if options.collectives and plan.compiled.fits:
            step = experiment.name if options.what == "train" else f"{experiment.name}_{options.what}"
            changed |= _collectives(plan, step, options.collectives, options.update)
        if options.suggest:
            print(suggest.search(plan_training, experiment, plan, lengths, 60 * options.suggest), flush=True)
    return plans, changed


def _collectives(plan: Plan, name: str, folder: Path, update: bool) -> bool:
    """Compare with the file in the folder, or write it; returns whether they differ."""
    from jvlm.planning import listing

    path = listing.path_of(folder, name, plan.topology)
    if update:
        path.write_text(listing.text(plan.compiled))
        print(f"wrote {path}\n")
        return False
    difference = listing.difference(path, plan.compiled)
    if difference:
        print(f"Collectives have changed; if this is meant, run again with --update:\n\n{difference}")
    return bool(difference)


def _check_training(options: PlanOptions) -> None:
    """Raise UserError for options of serving: what a training step holds is in its config."""
    if options.quantization or options.max_loras:
        raise UserError(
            "--quantization and --max_loras are of models that are served; a training step takes quantize and "
            "adapter of the config (--quantize.kind nf4)"
        )


def _template(options: PlanOptions, experiment: Experiment) -> VLM:
    """Return the shapes of the model that is served."""
    from jvlm.adapters.several import AdapterRoom
    from jvlm.planning import generation
    from jvlm.quantization.config import QuantizationConfig

    if options.max_loras < 0 or options.max_lora_rank < 1:
        raise UserError(
            f"--max_loras {options.max_loras} must be at least 0 and --max_lora_rank {options.max_lora_rank} at least 1"
        )
    quantize = None if options.quantization is None else QuantizationConfig(options.quantization)
    room = AdapterRoom.of_model(
        options.max_lora_rank, towers=options.enable_tower_connector_lora, experts=options.enable_expert_lora
    )
    return generation.template_of(experiment.model, quantize, options.max_loras, room)


def _sizes(options: PlanOptions, experiment: Experiment) -> BatchShape:
    from jvlm.planning import generation

    data = experiment.data
    prompt = data.seq_len if options.prompt is None else options.prompt
    if options.what == "decode" and options.prompt is None:
        prompt = 1  # a step of decoding sees the cache alone
    patches = data.max_patches if options.patches is None else options.patches
    cache_len = options.cache_len or options.prompt or data.seq_len
    return generation.rounded(experiment.model, options.batch_size, prompt, patches, cache_len)


def _load(options: PlanOptions, experiment: Experiment, lengths: SegmentLengths) -> Load:
    from jvlm.planning.serving import Load

    data = experiment.data
    prompt = data.seq_len if options.prompt is None else options.prompt
    patches = data.max_patches if options.patches is None else options.patches
    return Load(prompt, patches, options.answer, lengths.image, options.slots)


def _serving_header(experiment: Experiment, options: PlanOptions, load: Load) -> str:
    precision = experiment.model.precision
    return (
        f"# {experiment.name}: requests of {load.prompt} tokens and {load.patches} patches, answers of {load.answer} "
        f"tokens\n\nAssumed: nothing is cached, images of {load.image} patches, every slot is taken at all times; "
        f"parameters in {precision.param_dtype}, products in {precision.compute_dtype}{_held(options)}.\n"
    )


def _training_header(experiment: Experiment, lengths: SegmentLengths) -> str:
    data = experiment.data
    sequences = f"{experiment.gradient_accumulation_steps} x {data.batch_size} sequences"
    return (
        f"# {experiment.name}: {sequences} of {data.seq_len} tokens and {data.max_patches} patches\n\n"
        f"Assumed: full sequences, conversations of {lengths.conversation} tokens, images of {lengths.image} patches.\n"
    )


def _held(options: PlanOptions) -> str:
    """Return what of a served model is not as its config says."""
    held = f", matrices of the language model in {options.quantization}" if options.quantization else ""
    if options.max_loras:
        held += f", room for {options.max_loras} adapters of rank {options.max_lora_rank}"
    return held


def _generation_header(experiment: Experiment, options: PlanOptions, sizes: BatchShape, lengths: SegmentLengths) -> str:
    precision = experiment.model.precision
    dtypes = f"parameters in {precision.param_dtype}, products in {precision.compute_dtype}"
    dtypes += _held(options)
    if options.what == "decode":
        return (
            f"# {experiment.name}: one token for each of {sizes.batch_size} sequences, a cache of "
            f"{sizes.cache_len} tokens each\n\nAssumed: the cache is full; {dtypes}.\n"
        )
    return (
        f"# {experiment.name}: {sizes.batch_size} prompts of {sizes.prompt_len} tokens and {sizes.max_patches} "
        f"patches, then a cache of {sizes.cache_len} tokens each\n\nAssumed: full prompts, images of {lengths.image} "
        f"patches; {dtypes}.\n"
    )
