"""The processor files of a Hugging Face folder: which of them counts, and what their settings mean for pixels.

transformers 4 keeps the image processor in preprocessor_config.json and the video processor in
video_preprocessor_config.json. transformers 5 nests both in processor_config.json, and prefers what it finds there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from pathlib import Path
from typing import Any, NoReturn

from jvlm.errors import UserError
from jvlm.json_files import read_object_if_there

PROCESSOR, IMAGE, VIDEO = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
FILES = (PROCESSOR, IMAGE, VIDEO)
# Pillow's numbers of its resampling filters: NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING.
FILTERS = range(6)


def nested_first() -> bool:
    """Whether the installed transformers prefers processor_config.json to the other files."""
    return int(importlib.metadata.version("transformers").split(".")[0]) >= 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one image or video processor, and where they stand, for messages. null counts as absent."""

    values: dict[str, Any]
    source: str

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, problem: str) -> NoReturn:
        shown = repr(self.values[key]) if key in self.values else "absent"
        raise UserError(f"{self.source}: {key} is {shown}: {problem}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)  # null would be "off" in transformers, whatever the default
        if not isinstance(value, bool):
            self.refuse(key, "write true or false")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.refuse(key, "write a positive number")
        return value

    def channels(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """One number for each colour; a single number stands for all of them."""
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = [value] * len(default)
        good = isinstance(value, list | tuple) and len(value) == len(default)
        if not good or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            self.refuse(key, f"write {len(default)} numbers")
        return tuple(float(v) for v in value)

    def require(self, key: str, default: int, model: int) -> None:
        """Refuse a setting that must be the model's own."""
        if self.get(key, default) != model:
            self.refuse(key, f"{default} is assumed where it is absent, and the model has {model}; make them equal")

    def require_type(self, key: str, known: tuple[str, ...]) -> None:
        """Refuse a processor of another class, under any of the endings that classes have had."""
        value = self.get(key, known[0])
        if str(value).removesuffix("Fast").removesuffix("Pil") not in known:
            self.refuse(key, f"supported: {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class ProcessorFiles:
    """What a folder says about images and videos; None where it says nothing."""

    image: Settings | None = None
    video: Settings | None = None
    processor: Settings | None = None


def read(folder: Path) -> ProcessorFiles:
    """Return the settings in force, as the installed transformers chooses them among a folder's files."""
    nested = read_object_if_there(folder / PROCESSOR)

    def choose(part: str, *files: str) -> Settings | None:
        candidates = [
            Settings(read_object_if_there(folder / file), str(folder / file))
            for file in files
            if (folder / file).is_file()
        ]
        inner = nested.get(part)
        if inner is not None and not isinstance(inner, dict):
            Settings(nested, str(folder / PROCESSOR)).refuse(part, "write an object")
        if inner is not None:
            candidates.insert(
                0 if nested_first() else len(candidates), Settings(inner, f"{folder / PROCESSOR}, {part}")
            )
        return candidates[0] if candidates else None

    return ProcessorFiles(
        choose("image_processor", IMAGE),
        choose("video_processor", VIDEO, IMAGE),
        Settings(nested, str(folder / PROCESSOR)) if nested else None,
    )


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How an image becomes numbers: resized with a filter or not at all, then (byte / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    resize: bool = True


def read_pixels(settings: Settings | None, default: Pixels) -> Pixels:
    """Return ``settings`` over what a processor's class has by itself; rescaling becomes part of mean and std.

    do_convert_rgb does nothing here: without it transformers takes images in RGB only, and these are the same.

    Raises:
      UserError: a setting that has no meaning here, with its file.
    """
    if settings is None:
        return default
    resample = settings.get("resample", default.resample)
    if isinstance(resample, bool) or resample not in FILTERS:
        settings.refuse("resample", f"write the number of one of Pillow's filters, {FILTERS[0]} to {FILTERS[-1]}")
    # Always checked, so that a mistake in a setting which another one switches off is not met later.
    factor, normalise = settings.number("rescale_factor", 1 / 255), settings.flag("do_normalize", True)
    mean, std = settings.channels("image_mean", default.mean), settings.channels("image_std", default.std)
    if 0 in std:
        settings.refuse("image_std", "pixels cannot be divided by 0")
    if not settings.flag("do_rescale", True):
        factor = 1.0
    if not normalise:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    if factor != 1 / 255:
        mean, std = (tuple(v / (255 * factor) for v in values) for values in (mean, std))
    return Pixels(mean, std, int(resample), settings.flag("do_resize", default.resize))


def write_pixels(pixels: Pixels) -> dict[str, Any]:
    """Return the inverse of `read_pixels`."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": pixels.resize,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": pixels.resample,
        "rescale_factor": 1 / 255,
    }


def edges(settings: Settings, default: tuple[int, int], *, area: bool) -> tuple[int, int]:
    """(shortest, longest) edge, or least and most pixels, as far as ``size`` says so.

    Args:
      area: ``min_pixels`` and ``max_pixels`` beside ``size`` count before it.

    Raises:
      UserError: another kind of size, or half of one.
    """
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    size = settings.get("size", dict(zip(names, default, strict=True)))
    if not isinstance(size, dict):
        settings.refuse("size", "write an object with shortest_edge and longest_edge")
    beside = {key: name for key, name in names.items() if area and settings.get(name) is not None}
    unknown = set(size) - set(names) - set(beside.values())
    if unknown:
        settings.refuse("size", f"{', '.join(sorted(unknown))} cannot be used; write shortest_edge and longest_edge")
    limits = []
    for key, name in names.items():
        value = settings.get(name) if key in beside else size.get(key)
        whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        if not whole or value <= 0:
            settings.refuse(name if key in beside else "size", f"{key} must be a positive whole number, not {value!r}")
        limits.append(int(value))
    return limits[0], limits[1]


def check_order(settings: Settings, least: int, most: int) -> None:
    """Refuse limits that contradict each other."""
    if least > most:
        raise UserError(f"{settings.source}: the least size {least} exceeds the most, {most}; correct one")
