"""A look at the data before a run: what share of a sample would be left out and why, and what sizes suit it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from jvlm.data import lengths, packing
from jvlm.data.columns import UnknownColumns
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Document
from jvlm.data.encode import Encode, Known, image_patch_limit
from jvlm.data.errors import ExampleError, Rejected, SkippedError, grouped
from jvlm.data.examples import unknown_columns
from jvlm.data.mixture.examples import Examples, mixture_of
from jvlm.data.mixture.order import spread_over
from jvlm.data.mixture.shares import measured_unit
from jvlm.data.mixture.spread import spread_of
from jvlm.data.packing import Example
from jvlm.data.prepare.held_out import HeldOut, Shared, sampled_lines
from jvlm.data.processor import Processor
from jvlm.data.sources import channel_of, names
from jvlm.errors import UserError

_PACKED = 256  # examples of a sample that are packed to try a size of a sequence
_CLOSE = 0.03  # a smaller sequence is taken if its padding is no more than this above the best
_ENOUGH = 20  # examples of a sample that say something about all


class Size(NamedTuple):
    """An encoded example without its arrays; one that was truncated or shrunk has its new size, and is ``changed``.

    ``is_part`` is true for a part of a document that was cut, ``unknown`` are the names of columns that jvlm does not
    know, ``channel`` is what the example names as its own, ``source`` the path of its source in a mixture. ``shared``
    is what the example gives away of held-out ones, with its first part.
    """

    length: int
    num_patches: int
    largest_image: int
    changed: bool = False
    unknown: tuple[str, ...] = ()
    channel: str | None = None
    is_part: bool = False
    source: str = ""
    shared: tuple[Shared, ...] = ()

    @classmethod
    def of(cls, example: Example) -> Size:
        """Return the size of an example."""
        how, source = example.made_to_fit, example.origin.source
        sizes = example.length, example.num_patches, example.largest_image
        return cls(*sizes, changed=how in ("truncated", "shrunk"), is_part=how == "cut", source=source)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a sample of the data is like.

    Attributes:
      config: with the sizes of a sequence and ``max_image_patches`` chosen.
      examples: of the data.
      sampled: examples looked at.
      sizes: of those that can be used.
      left_out: the others.
      examples_per_pass: draws of one pass over the data; None: its examples.
    """

    config: DataConfig
    examples: int
    sampled: int
    sizes: tuple[Size, ...]
    left_out: tuple[Rejected, ...]
    examples_per_pass: int | None = None

    def padding(self) -> tuple[float, float]:
        """Shares of the tokens and of the patches of sequences that are padding in the packed sample."""
        return _padding(self.sizes[:_PACKED], self.config)

    def steps(self, epochs: float, batch_size: int) -> int:
        """Return the steps of ``batch_size`` packed sequences that so many epochs take."""
        draws = epochs * (self.examples_per_pass or self.examples)
        return max(1, math.ceil(draws / self._draws_per_sequence() / batch_size))

    def draws(self, sequences: int) -> int:
        """Examples drawn for so many packed sequences, those that are left out included."""
        return max(1, math.ceil(sequences * self._draws_per_sequence()))

    def _draws_per_sequence(self) -> float:
        packed = packing.best_fit(self.sizes, self.config.seq_len, self.config.max_patches)
        return self.sampled / max(len(packed), 1)

    def text(self) -> str:
        """For the terminal."""
        config, changed = self.config, sum(size.changed for size in self.sizes)
        cut = sum(size.is_part for size in self.sizes)
        head = f"data: {self.sampled} of {self.examples} examples looked at, {len(self.left_out)} would be left out"
        head += f" ({100 * len(self.left_out) / self.sampled:.1f} %)" if self.left_out else ""
        if changed:
            how = "have their images shrunk" if config.on_too_long == "shrink" else "lose turns at their end"
            head += f", {changed} {how} to fit (data.on_too_long {config.on_too_long})"
        if cut:
            head += f", {cut} packed are parts of documents (data.documents.cut {config.documents.cut})"
        lines = [head]
        if self.left_out:
            lines.append(grouped(self.left_out))
        columns = UnknownColumns()
        for size in self.sizes:
            columns.counts.update(size.unknown)
        lines += [f"  {line}" for line in columns.lines()]
        lines += sampled_lines([size.shared for size in self.sizes], self.sampled)
        if self.sizes:
            text, patches = self.padding()
            lines.append(
                f"sequences of {config.seq_len} tokens and {config.max_patches} patches: padding is about "
                f"{100 * text:.0f} % of the tokens and {100 * patches:.0f} % of the patches"
            )
        return "\n".join(lines)

    def check(self) -> None:
        """Raise UserError where nothing can be used, or more does not fit than ``max_too_long_fraction`` allows."""
        files = ", ".join(self.config.files)
        if not self.sizes:
            raise UserError(
                f"{files}: none of {self.sampled} examples looked at can be used:\n{grouped(self.left_out)}"
            )
        too_long = [example for example in self.left_out if example.kind == "too_long"]
        limit = self.config.max_too_long_fraction
        exact = self.sampled >= min(_ENOUGH, self.examples)
        if exact and len(too_long) > limit * self.sampled:
            raise UserError(
                f"{files}: {len(too_long)} of {self.sampled} examples looked at do not fit and would be left out, more "
                f"than data.max_too_long_fraction = {limit}:\n{grouped(too_long)}\n"
                "Change that, or raise data.max_too_long_fraction"
            )


