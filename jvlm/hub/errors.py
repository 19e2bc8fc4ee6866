"""What a hub's answers mean for the user: which are mistakes, and which go away when one tries again."""

from __future__ import annotations

import difflib
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jvlm.errors import UserError
from jvlm.hub.ids import HubId, Kind

T = TypeVar("T")
ATTEMPTS = 5
_AGAIN = (408, 409, 412, 429, 500, 502, 503, 504)  # 409 and 412: somebody else has just written to the repository
_SECONDS = 1.0  # of the first wait, which doubles
LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"


class HubUnavailable(RuntimeError):
    """A hub could not be reached, or failed, after several attempts. The same command may work later."""


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, of any HTTP library that the client uses; None if it has none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: no connection, a cut one, or a server in trouble."""
    status = status_of(error)
    if status is not None:
        return status in _AGAIN
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    # "offline mode" is a ConnectionError too, and stays one
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or (
        library in ("httpx", "httpx2", "requests", "urllib3") and not isinstance(error, HfHubHTTPError)
    )


def attempt(work: Callable[[], T], what: str, *, attempts: int = ATTEMPTS, seconds: float | None = None) -> T:
    """Return what ``work`` does, trying again, ever later, where that may help.

    Args:
      what: of the message in between, as "downloading ORG/NAME".
      seconds: before the second attempt; None is one.
    """
    seconds = _SECONDS if seconds is None else seconds
    for number in range(1, attempts + 1):
        try:
            return work()
        except Exception as error:
            if number == attempts or not is_transient(error):
                raise
            wait = seconds * 2 ** (number - 1) * random.uniform(0.8, 1.2)
            print(f"{what}: {reason(error)}; attempt {number + 1} of {attempts} in {wait:.1f} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("unreachable")


def reason(error: BaseException) -> str:
    """Return one short line about an error, without anything that the request held."""
    status = status_of(error)
    if status is not None:
        return f"status {status}"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def translated(error: Exception, id: HubId, kind: Kind, api: HfApi, *, sending: bool = False) -> Exception:
    """Return the error that the user should see: a `UserError` for a mistake, `HubUnavailable` for an outage."""
    host = api.endpoint
    if sending:
        return _not_sent(error, id, host)
    page = f"{host}/{'datasets/' if kind == 'dataset' else ''}{id.repo}"
    if isinstance(error, GatedRepoError):
        return UserError(f"{id} is gated: ask for access at {page}, then {LOGIN}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{page} has no revision {id.revision!r}{_refs(id, kind, api)}")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"{id.repo} is not a folder here, and {host} has no {kind} {id.repo} that you may read"
            f"{_near(id, kind, api)}. Correct the name; if it is private, {LOGIN}"
        )
    if isinstance(error, HFValidationError):
        return UserError(f"{id.repo} is not a folder here, and not a name that {host} takes ({error})")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return UserError(f"{page}: {reason(error)}")
    if status_of(error) in (401, 403):
        return UserError(f"{host} refuses {id.repo} (status {status_of(error)}): {LOGIN}, with an account that may")
    return HubUnavailable(
        f"{id.repo} is not a folder here, and {host} cannot give it ({reason(error)}). Check the network, or give a "
        "folder; what was downloaded before is used where HF_HUB_OFFLINE=1 is set"
    )


def _not_sent(error: Exception, id: HubId, host: str) -> Exception:
    status = status_of(error)
    if status in (401, 403):
        return UserError(f"{host} does not take files for {id.repo} (status {status}): {LOGIN} that may write to it")
    if isinstance(error, HFValidationError):
        return UserError(f"{id.repo} is not a name that {host} takes ({error})")
    if status is not None and 400 <= status < 500 and not is_transient(error):
        return UserError(f"{host} refuses the files for {id.repo} (status {status}): {error}")
    return HubUnavailable(f"{id.repo} was not sent to {host} ({reason(error)}); run the same command again later")


def _near(id: HubId, kind: Kind, api: HfApi) -> str:
    """Repositories of the same owner with nearly that name."""
    owner, _, name = id.repo.partition("/")
    search = api.list_models if kind == "model" else api.list_datasets
    try:
        known = [repository.id for repository in search(author=owner, limit=200)]
    except (HfHubHTTPError, OSError, RuntimeError):  # the advice is a service, and the error is told without it
        return ""
    near = difflib.get_close_matches(name, [other.partition("/")[2] for other in known], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(f'{owner}/{other}' for other in near)}?" if near else ""


def _refs(id: HubId, kind: Kind, api: HfApi) -> str:
    try:
        refs = api.list_repo_refs(id.repo, repo_type=kind)
    except (HfHubHTTPError, OSError, RuntimeError):
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(names[:10])}" + (", ..." if len(names) > 10 else "")
