"""The tasks of the matrix and where their models and data are."""

from __future__ import annotations

import os
from pathlib import Path

TASKS = {
    "emotion": ("bert-tiny-emotion", "emotion/test.csv", "gokuls/BERT-tiny-emotion-intent", "dair-ai/emotion"),
    "sms": (
        "bert-tiny-sms-spam",
        "sms_spam/train.csv",
        "mrm8488/bert-tiny-finetuned-sms-spam-detection",
        "ucirvine/sms_spam",
    ),
}


def locate(task: str) -> tuple[str, str]:
    """Model and data of a task: paths under SPLITQUANT_ASSETS where it is set, Hub ids otherwise."""
    model, data, model_id, data_id = TASKS[task]
    assets = os.environ.get("SPLITQUANT_ASSETS")
    if assets:
        return str(Path(assets, "models", model)), str(Path(assets, "datasets", data))
    return model_id, data_id
