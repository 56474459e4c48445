"""The folder of a trained stage: a model that loads anywhere, with its processor, card and adapters."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from .card import read_history, write_model_card
from .checkpoint import save_adapters, whole_folder, write_whole
from .fingerprint import FILE
from .labels import PREFIX, save_label_head
from .metrics import METRICS, SAMPLES, read_lines
from .stage import Stage

logger = logging.getLogger(__name__)

VERSIONS = ("panorama-vlm", "torch", "transformers", "accelerate", "peft", "datasets", "huggingface-hub")


class Exporter:
    """Writes the model of a stage.

    Args:
        stage: that is trained.
        model: prepared by Accelerate.
        processor: of the model.
    """

    def __init__(self, stage: Stage, model: Any, processor: PanoramaProcessor):
        self.stage, self.model, self.processor = stage, model, processor
        self.plain: PanoramaVLM = stage.accelerator.unwrap_model(model)

    def finish(self, summary: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """The folder of the trained stage, whole or not there; on all processes, the main one writes."""
        accelerator = self.stage.accelerator
        gathered = accelerator.get_state_dict(self.model) if self.stage.is_sharded else None
        accelerator.wait_for_everyone()
        if self.stage.is_main:
            with whole_folder(self.stage.folder) as folder:
                self.export(folder, summary, gathered)
                save_label_head(gathered or self.plain.state_dict(), folder)
                (folder / FILE).write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
            logger.info("Saved %s.", self.stage.folder)
        accelerator.wait_for_everyone()

    def export(self, folder: Path, summary: dict[str, Any], gathered: dict[str, torch.Tensor] | None = None) -> None:
        """Write the model into a folder; the main process alone.

        Args:
            folder: to write into.
            summary: of the stage for the card: `steps`, `samples`, `seconds`, `data`, `results`, `skipped`,
                `skipped_steps`.
            gathered: the weights, where no process has all of them.
        """
        model = self.plain if gathered is None else self._gathered(gathered)
        was_training = [module for module in model.modules() if module.training]
        model.eval().save_pretrained(folder)
        if model.has_lora:
            base = self.stage.start or self.stage.config.model
            save_adapters(model, folder / "adapter", base, model.state_dict())
        for module in was_training:
            module.training = True
        self.processor.save_pretrained(folder)
        self._write_card(folder, model, self._stages(summary), summary["steps"])

    def _gathered(self, weights: dict[str, torch.Tensor]) -> PanoramaVLM:
        """A second model that takes in weights which lie in shards."""
        model = PanoramaVLM(self.plain.config)
        if self.plain.has_lora:
            model.add_lora()
        model.set_stage(self.stage.name)  # type: ignore[arg-type]
        model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(PREFIX)})
        model.generation_config = self.plain.generation_config
        return model

    def _stages(self, summary: dict[str, Any]) -> dict[str, Any]:
        """What is known of the stages of this run, this one as it is now; kept in `stages.json`."""
        path = self.stage.output / "stages.json"
        stages = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        options = {name: value for name, value in dataclasses.asdict(self.stage.options).items() if name != "data"}
        stages[self.stage.name] = {"name": self.stage.name, "hyperparameters": options, **summary}
        write_whole(path, json.dumps(stages, indent=1))
        return stages

    def _write_card(self, folder: Path, model: PanoramaVLM, stages: dict[str, Any], step: int) -> None:
        logs = {name: self.stage.output / "logs" / name / METRICS for name in stages}
        history = {name: read_history(path).get(name, []) for name, path in logs.items() if path.is_file()}
        write_model_card(
            folder,
            config=model.config,
            run={
                "repo_id": self.stage.config.push_to_hub,
                "stages": [{**stages[name], "history": history.get(name, [])} for name in stages],
                "samples": [said for said in read_lines(self.stage.logs / SAMPLES) if said["step"] == step],
                "versions": _versions(),
            },
        )


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
