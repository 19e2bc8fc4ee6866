"""How an error looks to the user of the command line."""

from __future__ import annotations

import sys

from jvlm.errors import UserError

NOT_CRASHES = (UserError, KeyboardInterrupt)


def print_error(error: BaseException) -> int:
    """Print an error as its user should see it; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("\njvlm: interrupted; run the same command to go on", file=sys.stderr)
        return 130
    print(f"jvlm: {error}", file=sys.stderr)
    return 2
