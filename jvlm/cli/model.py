"""Options of commands that answer: which model, how, and on which devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from jvlm.errors import UserError
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.serving import RULES
from jvlm.options import FLAT, parse
from jvlm.parallel.mesh import ParallelConfig

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.data.vision import MediaConfig
    from jvlm.models.vlm import VLM
    from jvlm.parallel.layout import Layout


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model that answers, how, and on which devices.

    Attributes:
      model: a Hugging Face folder or a jvlm run folder.
      param_dtype: dtype of the parameters; None is float32.
      min_pixels: smallest picture after resizing; None takes the model's.
      max_pixels: largest picture after resizing; None takes the model's.
      sampling: how answers are made.
      parallel: how devices share the work. Without any of these options all devices do, by the model's heads.
    """

    model: str
    param_dtype: Literal["float32", "bfloat16"] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    sampling: Annotated[SamplingConfig, FLAT] = SamplingConfig()
    parallel: ParallelConfig | None = ParallelConfig(rules=RULES)


T = TypeVar("T")


def parse_model_command(kind: type[T], words: Sequence[str], program: str) -> T:
    """Return a command with a field ``model`` of `ModelOptions`; its mesh is None where nothing is said of it."""
    try:
        command = parse(kind, words, program)
    except UserError as error:
        raise UserError(str(error).replace("sampling.", "--", 1)) from error
    if any(word.startswith("--parallel.") for word in words):
        return command
    return dataclasses.replace(command, model=dataclasses.replace(command.model, parallel=None))


def load(options: ModelOptions) -> tuple[VLM, Processor, Layout | None]:
    """Return the model of the options, on the devices that they ask for, its processor, and its layout over them."""
    from jvlm.inference import serving
    from jvlm.weights import loading, run_folder

    folder = run_folder.local(options.model)
    config = loading.read_config(folder)
    if options.param_dtype:
        precision = dataclasses.replace(config.precision, param_dtype=options.param_dtype)
        config = dataclasses.replace(config, precision=precision)
    layout = serving.layout(config, options.parallel)
    place = layout.parameter if layout else None
    model, processor = loading.load(folder, precision=config.precision, sharding=place)
    processor.media = _media(options, processor.media)
    return model, processor, layout


def _media(options: ModelOptions, media: MediaConfig) -> MediaConfig:
    """Return the media settings with the limits that were typed. Raises UserError naming the option."""
    limits = {n: getattr(options, n) for n in ("min_pixels", "max_pixels") if getattr(options, n) is not None}
    known = {f.name for f in dataclasses.fields(media)}
    for name, value in limits.items():
        if name not in known:
            raise UserError(f"--{name} is not for this model; its pictures have {', '.join(sorted(known))}")
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    media = dataclasses.replace(media, **limits)
    if limits and media.min_pixels > media.max_pixels:
        raise UserError(f"--min_pixels is {media.min_pixels}, above --max_pixels {media.max_pixels}")
    return media
