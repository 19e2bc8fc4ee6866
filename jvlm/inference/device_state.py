"""What the engine keeps on the devices, and how the scheduler's plans are executed there."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jvlm.inference import plan_arrays, programs, sampling
from jvlm.inference.plan_arrays import ImageMemory, PictureArrays
from jvlm.inference.programs import Chunks, DecodeRows, Drawn, ModuleDef, Programs
from jvlm.inference.requests import SamplingParams
from jvlm.inference.sampling import Logprobs, SamplingArrays, SlotRules
from jvlm.inference.scheduling.plans import Chunk, Decode, Encode, Picture, Plan, Prefill, Row
from jvlm.inference.shapes import Shapes
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import VisionTokens
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.layout import MeshLayout

if TYPE_CHECKING:
    from jvlm.inference.engine import Engine

COPIES = 8  # pages that one program copies or scrubs
NEARLY = 0.7  # as full as the fullest encode: then the larger is taken, which has faster products


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens that a plan draws, still on the device.

    Attributes:
      drawn: K tokens of B rows.
      rows: (index, group, row, count) of the sequences among them: the first ``count`` tokens are theirs.
      top: most likeliest tokens whose log-probabilities a request wants; -1 where none wants any.
      drafts: drafted tokens of some indices. What is drawn behind one counts if it was drawn itself.
    """

    drawn: Drawn
    rows: tuple[tuple[int, int, Row, int], ...]
    top: int = -1
    drafts: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)


