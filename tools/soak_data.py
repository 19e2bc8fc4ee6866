"""The data pipeline over many examples of which some are damaged, read by threads, by processes, and after a kill -9.

    make soak-data                                  # 100,000 examples
    python -m tools.soak_data --examples 2000
    python -m tools.soak_data --runs threads 2-processes-killed

Each run must give the same batches, every good example once, and every damaged one once among the rejected; memory must
stay flat. Fails with what differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from jvlm import configs
from jvlm.data import pipeline
from jvlm.data.config import DataConfig
from jvlm.data.example_source import ExampleSource
from jvlm.data.mixture.config import Mixture, Phase, Source
from jvlm.data.packing import PackedSequences
from jvlm.data.position import Share
from jvlm.data.readers.array_record import write_shard
from jvlm.training import processors
from tools import drawn_data

EVERY = 100  # one example in so many is damaged
_DISTINCT = 200  # images
_STATES = 5  # batches from one saved state to the next
_FLAT = 1.1  # of the memory of the middle of a run, at its end


# worker processes, and whether they are killed
RUNS = {"threads": (0, False), "1-process": (1, False), "2-processes": (2, False), "2-processes-killed": (2, True)}


def damaged(count: int) -> list[int]:
    """Return the indices of the damaged examples among so many."""
    return np.sort(np.random.default_rng(1).permutation(count)[: count // EVERY]).tolist()


def write_examples(folder: Path, count: int, name: str = "soak") -> str:
    """Write a shard of examples with images inside, of which `damaged` are damaged in five ways."""
    made = list(drawn_data.examples(drawn_data.tiny, _DISTINCT))
    spoilt = {index: number % 5 for number, index in enumerate(damaged(count))}

    def record(index: int) -> dict[str, Any]:
        image, example = made[index % _DISTINCT]
        how = spoilt.get(index)
        if how == 0:
            image = image[: len(image) * 2 // 3]  # the header is whole
        elif how == 1:
            image = b"no image at all"
        elif how == 2:
            image = b""
        elif how == 3:
            image = _bomb()
        elif how == 4:
            return {"messages": [{"role": "user", "content": "<image>nobody answers"}], "images": [{"bytes": image}]}
        return {**example, "images": [{"bytes": image}]}

    path = folder / f"{name}.arrayrecord"
    write_shard(path, [record(index) for index in range(count)])
    return str(path)


def _bomb() -> bytes:
    """Return a PNG of 50,000 x 50,000 pixels in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (50_000).to_bytes(4, "big") * 2
    body = chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def read(
    files: list[str], log: Path, workers: int, batches: int | None = None, share: Share = Share(), state: str = ""
) -> None:
    """Read from the last saved state on; write a line for each batch.

    Args:
      files: one, of which an epoch is read; or two, a mixture of them whose weights change in the course of the run.
      batches: to end after; None ends with the epoch.
      share: of the data, where this is one of several hosts.
      state: of all hosts when they stopped, as JSON, to begin with where this one has saved none.
    """
    processor = processors.new(configs.load("mimo_vl/easy_vqa", ["--processor.image.min_pixels", "784"]))
    config = DataConfig(
        **_sources(files),
        batch_size=4,
        seq_len=1024,
        max_patches=1024,
        curves="off",
        on_bad_example="skip",
        worker_processes=workers,
        read_threads=2,
        # so that several hosts have windows of a small set
        pack_window=128 if len(ExampleSource(files)) < 10_000 else "auto",
    )
    epochs = 1 if len(files) == 1 else None
    dataset, _ = pipeline.training_data(processor, config, seed=3, epochs=epochs, share=share)
    iterator, path, number = iter(dataset), log.with_suffix(".state"), 0
    if state:
        iterator.set_state(json.loads(state))
    if path.is_file():
        saved = json.loads(path.read_text())
        number = saved["batches"]
        iterator.set_state(saved["state"])
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:number]))
    with open(log, "a") as out:
        for packed in itertools.islice(iterator, None if batches is None else batches - number):
            digest = hashlib.sha256()
            for leaf in jax.tree.leaves(packed.batch):
                digest.update(np.ascontiguousarray(leaf))
            line = {
                "digest": digest.hexdigest(),
                "sequences": _sequences(packed),
                "conversations": packed.conversations,
                "rejected": sorted(one.number for one in packed.rejected),
                "memory": _memory(),
            }
            out.write(json.dumps(line) + "\n")
            out.flush()
            number += 1
            if number % _STATES == 0:
                saved = json.dumps({"batches": number, "state": iterator.get_state()})
                for target in (
                    path,
                    log.with_suffix(f".{number}.state"),
                ):  # the last, and all: a checkpoint's is chosen
                    part = target.with_suffix(".part")
                    part.write_text(saved)
                    os.replace(part, target)
    iterator.close()


