"""The loop: stages in order, on any number of processes, resumed where they were stopped."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import FullyShardedDataParallelPlugin, ProjectConfiguration, gather_object, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ask import answer
from ..checkpoint_panorama import choose_attention, read_state
from ..data.collators import ConversationCollator, VisionCollator
from ..data.samples import Samples, open_data
from ..data.skipped import SkippedSamples
from ..data.stream import BatchStream, Step
from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import IGNORE_INDEX
from ..stages_panorama import PARTS, STAGES, part_of
from .build import check_parts, load_start
from .card import read_history, write_model_card
from .checkpoint import (
    commit_folder,
    newest_checkpoint,
    save_adapters,
    unfinished_folder,
    whole_folder,
    write_state,
    write_whole,
)
from .config import TrainConfig, save_config
from .fingerprint import FILE, check_finished, differences, fingerprint
from .hub import HubPusher

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit status after SIGTERM: everything is saved, start again (EX_TEMPFAIL of sysexits.h)
VERSIONS = ("panorama-vlm", "torch", "transformers", "accelerate", "peft", "datasets", "huggingface-hub")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
Batch = dict[str, torch.Tensor]


class Preempted(Exception):
    """The run was asked to stop, and has saved where it is."""


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
        FloatingPointError: when the loss is not finite; the step is named.
        Preempted: after SIGTERM, when a checkpoint is written.
    """
    output = Path(config.output)
    if missing := set(config.trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise ValueError(f"trackers {sorted(missing)} are not installed: pip install them, or use --trackers '[]'")
    accelerator = Accelerator(
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
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
    done, to_train = _check_output(config, output, accelerator)
    checkpoint = _find_checkpoint(config, output)
    resumed_stage = None if checkpoint is None else read_state(checkpoint)["stage"]
    if config.resume not in ("auto", "never") and resumed_stage not in config.stages:
        stages = ", ".join(config.stages)
        where = f"a checkpoint of {resumed_stage!r}, and this run trains {stages}"
        raise ValueError(f"--resume {config.resume!r} is {where}")
    start = _start_before(config, output, accelerator)
    check_parts(config, start=done[-1] if done else start)
    data = {
        stage: open_data(
            config.stage_config(stage).data or config.data,
            stage=stage,
            seed=config.seed,
            validation_share=config.validation_share,
        )
        for stage in to_train
    }
    pusher = None
    if accelerator.is_main_process:
        if config.push_to_hub:
            pusher = HubPusher(config.push_to_hub, private=config.hub_private)
            pusher.check()
    if config.trackers:
        accelerator.init_trackers(config.project, config=_flat(dataclasses.asdict(config)))
    losses: dict[str, list[float]] = {}
    with _asked_to_stop() as asked_to_stop:
        for stage in config.stages:
            if stage in to_train:
                run = _StageRun(config, accelerator, stage, start, data.pop(stage), pusher, asked_to_stop)
                losses[stage] = run.train(checkpoint if stage == resumed_stage else None)
                del run
                accelerator.free_memory()
            else:
                logger.info("Stage %s is done: %s.", stage, output / stage)
            start = str(output / stage)
    if pusher is not None and start is not None:
        pusher.push(start, f"Stage {config.stages[-1]} of PanoramaVLM")
        for command in pusher.finish():
            logger.error("Not everything is on the Hub. This pushes it:\n%s", command)
    if config.trackers:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    return losses


def _check_output(config: TrainConfig, output: Path, accelerator: Accelerator) -> tuple[list[str], list[str]]:
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
            check_finished(output / stage, fingerprint(config, stage, accelerator.num_processes))
            done.append(str(output / stage))
    return done, to_train


def _start_before(config: TrainConfig, output: Path, accelerator: Accelerator) -> str | None:
    """Where the first stage of a run starts, if stages are trained one at a time: the one before, in `output`.

    Raises:
        ValueError: where that was composed otherwise than this run says.
    """
    before = [output / stage for stage in STAGES[: STAGES.index(config.stages[0])]]
    found = [str(folder) for folder in before if (folder / FILE).is_file()]
    if found and config.model is not None:
        raise ValueError(
            f"--model {config.model!r} and the trained stage {found[-1]!r} both say what to start from: leave out "
            "--model, or choose another --output"
        )
    if not found:
        return None
    before_it = Path(found[-1])
    now = fingerprint(config, before_it.name, accelerator.num_processes)
    check_finished(before_it, now, only=("compose.", "model", "options."))
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


class _StageRun:
    """One stage: everything it needs, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        stage: str,
        start: str | None,
        data: tuple[Samples, Samples | None],
        pusher: HubPusher | None,
        asked_to_stop: list[bool],
    ):
        self.config, self.accelerator, self.stage, self.start = config, accelerator, stage, start
        self.pusher, self.asked_to_stop = pusher, asked_to_stop
        self.options = config.stage_config(stage)
        self.output = Path(config.output)
        self.logs = self.output / "logs" / stage
        set_seed(config.seed)
        model, self.processor = load_start(config, start)
        precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
        if (attention := choose_attention(accelerator.device, precision)) != "sdpa":
            model.set_attn_implementation(attention)
        trained = model.set_stage(stage)  # type: ignore[arg-type]
        if config.gradient_checkpointing:
            _checkpoint_activations(model)
        set_seed(config.seed, device_specific=True)  # processes drop out other units
        if accelerator.is_main_process:
            self.logs.mkdir(parents=True, exist_ok=True)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            logger.info(
                "Stage %s trains %s parameters in %d tensors on %d process%s.",
                stage,
                f"{count:,}",
                len(trained),
                accelerator.num_processes,
                "es" * (accelerator.num_processes > 1),
            )

        sources = self.options.data or config.data
        train, self.validation = data
        self.samples = train
        self.sources = [
            {"path": source.path, "samples": None if train.streaming else len(train), "weight": source.weight}
            for source in sources
        ]
        self.joins = model.overlap.joins_processes and (
            stage == "vision" or model.config.overlap_loss_weight_finetune > 0
        )
        self.compares = model.config.overlap_loss_weight_finetune > 0
        self.stream = self._batches(train)
        optimizer = torch.optim.AdamW(self._parameter_groups(model), lr=self.options.learning_rate)
        self.model, self.optimizer = self._prepare(model, optimizer)
        warmup = int(self.stream.steps * self.options.warmup_ratio)
        self.schedule = get_scheduler(self.options.schedule, self.optimizer, warmup, self.stream.steps)

        self.skipped = SkippedSamples(
            self.logs / "skipped.jsonl",
            config.max_bad_share,
            minimum=20 if train.streaming else min(20, len(train)),
            write=accelerator.is_main_process,
        )
        self.step = 0
        self.best: tuple[float, int] | None = None
        self.results: dict[str, float] = {}
        self.seconds = 0.0
        self._filler: Batch | None = None

    def _batches(self, samples: Samples, training: bool = True) -> BatchStream:
        collate: Any
        if self.stage == "vision":
            heading = training and self.config.random_heading
            collate = VisionCollator(self.processor, self.config.seed, self.config.cache_dir, heading)
        else:
            collate = ConversationCollator(self.processor, self.config.cache_dir, self.compares)
        steps = self.options.max_steps if training else (self.config.eval_samples or 1) if samples.streaming else None
        return BatchStream(
            samples,
            collate,
            batch_size=self.options.batch_size,
            accumulation=self.options.accumulation if training else 1,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            seed=self.config.seed,
            epochs=self.options.epochs if training else 1,
            max_steps=steps,
            shuffle=training,
            group_by_length=training and self.config.group_by_length and self.stage != "vision",
        )

    @contextmanager
    def _prepared(self, stream: BatchStream) -> Iterator[Iterator[Step]]:
        """The steps of a stream, from workers that end with the block. Left to the garbage collector they may not hear
        that they are to end, and the run would wait for them forever, because they ignore SIGTERM."""
        workers = self.config.num_workers
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator().manual_seed(self.config.seed),  # else it would draw from dropout's
        )
        steps: Any = iter(loader)
        try:
            yield steps
        finally:
            if workers:
                steps._shutdown_workers()

    def _parameter_groups(self, model: PanoramaVLM) -> list[dict[str, Any]]:
        """Parameters by part of the model, matrices apart from vectors, which do not decay."""
        groups = []
        for part in PARTS:
            rate = self.options.learning_rates.get(part, self.options.learning_rate)
            trained = [p for n, p in model.named_parameters() if part_of(n) == part and p.requires_grad]
            for decays in (True, False):
                chosen = [parameter for parameter in trained if (parameter.ndim > 1) == decays]
                decay = self.options.weight_decay if decays else 0.0
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "name": part})
        return groups

    def _prepare(self, model: PanoramaVLM, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None:
            batch = {"train_micro_batch_size_per_gpu": self.options.batch_size}
            batch["train_batch_size"] = self.options.batch_size * self.accelerator.num_processes
            plugin.deepspeed_config.update(batch, gradient_clipping=self.options.max_grad_norm)
        sharding = getattr(self.accelerator.state, "fsdp_plugin", None)
        if sharding is not None:
            _set_up_sharding(sharding, model)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if sharding is not None:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(model, "generate")  # gathers weights as forward does
        return model, optimizer

    @property
    def plain(self) -> PanoramaVLM:
        """The model without what Accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    # The loop

    def train(self, resumed: Path | None) -> list[float]:
        """All steps that are left, then the folder of the stage."""
        if resumed is not None:
            self._resume(resumed)
        self.skipped.rewind(self.step, self.stream.seen_before(self.step))
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _truncate(self.logs / name, self.step)
        if self.accelerator.is_main_process:
            save_config(self.config, self.output / "config.yaml")
        losses: list[float] = []
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        progress = tqdm(
            total=self.stream.steps,
            initial=self.step,
            desc=self.stage,
            disable=not self.accelerator.is_main_process,
            smoothing=0.05,
        )
        self.stream.start_step = self.step
        clock = _Clock(self.seconds)
        with progress, logging_redirect_tqdm(), self._prepared(self.stream) as steps:
            while self.step < self.stream.steps:
                with clock.waiting():
                    made: Step = next(steps)
                figures = self._optimizer_step(made, trained)
                losses.append(figures["loss"])
                self.step = made.index + 1
                clock.count(figures)
                progress.update()
                progress.set_postfix(loss=f"{figures['loss']:.4f}")
                self.seconds = clock.seconds
                if self.step % self.config.log_every == 0 or self.step == self.stream.steps:
                    self._log({**figures, **clock.rates(), "epoch": self._epoch(made)})
                stop = bool(figures["stop"])
                last = self.step == self.stream.steps
                if self.step % self.config.eval_every == 0 or last:
                    self._evaluate()
                if self.step % self.config.save_every == 0 or last or stop:
                    self._save_checkpoint()
                if stop and not last:
                    logger.warning("Asked to stop: saved step %d of stage %s.", self.step, self.stage)
                    raise Preempted(f"stopped at step {self.step} of stage {self.stage}")
        self._finish()
        if self.accelerator.is_main_process and (words := self.skipped.summary()):
            logger.warning("Stage %s: %s", self.stage, words)
        return losses

    def _epoch(self, made: Step) -> float:
        """Passes over the data when a step is done; of a stream, whose length is not known, whole ones before it."""
        return (made.index + 1) / self.stream.epoch_steps if self.stream.epoch_steps else made.epoch

    def _optimizer_step(self, made: Step, trained: list[torch.nn.Parameter]) -> dict[str, float]:
        """One step on the samples of all processes: the loss is their mean, however they are spread."""
        batches: list[Batch] = [dict(batch) for batch in made.micro_batches]
        counts = [(_supervised(batch), len(batch["pixel_values"])) for batch in batches]
        tokens, panoramas = (sum(count[i] for count in counts) for i in (0, 1))
        image_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches if "attention_mask" in batch)
        own = torch.tensor(
            [tokens, panoramas, len(batches), len(made.skipped), image_tokens, self.asked_to_stop[0]],
            dtype=torch.float64 if self.accelerator.device.type != "mps" else torch.float32,
            device=self.accelerator.device,
        )
        everyone = self.accelerator.gather(own[None])  # [processes, 6]
        tokens, panoramas, _, bad, all_tokens, _ = everyone.sum(0).tolist()
        passes = max(1, int(everyone[:, 2].max()))
        records = gather_object(made.skipped) if bad else []
        self.skipped.add(records, made.seen)
        world = self.accelerator.num_processes
        unit = tokens if self.stage != "vision" else panoramas

        joint = self._joint_shares([count[1] for count in counts], passes) if self.joins else None
        totals: dict[str, torch.Tensor] = {}
        output = None
        for number in range(passes):
            is_filler = number >= len(batches)
            batch = self._stand_in() if is_filler else batches[number]
            batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
            share = 0.0 if is_filler else counts[number][1] * world / max(panoramas, 1)
            share = share if joint is None else joint[number]
            self.accelerator.sync_gradients = number == passes - 1  # DeepSpeed makes its step in the last backward
            with nullcontext() if number == passes - 1 else self.accelerator.no_sync(self.model):
                if self.stage == "vision":
                    output = self.model(**batch, stage=self.stage)
                    loss = output.loss * share
                    parts = {name: output[name] for name in ("invariance", "variance", "covariance") if name in output}
                    parts = {name: value * share for name, value in parts.items()}
                else:
                    output = self.model(**batch, stage=self.stage, num_items_in_batch=max(tokens, 1) / world)
                    loss = output.ar_loss * (0.0 if is_filler else 1.0)
                    parts = {"ar_loss": loss}
                    if output.overlap_loss is not None:
                        overlap = output.overlap_loss * share
                        loss = loss + self.plain.config.overlap_loss_weight_finetune * overlap
                        parts["overlap_loss"] = overlap
                self.accelerator.backward(loss)
            for name, value in {"loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().to(own.dtype) / world
        names = sorted(totals)
        reduced = self.accelerator.reduce(torch.stack([totals[name] for name in names]), "sum")
        figures = dict(zip(names, reduced.tolist(), strict=True))
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"the loss of step {made.index + 1} of stage {self.stage!r} is {figures['loss']}: lower the learning "
                "rate, or use bf16 instead of fp16; the last checkpoint is whole"
            )
        norm = self.accelerator.clip_grad_norm_(trained, self.options.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        log_now = (made.index + 1) % self.config.log_every == 0
        if self.stage == "vision" and log_now and batches and output is not None and passes == len(batches):
            mask = batch.get("view_mask")
            figures |= self.plain.overlap.metrics(output.hidden_states.detach(), mask)
        figures |= {"grad_norm": 0.0 if norm is None else float(norm), "stop": float(everyone[:, 5].max())}
        return {**figures, "supervised": unit, "panoramas": panoramas, "tokens": all_tokens}

    def _joint_shares(self, panoramas: list[int], passes: int) -> list[float]:
        """Of each pass, the share of the step's panoramas, on all processes: where statistics are joint, every process
        has to weight the loss alike."""
        own = torch.zeros(passes, device=self.accelerator.device)
        own[: len(panoramas)] = torch.tensor(panoramas, dtype=own.dtype)
        everyone = self.accelerator.reduce(own, "sum")
        return (everyone / everyone.sum().clamp(min=1)).tolist()

    def _stand_in(self) -> Batch:
        """A black panorama, for a process that has fewer micro-batches than the others: all must run forward and
        backward equally often. It counts for nothing: where statistics are joint, none of its views shows anything."""
        if self._filler is None:
            images: Any = torch.zeros(64, 128, 3, dtype=torch.uint8)
            if self.stage == "vision":
                inputs = self.processor.image_processor(images, return_tensors="pt")
            else:
                parts = [{"type": "image", "image": images}, {"type": "text", "text": "What is this?"}]
                parts = parts[1:] if self.joins else parts
                turns: list[dict[str, Any]] = [
                    {"role": "user", "content": parts},
                    {"role": "assistant", "content": "Nothing."},
                ]
                inputs = self.processor.apply_chat_template(turns, return_labels=True)
            if self.joins:
                pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
                inputs = {
                    **inputs,
                    "pixel_values": pixels,
                    "view_mask": torch.zeros(pixels.shape[:2], dtype=torch.bool),
                }
            self._filler = dict(inputs)
        return self._filler

    # What is written

    def _log(self, figures: dict[str, float]) -> None:
        rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        line = {name: value for name, value in {**figures, **rates}.items() if name not in ("stop", "supervised")}
        if self.accelerator.is_main_process:
            _append(self.logs / "metrics.jsonl", {"stage": self.stage, "step": self.step, **line})
            shown = ("loss", "grad_norm", "retrieval", "effective_rank", "panoramas_per_second", "waiting")
            logger.info("step %d: %s", self.step, " ".join(f"{n}={line[n]:.4g}" for n in shown if n in line))
        if self.config.trackers:
            self.accelerator.log({f"{self.stage}/{name}": value for name, value in line.items()}, step=self.step)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The loss on the validation share, and answers to the first of its questions (or of the trained ones)."""
        if self.validation is None and (self.stage == "vision" or not self.config.eval_samples):
            return
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        if self.validation is not None:
            self.results = self._validate()
            if self.accelerator.is_main_process:
                _append(self.logs / "metrics.jsonl", {"stage": self.stage, "step": self.step, **self.results})
                logger.info("step %d: %s", self.step, " ".join(f"{n}={v:.4g}" for n, v in self.results.items()))
            if self.config.trackers:
                results = {f"{self.stage}/{name}": value for name, value in self.results.items()}
                self.accelerator.log(results, step=self.step)
        if self.stage != "vision" and self.config.eval_samples:
            answers = self._sample_answers(self.samples if self.validation is None else self.validation)
            if self.accelerator.is_main_process:
                for answer in answers:
                    _append(self.logs / "samples.jsonl", {"step": self.step, **answer})
        for module in training:
            module.training = True

    def _validate(self) -> dict[str, float]:
        totals = torch.zeros(2, dtype=torch.float64, device="cpu")
        stream = self._batches(self.validation, training=False)  # type: ignore[arg-type]
        with self._prepared(stream) as steps:
            for made in steps:
                batch = dict(made.micro_batches[0]) if made.micro_batches else None
                inputs = self._stand_in() if batch is None else batch
                inputs = {name: value.to(self.accelerator.device) for name, value in inputs.items()}
                if self.stage == "vision":
                    weight, loss = len(inputs["pixel_values"]), self.model(**inputs, stage=self.stage).loss
                else:
                    weight = _supervised(inputs)
                    loss = self.model(**inputs, stage=self.stage, return_logits=False).ar_loss
                if batch is not None:
                    totals += torch.tensor([float(loss) * weight, weight], dtype=torch.float64)
        total, weight = self.accelerator.reduce(totals.to(self.accelerator.device, torch.float32), "sum").tolist()
        loss = total / weight if weight else math.nan
        perplexity = {} if self.stage == "vision" else {"eval_perplexity": math.exp(min(loss, 700))}
        return {"eval_loss": loss, **perplexity}

    def _sample_answers(self, samples: Samples) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        for sample in samples:
            if len(answers) == self.config.eval_samples:
                break
            messages = sample.get("messages") or []
            asked = [i for i, message in enumerate(messages) if message["role"] == "user"][:1]
            if not asked or "error" in sample:
                continue
            prompt = messages[: asked[0] + 1]
            synced = self.accelerator.distributed_type != DistributedType.NO
            try:
                words = answer(self.plain, self.processor, prompt, synced_gpus=synced)
            except (ValueError, TypeError, OSError) as error:
                logger.debug("No sample answer for %s: %s", sample.get("name"), error)
                answers.append({})
                continue
            images = [part["image"] for part in prompt[-1]["content"] if part["type"] == "image"]
            asked_words = [part["text"] for part in prompt[-1]["content"] if part["type"] == "text"]
            reference = messages[asked[0] + 1]["content"] if len(messages) > asked[0] + 1 else []
            answers.append(
                {
                    "image": Path(images[0]).name if images and isinstance(images[0], str) else sample.get("name"),
                    "question": "".join(asked_words).strip(),
                    "answer": words,
                    "trained": self.validation is None,
                    "reference": "".join(part.get("text", "") for part in reference).strip(),
                }
            )
        return [answer for answer in answers if answer]

    # Checkpoints

    def _save_checkpoint(self) -> None:
        """Everything a later run needs to go on, to the bit; the folder appears when it is whole."""
        folder = self.output / "checkpoints" / f"{self.stage}-{self.step:07d}"
        unfinished = unfinished_folder(folder)
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        loss = self.results.get("eval_loss")
        if loss is not None and (self.best is None or loss < self.best[0]):
            self.best = (loss, self.step)
        self.accelerator.wait_for_everyone()
        if main:
            self.plain.config.save_pretrained(unfinished)
            self.processor.save_pretrained(unfinished)
            write_state(
                unfinished,
                {
                    "stage": self.stage,
                    "step": self.step,
                    "total_steps": STAGES.index(self.stage) * 10**9 + self.step,
                    "seconds": self.seconds,
                    "schedule": self.schedule.state_dict(),
                    "results": self.results,
                    "best": self.best,
                    "run": self._fingerprint(),
                },
            )
            commit_folder(unfinished, folder)
            self._rotate()
            if self.pusher is not None and self._is_push_due():
                pushed = self.output / f".hub-{folder.name}"
                with whole_folder(pushed) as unfinished_push:
                    self._export(unfinished_push)
                self.pusher.push(pushed, f"Step {self.step} of stage {self.stage}", temporary=True)
        self.accelerator.wait_for_everyone()

    def _is_push_due(self) -> bool:
        number = math.ceil(self.step / self.config.save_every)
        full_weights = self.accelerator.distributed_type not in SHARDED
        due = self.config.hub_every > 0 and number % self.config.hub_every == 0 and self.step < self.stream.steps
        if due and not full_weights:
            logger.warning("Weights in shards are pushed at the end of the run, not at checkpoints.")
        return due and full_weights

    def _fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a run to go on: what decides the stage, which samples a step holds, and who can
        read the checkpoint."""
        kind = self.accelerator.distributed_type
        return {
            **fingerprint(self.config, self.stage, self.accelerator.num_processes),
            "mixed precision": self.accelerator.mixed_precision,
            "steps": self.stream.steps,
            "samples": None if self.samples.streaming else len(self.samples),
            "shards": kind.value if kind in SHARDED else None,
        }

    def _rotate(self) -> None:
        """Keep the newest checkpoints, and the best one of this stage."""
        folders = sorted((self.output / "checkpoints").glob(f"{self.stage}-*"))
        keep = {folder.name for folder in folders[-self.config.keep_checkpoints :]}
        if self.best is not None:
            keep.add(f"{self.stage}-{self.best[1]:07d}")
        for folder in folders:
            if folder.name not in keep:
                shutil.rmtree(folder)

    def _resume(self, folder: Path) -> None:
        state = read_state(folder)
        if changed := differences(state["run"], self._fingerprint()):
            raise ValueError(
                f"{str(folder)!r} cannot be resumed with these options: {'; '.join(changed)}. Set them back (of "
                "batch_size, accumulation and processes the product is what counts), or choose another --output"
            )
        self.accelerator.load_state(str(folder))
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.seconds, self.results = state["step"], state["seconds"], state["results"]
        self.best = None if state["best"] is None else tuple(state["best"])
        logger.info("Going on from step %d of stage %s, in %s.", self.step, self.stage, folder)

    def _finish(self) -> None:
        """The folder of the trained stage, whole or not there."""
        gathered = None
        if self.accelerator.distributed_type in SHARDED:
            gathered = self.accelerator.get_state_dict(self.model)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with whole_folder(self.output / self.stage) as folder:
                self._export(folder, gathered)
                (folder / FILE).write_text(json.dumps(self._fingerprint(), indent=1), encoding="utf-8")
            logger.info("Saved %s.", self.output / self.stage)
        self.accelerator.wait_for_everyone()

    def _export(self, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
        """The model as a folder that loads anywhere, with its processor, card and adapters."""
        model = self.plain
        if gathered is not None:  # weights lie in shards: a second model takes them in
            plain = PanoramaVLM(model.config)
            if model.has_lora:
                plain.add_lora()
            plain.set_stage(self.stage)  # type: ignore[arg-type]
            plain.load_state_dict(gathered)
            plain.generation_config = model.generation_config
            model = plain
        was_training = [module for module in model.modules() if module.training]
        model.eval().save_pretrained(folder)
        if model.has_lora:
            save_adapters(model, folder / "adapter", self.start or self.config.model, model.state_dict())
        for module in was_training:
            module.training = True
        self.processor.save_pretrained(folder)
        stages = json.loads((self.output / "stages.json").read_text()) if (self.output / "stages.json").exists() else {}
        stages[self.stage] = {
            "name": self.stage,
            "steps": self.step,
            "samples": self.stream.seen_before(self.step),
            "seconds": self.seconds,
            "hyperparameters": {n: v for n, v in dataclasses.asdict(self.options).items() if n != "data"},
            "data": self.sources,
            "results": self.results,
            "skipped": self.skipped.bad,
        }
        write_whole(self.output / "stages.json", json.dumps(stages, indent=1))
        history = {
            name: read_history(self.output / "logs" / name / "metrics.jsonl").get(name, [])
            for name in stages
            if (self.output / "logs" / name / "metrics.jsonl").is_file()
        }
        answers = [json.loads(line) for line in _lines(self.logs / "samples.jsonl")]
        write_model_card(
            folder,
            config=model.config,
            run={
                "repo_id": self.config.push_to_hub,
                "stages": [{**stages[name], "history": history.get(name, [])} for name in stages],
                "samples": [answer for answer in answers if answer["step"] == self.step],
                "versions": _versions(),
            },
        )


class _Clock:
    """Throughput since the last log line."""

    def __init__(self, seconds_before: float):
        self.before, self.begin = seconds_before, time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.since, self.waited, self.tokens, self.panoramas, self.steps = time.perf_counter(), 0.0, 0.0, 0.0, 0

    @property
    def seconds(self) -> float:
        """Of training, over all resumptions."""
        return self.before + time.perf_counter() - self.begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def count(self, figures: dict[str, float]) -> None:
        self.tokens += figures["tokens"]
        self.panoramas += figures["panoramas"]
        self.steps += 1

    def rates(self) -> dict[str, float]:
        """Tokens and panoramas a second, the share of the time spent waiting for data, GiB of memory."""
        passed = time.perf_counter() - self.since
        rates = {"tokens_per_second": self.tokens / passed, "panoramas_per_second": self.panoramas / passed}
        rates |= {"seconds_per_step": passed / self.steps, "waiting": self.waited / passed}
        if torch.cuda.is_available():
            rates["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            rates["memory_gib"] = _peak_memory() / 2**30
        self._reset()
        return rates


def _peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _set_up_sharding(plugin: FullyShardedDataParallelPlugin, model: PanoramaVLM) -> None:
    """What the trainer needs of FSDP beside what the configuration says."""
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 would clip the gradients of each shard by its own norm: set fsdp_version to 2")
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in model.modules()}  # SigLIP names a head it may not have
        plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules or [] if name in there]
    if plugin.mixed_precision_policy is not None:  # Accelerate would round losses and sums of gradients to bf16
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    # Nothing here works in place on what the model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _checkpoint_activations(model: PanoramaVLM) -> None:
    """Recompute activations in backward, in frozen parts too: transformers does so in training mode only, which here is
    set for the layers themselves and not for what is in them, so that nothing is dropped out."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextmanager
def _asked_to_stop() -> Iterator[list[bool]]:
    """A flag that SIGTERM, what schedulers send before they take a node away, and the first Ctrl-C set; a second Ctrl-C
    ends at once."""
    asked = [False]

    def ask(number: int, _: Any) -> None:
        asked[0] = True
        if number == signal.SIGINT:
            logger.warning("Asked to stop: the step is finished and saved. Ctrl-C again ends at once.")
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before: dict[int, Any] = {}
    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread: whoever runs it there has to stop it
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals(worker: int) -> None:
    """Schedulers send SIGTERM, and terminals Ctrl-C, to every process; workers have to go on until the loop has saved
    where it is."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _supervised(batch: Batch) -> int:
    """Tokens that are learned; the first of a row has nothing to be told from."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) if "labels" in batch else 0


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after a step, and one that was cut off when the run was killed."""
    kept = []
    for line in _lines(path):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    if path.is_file():
        path.write_text("".join(kept), encoding="utf-8")


def _flat(options: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """Options as trackers take them."""
    return {k: v if isinstance(v, str | int | float | bool) else json.dumps(v, default=str) for k, v in options.items()}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
