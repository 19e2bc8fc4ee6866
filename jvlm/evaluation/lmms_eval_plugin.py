"""What lmms-eval finds by its entry points: ``lmms-eval eval --model jvlm --model_args model=FOLDER``.

It is imported by lmms-eval alone, which is no dependency of jvlm.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's record of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="jvlm", chat_class_path="jvlm.evaluation.lmms_eval_model.JVLM")
