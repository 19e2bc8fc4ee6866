"""The arguments of ``jvlm serve`` and ``jvlm deploy``, with vLLM's names where there is one, and what they mean."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.errors import UserError
from jvlm.inference.requests import EngineConfig
from jvlm.server.keys import read_keys
from jvlm.server.settings import MIB, HTTPLimits, KeyLimits, MediaRules, ServerSettings

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CPU_TOKENS, _CPU_SLOTS, _CPU_PATCHES = (64, 128, 256, 512, 1024, 2048), (1, 8, 16, 32, 64, 128), 256
_CACHE_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@dataclasses.dataclass(frozen=True)
class ServerArguments:
    """Where the server listens, who may ask, and how much.

    Attributes:
      host: address to listen at; other machines reach none but this one's own by default.
      port: port to listen at.
      served_model_name: names of the model; the first is the one that answers carry. None is its folder's name.
      api_key: a key that callers must send; a file keeps it out of the list of processes.
      api_key_file: file with a key on each line, "KEY" or "NAME KEY"; callers send one as a bearer token.
      key_max_requests: requests of one key at once; 0 is no limit. Without keys, these limit all callers together.
      key_tokens_per_minute: tokens of prompts, and n x max_tokens, of one key; 0 is no limit.
      key_media_mb_per_minute: MiB of images and videos of one key; 0 is no limit.
      insecure: listen at an address that other machines reach, without keys.
      max_num_seqs: answers that are decoded together.
      max_num_batched_tokens: tokens of a prefill step at most; None leaves it to the engine.
      max_model_len: tokens of a prompt and its answer; None is the model's positions.
      memory_fraction: share of the memory that parameters, cache and programs may take (also
        --gpu_memory_utilization); None is 0.9 of a GPU's or TPU's, and on a CPU a cache for max_num_seqs answers of
        max_model_len tokens, whatever it takes.
      kv_cache_dtype: dtype of the cache, by vLLM's names; "auto" is the one that the model computes in, float32 on a
        CPU. "fp8" is float8_e4m3fn: it holds twice as many tokens as bfloat16, and rounds keys and values.
      tpot_goal: seconds between two tokens of an answer that are kept, where that is possible, while prompts of others
        are computed; 0 gives most tokens a second, and answers may stand still meanwhile.
      deterministic: an answer depends on nothing that runs beside it, not even by rounding; slower.
      compile_cache: folder of compiled programs, which the next start reads; None is one in the user's cache.
      speculative: "ngram:4" guesses 4 tokens from what stood before, and verifies them in one step; None guesses none.
      max_queue: requests that may wait; more are sent away with status 429.
      max_n: most answers to a request.
      max_logprobs: most alternatives of a token.
      max_body_mb: largest body of a request, in MiB.
      allowed_media_domains: hosts from which requests may name images and videos, exact names.
      allowed_local_media_path: folder below which requests may name files; None allows no file.
      limit_media: most images and videos of a request.
      max_loras: most adapters at once; above 0, room for them is kept, so that one can be loaded while the server runs.
      max_lora_rank: largest rank of adapters where room is kept.
      enable_tower_connector_lora: keep room beside the matrices of the vision tower and the connector, too.
      enable_expert_lora: keep room beside the matrices of all experts, too, which takes as much for each expert.
      adapter_root: folder below which /v1/load_lora_adapter reads; None loads none.
      admin: names of the keys that may load and unload adapters.
      data_parallel_size: engines, each a process with its share of the devices, behind this one address.
      backends: addresses of servers that run already, http://HOST:PORT, to answer in the place of a model of its own.
      cors_origin: origins of pages in browsers that may ask.
      reasoning_parser: "auto" tells thinking apart where the template or the tokenizer know <think>; "on"; "off".
      tool_parser: "auto" reads calls of tools where the template writes them; "on"; "off".
      no_think_text: what is written behind the last question where a request turns thinking off and the chat template
        knows no enable_thinking: " /no_think" for MiMo-VL of August 2025. None writes nothing.
      log_interval: seconds between lines with tokens/s, while there is work; 0 prints none.
      no_page: do not serve the chat page.
      no_log_requests: do not print a line for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_key: str | None = None
    api_key_file: str | None = None
    key_max_requests: int = 0
    key_tokens_per_minute: int = 0
    key_media_mb_per_minute: int = 0
    insecure: bool = False
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    memory_fraction: float | None = None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    tpot_goal: float = 0.05
    deterministic: bool = False
    compile_cache: str | None = None
    speculative: str | None = None
    max_queue: int = 256
    max_n: int = 8
    max_logprobs: int = 20
    max_body_mb: int = 32
    allowed_media_domains: tuple[str, ...] = ()
    allowed_local_media_path: str | None = None
    limit_media: str = "image=16,video=1"
    max_loras: int = 0
    max_lora_rank: int = 16
    enable_tower_connector_lora: bool = False
    enable_expert_lora: bool = False
    adapter_root: str | None = None
    admin: tuple[str, ...] = ()
    data_parallel_size: int = 1
    backends: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    reasoning_parser: Literal["auto", "on", "off"] = "auto"
    tool_parser: Literal["auto", "on", "off"] = "auto"
    no_think_text: str | None = None
    log_interval: float = 20.0
    no_page: bool = False
    no_log_requests: bool = False


