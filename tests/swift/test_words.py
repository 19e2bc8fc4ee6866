"""ms-swift's command lines as its users type them."""

import shlex

import pytest

from jvlm.errors import UserError
from jvlm.swift import other_names, saved
from jvlm.swift.arguments import RlhfArguments, TrainingArguments
from jvlm.swift.infer_arguments import InferArguments
from jvlm.swift.words import parse

# What MiMo-VL's users were told to type after `swift sft`.
CANONICAL = """
--model DIR --dataset formulas.jsonl#20000 --train_type lora --torch_dtype bfloat16 --num_train_epochs 2
--per_device_train_batch_size 16 --per_device_eval_batch_size 16 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32
--target_modules all-linear --freeze_vit true --gradient_accumulation_steps 1 --eval_steps 50 --save_steps 50
--save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir output --warmup_ratio 0.05 --padding_free true
--attn_impl flash_attn --use_liger_kernel true --dataloader_num_workers 4
"""


def arguments(line: str) -> dict:
    return saved.flat(parse(TrainingArguments, shlex.split(line), "jvlm sft").arguments)


def test_the_command_that_users_were_told_to_type_is_taken_word_for_word():
    parsed = parse(TrainingArguments, shlex.split(CANONICAL), "jvlm sft")
    values = saved.flat(parsed.arguments)
    assert values["dataset"] == ("formulas.jsonl#20000",)
    assert values["target_modules"] == ("all-linear",)
    assert (values["lora_alpha"], values["learning_rate"], values["freeze_vit"]) == (32.0, 1e-4, True)
    named = "per_device_eval_batch_size padding_free attn_impl use_liger_kernel".split()
    assert [note.split()[0] for note in parsed.notes] == [f"--{name}" for name in named]


