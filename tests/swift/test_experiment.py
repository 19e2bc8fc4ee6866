"""Arguments as experiments, without reading a model or data."""

import dataclasses
import shlex
import types
from pathlib import Path

import pytest

from jvlm import configs, families
from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.errors import UserError
from jvlm.swift import checkpoints, config_file
from jvlm.swift.arguments import TrainingArguments
from jvlm.swift.batches import Batches
from jvlm.swift.experiment import Facts, data_config, experiment_of
from jvlm.swift.words import parse
from jvlm.training import interruption
from jvlm.training.checkpointing import Checkpointing
from jvlm.training.hooks import Hook
from jvlm.weights import hf, io


@pytest.fixture(scope="module")
def facts():
    family = families.get("qwen2_5_vl")
    data = DataConfig(train=("rows.jsonl",), batch_size=2, seq_len=1024, max_patches=2048)
    model = families.preset("qwen2_5_vl_3b")
    return Facts(model, ProcessorConfig(image=family.image_config), Batches(data, 3, 16.0), 5000, 40, "output", "v0")


def experiment(facts, line):
    parsed = parse(TrainingArguments, shlex.split(f"--model DIR --dataset rows.jsonl {line}"), "jvlm sft")
    return experiment_of(parsed.arguments, facts, parsed.given)


def at(value, path):
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("", "optimizer.learning_rate", 1e-4),
        ("", "optimizer.encoder_lr", None),
        ("", "model.precision.param_dtype", "bfloat16"),
        ("", "adapter.exclude", ("encoder", "connector")),
        ("--freeze_vit false --freeze_llm true", "adapter.exclude", ("decoder", "connector")),
        ("--target_modules q_proj v_proj", "adapter.targets", ("q_proj", "v_proj")),
        ("--target_regex '.*_proj'", "adapter.targets", ("re:.*_proj",)),
        (
            "--target_modules q_proj --target_parameters experts.down_proj",
            "adapter.targets",
            ("q_proj", "experts.down_proj"),
        ),
        ("--target_regex '.*_proj'", "adapter.exclude", ()),
        ("--modules_to_save connector", "adapter.train_modules", ("connector",)),
        ("--lora_alpha 16", "adapter.alpha", 16.0),
        ("", "adapter.dropout", 0.05),
        ("--use_dora true", "adapter.use_dora", True),
        ("--init_weights pissa", "adapter.init", "pissa"),
        ("--lorap_lr_ratio 16", "optimizer.lora_plus_ratio", 16.0),
        ("", "quantize", None),
        ("--quant_method bnb", "quantize.kind", "nf4"),
        ("--quant_method bnb --quant_bits 8", "quantize.kind", "int8"),
        ("--quant_method fp8", "quantize.kind", "fp8"),
        ("--adapters ckpt", "adapters_from", "ckpt"),
        ("--adapters ckpt", "adapter", None),
        ("--resume_from_checkpoint c --resume_only_model true", "adapters_from", "c"),
        ("--train_type full --resume_from_checkpoint c --resume_only_model true", "init_from", "c"),
        ("--push_to_hub true --hub_model_id a/b", "push.hub_model_id", "a/b"),
        ("--push_to_hub true --hub_model_id a/b", "push.every", "all"),
        ("--push_to_hub true --hub_model_id a/b --hub_strategy end", "push.every", "last"),
        ("--push_to_hub true --hub_model_id a/b --push_hub_strategy best", "push.every", "best"),
        ("--train_type full", "adapter", None),
        ("--train_type full", "optimizer.learning_rate", 1e-5),
        ("--train_type full", "optimizer.encoder_lr", 0.0),
        ("--train_type full", "optimizer.decoder_lr", None),
        ("--train_type full --freeze_vit false --vit_lr 2e-6", "optimizer.encoder_lr", 2e-6),
        ("--train_type full --freeze_llm true --freeze_aligner false", "optimizer.decoder_lr", 0.0),
        ("--train_type full", "model.precision.param_dtype", "float32"),
        ("--train_type full --torch_dtype bfloat16", "model.precision.param_dtype", "bfloat16"),
        ("--train_type full", "model.precision.remat", "full"),
        ("--train_type full --gradient_checkpointing false", "model.precision.remat", "none"),
        ("--train_type full --optim adamw_bnb_8bit", "optimizer.kind", "adamw_8bit"),
        ("--train_type full --lr_scheduler_type constant_with_warmup", "optimizer.schedule", "constant"),
        ("--train_type full --warmup_steps 10", "optimizer.warmup_steps", 10),
        ("--train_type full", "optimizer.warmup_ratio", 0.0),
        ("--train_type full --neftune_noise_alpha 5", "task.neftune_alpha", 5.0),
        ("--train_type full", "steps", None),
        ("--train_type full", "epochs", 3.0),
        ("--train_type full --max_steps 7", "steps", 7),
        ("--train_type full", "gradient_accumulation_steps", 3),
        ("--train_type full", "validation.split", 0.0),
        ("--train_type full --eval_steps 50", "validation.split", 50.0),
        ("--train_type full --eval_steps 50", "validation.interval_steps", 50),
        ("--train_type full --eval_steps 50 --split_dataset_ratio 0", "validation.split", 0.0),
        ("--train_type full --eval_steps 50 --val_dataset v.jsonl", "validation.data", ("v.jsonl",)),
        ("--train_type full --split_dataset_ratio 0.0001", "validation.split", 1.0),
        ("--train_type full --split_dataset_ratio 0.1 --save_steps 30", "validation.interval_steps", 30),
        ("--train_type full --split_dataset_ratio 0.1 --eval_strategy epoch", "validation.interval_steps", 40),
        ("--train_type full --split_dataset_ratio 0.1 --eval_strategy no", "validation.split", 0.0),
        (
            "--train_type full --split_dataset_ratio 0.1 --metric_for_best_model eval_token_acc",
            "validation.metric",
            "token_acc",
        ),
        ("--train_type full --load_best_model_at_end true", "validation.use_best", True),
        ("--train_type full --save_strategy epoch", "checkpoint.save_interval_steps", 40),
        ("--train_type full --save_total_limit 2", "hooks", (checkpoints.CheckpointFolders(2),)),
        ("--train_type full --max_pixels 1003520", "processor.image.max_pixels", 1003520),
        ("--train_type full --system Hello", "processor.default_system", "Hello"),
        ("--train_type full", "processor", None),
        ("--train_type full --box_format qwen_tokens", "processor.box_format", "qwen_tokens"),
    ],
)
def test_what_an_argument_becomes(facts, line, path, value):
    assert at(experiment(facts, line), path) == value


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("", "loss", None),  # every answer; of documents, which have none, all
        ("--loss_scale last_round", "loss", "last_answer"),
        ("--loss_scale all", "loss", "all"),
        ("", "columns", ()),
        ("""--columns '{"q": "query", "raw": "_"}'""", "columns", ("q=query", "raw=_")),
        ("", "curves", "dataset"),
        ("--enable_channel_loss true", "curves", "channel"),
    ],
)
def test_what_an_argument_says_of_the_data(line, field, value):
    parsed = parse(TrainingArguments, shlex.split(f"--model DIR --dataset examples.jsonl {line}"), "jvlm sft")
    assert getattr(data_config(parsed.arguments), field) == value


