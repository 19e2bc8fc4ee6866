"""``jvlm serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Literal

from jvlm.cli.model import ModelOptions
from jvlm.errors import UserError
from jvlm.options import FLAT
from jvlm.server.arguments import ServerArguments, draft_tokens, settings_of
from jvlm.swift import words as swift_words

_MODULES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "pebble")


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model: jvlm serve MODEL [options].

    Attributes:
      model: a Hugging Face folder, a jvlm run folder, or an id on the Hub.
      lora: NAME=FOLDER of each adapter; requests name one as their model.
      dtype: dtype of the parameters; None is float32.
      server: where the server listens, who may ask, and how much.
    """

    model: str
    lora: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    server: Annotated[ServerArguments, FLAT] = ServerArguments()


def check_installed() -> None:
    """Raise UserError where the extra of the server is lacking."""
    lacking = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"serving needs {', '.join(lacking)}: pip install 'jvlm[serve]'")


def run(words: list[str]) -> int:
    check_installed()

    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    parsed = swift_words.parse(Serve, words, "jvlm serve")
    for note in parsed.notes:
        print(f"jvlm: {note}", file=sys.stderr)
    options = parsed.arguments
    unnamed = [word for word in options.lora if "=" not in word]
    if unnamed:
        raise UserError(f"--lora {unnamed[0]}: give NAME=FOLDER, requests name NAME as their model")
    model = ModelOptions(options.model, options.lora, options.dtype, parallel=None)
    return start(model, options.server)


def start(options: ModelOptions, arguments: ServerArguments, keys: tuple[tuple[str, str], ...] = ()) -> int:
    """Load a model and serve it until the process is asked to stop.

    Args:
      options: `jvlm.cli.model.ModelOptions`.
      arguments: `jvlm.server.arguments.ServerArguments`.
      keys: (name, key) pairs beside those of a file.
    """
    adapters = tuple(word.partition("=")[0] for word in options.adapters if "=" in word)
    name = Path(options.model).name or options.model
    told = functools.partial(settings_of, arguments, name=name, adapters=adapters, keys=keys)
    drafts = draft_tokens(arguments.speculative)
    told(max_model_len=1)  # mistakes are told before the model is loaded, which takes long
    from jvlm.cli.model import load
    from jvlm.inference.engine import Engine
    from jvlm.inference.requests import EngineConfig, SamplingParams
    from jvlm.server import start as server

    model, processor, layout = load(options)
    sizes = {"draft_tokens": drafts, "max_slots": arguments.max_num_seqs, "max_model_len": arguments.max_model_len}
    if arguments.max_num_batched_tokens is not None:
        most = arguments.max_num_batched_tokens
        kept = tuple(size for size in EngineConfig.prefill_tokens if size < most)
        sizes["prefill_tokens"] = (*kept, most)
    engine = Engine(model, processor, EngineConfig(**sizes), layout)
    context = arguments.max_model_len or model.config.decoder.max_position_embeddings
    service = server.service_of(
        engine,
        processor,
        told(max_model_len=context),
        end_ids=frozenset(engine.stop_tokens(SamplingParams())),
        slots=arguments.max_num_seqs,
        warm_up=functools.partial(engine.warm_up, _report),
    )
    for line in server.describe(service, arguments.host, arguments.port):
        print(line, file=sys.stderr)
    server.run(service, arguments.host, arguments.port, log_requests=not arguments.no_log_requests)
    return 0


def _report(name: str, seconds: float) -> None:
    print(f"jvlm: compiled {name} in {seconds:.1f} s", file=sys.stderr)
