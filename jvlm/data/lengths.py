"""How long the examples of a source are as a model gets them, measured once and kept in a file.

The file is ``NAME.FINGERPRINT.lengths.npz`` in ``data.lengths_folder``. The fingerprint is that of whatever decides on
lengths: the processor with its tokenizer and image settings, and what of an example has a loss. The file notes the
data files that were read, with sizes and times; once they have changed it is not used any more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError
from jvlm.data.mixture.config import Unit
from jvlm.data.mixture.order import spread_over
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError, file_errors

if TYPE_CHECKING:
    from jvlm.data.mixture.examples import Examples

SUFFIX = ".lengths.npz"
SAMPLE = 512  # examples of a source that its means are taken from where no file has them all
GOOD, BAD, TOO_LONG = 0, 1, 2
_BLOCK = 256
_FIELDS = ("index", "tokens", "loss_tokens", "media_tokens", "patches", "images", "turns", "status")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of each measured example of a source, in the order of ``index``.

    Attributes:
      examples: of the source, measured or not.
      index: of the example in its source.
      tokens: of the whole conversation or document, those that stand for media included.
      loss_tokens: tokens with a loss.
      media_tokens: tokens that image features feed.
      patches: of all its images and frames.
      images: images and videos.
      turns: assistant turns.
      status: `GOOD`; `BAD` for an example that cannot be read; `TOO_LONG` for one that fits no packed sequence.
    """

    examples: int
    index: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    loss_tokens: Int[np.ndarray, " n"]
    media_tokens: Int[np.ndarray, " n"]
    patches: Int[np.ndarray, " n"]
    images: Int[np.ndarray, " n"]
    turns: Int[np.ndarray, " n"]
    status: Int[np.ndarray, " n"]

    @property
    def complete(self) -> bool:
        """Whether every example of the source was measured."""
        return len(self.index) == self.examples

    def loads(self, config: DataConfig) -> Float[np.ndarray, " n"]:
        """Return the part of a packed sequence that each example takes: of its tokens or patches, whichever is more."""
        patches = self.patches / config.max_patches if config.max_patches else np.zeros(len(self.patches))
        return np.maximum(self.tokens / config.seq_len, patches)

    def mean(self, unit: Unit, config: DataConfig) -> float:
        """Return the mean of a unit over all that was measured; what cannot be used counts 0, as it does in a run."""
        values = self.loads(config) if unit == "sequences" else getattr(self, unit)
        good = self.status == GOOD
        return float((values * good).sum() / max(len(values), 1))


def measure(processor: Processor, config: DataConfig, source: Any, indices: Sequence[int] | None = None) -> Lengths:
    """Encode examples of a source as training does, from the headers of images, and return what they are like.

    Args:
      config: of the source alone (`jvlm.data.mixture.examples.config_of`). Nothing is drawn: whole conversations.
      source: (origin, record) by index.
      indices: of the examples to measure; None measures all.
    """
    from jvlm.data.encode import Encode  # which reads mixtures, whose shares are of what is measured here

    still = {"single_turn_ratio": 0.0, "shuffle_turns": False, "max_turns": None, "upscale_probability": 0.0}
    config = dataclasses.replace(config, **still, on_bad_example="skip", on_too_long="drop", curves="off")
    if config.media_root:
        processor = processor.replace(media_roots=(config.media_root,))
    encode = Encode(processor, config, decode=False)
    fits = "auto" not in (config.seq_len, config.max_patches)
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)

    def one(index: int) -> tuple[int, ...]:
        try:
            rng = np.random.default_rng((0, index))
            read = encode.read(source[index], rng)
        except ExampleError:
            return (index, 0, 0, 0, 0, 0, 0, BAD)
        examples = [example for _, example in read]
        usable = not fits or any(isinstance(one, Example) for one in encode.fit(read, rng))
        return (
            index,
            sum(one.length for one in examples),
            sum(int((one.loss_weights > 0).sum()) for one in examples),
            sum(int((one.vision_index >= 0).sum()) for one in examples),
            sum(one.num_patches for one in examples),
            sum(len(one.sizes) for one in examples),
            sum(int(one.turns.max(initial=0)) for one in examples),
            GOOD if usable else TOO_LONG,
        )

    rows: list[tuple[int, ...]] = []
    with ThreadPoolExecutor(config.read_threads) as pool:
        for start in range(0, len(chosen), _BLOCK):
            rows += pool.map(one, chosen[start : start + _BLOCK].tolist())
    columns = np.asarray(rows, np.int64).reshape(-1, len(_FIELDS)).T
    return Lengths(len(source), *columns)


