"""``jvlm data convert``: examples of any format, and their media, in a few large files."""

from __future__ import annotations

import dataclasses

from tyro.conf import Positional

from jvlm.cli.data_prepare import Shards
from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConvert(Shards):
    """Write examples and their media as ArrayRecord shards, which training reads faster and from object stores.

    Attributes:
      files: data files of any kind that is read, globs of them, folders of datasets, or datasets on the Hub.
      output: folder to write, on this machine or in a bucket (gs://, s3://); it must not hold shards. The same command
        goes on with an interrupted conversion.
      format: format of the examples; "auto" decides for each file or glob, on its first 100 examples.
      columns: FROM=TO gives a column another name, FROM=_ hides it.
      caption_prompt: a user's text before captions; without one they are documents.
      answer_as_turn: whether the answer of an EasyR1 example is an assistant's turn as well.
      media_root: folder for relative image paths, after the data file's own.
      rejected: JSONL file to write every example to that is left out.
      frames: store so many frames a second of each video in the place of its file, as JPEGs: training then decodes no
        video.
      frame_pixels: most pixels of such a frame.
      frame_quality: of its JPEG.
    """

    files: Positional[tuple[str, ...]] = ()
    output: str
    format: str = "auto"
    columns: tuple[str, ...] = ()
    caption_prompt: str | None = None
    answer_as_turn: bool = False
    media_root: str | None = None
    rejected: str | None = None
    frames: float | None = None
    frame_pixels: int = 768 * 784
    frame_quality: int = 90


def run(words: list[str]) -> int:
    options = parse(DataConvert, words, "jvlm data convert")
    if not options.files:
        raise UserError("jvlm data convert: no files; give data files, or globs of them")

    from jvlm.data.conversion import convert
    from jvlm.data.formats.example_format import FormatOptions
    from jvlm.data.rejections import writing
    from jvlm.data.video.stored_frames import FrameOptions

    formats = FormatOptions(options.format, options.columns, options.caption_prompt, options.answer_as_turn)
    frames = None
    if options.frames is not None:
        frames = FrameOptions(options.frames, max_pixels=options.frame_pixels, quality=options.frame_quality)
    with writing(options.rejected, options.files) as on_rejected:
        done = convert(
            options.files,
            options.output,
            options.examples_per_shard,
            options=formats,
            media_root=options.media_root,
            on_bad_example=options.on_bad_example,
            on_rejected=on_rejected if options.rejected else None,
            frames=frames,
            engine=options.engine_of(),
        )
    print(done.text())
    return 0