def take(
    processor: Processor,
    config: DataConfig,
    *,
    seed: int,
    count: int,
    seconds: float | None = None,
    parts: int = 1,
    examples: Examples | None = None,
    decode: bool = True,
    known: Known | None = None,
    held_out: HeldOut | None = None,
) -> Survey:
    """Look at ``count`` examples spread evenly over the data, or at those that are encoded within so many seconds.

    Of a mixture, each source gives its share of them.

    Args:
      parts: devices that share a packed sequence; sizes that are chosen divide by it.
      examples: some of the files' examples; None is all of them.
      decode: False takes sizes from the headers of images.
      known: as of `Encode`.
      held_out: sets whose words are looked for.

    Raises:
      ExampleError: a bad example where ``on_bad_example`` is "error", one that does not fit where ``on_too_long`` is.
      UserError: sizes are to be chosen, and no example can be used.
    """
    examples = (Examples.open(config) if examples is None else examples).with_few_shot(config, seed)
    if measured_unit(mixture_of(config)) and not config.measured:
        config = dataclasses.replace(config, measured=lengths.means(processor, config, examples))
    spread, passes = _spread(examples, config, min(count, len(examples)))
    chosen = [int(i) for i in np.random.default_rng(seed).permutation(spread)]
    are_sizes_known = "auto" not in (config.seq_len, config.max_patches)
    reading = {"decode": decode, "known": known, "held_out": held_out}
    look = _Look(processor, config, examples, seed, fit=are_sizes_known, **reading)
    results = look.at(chosen, seconds)
    if not are_sizes_known and not _sizes(results):
        Survey(config, len(examples), len(results), (), _left_out(results)).check()  # raises, with what is wrong
    if not are_sizes_known:
        config = choose_sizes(_sizes(results), config, processor, parts)
        look = _Look(processor, config, examples, seed, fit=True, **reading)
        results |= look.at(
            [i for i in results if not all(_fits(size, config) for size in _sizes({i: results[i]}))], None
        )
    sizes = _sizes(results)
    left_out = _left_out(results)
    config = _with_image_limit(config, sizes, processor)
    channels = [size.channel for size in sizes if size.channel is not None]
    config = dataclasses.replace(config, sources=config.sources or names(config, channels))
    return Survey(config, len(examples), len(results), sizes, left_out, passes)


def _spread(examples: Examples, config: DataConfig, count: int) -> tuple[np.ndarray, int]:
    """Return (indices spread evenly over each source, by its share of ``count``; examples of a pass over all)."""
    if not examples.is_mixture:
        return spread_over(examples.parts[0], count), len(examples)
    shares = examples.shares(config)
    counts = spread_of([shares.of[name] for name in examples.names]).drawn(count)
    chosen, start = [], 0
    for part, own in zip(examples.parts, counts, strict=True):
        chosen.append(start + spread_over(part, int(own)))
        start += len(part)
    return np.unique(np.concatenate(chosen)), round(shares.examples_per_pass)


def _sizes(results: Mapping[int, Sequence[Size | Rejected]]) -> tuple[Size, ...]:
    """Return the sizes among what examples gave, in their order."""
    return tuple(one for i in sorted(results) for one in results[i] if isinstance(one, Size))


def _left_out(results: Mapping[int, Sequence[Size | Rejected]]) -> tuple[Rejected, ...]:
    """Return the examples that gave nothing, in their order."""
    return tuple(one for i in sorted(results) for one in results[i] if isinstance(one, Rejected) and one.kind != "part")