def _sequences(packed: PackedSequences) -> list[str]:
    """Return a digest of each packed sequence with examples."""
    leaves = jax.tree.leaves(packed.batch)
    used = np.flatnonzero(packed.batch.segment_ids.any(axis=1))
    return [hashlib.sha256(b"".join(leaf[row].tobytes() for leaf in leaves)).hexdigest() for row in used]


def _sources(files: list[str]) -> dict[str, Any]:
    if len(files) == 1:
        return {"train": tuple(files)}
    members = {"most": Source((files[0],)), "few": Source((files[1],), weight=0.25)}
    schedule = (Phase(0.2, {"few": 1.5}), Phase(0.4, {"few": 0.1}, end=0.9))
    return {"mixture": Mixture(members=members, schedule=schedule), "run_examples": 2000}


def _memory() -> float:
    """MiB of this process and those it started."""
    process = psutil.Process()
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


def start(
    files: list[str], log: Path, workers: int, batches: int | None = None, share: Share = Share(), state: str = ""
) -> subprocess.Popen:
    """Start a process that reads. Arguments as of `read`."""
    command = [sys.executable, "-m", "tools.soak_data", "--read", *files, "--log", str(log), "--workers", str(workers)]
    command += ["--share", str(share.index), str(share.count), "--state", state]
    return subprocess.Popen([*command, *([] if batches is None else ["--batches", str(batches)])])


def run_hosts(
    files: list[str], folder: Path, counts: list[int], kill_at: int, batches: int | None = None
) -> list[dict[str, Any]]:
    """Return what so many hosts read, one number of them after the other; each but the last is killed with -9.

    Each host gives a batch before any gives the next, as training does; the hosts that follow go on from the states
    that all of those before saved last. Lines of batches after these states do not count.

    Args:
      counts: of hosts, each of which divides the sequences of a batch.
      kill_at: batches after which they are killed.
      batches: of each of the last ones; None ends with the epoch.
    """
    found, state = [], ""
    for turn, count in enumerate(counts):
        logs = [folder / f"hosts-{turn}-{index}.log" for index in range(count)]
        is_last = turn == len(counts) - 1
        most = batches if is_last else None
        hosts = [start(files, log, 0, most, Share(i, count), state) for i, log in enumerate(logs)]
        if is_last:
            if any(tuple(host.wait() for host in hosts)):
                raise RuntimeError(f"one of {count} hosts failed")
            found += [json.loads(line) for log in logs for line in _lines(log)]
            break
        while min(len(_lines(log)) for log in logs) < kill_at:
            if any(host.poll() is not None for host in hosts):
                raise RuntimeError(f"one of {count} hosts ended before {kill_at} batches")
            time.sleep(0.02)
        for host in hosts:
            host.send_signal(signal.SIGKILL)
            host.wait()
        at = kill_at // _STATES * _STATES
        states = [json.loads(log.with_suffix(f".{at}.state").read_text())["state"] for log in logs]
        state = json.dumps([one for some in states for one in some])
        found += [json.loads(line) for log in logs for line in _lines(log)[:at]]
    return found


