"""What is checked before the first step of the first stage: where to write, what to start from, what is done."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers

from ..checkpoint_panorama import read_state
from ..data.augmentation import missing_knowledge
from ..data.samples import Samples, open_data
from ..options_panorama import check_workers
from ..stages_panorama import STAGES
from .build import check_parts
from .checkpoint import newest_checkpoint
from .config import TrainConfig
from .fingerprint import FILE, check_finished, fingerprint
from .labels import label_fields


@dataclass
class Plan:
    """What a run has to do.

    Attributes:
        start: the folder that the first stage starts from; without one, what the configuration names.
        data: training and validation samples of each stage that is to be trained.
        checkpoint: to go on from, and the stage it belongs to.
    """

    start: str | None
    data: dict[str, tuple[Samples, Samples | None]]
    checkpoint: Path | None
    resumed_stage: str | None


def check_run(config: TrainConfig, accelerator: Accelerator) -> Plan:
    """See that every stage of a run can be trained.

    Raises:
        ValueError: for what cannot be, in a sentence that says what to do.
    """
    _check_launch(config, accelerator)
    output, world = Path(config.output), accelerator.num_processes
    done, to_train = _check_output(config, output, world)
    checkpoint = _find_checkpoint(config, output)
    resumed_stage = None if checkpoint is None else read_state(checkpoint)["stage"]
    if config.resume not in ("auto", "never") and resumed_stage not in config.stages:
        stages = ", ".join(config.stages)
        where = f"a checkpoint of {resumed_stage!r}, and this run trains {stages}"
        raise ValueError(f"--resume {config.resume!r} is {where}")
    start = _start_before(config, output, world)
    check_parts(config, start=done[-1] if done else start)
    data = {}
    for stage in to_train:
        sources = config.stage_config(stage).data or config.data
        share = config.validation_share
        data[stage] = open_data(sources, stage=stage, seed=config.seed, validation_share=share)
        if stage != "vision":
            for opened in data[stage][0].opened:
                for lacks in missing_knowledge(config.stage_config(stage).augmentation, opened.known):
                    warnings.warn(f"stage {stage}: {opened.source.path!r} has {lacks}", stacklevel=2)
        if config.stage_config(stage).label_loss_weight > 0:
            label_fields(data[stage][0])
    return Plan(start, data, checkpoint, resumed_stage)


def _check_launch(config: TrainConfig, accelerator: Accelerator) -> None:
    if missing := set(config.trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise ValueError(f"trackers {sorted(missing)} are not installed: pip install them, or use --trackers '[]'")
    if accelerator.num_processes == 1 < (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise ValueError(
            f"{started} processes were started, but no GPU was found and each would train by itself; "
            "on CPUs: accelerate launch --cpu"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps} of accelerate launch would divide "
            "the gradients once more: leave it out, and use --STAGE.accumulation"
        )
    check_workers("num_workers", config.num_workers)
    if config.max_skipped_steps and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"max_skipped_steps is {config.max_skipped_steps}, and DeepSpeed changes the weights before the loss is "
            "known: leave it out, or use data parallel or FSDP2"
        )
    by_muon = [stage for stage in config.stages if config.stage_config(stage).optimizer == "muon"]
    if by_muon and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"{by_muon[0]}.optimizer is 'muon', which works on whole matrices, and DeepSpeed lays what a "
            f"process trains in one vector: use data parallel or FSDP2, or --{by_muon[0]}.optimizer adamw"
        )


def _check_output(config: TrainConfig, output: Path, world: int) -> tuple[list[str], list[str]]:
    """The folders of the stages that are done, and the stages to train.

    Raises:
        ValueError: where `output` cannot be written, or holds a stage that was trained otherwise.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to --output {str(output)!r}: {error}") from error
    done, to_train = [], []
    for stage in config.stages:
        if not (output / stage).exists():
            to_train.append(stage)
        elif to_train:
            raise ValueError(
                f"{str(output)!r} holds stage {stage!r}, but not {to_train[0]!r} from which it would be trained: "
                "choose another --output, or name a stage with --stage"
            )
        else:
            check_finished(output / stage, fingerprint(config, stage, world))
            done.append(str(output / stage))
    return done, to_train


def _start_before(config: TrainConfig, output: Path, world: int) -> str | None:
    """Where the first stage of a run starts, if stages are trained one at a time: the one before, in `output`.

    Raises:
        ValueError: where that started from something else than this run says.
    """
    before = [output / stage for stage in STAGES[: STAGES.index(config.stages[0])]]
    found = [str(folder) for folder in before if (folder / FILE).is_file()]
    if not found:
        return None
    before_it = Path(found[-1])
    check_finished(before_it, fingerprint(config, before_it.name, world), only=("compose.", "model", "options."))
    return found[-1]


def _find_checkpoint(config: TrainConfig, output: Path) -> Path | None:
    """The checkpoint to go on from."""
    if config.resume == "never":
        if any((output / name).exists() for name in ("checkpoints", *config.stages)):
            raise ValueError(f"--resume never, but {str(output)!r} holds a run: choose another --output, or delete it")
        return None
    if config.resume == "auto":
        return newest_checkpoint(output / "checkpoints")
    read_state(config.resume, whole=None)
    return Path(config.resume)
