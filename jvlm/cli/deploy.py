"""``jvlm deploy``: the server, with ms-swift's arguments."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Literal

from jvlm.cli.model import ImageOptions, ModelOptions
from jvlm.cli.serve import check_installed, start
from jvlm.errors import UserError
from jvlm.options import FLAT
from jvlm.server.arguments import ServerArguments
from jvlm.swift import words as swift_words
from jvlm.swift.arguments import ModelArguments


@dataclasses.dataclass(frozen=True)
class Deploy:
    """Serve a model, with ms-swift's arguments.

    Attributes:
      model: the model, and how it reads conversations.
      adapters: NAME=FOLDER of each adapter; requests name one as their model.
      quantization: hold the matrices of the language model in 8 bits (int8, fp8) or 4 (nf4); None leaves them.
      server: where the server listens, who may ask, and how much.
    """

    model: Annotated[ModelArguments, FLAT] = ModelArguments()
    adapters: tuple[str, ...] = ()
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    server: Annotated[ServerArguments, FLAT] = ServerArguments()


def run(words: list[str]) -> int:
    check_installed()

    parsed = swift_words.parse(Deploy, words, "jvlm deploy")
    for note in parsed.notes:
        print(f"jvlm: {note}", file=sys.stderr)
    options = parsed.arguments
    if options.model.model is None:
        raise UserError("jvlm deploy: give --model DIR")
    unnamed = [word for word in options.adapters if "=" not in word]
    if unnamed:
        raise UserError(f"--adapters {unnamed[0]}: give NAME=FOLDER, requests name NAME as their model")
    limits = {name: getattr(options.model, name, None) for name in ("min_pixels", "max_pixels")}
    model = ModelOptions(
        options.model.model,
        options.adapters,
        options.model.torch_dtype,
        options.quantization,
        images=ImageOptions(**{name: value for name, value in limits.items() if value is not None}),
        parallel=None,
    )
    return start(model, options.server, "deploy", words)
