"""Answers that say what is wrong with a request, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jvlm.data.errors import ExampleError
from jvlm.errors import UserError

_MOST_ERRORS, _MOST_CHARACTERS = 3, 200
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class APIError(Exception):
    """A request that is not answered.

    Args:
      status: HTTP status.
      message: for the caller; it holds nothing of what was sent but short names, and no path or object of the server.
      param: path of the field that is wrong.
      headers: of the answer, "retry-after" say.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers)

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kind = _TYPES.get(self.status, "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def bad(message: str, param: str | None = None) -> APIError:
    """Return the error of a request that is wrong in itself."""
    return APIError(400, message, param)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Return the error for what pydantic found, without the values that it found it in."""
    lines = [f"{field_path(error['loc'])}: {error['msg']}"[:_MOST_CHARACTERS] for error in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        lines.append(f"and {len(errors) - _MOST_ERRORS} more")
    return bad("; ".join(lines), field_path(errors[0]["loc"]) or None)


def field_path(location: Sequence[str | int]) -> str:
    """Return a place in JSON as "messages[0].content"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:_MOST_CHARACTERS]


def of_user_error(error: UserError) -> APIError:
    """Return the error for what the library found wrong with a conversation or with sampling."""
    if isinstance(error, ExampleError):
        return bad(_short(f"{error.field}: {error.problem}. {error.fix}"), error.field)
    return bad(_short(str(error)))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 500 else text[:497] + "..."
