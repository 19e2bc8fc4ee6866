"""ms-swift's names that are no arguments here: other spellings, names without a use, and what cannot be honoured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

# Old or other spellings of the same argument.
ALIASES: Mapping[str, str] = {
    "tuner_type": "train_type",
    "sft_type": "train_type",
    "lora_lr_ratio": "lorap_lr_ratio",
    "init_lora_weights": "init_weights",
    "lora_target_modules": "target_modules",
    "dtype": "torch_dtype",
    "dataset_shuffle": "train_dataloader_shuffle",
    "learning_rate_vit": "vit_lr",
    "model_id_or_path": "model",
    "resume_from_ckpt": "resume_from_checkpoint",
    "push_hub_strategy": "hub_strategy",
}

# Other spellings of a server's options, and what ms-swift hands to vLLM. Other commands say of them what is below.
SERVER_ALIASES: Mapping[str, str] = {
    "gpu_memory_utilization": "memory_fraction",
    "vllm_gpu_memory_utilization": "memory_fraction",
    "vllm_max_model_len": "max_model_len",
    "vllm_max_num_seqs": "max_num_seqs",
    "vllm_data_parallel_size": "data_parallel_size",
    "data_parallel": "data_parallel_size",
}

_PACKED = "jvlm packs conversations into sequences without padding between them, always"
_OWN_ATTENTION = "jvlm picks its own attention kernel for the device"
_SHARDED = "jvlm splits parameters, gradients and optimizer state over all devices by itself"
_DEVICES = "jvlm uses all devices that it finds; several hosts join with --distributed"
_LAZY = "jvlm reads and encodes examples while it trains; nothing is prepared ahead"
OWN_ENGINE = "jvlm generates with its own engine"
_COMPUTE = "jvlm computes in bfloat16; --torch_dtype is the dtype of the weights"
_READERS = "jvlm has no torch data loader; --dataloader_num_workers sets its reading processes"

# Beginnings of the names of arguments that ms-swift hands to other engines.
ENGINES = ("vllm_", "sglang_", "lmdeploy_")

# Names whose values change nothing in jvlm, and why.
IGNORED: Mapping[str, str] = {
    "padding_free": _PACKED,
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "group_by_length": _PACKED,
    "attn_impl": _OWN_ATTENTION,
    "use_liger_kernel": "jvlm's loss never holds all logits, which is what that kernel is for",
    "use_vllm": "answers are sampled by jvlm's own engine",
    "log_completions": "all answers are stored in any case",
    "max_completion_length": "--max_length is the longest conversation, answer included",
    "use_logits_to_keep": "jvlm computes logits of supervised tokens only",
    "lazy_tokenize": _LAZY,
    "load_from_cache_file": _LAZY,
    "dataset_num_proc": _LAZY,
    "streaming": "jvlm reads examples by their place in the file, so it needs neither --max_steps nor a buffer",
    "shuffle_buffer_size": "jvlm shuffles all of the data",
    "dataloader_pin_memory": _READERS,
    "dataloader_persistent_workers": _READERS,
    "dataloader_prefetch_factor": _READERS,
    "dataloader_drop_last": "jvlm's epochs run into one another, so no batch is short",
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "zero_hpz_partition_size": _SHARDED,
    "device_map": _DEVICES,
    "max_memory": _DEVICES,
    "local_rank": _DEVICES,
    "ddp_backend": _DEVICES,
    "ddp_timeout": _DEVICES,
    "ddp_find_unused_parameters": _DEVICES,
    "bf16": _COMPUTE,
    "tf32": _COMPUTE,
    "model_type": "jvlm reads the architecture from config.json",
    "model_kwargs": "give its entries as arguments of their own: --max_pixels, --min_pixels, --fps, ...",
    "template": "jvlm uses the chat template in the model's folder",
    "use_hf": "ids are those of the Hugging Face Hub; ModelScope is asked for models named modelscope://ORG/NAME",
    "gradient_checkpointing_kwargs": "jvlm recomputes whole layers",
    "vit_gradient_checkpointing": "--gradient_checkpointing decides for all towers",
    "per_device_eval_batch_size": "validation batches have the shape of training batches",
    "eval_accumulation_steps": "validation keeps sums only",
    "logging_first_step": "the first step is always logged",
    "logging_dir": "TensorBoard's files are in the run's folder, under tensorboard/",
    "save_safetensors": "checkpoint folders always hold safetensors",
    "save_only_model": "the state of the optimizer is kept apart from the checkpoint folders",
    "ignore_data_skip": "a resumed run goes on at the next example at no cost",
    "remove_unused_columns": "unknown fields are counted and listed",
    "disable_tqdm": "the progress bar shows in a terminal only",
    "norm_bbox": "boxes are written in the space of the model's own format; --box_format chooses another",
    "bnb_4bit_quant_type": "4 bits are always NF4",
    "bnb_4bit_compute_dtype": _COMPUTE,
    "bnb_4bit_quant_storage": "codes are kept as bytes",
    "torch_compile": "jvlm compiles every step",
    "check_model": "jvlm compares every tensor with the model's configuration",
    "include_num_input_tokens_seen": "the log has tokens_per_s",
    "overwrite_output_dir": "every run has a folder of its own; --add_version false goes on in one",
    "infer_backend": OWN_ENGINE,
    "gpu_memory_utilization": OWN_ENGINE,
    "tensor_parallel_size": OWN_ENGINE,
    "max_model_len": OWN_ENGINE,
    "merge_lora": "an adapter answers beside its base; jvlm merge-lora writes the merged folder",
    "quant_batch_size": "jvlm packs the conversations that it calibrates on",
    "to_peft_format": "adapters are always in PEFT's format",
    "safe_serialization": "jvlm writes safetensors",
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An argument that jvlm cannot honour.

    Attributes:
      instead: the nearest thing.
      harmless: values (in lower case) that ask for nothing.
    """

    instead: str
    harmless: tuple[str, ...] = ()

    def accepts(self, values: tuple[str, ...]) -> bool:
        """Return whether the values ask for nothing."""
        return bool(values) and all(value.lower() in self.harmless for value in values)


