"""What every part of a stage's run knows: the options, the processes, where things lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType

from .config import StageConfig, TrainConfig
from .fingerprint import fingerprint

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass
class Stage:
    """One stage of a run.

    Args:
        config: of the run.
        accelerator: of its processes.
        name: `vision`, `resampler` or `finetune`.
        start: the folder of the model that it starts from; without one, what the configuration names.
    """

    config: TrainConfig
    accelerator: Accelerator
    name: str
    start: str | None

    @property
    def options(self) -> StageConfig:
        """Of this stage."""
        return self.config.stage_config(self.name)

    @property
    def output(self) -> Path:
        """Of the run."""
        return Path(self.config.output)

    @property
    def folder(self) -> Path:
        """Of the trained model."""
        return self.output / self.name

    @property
    def logs(self) -> Path:
        """Of this stage."""
        return self.output / "logs" / self.name

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all weights."""
        return self.accelerator.distributed_type in SHARDED

    def fingerprint(self, steps: int, samples: int | None) -> dict[str, Any]:
        """What has to be the same for the stage to go on: what decides it, which samples a step holds, and who can read
        the checkpoint.

        Args:
            steps: of the stage.
            samples: of its data; none of a stream.
        """
        world = self.accelerator.num_processes
        readers = {"processes": world, "num_workers": self.config.num_workers}
        return {
            **fingerprint(self.config, self.name, world),
            "mixed precision": self.accelerator.mixed_precision,
            "steps": steps,
            "samples": samples,
            "shards": self.accelerator.distributed_type.value if self.is_sharded else None,
            **({} if samples is not None else {f"{name} (of a stream)": value for name, value in readers.items()}),
        }
