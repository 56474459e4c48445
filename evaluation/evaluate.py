"""An evaluation from beginning to end: a model and its baselines on the questions of a file, and what is written."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from ..train.checkpoint import write_whole
from .asking import Asked, Said
from .items import Item, ReadItems
from .report import write_report
from .run import Judged, answer_items, answer_with
from .scores import METRICS, chance_of, compare, most_common_answers, summarise
from .turning import turn_report, variants_of

METRICS_FILE, REPORT, MODEL_INDEX = "metrics.json", "report.html", "model-index.yml"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA_OPTIONS = ("split", "images", "format", "limit")


@dataclass
class EvaluationOptions:
    """What is evaluated, and how; the command line says what each is."""

    model: str
    data: str
    split: str = "train"
    images: str | None = None
    format: str | None = None
    metrics: Sequence[str] = METRICS
    limit: int | None = None
    batch_size: int = 4
    max_new_tokens: int = 64
    output: str = "evaluation"
    blind: bool = False
    always_most_common: bool = False
    peer: str | None = None
    turn: int = 1
    tilt: float = 0.0
    compare: str | None = None

    def check(self) -> None:
        """Raise `ValueError` for what cannot be; the option is named."""
        least = {"batch_size": 1, "max_new_tokens": 1, "turn": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        for name in (self.model, self.peer or self.model):
            if not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
                raise ValueError(f"the model {name!r} is no folder, and no name of the Hub (org/name)")
        if self.compare and not Path(self.compare).is_dir():
            raise ValueError(f"--compare {self.compare!r} is no folder")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {self.limit}")
        if not -180 < self.tilt < 180:
            raise ValueError(f"--tilt must be degrees between -180 and 180, got {self.tilt:g}")
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"--metrics knows {', '.join(METRICS)}, got {', '.join(unknown)}")


def evaluate(options: EvaluationOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Ask, judge, sum up, and write `predictions.jsonl`, `metrics.json`, `report.html` and `model-index.yml`; on all
    processes.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: for options, data or a folder that do not fit; OSError: for a model that is not there.
    """
    options.check()
    read = _questions(options)
    judged, baselines = _ask_all(options, read, accelerator)
    metrics = _metrics(options, read, judged, baselines)
    output = Path(options.output)
    if accelerator.is_main_process:
        _write(options, read.items, judged, metrics)
        if options.compare:
            metrics["compare"] = {"with": options.compare, **compare(output, options.compare)}
            write_whole(output / METRICS_FILE, _as_text(metrics))
    accelerator.wait_for_everyone()
    return metrics


def _questions(options: EvaluationOptions) -> ReadItems:
    from .formats import read_items

    named = {name: getattr(options, name) for name in _DATA_OPTIONS}
    read: ReadItems = read_items(options.data, **named)
    if not read.items:
        first = f"; the first: {read.dropped[0].get('reason')}" if read.dropped else ""
        raise ValueError(f"{options.data!r} holds no question ({len(read.dropped)} rows were left out{first})")
    return read


def _ask_all(options: EvaluationOptions, read: ReadItems, accelerator: Accelerator) -> tuple[Judged, dict[str, Judged]]:
    """The judged answers of the model, and those of each baseline, which is asked about the panoramas as given."""
    output, settings = Path(options.output), _data_settings(options, read)
    asking: dict[str, Any] = {
        "accelerator": accelerator,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "settings": settings,
    }
    baselines: dict[str, Judged] = {}
    loaded: Any = load_ours(options.model, accelerator)
    variants = variants_of(options.turn, options.tilt)
    judged = answer_items(read.items, *loaded, output=output, variants=variants, **asking)
    if options.blind:
        baselines["blind"] = answer_items(read.items, *loaded, blind=True, output=output / "blind", **asking)
    if options.always_most_common:
        baselines["always most common"] = _always_most_common(read.items, output, settings, options, accelerator)
    if options.peer:
        loaded = None  # one model in memory at a time
        _free()
        peer = load_peer(options.peer, accelerator)
        baselines["peer"] = answer_items(read.items, *peer, output=output / "peer", **asking)
    return judged, baselines


def load_ours(name: str, accelerator: Accelerator) -> tuple[PanoramaVLM, PanoramaProcessor]:
    """A PanoramaVLM and its processor, from a folder or the Hub."""
    load = PanoramaVLM.from_checkpoint if Path(name).is_dir() else PanoramaVLM.from_pretrained
    with _named(name):
        model, processor = load(name), PanoramaProcessor.from_pretrained(name)
    if Path(name).is_dir():
        model.name_or_path = name
    return model.eval().to(accelerator.device), processor


