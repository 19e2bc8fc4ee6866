"""The settings of a processor, and the file that they are saved in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jvlm import config as config_tree
from jvlm import json_files
from jvlm.data import box_formats
from jvlm.data.boxes import CoordinateSpace
from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.data.time_formats import TimeFormat
from jvlm.errors import UserError

SETTINGS = "jvlm_processor.json"


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """How examples become tokens and pixels; saved with every model so that training and inference agree.

    Attributes:
      image: settings of the image processor; None takes the family's.
      box_format: how boxes and points are written, a name of `jvlm.data.box_formats.FORMATS`; None takes the family's.
      box_space: replaces the space of the format's numbers.
      time_format: how moments and spans of videos are written: "clock" is [mm:ss, mm:ss], "seconds" [12.4s, 31.0s],
        "frames" [<12.4 seconds>, <31.0 seconds>].
      default_system: replaces the system turn that the template would insert; None leaves it to the template.
      document_end: token that ends a document (an example without turns); None takes the tokenizer's end of text.
    """

    image: ImageProcessorConfig | None = None
    box_format: box_formats.FormatName | None = None
    box_space: CoordinateSpace | None = None
    time_format: TimeFormat = "clock"
    default_system: str | None = None
    document_end: str | None = None


def read_settings(folder: Path) -> ProcessorConfig | None:
    """Return the `ProcessorConfig` saved in a folder, if there is one."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    values = json_files.read_object(path)
    try:
        return config_tree.from_dict(ProcessorConfig, values, "processor.")
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}; copy the folder again, or correct the value") from error
