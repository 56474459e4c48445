"""What a stage is worth while it trains: the loss on the validation share, and answers to sample questions."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType

from ..ask import answer
from ..data.rows import RawSample
from ..processing_panorama import split_steps
from .feed import Feed
from .steps import OptimizerStep, supervised_tokens

logger = logging.getLogger(__name__)


class Evaluator:
    """Evaluates the model of a stage.

    Args:
        step: of the stage: its model, and how its losses are weighted.
        feed: its data.
    """

    def __init__(self, step: OptimizerStep, feed: Feed):
        self.step, self.feed = step, feed
        self.stage, self.accelerator, self.model = step.stage, step.accelerator, step.model

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The results on the validation share, and sample answers: from there, or to questions that were trained."""
        asks = self.stage.name != "vision" and self.stage.config.eval_samples > 0
        if self.feed.validation is None and not asks:
            return {}, []
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        results = {} if self.feed.validation is None else self._validate()
        answers = self._answers() if asks else []
        for module in training:
            module.training = True
        return results, answers

    def _validate(self) -> dict[str, float]:
        totals = torch.zeros(2, dtype=torch.float64, device="cpu")
        with self.feed.validating() as steps:
            for made in steps:
                batch = dict(made.micro_batches[0]) if made.micro_batches else None
                inputs = self.step.on_device(batch)
                if self.stage.name == "vision":
                    output = self.model(**inputs, stage=self.stage.name)
                    weight, loss = self.step.weight(inputs), output.vicreg_loss
                    if output.label_loss is not None:
                        loss = loss + self.stage.options.label_loss_weight * output.label_loss
                else:
                    weight = supervised_tokens(inputs)
                    loss = self.model(**inputs, stage=self.stage.name, return_logits=False).ar_loss
                if batch is not None:
                    totals += torch.tensor([float(loss) * weight, weight], dtype=torch.float64)
        total, weight = self.accelerator.reduce(totals.to(self.accelerator.device, torch.float32), "sum").tolist()
        loss = total / weight if weight else math.nan
        perplexity = {} if self.stage.name == "vision" else {"eval_perplexity": math.exp(min(loss, 700))}
        return {"eval_loss": loss, **perplexity}

    def _answers(self) -> list[dict[str, Any]]:
        """Answers to the first questions that have one."""
        samples = self.feed.train if self.feed.validation is None else self.feed.validation
        asked = ((sample, messages) for sample in samples if (messages := _up_to_first_answer(sample)))
        first = itertools.islice(asked, self.stage.config.eval_samples)
        return [said for sample, messages in first if (said := self._answer(sample, messages))]

    def _answer(self, sample: RawSample, messages: list[dict[str, Any]]) -> dict[str, Any] | None:
        prompt, right = messages[:-1], sample.get("answers") or messages[-1:]
        synced = self.accelerator.distributed_type != DistributedType.NO
        try:
            words = answer(self.step.plain, self.step.processor, prompt, synced_gpus=synced)
        except (ValueError, TypeError, OSError) as error:
            logger.debug("No sample answer for %s: %s", sample.get("name"), error)
            return None
        images = [part["image"] for part in prompt[-1]["content"] if part["type"] == "image"]
        return {
            "image": Path(images[0]).name if images and isinstance(images[0], str) else sample.get("name"),
            "question": _words(prompt[-1]),
            "answer": words,
            "trained": self.feed.validation is None,
            "reference": "; ".join(split_steps(_words(each)).answer for each in right),
        }


def _up_to_first_answer(sample: RawSample) -> list[dict[str, Any]]:
    """The messages of a sample up to its first answer; none where it has none."""
    messages = sample.get("messages") or []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            return [] if "error" in sample else messages[: place + 1]
    return []


def _words(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
