"""The tasks that come with jvlm; one file for each group of alike tasks."""

from __future__ import annotations

from jvlm.evaluation.tasks import documents, general, gui

TASKS = (*general.TASKS, *documents.TASKS, *gui.TASKS)