_OFF = ("false", "none", "0", "no", "[]", "{}", "")
_BY_PATH = "freeze towers by --freeze_llm, --freeze_vit and --freeze_aligner, or parameters by path: "
_BY_PATH += "--write_config FILE.py, then jvlm train FILE.py --optimizer.freeze PATTERN"
_PLUGIN = "write the run as a config (--write_config FILE.py) and give it a task or hooks in Python"
_PREFERENCES = "jvlm rlhf trains on preferred and rejected answers"

REFUSED: Mapping[str, Refusal] = {
    "tuner_backend": Refusal("jvlm's adapters are PEFT's formats with code of its own; leave it out", ("peft",)),
    "freeze_parameters": Refusal(_BY_PATH, _OFF),
    "freeze_parameters_regex": Refusal(_BY_PATH, _OFF),
    "freeze_parameters_ratio": Refusal(_BY_PATH, ("0", "0.0", *_OFF)),
    "trainable_parameters": Refusal(_BY_PATH, _OFF),
    "trainable_parameters_regex": Refusal(_BY_PATH, _OFF),
    "sequence_parallel_size": Refusal(
        "--write_config FILE.py, then jvlm train FILE.py --parallel.context N splits sequences over devices", ("1",)
    ),
    "num_iterations": Refusal("there is one update for each rollout; leave it out", ("1",)),
    "async_generate": Refusal("answers are of the present weights; leave it out", _OFF),
    "reward_model": Refusal("give it in a file of rewards, to a config: --write_config FILE.py, then jvlm rl", _OFF),
    "interleave_prob": Refusal("FILE#N sets how many examples each file gives", _OFF),
    "stopping_strategy": Refusal("FILE#N sets how many examples each file gives", ("first_exhausted",)),
    "external_plugins": Refusal(_PLUGIN, _OFF),
    "custom_register_path": Refusal(_PLUGIN, _OFF),
    "custom_dataset_info": Refusal("give the files themselves as --dataset", _OFF),
    "cached_dataset": Refusal("jvlm data convert writes examples as shards, which --dataset takes", _OFF),
    "model_name": Refusal("put who the model is into the data or --system", _OFF),
    "model_author": Refusal("put who the model is into the data or --system", _OFF),
    "kv_cache_dtype": Refusal("the cache is kept in the dtype that the model computes in; leave it out", ("auto",)),
    "use_chat_template": Refusal("jvlm pt trains on all of a conversation", ("true",)),
    "response_prefix": Refusal("put it into the data", _OFF),
    "agent_template": Refusal("jvlm uses the tools part of the model's own chat template", _OFF),
    "task_type": Refusal("jvlm trains models that answer in text", ("causal_lm",)),
    "fp16": Refusal("--torch_dtype bfloat16", _OFF),
    "use_galore": Refusal("--optim adafactor or --optim adamw_8bit take less memory than AdamW", _OFF),
    "use_swift_lora": Refusal("leave it out; --train_type lora is PEFT's LoRA", _OFF),
    "lora_dtype": Refusal("adapters are kept in float32", ("none", "float32")),
    "lisa_activated_layers": Refusal("--train_type lora", _OFF),
    "rlhf_type": Refusal(_PREFERENCES),
    "ref_model": Refusal(_PREFERENCES, _OFF),
    "ref_model_type": Refusal("the reference is the model before training; leave it out", _OFF),
    "reference_free": Refusal("--rlhf_type cpo, simpo or orpo need no reference", _OFF),
    "f_divergence_type": Refusal("the reverse KL divergence is the only one; leave it out", ("reverse_kl",)),
    "create_commit_message": Refusal("leave it out", _OFF),
    "to_ollama": Refusal("--to_gguf true writes the files; FROM ./NAME.gguf in a Modelfile names one", _OFF),
    "to_mcore": Refusal("Megatron's format is not written; the Hugging Face folder is what it converts from", _OFF),
    "to_cached_dataset": Refusal("jvlm data convert writes examples as shards, which --dataset takes", _OFF),
}

