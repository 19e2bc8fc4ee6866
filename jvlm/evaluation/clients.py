"""Who answers: a model on this machine, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import PIL.Image

from jvlm.data.box_formats import FORMATS, FormatName, render
from jvlm.data.boxes import CoordinateSpace, Region, Sizes
from jvlm.data.content import Conversation, Document, Image, ObjectBox, Text, Video
from jvlm.data.errors import MEMORY, ExampleError, Origin
from jvlm.data.images import open_image
from jvlm.data.smart_resize import smart_resize
from jvlm.errors import UserError
from jvlm.evaluation.endpoint import Endpoint, EndpointError
from jvlm.evaluation.task import Decoding

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.inference.feed import Outcome
    from jvlm.inference.sampling import SamplingConfig
    from jvlm.models.vlm import VLM
    from jvlm.parallel.layout import MeshLayout

FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # what lmms-eval writes in place of an answer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
      id: of the reply.
      number: decides random draws, with the seed.
    """

    id: str
    example: Conversation | Document
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's reply.

    Attributes:
      finish: "length" for one that the limit on tokens cut; "error" for none at all.
      seconds: from the request to the reply; on this machine from the reply before it, as many run at once.
      sizes: of each image, as given and as the model saw it; empty where the client does not know.
      cause: the error, of a model on this machine.
    """

    id: str
    text: str = ""
    finish: Literal["stop", "length", "error"] = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    error: str = ""
    sizes: tuple[Sizes, ...] = ()
    cause: UserError | None = None


class Client(Protocol):
    """Answers prompts.

    Attributes:
      box_form, box_space: how the model writes boxes.
    """

    box_form: FormatName
    box_space: CoordinateSpace | None

    def describe(self) -> Mapping[str, Any]:
        """Return what decides an answer beside prompt and decoding; values of JSON, no secrets."""

    def replies(self, prompts: Iterable[Prompt], decoding: Decoding) -> Iterator[Reply]:
        """Yield replies as they come, in any order."""


class LocalClient:
    """A model on this machine.

    Args:
      batch_size: prompts that run at once.
      adapter: name of the adapter that answers, of those on the model.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        batch_size: int = 8,
        layout: MeshLayout | None = None,
        adapter: str | None = None,
        name: str = "",
    ):
        from jvlm.adapters import several
        from jvlm.inference.generate import check_batch_size, engine_for

        check_batch_size(batch_size)
        several.numbers(model.adapters, [adapter])  # a name that is not known is an error now
        self._model, self._adapter, self.name = model, adapter, name
        self._batch_size, self.engine = batch_size, engine_for(model, processor, layout, batch_size)
        self.box_form, self.box_space = processor.config.box_format, processor.config.box_space

    def describe(self) -> dict[str, Any]:
        """Return the weights' hash, and the settings of the processor."""
        from jvlm.inference.sampling import SamplingConfig
        from jvlm.inference.settings import answer_settings

        settings = answer_settings(self._model, self.engine, SamplingConfig())
        model = settings["model"]
        return {
            "kind": "local",
            "model": self.name,
            "adapter": self._adapter,
            "weights": model["weights"],
            "dtype": model["compute_dtype"],
            "processor": settings["processor"],
        }

    def replies(self, prompts: Iterable[Prompt], decoding: Decoding) -> Iterator[Reply]:
        """Yield replies as they end; the next prompt begins as soon as there is room.

        A prompt that cannot be read or answered has a reply with the error.

        Raises:
          BrokenWeights: the model's weights are not finite.

        Warns:
          UserWarning: answers that ended before ``max_new_tokens`` at the model's last position.
        """
        from jvlm.inference.feed import Asked, answer_each
        from jvlm.inference.sampling import SamplingConfig
        from jvlm.weights.finite import BrokenWeights

        sampling = SamplingConfig(**dataclasses.asdict(decoding))
        asked = (Asked(one.number, one.example, one.example.origin, self._adapter, one.id) for one in prompts)
        outcomes = answer_each(self.engine, asked, sampling, batch_size=self._batch_size)
        before = time.perf_counter()
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                if isinstance(outcome.error, BrokenWeights):
                    raise outcome.error
                now = time.perf_counter()
                yield self._reply(outcome, sampling, now - before)
                before = now

    def _reply(self, outcome: Outcome, sampling: SamplingConfig, seconds: float) -> Reply:
        from jvlm.inference.feed import answer_text
        from jvlm.inference.generate import cut_note

        name, example, completion = outcome.asked.key, outcome.example, outcome.completion
        if outcome.error is not None:
            return Reply(name, finish="error", error=str(outcome.error), cause=outcome.error, seconds=seconds)
        tokens, stopped = len(completion.tokens), completion.stopped
        if note := cut_note(self.engine, example, tokens, stopped, sampling):
            warnings.warn(f"{example.origin}: {note}", stacklevel=2)
        return Reply(
            name,
            answer_text(self.engine.processor, completion),
            "stop" if stopped else "length",
            example.length,
            tokens,
            seconds,
            sizes=example.sizes,
        )


