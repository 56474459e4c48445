"""Options of a training run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("vision", "resampler", "finetune")


@dataclass
class TrainConfig:
    """One stage of training. The fields are the options of the command line."""

    stage: str = field(metadata={"help": "vision, resampler or finetune", "choices": STAGES})
    data: str = field(
        metadata={"help": "folder with metadata.jsonl: a JSON object of file_name, query, annotation a line"}
    )
    output: str = field(metadata={"help": "folder for the trained model and its processor"})
    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id to start from, such as the output of the stage before"}
    )
    vision: str | None = field(default=None, metadata={"help": "without --model: Hub id or folder of a vision tower"})
    language: str | None = field(
        default=None, metadata={"help": "without --model: Hub id or folder of a language model"}
    )
    options: str = field(
        default="{}", metadata={"help": "options of PanoramaConfig as JSON, such as '{\"overlap_ratio\": 0.25}'"}
    )
    epochs: int = field(default=1, metadata={"help": "passes over the data"})
    batch_size: int = field(default=4, metadata={"help": "samples a step and process"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak of the schedule"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the steps in which the learning rate rises"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    num_workers: int = field(default=0, metadata={"help": "processes that cut views"})
    log_every: int = field(default=10, metadata={"help": "steps between two log lines"})
    seed: int = field(default=0, metadata={"help": "of weights, order and augmentation"})

    def check(self) -> None:
        """Raise `ValueError` for what is wrong, before anything is loaded."""
        for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.model is None and (self.vision is None or self.language is None):
            raise ValueError("give --model, or both --vision and --language to compose a new one")
        if self.model is not None and (self.vision is not None or self.language is not None):
            raise ValueError("--vision and --language compose a new model: leave them out with --model, or --model")
        metadata = Path(self.data, "metadata.jsonl")
        if not metadata.is_file():
            raise ValueError(f"--data needs a folder with metadata.jsonl, {str(metadata)!r} does not exist")
        self.model_options()

    def model_options(self) -> dict[str, Any]:
        """`--options`, read."""
        try:
            options = json.loads(self.options)
        except json.JSONDecodeError as error:
            raise ValueError(f"--options must be JSON, got {self.options!r}: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"--options must be a JSON object, got {self.options!r}")
        return options
