"""The data pipeline on this machine: what a core makes of images, where its time goes, and how full sequences are.

    make bench-data
    python -m tools.bench_data --data receipts=receipts.jsonl photos=photos.jsonl --model DIR

Without ``--data`` the examples are drawn (tools/drawn_data.py): receipts of 0.8 megapixels, photos of 0.3, lines of
text and plain text. Images are resized as Qwen2.5-VL does, to 1,280 tokens at most. Times of stages are those of the
processor, of all threads, so that other work on the machine changes them little; how two cores compare with one is
wall time, of a machine that does nothing else. Beside it stands what processes do that only decode and resize the same
images with Pillow and share nothing: no pipeline can go further with two of them than these do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
from transformers import AutoTokenizer

from jvlm import configs
from jvlm.data import images, lengths, packing, pipeline
from jvlm.data.config import DataConfig
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.processor import Processor
from jvlm.data.template import ChatTemplate
from jvlm.data.unread_patches import UnreadImage
from jvlm.training import processors
from tools import drawn_data

MOST_TOKENS = 1280
SETS: dict[str, tuple[drawn_data.Draw, int]] = {
    "receipts": (drawn_data.receipt, 96),
    "photos": (drawn_data.photo, 192),
    "lines": (drawn_data.line, 800),
    "text": (drawn_data.text, 400),
}
# what a mixed set has of each, for one of the receipts
MIXED = {"receipts": 1, "photos": 2, "lines": 6, "text": 3}
WINDOWS = (32, 128, 512, 2048)
# Packed sequences a second that a host is asked for in MiMo-VL's stage 2: docs/planning.md's steps, 4 chips a host.
STAGE_2 = {"v5p:4x4x4": 3.5, "v6e:16x16": 6.6}
SHAPE = {"seq_len": 8192, "max_patches": 24576}
_BARE_IMAGES = 32
_BARE_SECONDS = 5
_LONGEST = 120  # seconds until a process has started and done its work


class Stages:
    """The processor time of functions in each thread, what they call of one another left out."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._local, self._lock = threading.local(), threading.Lock()

    @contextlib.contextmanager
    def measured(self, functions: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Measure (owner, name, stage) inside the block."""
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
        for (owner, name, stage), (_, _, function) in zip(functions, kept, strict=True):
            setattr(owner, name, self._timed(function, stage))
        try:
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)

    def _timed(self, function: Callable, stage: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner = self._local.__dict__.setdefault("inner", [])
            inner.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                own = spent - inner.pop()
                if inner:
                    inner[-1] += spent
                with self._lock:
                    self.seconds[stage] += own

        return timed


def make_processor(model: str | None) -> Processor:
    """Return Qwen2.5-VL's processor, with the demo's tokenizer or that of a folder."""
    limit = str(MOST_TOKENS * 784)
    arguments = ["--processor.image.max_pixels", limit, "--processor.image.min_pixels", str(4 * 784)]
    small = processors.new(configs.load("mimo_vl/easy_vqa", arguments))
    encoder = dataclasses.replace(small.model.encoder, patch_size=14, window_size=112)
    if model is None:
        return Processor(small.tokenizer, dataclasses.replace(small.model, encoder=encoder), small.config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video"))
    decoder = dataclasses.replace(small.model.decoder, vocab_size=len(tokenizer))
    towers = {"encoder": encoder, "decoder": decoder, "image_token_id": image, "video_token_id": video}
    return Processor(tokenizer, dataclasses.replace(small.model, **towers), small.config)


def config_of(files: list[str], **changes: Any) -> DataConfig:
    """Return the settings of a run on some files."""
    fields = {"train": tuple(files), "batch_size": 1, "read_threads": 1, "curves": "off", **SHAPE, **changes}
    return DataConfig(**fields)


def speed(processor: Processor, file: str, count: int) -> tuple[dict[str, float], float, float]:
    """Return (milliseconds of an example by stage, patches a second of a core, examples a second of a core)."""
    stages, config = Stages(), config_of([file])
    functions = [
        (images, "_found", "find"),
        (PIL.Image, "open", "open"),
        (images, "image_to_rgb", "decode"),
        (PIL.Image.Image, "resize", "resize"),
        (type(processor.image_processor), "write", "arrange"),
        (ChatTemplate, "tokenize", "tokenize"),
        (Processor, "_expand", "expand"),
        (packing, "assemble", "assemble"),
    ]
    dataset, _ = pipeline.training_data(processor, config, seed=0)
    iterator = iter(dataset)
    next(iterator)  # what is made once
    with stages.measured(functions):
        begin, patches, examples = time.process_time(), 0, 0
        while examples < count:
            packed = next(iterator)
            patches += int((packed.batch.patch_segment_ids > 0).sum())
            examples += packed.conversations
        seconds = time.process_time() - begin
    iterator.close()
    table = {stage: 1e3 * spent / examples for stage, spent in stages.seconds.items()}
    table["rest"] = 1e3 * seconds / examples - sum(table.values())
    return table, patches / seconds, examples / seconds


def readers(processor: Processor, file: str, count: int, **config: int) -> tuple[float, float, float]:
    """Return (examples a second, processor milliseconds of the main process and of all for an example).

    The last says how far more readers can go: where it is the same for two as for one, two cores do twice as much.
    """
    dataset, _ = pipeline.training_data(processor, config_of([file], **config), seed=0)
    iterator = iter(dataset)
    for _ in range(8):  # what is made once, and all that was prepared meanwhile
        next(iterator)
    begin, own, others, done = time.perf_counter(), time.process_time(), _of_children(), 0
    while done < count:
        done += next(iterator).conversations
    rate, own = done / (time.perf_counter() - begin), 1e3 * (time.process_time() - own) / done
    result = rate, own, own + 1e3 * (_of_children() - others) / done
    iterator.close()
    return result


ToResize = list[tuple[UnreadImage, tuple[int, int]]]


def to_resize(processor: Processor, file: str) -> ToResize:
    """Return the first images of a set, each with the size that it is resized to."""
    source, images_of = ExampleSource([file]), []
    for number in range(min(len(source), _BARE_IMAGES)):
        origin, record = source[number]
        example = processor.encode(parse_example(record, origin), decode=False)
        unread = example.patches.pieces if example.num_patches else ()
        images_of += [(one, sizes.resized) for one, sizes in zip(unread, example.sizes, strict=True)]
    return images_of


def bare(images_of: ToResize, processes: int, seconds: float) -> tuple[float, float]:
    """Return (images a second, processor milliseconds of one) of processes that do no more than decode and resize."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    arguments = images_of, seconds, start, results
    started = [context.Process(target=_decode_and_resize, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    found = [results.get(timeout=_LONGEST) for _ in started]
    for process in started:
        process.join()
    return sum(rate for rate, _ in found), sum(spent for _, spent in found) / processes


def _decode_and_resize(images_of: ToResize, seconds: float, start: Any, results: Any) -> None:
    start.wait(_LONGEST)
    begin, own, done = time.perf_counter(), time.process_time(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        unread, size = images_of[done % len(images_of)]
        unread.open().resize(size, PIL.Image.Resampling.BICUBIC)
        done += 1
    results.put((done / spent, 1e3 * (time.process_time() - own) / done))


def _of_children() -> float:
    """Processor seconds of the processes that this one started."""
    times = (process.cpu_times() for process in psutil.Process().children(recursive=True))
    return sum(one.user + one.system for one in times)


def fills(processor: Processor, files: dict[str, str], count: int) -> list[tuple[str, int, float, float]]:
    """Return (set, window, share of the tokens, share of the patches that are no padding)."""
    measured = {}
    for name, file in files.items():
        source = ExampleSource([file])
        found = lengths.measure(processor, config_of([file]), source)
        measured[name] = [_Length(int(t), int(p)) for t, p in zip(found.tokens, found.patches, strict=True)]
    rng, rows = np.random.default_rng(0), []
    names = [name for name in files if name in MIXED] or list(files)
    shares = np.asarray([MIXED.get(name, 1) for name in names], float)
    drawn = rng.choice(names, count, p=shares / shares.sum())
    sets = {"mixed": [measured[name][rng.integers(len(measured[name]))] for name in drawn]}
    sets |= {name: list(rng.choice(np.asarray(one, object), count)) for name, one in measured.items()}
    for name, examples in sets.items():
        per_token = sum(e.num_patches for e in examples) / sum(e.length for e in examples)
        # patches as the set has them to a token, and a little more
        most = -(-int(SHAPE["seq_len"] * per_token * 1.1) // 512) * 512
        for window in WINDOWS:
            parts = [examples[at : at + window] for at in range(0, count - count % window, window)]
            packed = sum(len(packing.best_fit(part, SHAPE["seq_len"], most)) for part in parts)
            used = [e for part in parts for e in part]
            tokens = sum(e.length for e in used) / (packed * SHAPE["seq_len"])
            rows.append((name, window, tokens, sum(e.num_patches for e in used) / max(packed * most, 1)))
    return rows


@dataclasses.dataclass(frozen=True)
class _Length:
    length: int
    num_patches: int


def memory(processor: Processor, file: str, count: int) -> list[float]:
    """Return the memory in MiB at ten places of a run over so many examples."""
    dataset, _ = pipeline.training_data(processor, config_of([file], read_threads=2), seed=0)
    iterator, done, found = iter(dataset), 0, []
    for place in range(1, 11):
        while done < count * place // 10:
            done += next(iterator).conversations
        found.append(psutil.Process().memory_info().rss / 2**20)
    iterator.close()
    return found


def print_readers(processor: Processor, name: str, file: str, counts: list[int], rounds: int) -> None:
    """Print what threads and processes read, and what processes do that only decode and resize."""
    print(f"\nthreads and worker processes on {name}\n")
    print("| readers | examples/s | times the first | main process, ms of a core an example | all processes |")
    print("| --- | --- | --- | --- | --- |")
    images_of = to_resize(processor, file)
    kinds = {"threads": "read_threads", "processes": "worker_processes"}
    gains: dict[str, float] = {}
    for kind in (*kinds, *(["processes that only decode and resize"] if images_of else [])):
        first = None
        for count in counts:
            if kind in kinds:
                found = [readers(processor, file, 160 * count, **{kinds[kind]: count}) for _ in range(rounds)]
                rate, own, everything = max(found)
            else:
                rate, everything = max(bare(images_of, count, _BARE_SECONDS) for _ in range(rounds))
                own = 0.0
            first = first or rate
            gains[kind] = rate / first
            print(f"| {count} {kind} | {rate:.1f} | {gains[kind]:.2f} | {own:.2f} | {everything:.2f} |", flush=True)
    if images_of:
        _, own, machine = gains.values()
        print(
            f"\n{counts[-1]} worker processes do {own:.2f} times what {counts[0]} does; the machine gives {machine:.2f}"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FILE", help="examples instead of drawn ones")
    parser.add_argument("--model", help="folder of a Qwen2.5-VL or MiMo-VL model, for its tokenizer")
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts")
    parser.add_argument("--readers", type=int, nargs="*", default=[1, 2], help="threads and worker processes to try")
    parser.add_argument("--soak", type=int, default=0, help="tiny examples over which memory is measured")
    arguments = parser.parse_args()
    processor = make_processor(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(one.partition("=")[::2] for one in arguments.data)
        files = given or {name: drawn_data.write(Path(folder), name, *made) for name, made in SETS.items()}
        print(f"{os.cpu_count()} processors, Pillow {PIL.__version__}, numpy {np.__version__}")
        stages = "find open decode resize arrange tokenize expand assemble rest".split()
        print("\nmilliseconds of a core for an example\n")
        print(f"| set | examples/s | patches/s | {' | '.join(stages)} |")
        print(f"|{' --- |' * (len(stages) + 3)}")
        best = 0.0
        for name, file in files.items():
            count = min(len(ExampleSource([file])), 256)
            found = [speed(processor, file, count) for _ in range(arguments.rounds)]
            table, patches, examples = max(found, key=lambda one: one[2])
            best = max(best, patches)
            times = " | ".join(f"{table.get(stage, 0):.2f}" for stage in stages)
            print(f"| {name} | {examples:.1f} | {patches:,.0f} | {times} |", flush=True)
        if arguments.readers:
            name, file = next(iter(files.items()))
            print_readers(processor, name, file, arguments.readers, arguments.rounds)
        print("\nhow full packed sequences of 8,192 tokens are\n\n| set | window | tokens | patches |")
        print("| --- | --- | --- | --- |")
        for name, window, tokens, patches in fills(processor, files, 4096):
            print(f"| {name} | {window} | {100 * tokens:.1f} % | {100 * patches:.1f} % |")
        print("\ncores of a host for full sequences in MiMo-VL's stage 2, at the most patches/s above\n")
        for pod, sequences in STAGE_2.items():
            patches = sequences * SHAPE["max_patches"]
            print(f"{pod}: {patches:,.0f} patches/s, {patches / best:.1f} cores")
        if arguments.soak:
            file = drawn_data.write(Path(folder), "tiny", drawn_data.tiny, 1000)
            found = memory(processor, file, arguments.soak)
            print(f"\nMiB over {arguments.soak:,} examples: {', '.join(f'{one:,.0f}' for one in found)}")


if __name__ == "__main__":
    main()
