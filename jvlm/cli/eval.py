"""``jvlm eval``: scores on benchmarks, with ms-swift's arguments."""

from __future__ import annotations

import json
import sys

from jvlm.cli.evaluate import Evaluate, evaluate
from jvlm.errors import UserError
from jvlm.swift import words as swift_words
from jvlm.swift.eval_arguments import EvalArguments

_SAMPLING = {"max_tokens": "max_new_tokens", "max_new_tokens": "max_new_tokens", "temperature": "temperature"} | {
    "top_p": "top_p"
}


def run(words: list[str]) -> int:
    parsed = swift_words.parse(EvalArguments, words, "jvlm eval")
    for note in parsed.notes:
        print(f"jvlm: {note}", file=sys.stderr)
    return evaluate(options(parsed.arguments))


def options(arguments: EvalArguments) -> Evaluate:
    """Return the options of ``jvlm evaluate`` that arguments of ms-swift come to."""
    if (arguments.model is None) == (arguments.eval_url is None):
        raise UserError("give either --model, or --eval_url of a server")
    return Evaluate(
        model=arguments.eval_url or arguments.model,
        served_model=None,
        adapters=arguments.adapters,
        tasks=tuple(map(task_name, arguments.eval_dataset)),
        data=arguments.eval_data_dir,
        output=arguments.eval_output_dir,
        limit=arguments.eval_limit,
        concurrency=arguments.eval_num_proc,
        batch_size=arguments.max_batch_size,
        **_sampling(arguments.eval_generation_config),
    )


def task_name(name: str) -> str:
    """Return jvlm's name of a task that is named as VLMEvalKit's table is; others as they are."""
    from jvlm.evaluation.tasks import TASKS

    named = {
        files.pattern.removesuffix(".tsv"): task.name for task in TASKS for files in task.files if files.form == "tsv"
    }
    return named.get(name, name)


def _sampling(text: str | None) -> dict[str, float]:
    try:
        given = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--eval_generation_config is no JSON ({error}): {text}") from error
    unknown = sorted(given.keys() - _SAMPLING.keys()) if isinstance(given, dict) else [str(given)]
    if unknown:
        raise UserError(f"--eval_generation_config: {', '.join(unknown)}: known are {', '.join(_SAMPLING)}")
    return {_SAMPLING[name]: value for name, value in given.items()}
