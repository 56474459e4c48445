"""Judging answers, summing them up, and comparing two models on the same questions."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..places_panorama import direction_in_words, write_places
from . import bootstrap
from .answers import (
    LONGEST,
    NORMALISATION,
    chosen_option,
    compare_places,
    direction_of,
    in_target,
    normalise,
    places_of,
    says,
)
from .captions import CAPTION_METRICS, caption_scores
from .items import Item

METRICS = ("accuracy", "places", *CAPTION_METRICS)
PREDICTIONS = "predictions.jsonl"
SETTINGS: dict[str, Any] = {
    "normalisation": NORMALISATION,
    "characters read of an answer": LONGEST,
    "multiple choice": "the key, or the text of one option; never two at once",
    "places": "matched one to one by IoU; right where none is missed, none is too much and each IoU is at least 0.5",
    "targets": "right where the first named place's centre lies in the intervals of yaw and pitch",
    "interval": "95 %, percentiles of a bootstrap over panoramas",
    "bootstrap draws": bootstrap.DRAWS,
    "bootstrap seed": bootstrap.SEED,
    "headline": "mean over groups of their accuracy",
    "chance": "1 / options; the share of the sphere that a target covers; else what the most common answer gets",
}
_CAPTION = "caption"


def judge(item: Item, answer: str) -> dict[str, Any]:
    """What an answer is worth.

    Args:
        item: the question, as it was asked.
        answer: of the model.

    Returns:
        `id`, `kind`, `group`, `panorama` of the item; `read`, what the answer was understood as (empty where it was
        not); `right`, `None` for a caption, which no single answer is right for; `yaw`, where the question looks, where
        that is known; of places also `iou`, `iou_50`, `centre_error`; of captions and of questions with several
        references `references`.
    """
    found: dict[str, Any] = {
        "id": item.id,
        "kind": item.kind,
        "group": item.group or item.kind,
        "panorama": item.panorama or item.id,
        "yaw": _yaw_of(item),
        "answer": answer,
    }
    if item.kind == _CAPTION or len(item.references) > 1:
        found["references"] = list(item.references)
    if item.options:
        key = chosen_option(answer, item.options, item.references, item.key or "")
        return found | {"read": dict(item.options).get(key, ""), "right": key != "" and key == item.key}
    if "target_yaw" in item.more:
        return found | _judge_target(item, answer)
    if item.places is not None:
        predicted = places_of(answer)
        scores = compare_places(item.places, predicted)
        if not answer.strip():  # silence does not say that nothing is there
            return found | {"read": "", **scores, "right": False, "iou": 0.0, "iou_50": 0.0}
        return found | {"read": write_places(predicted), **scores}
    right = None if item.kind == _CAPTION else says(answer, item.references)
    return found | {"read": normalise(answer), "right": right}


def _judge_target(item: Item, answer: str) -> dict[str, Any]:
    yaws, pitches = item.more["target_yaw"], item.more["target_pitch"]
    direction = direction_of(answer)
    if direction is None:
        return {"read": "", "right": False}
    return {
        "read": f"yaw={direction[0]:g} pitch={direction[1]:g}",
        "right": in_target(direction, yaws, pitches),
    }


def _yaw_of(item: Item) -> float | None:
    """Where the answer to a question lies around the observer; `None` where that is nowhere or in several places."""
    if item.places:
        return item.places[0].yaw if len(item.places) == 1 else None
    if "target_yaw" in item.more:
        low, high = item.more["target_yaw"]
        return (low + (high - low) % 360 / 2 + 180) % 360 - 180
    if item.more.get("turns") == "direction":
        right = dict(item.options).get(item.key or "", "") if item.options else (item.references or [""])[0]
        return direction_in_words(right)
    return None


def chance_of(items: Sequence[Item]) -> dict[str, float | None]:
    """By id, the chance that an answer is right without looking; `None` for captions."""
    common = most_common_answers(items)
    chances: dict[str, float | None] = {}
    shares: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item.options:
            chances[item.id] = 1 / len(item.options)
        elif "target_yaw" in item.more:
            chances[item.id] = _share_of_sphere(item)
        elif item.kind == _CAPTION:
            chances[item.id] = None
        else:
            shares[item.kind].append(float(judge(item, common[item.kind])["right"]))
    for item in items:
        if item.id not in chances:
            chances[item.id] = math.fsum(shares[item.kind]) / len(shares[item.kind])
    return chances


def _share_of_sphere(item: Item) -> float:
    (left, right), (low, high) = item.more["target_yaw"], item.more["target_pitch"]
    width = 360.0 if right - left >= 360 else (right - left) % 360
    return width / 360 * (math.sin(math.radians(high)) - math.sin(math.radians(low))) / 2


def most_common_answers(items: Sequence[Item]) -> dict[str, str]:
    """By kind, the right answer that is right most often; of several the first in the alphabet."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.kind][right_answer(item)] += 1
    return {kind: min(found, key=lambda answer: (-found[answer], answer)) for kind, found in counts.items()}


