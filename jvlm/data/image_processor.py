"""What turns images and videos into the patches of an encoder, on the host, before the device sees anything.

Each family has its own: settings (`ImageProcessorConfig`), and the `ImageProcessor` that they build for a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from jvlm.data import values
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.values import shown
from jvlm.data.video.sampling import Sampling, SizeRule
from jvlm.errors import UserError
from jvlm.tags import Tagged

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

# The most pixels that one example may ask for: more would only exhaust memory, and Pillow refuses such files too.
MAX_PIXELS = 2**27
EXAMPLE_FIELD = "chat_template_kwargs"


@dataclasses.dataclass(frozen=True)
class Limit:
    """What an example or the command line may set a field to.

    Attributes:
      least, most: the interval, both ends included.
      whole: whether only whole numbers are allowed.
      at_most: name of the field that must not be smaller.
      help: what the field does, for the command line.
    """

    least: float = 1
    most: float = math.inf
    whole: bool = True
    at_most: str | None = None
    help: str = ""

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value; None if nothing is."""
        number = values.whole(value) if self.whole else values.number(value)
        if number is None or number <= 0:
            return f"{shown(value)} is not a positive {'whole ' if self.whole else ''}number"
        if not self.least <= number <= self.most:
            return f"{shown(number)} is not within {self.least} to {self.most}"
        return None


