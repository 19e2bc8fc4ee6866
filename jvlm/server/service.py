"""What all routes share: the engine, the processor, names of models, and the way of a conversation to a request."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jvlm.data.box_formats import FORMATS
from jvlm.data.content import Conversation, Document, Text
from jvlm.data.errors import ExampleError
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.async_engine import Answer, AsyncEngine, EngineDead
from jvlm.inference.requests import Request, SamplingParams
from jvlm.server.conversation import outline
from jvlm.server.errors import APIError, bad, of_user_error
from jvlm.server.keys import KeyRing
from jvlm.server.media import MediaLoader, MediaTimes
from jvlm.server.metrics import Metrics
from jvlm.server.protocol import ChatRequest, Sampling, TokenizeRequest
from jvlm.server.reasoning import CLOSE, OPEN
from jvlm.server.sampling import ModelFacts
from jvlm.server.settings import ServerSettings
from jvlm.server.tools import OPEN as TOOL_OPEN

T = TypeVar("T")
_THREADS = 2
_SHORT_VALUE = 4096
_TAIL = 16
_IMAGE_KWARGS = ("min_pixels", "max_pixels")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as the engine takes it.

    Attributes:
      begins_inside: it ends with an open `<think>`.
    """

    example: Example
    begins_inside: bool = False

    @property
    def media_tokens(self) -> int:
        """Return how many tokens stand for images and videos."""
        return int((self.example.vision_index >= 0).sum())


