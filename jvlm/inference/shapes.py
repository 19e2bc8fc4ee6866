"""The closed set of shapes that an engine compiles for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from jvlm.data.packing import Example
from jvlm.errors import UserError
from jvlm.inference.requests import EngineConfig
from jvlm.inference.scheduling.sequence_spec import SequenceSpec
from jvlm.models.batch import CacheSizes

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

# Pages of a sequence, and of the past of a prefill, of the smallest program; each further one has four times as many.
_PAGES, _FACTOR = 8, 4
# Images in the smallest prefill of a decoder that reads them beside the text; each further one has four times as many.
_IMAGES = 4
_MANY_SIZES = 3  # of prefills, above which not every one of them is compiled for earlier pages
_LEAST_PAGES, _LEAST_FEATURES = 128, 1024


def next_power(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def ladder(least: int, most: int, factor: int) -> tuple[int, ...]:
    """Return sizes from ``least`` on, each ``factor`` times the one before, the last of them ``most``."""
    sizes = [least] if least < most else []
    while sizes and sizes[-1] * factor < most:
        sizes.append(sizes[-1] * factor)
    return (*sizes, most)


def smallest(sizes: tuple[int, ...], needed: int) -> int:
    """Return the smallest size that holds ``needed``, or the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


@dataclasses.dataclass(frozen=True)
class Need:
    """What a request needs to run alone: tokens of prompt and answers, vision tokens, patches of its largest picture.

    Attributes:
      memory: vision tokens that its answers read beside the text.
    """

    prompt: int
    tokens: int
    answers: int
    vision_tokens: int
    patches: int
    memory: int


def need_of(model: VLMConfig, spec: SequenceSpec, example: Example, limit: int) -> Need:
    """Return the need of a request whose answers have at most ``limit`` tokens."""
    per_image, beside = model.connector.tokens_per_image, model.decoder.vision_memory
    segments = example.vision_segment_ids
    images = [len(np.unique(segments[m.first : m.first + m.tokens])) for m in spec.media]
    unit = max(model.connector.min_image_patches, per_image or 1)
    read = 0
    if beside is not None and images:
        read = per_image * (sum(images) if beside == "all" else 1)
    return Need(
        prompt=len(spec.tokens),
        tokens=len(spec.tokens) + limit,
        answers=spec.n,
        vision_tokens=sum({m.content: m.tokens for m in spec.media}.values()),
        patches=max((max(m.patches, n * unit) for m, n in zip(spec.media, images, strict=True)), default=0),
        memory=read,
    )