@dataclasses.dataclass(frozen=True)
class Boxes:
    """How a model behind a server writes boxes, which no server tells.

    Attributes:
      form: a name of `jvlm.data.box_formats.FORMATS`.
      space: of the numbers; None is that of ``form``.
      factor, min_pixels, max_pixels: of Qwen's image processor, by which "resized" pixels are told.
    """

    form: FormatName = "json"
    space: CoordinateSpace | None = None
    factor: int = 28
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 4096 * 28 * 28

    def sizes(self, image: PIL.Image.Image) -> Sizes:
        """Return the sizes of an image."""
        if (self.space or FORMATS[self.form].space) != "resized":
            return Sizes(image.size, image.size)
        height, width = smart_resize(image.height, image.width, self.factor, self.min_pixels, self.max_pixels)
        return Sizes(image.size, (width, height))

    def written(self, region: Region, sizes: Sizes) -> str:
        """Return a region as the model writes it."""
        return render(region, self.form, sizes, space=self.space)


class EndpointClient:
    """A model behind a server that speaks OpenAI's protocol of chats."""

    def __init__(self, endpoint: Endpoint, *, boxes: Boxes = Boxes(), frames: int = 64):
        self.endpoint, self._boxes, self._frames = endpoint, boxes, frames
        self.box_form, self.box_space = boxes.form, boxes.space

    def describe(self) -> dict[str, Any]:
        """Return the address and the name of the model."""
        boxes = dataclasses.asdict(self._boxes)
        return {"kind": "endpoint", "url": self.endpoint.url, "model": self.endpoint.model, "boxes": boxes}

    def replies(self, prompts: Iterable[Prompt], decoding: Decoding) -> Iterator[Reply]:
        """Yield replies as they come; one that failed after all tries has the error."""
        yield from self.endpoint.map(lambda prompt: self._reply(prompt, decoding), prompts)

    def _reply(self, prompt: Prompt, decoding: Decoding) -> Reply:
        began = time.perf_counter()
        try:
            messages, sizes = self._messages(prompt.example)
        except ExampleError as error:
            return Reply(prompt.id, finish="error", error=str(error))
        sampling = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
        if decoding.temperature:
            sampling |= {"top_p": decoding.top_p, "seed": decoding.seed + prompt.number}
            sampling |= {"top_k": decoding.top_k} if decoding.top_k else {}
        try:
            answer = self.endpoint.chat(messages, **sampling)
        except EndpointError as error:
            return Reply(prompt.id, finish="error", error=str(error), seconds=time.perf_counter() - began)
        return Reply(
            prompt.id,
            answer.text,
            "length" if answer.finish_reason == "length" else "stop",
            answer.prompt_tokens,
            answer.completion_tokens,
            time.perf_counter() - began,
            sizes=sizes,
        )

    def _messages(self, example: Conversation | Document) -> tuple[list[dict[str, Any]], tuple[Sizes, ...]]:
        if isinstance(example, Document):
            raise UserError(
                "a task that base models continue as one text cannot be asked of a server of chats; "
                "give a model folder, or a task whose questions are turns"
            )
        sizes: list[Sizes] = []
        messages = []
        for message in example.messages:
            content = joined(part for piece in message.content for part in self._parts(piece, example.origin, sizes))
            text_only = all(part["type"] == "text" for part in content)
            whole = "".join(part["text"] for part in content) if text_only else content
            messages.append({"role": message.role, "content": whole})
        return messages, tuple(sizes)

    def _parts(self, part: Any, origin: Origin, sizes: list[Sizes]) -> Iterator[dict[str, Any]]:
        if isinstance(part, Text):
            yield {"type": "text", "text": part.text}
        elif isinstance(part, Image):
            image = open_image(part.source, origin=origin, roots=_roots(part, origin))
            sizes.append(self._boxes.sizes(image))
            yield {"type": "image_url", "image_url": {"url": data_uri(image)}}
        elif isinstance(part, Video):
            for frame in self._sampled(part, origin):
                yield {"type": "image_url", "image_url": {"url": data_uri(frame)}}
        elif isinstance(part, ObjectBox):
            if part.image >= len(sizes):
                raise ExampleError(origin, "messages", "a box stands before its image", "Put the image first")
            yield {"type": "text", "text": self._boxes.written(part.region, sizes[part.image])}
        else:
            raise ExampleError(origin, "messages", f"a {type(part).__name__} cannot be sent", "Write it as text")

    def _sampled(self, video: Video, origin: Origin) -> list[PIL.Image.Image]:
        """Return frames of a video, evenly spaced."""
        roots = _roots(video, origin)
        if video.file is None:
            return [open_image(frame, origin=origin, field="videos", roots=roots) for frame in video.frames]
        from jvlm.data.video.reader import shared_reader
        from jvlm.data.video.sampling import Sampling

        sampling = Sampling(max_frames=self._frames)
        read = shared_reader().read(video.file, sampling, size=None, origin=origin, field="videos", roots=roots)
        return [PIL.Image.fromarray(frame) for frame in read.frames]


def _roots(part: Image | Video, origin: Origin) -> tuple[str, ...]:
    if part.folder:
        return (part.folder,)
    return () if origin.file == MEMORY else (origin.file.rpartition("/")[0],)


def joined(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parts of a message, texts beside each other made one."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and found and found[-1]["type"] == "text":
            found[-1] = {"type": "text", "text": found[-1]["text"] + part["text"]}
        else:
            found.append(part)
    return found


def data_uri(image: PIL.Image.Image, *, kind: str = "PNG") -> str:
    """Return an image as a data: URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
