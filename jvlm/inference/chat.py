"""Talking with a model in the terminal. Commands are those of ms-swift's ``infer``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable

from jvlm.data.boxes import Box
from jvlm.data.content import Conversation, Message
from jvlm.data.errors import ExampleError
from jvlm.data.examples import image_tags, user_message
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.generate import encode_prompt, engine_for, stream_example
from jvlm.inference.sampling import SamplingConfig
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.weights.finite import BrokenWeights

HELP = """Commands: quit or exit; clear (forget the conversation); reset-system (give a new system prompt);
multi-line (input goes on until a line that ends with #); single-line (back to one line).
Write <image> where an image goes; you will be asked for its path. Ctrl-C ends an answer."""

_COMMANDS = ("quit", "exit", "clear", "reset-system", "multi-line", "single-line")


@dataclasses.dataclass
class Session:
    """The conversation so far, and how input is read."""

    system: str | None
    multi_line: bool = False
    turns: list[Message] = dataclasses.field(default_factory=list)

    def clear(self) -> None:
        self.turns = []

    def asked(self, question: str, images: list[str]) -> list[Message]:
        """Return the turns so far and a question; raises ExampleError for another number of tags than of images."""
        first = sum(len(message.media) for message in self.turns)
        return [*self.turns, user_message(question, images, first=first)]

    def conversation(self, turns: list[Message]) -> Conversation:
        """Return turns with the system prompt in front."""
        system = [] if self.system is None else [Message("system", self.system)]
        return Conversation((*system, *turns))


def chat(
    model: VLM,
    processor: Processor,
    sampling: SamplingConfig = SamplingConfig(),
    system: str | None = None,
    *,
    layout: MeshLayout | None = None,
    adapter: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
) -> None:
    """Ask and answer until ``quit``, ``exit``, Ctrl-C at the prompt or the end of input.

    Whatever goes wrong with an answer is one line, and the conversation is as it was before the question.

    Answers are shown as they are made. Boxes in them, which are in pixels of the image as the model sees it, are
    shown again in pixels of the original image, the last one if there are several.

    Args:
      system: the system turn; None leaves it to the model's template.
      layout: as in `generate`.
      adapter: name of the adapter that answers, in a model that has several.
      read: shows a prompt and returns a line, as `input` does, raising EOFError at the end.
      write: shows text as it stands, without a newline of its own.
    """
    engine = engine_for(model, processor, layout)
    show = write or _print
    session = Session(system)
    show(HELP + "\n")
    while True:
        try:
            query = _read_query(session, read)
            if query in ("quit", "exit"):
                return
            if not query or _command(query, session, read):
                continue
            images = [_read(read, "Path of the image <<< ").strip() for _ in range(image_tags(query))]
        except (EOFError, KeyboardInterrupt):
            show("\n")
            return
        except UserError as error:
            show(f"{error}\n")
            continue
        _answer(engine, session, query, images, sampling, show, adapter)


def _answer(
    engine: Engine,
    session: Session,
    question: str,
    images: list[str],
    sampling: SamplingConfig,
    show: Callable[[str], None],
    adapter: str | None,
) -> None:
    """Show the answer to a question and add both to the session; neither if there is none, after a line of why."""
    answer, note = "", None
    try:
        turns = session.asked(question, images)
        example = encode_prompt(engine, session.conversation(turns))
        pieces = stream_example(engine, example, sampling, adapter)
        while True:
            piece = next(pieces)
            show(piece)
            answer += piece
    except StopIteration as end:
        note = end.value
    except KeyboardInterrupt:
        show(" [stopped]")
        if not answer:
            show("\n")
            return
    except ExampleError as error:
        # the example is the session's: its number means nothing to who types
        show(_line(f"{error.field}: {error.problem}. {error.fix}"))
        return
    except BrokenWeights:  # no other question would be answered
        raise
    except (UserError, RuntimeError, MemoryError) as error:
        show(("\n" if answer else "") + _line(f"no answer ({str(error) or type(error).__name__})"))
        return
    show("\n" + original_boxes(answer, engine.processor, example))
    if note:
        show(_line(f"[{note}; clear forgets the conversation]"))
    session.turns = [*turns, Message("assistant", answer)]


def _line(text: str) -> str:
    return " ".join(text.split()) + "\n"


def original_boxes(answer: str, processor: Processor, example: Example) -> str:
    """A line with the boxes of an answer in pixels of the last image's original; empty if there are none."""
    detections = processor.read_regions(answer) if example.sizes else []
    boxed = [item for item in detections if isinstance(item.region, Box)]
    if not boxed:
        return ""
    sizes = example.sizes[-1]
    try:
        coordinates = [item.region.to("original", sizes).values for item in boxed]
    except (ValueError, OverflowError):  # numbers too large to be scaled
        return ""
    scaled = [
        {"bbox_2d": [round(v) for v in values], "label": item.label}
        for item, values in zip(boxed, coordinates, strict=True)
    ]
    width, height = sizes.original
    return f"[in pixels of the original image, {width} x {height}: {json.dumps(scaled, ensure_ascii=False)}]\n"


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


def _read(read: Callable[[str], str], question: str) -> str:
    """A line of input. Raises UserError for one that is not text: bytes that are no UTF-8, or half a surrogate pair."""
    try:
        line = read(question)
        line.encode()
    except UnicodeError as error:
        raise UserError(f"that line is not UTF-8 text ({error}), so it was left out; write it again") from error
    return line


def _read_query(session: Session, read: Callable[[str], str]) -> str:
    if not session.multi_line:
        return _read(read, "<<< ").strip()
    lines = [_read(read, "<<<[M] ")]
    while lines[-1].strip() not in _COMMANDS and not lines[-1].rstrip().endswith("#"):
        lines.append(_read(read, ""))
    if lines[-1].strip() in _COMMANDS:
        return lines[-1].strip()
    return "\n".join(lines).rstrip().removesuffix("#").strip()


def _command(query: str, session: Session, read: Callable[[str], str]) -> bool:
    """Carry out a command; False if the query is not one."""
    if query == "clear":
        session.clear()
    elif query == "reset-system":
        session.system = _read(read, "<<<[S] ").strip() or None
        session.clear()
    elif query in ("multi-line", "single-line"):
        session.multi_line = query == "multi-line"
    else:
        return False
    return True