def path_of(processor: Processor, config: DataConfig, name: str) -> Path:
    """Return the file of a source's lengths.

    Args:
      config: of the source alone.
      name: path of the source in its mixture; of ``data.train`` a name of the caller's.
    """
    return Path(config.lengths_folder) / f"{name.replace('/', '.')}.{fingerprint(processor, config)}{SUFFIX}"


def fingerprint(processor: Processor, config: DataConfig) -> str:
    """Return a hash of what decides on the lengths of examples, apart from the data files."""
    tokenizer = processor.tokenizer
    parts = {
        "settings": processor.settings(),
        "model": repr(processor.model),
        "tokenizer": [type(tokenizer).__name__, len(tokenizer), sorted(tokenizer.get_added_vocab().items())],
        "template": str(tokenizer.chat_template),
        "probe": tokenizer("The quick brown fox, 3.14 <b> \n\n é漢字")["input_ids"],
        "data": [config.loss, config.seq_len, config.max_patches, config.max_length, config.max_image_patches],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def save(path: Path, lengths: Lengths, files: Sequence[str]) -> None:
    """Write lengths, with the files that they are of; the file appears under its name once it is whole.

    Raises:
      UserError: the file cannot be written.
    """
    with file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(part, "wb") as file:
                arrays = {name: getattr(lengths, name).astype(np.int32) for name in _FIELDS}
                np.savez_compressed(file, examples=lengths.examples, files=json.dumps(_state_of(files)), **arrays)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def load(path: Path, files: Sequence[str]) -> Lengths | None:
    """Return lengths as they were saved; None if there is no such file, or the data files have changed since.

    Raises:
      UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:
            if json.loads(str(saved["files"])) != _state_of(files):
                return None
            return Lengths(int(saved["examples"]), *(saved[name].astype(np.int64) for name in _FIELDS))
    except (ValueError, OSError, KeyError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, it is made again") from error


def _state_of(files: Sequence[str]) -> list[list[Any]]:
    states = [(os.path.abspath(file), os.stat(file)) for file in files]
    return [[path, state.st_size, state.st_mtime_ns] for path, state in states]


def of_source(
    processor: Processor, config: DataConfig, name: str, source: Any, *, sample: int | None = SAMPLE
) -> Lengths:
    """Return the lengths of a source: those of its file, else measured now.

    Args:
      config, name: see `path_of`.
      sample: examples to measure, spread evenly, where there is no file; None measures all, and writes the file.
    """
    path = path_of(processor, config, name)
    known = load(path, source.files)
    if known is not None:
        return known
    if sample is None:
        found = measure(processor, config, source)
        save(path, found, source.files)
        return found
    return measure(processor, config, source, spread_over(source, sample))


def means(processor: Processor, config: DataConfig, examples: Examples) -> tuple[float, ...]:
    """Return the mean of the mixture's measured unit per example of each source, and print them.

    Raises:
      UserError: weights are shares of sequences whose sizes are not known yet.
    """
    from jvlm.data.mixture.examples import config_of, mixture_of
    from jvlm.data.mixture.shares import measured_unit

    unit = measured_unit(mixture_of(config))
    if unit == "sequences" and "auto" in (config.seq_len, config.max_patches):
        raise UserError(
            'data.mixture: shares of sequences need data.seq_len and data.max_patches as numbers, not "auto"'
        )
    sources, found = mixture_of(config).sources(), []
    for name, part in zip(examples.names, examples.parts, strict=True):
        lengths = of_source(processor, config_of(config, sources[name]), name, part)
        found.append(lengths.mean(unit, config))
        whole = "all" if lengths.complete else f"{len(lengths.index):,} of {lengths.examples:,}"
        print(f"{name}: {found[-1]:.4g} {unit} per example, the mean of {whole} examples", flush=True)
    return tuple(found)
