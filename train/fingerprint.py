"""What decides a stage: the options that its weights depend on, kept beside them and compared before they are used."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ..synthetic.cutouts import available
from ..synthetic.write import SYNTHETIC
from .config import TrainConfig

FILE = "training.json"  # in the folder of a finished stage; not pushed, because it names local paths
OPTIONAL = ("options.", "compose.")
# The weights do not depend on these: they may change whenever a run goes on.
FREE = (
    *(
        "output",
        "stage",
        "resume",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "eval_every",
        "eval_samples",
        "eval_batches",
    ),
    *(
        "trackers",
        "project",
        "push_to_hub",
        "hub_private",
        "hub_every",
        "num_workers",
        "max_bad_share",
        "max_skipped_steps",
    ),
    *("gradient_checkpointing", "vision", "resampler", "finetune", "data", "cache_dir"),
)


def fingerprint(config: TrainConfig, stage: str, world: int) -> dict[str, Any]:
    """Name -> value of everything in a configuration that decides a stage, as JSON holds it.

    Args:
        config: of the run.
        stage: which one.
        world: processes; how a step is spread over them does not matter, only how many samples it has.
    """
    options = config.stage_config(stage)
    own = dataclasses.asdict(options)
    size = own.pop("batch_size") * own.pop("accumulation") * world
    own["data"] = [_source(source) for source in options.data or config.data]
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    found = {"samples of a step": size, **shared, **{f"{stage}.{name}": value for name, value in own.items()}}
    if stage == "vision":
        found["headings in steps of 45 degrees (cache_dir)"] = config.cache_dir is not None
    return json.loads(json.dumps(_flat(found)))


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what is not the same.

    An option that may be left out (of the model, of parts of it) counts as changed where only one of the two has it. Of
    the trainer's own, each of which always has a value, one that only one knows comes from another version.
    """
    found = []
    for name in sorted({*then, *now}):
        optional = name.startswith(OPTIONAL) or ".learning_rates." in name
        if then.get(name) != now.get(name) and (optional or (name in then and name in now)):
            found.append(f"{name} was {then.get(name, 'not given')} and is {now.get(name, 'not given')}")
    return found


def check_finished(folder: Path, now: dict[str, Any], only: tuple[str, ...] = ("",)) -> None:
    """See that the folder of a stage holds what this run would train.

    Args:
        folder: of the stage.
        now: the fingerprint of this run.
        only: how the names of what is compared begin.

    Raises:
        ValueError: for a folder of something else, and for a stage that was trained with other options, each named.
    """
    stage = folder.name
    try:
        then = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} is there and is no stage that this trainer has finished ({FILE}: {error}); choose "
            "another --output, or move the folder away"
        ) from error
    parts = ({name: value for name, value in each.items() if name.startswith(only)} for each in (then, now))
    if changed := differences(*parts):
        raise ValueError(
            f"stage {stage!r} in {str(folder)!r} was trained otherwise: {'; '.join(changed)}. Set it back to go on "
            f"from there, choose another --output, or move the folder away to train the stage again"
        )


def _source(source: Any) -> dict[str, Any]:
    paths = {"path": _absolute(source.path), "images": _absolute(source.images)}
    # Scenes that are rendered while training are others where there are no pictures of things.
    rendered = {"cut-outs": len(available())} if source.path.startswith(SYNTHETIC) else {}
    return {**dataclasses.asdict(source), **paths, **rendered}


def _absolute(path: str | None) -> str | None:
    return os.path.realpath(os.path.expanduser(path)) if path and os.path.exists(os.path.expanduser(path)) else path


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
