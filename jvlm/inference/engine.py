"""The engine: continuous batching of requests over slots and a paged cache.

`Engine.submit` takes requests, `Engine.step` runs what the scheduler plans next and returns what became of it. Requests
begin and end at any time beside others; what one gets does not depend on the others, but for the rounding of matrix
products of other shapes.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jvlm.adapters import several
from jvlm.adapters import steps as adapter_steps
from jvlm.data import packing
from jvlm.data.errors import ExampleError
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference import event_loop, faults, memory, not_finite, results, shapes, sharding, token_rules, warm_up
from jvlm.inference.active import Active, Launched
from jvlm.inference.answer import Answer
from jvlm.inference.answer_masks import AnswerMasks
from jvlm.inference.constrain import Constraints
from jvlm.inference.device_state import DeviceState, Sampled
from jvlm.inference.grammar_text import within_pictures
from jvlm.inference.programs import ModuleDef, Programs
from jvlm.inference.requests import EngineConfig, EngineStats, Event, Request, SamplingParams, StepFailed
from jvlm.inference.sampling import SamplingConfig, has_rules
from jvlm.inference.scheduling.config import SchedulerConfig
from jvlm.inference.scheduling.plans import Plan, Prefill, Row
from jvlm.inference.scheduling.scheduler import Scheduler
from jvlm.inference.scheduling.sequence_spec import SequenceSpec
from jvlm.inference.shapes import Need, Shapes
from jvlm.inference.weights import decoding_state
from jvlm.models import contracts, vlm
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.weights.finite import BrokenWeights

PATCH_STEP = 16


class Engine:
    """Generates for one model. Programs are compiled at their first use, or all of them by `warm_up`.

    Args:
      layout: the devices that share the work, all of this process, as `sharding.inference_layout` returns it; None is
        one device.

    Raises:
      UserError: a layout that cannot generate, or that the model does not divide by; a generation_config.json that
        forbids every token.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        config: EngineConfig = EngineConfig(),
        layout: MeshLayout | None = None,
    ):
        contracts.check_generates(model.decoder)
        self.config, self.processor, self.sizes = model.config, processor, config
        self.ahead = config.ahead
        self.layout = sharding.check_layout(layout, model.config)
        self.banned, self.banned_first = token_rules.never_given(model.config, processor)
        ends = token_rules.end_tokens(model.config, processor)
        self.constraints = Constraints(processor, model.config.decoder.vocab_size, ends, self.banned)
        self.groups = 1 if self.layout is None else self.layout.num_shards(self.layout.mesh_axes("batch"))
        self.shapes: Shapes | None = None
        self._device: DeviceState | None = None
        self._schedulers: list[Scheduler] = []
        self._given: list[Any] = []
        self.failure: str | None = None  # why nothing can be computed any more
        self._active: dict[str, Active] = {}
        self._held: deque[str] = deque()  # requests that need larger shapes
        self._launched: deque[Launched] = deque()
        self._early: list[Event] = []
        self._mail: dict[str, deque[Event]] = {}
        self._success: collections.Counter[str] = collections.Counter()
        self._retired: dict[str, int] = {}
        self._ready_at: int | None = None
        self._idle_since: float | None = None
        self._fitting: tuple[int | None] | None = None  # what `size_cache` has found
        self._read_at = 0.0
        self._host_gap = 0.0
        self._structures: tuple[ModuleDef, ModuleDef] | None = None
        self.load(model)

    # -- parameters

    def load(self, params: VLM | Mapping[str, Any]) -> None:
        """Take other parameters of the same model, without compiling; free if they are the same arrays as before.

        Answers that run go on with them; cached pages and features of the old ones are used no more. On a layout,
        arrays that are not where they will be used are copied there.

        Args:
          params: the model, or dotted path -> array as `vlm.parameters` names them.

        Raises:
          UserError: paths or shapes of another model.
        """
        model = params if isinstance(params, VLM) else self._with(params)
        given = jax.tree.leaves(nnx.state(model))
        if len(given) == len(self._given) and all(a is b for a, b in zip(given, self._given, strict=True)):
            return
        self._given, self._adapter_names = given, model.adapters
        placed = model if self.layout is None else sharding.shard_params(model, self.layout)
        placed = adapter_steps.with_norms(placed)
        whole, self._leaves = ModuleDef.of(placed, nnx.state(placed))
        decoder, self._decoder_leaves = ModuleDef.of(placed.decoder, decoding_state(placed.decoder))
        if self._structures is not None and self._structures != (whole, decoder):
            if self._active:
                raise UserError("the parameters are of another form than those of the answers that run; wait for them")
            self._drop_programs()
            self._fitting = None
        self._structures = (whole, decoder)
        self._adapter_keys = several.content_keys(placed)
        for scheduler in self._schedulers:
            scheduler.forget()

    def _with(self, params: Mapping[str, Any]) -> VLM:
        if not self._given:
            raise UserError("the engine has let go of its parameters; load a model")
        model = self._structures[0].bind(self._leaves)
        wanted = vlm.parameters(model)
        wrong = sorted(set(params) ^ set(wanted))
        wrong += [p for p in params if p in wanted and params[p].shape != wanted[p].get_value().shape]
        if wrong:
            raise UserError(f"the parameters are not those of this model: {wrong[0]} and {len(wrong) - 1} more differ")
        return vlm.bind(model, params)

    def release(self) -> None:
        """Let go of the parameters and the cache, not of what is compiled; `load` takes them again.

        Training wants this after generating: on CPU the engine's views keep old parameters alive.
        """
        if self._active:
            raise RuntimeError("answers still run")
        self._given, self._leaves, self._decoder_leaves = [], [], []
        if self._device is not None:
            self._device.release()
            self._schedulers = self._new_schedulers()

    # -- requests

    def stop_tokens(self, sampling: SamplingConfig | SamplingParams) -> frozenset[int]:
        """The tokens that end an answer."""
        if sampling.stop_token_ids is not None:
            return frozenset(sampling.stop_token_ids)
        if isinstance(sampling, SamplingParams) and sampling.ignore_eos:
            return frozenset()
        return token_rules.end_tokens(self.config, self.processor)

    def answer_limit(self, example: Example) -> int:
        """Return how many tokens may follow a prompt: the model's positions that are left.

        Raises:
          ExampleError: none is left.
        """
        positions, limit = int(example.positions.max(initial=-1)) + 1, self.config.decoder.max_position_embeddings
        if positions >= limit:
            raise ExampleError(
                example.origin,
                "messages",
                f"the prompt takes {positions} positions of the model's {limit} (max_position_embeddings), so none is "
                "left for an answer",
                "Shorten it, or lower max_pixels",
            )
        return limit - positions

    def prepare(self, request: Request) -> None:
        """Do what takes long before `submit`: compile a grammar. Any thread may call it. Raises UserError."""
        if request.sampling.grammar is not None:
            self.constraints.prepare(within_pictures(request.sampling.grammar, request.example, self.processor))

    def submit(self, request: Request) -> None:
        """Take a request. Its events come from `step`.

        Raises:
          ExampleError: a prompt that leaves no position for an answer.
          UserError: a request that this model or these shapes cannot serve; an id that is there already.
          StepFailed: the device has failed for good.
        """
        if self.failure is not None:
            raise StepFailed(f"the engine cannot go on, start it anew: {self.failure}")
        if request.id in self._active:
            raise UserError(f"a request {request.id!r} is there already; its answers have not ended")
        sampling, example = request.sampling, request.example
        if self.sizes.logprobs == "sampled" and sampling.logprobs is not None and has_rules(sampling):
            raise UserError(
                "this engine gives log-probabilities in the distribution that is drawn from (logprobs sampled), which "
                "goes without penalties, bias, allowed and least tokens: leave those out of the request"
            )
        limit = min(sampling.max_tokens, self.answer_limit(example))
        self._check_ids(sampling)
        ends = self.stop_tokens(sampling)
        masks = AnswerMasks.of(self.constraints, sampling, ends, example)
        chosen = several.numbers(self._adapter_names, [request.adapter])
        adapter = 0 if chosen is None else int(chosen[0])
        key = self._adapter_keys.get(request.adapter, (b"", b""))
        spec = SequenceSpec.of(
            request.id,
            example,
            max_tokens=limit,
            n=sampling.n,
            priority=request.priority,
            adapter=key[0],
            encoder_adapter=key[1],
            salt=request.cache_salt,
            whole_prompt=sampling.prompt_logprobs is not None,
            needs_last_token=masks is not None,
            draft_tokens=0 if has_rules(sampling) else self.sizes.draft_tokens,
        )
        answers = [Answer(request, self.processor, ends, limit) for _ in range(sampling.n)]
        need = shapes.need_of(self.config, spec, example, limit)
        active = Active(request, spec, need, adapter, ends, answers, masks)
        if sampling.prompt_logprobs is not None:
            active.prompt_logprobs = [None] * example.length
        if self.shapes is not None and self._ready_at is not None and not self.shapes.holds(active.need):
            if active.need.prompt < self.shapes.capacity < active.need.tokens:
                active.need = dataclasses.replace(active.need, tokens=self.shapes.capacity)
            if not self.shapes.holds(active.need):
                raise shapes.refuse(active.need, self.shapes)
        self._active[request.id] = active
        if self.shapes is None or not self.shapes.holds(active.need):
            self._held.append(request.id)
        else:
            self._begin(active)

    def _begin(self, active: Active) -> None:
        loads = [scheduler.size for scheduler in self._schedulers]
        group = min(range(self.groups), key=loads.__getitem__)
        limit = self._schedulers[group].add(active.spec)
        active.group = group
        for answer in active.answers:
            answer.limit = limit

    def _check_ids(self, sampling: SamplingParams) -> None:
        vocabulary = self.config.decoder.vocab_size
        for field in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            wrong = [i for i in getattr(sampling, field) or () if i >= vocabulary or i < 0]
            if wrong and field != "stop_token_ids":
                raise UserError(f"sampling.{field} has the id {wrong[0]}; the vocabulary ends at {vocabulary - 1}")
        allowed = sampling.allowed_token_ids
        if allowed is not None and self.banned[list(allowed)].all():
            raise UserError("sampling.allowed_token_ids has only tokens that this model must not give")

    def abort(self, request_id: str) -> None:
        """End a request's answers; those that had not ended get an event. One that is not there is no error."""
        active = self._active.pop(request_id, None)
        if active is None:
            return
        if active.group >= 0:
            self._schedulers[active.group].abort(request_id)
        else:
            self._held.remove(request_id)
        for index, answer in enumerate(active.answers):
            if not answer.ended:
                answer.ended = True
                self._success["abort"] += 1
                self._early.append(Event(request_id, index, finish_reason="abort"))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._active or self._launched or self._early)

    def run(self, requests: Iterable[Request], *, most: int | None = None) -> Iterator[Event]:
        """Submit requests, and yield their events until all have ended; abort those left when the caller stops.

        One that this model or these shapes cannot serve has an event with the error. Requests of other callers go on
        meanwhile; their events are kept for them.

        Args:
          most: take further requests only while fewer than so many have not ended; None takes all at once.
        """
        return event_loop.run(self, self._mail, requests, most)

    @property
    def drains(self) -> bool:
        """Whether requests wait for larger shapes, which are made once what runs has ended."""
        return bool(self._held) and self.shapes is not None

    # -- steps

    def step(self) -> list[Event]:
        """Run what is to be run next, and return what became of earlier steps.

        A request that cannot be computed ends with an error. After an error of the device all end with it; the engine
        goes on with an empty cache, unless `failure` says why it cannot.
        """
        events, self._early = self._early, []
        try:
            self._begin_held()
            launched = self._launch()
            events, self._early = events + self._early, []
            waiting = 1 if self.ahead and launched else 0
            while len(self._launched) > waiting:
                events += self._read(self._launched.popleft())
        except jax.errors.JaxRuntimeError as error:
            events += self._fail_all(error)
        return events

    def _fail_all(self, error: Exception) -> list[Event]:
        """End all requests after an error of the device, and let go of what it keeps."""
        self.failure = faults.lasting_failure(self._leaves)
        problem = StepFailed(f"the device failed: {error}")
        problem.__cause__ = error
        names = list(self._active)
        self._active.clear()
        self._held.clear()
        self._launched.clear()
        self._idle_since = None
        if self._device is not None:
            self._device.release()
            self._schedulers = self._new_schedulers()
        return [self._error(name, problem) for name in names]

    def _error(self, request_id: str, problem: Exception) -> Event:
        self._success["error"] += 1
        return Event(request_id, finish_reason="error", error=faults.error_of(problem))

    def _begin_held(self) -> None:
        """Make larger shapes for requests that need them, once nothing runs, and begin these."""
        if not self._held or self._launched or any(a.group >= 0 for a in self._active.values()):
            return
        held = [self._active[request_id] for request_id in self._held]
        self._held.clear()
        self._make_shapes([active.need for active in held])
        for active in held:
            self._begin(active)

    def _launch(self) -> bool:
        """Give the device the next plan of every group. Returns whether there was one."""
        by_kind: dict[type, dict[int, Plan]] = {}
        for group, scheduler in enumerate(self._schedulers):
            plan = scheduler.next()
            if plan is not None:
                by_kind.setdefault(type(plan), {})[group] = plan
        if by_kind and self._idle_since is not None:
            self._host_gap += time.perf_counter() - self._idle_since
        for plans in by_kind.values():
            began, known = time.perf_counter(), self.compilations
            try:
                sampled, done = self._device.run(plans, self._active)
            except faults.HOST_ERRORS as error:
                sampled, done = self._run_without_faulty(plans, error)
            self._launched.append(Launched(plans, sampled, done, began, compiled=self.compilations != known))
        return bool(by_kind)

    def _run_without_faulty(self, plans: Mapping[int, Plan], error: Exception) -> tuple[Sequence[Sampled], Any]:
        """End the requests that make a step fail, and run the rest; all of them end if it is none of them alone."""
        faulty = faults.faulty_requests(self._device, plans, self._active)
        left = faults.without(plans, faulty) if faulty else {}
        self._drop(faults.without(plans, faults.request_ids(left)) if left else plans, error, faulty)
        left = faults.without(left, set(faults.request_ids(left)) - set(self._active))
        try:
            return self._device.run(left, self._active) if left else ((), None)
        except faults.HOST_ERRORS as again:
            self._drop(left, again, {})
            return (), None

    def _drop(self, plans: Mapping[int, Plan], error: Exception, own: Mapping[str, Exception]) -> None:
        """End all requests of plans that are not run, each with its own error or the one of all."""
        for group, plan in plans.items():
            for name in self._schedulers[group].drop(plan):
                self._active.pop(name, None)
                self._early.append(self._error(name, own.get(name, error)))

    def _read(self, launched: Launched) -> list[Event]:
        """Return what became of a plan, once it is done."""
        jax.block_until_ready(launched.done)
        now = time.perf_counter()
        seconds, self._read_at = now - max(launched.began, self._read_at), now
        self._idle_since = None if self._launched or not self._active else now
        self._take_prompt_logprobs(launched)
        read = results.read(launched, self._schedulers, self._active)
        for group, plan in launched.plans.items():
            self._schedulers[group].finish(plan, read.results[group], None if launched.compiled else seconds)
        for event in read.events:
            if event.finish_reason is not None:
                self._success[event.finish_reason] += 1
        for request_id in read.ended:
            active = self._active.get(request_id)
            if active is not None and all(answer.ended for answer in active.answers):
                del self._active[request_id]
        return read.events + (self._broken(read.broken, launched) if read.broken else [])

    def _take_prompt_logprobs(self, launched: Launched) -> None:
        """Keep those of a chunk; the first event of a request tells them."""
        for plan in launched.plans.values():
            for chunk in plan.chunks if isinstance(plan, Prefill) else ():
                active = self._active.get(chunk.row.request_id)
                if active is not None:
                    active.cached = chunk.cached
        for request_id, start, tokens, values in self._device.take_prompt_logprobs(launched):
            active = self._active.get(request_id)
            if active is None or active.prompt_logprobs is None:
                continue
            count = active.request.sampling.prompt_logprobs
            found = results.token_logprobs(jax.device_get(values), tokens.tolist(), count, entropy=False)
            active.prompt_logprobs[start : start + len(found)] = found

    def _broken(self, rows: Sequence[tuple[int, Row, int]], launched: Launched) -> list[Event]:
        """End requests whose scores are not finite, and leave nothing of them in pages that others will get."""
        events = []
        for group, row, draw in rows:
            self._device.scrub(group, _pages_of(row, launched.plans[group]))
            self._schedulers[group].forget()
            active = self._active.pop(row.request_id, None)
            if active is None:
                continue
            self._schedulers[group].abort(row.request_id)
            model = self._structures[0].bind(self._leaves)
            error = not_finite.error(model, active.request.example.origin, draw + 1)
            self._success["error"] += 1
            events.append(Event(row.request_id, row.index, finish_reason="error", error=error))
        return events

    # -- programs

    def _make_shapes(self, needs: list[Need], num_pages: int | None = None) -> None:
        """Set the shapes that hold requests; programs and cache are new if they changed."""
        sizes = self.sizes if num_pages is None else dataclasses.replace(self.sizes, num_pages=num_pages)
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and sizes.kv_cache_dtype is None:
            # XLA for CPUs updates no array of 16 bits in place: it would convert the whole cache at each token
            sizes = dataclasses.replace(sizes, kv_cache_dtype="float32")
        decoder, images = self.config.decoder, self.processor.image_processor
        found = shapes.shapes_for(
            sizes,
            needs,
            groups=self.groups,
            page_size=self._page_size(),
            patch_step=packing.patch_step(images.patch_group, PATCH_STEP),
            tokens_per_image=self.config.connector.tokens_per_image if decoder.vision_memory else None,
            prefills_whole=decoder.prefills_whole,
            reads_used_pages=on_cpu,
            least=self.shapes,
        )
        if self.sizes.deterministic:
            found = shapes.one_of_each(found)
        if found == self.shapes and self._device is not None:
            return
        self._drop_programs()
        self.shapes = found
        whole, module = self._structures
        adapted = isinstance(self._adapter_names, several.AdapterNames)
        features = DeviceState.features(self.config, whole, self._leaves, self.layout, found, adapted)
        options = {"steps": self.sizes.decode_steps, "sampled": self.sizes.logprobs == "sampled"}
        programs = Programs(whole, module, self.layout, found.cache, features, adapted=adapted, **options)
        banned = np.stack([self.banned, self.banned if self.banned_first is None else self.banned_first])
        self._device = DeviceState(self, programs, banned)
        self._schedulers = self._new_schedulers()

    def _drop_programs(self) -> None:
        if self._device is not None:
            for name, count in self._device.programs.compiled.items():
                self._retired[name] = self._retired.get(name, 0) + count
        self._device = self.shapes = None
        self._schedulers = []

    def _new_schedulers(self) -> list[Scheduler]:
        s, whole = self.shapes, self.config.decoder.prefills_whole
        config = SchedulerConfig(
            num_pages=s.pages,
            page_size=s.page_size,
            max_slots=s.slots,
            max_length=s.capacity,
            prefill_tokens=s.prefill_tokens,
            tpot_goal=self.sizes.tpot_goal,
            prefill_chunks=s.prefill_rows,
            prefill_past_pages=None if whole else s.past[-1],
            feature_slots=s.feature_slots,
            encode_patches=s.encode_patches[-1],
            singly=self.sizes.deterministic,
            max_preemptions=0 if self.sizes.deterministic else 3,  # answers would go on from recomputed tokens
            decode_steps=self.sizes.decode_steps,
            decode_seconds=self.sizes.decode_seconds,
            prefix_cache=self.sizes.prefix_cache and not whole and not self.sizes.deterministic,
            cuts_prompts=not whole,
        )
        counted = [scheduler.counters for scheduler in self._schedulers] or [None] * self.groups
        return [Scheduler(config, counters) for counters in counted]

    @property
    def compilations(self) -> dict[str, int]:
        """How many times each program has been compiled."""
        now = {} if self._device is None else self._device.programs.compiled
        return {name: now.get(name, 0) + self._retired.get(name, 0) for name in {*now, *self._retired}}

    def _page_size(self) -> int:
        return self.sizes.page_size or (128 if jax.default_backend() == "tpu" else 16)

    def _width(self, tokens: int) -> int:
        return -(-tokens // self._page_size())

    def size_cache(self) -> int | None:
        """Return how many pages the memory gives the cache at most; None where no share of it is set.

        No more than ``max_slots`` answers of ``max_model_len`` tokens need. `warm_up` takes so many. The largest
        programs are compiled for it.

        Raises:
          UserError: there is no room for one answer.
        """
        if self._fitting is None:
            devices = sorted({d for leaf in self._leaves for d in leaf.devices()}, key=lambda device: device.id)
            fraction = None if self.sizes.num_pages else memory.share(devices, self.sizes.memory_fraction)
            self._fitting = (None if fraction is None else self._pages_within(devices, fraction),)
        return self._fitting[0]

    def _pages_within(self, devices: Sequence[Any], fraction: float) -> int:
        if self._active:
            raise RuntimeError("answers run")
        need, slots = shapes.largest_need(self.config, self.sizes), self.sizes.max_slots
        width = self._width(need.tokens)
        # without a cache first: how many pages fit is seen when everything else is there
        self._make_shapes([need] * slots, (width + 2) * self.groups)
        most = memory.pages_that_fit(self._device, devices, fraction) * self.groups
        self._drop_programs()
        return min(slots * (width + 1) + width + 2 * self.groups, most)

    def warm_up(self, report: Callable[[str, float], None] | None = None) -> None:
        """Compile every program for every shape. Afterwards nothing is compiled, and what does not fit is refused.

        Args:
          report: called with the name and the seconds of each.

        Raises:
          UserError: as `size_cache`.
        """
        if self._active:
            raise RuntimeError("answers run")
        need = shapes.largest_need(self.config, self.sizes)
        self._make_shapes([need] * self.sizes.max_slots, self.size_cache())
        warm_up.warm_up(self._device, report or (lambda name, seconds: None))
        self._ready_at = sum(self.compilations.values())

    def stats(self) -> EngineStats:
        """Return the counters and gauges of now."""
        found = [scheduler.stats() for scheduler in self._schedulers]
        total = sum(self.compilations.values())

        def summed(name: str) -> int:
            return sum(getattr(one, name) for one in found)

        def mean(name: str) -> float:
            return summed(name) / len(found) if found else 0.0

        names = (
            "num_requests_running num_requests_waiting prefix_cache_queries prefix_cache_hits mm_cache_queries "
            "mm_cache_hits num_preemptions generation_tokens spec_decode_num_drafts spec_decode_num_draft_tokens "
            "spec_decode_num_accepted_tokens"
        )
        computed, cached = summed("prompt_tokens"), summed("prefix_cache_hits")
        return EngineStats(
            **{name: summed(name) for name in names.split()},
            kv_cache_usage_perc=mean("kv_cache_usage_perc"),
            encoder_cache_usage_perc=mean("encoder_cache_usage_perc"),
            prompt_tokens=computed + cached,
            prompt_tokens_cached=cached,
            request_success=dict(self._success),
            encoder_patches=0 if self._device is None else self._device.patches,
            compilations=total,
            compilations_after_ready=0 if self._ready_at is None else total - self._ready_at,
            steps={} if self._device is None else dict(self._device.steps),
            padding_ratio={} if self._device is None else self._device.padding,
            host_gap_seconds=self._host_gap,
        )


def _pages_of(row: Row, plan: Plan) -> np.ndarray:
    """Return the pages of a row's sequence when a plan was made."""
    if isinstance(plan, Prefill):
        return next(chunk.table for chunk in plan.chunks if row in chunk.samples)
    return plan.tables[plan.rows.index(row)]


__all__ = ["BrokenWeights", "Engine"]
