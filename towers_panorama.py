"""Vision towers: how each is run, by its `model_type`.

A tower works that gives a grid of tokens over a view: patches behind CLS and registers, or a feature map. Those that
are run otherwise than most have an entry in `TOWERS`; of the others a configuration is tried once, without weights
(:func:`try_out`), so that what cannot work is refused before anything is loaded. Families that `AutoBackbone` knows
give their feature map through it, and so does every tower whose configuration names a layer (`out_features`,
`out_indices`) before its last: its tokens are then those of that layer (of several, of the last of them).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Tower:
    """A tower that takes images [N, 3, H, W] and gives prefix tokens (CLS, registers) and then its patches, row by row.

    Args:
        unused: how the names of parameters begin that no patch token depends on; they get no gradient.
        resizes: whether it fits its position embeddings to the size of the image without being asked.
        layers: which of its hidden states are the tokens, side by side, before any last norm: 0 what its first block
            is given, n what its n-th block gives; without any the tower's `last_hidden_state`.
    """

    unused: tuple[str, ...] = ()
    resizes: bool = False
    layers: tuple[int, ...] = ()

    def check(self, config: PretrainedConfig, image_size: int) -> None:
        """Raises `ValueError` for a tower that gives no grid of tokens for images of `image_size` pixels a side."""

    def unused_parameters(self, config: PretrainedConfig, image_size: int) -> tuple[str, ...]:
        """How the names of parameters begin that no token depends on."""
        return try_out(config, image_size, self).unused if self.layers else self.unused

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
        return config.hidden_size * max(1, len(self.layers))

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
        return self.selected(tower, pixel_values=images, **options)

    def selected(self, tower: PreTrainedModel, **inputs: Any) -> torch.Tensor:
        """The hidden states that are its tokens, [N, tokens, D_vision]."""
        if not self.layers:
            return tower(**inputs).last_hidden_state
        states = tower(**inputs, output_hidden_states=list(self.layers)).hidden_states
        return torch.cat([states[layer] for layer in self.layers], -1)


class Siglip2Tower(Tower):
    """SigLIP2, which takes patches of any aspect instead of images."""

    def image_size(self, config: PretrainedConfig) -> int:
        """Side in pixels of a square image of `num_patches` patches."""
        return round(config.num_patches**0.5) * config.patch_size

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, patches, D_vision]."""
        rows, columns = self.grid(tower.config, images.shape[-1])
        patches = _patches(images, rows, columns)
        return self.selected(
            tower,
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
            spatial_shapes=torch.tensor([[rows, columns]] * len(images), device=images.device),
        )