# ms-swift 4.6, docs/source_en/Instruction/Command-line-parameters.md
@pytest.mark.parametrize(
    ("name", "default"),
    [
        *(("train_type", "lora"), ("lora_rank", 8), ("lora_alpha", 32), ("lora_dropout", 0.05), ("use_dora", False)),
        *(("target_modules", ("all-linear",)), ("target_regex", None), ("modules_to_save", ()), ("use_rslora", False)),
        *(("lorap_lr_ratio", None), ("init_weights", "true"), ("freeze_llm", False), ("freeze_vit", True)),
        *(("freeze_aligner", True), ("vit_lr", None), ("aligner_lr", None), ("lr_scheduler_type", "cosine")),
        *(("warmup_ratio", 0), ("weight_decay", 0.1), ("adam_beta1", 0.9), ("adam_beta2", 0.95), ("max_grad_norm", 1)),
        *(("per_device_train_batch_size", 1), ("gradient_accumulation_steps", None), ("num_train_epochs", 3)),
        *(("max_steps", -1), ("gradient_checkpointing", True), ("max_length", None), ("truncation_strategy", "delete")),
        *(("val_dataset", ()), ("dataloader_num_workers", 1), ("strict", False), ("max_pixels", None), ("seed", 42)),
        *(("loss_scale", "default"), ("neftune_noise_alpha", 0), ("save_strategy", "steps"), ("save_steps", 500)),
        *(("save_total_limit", None), ("logging_steps", 5), ("add_version", True), ("report_to", ("tensorboard",))),
        *(("quant_method", None), ("quant_bits", 4), ("adapters", ()), ("resume_from_checkpoint", None)),
    ],
)
def test_defaults_are_those_of_ms_swift(name, default):
    assert arguments("")[name] == default


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--lora-rank 4", "lora_rank", 4),
        ("--lora_rank=4", "lora_rank", 4),
        ("--tuner_type full", "train_type", "full"),
        ("--dataset a.jsonl b.jsonl#5", "dataset", ("a.jsonl", "b.jsonl#5")),
        ("--freeze_vit False", "freeze_vit", False),
        ("--freeze_vit 0", "freeze_vit", False),
        ("--use_dora", "use_dora", True),
        ("--use_dora --lora_rank 4", "use_dora", True),
        ("--max_length none", "max_length", None),
        ("--max_pixels 1003520", "max_pixels", 1003520),
        ("--vit_lr 1e-6", "vit_lr", 1e-6),
        ("--modules_to_save", "modules_to_save", ()),
        ("--system ''", "system", ""),
        ("--quant_bits 8", "quant_bits", 8),
    ],
)
def test_spellings(line, name, value):
    assert arguments(line)[name] == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora_rnk 3", "no option --lora_rnk; did you mean --lora_rank"),
        ("--zzz 3", "no option --zzz; jvlm sft --help lists them"),
        ("--lora_rank many", "--lora_rank is a whole number, got 'many'"),
        ("--learning_rate fast", "--learning_rate is a number, got 'fast'"),
        ("--freeze_vit maybe", "--freeze_vit is true or false, got 'maybe'"),
        ("--max_pixels", "--max_pixels needs a value"),
        ("--model a b", "--model takes one value, got 'a' 'b'"),
        ("rows.jsonl", "'rows.jsonl' is the value of no option"),
        ("--quant_bits 8 --quant-bits 4", "given twice"),
        ("--train_type adalora", "--train_type cannot be 'adalora': take lora"),
        ("--train_type qlora", "--quant_method bnb --quant_bits 4"),
        ("--train_type lor", "one of lora, full"),
        ("--report_to wandb", "take tensorboard"),
        ("--sequence_parallel_size 2", "--parallel.context"),
        ("--rlhf_type dpo", "jvlm rlhf trains"),
        ("--tuner_backend unsloth", "leave it out"),
        ("--hub_strategy push_last", "take end"),
        ("--quant_method gptq", "jvlm export fp8, gptq, awq or rtn"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_nearest_thing(line, message):
    with pytest.raises(UserError) as refused:
        arguments(line)
    assert message in str(refused.value)


@pytest.mark.parametrize("line", ["--sequence_parallel_size 1", "--tuner_backend peft", "--use_galore false"])
def test_values_that_ask_for_nothing_are_taken(line):
    assert arguments(line) == arguments("")


@pytest.mark.parametrize("name", sorted(other_names.IGNORED))
def test_a_name_without_use_gets_one_line_that_says_why(name):
    parsed = parse(TrainingArguments, [f"--{name}", "true"], "jvlm sft")
    (note,) = parsed.notes
    assert note.startswith(f"--{name} has no use here: ")
    assert "\n" not in note


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora_rank 8", "--lora_rank, which is one of jvlm sft"),
        ("--sft_type lora", "--sft_type, which is one of jvlm sft"),
        ("--max_new_token 5", "did you mean --max_new_tokens"),
        ("--metric rouge", "one of acc"),
    ],
)
def test_a_name_of_another_command_is_said_to_be_one(line, message):
    with pytest.raises(UserError, match=message):
        parse(InferArguments, shlex.split(line), "jvlm infer")


def test_arguments_of_other_engines_have_no_use():
    line = "--infer_backend vllm --vllm_max_model_len 8192 --vllm_gpu_memory_utilization 0.9 --stream true"
    parsed = parse(InferArguments, shlex.split(line), "jvlm infer")
    named = "--infer_backend --vllm_max_model_len --vllm_gpu_memory_utilization".split()
    assert [note.split()[0] for note in parsed.notes] == named
    assert parsed.arguments.answers.stream is True


def test_no_name_is_both_an_argument_and_something_else():
    known = set(arguments(""))
    tables = [set(other_names.ALIASES), set(other_names.IGNORED), set(other_names.REFUSED)]
    assert set(other_names.ALIASES.values()) <= known
    for table in tables:
        assert not table & known
    assert len(set().union(*tables)) == sum(map(len, tables))
    assert set(other_names.OTHER_VALUES) <= known | set(saved.flat(RlhfArguments()))


def test_variables_that_ms_swift_reads_are_named_with_the_option_to_use():
    notes = other_names.environment_notes({"MAX_PIXELS": "1003520", "PATH": "/bin", "NPROC_PER_NODE": "2"})
    assert len(notes) == 2
    assert "MAX_PIXELS=1003520" in notes[0]
    assert "--max_pixels" in notes[0]
