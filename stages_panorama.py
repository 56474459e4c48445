"""The stages: what trains in which, and LoRA adapters on the language model."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import nn

from .configuration_panorama import PanoramaConfig

Stage = Literal["vision", "resampler", "finetune"]

PARTS = ("vision_tower", "resampler", "vicreg_projector", "projection", "language_model", "label_head")
# What trains in which stage; everything else is frozen. Of the vision tower, `blocks` are the last
# `vision_trainable_blocks`; of a language model with LoRA only the adapters train. A model has a `label_head` while it
# is taught token labels.
TRAINED_PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("blocks", "resampler", "vicreg_projector", "label_head"),
    "resampler": ("vision_tower", "resampler", "projection", "language_model", "label_head"),
    "finetune": ("vision_tower", "resampler", "projection", "language_model", "label_head"),
}
# Of these, what trains only where an option says so.
OPTIONAL_PARTS = {
    ("resampler", "vision_tower"): "resampler_vision_tower",
    ("resampler", "language_model"): "resampler_language_model",
    ("finetune", "vision_tower"): "finetune_vision_tower",
}
STAGES = tuple(TRAINED_PARTS)  # in order


def part_of(name: str) -> str:
    """The part of `PARTS` that a parameter of :class:`PanoramaVLM` belongs to, by its name; the head to the language
    model."""
    return next((part for part in PARTS if part in name.split(".")), "language_model")


class StagesMixin:
    """Stages and adapters of :class:`PanoramaVLM`, which holds the parts named in `PARTS`."""

    config: PanoramaConfig
    model: Any
    lm_head: nn.Module
    vicreg_projector: nn.Module | None
    label_head: nn.Module | None
    requires_grad_: Any
    named_parameters: Any

    @property
    def has_lora(self) -> bool:
        """Whether the language model carries LoRA adapters."""
        return hasattr(self.model.language_model, "merge_and_unload")

    def add_lora(self) -> None:
        """Put LoRA adapters, as the configuration says, on the language model. Needs peft."""
        if self.has_lora:
            return
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("LoRA needs peft: pip install peft, or use use_lora=False to train it whole") from error
        lora = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout,
            target_modules=self.config.lora_target_modules or "all-linear",
        )
        self.model.language_model = get_peft_model(self.model.language_model, lora)

    def merge_lora(self) -> None:
        """Merge the LoRA adapters into the language model and drop them."""
        if self.has_lora:
            self.model.language_model = self.model.language_model.merge_and_unload()

    def freeze_unused(self) -> None:
        """Freeze what nothing depends on but in stage `vision`, or at all: the VICReg projector, and the pooling head
        of a tower. A trainer that calls the model without :meth:`set_stage` would wait for their gradients."""
        unused = self._unused_in_the_tower()
        for name, parameter in self.model.vision_tower.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)
        if self.vicreg_projector is not None:
            self.vicreg_projector.requires_grad_(False)

    def set_stage(self, stage: Stage) -> list[str]:
        """Set what trains, from the tables `TRAINED_PARTS` and `OPTIONAL_PARTS`, and put everything frozen into
        evaluation mode.

        What no output of the stage depends on, such as the pooling head of a tower, is frozen too.

        Args:
            stage: `"vision"`, `"resampler"` or `"finetune"`. `"finetune"` adds LoRA adapters where `use_lora` is set.

        Returns:
            The names of the parameters that train.

        Raises:
            ValueError: for another stage, and for stage `vision` where no two views have anything in common.
        """
        if stage not in TRAINED_PARTS:
            raise ValueError(f"stage must be one of {sorted(TRAINED_PARTS)}, got {stage!r}")
        labels_alone = self.label_head is not None and self.config.vicreg_loss_weight == 0
        if stage == "vision" and not labels_alone and (problem := self.config.overlap_problem):
            raise ValueError(f"stage 'vision' cannot train: {problem}")
        if stage == "vision" and self.label_head is None and self.config.vicreg_loss_weight == 0:
            warnings.warn(
                f"vicreg_loss_weight is {self.config.vicreg_loss_weight} and no token labels are taught: vision stage "
                "training will have no effect",
                stacklevel=2,
            )
        bare = next(self.model.resampler.parameters(), None) is None
        if stage == "vision" and self.config.vision_trainable_blocks == 0 and bare:
            raise ValueError(
                "stage 'vision' has nothing to train that later stages keep: "
                f"resampler_type={self.config.resampler_type!r} has no weights, and vision_trainable_blocks is 0. Let "
                "blocks of the tower train (typical value: 2), take another resampler, or begin with stage 'resampler'"
            )
        if stage == "finetune" and self.config.use_lora:
            self.add_lora()
        self.requires_grad_(False)
        for part in TRAINED_PARTS[stage]:
            option = OPTIONAL_PARTS.get((stage, part))
            if option is not None and not getattr(self.config, option):
                continue
            for parameter in self._trained_parameters(part):
                parameter.requires_grad_(True)
        parts = [*self.model.children(), self.lm_head, self.vicreg_projector, self.label_head]
        self.training = self.model.training = True
        for module in filter(None, parts):
            module.train(any(parameter.requires_grad for parameter in module.parameters()))
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def _trained_parameters(self, part: str) -> list[nn.Parameter]:
        """The parameters of an entry of `TRAINED_PARTS`."""
        blocks = self.config.vision_trainable_blocks
        if part == "blocks" and isinstance(blocks, int):
            return [p for block in self._last_blocks(blocks) for p in block.parameters()]
        if part in ("blocks", "vision_tower"):
            unused = self._unused_in_the_tower()
            return [p for name, p in self.model.vision_tower.named_parameters() if not name.startswith(unused)]
        if part == "language_model" and self.has_lora:
            return [p for name, p in self.model.language_model.named_parameters() if "lora_" in name]
        return [p for name, p in self.named_parameters() if part_of(name) == part]

    def _unused_in_the_tower(self) -> tuple[str, ...]:
        config = self.config
        return config.tower.unused_parameters(config.vision_config, config.image_size)

    def _last_blocks(self, count: int) -> list[nn.Module]:
        """The last blocks of the vision tower."""
        if count == 0:
            return []
        depth = getattr(self.config.vision_config, "num_hidden_layers", 0)  # of convolutions there is no list of blocks
        lists = [m for m in self.model.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if count > depth or not lists:
            raise ValueError(
                f"vision_trainable_blocks must be 'all', or at most the tower's {depth} blocks, got {count}"
            )
        return list(lists[0][-count:])