def run(
    files: list[str], log: Path, workers: int, *, kill_at: int | None = None, batches: int | None = None
) -> list[dict[str, Any]]:
    """Return the batches that are read. At ``kill_at`` batches the process is killed, and another goes on.

    Args:
      files, batches: as of `read`.

    Raises:
      RuntimeError: a process that fails, or that leaves others behind when it is killed.
    """
    process = start(files, log, workers, batches)
    if kill_at is not None:
        while len(_lines(log)) < kill_at:
            if process.poll() is not None:
                raise RuntimeError(f"it ended before {kill_at} batches")
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        if alive:
            raise RuntimeError(f"{len(alive)} processes stay behind after a kill")
        process = start(files, log, workers, batches)
    if process.wait():
        raise RuntimeError(f"reading with {workers} worker processes failed")
    return [json.loads(line) for line in _lines(log)]


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.is_file() else []


def problems(batches: list[dict[str, Any]], count: int, expected: list[str] | None) -> list[str]:
    """Return what is wrong with the batches of an epoch.

    Args:
      expected: digests of the batches of another run.
    """
    found, bad = [], [index + 1 for index in damaged(count)]
    used = sum(batch["conversations"] for batch in batches)
    rejected = sorted(number for batch in batches for number in batch["rejected"])
    if used != count - len(bad):
        found.append(f"{used} examples used, not {count - len(bad)}")
    if rejected != bad:
        odd = sorted(set(rejected) ^ set(bad))
        found.append(f"{len(rejected)} examples rejected, not {len(bad)}; they differ in {odd[:5]}")
    digests = [batch["digest"] for batch in batches]
    if expected is not None and digests != expected:
        pairs = zip(digests, expected, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(digests), len(expected)))
        found.append(f"batch {first} of {len(digests)} is another one than with threads, of {len(expected)}")
    memory = [batch["memory"] for batch in batches]
    if max(memory[-5:]) > _FLAT * max(memory[len(memory) // 2 - 5 :][:10]):
        found.append(f"memory grows: {memory[len(memory) // 2]:,.0f} MiB half way, {memory[-1]:,.0f} at the end")
    return found


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--read", nargs="+", help="of the processes that it starts: the files to read")
    parser.add_argument("--batches", type=int)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--log", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--state", default="")
    arguments = parser.parse_args()
    if arguments.read:
        share = Share(*arguments.share)
        read(arguments.read, arguments.log, arguments.workers, arguments.batches, share, arguments.state)
        return
    count, expected, failed = arguments.examples, None, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_examples(folder, count)
        print(
            f"{count:,} examples, {len(damaged(count)):,} damaged\n\n"
            "| run | batches | their digest | examples | rejected | s | MiB |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for title in arguments.runs:
            workers, kill = RUNS[title]
            begin = time.perf_counter()
            kill_at = (len(expected) // 3 if expected else 4 * _STATES) if kill else None
            batches = run([file], folder / f"{title}.log", workers, kill_at=kill_at)
            seconds, memory = time.perf_counter() - begin, [batch["memory"] for batch in batches]
            used, rejected = (sum(b["conversations"] for b in batches), sum(len(b["rejected"]) for b in batches))
            quarters = "/".join(f"{memory[len(memory) * q // 4 - 1]:,.0f}" for q in (1, 2, 3, 4))
            digests = [batch["digest"] for batch in batches]
            whole = hashlib.sha256("".join(digests).encode()).hexdigest()[:8]
            print(
                f"| {title} | {len(batches)} | {whole} | {used:,} | {rejected:,} | {seconds:.0f} | {quarters} |",
                flush=True,
            )
            failed += [f"{title}: {one}" for one in problems(batches, count, expected)]
            expected = expected or digests
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