@dataclasses.dataclass(frozen=True)
class ImageProcessorConfig(Tagged):
    """Base of the settings of image processors; saved with every model.

    Class attributes:
      limits: the fields that an example (in ``chat_template_kwargs``) and the command line may change.
    """

    limits: ClassVar[Mapping[str, Limit]] = {}

    def build(self, model: VLMConfig) -> ImageProcessor:
        """Return the image processor of a model."""
        raise NotImplementedError(f"{type(self).__name__} defines no build()")

    @classmethod
    def checked(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return values for some of `limits`, each of its type.

        Raises:
          FieldError: a field that may not be changed, or a value outside its limits.
        """
        new: dict[str, Any] = {}
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in cls.limits:
                known = ", ".join(sorted(cls.limits))
                raise FieldError(name, "not a setting of this model's images", f"Use {known}")
            limit = cls.limits[name]
            if value is None and defaults[name] is None:
                new[name] = None
                continue
            problem = limit.problem(value)
            if problem:
                raise FieldError(name, problem, "Correct or remove it")
            new[name] = values.whole(value) if limit.whole else values.number(value)
        for name, value in new.items():
            most = cls.limits[name].at_most
            if value is not None and new.get(most) is not None and value > new[most]:
                raise FieldError(name, f"{name} {value} exceeds {most} {new[most]}", "Lower the one or raise the other")
        return new

    def changed(self, fields: Mapping[str, Any]) -> ImageProcessorConfig:
        """Return the settings with some of `limits` changed. Raises FieldError as `checked`, or as the settings do."""
        new = self.checked(fields)
        try:
            return dataclasses.replace(self, **new)
        except UserError as error:
            raise FieldError(", ".join(new), str(error), "Correct or remove it") from error

    def sampling(self) -> Sampling:
        """Return which frames of a video file are taken."""
        return Sampling()

    def for_video(self, frames: int, fps: float, *, is_resized: bool) -> ImageProcessorConfig:
        """Return the settings for a video of so many frames a second.

        Args:
          frames: of the video, as it was sampled.
          fps: sampled frames a second.
          is_resized: the frames have the size that `ImageProcessor.frame_size` gave for these settings.
        """
        return self

    def for_example(self, fields: Mapping[str, Any], origin: Origin = Origin()) -> ImageProcessorConfig:
        """Return the settings with what an example changes. Raises ExampleError for what it may not."""
        if not fields:
            return self
        try:
            return self.changed(fields)
        except FieldError as error:
            raise ExampleError(origin, f"{EXAMPLE_FIELD}.{error.field}", error.problem, error.fix) from error


class FieldError(UserError):
    """A field of an image processor that cannot be set so.

    Attributes:
      field, problem, fix: its name, what is wrong, and what to do.
    """

    def __init__(self, field: str, problem: str, fix: str):
        super().__init__(f"{field}: {problem}. {fix}")
        self.field, self.problem, self.fix = field, problem, fix


@dataclasses.dataclass(frozen=True)
class MediaPatches:
    """One image or video, ready for the encoder: n patches, f vision tokens, t text tokens that they feed.

    Attributes:
      patches: uint8 [n, c] in the order the encoder wants them.
      segment_ids: int32 [n], from 1, contiguous and ascending: the image, tile, crop or video frame of each patch.
      window_ids: int32 [n], from 1, contiguous and ascending: the attention window of each patch.
      positions: int32 [n, `EncoderConfig.position_values`], (h, w) in patches within the segment, or in the encoder's
        position table; then what else of the place the encoder reads.
      token_segment_ids: int32 [f], the segment of each vision token, ascending.
      vision_index: int32 [t], which vision token feeds each of the text tokens.
      token_pattern: what stands in the text for the image or video: strings, which are tokenized as they are, and
        numbers, for so many of the t tokens; empty is all of them in one run.
      leading_text: words that belong to the text before the placeholder, and are tokenized with it: the time of the
        first frames of a video.
      trailing_text: the same behind the placeholder.
      grid: (t, h, w) of each run of tokens, for M-RoPE; None has text's positions.
      temporal_step: M-RoPE distance between temporal patches (seconds x tokens per second); 0 for an image.
      original, resized: (width, height) in pixels; boxes are converted from one to the other.
    """

    patches: np.ndarray
    segment_ids: np.ndarray
    window_ids: np.ndarray
    positions: np.ndarray
    token_segment_ids: np.ndarray
    vision_index: np.ndarray
    original: tuple[int, int]
    resized: tuple[int, int]
    token_pattern: tuple[str | int, ...] = ()
    leading_text: str = ""
    trailing_text: str = ""
    grid: tuple[int, int, int] | None = None
    temporal_step: float = 0.0

    @property
    def runs(self) -> tuple[str | int, ...]:
        """The token pattern, written out."""
        return self.token_pattern or (self.vision_index.size,)


class ImageProcessor(Protocol):
    """Makes patches of images and videos for one model.

    Its methods are given settings of the type that built it: an example may have changed their `limits`.

    Attributes:
      patch_values: values of a flattened patch.
      patch_group: the number of patches in a packed sequence must be a multiple of this.
      delimiter_tokens: special tokens that token patterns write around vision tokens; never generated.
      merged_delimiter: the delimiter of which one is kept where two meet; None if there is no such token.
    """

    patch_values: int
    patch_group: int
    delimiter_tokens: tuple[str, ...]
    merged_delimiter: str | None

    def image(self, image: Image.Image, config: ImageProcessorConfig, *, index: int, count: int) -> MediaPatches:
        """Return image ``index`` (from 0) of the ``count`` images of a conversation. Raises UserError for a bad one."""
        ...

    def video(
        self, frames: Sequence[Image.Image], config: ImageProcessorConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video, given as frames of one size. Raises UserError for one it cannot take.

        ``times`` are the frames' in seconds from the first of the file; None where nothing says them.
        """
        ...

    def frame_size(self, config: ImageProcessorConfig) -> SizeRule | None:
        """Return what frames of a file are resized to when they are decoded; None keeps their size.

        The function must be picklable without a model: it runs in a process without jax.
        """
        ...

    def max_image_patches(self, config: ImageProcessorConfig) -> int | None:
        """Return the most patches that an image, tile or video frame gets; None if there is no limit."""
        ...

    def reductions(self, config: ImageProcessorConfig) -> Sequence[Sequence[dict[str, Any]]]:
        """Return ways to make images cost less, the mildest way first.

        Each is a list of changed fields, from a little to most. Along a list tokens and patches never grow.
        """
        ...
