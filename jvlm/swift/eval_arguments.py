"""The arguments of ``jvlm eval``, with ms-swift's names and defaults."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class EvalArguments:
    """Score a model on benchmarks, with ms-swift's arguments. jvlm evaluate has more.

    Attributes:
      model: folder or id of the model.
      adapters: folder of the adapter that answers.
      eval_url: http://HOST:PORT/v1 of a server to ask instead of a model.
      eval_backend: whose tasks; jvlm's own are asked whichever is named.
      eval_dataset: tasks, by jvlm's names or by those of VLMEvalKit's tables.
      eval_limit: questions of each, drawn at random; None asks all.
      eval_num_proc: requests to a server at a time.
      eval_output_dir: folder for answers and scores.
      eval_data_dir: folder with the tasks' files; jvlm's own.
      eval_generation_config: JSON with max_tokens, temperature, top_p.
      max_batch_size: questions answered together.
    """

    model: str | None = None
    adapters: tuple[str, ...] = ()
    eval_url: str | None = None
    eval_backend: Literal["native", "opencompass", "vlmevalkit"] = "native"
    eval_dataset: tuple[str, ...] = ()
    eval_limit: int | None = None
    eval_num_proc: int = 16
    eval_output_dir: str = "eval_output"
    eval_data_dir: str = "."
    eval_generation_config: str | None = None
    max_batch_size: int = 8
