"""The model card of a trained folder: what the model is, how it was trained, and the loss curve as a picture.

A section for which nothing is known does not appear.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_panorama import PanoramaConfig

logger = logging.getLogger(__name__)

LOSS_CURVE = "loss_curve.png"
FOLDER = "path/to/this/folder"  # stands in the card where the repo is not known
NOT_EVALUATED = "It has not been evaluated."
TEMPLATE = Path(__file__).with_name("model_card.md")
TAGS = ["panorama", "360-degree", "equirectangular", "vision-language-model", "vicreg", "custom_code"]
STAGE_AIMS = {
    "vision": "tokens of overlapping views that look the same way become alike",
    "resampler": "the visual tokens become words for the language model",
    "finetune": "the language model learns to answer about panoramas",
}
# Categorical hues of a palette that colour-blind readers can tell apart, one a stage.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def write_model_card(folder: str | os.PathLike[str], *, config: PanoramaConfig, run: dict[str, Any]) -> Path:
    """Write `README.md` and, where a loss is known and matplotlib is installed, `loss_curve.png` into a saved folder.

    Args:
        folder: of the model.
        config: the model's.
        run: what is known of the training; every key may be missing. `repo_id`, `license`, `origin` (words, where the
            weights come from elsewhere), `limits` (a list of words, beside those that follow from the rest), `stages`
            (a list of `name`, `steps`, `samples`, `seconds`, `hyperparameters`, `data` (a list of `path`, `samples`,
            `weight`), `history` (a list of `step`, `loss`), `results` (name -> value), `skipped` and `skipped_steps`),
            `samples` (a list of `image`, `question`, `answer`, `reference`) and `versions` (name -> version).

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    stages = list(run.get("stages") or [])
    has_curve = draw_loss_curve(folder / LOSS_CURVE, stages)
    sections = [
        ("Origin", run.get("origin") or ""),
        ("Views", _views(config)),
        ("Training", _training(stages)),
        ("Data", _data(stages)),
        ("Loss", f"![Loss of each stage over its steps]({LOSS_CURVE})" if has_curve else ""),
        ("Results", _results(stages)),
        ("Sample answers", _samples(run.get("samples") or [])),
        ("Limits", _limits(config, stages, run.get("limits") or [])),
        ("Versions", table(["package", "version"], sorted((run.get("versions") or {}).items()))),
        ("Licence", _licence(run.get("license"), config)),
    ]
    name = (run.get("repo_id") or "PanoramaVLM").split("/")[-1]
    card = ModelCard.from_template(
        _metadata(config, run, stages, name),
        template_path=str(TEMPLATE),
        name=name,
        introduction=_introduction(config),
        repo=run.get("repo_id") or FOLDER,
        question=json.dumps(config.default_generation_prompt, ensure_ascii=False),
        sections=sections,
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def read_history(path: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    """The loss history of each stage from a file with one JSON object of `stage`, `step`, `loss` a line.

    Lines of one step are one entry (an evaluation adds to a step); of what a resumed run logged twice the later counts.
    An unfinished last line is left out.

    Raises:
        ValueError: for any other line that is no such object; it is named.
    """
    lines = Path(path).read_text().splitlines()
    history: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            history.setdefault(entry["stage"], {}).setdefault(entry["step"], {}).update(entry)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise ValueError(
                f"line {number} of {str(path)!r} must be a JSON object with stage, step and loss, got {line[:80]!r}"
            ) from error
    return {stage: [steps[step] for step in sorted(steps)] for stage, steps in history.items()}


def draw_loss_curve(path: Path, stages: list[dict[str, Any]]) -> bool:
    """Draw the loss of each stage over its steps, raw and smoothed. Returns whether there was anything to draw."""
    curves = [(stage["name"], points) for stage in stages if len(points := loss_points(stage.get("history") or [])) > 0]
    if not curves:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.warning("The model card has no loss curve: that needs matplotlib (pip install matplotlib).")
        return False
    figure = Figure(figsize=(4.2 * len(curves), 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, points) in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        axes = figure.add_subplot(1, len(curves), index + 1)
        steps, losses = points.T
        if len(steps) < 3:
            axes.plot(steps, losses, "o-", color=colour)
        else:
            axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.35, label="each logged step")
            axes.plot(steps, smooth(losses), color=colour, linewidth=1.8, label="running mean")
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.savefig(path, dpi=120)
    return True


def loss_points(history: Iterable[Mapping[str, Any]], name: str = "loss") -> np.ndarray:
    """(step, value) of each entry with a finite loss, or another figure, [N, 2]."""
    points = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
    return np.array([point for point in points if math.isfinite(point[1])], dtype=np.float64).reshape(-1, 2)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twenty-fifth of the values, cut off at both ends."""
    width = max(3, len(values) // 25) | 1  # odd: centred
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _metadata(config: PanoramaConfig, run: dict[str, Any], stages: list[dict[str, Any]], name: str) -> ModelCardData:
    names = (config.vlm_name, config.vision_name, config.language_model_name)
    bases = [name for name in names if name and _is_hub_id(name)]
    paths = [data["path"] for stage in stages for data in stage.get("data") or []]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=run.get("license"),
        base_model=bases or None,
        datasets=list(dict.fromkeys(path for path in paths if _is_hub_id(path))) or None,
        tags=TAGS,
        model_name=name,
        eval_results=_eval_results(stages) or None,
    )


def _eval_results(stages: list[dict[str, Any]]) -> list[EvalResult]:
    """The results of the last stage that was evaluated, as the Hub shows them."""
    evaluated = [stage for stage in stages if stage.get("results")]
    if not evaluated:
        return []
    stage = evaluated[-1]
    paths = [data["path"] for data in stage.get("data") or []]
    names = [str(_name(path)) for path in paths] or ["unknown"]
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=next((path for path in paths if _is_hub_id(path)), names[0]),
            dataset_name=f"panoramas of {', '.join(names)} that were kept for validation",
            metric_type=metric.removeprefix("eval_"),
            metric_name=f"{metric} of stage {stage['name']}",
            metric_value=value,
        )
        for metric, value in stage["results"].items()
        if math.isfinite(value)
    ]


def _introduction(config: PanoramaConfig) -> str:
    vision = _name(config.vision_name) or f"a {config.vision_config.model_type}"
    language = _name(config.language_model_name) or f"a {config.text_config.model_type}"
    origin = f", both of {_name(config.vlm_name)}" if config.vlm_name else ""
    return (
        "A vision-language model that answers questions about 360° panoramas. It is a PanoramaVLM: a vision tower "
        f"({vision}) and a language model ({language}){origin}, joined so that every visual token knows which way it "
        "looks. "
        "The repo carries its own code, so it needs `trust_remote_code=True` where the package is not installed."
    )


def _views(config: PanoramaConfig) -> str:
    plan = config.view_plan
    rows = [("strategy", f"`{config.view_strategy}`")]
    if len(plan.tiles) > 1:
        rows.append(("field of view", f"{plan.views[plan.tiles[0]].fov:g}°"))
    if config.uses_overlap_ratio:
        rows.append(("overlap of neighbours", f"{config.overlap_ratio:.0%}"))
    rows += [
        ("views a panorama", f"{plan.num_views} of {config.image_size} x {config.image_size} pixels"),
        ("tokens a view", str(config.tokens_per_view)),
        ("tokens a panorama for the language model", str(config.num_image_tokens)),
        ("resampler", f"`{config.resampler_type}`, {config.latent_dimension} dimensions"),
    ]
    return table(["", ""], rows)


def _training(stages: list[dict[str, Any]]) -> str:
    """What each stage was, then the hyperparameters: one column a stage, one row for each that any stage has."""
    if not stages:
        return ""
    columns = [
        ("aim", lambda stage: STAGE_AIMS.get(stage["name"])),
        ("steps", lambda stage: stage.get("steps")),
        ("samples seen", lambda stage: stage.get("samples")),
        ("skipped samples", lambda stage: stage.get("skipped") or None),
        ("skipped steps", lambda stage: stage.get("skipped_steps") or None),
        ("time", lambda stage: _duration(stage.get("seconds"))),
    ]
    known = [(title, get) for title, get in columns if any(get(stage) is not None for stage in stages)]
    rows = [[f"`{stage['name']}`", *(get(stage) for _, get in known)] for stage in stages]
    parts = [table(["stage", *(title for title, _ in known)], rows)]
    parts.append(_by_stage("hyperparameter", [(stage["name"], stage.get("hyperparameters") or {}) for stage in stages]))
    return "\n\n".join(part for part in parts if part)


def _data(stages: list[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        for data in stage.get("data") or []:
            path = data["path"]
            name = f"[{path}](https://huggingface.co/datasets/{path})" if _is_hub_id(path) else f"`{_name(path)}`"
            rows.append([f"`{stage['name']}`", name, data.get("samples"), data.get("weight")])
    return table(["stage", "data", "samples", "weight"], rows)


def _results(stages: list[dict[str, Any]]) -> str:
    return _by_stage("measure", [(stage["name"], stage["results"]) for stage in stages if stage.get("results")])


def _samples(samples: list[dict[str, Any]]) -> str:
    fields = [field for field in ("image", "question", "answer", "reference") if any(field in s for s in samples)]
    rows = [[_name(s.get(field)) if field == "image" else s.get(field) for field in fields] for s in samples]
    answers = table(fields, rows)
    trained = any(s.get("trained") for s in samples)
    words = "Given by this model" + " to questions that it was trained on" * trained
    return answers and f"{words}. What is empty is what it gave.\n\n{answers}"


def _limits(config: PanoramaConfig, stages: list[dict[str, Any]], own: list[str]) -> str:
    limits = [
        *own,
        "Equirectangular panoramas only: an ordinary photograph is taken for one and read wrongly.",
        f"A panorama is seen through {config.num_views} views of {config.image_size} x {config.image_size} pixels; "
        "what is smaller than a few of those pixels is not seen.",
        "Answers can be wrong and sound certain. The model inherits the errors and biases of the two models it is made "
        "of and of its data.",
    ]
    trained = {stage["name"] for stage in stages}
    if trained and "finetune" not in trained:
        limits.append("It is not finished: stage `finetune` has not been trained, answers are not to be relied on.")
    elif not stages:
        limits.append("Nothing is known of its training.")
    if stages and not any(stage.get("results") for stage in stages):
        limits.append(NOT_EVALUATED)
    return "\n".join(f"- {limit}" for limit in limits)


def _licence(name: str | None, config: PanoramaConfig) -> str:
    if name is None:
        return ""
    parts = [name for name in (config.vlm_name, config.vision_name, config.language_model_name) if name]
    return (
        f"`{name}`."
        + " The licences of the parts hold as well: " * bool(parts)
        + ", ".join(map(str, map(_name, parts)))
    )


def _by_stage(title: str, stages: list[tuple[str, dict[str, Any]]]) -> str:
    """A row for each name that any stage has, a column for each stage."""
    names = list(dict.fromkeys(name for _, values in stages for name in values))
    rows = [[f"`{name}`", *(values.get(name) for _, values in stages)] for name in names]
    return table([title, *(f"`{stage}`" for stage, _ in stages)], rows)


def table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table of Markdown; empty where there are no rows. What could be a path of this machine is its last part."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    text = " ".join(str(value).split())
    if os.path.isabs(text):  # a public card says nothing about the disk of the machine
        text = Path(text).name
    return text.replace("|", "\\|").replace("<", "&lt;")


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _is_hub_id(name: str) -> bool:
    """Whether a name looks like `owner/name` and is no folder here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def _name(path: str | None) -> str | None:
    """A Hub id as it is; of a file or folder its own name: a public card says nothing about the disk it lay on."""
    return path if path is None or _is_hub_id(path) else Path(path).name
