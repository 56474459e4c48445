"""The loop: one stage, on any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import get_cosine_schedule_with_warmup

from ..modeling_panorama import PanoramaVLM, choose_attention
from ..processing_panorama import PanoramaProcessor
from .config import TrainConfig
from .data import ConversationCollator, VisionCollator, load_samples

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> list[float]:
    """Train one stage and save a folder that loads anywhere.

    Returns:
        The loss of every step, mean over processes.

    Raises:
        FloatingPointError: when the loss is not finite; the step is named.
    """
    accelerator = Accelerator()
    set_seed(config.seed)
    model, processor = load_model(config)
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    if (attention := choose_attention(accelerator.device, precision)) != "sdpa":
        model.set_attn_implementation(attention)
    trained = model.set_stage(config.stage)  # type: ignore[arg-type]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if accelerator.is_main_process:
        count = sum(parameter.numel() for parameter in parameters)
        logger.info("Stage %s trains %s parameters in %d tensors.", config.stage, f"{count:,}", len(trained))

    samples = load_samples(config.data)
    collate: Callable[[list[dict[str, Any]]], Any] = ConversationCollator(processor)
    if config.stage == "vision":
        first_lines = {name: index for index, name in reversed(list(enumerate(samples["file_name"])))}
        samples = samples.select(sorted(first_lines.values()))  # each panorama once
        collate = VisionCollator(processor, config.seed + accelerator.process_index)
    loader = DataLoader(
        samples,
        batch_size=config.batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=config.num_workers,
        generator=torch.Generator().manual_seed(config.seed),
    )
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = config.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(steps * config.warmup_ratio), steps)

    losses: list[float] = []
    progress = tqdm(total=steps, desc=config.stage, disable=not accelerator.is_main_process)
    for _ in range(config.epochs):
        for batch in loader:
            output = model(**batch, stage=config.stage)
            loss = output.loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if not torch.isfinite(torch.tensor(losses[-1])):
                raise FloatingPointError(f"the loss of step {len(losses)} of stage {config.stage!r} is {losses[-1]}")
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if accelerator.is_main_process and len(losses) % config.log_every == 0:
                figures = {"loss": losses[-1], "learning_rate": schedule.get_last_lr()[0]}
                if config.stage == "vision":
                    figures |= accelerator.unwrap_model(model).overlap_metrics(output.hidden_states.detach())
                with logging_redirect_tqdm():
                    logger.info("step %d: %s", len(losses), " ".join(f"{k}={v:.4g}" for k, v in figures.items()))
    progress.close()

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        model.eval().save_pretrained(config.output)
        processor.save_pretrained(config.output)
        logger.info("Saved %s.", config.output)
    accelerator.wait_for_everyone()
    return losses


def load_model(config: TrainConfig) -> tuple[PanoramaVLM, PanoramaProcessor]:
    """The model and processor to start from, in float32: mixed precision is a matter of `accelerate launch`."""
    options = config.model_options()
    if config.model is not None:
        model = PanoramaVLM.from_pretrained(config.model, dtype=torch.float32, **options)
        return model, PanoramaProcessor.from_pretrained(config.model)
    if config.vision is None or config.language is None:
        raise ValueError("without a model to start from, vision and language must be given")
    processor = PanoramaProcessor.from_vision_text_pretrained(config.vision, config.language, **options)
    model = PanoramaVLM.from_vision_text_pretrained(
        config.vision,
        config.language,
        vision_kwargs={"dtype": torch.float32},
        language_kwargs={"dtype": torch.float32},
        image_token_id=processor.image_token_id,
        **options,
    )
    return model, processor