@pytest.mark.parametrize(
    ("columns", "message"),
    [("q=query", "--columns q=query is not JSON"), ("[1]", "is not an object"), ('{"q": 1}', "is not an object")],
)
def test_columns_that_are_no_names_are_refused_with_an_example(columns, message):
    parsed = parse(TrainingArguments, ["--dataset", "a.jsonl", "--columns", columns], "jvlm sft")
    with pytest.raises(UserError, match=message) as refused:
        data_config(parsed.arguments)
    assert """'{"question": "query", "raw": "_"}'""" in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train_type full --max_steps 0", "--max_steps"),
        ("--train_type full --split_dataset_ratio 1", "--split_dataset_ratio"),
        ("--train_type full --quant_method bnb", "--train_type lora"),
        ("--train_type full --max_pixels 0", "--max_pixels: 0 is not"),
        ("--train_type full --learning_rate -1", "learning_rate"),
        ("--train_type full --adapters a", "needs --train_type lora"),
        ("--push_to_hub true", "--hub_model_id"),
        ("--train_type full --freeze_llm true", "every tower is frozen"),
    ],
)
def test_arguments_that_make_no_experiment(facts, line, message):
    with pytest.raises(UserError) as refused:
        experiment(facts, line)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        "--use_dora true --quant_method bnb --target_modules q_proj v_proj --eval_steps 9",
        "--train_type full --eval_steps 5 --system 'Say \"yes\".' --max_pixels 5000",
    ],
)
def test_the_config_file_is_the_experiment(facts, line, tmp_path, monkeypatch):
    """Its model is that of the folder: the test's reads a preset in its place."""
    monkeypatch.setattr(io, "read_config", lambda place, given: dataclasses.replace(facts.model, precision=given))
    here = dataclasses.replace(facts.model, precision=hf.default_precision())
    made = experiment(dataclasses.replace(facts, model=here), line)
    config_file.write(made, tmp_path / "run.py", "A test.")
    assert configs.load(str(tmp_path / "run.py")) == made
    monkeypatch.setattr(hf.jax, "default_backend", lambda: "gpu")
    elsewhere = configs.load(str(tmp_path / "run.py")).model.precision
    assert elsewhere == dataclasses.replace(made.model.precision, compute_dtype="bfloat16") != made.model.precision
    with pytest.raises(UserError, match="is there already"):
        config_file.write(made, tmp_path / "run.py", "A test.")


@pytest.mark.parametrize(
    ("steps", "best", "limit", "gone"),
    [
        ([5, 10, 15], None, None, []),
        ([5, 10, 15], None, 2, [5]),
        ([5, 10, 15], 5, 2, [10]),
        ([5, 10, 15], 15, 2, [5]),
        ([5, 10, 15], 10, 1, [5]),
        ([5, 10, 15], None, 1, [5, 10]),
        ([5], 5, 1, []),
        ([5, 10, 15], 99, 2, [5]),
    ],
)
def test_the_last_and_the_best_checkpoint_stay(steps, best, limit, gone):
    assert checkpoints.stale(steps, best, limit) == gone


def test_a_run_that_was_stopped_names_what_goes_on_with_it():
    """The same command of ms-swift begins a new run, in a folder of its own."""
    keeper = Checkpointing.__new__(Checkpointing)
    keeper.storage = types.SimpleNamespace(folder=Path("output/v0-1"))
    for hooks, way in (
        ((keeper, Hook()), "the same command goes on from there"),
        (
            (keeper, checkpoints.CheckpointFolders()),
            "--resume_from_checkpoint output/v0-1/checkpoint-3 goes on from there",
        ),
    ):
        trainer = types.SimpleNamespace(step=3, stop_reason="SIGTERM", hooks=hooks)
        said = str(interruption.stopped(trainer, 9, "output/v0-1/checkpoints"))
        assert said == f"stopped by SIGTERM after step 3 of 9, which is saved in output/v0-1/checkpoints; {way}"