# Values of jvlm's arguments that ms-swift has besides, and what to take instead.
_OTHER_TUNERS = "longlora adalora llamapro adapter vera boft fourierft reft bone lora_llm".split()
OTHER_VALUES: Mapping[str, Mapping[str, str]] = {
    "train_type": {
        **dict.fromkeys(_OTHER_TUNERS, "take lora, which --use_dora true and --use_rslora true change, or full"),
        "qlora": "take --train_type lora --quant_method bnb --quant_bits 4",
        "dora": "take --train_type lora --use_dora true",
    },
    "truncation_strategy": {
        "left": "take right, which drops turns from the end, or delete",
        "split": "take right, which drops turns from the end, or delete",
    },
    "quant_method": dict.fromkeys(
        "hqq eetq quanto gptq awq bnb".split(),
        "jvlm sft takes bnb (with --quant_bits 4 or 8) or fp8 for the frozen base, jvlm export fp8, gptq, awq or rtn",
    ),
    "init_weights": dict.fromkeys(
        "loftq lora-ga eva corda orthogonal false".split(), "take true, gaussian, pissa or olora"
    ),
    "torch_dtype": dict.fromkeys(("float16", "fp16", "half", "bf16"), "take bfloat16, which jvlm computes in"),
    "report_to": dict.fromkeys(
        "wandb swanlab mlflow all".split(), "take tensorboard; logging.jsonl and TensorBoard's files hold all curves"
    ),
    "hub_strategy": {
        **dict.fromkeys(("checkpoint", "all_checkpoints"), "take every_save; the state of the optimizer stays here"),
        "push_last": "take end",
        "push_best": "take best",
    },
    "rlhf_type": {
        "ppo": "take grpo, which needs no value model",
        "gkd": "jvlm rlhf learns from preferences and rewards, and from no teacher",
    },
    "save_strategy": {"best": "take steps: with --load_best_model_at_end true the best stays"},
}

# Environment variables that ms-swift reads, and what to give jvlm instead.
ENVIRONMENT: Mapping[str, str] = {
    "MAX_PIXELS": "--max_pixels",
    "MIN_PIXELS": "--min_pixels",
    "VIDEO_MAX_PIXELS": "--video_max_pixels",
    "VIDEO_MIN_PIXELS": "--video_min_pixels",
    "VIDEO_TOTAL_PIXELS": "--video_max_pixels, the most pixels of each frame",
    "FPS": "--fps",
    "FPS_MIN_FRAMES": "--fps",
    "FPS_MAX_FRAMES": "--fps",
    "SIZE_FACTOR": "nothing: the model's patches decide",
    "IMAGE_FACTOR": "nothing: the model's patches decide",
    "QWENVL_BBOX_FORMAT": "--box_format",
    "NPROC_PER_NODE": "nothing: one process uses all devices of a machine",
    "NNODES": "--num_processes, or --distributed where the cluster announces it",
    "NODE_RANK": "--process_id, or --distributed where the cluster announces it",
    "MASTER_ADDR": "--coordinator HOST:PORT",
    "MASTER_PORT": "--coordinator HOST:PORT",
}


def environment_notes(environment: Mapping[str, str]) -> list[str]:
    """Return a line for each variable that ms-swift would read and jvlm does not."""
    found = [name for name in ENVIRONMENT if environment.get(name)]
    return [
        f"the environment variable {name}={environment[name]} is not read; use {ENVIRONMENT[name]}" for name in found
    ]