class _Look:
    """Encodes examples, each with random numbers of its own, in threads."""

    def __init__(
        self,
        processor: Processor,
        config: DataConfig,
        examples: Examples,
        seed: int,
        *,
        fit: bool,
        decode: bool,
        known: Known | None,
        held_out: HeldOut | None,
    ):
        if fit:  # the promise made to attention is raised to what it finds, unless it is the user's
            config = dataclasses.replace(
                config, max_image_patches=config.max_image_patches or config.max_patches or None
            )
        else:  # documents do not ask for sequences as long as they are: they are cut as for the default sizes
            sizes = {"seq_len": config.seq_len, "max_patches": config.max_patches}
            default = {name: getattr(DataConfig(), name) for name, size in sizes.items() if size == "auto"}
            config = dataclasses.replace(config, **default)
        self.encode = Encode(processor, config, decode=decode, known=known)
        self.config, self.examples, self.seed, self.held_out = config, examples, seed, held_out
        self.fits = fit

    def at(self, chosen: Sequence[int], seconds: float | None) -> dict[int, list[Size | Rejected]]:
        began, results, block = time.perf_counter(), {}, 4 * self.config.read_threads
        with ThreadPoolExecutor(self.config.read_threads) as pool:
            for start in range(0, len(chosen), block):
                part = chosen[start : start + block]
                results |= zip(part, pool.map(self._one, part), strict=True)
                if seconds is not None and time.perf_counter() - began > seconds:
                    break
        return results

    def _one(self, index: int) -> list[Size | Rejected]:
        rng = np.random.default_rng((self.seed, index))
        try:
            read = self.encode.read(self.examples[index], rng)
            parsed, _ = read[0]
            channel = channel_of(parsed) if self.config.curves == "channel" else None
            shared = () if self.held_out is None else self.held_out.shared(parsed)
        except ExampleError as error:
            if self.config.on_bad_example == "error" and not isinstance(error, SkippedError):
                raise
            return [Rejected.of(error, "bad")]
        unknown = unknown_columns(parsed.extra)
        fitted = self.encode.fit(read, rng) if self._is_fitted(parsed) else [example for _, example in read]
        sizes = [
            one if isinstance(one, Rejected) else Size.of(one)._replace(unknown=unknown, channel=channel)
            for one in fitted
        ]
        first = next((at for at, one in enumerate(sizes) if isinstance(one, Size)), None)
        if first is not None:
            sizes[first] = sizes[first]._replace(shared=shared)
        return sizes

    def _is_fitted(self, parsed: Conversation | Document) -> bool:
        return self.fits or (isinstance(parsed, Document) and self.encode.documents_of(parsed.origin).cut != "never")


def _fits(size: Size, config: DataConfig) -> bool:
    limit = config.max_image_patches or size.largest_image
    return size.length <= config.longest and size.num_patches <= config.max_patches and size.largest_image <= limit


def _with_image_limit(config: DataConfig, sizes: Sequence[Size], processor: Processor) -> DataConfig:
    """Raise the promise made to attention where examples with limits of their own have larger images."""
    promised = image_patch_limit(processor.image_processor, processor.image_config, config)
    largest = max((size.largest_image for size in sizes), default=0)
    if config.max_image_patches is not None or promised is None or largest <= promised:
        return config
    return dataclasses.replace(config, max_image_patches=largest)


def choose_sizes(sizes: Sequence[Size], config: DataConfig, processor: Processor, parts: int = 1) -> DataConfig:
    """Sizes of a sequence in place of "auto": the smallest that hold every example and leave little padding.

    Raises:
      UserError: no sizes to choose from.
    """
    if not sizes:
        raise UserError(f'no example of {", ".join(config.files)} can be used: data.seq_len "auto" has nothing to hold')
    longest = max(size.length for size in sizes)
    longest = min(longest, config.max_length or longest)
    most = max(size.num_patches for size in sizes)
    usable = [size for size in sizes if size.length <= longest][:_PACKED]
    step = packing.patch_step(math.lcm(processor.image_processor.patch_group, parts), 64)
    best = None
    for tokens in _token_sizes(config.seq_len, longest, math.lcm(64, parts)):
        held = [size for size in usable if size.length <= tokens]
        for patches in _patch_sizes(config.max_patches, held, tokens, most, step):
            tried = dataclasses.replace(config, seq_len=tokens, max_patches=patches)
            padding = sum(_padding([s for s in held if s.num_patches <= patches], tried))
            if best is None or padding < best[0] - _CLOSE:
                best = padding, tokens, patches
    return dataclasses.replace(config, seq_len=best[1], max_patches=best[2])


def _token_sizes(asked: int | Literal["auto"], longest: int, step: int) -> list[int]:
    """Candidates, ascending: from the longest conversation to some times as much."""
    if asked != "auto":
        return [asked]
    return sorted({-(-int(longest * 1.2**power) // step) * step for power in range(9)})


def _patch_sizes(asked: int | Literal["auto"], sizes: Sequence[Size], tokens: int, most: int, step: int) -> list[int]:
    """Candidates, ascending: about as many patches as come with so many tokens, and never fewer than one sequence's."""
    if asked != "auto":
        return [asked]
    share = sum(size.num_patches for size in sizes) / max(sum(size.length for size in sizes), 1)
    return sorted({-(-max(int(share * tokens * more), most) // step) * step for more in (0.9, 1.0, 1.1, 1.25, 1.5, 2)})


def _padding(sizes: Sequence[Size], config: DataConfig) -> tuple[float, float]:
    window = config.window(len(sizes))
    windows = [sizes[start : start + window] for start in range(0, len(sizes), window)]
    sequences = sum(len(packing.best_fit(part, config.seq_len, config.max_patches)) for part in windows)
    used = sum(size.length for size in sizes), sum(size.num_patches for size in sizes)
    capacity = sequences * config.seq_len, sequences * config.max_patches
    return tuple(1 - part / whole if whole else 0.0 for part, whole in zip(used, capacity, strict=True))
