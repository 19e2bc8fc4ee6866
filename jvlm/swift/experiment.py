"""ms-swift's training arguments as an `Experiment`: pure functions of the arguments and of what was found out."""

from __future__ import annotations

import dataclasses

from jvlm.adapters.config import AdapterConfig
from jvlm.data.config import DataConfig
from jvlm.data.image_processor import FieldError
from jvlm.data.processor import ProcessorConfig
from jvlm.errors import UserError
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.mesh import ParallelConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.swift import preference
from jvlm.swift.arguments import (
    ModelArguments,
    RlhfArguments,
    TrainingArguments,
    TrainingHubArguments,
    TunerArguments,
)
from jvlm.swift.batches import Batches
from jvlm.swift.checkpoints import CheckpointFolders
from jvlm.swift.columns import columns_of
from jvlm.training.config import (
    AdaptConfig,
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    ExportConfig,
    OptimizerConfig,
    PushConfig,
    ValidationConfig,
)
from jvlm.training.supervised import SupervisedTask
from jvlm.training.task import Task

_IMAGE_FIELDS = ("max_pixels", "min_pixels", "video_max_pixels", "video_min_pixels", "fps")
_NEVER = 10**9  # steps between checkpoints of a run that writes one at its end only
# A share of examples that cannot be used above which even ms-swift's users will want to know.
_BAD = 0.1
IMPLIED_SPLIT = 0.01


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run finds out before its experiment is known.

    Attributes:
      model: of the model's folder.
      processor: of the same.
      batches: sizes chosen from the data.
      examples: of the training data.
      epoch_steps: steps of a pass over them.
      root, name: the run's folder is ROOT/NAME.
      language_model: folder of a language model alone that is trained; None for a whole model.
    """

    model: VLMConfig
    processor: ProcessorConfig
    batches: Batches
    examples: int
    epoch_steps: int
    root: str
    name: str
    language_model: str | None = None


def model_config(arguments: TrainingArguments, config: VLMConfig) -> VLMConfig:
    """Return the model of a folder with the dtypes and the rematerialisation of the arguments."""
    adapted = arguments.tuner.train_type == "lora"
    dtype = arguments.model.torch_dtype or ("bfloat16" if adapted else "float32")
    remat = "full" if arguments.optimization.gradient_checkpointing else "none"
    precision = Precision(param_dtype=dtype, compute_dtype=config.precision.compute_dtype, remat=remat)
    return dataclasses.replace(config, precision=precision)


def processor_config(model: ModelArguments, config: ProcessorConfig) -> ProcessorConfig:
    """Return the processor of a folder with the image limits, the system turn and the boxes of the arguments.

    Raises:
      UserError: a limit that the model's image processor does not have, or a value outside its range.
    """
    changed = {name: getattr(model, name) for name in _IMAGE_FIELDS if getattr(model, name) is not None}
    try:
        image = config.image.changed(changed)
    except FieldError as error:
        raise UserError(f"--{error.field}: {error.problem}. {error.fix}") from error
    return dataclasses.replace(
        config,
        image=image,
        default_system=config.default_system if model.system is None else model.system,
        box_format=model.box_format or config.box_format,
    )


def data_config(arguments: TrainingArguments) -> DataConfig:
    """Return the data of the arguments, with sizes of sequences that are yet to be chosen."""
    data, scale = arguments.data, arguments.optimization.loss_scale
    too_long = {"delete": "drop", "right": "truncate", "shrink": "shrink"}[data.truncation_strategy]
    workers = data.dataloader_num_workers
    is_preference = isinstance(arguments, RlhfArguments)
    if is_preference and arguments.optimization.enable_channel_loss:
        raise UserError("--enable_channel_loss: the losses of pairs have no curves by channel; leave it out")
    by_channel = arguments.optimization.enable_channel_loss
    return DataConfig(
        train=data.dataset,
        columns=columns_of(data.columns),
        media_root=data.media_root,
        seq_len=data.packing_length or "auto",
        max_patches="auto",
        max_length=data.max_length,
        on_too_long=too_long,
        on_bad_example="error" if data.strict else "skip",
        max_bad_fraction=_BAD,
        shuffle="auto" if data.train_dataloader_shuffle else "none",
        curves="channel" if by_channel else "off" if is_preference else "dataset",
        loss={"default": "answers" if is_preference else None, "last_round": "last_answer", "all": "all"}[scale],
        preference=preference.data_kind(arguments.preference) if is_preference else "none",
        worker_processes=workers if workers > 1 else 0,
    )


def adapter_config(tuner: TunerArguments, modules: tuple[str, ...] = ()) -> AdapterConfig:
    """Return the adapters of the arguments; towers that are frozen get none.

    Args:
      modules: that are trained whole beside those that the arguments name.
    """
    frozen = {"decoder": tuner.freeze_llm, "encoder": tuner.freeze_vit, "connector": tuner.freeze_aligner}
    by_regex = tuner.target_regex is not None
    return AdapterConfig(
        rank=tuner.lora_rank,
        alpha=tuner.lora_alpha,
        dropout=tuner.lora_dropout,
        use_rslora=tuner.use_rslora,
        use_dora=tuner.use_dora,
        init="default" if tuner.init_weights == "true" else tuner.init_weights,
        targets=(*((f"re:{tuner.target_regex}",) if by_regex else tuner.target_modules), *tuner.target_parameters),
        exclude=() if by_regex else tuple(tower for tower, is_frozen in frozen.items() if is_frozen),
        bias=tuner.lora_bias,
        train_modules=(*tuner.modules_to_save, *modules),
    )


def quantization(tuner: TunerArguments) -> QuantizationConfig | None:
    """Return how the frozen base is held; None in its own dtype."""
    if tuner.quant_method is None:
        return None
    if tuner.train_type == "full":
        raise UserError("--quant_method holds a frozen base in fewer bits: it needs --train_type lora")
    bnb = {4: "nf4", 8: "int8"}[tuner.quant_bits]
    kind = bnb if tuner.quant_method == "bnb" else tuner.quant_method
    return QuantizationConfig(kind=kind, double=tuner.bnb_4bit_use_double_quant)


def optimizer_config(arguments: TrainingArguments) -> OptimizerConfig:
    """Return the optimizer of the arguments; without adapters, towers that are frozen have a learning rate of 0."""
    tuner, given = arguments.tuner, arguments.optimization
    full = tuner.train_type == "full"
    rate = given.learning_rate if given.learning_rate is not None else (1e-5 if full else 1e-4)
    rates = {"encoder_lr": given.vit_lr, "connector_lr": given.aligner_lr, "decoder_lr": None}
    frozen = {"encoder_lr": tuner.freeze_vit, "connector_lr": tuner.freeze_aligner, "decoder_lr": tuner.freeze_llm}
    if full:
        rates = {name: 0.0 if frozen[name] else rates[name] for name in rates}
    kinds = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"}
    return OptimizerConfig(
        kind=kinds.get(given.optim, given.optim),
        learning_rate=rate,
        **rates,
        lora_plus_ratio=tuner.lorap_lr_ratio,
        schedule=given.lr_scheduler_type.removesuffix("_with_warmup"),
        warmup_ratio=given.warmup_ratio,
        warmup_steps=given.warmup_steps or None,
        weight_decay=given.weight_decay,
        beta1=given.adam_beta1,
        beta2=given.adam_beta2,
        eps=given.adam_epsilon,
        max_grad_norm=given.max_grad_norm,
    )


def split_of(arguments: TrainingArguments, examples: int, given: frozenset[str] = frozenset()) -> float:
    """Return the number of examples to hold out, at least one where any are; 0 for none.

    Args:
      given: names of arguments that were typed: asking for evaluation without data for it holds out 1 %.
    """
    data, output = arguments.data, arguments.output
    ratio = data.split_dataset_ratio
    if ratio is None:
        asked = {"eval_steps", "eval_strategy"} & given and output.eval_strategy != "no"
        ratio = IMPLIED_SPLIT if asked else 0.0
    if not 0 <= ratio < 1:
        raise UserError(f"--split_dataset_ratio is a share of the examples, at least 0 and below 1, got {ratio}")
    if data.val_dataset or not ratio:
        return 0.0
    return float(max(1, round(ratio * examples)))


def validation_config(arguments: TrainingArguments, facts: Facts, given: frozenset[str]) -> ValidationConfig:
    """Return when and on what the loss is measured during training."""
    output, data = arguments.output, arguments.data
    strategy = output.eval_strategy or output.save_strategy
    if strategy == "no":
        return ValidationConfig()
    interval = facts.epoch_steps if strategy == "epoch" else output.eval_steps or output.save_steps
    better = {None: "auto", True: "max", False: "min"}[output.greater_is_better]
    return ValidationConfig(
        data=data.val_dataset,
        split=split_of(arguments, facts.examples, given),
        interval_steps=interval,
        metric=(output.metric_for_best_model or "loss").removeprefix("eval_"),
        mode=better,
        patience=output.early_stop_interval,
        use_best=output.load_best_model_at_end,
    )


def push_config(hub: TrainingHubArguments) -> PushConfig:
    """Return what is uploaded after training. Raises UserError without the name of a repository."""
    if not hub.push_to_hub:
        return PushConfig()
    if hub.hub_model_id is None:
        raise UserError("--push_to_hub true needs --hub_model_id ORG/NAME")
    every = {"every_save": "all", "end": "last", "best": "best"}[hub.hub_strategy]
    return PushConfig(hub_model_id=hub.hub_model_id, private=hub.hub_private_repo, every=every)


def task_of(arguments: TrainingArguments, given: frozenset[str] = frozenset(), folder: str = "") -> Task:
    """Return what is minimised by a run in a folder. Raises UserError for arguments that exclude one another."""
    if isinstance(arguments, RlhfArguments):
        return preference.task_of(arguments, given, folder)
    return SupervisedTask(neftune_alpha=arguments.optimization.neftune_noise_alpha)


def experiment_of(arguments: TrainingArguments, facts: Facts, given: frozenset[str] = frozenset()) -> Experiment:
    """Return the experiment that the arguments stand for.

    Args:
      given: names of the arguments that were typed.

    Raises:
      UserError: arguments that exclude one another, or values outside their range.
    """
    text = facts.language_model
    if text is not None:  # which has neither
        frozen = dataclasses.replace(arguments.tuner, freeze_vit=True, freeze_aligner=True)
        arguments = dataclasses.replace(arguments, tuner=frozen)
    output, optimization, tuner = arguments.output, arguments.optimization, arguments.tuner
    if optimization.max_steps == 0 or optimization.max_steps < -1:
        raise UserError(f"--max_steps is a number of steps, or -1 for none, got {optimization.max_steps}")
    lora = tuner.train_type == "lora"
    adapters = tuner.adapters or ((output.resume_from_checkpoint,) if output.resume_from_checkpoint else ())
    if len(adapters) > 1:
        raise UserError(f"--adapters: training goes on with one adapter, got {', '.join(adapters)}")
    if tuner.adapters and not lora:
        raise UserError("--adapters goes on with an adapter: it needs --train_type lora")
    goes_on = bool(adapters) and lora and (bool(tuner.adapters) or output.resume_only_model)
    save = {"steps": output.save_steps, "epoch": facts.epoch_steps, "no": _NEVER}[output.save_strategy]
    processor = processor_config(arguments.model, facts.processor)
    is_reward_model = isinstance(arguments, RlhfArguments) and arguments.preference.rlhf_type == "rm"
    init_from = arguments.model.model if text is None else None
    if output.resume_only_model and not lora:
        init_from = output.resume_from_checkpoint
    folders = CheckpointFolders(limit=output.save_total_limit, links=output.create_checkpoint_symlink)
    return Experiment(
        name=facts.name,
        output_root=facts.root,
        model=model_config(arguments, facts.model),
        init_from=init_from,
        decoder_from=text,
        tokenizer=text,
        adapt=AdaptConfig(labels=1) if is_reward_model else AdaptConfig(),
        adapter=adapter_config(tuner, ("score",) if is_reward_model else ()) if lora and not goes_on else None,
        adapters_from=adapters[0] if goes_on else None,
        quantize=quantization(tuner),
        processor=None if processor == facts.processor else processor,
        data=facts.batches.data,
        parallel=ParallelConfig(data=1, fsdp=-1),
        optimizer=optimizer_config(arguments),
        # the state that a resumed run goes on from; folders for others to read are written by the hook
        checkpoint=CheckpointConfig(save_interval_steps=save, max_to_keep=1),
        validation=validation_config(arguments, facts, given),
        evaluation=EvaluationConfig(),
        export=ExportConfig(enabled=False),
        push=push_config(arguments.hub),
        task=task_of(arguments, given, f"{facts.root}/{facts.name}"),
        hooks=(folders,) if text is None else (),
        steps=optimization.max_steps if optimization.max_steps > 0 else None,
        epochs=optimization.num_train_epochs,
        gradient_accumulation_steps=facts.batches.accumulation,
        seed=optimization.seed,
        log_interval_steps=output.logging_steps,
    )