def load_peer(name: str, accelerator: Accelerator) -> tuple[Any, Any]:
    """Any other model of transformers that answers questions about images."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with _named(name):
        model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"--peer {name!r} has no processor with a tokenizer")
    return model.eval().to(accelerator.device), processor


@contextmanager
def _named(model: str) -> Iterator[None]:
    """Errors that say which model cannot be loaded, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {model!r}: {str(error).strip().splitlines()[0]}") from error


def _always_most_common(
    items: Sequence[Item], output: Path, settings: dict[str, Any], options: EvaluationOptions, accelerator: Accelerator
) -> Judged:
    common = most_common_answers(items)

    def say(batches: Iterable[Sequence[Asked]]) -> Iterator[list[Said]]:
        return ([Said(common[asked.item.kind]) for asked in batch] for batch in batches)

    folder, mark = output / "always-most-common", {"model": "always the most common answer", **settings}
    return answer_with(say, items, variants_of(), accelerator, options.batch_size, folder, mark)


def _data_settings(options: EvaluationOptions, read: ReadItems) -> dict[str, Any]:
    known = {name: getattr(options, name) for name in _DATA_OPTIONS}
    data = os.path.realpath(options.data) if os.path.exists(options.data) else options.data
    return {"data": data, **known, "format": read.format}


def _metrics(
    options: EvaluationOptions, read: ReadItems, judged: Judged, baselines: dict[str, Judged]
) -> dict[str, Any]:
    chances = chance_of(read.items)
    metrics = summarise(_as_given(judged), chances, options.metrics)
    for name, own in baselines.items():
        metrics.setdefault("baselines", {})[name] = summarise(_as_given(own), chances, options.metrics)
        metrics["baselines"][name].pop("settings")
    metrics |= turn_report(read.items, judged, variants_of(options.turn, options.tilt))
    metrics["dropped"] = len(read.dropped)
    metrics["settings"] |= {
        "model": options.model,
        **_data_settings(options, read),
        "data": options.data,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "decoding": "greedy",
        "peer": options.peer,
        "headings": options.turn,
        "tilt": options.tilt,
    }
    return metrics


def _as_given(judged: Judged) -> list[dict[str, Any]]:
    return [row for (_, variant), row in judged.items() if variant == "0"]


def _write(options: EvaluationOptions, items: Sequence[Item], judged: Judged, metrics: dict[str, Any]) -> None:
    output = Path(options.output)
    write_whole(output / METRICS_FILE, _as_text(metrics))
    title = f"{Path(options.model).name} on {Path(options.data).name}"
    by_id = {row["id"]: row for row in _as_given(judged)}
    write_whole(output / REPORT, write_report(title, metrics, items, by_id))
    write_whole(output / MODEL_INDEX, model_index(options, metrics))


def _as_text(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics, indent=1) + "\n"


def model_index(options: EvaluationOptions, metrics: dict[str, Any]) -> str:
    """The results as the Hub reads them from the head of a model card; YAML."""
    name = Path(options.data).name
    shares = {"mean over groups": metrics["headline"]} if "headline" in metrics else {}
    shares |= metrics.get("kinds", {})
    values = [("accuracy", f"Accuracy, {what}{_interval(each)}", each["accuracy"]) for what, each in shares.items()]
    values += [("iou", f"Mean IoU, {kind}", each["mean_iou"]) for kind, each in metrics.get("places", {}).items()]
    for kind, each in metrics.get("captions", {}).items():
        for metric, score in each.items():
            if metric != "count" and score["value"] is not None:
                values.append((metric.split("-")[0].lower(), f"{metric}, {kind}", score["value"]))
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=name,
            dataset_name=name,
            dataset_split=options.split,
            metric_type=metric,
            metric_name=words,
            metric_value=round(value, 6),
        )
        for metric, words, value in values
    ]
    model = Path(options.model).name or Path(options.model).resolve().name
    index = eval_results_to_model_index(model, results) if results else [{"name": model, "results": []}]
    return yaml_dump({"model-index": index})


def _interval(score: dict[str, Any]) -> str:
    """Words for a place that has room for a name alone."""
    known = score["interval"] and f"95 % interval {' to '.join(f'{edge:.3f}' for edge in score['interval'])}, "
    return f" ({known or ''}{score['count']} question{'s' * (score['count'] != 1)})"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
