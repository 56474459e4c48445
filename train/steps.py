"""One optimizer step on all processes: the loss is the mean over its samples, however they are spread."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object

from ..data.skipped import SkippedSamples
from ..data.stream import Step
from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import IGNORE_INDEX, PanoramaProcessor
from ..token_labels_panorama import count_labelled
from .stage import Stage

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
ADVICE = "Lower the learning rate, or use bf16 instead of fp16; the last checkpoint is whole"


class OptimizerStep:
    """Forward, backward and update.

    Args:
        stage: that is trained.
        model, optimizer, schedule: prepared by Accelerate.
        processor: of the model.
        skipped: takes in the bad samples.
    """

    def __init__(
        self,
        stage: Stage,
        model: Any,
        optimizer: Any,
        schedule: Any,
        processor: PanoramaProcessor,
        skipped: SkippedSamples,
    ):
        self.stage, self.accelerator = stage, stage.accelerator
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.processor, self.skipped = processor, skipped
        self.plain: PanoramaVLM = self.accelerator.unwrap_model(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        compares = stage.name == "vision" or self.plain.config.overlap_loss_weight_finetune > 0
        self.joins = self.plain.overlap.joins_processes and compares
        self.wide = torch.float32 if self.accelerator.device.type == "mps" else torch.float64  # MPS has no float64
        self._filler: Batch | None = None
        self.plain.overlap.checks_finite = False  # a process that raises by itself leaves the others waiting
        self.skipped_steps = {"total": 0, "in a row": 0}
        norms = (m for m in self.plain.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]

    def __call__(self, made: Step, log: bool, stop: bool) -> dict[str, float]:
        """One step.

        Args:
            made: what this process has of it.
            log: whether this one is looked at closely.
            stop: whether this process was asked to stop.

        Returns:
            The loss and its parts, means over all processes; `grad_norm`, `panoramas`, `tokens`; where steps may be
            skipped, how many were so far (`skipped_steps`); and `stop`, whether any process was asked to.

        Raises:
            FloatingPointError: when the loss or the gradient is not finite, in more steps in a row than
                `max_skipped_steps`; else such a step is skipped, by every process: its loss is given, and neither
                weights nor optimizer, schedule and statistics of BatchNorm change. The step, its samples and the
                module where it began are named in both cases.
        """
        batches: list[Batch] = [dict(batch) for batch in made.micro_batches]
        pairs = [self.pairs(batch) for batch in batches]
        labelled = [labelled_panoramas(batch) for batch in batches]
        everyone = self._gather(batches, pairs, labelled, made, stop)
        supervised, all_pairs, panoramas, _, bad, tokens, stops, all_labelled = everyone.sum(0).tolist()
        passes = max(1, int(everyone[:, 3].max()))
        self.skipped.add(gather_object(made.skipped) if bad else [], made.seen)
        shares = self._shares(pairs, passes, all_pairs)
        labelled += [0] * (passes - len(labelled))
        label_shares = [own * self.accelerator.num_processes / max(all_labelled, 1) for own in labelled]
        totals: dict[str, torch.Tensor] = {}
        statistics = [buffer.clone() for buffer in self._statistics]
        output, batch = None, None
        for number in range(passes):
            is_filler = number >= len(batches)
            batch = self.on_device(None if is_filler else batches[number])
            self.accelerator.sync_gradients = number == passes - 1  # DeepSpeed makes its step in the last backward
            with nullcontext() if number == passes - 1 else self.accelerator.no_sync(self.model):
                output, loss, parts = self._forward(batch, shares[number], label_shares[number], supervised, is_filler)
                self.accelerator.backward(loss)
            for name, value in {"loss": loss, **parts}.items():
                value = value.detach().to(self.wide) / self.accelerator.num_processes
                totals[name] = totals[name] + value if name in totals else value
        figures, problem = self._update(totals)
        if problem is not None:
            self._skip(made, problem, statistics)
            output = None
        else:
            self.skipped_steps["in a row"] = 0
        if self.stage.config.max_skipped_steps:
            figures["skipped_steps"] = float(self.skipped_steps["total"])
        if output is not None and self.stage.name == "vision" and log and batches and passes == len(batches):
            assert batch is not None
            if self.plain.config.vicreg_loss_weight > 0:
                figures |= self.plain.overlap.metrics(output.hidden_states.detach(), batch.get("view_mask"))
        if log and output is not None and output.label_figures:
            figures |= {name: float(value) for name, value in output.label_figures.items()}
        return {**figures, "panoramas": panoramas, "tokens": tokens, "stop": float(stops)}

    def pairs(self, batch: Batch) -> int:
        """Pairs of views that the overlap loss compares, over which it is a mean."""
        if self.stage.name != "vision" and not self.plain.config.overlap_loss_weight_finetune:
            return 0
        if "pixel_values" not in batch:
            return 0
        panoramas, views = batch["pixel_values"].shape[:2]
        views -= batch["further_views"].shape[1] if "further_views" in batch else 0
        return self.plain.overlap.count_pairs(panoramas, views, batch.get("view_mask"))

    def weight(self, batch: Batch) -> int:
        """What a batch of stage vision counts for in an evaluation: its pairs, or where labels alone are learned its
        panoramas with labels."""
        return self.pairs(batch) if self.plain.config.vicreg_loss_weight > 0 else labelled_panoramas(batch)

    def on_device(self, batch: Batch | None) -> Batch:
        """A batch where the model is; a stand-in where there is none."""
        batch = self._stand_in() if batch is None else batch
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def _gather(
        self, batches: list[Batch], pairs: list[int], labelled: list[int], made: Step, stop: bool
    ) -> torch.Tensor:
        """What each process has: supervised tokens, pairs, panoramas, micro-batches, bad samples, all tokens, whether
        it is to stop, panoramas with token labels; [processes, 8]."""
        own = [
            sum(supervised_tokens(batch) for batch in batches),
            sum(pairs),
            sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch),
            len(batches),
            len(made.skipped),
            sum(count_tokens(batch) for batch in batches if "attention_mask" in batch),
            stop,
            sum(labelled),
        ]
        return self.accelerator.gather(torch.tensor(own, dtype=self.wide, device=self.accelerator.device)[None])

    def _shares(self, pairs: list[int], passes: int, all_pairs: float) -> list[float]:
        """What the overlap loss of each pass counts for. Where statistics are joint, every process has to weight the
        loss alike: by the share of all processes' pairs that are in the pass."""
        own = torch.zeros(passes, device=self.accelerator.device)
        own[: len(pairs)] = torch.tensor(pairs, dtype=own.dtype)
        if self.joins:
            everyone = self.accelerator.reduce(own, "sum")
            return (everyone / everyone.sum().clamp(min=1)).tolist()
        return (own * self.accelerator.num_processes / max(all_pairs, 1)).tolist()

    def _forward(
        self, batch: Batch, share: float, label_share: float, supervised: float, is_filler: bool
    ) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        """The output, the loss and its parts, which add up over passes and processes to those of the step."""
        if self.stage.name == "vision":
            output = self.model(**batch, stage=self.stage.name)
            names = [name for name in ("vicreg_loss", "invariance", "variance", "covariance") if name in output]
            parts = {name: output[name] * share for name in names}
            return output, self._with_labels(parts["vicreg_loss"], output, label_share, parts), parts
        items = max(supervised, 1) / self.accelerator.num_processes
        output = self.model(**batch, stage=self.stage.name, num_items_in_batch=items)
        loss = output.ar_loss * (0.0 if is_filler else 1.0)
        parts = {"ar_loss": loss}
        if output.overlap_loss is not None:
            parts["overlap_loss"] = output.overlap_loss * share
            loss = loss + self.plain.config.overlap_loss_weight_finetune * parts["overlap_loss"]
        return output, self._with_labels(loss, output, label_share, parts), parts

    def _with_labels(
        self, loss: torch.Tensor, output: Any, share: float, parts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss and the weighted one of token labels, which is put among the parts."""
        if output.label_loss is None:
            return loss
        parts["label_loss"] = output.label_loss * share
        return loss + self.stage.options.label_loss_weight * parts["label_loss"]

    def check_weights(self, step: int) -> None:
        """See that what trains is finite before it is written; on all processes.

        Raises:
            FloatingPointError: where it is not; a parameter is named.
        """
        named = [(name, p) for name, p in self.plain.named_parameters() if p.requires_grad]
        spoilt = [name for name, p in named if not getattr(p, "_local_tensor", p).isfinite().all()]
        count = torch.tensor([len(spoilt)], device=self.accelerator.device)
        if int(self.accelerator.reduce(count, "sum")) > 0:
            where = f", {spoilt[0]} among them" if spoilt else ""
            raise FloatingPointError(
                f"after step {step} of stage {self.stage.name!r} weights are not finite{where}; they are not written. "
                f"{ADVICE}"
            )

    def _skip(self, made: Step, problem: str, statistics: list[torch.Tensor]) -> None:
        """Leave everything as it was before a step, and say so; on all processes.

        Raises:
            FloatingPointError: where that is one step too many.
        """
        self.optimizer.zero_grad()
        for buffer, before in zip(self._statistics, statistics, strict=True):
            buffer.copy_(before)
        of_each = gather_object([(*self._where_not_finite(made), made.names)])
        of_each = [each for each in of_each if each[0]] or of_each  # who found it
        where = " ".join(dict.fromkeys(words for _, words, _ in of_each if words))
        names = "; ".join(name for _, _, names in of_each for name in names) or "none"
        words = f"step {made.index + 1} of stage {self.stage.name!r}: {problem}. {where} Samples of the step: {names}. "
        limit, run = self.stage.config.max_skipped_steps, self.skipped_steps["in a row"]
        if run >= limit:
            after = f"{run} steps before it were skipped (max_skipped_steps={limit}). " if limit else ""
            also = "" if limit else ". --max_skipped_steps 3 skips such steps, up to three in a row"
            raise FloatingPointError(f"{words}{after}{ADVICE}{also}")
        self.skipped_steps = {"total": self.skipped_steps["total"] + 1, "in a row": run + 1}
        if self.stage.is_main:
            logger.warning("Skipped %sNothing has changed; %d in a row, max_skipped_steps=%d.", words, run + 1, limit)

    def _where_not_finite(self, made: Step) -> tuple[bool, str]:
        """Whether this process finds where the first value that is not finite came up, and that in a sentence."""
        if self.stage.is_sharded:  # no process can run it alone
            return False, ""
        for name, parameter in self.plain.named_parameters():
            if not parameter.isfinite().all():
                return True, f"Weights are not finite: {name}."
        for batch in made.micro_batches:
            batch = self.on_device(dict(batch))
            for name, value in batch.items():
                if value.is_floating_point() and name != "further_views" and not value.isfinite().all():
                    return True, f"Inputs are not finite: {name}."
            if (name := first_not_finite(self.plain, {**batch, "stage": self.stage.name})) is not None:
                return True, f"It came up in the module {name}."
        return False, "All modules gave finite values; it came up in the loss or on the way back."

    def _update(self, totals: dict[str, torch.Tensor]) -> tuple[dict[str, float], str | None]:
        """Change the weights; the sums over all processes, the norm of the gradient, and why nothing was changed."""
        names = sorted(totals)
        reduced = self.accelerator.reduce(torch.stack([totals[name] for name in names]), "sum")
        figures = dict(zip(names, reduced.tolist(), strict=True))
        if not math.isfinite(figures["loss"]):
            return figures, f"the loss is {figures['loss']}"
        norm = self.accelerator.clip_grad_norm_(self.trained, self.stage.options.max_grad_norm)
        figures["grad_norm"] = 0.0 if norm is None else float(norm)
        if not math.isfinite(figures["grad_norm"]) and self.accelerator.mixed_precision != "fp16":
            return figures, f"the loss is {figures['loss']:.4g} and the norm of its gradient {figures['grad_norm']}"
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        return figures, None

    def _stand_in(self) -> Batch:
        """A black panorama, for a process that has fewer micro-batches than the others: all must run forward and
        backward equally often. It counts for nothing: where statistics are joint, none of its views shows anything."""
        if self._filler is None:
            black: Any = torch.zeros(64, 128, 3, dtype=torch.uint8)
            images = self.processor.image_processor(black, return_tensors="pt")
            inputs: Any = images
            if self.stage.name != "vision":
                parts = [{"type": "image", "image": black}, {"type": "text", "text": "What is this?"}]
                turns: list[dict[str, Any]] = [
                    {"role": "user", "content": parts[1:] if self.joins else parts},
                    {"role": "assistant", "content": "Nothing."},
                ]
                inputs = self.processor.apply_chat_template(turns, return_labels=True)
            if self.joins:
                shown = torch.zeros(images["pixel_values"].shape[:2], dtype=torch.bool)
                inputs = {**inputs, "pixel_values": images["pixel_values"], "view_mask": shown}
            self._filler = dict(inputs)
        return self._filler


@torch.no_grad()
def first_not_finite(model: PanoramaVLM, inputs: dict[str, Any]) -> str | None:
    """The name of the first module of a model whose output is not finite for these inputs; `None` where none is.

    The model runs alone, whatever other processes do, and draws no random numbers and keeps no statistics by it.
    """
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if not all(value.isfinite().all() for value in outputs if isinstance(value, torch.Tensor)):
            found.append(name or type(model).__name__)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    joint, model.config.vicreg_use_ddp_gather = model.config.vicreg_use_ddp_gather, False
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            model(**inputs)
    except (FloatingPointError, ValueError):  # of panoramas that are nothing by themselves
        pass
    finally:
        model.config.vicreg_use_ddp_gather = joint
        for buffer, before in buffers:
            buffer.copy_(before)
        for hook in hooks:
            hook.remove()
    return next(iter(found), None)


def count_tokens(batch: Batch) -> int:
    """Tokens that are not padding; of a mask [B, 1, T, T], in which padding sees itself alone, about."""
    mask = batch["attention_mask"]
    return int(mask.sum()) if mask.ndim == 2 else batch["input_ids"].numel()


def labelled_panoramas(batch: Batch) -> int:
    """Panoramas with token labels."""
    return count_labelled(batch["token_classes"], batch["token_places"]) if "token_classes" in batch else 0


def supervised_tokens(batch: Batch) -> int:
    """Tokens that are learned; the first of a row has nothing to be told from."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) if "labels" in batch else 0