class Service:
    """Answers requests.

    Args:
      facts: what sampling has to know of the model.
      load: reads media; None makes one by the settings.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine: AsyncEngine,
        processor: Processor,
        facts: ModelFacts,
        metrics: Metrics,
        *,
        slots: int,
        loader: MediaLoader | None = None,
    ):
        self.settings, self.engine, self.processor = settings, engine, processor
        self.facts, self.metrics = facts, metrics
        self.adapters = metrics.adapters = list(settings.adapters)
        self.ring = KeyRing(settings.keys, settings.key_limits)
        self.loader = loader or MediaLoader(settings.media, processor)
        self.box_space = processor.config.box_space or FORMATS[processor.config.box_format].space
        self.created, self._most, self._active = int(time.time()), slots + settings.max_queue, 0
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="jvlm-encode")
        self._grammars = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="jvlm-grammar")
        templates = str(processor.template.templates)
        names = {token.content for token in processor.tokenizer.added_tokens_decoder.values()}
        self.tells_reasoning = settings.reasoning == "on" or (
            settings.reasoning == "auto" and (OPEN in templates or OPEN in names or settings.no_think is not None)
        )
        self.reads_tools = settings.tools == "on" or (settings.tools == "auto" and TOOL_OPEN in templates)
        # what the tokenizer decides itself is nobody else's to decide
        self._own_values = frozenset(inspect.signature(processor.tokenizer.apply_chat_template).parameters) | {
            "messages",
            "tools",
            "documents",
            "raise_exception",
            "strftime_now",
            "bos_token",
            "eos_token",
        }

    def close(self) -> None:
        """Stop threads and processes."""
        for threads in (self._threads, self._grammars):
            threads.shutdown(wait=False, cancel_futures=True)
        self.loader.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name that a request may give as its model."""
        return (self.settings.model_name, *self.settings.aliases, *self.adapters)

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that a model's name stands for, None for the base. Raises APIError for no name."""
        if not name or name in (self.settings.model_name, *self.settings.aliases):
            return None
        if name in self.adapters:
            return name
        raise APIError(404, f"the model {name[:64]!a} does not exist", "model")

    def check_ready(self) -> None:
        """Raise APIError where nothing can be answered, or too much waits."""
        if self.engine.dead:
            raise APIError(503, "the engine has stopped")
        if not self.engine.ready.is_set():
            raise APIError(503, "the engine is not ready", headers={"retry-after": "5"})
        if self._active >= self._most:
            self.metrics.rejected()
            raise APIError(429, "too many requests wait", headers={"retry-after": "1"})

    def begin(self, owner: str) -> Callable[[], None]:
        """Count a request as begun; returns what ends it, once however often it is called. Raises APIError."""
        self.ring.begin(owner)
        self._active += 1
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._active -= 1
                self.ring.end(owner)

        return end

    async def in_thread(self, task: Callable[[], T]) -> T:
        """Return what a task returns, run beside the event loop. Raises APIError for a UserError."""
        return await self._in(self._threads, task)

    async def _in(self, threads: concurrent.futures.Executor, task: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, task)
        except UserError as error:
            raise of_user_error(error) from error

    async def prompt_of(
        self, request: ChatRequest | TokenizeRequest, tools: tuple[dict[str, Any], ...], owner: str
    ) -> Prompt:
        """Return the prompt of a conversation, its media read.

        Raises:
          APIError: whatever is wrong with it.
        """
        if (
            request.continue_final_message
            and request.add_generation_prompt
            and ("add_generation_prompt" in request.model_fields_set)
        ):
            raise bad("continue_final_message and add_generation_prompt at once", "continue_final_message")
        values, thinks = self._template_values(request)
        settings, sampling = self._media_values(request)
        plan = outline(
            request.messages,
            images=request.images,
            videos=request.videos,
            objects=request.objects,
            sampling=sampling,
            tools=tools,
            template_values=values,
            image_settings=settings,
        )
        if not thinks and self.settings.no_think is not None:
            plan = plan.with_last_user_text(self.settings.no_think)
        continues = request.continue_final_message
        if continues and (plan.turns[-1].role != "assistant" or not plan.turns[-1].content):
            raise bad("continue_final_message needs an assistant turn at the end", "continue_final_message")
        config = self.processor.image_config
        if settings:
            try:
                config = config.for_example(settings)
            except ExampleError as error:
                raise bad(f"{error.problem}. {error.fix}", "mm_processor_kwargs") from error
        times = MediaTimes()
        media = await self.loader.load(plan.sources, config, times)
        if plan.sources:
            self.metrics.media(times.fetch, times.decode)
            self.ring.take(owner, media_bytes=times.bytes)
        encode = functools.partial(self._encode, plan.conversation(media), continues)
        return await self.in_thread(encode)

    def _encode(self, conversation: Conversation, continues: bool) -> Prompt:
        example = self.processor.encode(conversation, generation_prompt=True, continues=continues)
        tail = self.processor.tokenizer.decode(example.tokens[-_TAIL:].tolist(), skip_special_tokens=False)
        last = conversation.messages[-1]
        begun = last.text if continues and last.role == "assistant" else ""
        inside = (
            begun.rfind(OPEN) > begun.rfind(CLOSE) if OPEN in begun or CLOSE in begun else tail.rstrip().endswith(OPEN)
        )
        return Prompt(example, inside)

    def sizes_body(self, prompt: Prompt) -> dict[str, Any]:
        """Return what an answer tells of its images: (width, height) of each as it came and as the model sees it.

        ``jvlm_box_space`` says in which of them, or in which units, this model writes boxes and points, with the words
        of `jvlm.data.boxes`.
        """
        sizes = prompt.example.sizes
        if not sizes:
            return {}
        return {
            "images_size": [list(size.original) for size in sizes],
            "jvlm_processed_size": [list(size.resized) for size in sizes],
            "jvlm_box_space": self.box_space,
        }

    async def completion_prompt(self, prompt: str | list[int]) -> Prompt:
        """Return the prompt of a raw text, or of token ids. Raises APIError."""
        if isinstance(prompt, str):
            if not prompt:
                raise bad("the prompt is empty", "prompt")
            encode = functools.partial(self.processor.encode, Document((Text(prompt),)), generation_prompt=True)
        else:
            encode = functools.partial(self.processor.encode_ids, prompt)
        return Prompt(await self.in_thread(encode))

    async def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        request: Sampling,
        identity: str,
        owner: str,
        adapter: str | None,
    ) -> Answer:
        """Hand a prompt to the engine. Raises APIError."""
        self.ring.take(owner, tokens=prompt.example.length + sampling.n * sampling.max_tokens)
        asked = Request(identity, prompt.example, sampling, adapter, request.priority, request.cache_salt or "")
        if sampling.grammar is not None:  # in threads of their own: strangers' grammars take seconds
            await self._in(self._grammars, functools.partial(self.engine.engine.prepare, asked))
        try:
            return self.engine.submit(asked)
        except EngineDead as error:
            raise APIError(503, "the engine has stopped") from error

    def _template_values(self, request: ChatRequest | TokenizeRequest) -> tuple[dict[str, Any], bool]:
        """Return what the chat template is given, and whether the model may think."""
        values = dict(request.chat_template_kwargs or {})
        for name, value in values.items():
            field = f"chat_template_kwargs.{name[:64]}"
            if not name.isidentifier() or name in self._own_values or name.startswith("_"):
                raise bad("this cannot be set by a request", field)
            if isinstance(value, dict | list) or (isinstance(value, str) and len(value) > _SHORT_VALUE):
                raise bad("not a short text, number or boolean", field)
        effort = request.reasoning_effort
        if effort is not None:
            values.setdefault("reasoning_effort", effort)
            if effort == "none":
                values.setdefault("enable_thinking", False)
        return values, values.get("enable_thinking") is not False

    def _media_values(
        self, request: ChatRequest | TokenizeRequest
    ) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
        """Return settings of images, and how frames of videos are taken."""
        settings, sampling = {}, {}
        for name, value in (request.mm_processor_kwargs or {}).items():
            field = f"mm_processor_kwargs.{name[:64]}"
            if name in _IMAGE_KWARGS:
                most = getattr(self.processor.image_config, name, None) if name == "max_pixels" else None
                if most is not None and isinstance(value, int | float) and value > most:
                    raise bad(f"at most {most} pixels here", field)
                settings[name] = value
            elif name in ("fps", "num_frames", "frames"):
                sampling["fps" if name == "fps" else "num_frames"] = self._positive(value, field)
            else:
                raise bad(f"use {', '.join(_IMAGE_KWARGS)}, fps or num_frames", field)
        for kind, given in (request.media_io_kwargs or {}).items():
            if kind not in ("video", "image") or not isinstance(given, Mapping):
                raise bad("use video: {num_frames}", "media_io_kwargs")
            for name, value in given.items():
                if kind != "video" or name not in ("num_frames", "fps"):
                    raise bad("use video: {num_frames}", f"media_io_kwargs.{kind}")
                if not (name == "num_frames" and value == -1):
                    sampling[name] = self._positive(value, f"media_io_kwargs.video.{name}")
        if "num_frames" in sampling:
            sampling["num_frames"] = int(sampling["num_frames"])
        if sampling.get("num_frames", 0) > self.settings.media.frames:
            raise bad(f"at most {self.settings.media.frames} frames are taken of a video", "media_io_kwargs.video")
        return settings, tuple(sampling.items())

    @staticmethod
    def _positive(value: Any, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 10_000:
            raise bad("not a positive number", field)
        return value
