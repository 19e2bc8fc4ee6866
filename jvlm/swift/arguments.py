"""The arguments of ``jvlm sft`` and ``jvlm pt``; names and defaults are those of ms-swift's documentation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jvlm.data.box_formats import FormatName
from jvlm.options import FLAT

TrainType = Literal["lora", "full"]
Strategy = Literal["no", "steps", "epoch"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "adafactor", "lion", "muon"]
InitWeights = Literal["true", "gaussian", "pissa", "olora"]


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """The model, and how it reads conversations.

    Attributes:
      model: folder of the model, or its id on the Hugging Face Hub.
      torch_dtype: dtype of the weights. None is bfloat16 under adapters and float32 where weights themselves are
        trained.
      system: system turn of conversations without one; None leaves it to the model's chat template.
      max_pixels: most pixels of an image after resizing; MAX_PIXELS in ms-swift.
      min_pixels: least pixels of an image after resizing.
      video_max_pixels: most pixels of a video frame.
      video_min_pixels: least pixels of a video frame.
      fps: frames taken from a second of video.
      box_format: how boxes of ``objects`` are written; None is the model's own. QWENVL_BBOX_FORMAT in ms-swift, whose
        "new" is "json", and whose "legacy" is the format with tokens of the vocabulary.
    """

    model: str | None = None
    torch_dtype: Literal["bfloat16", "float32"] | None = None
    system: str | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    video_max_pixels: int | None = None
    video_min_pixels: int | None = None
    fps: float | None = None
    box_format: FormatName | None = None


@dataclasses.dataclass(frozen=True)
class TunerArguments:
    """What is trained.

    Attributes:
      train_type: "lora" or "full"; also spelled --tuner_type.
      adapters: checkpoint of an adapter whose training goes on, with a new optimizer.
      lora_rank: rank of the two matrices.
      lora_alpha: an adapter's output is scaled by lora_alpha / lora_rank.
      lora_dropout: share of the adapter branch's inputs that is dropped.
      target_modules: what gets an adapter: "all-linear", last parts of module names ("q_proj"), or towers and roles
        ("decoder.attention"). The three freeze flags leave towers out of it.
      target_parameters: parameters of experts that get adapters too, by the ends of their names, as in PEFT:
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj". They take no dropout.
      target_regex: regular expression over whole module names, in place of target_modules and of the freeze flags.
      modules_to_save: modules that are trained whole beside the adapters.
      lora_bias: biases of the base that are trained too.
      use_dora: learn the length of each output's weights apart from their direction.
      use_rslora: scale by lora_alpha / sqrt(lora_rank).
      lorap_lr_ratio: LoRA+: factor on the learning rate of the second matrices.
      init_weights: how adapters begin: "true" (Kaiming uniform and zeros), "gaussian", "pissa" or "olora".
      freeze_llm: full: the language model is not trained; lora: it gets no adapters.
      freeze_vit: the same of the vision tower.
      freeze_aligner: the same of the connector between them.
      quant_method: hold the frozen base in fewer bits (QLoRA): "bnb", or "fp8".
      quant_bits: bits of quant_method bnb: 4 (NF4) or 8.
      bnb_4bit_use_double_quant: quantise the scales of NF4 too.
    """

    train_type: TrainType = "lora"
    adapters: tuple[str, ...] = ()
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("all-linear",)
    target_parameters: tuple[str, ...] = ()
    target_regex: str | None = None
    modules_to_save: tuple[str, ...] = ()
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    use_rslora: bool = False
    lorap_lr_ratio: float | None = None
    init_weights: InitWeights = "true"
    freeze_llm: bool = False
    freeze_vit: bool = True
    freeze_aligner: bool = True
    quant_method: Literal["bnb", "fp8"] | None = None
    quant_bits: Literal[4, 8] = 4
    bnb_4bit_use_double_quant: bool = True


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """The data.

    Attributes:
      dataset: JSONL files or globs, or ids on the Hub; FILE#N takes N examples of it, which repeats them if it has
        fewer.
      val_dataset: files to measure the loss on.
      split_dataset_ratio: share of ``dataset`` that is held out instead, by image. None is 0; with --eval_steps or
        --eval_strategy, and no val_dataset, 0.01.
      columns: new names of the examples' fields, as a JSON object: '{"question": "query", "raw": "_"}'; "_" hides one.
      media_root: folder for relative media paths, after the data file's own.
      strict: stop at an example that cannot be used, in place of leaving it out.
      max_length: longest conversation in tokens; None allows all.
      truncation_strategy: of a longer one: "delete" leaves it out, "right" drops turns from its end, "shrink" makes its
        images smaller (jvlm's own).
      packing_length: tokens of a packed sequence; None chooses it from the data and the batch size.
      train_dataloader_shuffle: a new order each epoch.
      dataloader_num_workers: processes that read and encode examples; 1 or fewer reads in threads.
    """

    dataset: tuple[str, ...] = ()
    val_dataset: tuple[str, ...] = ()
    split_dataset_ratio: float | None = None
    columns: str | None = None
    media_root: str | None = None
    strict: bool = False
    max_length: int | None = None
    truncation_strategy: Literal["delete", "right", "shrink"] = "delete"
    packing_length: int | None = None
    train_dataloader_shuffle: bool = True
    dataloader_num_workers: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizationArguments:
    """Batches, optimizer and schedule.

    Attributes:
      num_train_epochs: passes over the data.
      max_steps: optimizer steps in place of epochs; -1 derives them.
      per_device_train_batch_size: conversations of a batch on each device, on average: they are packed without padding.
      gradient_accumulation_steps: batches whose gradients make a step; None is as many as 16 conversations take.
      learning_rate: peak; None is 1e-4 with adapters and 1e-5 without.
      vit_lr: peak of the vision tower's; None is learning_rate.
      aligner_lr: peak of the connector's; None is learning_rate.
      lr_scheduler_type: what follows the warm-up.
      warmup_ratio: share of the steps with linear warm-up.
      warmup_steps: their number, in place of warmup_ratio; 0 leaves it to that.
      optim: "adamw_torch" and the like are AdamW; the 8-bit ones keep its moments in 8 bits.
      weight_decay: of matrices.
      adam_beta1: decay of the mean of gradients.
      adam_beta2: decay of the mean of squared gradients.
      adam_epsilon: added to AdamW's denominator.
      max_grad_norm: largest norm of the gradient.
      gradient_checkpointing: compute activations again in the backward pass.
      loss_scale: which answers are trained on: "default" all of a conversation, "last_round" the last, "all" every
        token, prompts included. `jvlm pt` takes "all".
      enable_channel_loss: log the loss of each `channel` that examples name; without it, of each file.
      neftune_noise_alpha: scale of NEFTune's noise on embeddings; 0 adds none.
      seed: of new weights and of the order of the data.
    """

    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int | None = None
    learning_rate: float | None = None
    vit_lr: float | None = None
    aligner_lr: float | None = None
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    optim: Optimizer = "adamw_torch"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    loss_scale: Literal["default", "last_round", "all"] = "default"
    enable_channel_loss: bool = False
    neftune_noise_alpha: float = 0.0
    seed: int = 42


@dataclasses.dataclass(frozen=True)
class OutputArguments:
    """What a run writes.

    Attributes:
      output_dir: the run's folder is OUTPUT_DIR/vN-DATE-TIME; None is output/ and the model's name.
      add_version: False writes to output_dir itself.
      logging_steps: steps between log lines.
      save_strategy: when checkpoints are written.
      save_steps: steps between checkpoints.
      eval_strategy: when the loss on held-out data is measured; None follows save_strategy.
      eval_steps: steps between those; None is save_steps.
      save_total_limit: checkpoint folders that stay, the last and the best always among them; None keeps all.
      metric_for_best_model: "loss" or "token_acc"; None is loss.
      greater_is_better: whether more of the metric is; None is so of accuracies.
      load_best_model_at_end: return the best checkpoint, and not the last.
      early_stop_interval: stop after so many evaluations in a row without a gain.
      create_checkpoint_symlink: name the last and the best checkpoint OUTPUT/last and OUTPUT/best.
      resume_from_checkpoint: checkpoint folder of a run that was interrupted; it goes on in its own folder.
      resume_only_model: take the weights of that checkpoint, and begin a new run.
      report_to: where curves go; jvlm writes TensorBoard's files.
    """

    output_dir: str | None = None
    add_version: bool = True
    logging_steps: int = 5
    save_strategy: Strategy = "steps"
    save_steps: int = 500
    eval_strategy: Strategy | None = None
    eval_steps: int | None = None
    save_total_limit: int | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    early_stop_interval: int | None = None
    create_checkpoint_symlink: bool = False
    resume_from_checkpoint: str | None = None
    resume_only_model: bool = False
    report_to: tuple[Literal["tensorboard", "none"], ...] = ("tensorboard",)


@dataclasses.dataclass(frozen=True)
class HubArguments:
    """Uploading to a hub.

    Attributes:
      push_to_hub: upload the result.
      hub_model_id: ORG/NAME to upload to.
      hub_token: token of the hub, if not that of `hf auth login`; it is never written anywhere.
      hub_private_repo: make the repository private.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private_repo: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingHubArguments(HubArguments):
    """Uploading to a hub during training.

    Attributes:
      hub_strategy: what is uploaded: "every_save" each checkpoint when it is saved, and the result; "end" the result;
        "best" the best checkpoint by the validation (jvlm's own).
    """

    hub_strategy: Literal["every_save", "end", "best"] = "every_save"


@dataclasses.dataclass(frozen=True)
class TrainingArguments:
    """All of a training command.

    Attributes:
      model: the model, and how it reads conversations.
      tuner: what is trained.
      data: the data.
      optimization: batches, optimizer and schedule.
      output: what a run writes.
      hub: uploading to a hub.
    """

    model: Annotated[ModelArguments, FLAT] = ModelArguments()
    tuner: Annotated[TunerArguments, FLAT] = TunerArguments()
    data: Annotated[DataArguments, FLAT] = DataArguments()
    optimization: Annotated[OptimizationArguments, FLAT] = OptimizationArguments()
    output: Annotated[OutputArguments, FLAT] = OutputArguments()
    hub: Annotated[TrainingHubArguments, FLAT] = TrainingHubArguments()


RlhfType = Literal["dpo", "orpo", "simpo", "cpo", "kto", "rm", "grpo"]


@dataclasses.dataclass(frozen=True)
class PreferenceArguments:
    """What is learnt of answers that were preferred.

    Attributes:
      rlhf_type: "dpo" and its variants (--loss_type), "cpo", "simpo", "orpo"; "kto" of answers with a label; "rm" a
        reward model; "grpo" of rewards of answers that the model samples.
      loss_type: of dpo: one or several of sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard,
        apo_zero, apo_down, aot, aot_unpaired, discopop, sigmoid_norm, and sft, the supervised loss of the chosen
        answers; None is sigmoid. MPO is "sigmoid bco_pair sft" with --loss_weights 0.8 0.2 1. Of kto: kto, the
        default, or apo_zero_unpaired. Of grpo: grpo, the default, bnpo, dr_grpo, dapo or cispo.
      loss_weights: factor of each of these; empty is 1 each.
      beta: strength of the pull towards the reference; None is 0.1, of simpo 2, of grpo 0.04.
      label_smoothing: share of pairs whose order is taken to be wrong.
      rpo_alpha: of dpo: factor of the supervised loss of the chosen answers (RPO); None is 0.
      ld_alpha: of dpo: weight of tokens beyond the length of a pair's shorter answer (LD-DPO); None is 1.
      discopop_tau: of loss_type discopop: temperature of its modulation.
      cpo_alpha: of cpo and simpo: factor of the supervised loss of the chosen answers.
      simpo_gamma: of simpo: the margin that a chosen answer must have.
      center_rewards_coefficient: of rm: weight of the squared sum of a pair's rewards, which keeps their mean at 0;
        None is 0.
      desirable_weight: of kto: weight of the loss of good answers.
      undesirable_weight: of kto: weight of the loss of bad answers.
      ref_model: what the model is compared with: None, or the folder of --model, is the model before training.
      precompute_ref_log_probs: of dpo: compute the reference's log-probabilities once, before training, into the run's
        folder: no second pass in each step.
      ref_adapters: the adapter of the reference: none, or that of --adapters.
    """

    rlhf_type: RlhfType = "dpo"
    loss_type: tuple[str, ...] | None = None
    loss_weights: tuple[float, ...] = ()
    beta: float | None = None
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None
    ld_alpha: float | None = None
    discopop_tau: float = 0.05
    cpo_alpha: float = 1.0
    simpo_gamma: float = 1.0
    center_rewards_coefficient: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    ref_model: str | None = None
    ref_adapters: tuple[str, ...] = ()
    precompute_ref_log_probs: bool = False


@dataclasses.dataclass(frozen=True)
class GrpoArguments:
    """How answers are sampled, judged and weighed, of --rlhf_type grpo.

    Attributes:
      num_generations: answers to each prompt: a group.
      max_completion_length: longest answer in tokens.
      temperature: of the sampling, and of the loss.
      top_p: 1 alone is taken: the loss is that of the whole distribution.
      top_k: 0 alone is taken, likewise.
      reward_funcs: how answers are judged: "accuracy", by Math-Verify against the example's solution; a rule of jvlm
        ("boxes", "count", "choice" and so on); or the name of a reward in --external_plugins. Beside one of these:
        "format", without which an answer earns nothing, "repetition" and "soft_overlong", which are taken off.
      external_plugins: Python file with rewards of your own, in the forms of ms-swift, TRL, verl and others.
      epsilon: ratios of probabilities below 1 - epsilon have no gradient.
      epsilon_high: nor those above 1 + epsilon_high; None is epsilon. Of loss_type cispo: the largest weight.
      delta: largest ratio of the branch that is not clipped; None sets no bound.
      importance_sampling_level: "sequence" takes the ratio of whole answers (GSPO).
      advantage_estimator: how rewards become advantages.
      scale_rewards: what they are divided by: the deviation of the group, of the batch, or nothing; auto, ms-swift's
        default, is group of grpo, batch of reinforce_plus_plus and none of rloo.
      dynamic_sample: sample other prompts in the place of groups whose answers all earn the same. Without it a step is
        smaller by these.
      max_resample_times: how often, at most.
      overlong_filter: learn nothing of answers that were cut.
      soft_max_length: of soft_overlong: the longest answer; None is max_completion_length, and only that is taken.
      soft_cache_length: of soft_overlong: tokens below it in which the punishment rises.
      repetition_max_penalty: of repetition: what an answer loses that is nothing but repetition.
      rollout_importance_sampling_mode: weight of tokens whose probability was another one in the engine.
      rollout_importance_sampling_threshold: largest weight.
    """

    num_generations: int = 8
    max_completion_length: int = 512
    temperature: float = 0.9
    top_p: float = 1.0
    top_k: int = 0
    reward_funcs: tuple[str, ...] = ()
    external_plugins: str | None = None
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = "grpo"
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    dynamic_sample: bool = False
    max_resample_times: int = 3
    overlong_filter: bool = False
    soft_max_length: int | None = None
    soft_cache_length: int | None = None
    repetition_max_penalty: float = -1.0
    rollout_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    rollout_importance_sampling_threshold: float = 2.0


@dataclasses.dataclass(frozen=True)
class RlhfArguments(TrainingArguments):
    """All of ``jvlm rlhf``.

    Attributes:
      preference: what is learnt of answers that were preferred.
      grpo: how answers are sampled, judged and weighed.
      optimization: batches, optimizer and schedule.
    """

    preference: Annotated[PreferenceArguments, FLAT] = PreferenceArguments()
    grpo: Annotated[GrpoArguments, FLAT] = GrpoArguments()
    optimization: Annotated[OptimizationArguments, FLAT] = OptimizationArguments(loss_scale="last_round")