def settings_of(
    arguments: ServerArguments,
    *,
    name: str,
    adapters: tuple[str, ...],
    max_model_len: int,
) -> ServerSettings:
    """Return the settings that arguments mean.

    Args:
      name: of the model where none is given.
      adapters: their names.

    Raises:
      UserError: an address that other machines reach, without keys; a limit that is none; a file of keys that cannot
        be read; options that do not go together.
    """
    keys = () if arguments.api_key is None else (("api_key", arguments.api_key),)
    if arguments.api_key_file is not None:
        keys = (*keys, *read_keys(arguments.api_key_file))
    is_local = arguments.host in _LOOPBACK
    if not (is_local or keys or arguments.insecure):
        raise UserError(
            f"--host {arguments.host} can be reached by other machines, and there are no keys: give --api-key-file "
            "FILE, or --insecure to let everybody ask"
        )
    _check_least(arguments)
    _check_adapters(arguments, frozenset(name for name, _ in keys))
    first, *aliases = arguments.served_model_name or (name,)
    twice = {first, *aliases} & set(adapters)
    if twice:
        raise UserError(f"{twice.pop()!r} is the name of the model and of an adapter; give one of them another name")
    images, videos = _limit_media(arguments.limit_media)
    return ServerSettings(
        first,
        aliases=tuple(aliases),
        adapters=adapters,
        max_model_len=max_model_len,
        keys=keys,
        max_n=arguments.max_n,
        max_logprobs=arguments.max_logprobs,
        max_queue=arguments.max_queue,
        hosts=("127.0.0.1", "localhost", "[::1]") if is_local else (),
        cors_origins=arguments.cors_origin,
        media=MediaRules(
            domains=arguments.allowed_media_domains,
            local_path=arguments.allowed_local_media_path,
            images=images,
            videos=videos,
            fetch_bytes=arguments.max_body_mb * MIB,
        ),
        limits=HTTPLimits(body_bytes=arguments.max_body_mb * MIB),
        key_limits=KeyLimits(
            arguments.key_max_requests, arguments.key_tokens_per_minute, arguments.key_media_mb_per_minute * MIB
        ),
        adapter_root=arguments.adapter_root,
        admins=arguments.admin,
        log_interval=arguments.log_interval,
        reasoning=arguments.reasoning_parser,
        tools=arguments.tool_parser,
        no_think=arguments.no_think_text,
        page=not arguments.no_page,
    )


def _check_least(arguments: ServerArguments) -> None:
    ones = ("max_num_seqs", "max_queue", "max_n", "max_body_mb", "max_lora_rank", "data_parallel_size")
    noughts = (
        "max_loras",
        "key_max_requests",
        "key_tokens_per_minute",
        "key_media_mb_per_minute",
        "log_interval",
        "tpot_goal",
    )
    for least, options in ((1, ones), (0, noughts)):
        for option in options:
            if getattr(arguments, option) < least:
                raise UserError(f"--{option} is {getattr(arguments, option)}; it must be at least {least}")


def _check_adapters(arguments: ServerArguments, keys: frozenset[str]) -> None:
    if arguments.adapter_root is not None and not arguments.max_loras:
        raise UserError("--adapter_root loads adapters, for which --max_loras N keeps room: give both")
    unknown = sorted(set(arguments.admin) - keys)
    if unknown:
        raise UserError(f"--admin {unknown[0]}: no key has this name; --api_key_file has lines NAME KEY")
    if arguments.adapter_root is not None and keys and not arguments.admin:
        raise UserError("--adapter_root with keys needs --admin NAME of the keys that may load adapters")


def engine_config(arguments: ServerArguments, *, on_cpu: bool) -> EngineConfig:
    """Return the sizes of the engine that arguments mean.

    Args:
      on_cpu: programs of more sizes, since what is computed for padding there takes as long as what is asked for.

    Raises:
      UserError: a value out of range.
    """
    tokens = _CPU_TOKENS if on_cpu else EngineConfig.prefill_tokens
    most = tokens[-1] if arguments.max_num_batched_tokens is None else arguments.max_num_batched_tokens
    rows = tuple(size for size in _CPU_SLOTS if size < arguments.max_num_seqs)
    return EngineConfig(
        prefill_tokens=(*(size for size in tokens if size < most), most),
        encode_patches=(_CPU_PATCHES, *EngineConfig.encode_patches) if on_cpu else EngineConfig.encode_patches,
        decode_slots=(*rows, arguments.max_num_seqs) if on_cpu else None,
        draft_tokens=draft_tokens(arguments.speculative),
        max_slots=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        memory_fraction=arguments.memory_fraction,
        kv_cache_dtype=_CACHE_DTYPES.get(arguments.kv_cache_dtype, arguments.kv_cache_dtype),
        tpot_goal=arguments.tpot_goal or None,
        deterministic=arguments.deterministic,
    )


def draft_tokens(speculative: str | None) -> int:
    """Return how many tokens are guessed. Raises UserError for another form than "ngram:4"."""
    if speculative is None:
        return 0
    kind, _, number = speculative.partition(":")
    if kind != "ngram" or number not in map(str, range(1, 17)):
        raise UserError(f"--speculative {speculative!r} is not of the form ngram:4, of 1 to 16 tokens")
    return int(number)


def _limit_media(text: str) -> tuple[int, int]:
    """Return the most images and the most videos of "image=16,video=1"."""
    counts = {"image": MediaRules.images, "video": MediaRules.videos}
    for item in text.split(","):
        kind, _, number = item.strip().partition("=")
        if kind not in counts or not number.isdigit():
            raise UserError(f"--limit-media {text!r} is not of the form image=16,video=1")
        counts[kind] = int(number)
    return counts["image"], counts["video"]
