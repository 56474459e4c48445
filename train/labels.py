"""The head that teaches tokens what they show: made for a stage, and handed on to the next."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..data.collators import Labelled
from ..data.samples import Samples
from ..modeling_panorama import PanoramaVLM
from .stage import Stage

logger = logging.getLogger(__name__)

FILE = "label_head.safetensors"  # in the folder of a stage: training alone has it
PREFIX = "label_head."


def label_fields(train: Samples) -> dict[str, int]:
    """How many classes each field of the token labels has, of all sources.

    Raises:
        ValueError: for sources that differ in the classes of a field, and where none has labels.
    """
    fields: dict[str, int] = {}
    for opened in train.opened:
        for name, classes in opened.label_fields.items():
            if fields.setdefault(name, classes) != classes:
                raise ValueError(
                    f"{opened.source.path!r} has {classes} classes of the token label {name!r}, and a source before it "
                    f"{fields[name]}: they must be the same, or have other names"
                )
    if not fields:
        raise ValueError(
            "label_loss_weight is positive, but no source of the stage says what directions show: give one `labels`, "
            "or set it to 0"
        )
    return fields


def add_label_head(stage: Stage, model: PanoramaVLM, train: Samples) -> Labelled | None:
    """Give a model the head that the stage needs, from the stage before where that had the same."""
    if stage.options.label_loss_weight == 0:
        return None
    fields = label_fields(train)
    head = model.add_label_head(fields)
    start = stage.start or stage.config.model
    path = None if start is None else Path(start, FILE)
    if path is not None and path.is_file():
        weights, own = load_file(path), head.state_dict()
        if {name: value.shape for name, value in weights.items()} == {name: own[name].shape for name in own}:
            head.load_state_dict(weights)
        else:
            logger.warning("The label head of %s has other classes: a new one is trained.", start)
    return Labelled(model.config.token_grid, tuple(fields))


def save_label_head(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Keep the head for the next stage, where a model's weights have one."""
    own = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    if own:
        save_file({name: value.contiguous().cpu() for name, value in own.items()}, folder / FILE)
