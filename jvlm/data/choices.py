"""Choices that settings of the data and of a single source share."""

from __future__ import annotations

from typing import Literal

LossChoice = Literal["answers", "last_answer", "all"]
Order = Literal["auto", "global", "blocks", "none"]
