"""Errors shared by the interface and its implementations."""


class Unavailable(Exception):
    """Why an implementation cannot run one particular call."""
