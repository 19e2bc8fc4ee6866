"""``jvlm reward-serve``: rewards over HTTP."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

from jvlm import options
from jvlm.errors import UserError

_MODULES = ("fastapi", "uvicorn", "httptools")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class RewardServe:
    """Judge answers over HTTP: jvlm reward-serve [options].

    Attributes:
      rewards: JSON file that names the reward of each task; None serves each verifiable reward as a task of its name.
      host: address to listen at; other machines reach none but this one's own by default.
      port: port to listen at.
      api_key_file: file with a key on each line, "KEY" or "NAME KEY"; callers send one as a bearer token.
      insecure: listen at an address that other machines reach, without keys.
      workers: requests that are judged at a time.
      max_queue: items that may wait; more are sent away with status 429.
      blob_mb: most MiB of pictures that are kept in memory.
      default_task: task of the requests of /get_reward and /rm, which name none.
      no_log_requests: do not print a line for each request.
    """

    rewards: str | None = None
    host: str = "127.0.0.1"
    port: int = 8100
    api_key_file: str | None = None
    insecure: bool = False
    workers: int = 4
    max_queue: int = 4096
    blob_mb: int = 1024
    default_task: str | None = None
    no_log_requests: bool = False


def run(words: list[str]) -> int:
    given = options.parse(RewardServe, words, "jvlm reward-serve")
    lacking = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"serving needs {', '.join(lacking)}: pip install 'jvlm[serve,eval]'")
    for name in ("workers", "max_queue", "blob_mb"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}; it must be at least 1")
    from jvlm.rl.rewards import config
    from jvlm.rl.rewards.server import ServiceSettings, build
    from jvlm.server.keys import read_keys
    from jvlm.server.listen import listen, print_line

    keys = () if given.api_key_file is None else read_keys(given.api_key_file)
    is_local = given.host in _LOOPBACK
    if not (is_local or keys or given.insecure):
        raise UserError(
            f"--host {given.host} can be reached by other machines, and there are no keys: give --api_key_file FILE, "
            "or --insecure to let everybody ask"
        )
    router = config.rules() if given.rewards is None else config.read(Path(given.rewards))
    if given.default_task is not None and given.default_task not in router.routes:
        raise UserError(f"--default_task {given.default_task} has no reward; there are {', '.join(router.routes)}")
    settings = ServiceSettings(
        keys=keys,
        hosts=("127.0.0.1", "localhost", "[::1]") if is_local else (),
        workers=given.workers,
        max_queue=given.max_queue,
        blob_bytes=given.blob_mb * _MIB,
        default_task=given.default_task,
    )
    print(f"jvlm judges {', '.join(router.routes)} at http://{given.host}:{given.port}/v1/reward", file=sys.stderr)
    app = build(router, settings, log=None if given.no_log_requests else print_line)
    listen(app, settings.limits, given.host, given.port)
    return 0
