"""Errors that callers of the kernels may catch."""


class Unavailable(Exception):
    """An implementation cannot run this call; the message gives the reason."""
