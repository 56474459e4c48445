"""Vision towers: how each is run, by its `model_type`.

Any tower of transformers that cuts a view into a grid of patches works; one that differs from most, as those of
convolutions do, has an entry in `TOWERS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Tower:
    """A tower that takes images [N, 3, H, W] and gives prefix tokens (CLS, registers) and then its patches, row by row.

    Args:
        unused: how the names of parameters begin that no patch token depends on; they get no gradient.
        resizes: whether it fits its position embeddings to the size of the image without being asked.
    """

    unused: tuple[str, ...] = ()
    resizes: bool = False

    def image_size(self, config: PretrainedConfig) -> int:
        """Side in pixels of the square images the tower was made for.

        Raises:
            ValueError: for a tower that has no grid of patches.
        """
        size = getattr(config, "image_size", None)
        if size is None or getattr(config, "patch_size", None) is None:
            raise ValueError(
                f"vision_config of type {config.model_type!r} has no image_size or no patch_size; the vision tower "
                "must cut its image into a grid of patches, as SigLIP, SigLIP2, CLIP, DINOv2 and ViT do"
            )
        return size if isinstance(size, int) else min(size)

    def width(self, config: PretrainedConfig) -> int:
        """D_vision."""
        return config.hidden_size

    def grid(self, config: PretrainedConfig, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of `image_size` pixels a side."""
        patch = config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return image_size // rows, image_size // columns

    def __call__(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """Patch tokens, [N, 3, H, W] -> [N, rows * columns, D_vision]; CLS and registers are left out."""
        rows, columns = self.grid(tower.config, images.shape[-1])
        hidden = self.hidden_states(tower, images)  # [N, prefix + rows * columns, D_vision]
        prefix = hidden.shape[1] - rows * columns
        if prefix < 0:
            raise ValueError(
                f"the vision tower gives {hidden.shape[1]} tokens a view, fewer than the {rows} x {columns} patches of "
                f"image_size={images.shape[-1]} and patch_size={tower.config.patch_size}"
            )
        return hidden[:, prefix:]

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """Everything the tower gives, [N, 3, H, W] -> [N, prefix + patches, D_vision]."""
        as_made = self.resizes or self.image_size(tower.config) == images.shape[-1]
        options = {} if as_made else {"interpolate_pos_encoding": True}
        return tower(pixel_values=images, **options).last_hidden_state


class Siglip2Tower(Tower):
    """SigLIP2, which takes patches of any aspect instead of images."""

    def image_size(self, config: PretrainedConfig) -> int:
        """Side in pixels of a square image of `num_patches` patches."""
        return round(config.num_patches**0.5) * config.patch_size

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, patches, D_vision]."""
        rows, columns = self.grid(tower.config, images.shape[-1])
        patches = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # [N, 3, rows, p, columns, p]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, S, p * p * 3]
        return tower(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
            spatial_shapes=torch.tensor([[rows, columns]] * len(images), device=images.device),
        ).last_hidden_state


class ConvolutionalTower(Tower):
    """A network of convolutions in stages, each half as fine as the one before; its last feature map is the patches.

    Trained from random weights it learns shapes from far fewer panoramas than a small transformer.
    """

    def image_size(self, config: PretrainedConfig) -> int:
        """Raises `ValueError`: it was made for images of any size."""
        raise ValueError(
            f"vision_config of type {config.model_type!r} takes images of any size: image_size must say which. "
            "Typical value: 256"
        )

    def width(self, config: PretrainedConfig) -> int:
        """Channels of the last feature map."""
        return config.hidden_sizes[-1]

    def grid(self, config: PretrainedConfig, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the last feature map. Raises `ValueError` where its cells do not divide the image."""
        first = getattr(config, "patch_size", 4)  # of ResNet a convolution and a pooling of two
        halvings = len(config.hidden_sizes) - 1 + bool(getattr(config, "downsample_in_first_stage", False))
        cell = first * 2**halvings
        if image_size % cell:
            raise ValueError(
                f"image_size must be a multiple of {cell}, a cell of the last feature map of {config.model_type!r}, "
                f"got {image_size}. Typical value: {16 * cell}"
            )
        return image_size // cell, image_size // cell

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, rows * columns, channels]."""
        return tower(pixel_values=images).last_hidden_state.flatten(2).transpose(1, 2)


TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(unused=("post_layernorm.",)),
    "convnext": ConvolutionalTower(unused=("layernorm.",)),
    "convnextv2": ConvolutionalTower(unused=("layernorm.",)),
    "dinov2": Tower(unused=("embeddings.mask_token",), resizes=True),
    "dinov2_with_registers": Tower(unused=("embeddings.mask_token",), resizes=True),
    "resnet": ConvolutionalTower(),
    "siglip_vision_model": Tower(unused=("head.",)),
    "siglip2_vision_model": Siglip2Tower(unused=("head.",)),
    "vit": Tower(unused=("pooler.", "embeddings.mask_token")),
}


def tower_of(config: PretrainedConfig) -> Tower:
    """How the tower of a configuration is run."""
    return TOWERS.get(config.model_type, Tower())


@contextmanager
def outputs_of(tower: PreTrainedModel, names: Sequence[str], asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the layers of a tower give while it is run, in a dict that is filled then.

    Args:
        tower: it may be run in several pieces, one after the other.
        names: such as `"hidden_states"`, of the tower's output.
        asked: options of a call, such as `output_hidden_states`; what is not given is as in the tower's configuration.
    """
    options = {f"output_{name}": asked.get(f"output_{name}") for name in names}
    options = {name: getattr(tower.config, name, None) if value is None else value for name, value in options.items()}
    found: dict[str, Any] = {}
    if not any(options.values()):
        yield found
        return
    outputs: list[ModelOutput] = []
    hooks = [
        tower.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **options}), with_kwargs=True),
        tower.register_forward_hook(lambda _, args, output: outputs.append(output)),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if options[f"output_{name}"] and outputs[0].get(name) is not None:
            layers = zip(*(output[name] for output in outputs), strict=True)  # `None` for those that are not asked for
            found[name] = tuple(None if pieces[0] is None else torch.cat(pieces) for pieces in layers)
