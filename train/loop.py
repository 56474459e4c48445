"""The loop: stages in order, on any number of processes, resumed where they were stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoint_panorama import choose_attention
from ..data.samples import Samples
from ..data.skipped import SkippedSamples
from ..modeling_panorama import PanoramaVLM
from .build import batch_statistics, check_packing, checkpoint_activations, frozen_at_random, load_start, prepare
from .checkpoint import Checkpoints, whole_folder
from .checks import check_run
from .config import TrainConfig, save_config
from .evaluate import Evaluator
from .export import Exporter
from .feed import Feed
from .hub import HubPusher
from .labels import add_label_head
from .metrics import Metrics
from .optimizers import make_schedule
from .signals import Preempted, asked_to_stop
from .stage import Stage
from .steps import OptimizerStep

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, list[float]]:
    """Train the stages of a run, each from the one before.

    In `config.output` are left: `config.yaml`; `vision/`, `resampler/`, `finetune/`, folders of the trained models that
    load anywhere (with LoRA, `finetune/adapter/` as well); `checkpoints/`; `logs/STAGE/` with `metrics.jsonl`,
    `samples.jsonl` and `skipped.jsonl`.

    Returns:
        The loss of every step of each stage that was trained now; a resumed stage begins where it was resumed.

    Raises:
        ValueError: for data or options that are wrong as a whole.
        TooManyBadSamples: when more samples than `config.max_bad_share` cannot be used.
        FloatingPointError: when the loss, the gradient or what was learned is not finite, in more steps in a row than
            `config.max_skipped_steps`; the step is named, and the last checkpoint is good.
        Preempted: after SIGTERM, when a checkpoint is written.
    """
    output = Path(config.output)
    accelerator = Accelerator(
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    plan = check_run(config, accelerator)
    pusher = _pusher(config) if accelerator.is_main_process else None
    if config.trackers:
        accelerator.init_trackers(config.project, config=_flat(dataclasses.asdict(config)))
    losses: dict[str, list[float]] = {}
    start = plan.start
    with asked_to_stop() as asked:
        for name in config.stages:
            if name in plan.data:
                run = _StageRun(Stage(config, accelerator, name, start), *plan.data.pop(name), pusher, asked)
                losses[name] = run.train(plan.checkpoint if name == plan.resumed_stage else None)
                del run
                accelerator.free_memory()
            else:
                logger.info("Stage %s is done: %s.", name, output / name)
            start = str(output / name)
    if pusher is not None and start is not None:
        pusher.push(start, f"Stage {config.stages[-1]} of PanoramaVLM")
        for command in pusher.finish():
            logger.error("Not everything is on the Hub. This pushes it:\n%s", command)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return losses


def _pusher(config: TrainConfig) -> HubPusher | None:
    if not config.push_to_hub:
        return None
    pusher = HubPusher(config.push_to_hub, private=config.hub_private)
    pusher.check()
    return pusher


class _StageRun:
    """One stage: its parts, and their loop."""

    def __init__(
        self,
        stage: Stage,
        train: Samples,
        validation: Samples | None,
        pusher: HubPusher | None,
        asked: list[bool],
    ):
        self.stage, self.config, self.pusher, self.asked = stage, stage.config, pusher, asked
        set_seed(self.config.seed)
        model, self.processor = load_start(self.config, stage.start)
        labelled = add_label_head(stage, model, train)
        self._set_stage(model)
        compares = model.config.overlap_loss_weight_finetune > 0
        self.feed = Feed(stage, self.processor, train, validation, compares, labelled)
        self.total = self.feed.stream.steps
        self.model, self.optimizer = prepare(stage, model)
        self.schedule = make_schedule(self.optimizer, stage.options, self.total)
        self.skipped = SkippedSamples(
            stage.logs / "skipped.jsonl",
            self.config.max_bad_share,
            minimum=20 if train.streaming else min(20, len(train)),
            write=stage.is_main,
        )
        self.metrics = Metrics(stage)
        self.optimize = OptimizerStep(stage, self.model, self.optimizer, self.schedule, self.processor, self.skipped)
        self.evaluate = Evaluator(self.optimize, self.feed)
        self.checkpoints = Checkpoints(stage, stage.fingerprint(self.total, self.feed.size))
        self.exporter = Exporter(stage, self.model, self.processor)
        self.step, self.seconds = 0, 0.0
        self.results: dict[str, float] = {}

    def _set_stage(self, model: PanoramaVLM) -> None:
        """Say which parts train, and how attention and memory are handled."""
        accelerator = self.stage.accelerator
        precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
        attention: str = self.config.attention
        if attention == "auto":
            attention = choose_attention(accelerator.device, precision)
            if attention != "sdpa" and self.stage.options.independent_questions > 0:
                logger.info(
                    "Questions that do not see each other need a mask of their own: sdpa instead of %s.", attention
                )
                attention = "sdpa"
        if attention != "sdpa":
            model.set_attn_implementation(attention)
        trained = model.set_stage(self.stage.name)  # type: ignore[arg-type]
        if self.stage.options.independent_questions > 0:
            check_packing(model)
        if self.config.gradient_checkpointing:
            checkpoint_activations(model)
        set_seed(self.config.seed, device_specific=True)  # processes drop out other units
        if self.stage.is_main:
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            world = accelerator.num_processes
            where = f"{world} process{'es' * (world > 1)}"
            for words in [*frozen_at_random(self.config, model, self.stage.name), *batch_statistics(model)]:
                logger.warning(words)
            logger.info(
                "Stage %s trains %s parameters in %d tensors on %s.", self.stage.name, f"{count:,}", len(trained), where
            )

    def train(self, resumed: Path | None) -> list[float]:
        """All steps that are left, then the folder of the stage."""
        self._begin(resumed)
        losses: list[float] = []
        is_main = self.stage.is_main
        progress = tqdm(total=self.total, initial=self.step, desc=self.stage.name, disable=not is_main, smoothing=0.05)
        with progress, logging_redirect_tqdm(), self.feed.training() as steps:
            while self.step < self.total:
                with self.metrics.clock.waiting():
                    made = next(steps)
                figures = self.optimize(made, self._is_due(self.config.log_every, made.index + 1), self.asked[0])
                stop = figures.pop("stop") > 0
                self.step = made.index + 1
                self.feed.remember(made)
                losses.append(figures["loss"])
                progress.update()
                progress.set_postfix(loss=f"{figures['loss']:.4f}")
                self._log(figures, self.feed.epoch(made))
                if self._is_due(self.config.eval_every, self.step):
                    self._evaluate()
                if self._is_due(self.config.save_every, self.step) or stop:
                    self._save()
                if stop and self.step < self.total:
                    logger.warning("Asked to stop: saved step %d of stage %s.", self.step, self.stage.name)
                    raise Preempted(f"stopped at step {self.step} of stage {self.stage.name}")
        self.optimize.check_weights(self.step)
        self.exporter.finish(self._summary(), self.checkpoints.fingerprint)
        if is_main and (words := self.skipped.summary()):
            logger.warning("Stage %s: %s", self.stage.name, words)
        return losses

    def _begin(self, resumed: Path | None) -> None:
        """Begin, or go on where a checkpoint was written."""
        if resumed is not None:
            self.step, progress, readers = self.checkpoints.load(resumed)
            self.schedule.load_state_dict(progress["schedule"])
            self.optimize.skipped_steps = dict(progress.get("skipped_steps", self.optimize.skipped_steps))
            self.seconds, self.results = progress["seconds"], progress["results"]
            self.feed.go_on(self.step, readers)
        self.skipped.rewind(self.step, self.feed.stream.seen_before(self.step))
        self.metrics.rewind(self.step, self.seconds)
        if self.stage.is_main:
            save_config(self.config, self.stage.output / "config.yaml")

    def _is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.total

    def _log(self, figures: dict[str, float], epoch: float) -> None:
        clock = self.metrics.clock
        clock.count(figures)
        self.seconds = clock.seconds
        if self._is_due(self.config.log_every, self.step):
            rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
            self.metrics.log_step(self.step, {**figures, **clock.rates(), "epoch": epoch}, rates)

    def _evaluate(self) -> None:
        results, answers = self.evaluate()
        if results:
            self.results = results
            if not all(map(math.isfinite, results.values())):
                logger.warning("Step %d of stage %s: the evaluation is not finite.", self.step, self.stage.name)
            self.metrics.log_results(self.step, results)
        self.metrics.log_answers(self.step, answers)

    def _save(self) -> None:
        self.optimize.check_weights(self.step)
        progress = {"seconds": self.seconds, "schedule": self.schedule.state_dict(), "results": self.results}
        progress["skipped_steps"] = self.optimize.skipped_steps
        folder = self.checkpoints.save(self.step, progress, self.feed.stream.states, self._describe)
        if self.pusher is not None and self._is_push_due():
            pushed = self.stage.output / f".hub-{folder.name}"
            with whole_folder(pushed) as unfinished:
                self.exporter.export(unfinished, self._summary())
            self.pusher.push(pushed, f"Step {self.step} of stage {self.stage.name}", temporary=True)
        self.stage.accelerator.wait_for_everyone()

    def _describe(self, folder: Path) -> None:
        self.exporter.plain.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _is_push_due(self) -> bool:
        number = math.ceil(self.step / self.config.save_every)
        due = self.config.hub_every > 0 and number % self.config.hub_every == 0 and self.step < self.total
        if due and self.stage.is_sharded:
            logger.warning("Weights in shards are pushed at the end of the run, not at checkpoints.")
        return due and not self.stage.is_sharded

    def _summary(self) -> dict[str, Any]:
        """What the model card says of this stage."""
        return {
            "steps": self.step,
            "samples": self.feed.stream.seen_before(self.step),
            "seconds": self.seconds,
            "data": self.feed.describe(),
            "results": self.results,
            "skipped": self.skipped.bad,
            "skipped_steps": self.optimize.skipped_steps["total"],
        }


def _flat(options: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """Options as trackers take them."""
    return {k: v if isinstance(v, str | int | float | bool) else json.dumps(v, default=str) for k, v in options.items()}