def image_room(config: VLMConfig, patches: int) -> int:
    """Return how many images an encode of so many patches takes."""
    connector = config.connector
    return max(1, patches // max(connector.min_image_patches, connector.tokens_per_image or 1))


def vision_tokens_of(config: VLMConfig, patches: int) -> int:
    """Return how many vision tokens an encode of so many patches gives."""
    per_image = config.connector.tokens_per_image
    if per_image is not None:
        return image_room(config, patches) * per_image
    return patches // config.connector.patches_per_token


class DeviceState:
    """Cache, features, last tokens and rules of the slots.

    Args:
      engine: whose parameters, shapes and requests it uses.
      banned: tokens that are never given, and those that are not given first, [2, V].

    Attributes:
      patches: that were encoded.
      steps: how often each program ran.
    """

    def __init__(self, engine: Engine, compiled: Programs, banned: np.ndarray):
        self.engine, self.programs, self.shapes = engine, compiled, engine.shapes
        self.banned = jnp.asarray(banned) if compiled.ops is None else compiled.put(banned, None, None)
        config = engine.config
        reads, per_image = config.decoder.vision_memory, config.connector.tokens_per_image
        self.memories = [None if reads is None else ImageMemory(reads, per_image, {}) for _ in range(engine.groups)]
        self.patches, self.steps = 0, collections.Counter()
        self._held, self._room = collections.Counter(), collections.Counter()
        self._prompt_logprobs: dict[int, list[tuple[str, int, np.ndarray, Logprobs]]] = {}
        slots = self.shapes.slots * self.shapes.groups
        self._masks: dict[int, Any] = {}  # by their length, such that allow every token
        # packed `SamplingArrays` of each slot; the last row is padding
        nobody = SamplingArrays.of([SamplingParams()], [slots], [0], [0]).packed()
        self._samplings = np.repeat(nobody, slots + 1, axis=0)
        self._generations = np.full(slots, -1)
        self.release()

    @property
    def no_sampling(self) -> np.ndarray:
        """Columns of `SamplingArrays` of a row without a sequence."""
        return self._samplings[-1]

    def release(self) -> None:
        """Let go of the arrays; they are made again when a plan needs them."""
        self._cache = self._features = self._rules = self._tokens = None
        self._prompt_logprobs.clear()
        self._generations[:] = -1

    @staticmethod
    def features(
        config: VLMConfig, model: ModuleDef, leaves: Sequence[Any], layout: MeshLayout | None, s: Shapes, adapted: bool
    ) -> VisionTokens:
        """Return abstract vision tokens as large as the feature pool."""
        probe = Programs(model, model, layout, s.cache, None, adapted=adapted)
        batch = picture_batch(config, s.groups, s.encode_patches[0])
        adapters = np.zeros(s.groups, np.int32)
        found = jax.eval_shape(probe._tokens, leaves, batch, adapters)

        def pool(part):
            return jax.ShapeDtypeStruct((s.groups, s.feature_slots, part.shape[2]), part.dtype)

        return VisionTokens(pool(found.tokens), None, tuple(map(pool, found.deepstack)))

    # -- plans

    def run(self, plans: Mapping[int, Plan], active: Mapping[str, Any]) -> tuple[list[Sampled], Any]:
        """Begin plans of one kind. Returns the tokens that they draw, and an array that is there when they are done."""
        kind = type(next(iter(plans.values())))
        if kind is Encode:
            return [], self.encode(plans, active)
        if kind is Prefill:
            return self.prefill(plans, active)
        sampled = self.decode(plans, active)
        return [sampled], sampled.drawn.tokens

    def encode(self, plans: Mapping[int, Encode], active: Mapping[str, Any]) -> Any:
        """Run the vision tower over pictures."""
        left: dict[int, list[tuple[int, PictureArrays]]] = {}
        for group, plan in plans.items():
            for picture in plan.pictures:
                arrays = self._picture_arrays(picture, active)
                left.setdefault(group, []).append((active[picture.request_id].adapter, arrays))
                if self.memories[group] is not None:
                    self.memories[group].remember(picture.feature_slots)
        done = None
        while any(left.values()):
            done = self._encode({group: self._next_pictures(pictures) for group, pictures in left.items()})
        return done

    def _next_pictures(self, left: list[tuple[int, PictureArrays]]) -> tuple[int, list[PictureArrays]]:
        """Take pictures of one adapter for an encode that they fill well: for half a large one, two small ones."""
        if not left:
            return 0, []
        chosen, fullest = 1, 0.0
        for size in self.shapes.encode_patches:
            count, fill = self._fitting(left, size)
            if count and fill >= NEARLY * fullest:
                chosen, fullest = count, max(fill, fullest)
        adapter, taken = left[0][0], [picture for _, picture in left[:chosen]]
        del left[:chosen]
        return adapter, taken

    def _fitting(self, left: list[tuple[int, PictureArrays]], size: int) -> tuple[int, float]:
        """Return how many of the next pictures of one adapter an encode takes, and the share of it that they fill."""
        count, patches, images = 0, 0, 0
        for adapter, picture in left:
            more = patches + picture.media.patches, images + picture.images
            if adapter != left[0][0] or more[0] > size or more[1] > image_room(self.engine.config, size):
                break
            count, (patches, images) = count + 1, more
        return count, patches / size

    def pack(self, group: int, plan: Plan, active: Mapping[str, Any]) -> None:
        """Make the arrays of a plan and throw them away. Raises whatever is wrong with them."""
        rows: list[list[Any]] = [[] for _ in range(self.shapes.groups)]
        if isinstance(plan, Encode):
            rows[group] = [self._picture_arrays(picture, active) for picture in plan.pictures]
            self._pack_pictures(rows)
        elif isinstance(plan, Prefill):
            rows[group] = list(plan.chunks)
            plan_arrays.pack_chunks(rows, self.shapes, self.memories)

    def _picture_arrays(self, picture: Picture, active: Mapping[str, Any]) -> PictureArrays:
        one = active[picture.request_id]
        return PictureArrays(one.request.example, one.spec.media[picture.number], picture.feature_slots)

    def _encode(self, groups: Mapping[int, tuple[int, list[PictureArrays]]]) -> Any:
        rows = [groups.get(d, (0, []))[1] for d in range(self.shapes.groups)]
        adapters = np.array([groups.get(d, (0, []))[0] for d in range(self.shapes.groups)], np.int32)
        batch, destinations = self._pack_pictures(rows)
        held, P = sum(p.media.patches for row in rows for p in row), batch.patches.shape[1]
        self.patches += held
        self._count(f"encode {P}", held, P * self.shapes.groups)
        return self.run_encode(batch, destinations, adapters)

    def _pack_pictures(self, rows: Sequence[Sequence[PictureArrays]]) -> tuple[Any, np.ndarray]:
        config, s = self.engine.config, self.shapes
        patches = max(sum(p.media.patches for p in row) for row in rows)
        images = max(sum(p.images for p in row) for row in rows)
        P = next(
            (size for size in s.encode_patches if size >= patches and image_room(config, size) >= images),
            s.encode_patches[-1],
        )
        batch = picture_batch(config, s.groups, P)
        return plan_arrays.pack_pictures(rows, batch, vision_tokens_of(config, P), s.feature_slots)

    def encode_arguments(self, batch: PackedBatch, destinations: np.ndarray, adapters: np.ndarray) -> tuple[Any, ...]:
        """Return the arguments of `Programs.encode`, on the devices."""
        put = self.programs.put
        if self.programs.ops is not None:
            batch = jax.device_put(batch, self.programs.ops.layout.batch(batch))
        return self.engine._leaves, self.pool(), batch, put(destinations, "batch", None), put(adapters, "batch")

    def run_encode(self, batch: PackedBatch, destinations: np.ndarray, adapters: np.ndarray) -> Any:
        """Run the vision tower. Returns an array that is there when it is done."""
        self._features, done = self.programs.encode(*self.encode_arguments(batch, destinations, adapters))
        return done

    def prefill(self, plans: Mapping[int, Prefill], active: Mapping[str, Any]) -> tuple[list[Sampled], Any]:
        """Run chunks of prompts, and draw the first token of those that end."""
        left = {group: list(plan.chunks) for group, plan in plans.items()}
        sampled: list[Sampled] = []
        key = id(next(iter(plans.values())))
        while any(left.values()):
            chosen = {group: self._next_chunks(chunks, active) for group, chunks in left.items()}
            rows = [chosen.get(d, (0, []))[1] for d in range(self.shapes.groups)]
            adapters = np.array([chosen.get(d, (0, []))[0] for d in range(self.shapes.groups)], np.int32)
            chunks, last = plan_arrays.pack_chunks(rows, self.shapes, self.memories)
            size = chunks.tokens.shape[1], chunks.past_pages.shape[1]
            self._count(
                f"prefill {size[0]} after {size[1]} pages", int((chunks.segment_ids > 0).sum()), chunks.tokens.size
            )
            hidden = self.run_prefill(chunks, adapters)
            sampled += self._first_tokens(rows, last, hidden, active)
            self._score_prompts(key, rows, last, chunks, hidden, active)
        return sampled, hidden

    def prefill_arguments(self, chunks: Chunks, adapters: np.ndarray) -> tuple[Any, ...]:
        """Return the arguments of `Programs.prefill`, on the devices."""
        put = self.programs.put
        chunks = Chunks(*(put(part, "batch", *[None] * (part.ndim - 1)) for part in chunks))
        return self.engine._decoder_leaves, self.pages(), self.pool(), chunks, put(adapters, "batch")

    def run_prefill(self, chunks: Chunks, adapters: np.ndarray) -> Any:
        """Run chunks of prompts. Returns the hidden states [D, C, width]."""
        hidden, self._cache = self.programs.prefill(*self.prefill_arguments(chunks, adapters))
        return hidden

    def _next_chunks(self, left: list[Chunk], active: Mapping[str, Any]) -> tuple[int, list[Chunk]]:
        """Take chunks of one adapter, as many as a prefill takes."""
        if not left:
            return 0, []
        tokens = past = images = 0
        s, taken = self.shapes, []
        adapter = _adapter(active, left[0].row)
        while left and _adapter(active, left[0].row) == adapter:
            chunk = left[0]
            tokens += plan_arrays.whole_pages(chunk, s.page_size)
            past += chunk.start // s.page_size
            images += int((chunk.feature_index >= 0).sum()) * (self.engine.config.connector.tokens_per_image or 0)
            over = tokens > s.prefill_tokens[-1] or past > s.past[-1]
            over |= bool(s.prefill_features) and images > s.prefill_features[-1]
            if taken and over:
                break
            taken.append(left.pop(0))
        return adapter, taken

    def _first_tokens(self, rows, last, hidden, active) -> list[Sampled]:
        """Draw for the last token of every chunk that ends a prompt, for all answers of its request."""
        wanted = [
            [(index, row) for chunk, index in zip(chunks, indices, strict=True) for row in chunk.samples]
            for chunks, indices in zip(rows, last, strict=True)
        ]
        R, found = self.shapes.prefill_rows, []
        for begin in range(0, max(map(len, wanted)), R):
            indices = np.zeros((len(rows), R), np.int32)
            samplings = np.repeat(self.no_sampling[None], len(rows) * R, axis=0)
            at = []
            for d, group in enumerate(wanted):
                for i, (index, row) in enumerate(group[begin : begin + R]):
                    indices[d, i] = index
                    self._take_slot(d * self.shapes.slots + row.slot, row, active)
                    samplings[d * R + i] = self._samplings[d * self.shapes.slots + row.slot]
                    samplings[d * R + i, sampling.STEP] = row.draw
                    at.append((d * R + i, d, row, 1))
            mask = self._mask(len(samplings), 1, at, active, {})
            drawn = self.run_first(hidden, indices, samplings, mask)
            found.append(_sampled(drawn, at, samplings))
        return found

    def run_first(self, hidden, indices: np.ndarray, samplings: np.ndarray, mask) -> Drawn:
        """Draw a token behind each of some tokens of a prefill."""
        put = self.programs.put
        drawn, self._tokens, self._rules = self.programs.first(
            self.engine._decoder_leaves,
            self.last_tokens(),
            self.slot_rules(),
            self.programs.last(hidden, put(indices, "batch", None)),
            put(samplings, "batch", None),
            self.banned,
            mask,
        )
        return drawn

    def decode(self, plans: Mapping[int, Decode], active: Mapping[str, Any]) -> Sampled:
        """Run the last token of every sequence, and those that are drawn or drafted behind it."""
        self._copy({group: plan.copies for group, plan in plans.items()})
        for group, plan in plans.items():
            slots = plan.slots + group * self.shapes.slots
            new = self._generations[slots] != [row.generation for row in plan.rows]
            for i in np.flatnonzero(new):
                self._take_slot(slots[i], plan.rows[i], active)
        adapters = {group: [active[row.request_id].adapter for row in plan.rows] for group, plan in plans.items()}
        rows, per_group = plan_arrays.decode_rows(plans, self.shapes, adapters, self._samplings)
        B, W = rows.rows.shape[0], rows.rows.shape[1] - programs.TABLE
        steps = max(plan.length for plan in plans.values())
        self._count(f"decode {B} of {W} pages", sum(int(plan.steps.sum()) for plan in plans.values()), B * steps, steps)
        drafts = plan_arrays.drafted(plans, per_group, self.shapes, self.engine.sizes.draft_tokens)
        at: list[tuple[int, int, Row, int]] = []
        guesses: dict[int, list[int]] = {}
        for group, plan in plans.items():
            counts = (plan.steps + plan.drafted).tolist()
            for index, (row, count) in enumerate(zip(plan.rows, counts, strict=True), group * per_group):
                at.append((index, group, row, count))
                if drafts is not None and count > 1:
                    guesses[index] = drafts[index, : count - 1].tolist()
        mask = self._mask(B, 1 if drafts is None else 1 + drafts.shape[1], at, active, guesses)
        return _sampled(self.run_decode(rows, drafts, mask), at, rows.rows, guesses)

    def decode_arguments(self, rows: DecodeRows, drafts: np.ndarray | None, mask: Any) -> tuple[Any, ...]:
        """Return the arguments of `Programs.decode`, or of `Programs.verify` where tokens are drafted."""
        put = self.programs.put
        more = () if drafts is None else (put(drafts, "batch", None),)
        state = self.engine._decoder_leaves, self.pages(), self.last_tokens(), self.slot_rules()
        return (*state, DecodeRows(put(rows.rows, "batch", None)), self.banned, mask, *more)

    def run_decode(self, rows: DecodeRows, drafts: np.ndarray | None, mask: Any) -> Drawn:
        """Run rows of decoding, and draw their tokens."""
        program = self.programs.decode if drafts is None else self.programs.verify
        drawn, self._tokens, self._rules, self._cache = program(*self.decode_arguments(rows, drafts, mask))
        return drawn

    # -- drawing

    def _mask(
        self,
        rows: int,
        width: int,
        at: Sequence[tuple[int, int, Row, int]],
        active: Mapping[str, Any],
        drafts: Mapping[int, Sequence[int]],
    ) -> Any:
        """Return the bits of the tokens that may come at each of ``width`` tokens of each row."""
        masked = [(index, row, active[row.request_id].masks) for index, _, row, _ in at]
        masked = [(index, row, masks) for index, row, masks in masked if masks is not None]
        if not masked:
            return self.free_mask(rows * width)
        mask = np.full((rows * width, self.engine.constraints.words), -1, np.int32)
        for index, row, masks in masked:
            guessed = drafts.get(index, ())
            words = masks.of_drafts(row.index, guessed) if guessed else masks.words[row.index]
            mask[index * width : index * width + 1 + len(guessed)] = words
        return self._committed(self.programs.put(mask, None, None))

    def free_mask(self, rows: int) -> Any:
        """Return bits that allow every token."""
        if rows not in self._masks:
            mask = np.full((rows, self.engine.constraints.words), -1, np.int32)
            self._masks[rows] = self._committed(self.programs.put(mask, None, None))
        return self._masks[rows]

    def _take_slot(self, slot: int, row: Row, active: Mapping[str, Any]) -> None:
        """Give a slot's numbers to the answer that has it now."""
        if self._generations[slot] == row.generation:
            return
        one = active[row.request_id]
        params = one.request.sampling
        self._generations[slot] = row.generation
        self._samplings[slot] = SamplingArrays.of([params], [slot], [params.number + row.index], [0]).packed()
        if sampling.has_rules(params):
            self._set_rules(slot, one, row)

    def _set_rules(self, slot: int, one: Any, row: Row) -> None:
        params, vocabulary = one.request.sampling, self.engine.config.decoder.vocab_size
        bias = np.zeros(vocabulary, np.float32)
        if params.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(params.allowed_token_ids)] = 0
        for token, value in params.logit_bias.items():
            bias[token] += value
        seen, ends = (np.zeros(vocabulary, bool) for _ in range(2))
        seen[one.spec.tokens[(one.spec.tokens >= 0) & (one.spec.tokens < vocabulary)]] = True
        ends[[i for i in one.ends if 0 <= i < vocabulary]] = True
        given = one.answers[row.index].tokens
        counts = np.bincount(np.array(given, np.int64), minlength=vocabulary).astype(np.int32)
        self.run_set_rules(slot, bias, seen, ends, counts)

    def run_set_rules(self, slot: int, *values: np.ndarray) -> Any:
        """Give a slot its rules (`SlotRules.at_slot`). Returns those of all slots."""
        self._rules = self.programs.set_rules(self.slot_rules(), np.int32(slot), *values)
        return self._rules

    # -- prompts' scores

    def _score_prompts(self, key: int, rows, last, chunks: Chunks, hidden, active) -> None:
        """Compute the log-probabilities of the prompts' tokens where one of the requests wants them."""
        wanted = [
            (d, chunk, index)
            for d, (group, indices) in enumerate(zip(rows, last, strict=True))
            for chunk, index in zip(group, indices, strict=True)
            if active[chunk.row.request_id].prompt_logprobs is not None
        ]
        if not wanted:
            return
        following = np.zeros(chunks.tokens.shape, np.int32)
        for d, chunk, index in wanted:
            prompt = active[chunk.row.request_id].spec.tokens
            after = prompt[chunk.start + 1 : chunk.stop + 1]
            begin = index + 1 - len(chunk.tokens)
            following[d, begin : begin + len(after)] = after
        found = self.run_prompt_logprobs(hidden, following)
        C = chunks.tokens.shape[1]
        for d, chunk, index in wanted:
            prompt = active[chunk.row.request_id].spec.tokens
            after = prompt[chunk.start + 1 : chunk.stop + 1]
            begin = d * C + index + 1 - len(chunk.tokens)
            part = jax.tree.map(lambda x, a=begin, n=len(after): x[a : a + n], found)
            self._prompt_logprobs.setdefault(key, []).append((chunk.row.request_id, chunk.start + 1, after, part))

    def run_prompt_logprobs(self, hidden: Any, following: np.ndarray) -> Logprobs:
        """Score what follows each token of a prefill."""
        following = self.programs.put(following, "batch", None)
        return self.programs.prompt_logprobs(self.engine._decoder_leaves, hidden, following)

    def take_prompt_logprobs(self, launched: Any) -> Iterator[tuple[str, int, np.ndarray, Logprobs]]:
        """Yield (request, first token, tokens, values) of what a launched plan computed."""
        for plan in launched.plans.values():
            yield from self._prompt_logprobs.pop(id(plan), ())

    # -- pages

    def _copy(self, copies: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        most = max((len(pairs) for pairs in copies.values()), default=0)
        for begin in range(0, most, COPIES):
            source, target = (np.zeros((self.shapes.groups, COPIES), np.int32) for _ in range(2))
            for group, pairs in copies.items():
                for i, (old, new) in enumerate(pairs[begin : begin + COPIES]):
                    source[group, i], target[group, i] = old, new
            self.run_copy(source, target)

    def run_copy(self, source: np.ndarray, target: np.ndarray) -> Any:
        """Copy pages [D, `COPIES`] of every layer. Returns the cache."""
        self._cache = self.programs.copy_pages(self.pages(), source, target)
        return self._cache

    def scrub(self, group: int, pages: np.ndarray) -> None:
        """Replace what is not finite in pages of a group: attention multiplies masked entries with 0."""
        pages = pages[pages > 0]
        for begin in range(0, len(pages), COPIES):
            some = np.zeros((self.shapes.groups, COPIES), np.int32)
            chosen = pages[begin : begin + COPIES]
            some[group, : len(chosen)] = chosen
            self.run_scrub(some)

    def run_scrub(self, pages: np.ndarray) -> Any:
        """Scrub pages [D, `COPIES`] of every layer. Returns the cache."""
        self._cache = self.programs.scrub_pages(self.pages(), pages)
        return self._cache

    def pages(self) -> Any:
        """Return the cache, empty where there was none."""
        if self._cache is None:
            self._cache = self._committed(self.programs.init_cache(self.engine._decoder_leaves))
        return self._cache

    def pool(self) -> Any:
        """Return the feature pool, empty where there was none."""
        if self._features is None:
            self._features = self._committed(self.programs.init_features())
        return self._features

    def last_tokens(self) -> Any:
        """Return the last token of each slot."""
        if self._tokens is None:
            self._tokens = self._committed(self.programs.put(np.zeros(len(self._samplings), np.int32), None))
        return self._tokens

    def slot_rules(self) -> Any:
        """Return the `SlotRules` of the slots."""
        if self._rules is None:
            rules = SlotRules.empty(len(self._generations), self.engine.config.decoder.vocab_size)
            self._rules = self._committed(jax.tree.map(lambda x: self.programs.put(x, None, None), rules))
        return self._rules

    def _committed(self, state):
        return self.programs.committed(state, self.engine._decoder_leaves)

    # -- reports

    def _count(self, name: str, held: int, room: int, steps: int = 1) -> None:
        self.steps[name] += steps
        self._held[name] += held
        self._room[name] += room

    @property
    def padding(self) -> dict[str, float]:
        """Share of each program's entries that held nothing."""
        return {name: 1 - self._held[name] / room for name, room in self._room.items()}


def _sampled(
    drawn: Drawn, at: list[tuple[int, int, Row, int]], samplings: np.ndarray, drafts: Mapping[int, Sequence[int]] = {}
) -> Sampled:
    """Return what was drawn, on its way to the host."""
    top = int(samplings[:, sampling.SCORED].max()) - 1
    wanted = [drawn.tokens, *drawn.logprobs[: 0 if top < 0 else 2 if top == 0 else 4]]
    for part in wanted:
        part.copy_to_host_async()
    return Sampled(drawn, tuple(at), top, drafts)


def _adapter(active: Mapping[str, Any], row: Row) -> int:
    return active[row.request_id].adapter


def _picture_tokens(config: VLMConfig, patches: int) -> int:
    """Return how many tokens of text a batch of pictures must seem to have."""
    return image_room(config, patches) * (config.placeholders_per_image or 1)


def picture_batch(config: VLMConfig, groups: int, patches: int):
    """Return a batch for an encode, without pictures."""
    encoder = config.encoder
    tokens = _picture_tokens(config, patches)
    return plan_arrays.empty_pictures(groups, patches, tokens, encoder.patch_values, encoder.position_values)