def largest_need(model: VLMConfig, config: EngineConfig) -> Need:
    """Return the need of an answer that fills the model's context, to a prompt with the largest picture."""
    length = config.max_model_len or model.decoder.max_position_embeddings
    patches = max(config.encode_patches)
    features = config.feature_slots or 4 * patches // model.connector.patches_per_token
    read = model.connector.tokens_per_image if model.decoder.vision_memory else 0
    return Need(length - 1, length, 1, features // 2, patches, read or 0)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of the programs of an engine.

    Attributes:
      groups: of slots and pages, one for each shard of the batch.
      page_size: tokens of a page.
      pages: pages of each group.
      slots: slots of each group.
      feature_slots: slots of each group's feature pool.
      vision_memory: vision tokens that a sequence may read beside the text.
      decode_rows: rows of each group in a decoding step.
      tables: pages of a sequence in a decoding step.
      prefill_tokens: tokens of each group in a prefill.
      past: pages of earlier tokens in a prefill.
      prefill_rows: tokens that each group samples after a prefill.
      encode_patches: patches of each group in an encode.
      prefill_features: vision tokens of a prefill that are not as many as its tokens; empty where they are.
      cache_dtype: of the cache; None is the dtype that the model computes in.
    """

    groups: int
    page_size: int
    pages: int
    slots: int
    feature_slots: int
    vision_memory: int
    decode_rows: tuple[int, ...]
    tables: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    past: tuple[int, ...]
    prefill_rows: int
    encode_patches: tuple[int, ...]
    prefill_features: tuple[int, ...] = ()
    cache_dtype: str | None = None

    @property
    def prefill_tokens_with_past(self) -> tuple[int, ...]:
        """Tokens of each group in a prefill after earlier pages: of many sizes every second one, the largest included.

        What is behind such pages is the rest of a prompt, or a full chunk, and each size is a program for each of
        ``past``.
        """
        sizes = self.prefill_tokens
        return sizes if len(sizes) <= _MANY_SIZES else sizes[::-2][::-1]

    @property
    def cache(self) -> CacheSizes:
        """Sizes of the cache of all groups."""
        pages, slots = self.pages * self.groups, self.slots * self.groups
        return CacheSizes(pages, self.page_size, slots, self.vision_memory, self.cache_dtype)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have with its answer."""
        return min(self.tables[-1], self.pages - 1) * self.page_size

    def holds(self, need: Need) -> bool:
        """Return whether a request can run."""
        pages = -(-need.prompt // self.page_size) + need.answers
        fits = need.tokens <= self.capacity and pages < self.pages and need.answers <= self.slots
        fits &= need.vision_tokens <= self.feature_slots and need.patches <= self.encode_patches[-1]
        whole = not self.prefill_features or need.prompt <= self.prefill_tokens[-1]
        return fits and whole and need.memory <= self.vision_memory


def shapes_for(
    config: EngineConfig,
    needs: list[Need],
    *,
    groups: int,
    page_size: int,
    patch_step: int,
    tokens_per_image: int | None,
    prefills_whole: bool,
    reads_used_pages: bool,
    least: Shapes | None,
) -> Shapes:
    """Return shapes that hold requests, and all that ``least`` holds.

    Args:
      patch_step: a number of patches that every encode is a multiple of.
      tokens_per_image: vision tokens of an image in a decoder that reads them beside the text; None for others.
      prefills_whole: no prompt may be cut.
      reads_used_pages: decoding reads no page behind the end of a sequence: one length of page tables is enough.

    Raises:
      UserError: a request that sizes of the configuration do not hold.
    """
    slots = -(-config.max_slots // groups)
    longest = max((need.tokens for need in needs), default=1)
    width = -(-longest // page_size) + 1
    together = sorted((-(-need.tokens // page_size) + 1 for need in needs), reverse=True)[: slots * groups]
    if config.max_model_len is not None:  # later requests may be longer, and more
        together = [-(-config.max_model_len // page_size) + 1] * slots * groups
    wanted = -(-sum(together) // groups) + max(together, default=1) + 1
    fixed_pages = config.num_pages is not None
    pages = config.num_pages // groups if fixed_pages else max(_LEAST_PAGES, next_power(wanted))
    if not fixed_pages and least is not None:
        pages = max(pages, least.pages)
    if pages * groups == slots * groups:
        pages += 1  # so that arrays of pages and of slots are told apart by their second axis
    if config.max_model_len is not None:
        width = -(-config.max_model_len // page_size)
    width = max(width, 0 if least is None else least.tables[-1])
    tables = tuple(size for size in ladder(_PAGES, 1 << 30, _FACTOR) if size < width)
    top = width if config.max_model_len is not None else _PAGES * _FACTOR ** len(tables)
    tables = (*tables, top)
    vision = max((need.vision_tokens for need in needs), default=0)
    features = config.feature_slots // groups if config.feature_slots is not None else None
    if features is None:
        most = sorted((need.vision_tokens for need in needs), reverse=True)[: slots * groups]
        features = max(_LEAST_FEATURES, next_power(max(sum(most) // groups, 2 * vision)))
        features = max(features, 0 if least is None else least.feature_slots)
    patches = _rounded(config.encode_patches, max((n.patches for n in needs), default=0), patch_step)
    rows = config.decode_slots or tuple(size for size in (1, 8, 32, 128) if size < config.max_slots)
    decode_rows = tuple(sorted({min(-(-size // groups), slots) for size in (*rows, config.max_slots)}))
    longest_prompt = max((need.prompt for need in needs), default=0) if prefills_whole else 0
    prefill = _rounded(config.prefill_tokens, longest_prompt, page_size)
    remembered = max((need.memory for need in needs), default=0)
    memory = next_power(remembered) if remembered else 0
    images: tuple[int, ...] = ()
    if tokens_per_image:
        images = ladder(_IMAGES, max(_IMAGES, next_power(features // tokens_per_image)), _FACTOR)
    return Shapes(
        groups=groups,
        page_size=page_size,
        pages=pages,
        slots=slots,
        feature_slots=features,
        vision_memory=max(memory, 0 if least is None else least.vision_memory),
        decode_rows=decode_rows,
        tables=tables[-1:] if reads_used_pages else tables,
        prefill_tokens=prefill,
        past=(0,) if prefills_whole else (0, *tables[-2:]),
        prefill_rows=min(32, slots),
        encode_patches=patches,
        prefill_features=tuple(count * tokens_per_image for count in images) if tokens_per_image else (),
        cache_dtype=config.kv_cache_dtype,
    )


def one_of_each(shapes: Shapes) -> Shapes:
    """Return shapes with the largest size of each program alone."""
    fields = ("decode_rows", "tables", "prefill_tokens", "past", "encode_patches", "prefill_features")
    return dataclasses.replace(shapes, **{field: getattr(shapes, field)[-1:] for field in fields})


def _rounded(sizes: tuple[int, ...], needed: int, step: int) -> tuple[int, ...]:
    """Return sizes as multiples of ``step``, with larger powers of two behind them until ``needed`` fits."""
    found = sorted({-(-size // step) * step for size in sizes})
    while found[-1] < needed:
        found.append(-(-2 * found[-1] // step) * step)
    return tuple(found)


def refuse(need: Need, shapes: Shapes) -> UserError:
    """Return why an engine whose programs are compiled cannot take a request."""
    limits = {
        "tokens of prompt and answer": (need.tokens, shapes.capacity),
        "answers": (need.answers, shapes.slots),
        "vision tokens": (need.vision_tokens, shapes.feature_slots),
        "patches of one picture": (need.patches, shapes.encode_patches[-1]),
        "vision tokens beside the text": (need.memory, shapes.vision_memory),
        "tokens of a prompt that is computed whole": (
            need.prompt,
            shapes.prefill_tokens[-1] if shapes.prefill_features else need.prompt,
        ),
    }
    over = [f"{wanted} {name}, and at most {most} fit" for name, (wanted, most) in limits.items() if wanted > most]
    return UserError(f"the request needs {'; '.join(over) or 'more pages than there are'}; shorten it")
