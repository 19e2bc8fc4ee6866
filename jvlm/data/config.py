"""The settings of the data. Imports nothing heavy: the command line and experiments need no reader of data."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jvlm.data.choices import LossChoice, Order
from jvlm.data.document_config import DocumentConfig
from jvlm.data.few_shot_config import FewShot
from jvlm.data.mixture.config import Mixture
from jvlm.data.video.config import VideoConfig
from jvlm.errors import UserError
from jvlm.validation import check_fields

# what is drawn for each example, and so is not the same for two answers
_DRAWN = (
    "single_turn_ratio shuffle_turns media_first newline_probability image_choices few_shot upscale_probability".split()
)
_LEAST_WINDOW, _MOST_WINDOW = 512, 2048  # examples of a packing window


@dataclasses.dataclass(frozen=True)
class ImageChoice:
    """Settings of the image processor that some of the examples get.

    Attributes:
      settings: fields of ``processor.image``, as NAME=VALUE: split=false, or longest_edge=448.
      weight: share of the examples beside the other choices.
    """

    settings: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self):
        check_fields(self, "data.image_choices.", {"weight": "(0, inf)"})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is packed.

    Attributes:
      train: files or globs of examples of any kind that is read (docs/data.md), or datasets on the Hub
        (ORG/NAME:SUBSET:SPLIT); FILE#N takes N of them, repeating them if it has fewer. Short for a mixture of a single
        source.
      mixture: data sources that are drawn from by weight, in the place of ``train`` (`jvlm.data.mixture`).
      format: format of the examples of ``train`` (`jvlm.data.formats.detection`); "auto" decides for each file or glob,
        on its first 100 examples.
      columns: "FROM=TO" gives a column another name before the format is looked for, "FROM=_" hides one.
      caption_prompt: a user's text before captions; None makes a document of image and caption.
      answer_as_turn: whether the answer of an EasyR1 example is an assistant's turn as well, to train on.
      media_root: folder for relative media paths, after the data file's own.
      media_folders: folders that files of images and videos must lie in, links resolved: for data that others wrote,
        whose paths may name anything. Empty allows all.
      animated_images: whether a GIF, WebP, PNG or AVIF that moves is an error among the images, or its first frame is
        taken. As a video all of it is seen.
      batch_size: sequences of a batch (of one accumulation step), all processes together.
      seq_len: tokens of a packed sequence, padding included. "auto" chooses it, and ``max_patches``, from a sample of
        the data, so that little of it is padding (`jvlm.data.survey`); the choice is printed, and saved with the run.
      max_patches: image patches of a packed sequence; 0 is a text-only run, "auto" as for ``seq_len``.
      max_length: longest conversation in tokens; None allows a whole sequence. A small value makes attention cheaper.
      max_image_patches: most patches an image or frame may have; None takes what the media configuration allows, or the
        largest of a sample of the data if that is more.
      on_too_long: what becomes of a conversation that does not fit a sequence, or of an image above
        ``max_image_patches``: stop; leave the conversation out; drop whole turns from its end; or shrink its images
        until it fits. One that still does not fit is left out. What is left out is counted in the log and listed.
      max_too_long_fraction: stop when more than this share of the examples read was left out because it did not fit.
      on_bad_example: stop, or leave the example out; either way examples left out are counted and listed.
      max_bad_fraction: with "skip", stop when more than this share of the examples read was bad.
      shuffle: order of the examples of a source, a new one each epoch, from the seed: "global" over all of them;
        "blocks" mixes those of some blocks at a time, for files that are slow to read out of order; "auto" does so for
        files that are read in blocks, and for shards in an object store, and shuffles others globally; "none" is that
        of the files.
      run_examples: examples drawn in the run, of which a schedule of ``mixture`` and ``max_epochs`` count in shares;
        None estimates them at the start.
      lengths_folder: where files of examples' lengths are (`jvlm.data.lengths`).
      measured: mean tokens of an example, or what else ``mixture.unit`` counts, of each source; empty measures them at
        the start.
      single_turn_ratio: share of the conversations, drawn anew each epoch, of which one turn is trained on, without its
        history (jvlm.data.turns). Where answers give one another away, this is what teaches a model to look. The
        turn is drawn in proportion to its loss weight.
      loss: what has a loss where an example does not say so itself: "answers", every assistant turn; "last_answer", the
        last one of each conversation; "all", prompts as well, but no media. ms-swift calls them default, last_round and
        all. None is "answers" of conversations and "all" of documents, which have no answers.
      preference: what is learnt of examples: "none" the answers; "pairs" that a chosen answer is better than a rejected
        one (DPO and its relatives, reward models); "labels" that an answer is good or bad by itself (KTO). The last
        answer of each conversation counts, unless ``loss`` or the example says otherwise (`jvlm.data.preferences`).
      documents: how documents are read: pages with images, captions, text alone (`jvlm.data.document_config`).
      video: how video files are decoded.
      shuffle_turns: give the questions of a conversation, with their answers, another order each epoch
        (`jvlm.data.augmentation`); images come first. Examples with ``"ordered": true`` keep theirs.
      max_turns: with ``shuffle_turns``, questions that stay of a conversation in an epoch; None is all.
      media_first: move images and videos to the front of a conversation's first question, as ``shuffle_turns`` does.
      newline_probability: share of the users' turns whose words begin on a new line, drawn anew each epoch; Idefics2's
        fine-tuning takes 0.05.
      image_choices: settings of the image processor of which each example gets one, drawn anew each epoch: half of the
        examples' images split, say. Empty takes those of the processor for all.
      few_shot: demonstrations before each example (`jvlm.data.few_shot`); None has none.
      upscale_probability: share of the images that are made larger before the image processor sees them, drawn anew
        each epoch; Idefics2's fine-tuning takes 0.5.
      upscale_range: smallest and largest factor; it is drawn from a triangular distribution that rises to the largest.
      upscale_longest_edge: no image is made larger than this along its longer side.
      curves: log loss and accuracy of each data source as well: each file or glob of ``train``, if there are several;
        or each ``channel`` that examples name; or "off".
      sources: their names; empty takes those of the configuration, or the channels of a sample of the data, and the
        rest as "other".
      pack_window: examples considered together for packing, from the headers of their images; "auto" is 2,048, or half
        of the data if that is less, and at least 512. The frames of their video files are all in memory: with long
        videos take less.
      read_threads: threads that decode and encode.
      worker_processes: processes instead of threads; 0 is none. For data too heavy for one process.
      prefetch: batches prepared ahead.
    """

    train: tuple[str, ...] = ()
    mixture: Mixture | None = None
    format: str = "auto"
    columns: tuple[str, ...] = ()
    caption_prompt: str | None = None
    answer_as_turn: bool = False
    media_root: str | None = None
    media_folders: tuple[str, ...] = ()
    animated_images: Literal["error", "first_frame"] = "error"
    batch_size: int = 1
    seq_len: int | Literal["auto"] = 4096
    max_patches: int | Literal["auto"] = 8192
    max_length: int | None = None
    max_image_patches: int | None = None
    on_too_long: Literal["error", "drop", "truncate", "shrink"] = "drop"
    max_too_long_fraction: float = 0.25
    on_bad_example: Literal["error", "skip"] = "error"
    max_bad_fraction: float = 0.001
    shuffle: Order = "auto"
    run_examples: int | None = None
    lengths_folder: str = "lengths"
    measured: tuple[float, ...] = ()
    single_turn_ratio: float = 0.0
    loss: LossChoice | None = None
    preference: Literal["none", "pairs", "labels"] = "none"
    documents: DocumentConfig = DocumentConfig()
    video: VideoConfig = VideoConfig()
    shuffle_turns: bool = False
    max_turns: int | None = None
    media_first: bool = False
    newline_probability: float = 0.0
    image_choices: tuple[ImageChoice, ...] = ()
    few_shot: FewShot | None = None
    upscale_probability: float = 0.0
    upscale_range: tuple[float, float] = (1.5, 2.0)
    upscale_longest_edge: int = 980
    curves: Literal["dataset", "channel", "off"] = "dataset"
    sources: tuple[str, ...] = ()
    pack_window: int | Literal["auto"] = "auto"
    read_threads: int = 4
    worker_processes: int = 0
    prefetch: int = 4

    def __post_init__(self):
        counts = "batch_size seq_len max_length max_image_patches pack_window read_threads prefetch max_turns".split()
        counts += ["upscale_longest_edge", "run_examples"]
        shares = (
            "max_too_long_fraction max_bad_fraction single_turn_ratio upscale_probability newline_probability".split()
        )
        bounds = {**dict.fromkeys(counts, "[1, inf)"), **dict.fromkeys(shares, "[0, 1]")}
        check_fields(self, "data.", {**bounds, "max_patches": "[0, inf)", "worker_processes": "[0, inf)"})
        if self.train and self.mixture is not None:
            raise UserError("data.train is short for a mixture of one source: give it or data.mixture, not both")
        low, high = self.upscale_range
        if not 1 <= low <= high < math.inf:
            raise UserError(f"data.upscale_range is a smaller and a larger factor, both from 1 on, got {low}, {high}")
        if self.max_turns is not None and not self.shuffle_turns:
            raise UserError("data.max_turns chooses among shuffled turns: set data.shuffle_turns true")
        if self.preference != "none":
            self._check_preference()

    def _check_preference(self) -> None:
        """Raise UserError for what would change one answer of a pair and not the other."""
        if self.drawn:
            raise UserError(f"data.{self.drawn[0]} does not go with data.preference {self.preference!r}: leave it out")
        if self.on_too_long == "truncate":
            raise UserError(
                f"data.on_too_long 'truncate' does not go with data.preference {self.preference!r}: an answer that was "
                "cut is another one; take drop, error, or shrink, which makes the images smaller"
            )
        if self.loss == "all":
            raise UserError(
                f"data.loss 'all' does not go with data.preference {self.preference!r}: prompts say nothing"
            )

    @property
    def drawn(self) -> tuple[str, ...]:
        """Return the settings in use that change examples, most of them as is drawn for each."""
        return tuple(name for name in _DRAWN if getattr(self, name))

    @property
    def files(self) -> tuple[str, ...]:
        """Files or globs of all sources with a weight."""
        from jvlm.data.mixture.plan import enters

        if self.mixture is None:
            return self.train
        return tuple(dict.fromkeys(file for source in enters(self.mixture).values() for file in source.files))

    def window(self, examples: int = 0) -> int:
        """Return the examples that are packed together of data that has so many; "auto" is the least without them."""
        if self.pack_window != "auto":
            return self.pack_window
        return max(_LEAST_WINDOW, min(_MOST_WINDOW, examples // 2))

    @property
    def decoded_ahead(self) -> int:
        """Batches of ``prefetch`` that are decoded beside the next one, so that all workers always have images."""
        return self.prefetch // 2

    @property
    def longest(self) -> int:
        """Most tokens of a conversation."""
        return min(self.seq_len, self.max_length or self.seq_len)
