"""The processor: examples in, packed batches out; token ids in, text out. One path for training and serving."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from jvlm import config as config_tree
from jvlm import families
from jvlm.data import box_formats, image_choice, mrope, packing, time_formats, vocabulary
from jvlm.data.boxes import Region, Sizes
from jvlm.data.chat_format import ChatFormat
from jvlm.data.content import (
    Conversation,
    Document,
    Image,
    Message,
    ObjectBox,
    ObjectName,
    ObjectTime,
    Parsed,
    Part,
    Text,
    Video,
    joined_text,
    media_sources,
    same_media,
)
from jvlm.data.document_text import DocumentText, Tokens
from jvlm.data.errors import MEMORY, ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.image_processor import ImageProcessorConfig, MediaPatches
from jvlm.data.images import check_within, image_size, open_image
from jvlm.data.packing import Example
from jvlm.data.processor_config import ProcessorConfig
from jvlm.data.segments import joined_segments
from jvlm.data.template import ChatTemplate
from jvlm.data.turns import without_answer
from jvlm.data.unread_patches import PlansImages, UnreadImage, UnreadPatches
from jvlm.data.video.config import VideoConfig
from jvlm.data.video.reader import VideoSupportError, shared_reader
from jvlm.errors import UserError
from jvlm.models.packed_batch import PackedBatch

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

T = TypeVar("T")
_FIX = "Crop the image, or change its limits"


class Processor:
    """Tokenizer, chat template and image processor of one model. It is not changed after it was made: see `replace`.

    Args:
      tokenizer: a fast transformers tokenizer with a chat template.
      model: gives the special token ids and the encoder's geometry.
      config: settings of images, and formats.
      media_roots: folders in which relative media paths are looked up.
      video: how video files are decoded.
      media_folders: in which files of images and videos must lie; none of them allows any.
      still_images: whether animations among the images are refused; else their first frame is taken.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: VLMConfig,
        config: ProcessorConfig = ProcessorConfig(),
        *,
        media_roots: tuple[str, ...] = (),
        generation: dict[str, Any] | None = None,
        video: VideoConfig = VideoConfig(),
        media_folders: tuple[str, ...] = (),
        still_images: bool = False,
    ):
        self.tokenizer = tokenizer
        self.model = model
        self.family = families.get(model.family)
        self.image_config = config.image or self.family.image_config
        box_format = config.box_format or self.chat_format.box_format
        self.config = dataclasses.replace(config, image=self.image_config, box_format=box_format)
        self.image_processor = self.image_config.build(model)
        self._plans_images = isinstance(self.image_processor, PlansImages)  # to ask a protocol takes long
        self.media_roots = media_roots
        self.generation = generation or {}
        self.video, self.media_folders, self.still_images = video, media_folders, still_images
        self._tokenized: dict[str, np.ndarray] = {}
        written = box_formats.FORMATS[self.config.box_format]
        self.template = ChatTemplate(tokenizer, self.chat_format, f"{written.box}{written.point}{written.named}")
        end, facts = self.config.document_end, self.template.facts
        if end is not None:
            self._id_of(end)
        self.documents = DocumentText(tokenizer, self.chat_format, facts.control, facts.headers, end)
        # without a placeholder of its own, a video is written as an image is
        self.video_token_id = model.image_token_id if model.video_token_id is None else model.video_token_id
        self._check_tokenizer()
        self.delimiter_ids = tuple(self._id_of(token) for token in self.image_processor.delimiter_tokens)
        stop_ids = (tokenizer.convert_tokens_to_ids(token) for token in self.chat_format.stops)
        # a base model's tokenizer may lack them
        self.stop_ids = tuple(i for i in stop_ids if i is not None and i != tokenizer.unk_token_id)
        merged = self.image_processor.merged_delimiter
        self.merged_delimiter_id = None if merged is None else self._id_of(merged)

    @property
    def chat_format(self) -> ChatFormat:
        """How the family's chat templates are used."""
        return self.family.chat_format

    def replace(
        self,
        *,
        image_config: ImageProcessorConfig | None = None,
        media_roots: tuple[str, ...] | None = None,
        video: VideoConfig | None = None,
        media_folders: tuple[str, ...] | None = None,
        still_images: bool | None = None,
    ) -> Processor:
        """Return a processor with other settings of images, media folders or videos; the tokenizer is shared."""
        given = {"video": video, "media_folders": media_folders, "still_images": still_images}
        given |= {"media_roots": media_roots}
        given = {name: getattr(self, name) if value is None else value for name, value in given.items()}
        if image_config is not None:
            config = dataclasses.replace(self.config, image=image_config)
            return Processor(self.tokenizer, self.model, config, generation=self.generation, **given)
        # nothing else depends on these; the template, which takes long to look into, is shared
        replaced = copy.copy(self)
        replaced.__dict__.update(given)
        return replaced

    def _id_of(self, token: str) -> int:
        """Return the id of a special token. Raises UserError if the tokenizer lacks it."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise UserError(f"the tokenizer has no token {token}")
        return token_id

    def _check_tokenizer(self) -> None:
        names = {self.chat_format.image: self.model.image_token_id, self.chat_format.video: self.model.video_token_id}
        for name, expected in names.items():
            token_id = None if name is None else self.tokenizer.convert_tokens_to_ids(name)
            if token_id != expected:
                raise UserError(f"the tokenizer gives {name} the id {token_id}, the model's configuration {expected}")
        vocabulary.check(self.tokenizer, self.model.decoder.vocab_size)

    def __call__(self, conversation: Any) -> Example:
        return self.encode(conversation)

    def encode(
        self,
        example: Any,
        *,
        generation_prompt: bool = False,
        image_config: ImageProcessorConfig | None = None,
        continues: bool = False,
        decode: bool = True,
    ) -> Example:
        """One example as arrays.

        Args:
          example: an ms-swift example, a document, or one of them checked.
          generation_prompt: end with the opening of an assistant turn; a final assistant turn is then dropped. Of a
            document: do not end it.
          image_config: settings of its images, instead of the processor's with what the example changes.
          continues: of a prompt that ends with an assistant turn, keep its text as the beginning of the answer.
          decode: False reads no more than the headers of images where these say enough; `write_patches` does the rest.

        Raises:
          ExampleError: what can be wrong with data: the form of the example; an image that is not there or cannot be
            decoded; image settings or sizes that the image processor refuses (any `UserError`); whatever a chat
            template raises; text that cannot be told from control tokens; tokens without a row in the embedding
            table.
          VideoSupportError: an example with a video file, where none can be decoded.

        Every other exception is a fault of the program, and leaves this function as it is.
        """
        parsed = parse_example(example)
        begun = ""
        if generation_prompt and isinstance(parsed, Conversation):
            with_prompt = parsed
            last = parsed.messages[-1]
            begun = last.text if continues and last.role == "assistant" else ""
            parsed = self._checked(parsed.origin, lambda: _prompt(with_prompt))

        def encoded() -> Example:
            media = self._media(parsed, image_config or self.image_config_of(parsed), decode)
            return self._laid_out(parsed, media, generation_prompt, begun)

        return self._checked(parsed.origin, encoded)

    def encode_together(
        self,
        conversations: Sequence[Conversation],
        values: Sequence[Mapping[str, float]],
        *,
        image_config: ImageProcessorConfig | None = None,
        decode: bool = True,
    ) -> Example:
        """Conversations of one origin as the segments of one example; media that are the first one's are read once.

        Args:
          values: numbers that the task wants to know of each conversation.
          image_config, decode: as of `encode`.

        Raises:
          ExampleError, VideoSupportError: as `encode`.
        """
        first = conversations[0]
        shares = [same_media(first, conversation) for conversation in conversations]

        def encoded() -> Example:
            media = self._media(first, image_config or self.image_config_of(first), decode)
            examples = [
                self._laid_out(
                    one, media if shared else self._media(one, image_config or self.image_config_of(one), decode), False
                )
                for one, shared in zip(conversations, shares, strict=True)
            ]
            return joined_segments(examples, [False, *shares[1:]], values)

        return self._checked(first.origin, encoded)

    def _laid_out(
        self, parsed: Conversation | Document, media: list[MediaPatches], generation_prompt: bool, begun: str = ""
    ) -> Example:
        tokens = self._tokenize(self._fill(parsed, media), generation_prompt, begun)
        problem = vocabulary.outside_problem(self.tokenizer, tokens.ids, self.model.decoder.vocab_size)
        if problem:
            fix = f"Leave the token out, or let the table grow: {vocabulary.GROW}"
            raise ExampleError(parsed.origin, "messages", problem, fix)
        return self._expand(tokens, media, parsed)

    def _checked(self, origin: Origin, work: Callable[[], T]) -> T:
        """Return what ``work`` gives; whatever is wrong with the example is an ExampleError."""
        try:
            return work()
        except (ExampleError, VideoSupportError):
            raise
        except UserError as error:
            raise ExampleError(origin, "messages", str(error), "Correct the example") from error
        except StopIteration as error:  # whoever iterates over examples would take it for the end of the data (PEP 479)
            raise RuntimeError("encoding an example raised StopIteration") from error

    def encode_ids(self, ids: Sequence[int]) -> Example:
        """Return a prompt that is given as token ids, without media.

        Raises:
          ExampleError: none at all, one without a row in the embedding table, or a media token.
        """
        document, size = Document(()), self.model.decoder.vocab_size
        fix = "Give ids of this model's tokenizer, without media tokens"
        if not len(ids):
            raise ExampleError(document.origin, "prompt", "no token ids", fix)
        outside = next((i for i in ids if not 0 <= i < size or i in self.model.media_token_ids), None)
        if outside is not None:
            problem = f"the id {outside} is a media token, or not below {size}"
            raise ExampleError(document.origin, "prompt", problem, fix)
        given, count = np.asarray(ids, np.int32), len(ids)
        return self._expand(Tokens(given, np.zeros(count, np.float32), np.zeros(count, np.int32)), [], document)

    def pack(
        self,
        conversations: Sequence[Any],
        *,
        seq_len: int | None = None,
        max_patches: int | None = None,
        generation_prompt: bool = False,
    ) -> PackedBatch:
        """Return a batch of the conversations in the order given.

        Without ``seq_len`` everything shares one sequence, whose shape is rounded up to a bucket. With it, sequences of
        that shape are filled first-fit; a conversation's sequence and segment are in the order of the list.

        Raises:
          ExampleError: a bad example, or one that does not fit the shape asked for.
        """
        checked = [parse_example(c, Origin(number=i)) for i, c in enumerate(conversations)]
        examples = [self.encode(c, generation_prompt=generation_prompt) for c in checked]
        if not examples:
            raise ValueError("pack needs at least one conversation")
        tokens = seq_len or packing.bucket(sum(e.length for e in examples), 64)
        patches = max_patches
        if patches is None:
            most = sum(e.num_patches for e in examples)
            patches = packing.bucket(most, packing.patch_step(self.image_processor.patch_group, 256)) if most else 0
        for example in examples:
            packing.check_fits(example, tokens, patches)
        sequences = packing.first_fit(examples, tokens, patches)
        return packing.assemble([[examples[i] for i in sequence] for sequence in sequences], tokens, patches)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def write_region(self, region: Region, sizes: Sizes) -> str:
        """Return the text of a box or point as this model was taught to write it."""
        return box_formats.render(region, self.config.box_format, sizes, space=self.config.box_space)

    def read_regions(self, text: str) -> list[box_formats.Detection]:
        """Return the boxes and points of this model's answer, in the space that it was taught."""
        return box_formats.parse(text, self.config.box_format, space=self.config.box_space)

    def _tokenize(self, example: Conversation | Document, generation_prompt: bool, begun: str = "") -> Tokens:
        """Return the tokens of an example whose boxes are written."""
        if isinstance(example, Document):
            return self.documents.tokenize(example, prompt=generation_prompt)
        messages = example.messages
        if self.config.default_system is not None and messages[0].role != "system":
            messages = (Message("system", self.config.default_system, 0.0), *messages)
        ids, weights, turns = self.template.tokenize(
            messages,
            generation_prompt=generation_prompt,
            origin=example.origin,
            tools=example.tools,
            prompt_weight=example.prompt_weight,
            values=dict(example.template_values),
            begun=begun,
            is_literal=example.is_literal,
        )
        return Tokens(ids, weights, turns)

    def _media(
        self, conversation: Conversation | Document, config: ImageProcessorConfig, decode: bool
    ) -> list[MediaPatches]:
        media, count = [], len(conversation.images)
        positions = itertools.count()  # among these images, which can be some of the example's alone
        for part in conversation.media:
            if isinstance(part, Image):
                index = next(positions)
                if not decode and self._plans_images and not _is_decoded(part.source):
                    media.append(self._unread(part, conversation.origin, config, index, count))
                    continue
                make = functools.partial(self._image, config, index, count)
            else:
                make = functools.partial(self._video, config)
            media.append(self._load(part, conversation.origin, config, make))
        return media

    def image_config_of(self, conversation: Conversation | Document) -> ImageProcessorConfig:
        """Return the settings of the conversation's images: the processor's, with what the example changes."""
        config = image_choice.changed(self.image_config, dict(conversation.image_choice))
        return config.for_example(dict(conversation.image_settings), conversation.origin)

    def _image(self, config: ImageProcessorConfig, index: int, count: int, part: Image) -> MediaPatches:
        image = part.source
        patches = self.image_processor.image(_upscaled(part, image), config, index=index, count=count)
        return dataclasses.replace(patches, original=image.size)  # in whose pixels boxes are

    def _unread(
        self, part: Image, origin: Origin, config: ImageProcessorConfig, index: int, count: int
    ) -> MediaPatches:
        """Return an image of which no more than the header is read."""
        where = {**self._where(part, origin), "still": self.still_images}
        size = image_size(part.source, **where)
        try:
            media = self.image_processor.layout(part.upscaled_size(size), config, index=index, count=count)
        except UserError as error:
            raise ExampleError(origin, where["field"], str(error), _FIX) from error
        patches = len(media.patches)
        unread = UnreadImage(part, size, config, index, count, **where, patches=patches, start=0, stop=patches)
        patches = UnreadPatches((unread,), self.image_processor.patch_values)
        return dataclasses.replace(media, patches=patches, original=size)

    def write_patches(self, unread: UnreadImage, out: UInt8[np.ndarray, "n c"]) -> None:
        """Decode an image and write the patches that are meant.

        Raises:
          ExampleError: as `UnreadImage.open`.
        """
        image = _upscaled(unread.part, unread.open())
        is_whole = len(out) == unread.patches
        patches = out if is_whole else np.empty((unread.patches, out.shape[1]), np.uint8)
        self.image_processor.write(image, unread.config, patches, index=unread.index, count=unread.count)
        if not is_whole:
            out[:] = patches[unread.start : unread.stop]

    def _video(self, config: ImageProcessorConfig, part: Video) -> MediaPatches:
        if part.fps is not None:
            config = config.for_video(len(part.frames), part.fps, is_resized=part.resized_for == config)
        return self.image_processor.video(part.frames, config, part.times)

    def with_open_media(self, conversation: Parsed, *, images: bool = True) -> Parsed:
        """Return the example with its images and frames decoded. Raises ExampleError.

        Args:
          images: False leaves images as they are.
        """
        config = self.image_config_of(conversation)

        def opened(part: Part) -> Part:
            is_meant = isinstance(part, Video) or (images and isinstance(part, Image))
            return self._opened(part, conversation.origin, config) if is_meant else part

        return conversation.map(opened)

    def _where(self, part: Image | Video, origin: Origin) -> dict[str, Any]:
        """Return arguments that say where an image or video is. Raises ExampleError for one that may not be read."""
        roots = self.media_roots
        if part.folder is not None or origin.file != MEMORY:
            roots = (part.folder or str(Path(origin.file).parent), *roots)
        where = {"origin": origin, "field": _field_of(part), "roots": roots}
        if self.media_folders:
            for source in media_sources(part):
                check_within(source, self.media_folders, **where)
        return where

    def _opened(self, part: Image | Video, origin: Origin, config: ImageProcessorConfig) -> Image | Video:
        """Return an image or video, decoded."""
        where = self._where(part, origin)
        if isinstance(part, Image):
            return dataclasses.replace(part, source=open_image(part.source, **where, still=self.still_images))
        if part.file is None:
            frames = tuple(open_image(frame, **where, still=self.still_images) for frame in part.frames)
            return dataclasses.replace(part, frames=frames)
        sampling = dataclasses.replace(config.sampling(), **dict(part.sampling))
        size = self.image_processor.frame_size(config)
        video = shared_reader(self.video).read(part.file, sampling, size=size, **where)
        frames = tuple(map(PIL.Image.fromarray, video.frames))
        return dataclasses.replace(
            part,
            file=None,
            sampling=(),
            frames=frames,
            fps=video.fps,
            times=tuple(video.times),
            resized_for=None if size is None else config,
        )

    def _load(
        self,
        part: Image | Video,
        origin: Origin,
        config: ImageProcessorConfig,
        make: Callable[[Image | Video], MediaPatches],
    ) -> MediaPatches:
        opened, field = self._opened(part, origin, config), _field_of(part)
        sizes = sorted({image.size for image in media_sources(opened)})
        if len(sizes) > 1:
            raise ExampleError(origin, field, f"frames of different sizes {sizes}", "Give frames of one size")
        try:
            return make(opened)
        except UserError as error:
            raise ExampleError(origin, field, str(error), _FIX) from error

    def _fill(self, conversation: Parsed, media: list[MediaPatches]) -> Parsed:
        """Return the example with its boxes, times, names, and what stands around images and videos, as text."""
        sizes = {
            part.index: Sizes(patches.original, patches.resized)
            for part, patches in zip(conversation.media, media, strict=True)
            if isinstance(part, Image)
        }
        fields = (f"objects.bbox[{index}]" for index in itertools.count())
        if any(patches.leading_text or patches.trailing_text for patches in media):
            around = iter([(Text(patches.leading_text), Text(patches.trailing_text)) for patches in media])

            def with_texts(part: Part) -> tuple[Part, ...]:
                if not isinstance(part, Image | Video):
                    return (part,)
                leading, trailing = next(around)
                return tuple(piece for piece in (leading, part, trailing) if piece != Text(""))

            conversation = conversation.expanded(with_texts)

        def written(part: Part) -> Part:
            if isinstance(part, ObjectName):
                return Text(part.name)
            if isinstance(part, ObjectTime):
                return Text(time_formats.render(part.seconds, self.config.time_format))
            if isinstance(part, ObjectBox):
                return Text(self._written_box(part, sizes.get(part.image), conversation.origin, next(fields)))
            return part

        if isinstance(conversation, Conversation):
            return conversation.map(written)
        return dataclasses.replace(conversation, content=joined_text(conversation.content, written))

    def _written_box(self, box: ObjectBox, sizes: Sizes | None, origin: Origin, field: str) -> str:
        region = box.region
        if sizes is None:
            raise ExampleError(origin, field, "a box without an image", "Add the image")
        if any(not 0 <= v <= sizes.original[i % 2] for i, v in enumerate(region.to("original", sizes).values)):
            problem = f"{list(region.values)} is outside the image of {sizes.original[0]} x {sizes.original[1]}"
            raise ExampleError(origin, field, problem, "Give pixels of the original image, or bbox_type 'norm1'")
        return self.write_region(region, sizes)

    def _expand(self, given: Tokens, media: list[MediaPatches], conversation: Conversation | Document) -> Example:
        """Replace each media placeholder by the tokens of its image or video, and lay out ids and positions."""
        ids = given.ids
        kinds = {Image: self.model.image_token_id, Video: self.video_token_id}
        expected = [kinds[type(part)] for part in conversation.media]
        placeholders = np.flatnonzero((ids == kinds[Image]) | (ids == kinds[Video]))
        if ids[placeholders].tolist() != expected:
            raise ExampleError(
                conversation.origin,
                "messages",
                f"the chat template writes {len(placeholders)} media tokens for {len(expected)} media, or in another "
                "order",
                "Put them into turns in which the template takes them, or give the model a template that does",
            )
        written = [self._written(item, placeholder) for item, placeholder in zip(media, expected, strict=True)]
        counts = np.ones(len(ids), np.int64)
        counts[placeholders] = [len(tokens) for tokens, _ in written]
        tokens, number = np.repeat(ids, counts), np.zeros(counts.sum(), np.int32)
        vision_index = np.full(len(tokens), -1, np.int32)
        starts, vision_tokens = np.concatenate([[0], np.cumsum(counts)])[placeholders], 0
        for n, (begin, item, (item_ids, fed)) in enumerate(zip(starts, media, written, strict=True), 1):
            span = slice(begin, begin + len(item_ids))
            tokens[span], number[span] = item_ids, n
            vision_index[begin + np.flatnonzero(fed)] = item.vision_index + vision_tokens
            vision_tokens += item.token_segment_ids.size
        arrays = {
            "tokens": tokens,
            "loss_weights": np.where(number > 0, np.float32(0), np.repeat(given.weights, counts)),
            "turns": np.repeat(given.turns, counts),
            "vision_index": vision_index,
            "media": number,
        }
        if given.breaks is not None:
            arrays["breaks"] = breaks = np.repeat(given.breaks, counts)
            breaks[np.arange(len(tokens)) > np.repeat(np.cumsum(counts) - counts, counts)] = 0
        if self.merged_delimiter_id is not None:
            merges = tokens == self.merged_delimiter_id
            keep = ~(merges & np.concatenate([[False], merges[:-1]]))
            if given.breaks is not None:  # the next token of an image whose delimiter goes begins it
                breaks[1:][~keep[:-1]] = np.maximum(breaks[1:], breaks[:-1])[~keep[:-1]]
            arrays = {name: values[keep] for name, values in arrays.items()}
        return Example(
            **arrays,
            positions=self._positions(np.where(arrays["vision_index"] >= 0, arrays["media"], 0), media),
            **packing.join_media(media, self.image_processor.patch_values, self.model.encoder.position_values),
            sizes=tuple(Sizes(m.original, m.resized) for m in media),
            origin=conversation.origin,
            is_document=isinstance(conversation, Document),
        )

    def _written(self, item: MediaPatches, placeholder: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that stand for an image or video, and whether a vision token feeds each."""
        pieces = [
            np.full(run, placeholder, np.int32) if isinstance(run, int) else self._ids_of(run) for run in item.runs
        ]
        fed = [np.full(len(p), isinstance(run, int)) for p, run in zip(pieces, item.runs, strict=True)]
        return np.concatenate(pieces), np.concatenate(fed)

    def _ids_of(self, text: str) -> np.ndarray:
        if text not in self._tokenized:
            self._tokenized[text] = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        return self._tokenized[text]

    def _positions(self, number: np.ndarray, media: list[MediaPatches]) -> np.ndarray:
        """Return rotary ids [s, 3] of every token: M-RoPE's, or for other decoders the token's index three times.

        ``number`` is the image or video whose vision token feeds the token, from 1; 0 for text and delimiters.
        """
        length = len(number)
        if not self.model.decoder.uses_mrope:
            return np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, 1)
        before = np.concatenate([[0], number[:-1]])
        spans = [
            mrope.MediaSpan(int(start), item.grid, item.temporal_step)
            for n, item in enumerate(media, 1)
            if item.grid is not None
            for start in np.flatnonzero((number == n) & (before != n))  # of each run of its tokens
        ]
        return mrope.mrope_positions(length, spans)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the processor that Hugging Face's files cannot hold."""
        return config_tree.to_dict(self.config)


def _upscaled(part: Image, image: PIL.Image.Image) -> PIL.Image.Image:
    size = part.upscaled_size(image.size)
    return image if size == image.size else image.resize(size, PIL.Image.Resampling.BICUBIC)


def _is_decoded(source: Any) -> bool:
    return isinstance(source, PIL.Image.Image | np.ndarray)


def _field_of(part: Image | Video) -> str:
    return f"{'images' if isinstance(part, Image) else 'videos'}[{part.index}]"


def _prompt(conversation: Conversation) -> Conversation:
    """Return the conversation up to the answer to give. Raises ExampleError where nothing is asked."""
    prompt = without_answer(conversation)
    if not any(message.role in ("user", "tool") for message in prompt.messages):
        raise ExampleError(conversation.origin, "messages", "nothing to answer", "Give a user turn before the answer")
    return prompt
