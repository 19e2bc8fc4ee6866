"""What is the user's to fix, as opposed to a crash."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: a file, a field, a value, a folder. Its message names it and says what to do.

    The command line prints it as one line and ends with status 2; running the same command again never helps.
    """
