"""What the operator decides about the server."""

from __future__ import annotations

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class MediaRules:
    """Which images and videos are read, and how large they may be.

    Attributes:
      domains: hosts that may be asked for media by https, exact names; "http://NAME" allows plain http. Empty: none.
      local_path: folder below which files may be named; None allows no file.
      images, videos: most of each in a request.
      fetch_bytes: most bytes of one image or video.
      image_pixels, request_pixels: most pixels of an image, and of all images and frames of a request.
      side: longest side in pixels.
      frames: most frames of a video.
      video_seconds: longest video.
      decode_seconds: time in which an image must be decoded.
      connect_seconds, fetch_seconds: time in which a host must accept, and send everything.
      workers: processes that decode.
    """

    domains: tuple[str, ...] = ()
    local_path: str | None = None
    images: int = 16
    videos: int = 1
    fetch_bytes: int = 32 * MIB
    image_pixels: int = 50_000_000
    request_pixels: int = 100_000_000
    side: int = 16384
    frames: int = 768
    video_seconds: float = 3600.0
    decode_seconds: float = 20.0
    connect_seconds: float = 5.0
    fetch_seconds: float = 20.0
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class HTTPLimits:
    """What a connection may take.

    Attributes:
      body_bytes: most bytes of a request's body.
      depth, nodes: of JSON.
      ids: most numbers in the JSON of routes that take token ids.
      header_seconds, body_seconds: time in which headers, and the body, must have arrived.
      write_seconds: time after which a client that reads nothing is given up.
      connections: open at once.
    """

    body_bytes: int = 32 * MIB
    depth: int = 32
    nodes: int = 10_000
    ids: int = 1_000_000
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    connections: int = 1024


@dataclasses.dataclass(frozen=True)
class KeyLimits:
    """What one key, or all callers where there are no keys, may take; 0 is no limit.

    Attributes:
      in_flight: requests at once.
      tokens_per_minute: tokens of prompts, and n x max_tokens.
      media_bytes_per_minute: bytes of images and videos.
    """

    in_flight: int = 0
    tokens_per_minute: int = 0
    media_bytes_per_minute: int = 0


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How the server answers.

    Attributes:
      model_name: of the base model.
      aliases: further names of it.
      root: what /v1/models says of where the model is from.
      adapters: names of the adapters that requests may name.
      max_model_len: tokens of a prompt and its answer.
      keys: (name, key) of those that may ask; empty lets everybody.
      max_n: most answers to a request.
      max_logprobs: most alternatives of a token.
      max_queue: requests that may wait; more are sent away.
      hosts: values of the Host header that are served; empty serves all.
      cors_origins: of pages that may ask from browsers; exact.
      reasoning: "auto" tells `<think>` apart where the chat template or the tokenizer know it; "on"; "off".
      tools: "auto" reads calls of tools where the chat template writes them; "on"; "off".
      no_think: appended to the last user text where a request turns thinking off and the template cannot.
      adapter_root: folder below which adapters are loaded from; None loads none.
      admins: names of the keys that may do so; empty is everybody, where there are no keys.
      log_interval: seconds between lines with tokens/s; 0 prints none.
      ping_seconds: between signs of life in a stream that waits.
      page: whether the chat page is served.
    """

    model_name: str
    aliases: tuple[str, ...] = ()
    root: str = ""
    adapters: tuple[str, ...] = ()
    max_model_len: int = 4096
    keys: tuple[tuple[str, str], ...] = ()
    max_n: int = 8
    max_logprobs: int = 20
    max_queue: int = 256
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    media: MediaRules = MediaRules()
    limits: HTTPLimits = HTTPLimits()
    key_limits: KeyLimits = KeyLimits()
    reasoning: str = "auto"
    tools: str = "auto"
    no_think: str | None = None
    adapter_root: str | None = None
    admins: tuple[str, ...] = ()
    log_interval: float = 0.0
    ping_seconds: float = 15.0
    page: bool = True
