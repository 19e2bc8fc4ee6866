"""Tokens a second of `jvlm evaluate` on mixed questions, beside the engine's own on the same prompts, encoded before.

    python -m tools.bench_evaluate --questions 200
    python -m tools.bench_evaluate --model runs/easy_vqa/hf --questions 5000 --rounds 1

The model is the demo's, with random weights unless a folder is given; questions have no picture, one or two, and a
sentence or a page, and answers are drawn, so that they end after one token or after forty. Both are timed in turns in
one process, by one engine whose programs are compiled and whose caches are emptied before; the last line is the ratio
of the medians, and the command fails where it is below --least, or so far above 1 that something else was measured. The
rows of evaluation hold all that it does: reading files, encoding, asking, writing each answer, the running score; and
scoring at the end apart. The processor time of both is told too, which other jobs of the machine change less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jvlm import configs
from jvlm.data.images import open_image
from jvlm.evaluation.clients import LocalClient
from jvlm.evaluation.files import Rows, official
from jvlm.evaluation.items import open_item
from jvlm.evaluation.prompting import prompt
from jvlm.evaluation.run import Settings, ask, score_task
from jvlm.evaluation.score import load_examples
from jvlm.evaluation.task import Decoding, Task
from jvlm.inference.feed import encode_prompt
from jvlm.inference.requests import Request
from jvlm.inference.sampling import SamplingConfig
from jvlm.training import starting_model
from jvlm.weights.io import load

FILE = "questions.jsonl"
WARM = 1500  # questions asked before the rounds
MOST = 1.1  # ratio that is still taken for a measurement
TASK = Task(
    "mixed",
    "own",
    (official(FILE, media="pictures"),),
    open_item(answers=("answer",), images=("images",)),
    "exact",
    decoding=Decoding(max_new_tokens=40, temperature=1.0),
)


def write_questions(folder: Path, count: int) -> None:
    """Write questions as a benchmark's authors would: a file of records, and pictures beside it."""
    experiment = configs.load("mimo_vl/easy_vqa", [])
    examples = load_examples(list(experiment.evaluation.data))
    (folder / "pictures").mkdir(parents=True)
    for number, example in enumerate(examples):
        open_image(example.images[0].source).save(folder / "pictures" / f"{number}.png")
    texts = [message.text.strip() for example in examples for message in example.messages[::2]]
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        pictures = rng.integers(0, len(examples), int(rng.integers(0, 3)))
        words = [texts[i] for i in rng.integers(0, len(texts), int(rng.choice([1, 1, 2, 20])))]
        record = {"id": number, "question": " ".join(words), "answer": "yes"}
        lines.append(record | {"images": [f"{i}.png" for i in pictures]})
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; the demo's shapes with random weights without one")
    parser.add_argument("--questions", type=int, default=1000, help="how many are asked in each round")
    parser.add_argument("--batch_size", type=int, default=32, help="questions that run at once")
    parser.add_argument("--rounds", type=int, default=3, help="times that both are timed, in turns")
    parser.add_argument("--least", type=float, default=0.0, help="ratio that asking must reach")
    arguments = parser.parse_args()
    if arguments.model:
        model, processor = load(arguments.model)
    else:
        model, processor = starting_model.start_model(configs.load("mimo_vl/easy_vqa", []))
    client = LocalClient(model, processor, batch_size=arguments.batch_size)
    engine = client.engine
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_questions(folder / "data", arguments.questions)
        rows = Rows(TASK.files, folder / "data", TASK.name)
        began = time.perf_counter()

        def empty() -> int:
            """Forget what prompts and pictures have left; returns the tokens so far."""
            for scheduler in engine._schedulers:
                scheduler.forget()
            return engine.stats().generation_tokens

        def evaluate(label: str, limit: int | None = None) -> tuple[float, float, float]:
            before, worked = empty(), time.process_time()
            seconds = ask(client, TASK, rows, folder / "data", folder / label, Settings(limit=limit))
            worked = time.process_time() - worked
            tokens, began = engine.stats().generation_tokens - before, time.perf_counter()
            score_task(TASK, folder / label, seconds=seconds)
            return tokens / seconds, tokens / (seconds + time.perf_counter() - began), worked / tokens

        # every shape of prompt, so that no program is compiled in a round
        warm = min(len(rows), WARM)
        evaluate("warm", warm)
        sampling = SamplingConfig(**dataclasses.asdict(TASK.decoding))
        examples = []
        for index in range(len(rows)):
            (item,) = TASK.items(rows[index])
            examples.append(encode_prompt(engine, prompt(TASK, item)))
        lengths = [example.length for example in examples]
        print(f"{len(examples)} questions, prompts of {min(lengths)} to {max(lengths)} tokens")

        def alone(label: str, count: int | None = None) -> tuple[float, float]:
            before, began, worked = empty(), time.perf_counter(), time.process_time()
            for number, example in enumerate(examples[:count]):
                engine.submit(Request(f"{label}-{number}", example, sampling.params(number)))
            while engine.has_work:
                engine.step()
            tokens = engine.stats().generation_tokens - before
            return tokens / (time.perf_counter() - began), (time.process_time() - worked) / tokens

        alone("warm", warm)
        print("| tokens/s | engine alone | asking | ratio | asking and scoring | ratio |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        found, work = [], []
        for turn in range(arguments.rounds):
            (own, own_work), (asking, whole, asking_work) = alone(str(turn)), evaluate(f"round {turn}")
            found.append((own, asking, asking / own, whole, whole / own))
            work.append((1e6 * own_work, 1e6 * asking_work, own_work / asking_work))
            print(_row(f"round {turn + 1}", found[-1]), flush=True)
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        print(_row("median", medians))
        ratio = medians[1] / medians[0]
        own, asking, share = (statistics.median(column) for column in zip(*work, strict=True))
        print(f"processor time of a token: {own:.0f} us alone, {asking:.0f} us asking ({share:.2f})")
        took = time.perf_counter() - began
        print(f"{len(examples)} questions: jvlm evaluate at {ratio:.2f} of the engine's own tokens/s, in {took:.0f} s")
    if ratio > MOST:
        print(f"asking cannot be faster than the engine: a ratio above {MOST} measures something else. Run it again")
    return 0 if arguments.least <= ratio <= MOST else 1


def _row(name: str, values) -> str:
    own, asking, ratio, whole, whole_ratio = values
    return f"| {name} | {own:,.0f} | {asking:,.0f} | {ratio:.2f} | {whole:,.0f} | {whole_ratio:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
