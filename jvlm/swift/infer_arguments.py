"""The arguments of ``jvlm infer``, with ms-swift's names and defaults."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jvlm.options import FLAT
from jvlm.swift.arguments import ModelArguments


@dataclasses.dataclass(frozen=True)
class AnswerArguments:
    """What is answered, and how.

    Attributes:
      adapters: checkpoint folder of a run, whose adapter, or whole model, answers.
      ckpt_dir: the same, by an older name.
      val_dataset: JSONL files whose conversations are answered; FILE#N takes N of them. Without data there is a
        conversation in the terminal.
      columns: new names of the examples' fields, as in jvlm sft.
      load_data_args: answer what the run validated on: its val_dataset, or the examples that it held out.
      result_path: JSONL file of answers, one that is unfinished is continued; None is infer_result/DATE-TIME.jsonl in
        the checkpoint's folder.
      max_batch_size: conversations answered together.
      stream: show answers as they are made; None does so in the terminal's conversation.
      max_new_tokens: longest answer in tokens; None is 2048.
      temperature: 0 takes the likeliest token; None is the model's generation_config.json.
      top_k: likeliest tokens to draw from; None is the model's.
      top_p: their probability together; None is the model's.
      repetition_penalty: divides positive logits of tokens seen before; None is the model's.
      metric: print the share of answers that equal the expected ones.
      seed: of draws.
    """

    adapters: tuple[str, ...] = ()
    ckpt_dir: str | None = None
    val_dataset: tuple[str, ...] = ()
    columns: str | None = None
    load_data_args: bool = False
    result_path: str | None = None
    max_batch_size: int = 1
    stream: bool | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    metric: Literal["acc"] | None = None
    seed: int = 42


@dataclasses.dataclass(frozen=True)
class InferArguments:
    """Answer conversations with a model, or with a checkpoint of jvlm sft. Arguments and defaults are ms-swift's.

    Attributes:
      model: the model, and how it reads conversations.
      answers: what is answered, and how.
    """

    model: Annotated[ModelArguments, FLAT] = ModelArguments()
    answers: Annotated[AnswerArguments, FLAT] = AnswerArguments()
