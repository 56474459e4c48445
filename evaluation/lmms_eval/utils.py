"""Functions of the lmms-eval task `panorama_synthetic`: questions as `panorama_vlm.evaluation` asks and judges them."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from panorama_vlm.evaluation.formats import read_items
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.prompts import ask_text
from panorama_vlm.evaluation.scores import judge
from panorama_vlm.places_panorama import BFoV
from PIL import Image

FOLDER = "scenes"  # as the task's file names it


def questions(rows: Dataset) -> Dataset:
    """The questions of the scenes, a document each.

    Raises:
        ValueError: where the folder lacks rows that the task was given, or holds what is no question.
    """
    found = read_items(FOLDER, format="panorama")
    if found.dropped:
        raise ValueError(f"{len(found.dropped)} rows of {FOLDER!r} are no questions: {found.dropped[0]}")
    if len({item.panorama for item in found.items}) != len(rows):
        raise ValueError(f"{FOLDER!r} has other scenes than the task was given: run it in the folder that holds them")
    return Dataset.from_list(
        [{"kind": item.kind, "item": json.dumps(dataclasses.asdict(item))} for item in found.items]
    )


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The panorama, flat."""
    with Image.open(Path(str(_item(doc).image))) as picture:
        return [picture.convert("RGB")]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question, between what a model wants before and after it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{ask_text(_item(doc))}{around.get('post_prompt', '')}"


def target(doc: dict[str, Any]) -> str:
    """The right answer."""
    item = _item(doc)
    return item.key or item.references[0]


def results(doc: dict[str, Any], answers: list[str]) -> dict[str, Any]:
    """Whether an answer is right, by kind of question."""
    judged = judge(_item(doc), answers[0])
    right = None if judged["right"] is None else float(judged["right"])
    return {name: (doc["kind"], right) for name in ("accuracy", "mean_of_kinds")}


def accuracy(judged: list[tuple[str, float | None]]) -> float:
    """Over all questions that have a right answer."""
    right = [value for _, value in judged if value is not None]
    return sum(right) / len(right)


def mean_of_kinds(judged: list[tuple[str, float | None]]) -> float:
    """Of the accuracies of the kinds."""
    kinds = defaultdict(list)
    for kind, value in judged:
        if value is not None:
            kinds[kind].append(value)
    return sum(sum(values) / len(values) for values in kinds.values()) / len(kinds)


def _item(doc: dict[str, Any]) -> Item:
    values = json.loads(doc["item"])
    places = values["places"]
    values["places"] = None if places is None else [BFoV(*place) for place in places]
    values["options"] = [(key, words) for key, words in values["options"]]
    return Item(**values)
