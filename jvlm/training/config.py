"""An experiment: one typed, frozen tree. Any field can be overridden on the command line."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from jvlm.adapters.config import AdapterConfig
from jvlm.data.config import DataConfig
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.processor import ProcessorConfig
from jvlm.errors import UserError
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.mesh import ParallelConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.training.hooks import Hook
from jvlm.training.optimizer.config import OptimizerConfig
from jvlm.training.supervised import SupervisedTask
from jvlm.training.task import Task
from jvlm.validation import check_fields
from jvlm.weights.safetensors_files import dtype_of

SEEDS = f"[0, {2**32})"  # what every generator of random numbers takes


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
      save_interval_steps: steps between checkpoints; one is also written at the end.
      max_to_keep: how many of the latest stay.
      keep_period: steps whose checkpoints always stay; None keeps none beyond ``max_to_keep``.
      full: write frozen parameters with every checkpoint. Otherwise a run refers to the folder that they come from, and
        compares their fingerprint; those that come from no folder are written to the run once.
    """

    save_interval_steps: int = 500
    max_to_keep: int = 2
    keep_period: int | None = None
    full: bool = False

    def __post_init__(self):
        check_fields(
            self, "checkpoint.", dict.fromkeys(("save_interval_steps", "max_to_keep", "keep_period"), "[1, inf)")
        )


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Measuring the loss on held-out data during training; see docs/training.md.

    Attributes:
      data: files or globs of examples of their own; each is a source that is measured by itself.
      split: hold out examples of the training data instead, by image: a share below 1, or a number of examples.
      interval_steps: steps between evaluations; there is also one at the end.
      metric: what the best checkpoint and early stop go by: "loss", "token_acc" or another metric of the task; of one
        source as "loss/examples.jsonl".
      mode: whether less ("min") or more ("max") of it is better; "auto" is "max" for accuracies, else "min".
      patience: stop after so many evaluations in a row without a gain; None never does.
      min_delta: least gain that counts for patience.
      use_best: whether the best checkpoint is what the run returns, scores and exports; None: if patience is set. A run
        that stops because it got no better is past its best; one that only watches ends as it would without watching.
    """

    data: tuple[str, ...] = ()
    split: float = 0.0
    interval_steps: int = 500
    metric: str = "loss"
    mode: Literal["auto", "min", "max"] = "auto"
    patience: int | None = None
    min_delta: float = 0.0
    use_best: bool | None = None

    def __post_init__(self):
        bounds = {**dict.fromkeys(("interval_steps", "patience"), "[1, inf)")}
        check_fields(self, "validation.", {**bounds, **dict.fromkeys(("split", "min_delta"), "[0, inf)")})
        if self.data and self.split:
            raise UserError("validation.data and validation.split are two ways of the same: give one of them")
        if self.split > 1 and self.split != int(self.split):
            raise UserError(f"validation.split is a share below 1 or a whole number of examples, got {self.split:g}")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.data) or self.split > 0

    @property
    def maximise(self) -> bool:
        """Whether more of the metric is better."""
        name = self.metric.removeprefix("rewards/").partition("/")[0]  # "rewards/accuracies" of a preference task
        return self.mode == "max" or (self.mode == "auto" and "acc" in name)

    @property
    def returns_best(self) -> bool:
        """Whether the run returns its best checkpoint."""
        return self.patience is not None if self.use_best is None else self.use_best


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scoring by generation after training.

    Attributes:
      data: files of examples whose assistant turns are the expected answers; empty skips scoring.
      format: of `data`, as that of the training data. Of formats without an assistant's turn the answer is taken as
        one.
      columns: of `data`, renamed as those of the training data.
      ask: "independent" asks each question in a conversation of its own; "multi_turn" in order, after the model's own
        answers.
      max_new_tokens: longest answer in tokens.
      batch_size: questions answered together.
      max_examples: of the files; None takes all.
      text_only_baseline: also score the most frequent training answer to the same words, blind to the image.
      before_training: also score the model as it was before training: a table of both with 95 % intervals, and the
        boxes of both in the report.
      aim: percent of the questions with answers in words that must be right; where fewer are, `jvlm train` ends with
        status 3 after all files are written. None: any share will do.
      aim_iou: the same for the mean IoU of boxes, from 0 to 1.
      aim_gain: points of percent that training must add to the share of questions with answers in words that are right;
        0 lets it lose nothing. Needs ``before_training``.
      aim_iou_gain: the same for the mean IoU of boxes, from 0 to 1.
      tasks: benchmarks, by the names of jvlm evaluate --list, that the model is scored on during training.
      tasks_data: folder with their files.
      tasks_interval_steps: steps between these scores.
      tasks_limit: questions of each that are asked, the same every time.
      tasks_max_new_tokens: longest answer to them; None is each task's own, thousands of tokens where it is to reason,
        which a model that does not end its answers yet takes every time.
    """

    data: tuple[str, ...] = ()
    format: str = "auto"
    columns: tuple[str, ...] = ()
    ask: Literal["independent", "multi_turn"] = "independent"
    max_new_tokens: int = 64
    batch_size: int = 64
    max_examples: int | None = None
    text_only_baseline: bool = False
    before_training: bool = False
    aim: float | None = None
    aim_iou: float | None = None
    aim_gain: float | None = None
    aim_iou_gain: float | None = None
    tasks: tuple[str, ...] = ()
    tasks_data: str | None = None
    tasks_interval_steps: int = 500
    tasks_limit: int = 100
    tasks_max_new_tokens: int | None = None

    def __post_init__(self):
        names = ("max_new_tokens", "batch_size", "max_examples", "tasks_interval_steps", "tasks_limit")
        names += ("tasks_max_new_tokens",)
        counts = dict.fromkeys(names, "[1, inf)")
        aims = {"aim": "[0, 100]", "aim_iou": "[0, 1]", "aim_gain": "[0, 100]", "aim_iou_gain": "[0, 1]"}
        check_fields(self, "evaluation.", {**counts, **aims})
        if not self.before_training and (self.aim_gain is not None or self.aim_iou_gain is not None):
            raise UserError(
                "evaluation.aim_gain and aim_iou_gain compare with the model before training: set "
                "evaluation.before_training, or leave them out"
            )
        if self.tasks and self.tasks_data is None:
            raise UserError("evaluation.tasks needs evaluation.tasks_data, the folder with their files")

    def options(self) -> FormatOptions:
        """Return the format of `data`."""
        return FormatOptions(self.format, self.columns, answer_as_turn=True)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writing the result as a Hugging Face folder (``<run>/hf``).

    Attributes:
      enabled: whether to export after training.
      dtype: of the tensors; None keeps what the model came with.
      verify: read the folder back and compare the answers to this many questions of the evaluation data.
    """

    enabled: bool = True
    dtype: str | None = None
    verify: int = 200

    def __post_init__(self):
        check_fields(self, "export.", {"verify": "[0, inf)"})
        if self.dtype is not None:
            dtype_of(self.dtype)


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Uploading to the Hugging Face Hub, or to ModelScope ("modelscope://ORG/NAME").

    The token is that of the hub's own store (`hf auth login`), or HF_TOKEN. A failed upload never ends the training: it
    is reported at the end, and in the status.

    Attributes:
      hub_model_id: ORG/NAME of the repository, made if there is none; None uploads nothing.
      private: make it private, if it is new.
      every: "last" uploads the result of the run, "best" its best checkpoint by the validation, "all" each checkpoint
        when it is saved, and the result.
    """

    hub_model_id: str | None = None
    private: bool = False
    every: Literal["last", "best", "all"] = "last"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training that comes before the experiment's own data; the next one goes on from its weights.

    Optimizer state and schedule begin anew. A stage is a run of its own in ``<run>/stages/<name>``.

    Attributes:
      name: of the stage, and of its folder.
      data: what it trains on.
      optimizer: how it trains.
      steps: optimizer steps; None derives them from the experiment's ``epochs``.
    """

    name: str
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int | None = None

    def __post_init__(self):
        check_fields(self, f"stage {self.name}: ", {"steps": "[1, inf)"})


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """What becomes of the model of ``init_from`` before it is trained.

    Attributes:
      grid: patches along the side of an image: position tables are interpolated, for larger or smaller images.
      grid_scale: ratio that places the interpolation's samples, where it is not that of the sizes: (70 + 0.1) / 27 for
        SigLIP's step from 27 to 70 in Idefics2.
      experts: a dense decoder's MLPs become the start of experts (`jvlm.weights.upcycling`).
      labels: the model gives so many scores in the place of a next token, by a new matrix; 1 is a reward model. Goes
        without ``init_from`` too.
      grow_embedding: tokens of the tokenizer without a row in the embedding table get one, as in `jvlm.load`.
    """

    grid: int | None = None
    grid_scale: float | None = None
    experts: MoEConfig | None = None
    labels: int | None = None
    grow_embedding: bool = False

    def __post_init__(self):
        check_fields(self, "adapt.", {"grid": "[1, inf)", "labels": "[1, inf)", "grid_scale": "(0, inf)"})


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a run; saved in it as experiment.json.

    Attributes:
      name: of the run; also its folder under ``output_root``.
      stages: trained first, in order: alignment before instruction, short sequences before long ones.
      model: the architecture, when training from random weights; with ``init_from`` the folder's own is used and
        only ``model.precision`` counts.
      init_from: Hugging Face or run folder, or id on the Hub (ORG/NAME, ORG/NAME@REVISION), whose weights and processor
        to start from.
      adapt: changes to that model; none to one that starts from random weights.
      adapter: train adapters (LoRA and its relatives) on the model, and of the base only what it names; None trains the
        base. With a model that has adapters already, a stage's say, these are trained on.
      adapters_from: folder of an adapter to go on with, a PEFT folder or a run with adapters: its weights, and its
        configuration in the place of ``adapter``. A run is resumed by its name, not by this.
      quantize: hold matrices that are frozen in fewer bits; None holds all in ``model.precision.param_dtype``.
      encoder_from: Hugging Face folder of a vision tower, whose weights take the place of the encoder's random ones
        (`jvlm.weights.backbones`).
      decoder_from: Hugging Face folder of a language model, whose weights take the place of the decoder's random ones.
      tokenizer: folder of the tokenizer, when training from random weights.
      processor: how examples become tokens and pixels; None takes that of ``init_from``, or the model family's.
      data: what is trained on, and how it is packed.
      topologies: pods that it is made for, as jvlm plan names them ("v5p:4x4x4"), which says how it fits there.
      parallel: the mesh of devices, and what is split over its axes; a restart may change it.
      optimizer: the optimizer, its learning rates and schedule.
      checkpoint: when checkpoints are written, and which stay.
      validation: measuring the loss on held-out data during training.
      evaluation: scoring by generation after training.
      export: writing the result as a Hugging Face folder.
      push: uploading the result, or each checkpoint.
      steps: optimizer steps; None derives them from ``epochs``.
      epochs: passes over the data, used when ``steps`` is None; the number of steps is estimated by packing a sample.
      gradient_accumulation_steps: batches whose gradients make one step; the loss is averaged over all their tokens.
      seed: of the random weights, the order of the data, and all else that is drawn.
      log_interval_steps: steps between log lines.
      accept_changes: go on with a run whose settings, data or start have changed since it began; the changes are noted
        in ``<run>/changes.jsonl`` and in the log.
      output_root: folder of runs, or an address in an object store, gs://bucket/runs; then small files are also in
        ``runs/gs/bucket/runs``.
      profile: "10:13" traces the 10th to the 13th step of a start, both included, for xprof or TensorBoard, into
        ``<run>/profile``; empty is none.
      task: what is minimised; see `jvlm.training.task`. Its fields are saved, and a changed one is another experiment.
      hooks: of your own, after those of every run; see `jvlm.training.hooks`. A restart may change them.
      stop_after_skips: a step whose loss or gradient is not finite is skipped; after so many in a row the run stops
        and writes their batches for `jvlm replay`. 1 stops at the first, and costs the overlap of host and device.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    model: VLMConfig | None = None
    init_from: str | None = None
    adapt: AdaptConfig = AdaptConfig()
    adapter: AdapterConfig | None = None
    adapters_from: str | None = None
    quantize: QuantizationConfig | None = None
    encoder_from: str | None = None
    decoder_from: str | None = None
    tokenizer: str | None = None
    processor: ProcessorConfig | None = None
    data: DataConfig = DataConfig()
    topologies: tuple[str, ...] = ()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    push: PushConfig = PushConfig()
    task: Task = SupervisedTask()
    hooks: Annotated[tuple[Hook, ...], tyro.conf.Fixed] = ()
    steps: int | None = None
    epochs: float = 3.0
    gradient_accumulation_steps: int = 1
    seed: int = 42
    log_interval_steps: int = 5
    profile: str = ""
    stop_after_skips: int = 10
    accept_changes: bool = False
    output_root: str = "runs"

    def __post_init__(self):
        counts = dict.fromkeys(
            ("steps", "gradient_accumulation_steps", "log_interval_steps", "stop_after_skips"), "[1, inf)"
        )
        check_fields(self, "", {**counts, "epochs": "(0, inf)", "seed": SEEDS})
        if self.init_from is None and (self.model is None or self.tokenizer is None):
            raise UserError("give init_from (a folder to start from), or both model and tokenizer")
        if self.init_from is None and dataclasses.replace(self.adapt, labels=None) != AdaptConfig():
            raise UserError("adapt changes the model of init_from, which is not given: change model instead")
        if self.init_from is not None and (self.encoder_from or self.decoder_from):
            raise UserError("init_from brings a whole model: give it, or encoder_from and decoder_from")
        if self.quantize is not None and self.adapter is not None and self.adapter.init in ("pissa", "olora"):
            raise UserError(
                f"adapter.init {self.adapter.init} takes a part of the base away, which a base that is quantised "
                "(quantize) cannot give; take default or gaussian"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or not all(name.replace("-", "_").isidentifier() for name in names):
            raise UserError(f"stages need names of letters, digits, - and _, each its own; got {', '.join(names)}")
        profiled_steps(self.profile)


def profiled_steps(text: str) -> range:
    """Return the steps that `Experiment.profile` names, counted from 1 since the start."""
    if not text:
        return range(0)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"profile is FIRST:LAST, as in 10:13, got {text!r}")
    return range(int(first), int(last) + 1)