def right_answer(item: Item) -> str:
    """An answer that is right."""
    if item.options and item.key is not None:
        return item.key
    if "target_yaw" in item.more:
        pitch = sum(item.more["target_pitch"]) / 2
        return f"yaw={_yaw_of(item):g} pitch={pitch:g}"
    if item.places is not None:
        return write_places(item.places)
    return item.references[0] if item.references else ""


def summarise(
    judged: Sequence[dict[str, Any]],
    chances: dict[str, float | None] | None = None,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """What the answers to a data set are worth. The order of the answers does not matter.

    Args:
        judged: as `judge` gives them; with `error` where there was no answer.
        chances: as `chance_of` gives them.
        metrics: which to compute, of `METRICS`.

    Returns:
        `headline`, `groups`, `kinds`, `places`, `captions`, `errors` (ids with their reasons), and `settings`.
    """
    judged = sorted(judged, key=lambda each: each["id"])
    answered = [each for each in judged if each["right"] is not None]
    chances = chances or {}
    found: dict[str, Any] = {"count": len(judged), "panoramas": len({each["panorama"] for each in judged})}
    if "accuracy" in metrics and answered:
        found |= _accuracies(answered, chances)
    if "places" in metrics and (places := [each for each in judged if "iou" in each]):
        found["places"] = {kind: _place_scores(own) for kind, own in _by(places, "kind").items()}
    names = [name for name in CAPTION_METRICS if name in metrics]
    texts = _by([each for each in judged if each.get("references")], "kind")
    if names and texts:
        found["captions"] = {kind: _caption_scores(own, names) for kind, own in texts.items()}
    found["errors"] = [{"id": each["id"], "error": each["error"]} for each in judged if "error" in each]
    return found | {"settings": {**SETTINGS, "metrics": list(metrics)}}


def _accuracies(judged: Sequence[dict[str, Any]], chances: dict[str, float | None]) -> dict[str, Any]:
    groups = _shares(judged, "group", chances)
    sums, counts, _ = _table(judged, "group")
    drawn = bootstrap.mean_over_columns(bootstrap.drawn_means(sums, counts))
    known = [each["chance"] for each in groups.values()]
    headline = {
        "accuracy": math.fsum(each["accuracy"] for each in groups.values()) / len(groups),
        "interval": bootstrap.interval(drawn) if len(sums) > 1 else None,
        "chance": None if None in known else math.fsum(known) / len(known),
        "groups": len(groups),
        "count": len(judged),
    }
    return {"headline": headline, "groups": groups, "kinds": _shares(judged, "kind", chances)}


def _shares(judged: Sequence[dict[str, Any]], column: str, chances: dict[str, float | None]) -> dict[str, Any]:
    """Accuracy with interval, count and chance, by the values of a column."""
    sums, counts, names = _table(judged, column)
    drawn = bootstrap.drawn_means(sums, counts)
    own = _by(judged, column)
    found = {}
    for index, name in enumerate(names):
        known = [chances.get(each["id"]) for each in own[name]]
        panoramas = int((counts[:, index] > 0).sum())  # one alone says nothing about others
        found[name] = {
            "accuracy": float(sums[:, index].sum() / counts[:, index].sum()),
            "interval": bootstrap.interval(drawn[:, index]) if panoramas > 1 else None,
            "chance": None if None in known else math.fsum(filter(None, known)) / len(known),
            "count": int(counts[:, index].sum()),
            "panoramas": panoramas,
        }
    return found


def _table(judged: Sequence[dict[str, Any]], column: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    values = [float(each["right"]) for each in judged]
    return bootstrap.by_panorama(values, [each["panorama"] for each in judged], [each[column] for each in judged])


def _by(judged: Sequence[dict[str, Any]], column: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in judged:
        found[each[column]].append(each)
    return dict(sorted(found.items()))


def _place_scores(judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [each["centre_error"] for each in judged if each["centre_error"] is not None]
    return {
        "mean_iou": math.fsum(each["iou"] for each in judged) / len(judged),
        "iou_50": math.fsum(each["iou_50"] for each in judged) / len(judged),
        "centre_error": math.fsum(errors) / len(errors) if errors else None,
        "matched": len(errors),
        "count": len(judged),
    }


def _caption_scores(judged: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    answers, references = ([each[name] for each in judged] for name in ("answer", "references"))
    return {"count": len(judged), **caption_scores(answers, references, names)}


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> dict[str, Any]:
    """Two evaluations of the same questions: how much more the first has right than the second.

    Args:
        first, second: folders with the predictions of each.

    Returns:
        `headline` and `groups`, each with `first`, `second`, `difference`, its `interval`, and `above_zero`, the share
        of draws in which the first has more right. The same panoramas are drawn for both.

    Raises:
        ValueError: where a folder holds no finished evaluation, or the questions are not the same.
    """
    judged = [_judged_in(Path(folder)) for folder in (first, second)]
    marks = [{each["id"]: (each["item"], each["panorama"], each["group"]) for each in own} for own in judged]
    if marks[0] != marks[1]:
        only = [len(set(a) - set(b)) for a, b in ((marks[0], marks[1]), (marks[1], marks[0]))]
        changed = sum(marks[0][name] != marks[1][name] for name in set(marks[0]) & set(marks[1]))
        raise ValueError(
            f"{str(first)!r} and {str(second)!r} are not of the same questions: {only[0]} are only in the first, "
            f"{only[1]} only in the second, {changed} have the same id and another content"
        )
    if not judged[0]:
        raise ValueError(f"{str(first)!r} has no question with a right answer to compare by")
    tables = [_table(own, "group") for own in judged]
    means = [sums.sum(0) / counts.sum(0) for sums, counts, _ in tables]
    drawn = [bootstrap.drawn_means(sums, counts) for sums, counts, _ in tables]
    over = [bootstrap.mean_over_columns(each) for each in drawn]
    return {
        "questions": len(judged[0]),
        "headline": _difference(float(means[0].mean()), float(means[1].mean()), over[0] - over[1]),
        "groups": {
            name: _difference(float(means[0][i]), float(means[1][i]), drawn[0][:, i] - drawn[1][:, i])
            for i, name in enumerate(tables[0][2])
        },
    }


def _difference(first: float, second: float, drawn: np.ndarray) -> dict[str, Any]:
    known = drawn[np.isfinite(drawn)]
    return {
        "first": first,
        "second": second,
        "difference": first - second,
        "interval": bootstrap.interval(known),
        "above_zero": float((known > 0).mean()) if len(known) else None,
    }


def _judged_in(folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder to the questions as they were given, sorted, without captions."""
    try:
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [row for row in rows if row["variant"] == "0" and row["right"] is not None]
        return sorted(rows, key=lambda row: row["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} holds no finished evaluation ({PREDICTIONS}: {error})") from error
