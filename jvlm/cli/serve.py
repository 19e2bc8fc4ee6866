"""``jvlm serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from jvlm.cli.model import ModelOptions
from jvlm.errors import UserError
from jvlm.options import FLAT
from jvlm.server.arguments import ServerArguments, engine_config, settings_of
from jvlm.swift import words as swift_words

_MODULES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "pebble")
_OF_FRONT = ("host", "port", "data_parallel_size", "no_log_requests")


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model: jvlm serve MODEL [options].

    Attributes:
      model: a Hugging Face folder, a jvlm run folder, or an id on the Hub; None with --backends alone.
      lora: NAME=FOLDER of each adapter; requests name one as their model.
      dtype: dtype of the parameters; None is float32.
      quantization: hold the matrices of the language model in 8 bits (int8, fp8) or 4 (nf4); None leaves them.
      server: where the server listens, who may ask, and how much.
    """

    model: str | None = None
    lora: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    quantization: Literal["int8", "fp8", "nf4"] | None = None
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
    if options.server.backends:
        if options.model is not None:
            raise UserError("--backends are servers with models of their own: give them, or a model")
        return start_front(options.server, list(options.server.backends))
    if options.model is None:
        raise UserError("jvlm serve: give a model, as jvlm serve DIR or --model DIR; or --backends")
    unnamed = [word for word in options.lora if "=" not in word]
    if unnamed:
        raise UserError(f"--lora {unnamed[0]}: give NAME=FOLDER, requests name NAME as their model")
    model = ModelOptions(options.model, options.lora, options.dtype, options.quantization, parallel=None)
    return start(model, options.server, "serve", words)


def start(options: ModelOptions, arguments: ServerArguments, verb: str, words: list[str]) -> int:
    """Load a model and serve it until the process is asked to stop.

    Args:
      verb, words: of the command line, for the processes of several engines.
    """
    adapters = tuple(word.partition("=")[0] for word in options.adapters if "=" in word)
    name = Path(options.model).name or options.model
    told = functools.partial(settings_of, arguments, name=name, adapters=adapters)
    told(max_model_len=1)  # mistakes are told before the model is loaded, which takes long
    engine_config(arguments, on_cpu=False)
    if arguments.data_parallel_size > 1:
        return _start_replicas(arguments, verb, words)
    import jax

    if arguments.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", arguments.compile_cache)
    from jvlm.adapters.several import AdapterRoom
    from jvlm.cli.model import load
    from jvlm.inference.adapter_slots import AdapterSlots
    from jvlm.inference.engine import Engine
    from jvlm.inference.requests import SamplingParams
    from jvlm.server import start as server

    from_start = dict(word.split("=", 1) for word in options.adapters if "=" in word)
    kept = dataclasses.replace(options, adapters=()) if arguments.max_loras else options
    model, processor, layout = load(kept)
    slots = None
    if arguments.max_loras:
        room = AdapterRoom.of_model(
            arguments.max_lora_rank,
            towers=arguments.enable_tower_connector_lora,
            experts=arguments.enable_expert_lora,
        )
        slots = AdapterSlots(model, from_start, places=arguments.max_loras, room=room)
        model = slots.model
    engine = Engine(model, processor, engine_config(arguments, on_cpu=jax.default_backend() == "cpu"), layout)
    if layout is not None:
        axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1)
        print(f"jvlm: the model is on {layout.mesh.size} devices: {axes}", file=sys.stderr)
    pages = engine.size_cache()  # too little memory is told before anybody can ask
    if pages is not None:
        print(f"jvlm: {pages} pages of cache within the memory", file=sys.stderr)
    service = server.service_of(
        engine,
        processor,
        told(max_model_len=arguments.max_model_len or model.config.decoder.max_position_embeddings),
        end_ids=frozenset(engine.stop_tokens(SamplingParams())),
        slots=arguments.max_num_seqs,
        warm_up=functools.partial(engine.warm_up, _report),
    )
    admin = None if slots is None or arguments.adapter_root is None else server.admin_of(service, slots, engine.load)
    for line in server.describe(service, arguments.host, arguments.port):
        print(line, file=sys.stderr)
    return server.run(service, arguments.host, arguments.port, log_requests=not arguments.no_log_requests, admin=admin)


def _start_replicas(arguments: ServerArguments, verb: str, words: list[str]) -> int:
    """Start a process for each engine, and answer before them."""
    from jvlm.server.replicas import Replicas, command_of, device_shares

    shares = device_shares(arguments.data_parallel_size, os.environ)
    own = swift_words.without(words, _OF_FRONT)
    with Replicas(command_of([*own, "--no_log_requests"], verb), shares) as replicas:
        start_front(arguments, replicas.urls)
        return int(replicas.has_failed)


def start_front(arguments: ServerArguments, urls: list[str]) -> int:
    """Answer before servers that run already, until the process is asked to stop."""
    from jvlm.server import front
    from jvlm.server.listen import listen, print_line

    settings = settings_of(arguments, name="front", adapters=(), max_model_len=1)
    print_line(f"jvlm answers at http://{arguments.host}:{arguments.port}/v1 for {', '.join(urls)}")
    log = None if arguments.no_log_requests else print_line
    listen(front.build(urls, settings, log=log), settings.limits, arguments.host, arguments.port)
    return 0


def _report(name: str, seconds: float) -> None:
    print(f"jvlm: compiled {name} in {seconds:.1f} s", file=sys.stderr)
