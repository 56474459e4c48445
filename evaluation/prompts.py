"""Prompts: the words by which a model is asked a question."""

from __future__ import annotations

import re

from ..synthetic.write import LETTER
from .items import Item

_ASKS_FOR_PLACES = re.compile(r"x_fov|bfov|\bdegrees?\b", re.IGNORECASE)


def ask_text(item: Item) -> str:
    """A question with its options, or with how places are to be answered where it does not say that itself."""
    if item.options:
        lines = [f"{key}. {text}" for key, text in item.options]
        return "\n".join([item.question, *lines, LETTER])
    if item.places is not None and not _ASKS_FOR_PLACES.search(item.question):
        return f"{item.question}\nAnswer with [yaw, pitch, x_fov, y_fov] in whole degrees."
    return item.question