class Gemma4Tower(Tower):
    """Gemma 4's, which takes patches at places of an image of any size, of values in [0, 1], and gives the means of
    blocks of them."""

    def image_size(self, config: PretrainedConfig) -> int:
        """Raises `ValueError`: it was made for images of any size."""
        raise ValueError(f"{_vision(config)} takes images of any size: image_size must say which. Typical value: 768")

    def grid(self, config: PretrainedConfig, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the blocks. Raises `ValueError` where they do not divide the image."""
        return _cells(config, image_size, config.patch_size * config.pooling_kernel_size)

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, rows * columns, D_vision]."""
        side = images.shape[-1] // tower.config.patch_size
        places = torch.arange(side, device=images.device)
        places = torch.stack([places.expand(side, side), places[:, None].expand(side, side)], -1)  # x, y
        tokens = self.selected(
            tower,
            pixel_values=_patches(images, side, side),
            pixel_position_ids=places.reshape(1, -1, 2).expand(len(images), -1, -1),
        )
        return tokens.unflatten(0, (len(images), -1))


class QwenVLTower(Tower):
    """Those of Qwen-VL, which take the patches of images of any size, two frames each, and give blocks of them merged
    to the language model's width. What deepstack adds to the first layers of the language model comes behind that,
    side by side."""

    def image_size(self, config: PretrainedConfig) -> int:
        """Raises `ValueError`: it was made for images of any size."""
        raise ValueError(
            f"{_vision(config)} takes images of any size: image_size must say which. "
            f"Typical value: {16 * config.patch_size * config.spatial_merge_size}"
        )

    def width(self, config: PretrainedConfig) -> int:
        """The language model's, as often as it is shown something."""
        return config.out_hidden_size * (1 + len(getattr(config, "deepstack_visual_indexes", ())))

    def grid(self, config: PretrainedConfig, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the blocks. Raises `ValueError` where they do not divide the image."""
        return _cells(config, image_size, config.patch_size * config.spatial_merge_size)

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, rows * columns, D_vision]."""
        output = self.output(tower, images)
        tokens = [output.pooler_output, *getattr(output, "deepstack_features", ())]
        return torch.cat(tokens, -1).unflatten(0, (len(images), -1))

    def output(self, tower: PreTrainedModel, images: torch.Tensor) -> ModelOutput:
        """What it gives for images [N, 3, H, W], all in one row."""
        config = tower.config
        merge, side = config.spatial_merge_size, images.shape[-1] // config.patch_size
        cells = images.unflatten(3, (side // merge, merge, -1)).unflatten(2, (side // merge, merge, -1))
        cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [N, rows, columns, merge, merge, 3, p, p]
        frames = cells.unsqueeze(6).expand(*cells.shape[:6], config.temporal_patch_size, -1, -1)
        grid = torch.tensor([[1, side, side]] * len(images), device=images.device)
        return tower(frames.reshape(len(images) * side * side, -1), grid_thw=grid)


class Lfm3VlTower(QwenVLTower):
    """LFM3-VL's, which takes what Qwen-VL's take, and gives the patches of each block one after the other: here side by
    side."""

    def width(self, config: PretrainedConfig) -> int:
        """That of a patch, as often as a block has some."""
        return config.hidden_size * config.spatial_merge_size**2

    def hidden_states(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, rows * columns, D_vision]."""
        patches = self.output(tower, images).last_hidden_state
        return patches.reshape(len(images), -1, self.width(tower.config))


def _cells(config: PretrainedConfig, image_size: int, cell: int) -> tuple[int, int]:
    if image_size % cell:
        raise ValueError(
            f"image_size must be a multiple of {cell}, a block of patches of {config.model_type!r}, got "
            f"{image_size}. Typical value: {16 * cell}"
        )
    return image_size // cell, image_size // cell


def _patches(images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[N, 3, H, W] -> [N, rows * columns, p * p * 3]."""
    patches = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # [N, 3, rows, p, columns, p]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


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


@dataclass(frozen=True)
class UnknownTower(Tower):
    """A tower that is in no table, tried out before it is used."""

    def check(self, config: PretrainedConfig, image_size: int) -> None:
        """Raises `ValueError` for a tower that does not give prefix tokens and then its patches, as far as can be told
        without weights."""
        if getattr(config, "num_detection_tokens", 0):
            raise ValueError(f"{_vision(config)} puts tokens behind its patches; take a tower that puts them in front")
        self.image_size(config)  # or an error
        shape = try_out(config, image_size, self).shape
        (rows, columns), width = self.grid(config, image_size), getattr(config, "hidden_size", 0) and self.width(config)
        if shape and (len(shape) != 3 or shape[0] != 2 or shape[1] < rows * columns or shape[2] != width):
            raise ValueError(
                f"{_vision(config)} gives {list(shape)} for 2 images of {image_size} pixels a side, and not "
                f"[2, CLS and registers + {rows} * {columns} patches, hidden_size={width}]; {_TAKE}"
            )

    def unused_parameters(self, config: PretrainedConfig, image_size: int) -> tuple[str, ...]:
        """Their names."""
        return try_out(config, image_size, self).unused


@dataclass(frozen=True)
class MapTower(UnknownTower):
    """A tower whose tokens are the cells of a feature map: that of a backbone, or the `last_hidden_state` of a network
    of convolutions."""

    def check(self, config: PretrainedConfig, image_size: int) -> None:
        """Raises `ValueError` for a map that has no square cells that divide the image."""
        self.grid(config, image_size)

    def image_size(self, config: PretrainedConfig) -> int:
        """Side in pixels of the square images the tower was made for. Raises `ValueError` where it takes any."""
        size = getattr(config, "image_size", None)
        if size is None:
            raise ValueError(
                f"{_vision(config)} takes images of any size: image_size must say which. Typical value: 256"
            )
        return size if isinstance(size, int) else min(size)

    def width(self, config: PretrainedConfig) -> int:
        """Channels of the map."""
        return self._shape(config, self.image_size(config) if getattr(config, "image_size", None) else 256)[1]

    def grid(self, config: PretrainedConfig, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the map. Raises `ValueError` where its cells are not square or do not divide the image."""
        rows, columns = self._shape(config, image_size)[2:]
        patch = getattr(config, "patch_size", None) or 1
        strides = {side * 2**n for side in (1, patch if isinstance(patch, int) else patch[0]) for n in range(11)}
        if rows != columns or image_size % rows or image_size // rows not in strides:
            raise ValueError(
                f"{_vision(config)} gives a map of {rows} x {columns} cells, which are not square or do not divide an "
                f"image of image_size={image_size} pixels a side. Typical value: 256"
            )
        return rows, columns

    def __call__(self, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, rows * columns, channels]."""
        return _run(self, tower, images).flatten(2).transpose(1, 2)

    def _shape(self, config: PretrainedConfig, image_size: int) -> tuple[int, ...]:
        shape = try_out(config, image_size, self).shape
        if len(shape) != 4:
            raise ValueError(f"{_vision(config)} gives no feature map [N, channels, rows, columns]; {_TAKE}")
        return shape


TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(unused=("post_layernorm.",)),
    "convnext": ConvolutionalTower(unused=("layernorm.",)),
    "convnextv2": ConvolutionalTower(unused=("layernorm.",)),
    "dinov2": Tower(unused=("embeddings.mask_token",), resizes=True),
    "dinov2_with_registers": Tower(unused=("embeddings.mask_token",), resizes=True),
    "dinov3_vit": Tower(unused=("embeddings.mask_token",), resizes=True),
    "gemma4_vision": Gemma4Tower(),
    "idefics3_vision": Tower(resizes=True),
    "lfm3_vl_vision": Lfm3VlTower(),
    "qwen2_5_vl_vision": QwenVLTower(),
    "qwen3_5_moe_vision": QwenVLTower(),
    "qwen3_5_vision": QwenVLTower(),
    "qwen3_vl_moe_vision": QwenVLTower(),
    "qwen3_vl_vision": QwenVLTower(),
    "resnet": ConvolutionalTower(),
    "siglip_vision_model": Tower(unused=("head.",)),
    "smolvlm_vision": Tower(resizes=True),
    "siglip2_vision_model": Siglip2Tower(unused=("head.",)),
    "vit": Tower(unused=("pooler.", "embeddings.mask_token")),
}
# Networks of convolutions that `AutoBackbone` does not know.
MAPS = ("efficientnet", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "regnet", "segformer")
_TAKE = "take a tower with a grid of tokens, as SigLIP, SigLIP2, CLIP, DINOv2, DINOv3, ViT and ConvNeXt have"


def tower_of(config: PretrainedConfig, layers: Sequence[int] = ()) -> Tower:
    """How the tower of a configuration is run.

    Args:
        layers: its hidden states that are the tokens, as :class:`Tower` has them, negative ones counted from the end.

    Raises:
        ValueError: for layers that it has not.
    """
    if is_backbone(config) or config.model_type in MAPS:
        tower: Tower = MapTower()
    else:
        tower = TOWERS.get(config.model_type, UnknownTower())
    if not layers:
        return tower
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(tower, MapTower | ConvolutionalTower) or not isinstance(depth, int):
        raise ValueError(
            f"vision_feature_layer={list(layers)} names hidden states, and {_vision(config)} has feature maps: name "
            "one in its configuration with out_features"
        )
    if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise ValueError(f"vision_feature_layer must be in [{-depth - 1}, {depth}], got {wrong[0]}. Typical value: -2")
    return replace(tower, layers=tuple(layer % (depth + 1) for layer in layers))


def is_backbone(config: PretrainedConfig) -> bool:
    """Whether the tower is what `AutoBackbone` makes of its configuration, and not what `AutoModel` makes."""
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        return False
    if config.model_type not in TOWERS:
        return True
    return isinstance(config, BackboneConfigMixin) and config.out_features[-1] != config.stage_names[-1]


def new_tower(config: PretrainedConfig) -> PreTrainedModel:
    """The tower of a configuration, with random weights."""
    if isinstance(sizes := getattr(config, "hidden_sizes", None), tuple):
        config.hidden_sizes = list(sizes)  # the default, which ConvNeXt's backbone adds to a list
    return (AutoBackbone if is_backbone(config) else AutoModel).from_config(config)


def load_tower(name: str, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """The pretrained tower of a Hub id or folder.

    Args:
        config: its configuration; of a model with two towers the vision half.
        kwargs: for `from_pretrained`; `out_features` and `out_indices` are in the configuration already.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in ("out_features", "out_indices")}
    # AutoBackbone.from_pretrained takes what is no repository on the Hub, such as a folder, for a name of timm.
    loader = MODEL_FOR_BACKBONE_MAPPING[type(config)] if is_backbone(config) else AutoModel
    return loader.from_pretrained(name, **{**kwargs, "config": config})


def check_class(tower: PreTrainedModel) -> None:
    """Raises `ValueError` for a tower of another kind than a saved folder would be loaded as."""
    if is_backbone(tower.config) != isinstance(tower, BackboneMixin):
        loader = "AutoBackbone" if is_backbone(tower.config) else "AutoModel"
        raise ValueError(
            f"a {type(tower).__name__} would not be loaded again as it is: make the vision tower with "
            f"{loader}.from_config or .from_pretrained, or give its name"
        )


@dataclass(frozen=True)
class Trial:
    """What a tower does with two images.

    Args:
        shape: of its patch tokens or its map; empty where it cannot be run without weights.
        unused: the parameters that get no gradient.
    """

    shape: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()


_TRIALS: dict[tuple[str, int, Tower], Trial] = {}


def try_out(config: PretrainedConfig, image_size: int, how: Tower | None = None) -> Trial:
    """Runs the tower of a configuration once, forward and backward, on the meta device: without weights and numbers,
    in a fraction of a second, and once for each configuration.

    Args:
        how: it is run, where not as :func:`tower_of` says.

    Raises:
        ValueError: for a tower that cannot be run on images alone.
    """
    how = tower_of(config) if how is None else how
    key = (repr(config), image_size, how)
    if key not in _TRIALS:
        try:
            _TRIALS[key] = _try_out(config, image_size, how)
        except ImportError as error:
            raise ValueError(f"{_vision(config)} needs a package that is not installed: {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{_vision(config)} cannot be run on images of {image_size} pixels a side alone ({error}); {_TAKE}"
            ) from error
        except (RuntimeError, NotImplementedError):  # it looks at numbers, and there are none
            _TRIALS[key] = Trial()
    return _TRIALS[key]


def _try_out(config: PretrainedConfig, image_size: int, how: Tower) -> Trial:
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        tower = new_tower(copy.deepcopy(config)).float().eval().requires_grad_(True)
        output = _run(how, tower, torch.zeros(2, 3, image_size, image_size))
        if output.ndim == 3:  # of a sequence the patches alone
            rows, columns = how.grid(config, image_size)
            output = output[:, max(0, output.shape[1] - rows * columns) :]
        output.sum().backward()
    return Trial(tuple(output.shape), tuple(name for name, p in tower.named_parameters() if p.grad is None))


def _run(how: Tower, tower: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
    if isinstance(tower, BackboneMixin):
        return tower(pixel_values=images).feature_maps[-1]
    if isinstance(how, MapTower):
        return tower(pixel_values=images).last_hidden_state
    return how.hidden_states(tower, images)


def _vision(config: PretrainedConfig) -> str:
    return f"vision_config of type {config.model_type!r}"


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
    options = {name: value for name, value in options.items() if value}  # a tower may ask for some itself
    if not options:
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
        if f"output_{name}" in options and outputs[0].get(name) is not None:
            layers = zip(*(output[name] for output in outputs), strict=True)  # `None` for those that are not asked for
            found[name] = tuple(None if pieces[0] is None else torch.cat(pieces) for pieces in layers)
