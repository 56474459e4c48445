"""PanoramaVLM: vision tower -> resampler -> overlap loss, or projection + language model."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .checkpoint_panorama import CheckedLoading, load_checkpoint
from .composing_panorama import language_parts, new_language, parts_from_pretrained
from .configuration_panorama import PanoramaConfig
from .generation_panorama import PanoramaGenerationMixin, masks_with_image_blocks, sort_inputs
from .geometry_panorama import View, ViewPlan, check_direction
from .language_loss_panorama import CHUNK_BYTES, IGNORED, chunked_cross_entropy, is_sharded, logit_transform
from .memory_panorama import InPieces
from .options_panorama import check_option_names
from .outputs_panorama import (
    CACHE,
    PanoramaFeatures,
    PanoramaModelOutput,
    TrainingStageOutput,
    VisionStageOutput,
)
from .overlap_panorama import OverlapLoss, VICRegProjector, VICRegTerms
from .resampler_panorama import RESAMPLERS, UnitOffsetNorm, initialize_start, start_at
from .stages_panorama import TRAINED_PARTS, Stage, StagesMixin
from .token_labels_panorama import TokenLabelHead
from .tokens_panorama import further_codes, further_places, image_places, image_tokens, pooled, pooling_weights
from .towers_panorama import new_tower, outputs_of
from .vlm_panorama import load_projection, vlm_parts

ENGINES = ("vllm", "sglang")  # what the attention implementations of serving engines begin with
LANGUAGE_HEAD = r"^lm_head\."  # its weights' names in a folder
RAY_SCALE = 0.5  # deviation of the ray code at the start, beside tokens of deviation 1


class _SwiGLU(nn.Module):
    """The first half of the features times SiLU of the second (Shazeer 2020, arXiv:2002.05202), [..., 2D] ->
    [..., D]."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        values, gate = features.chunk(2, -1)
        return nn.functional.silu(gate) * values


class PanoramaProjection(nn.Module):
    """Adds the code of where each token looks, where one is added, and goes to the language model's width,
    [..., D_latent] -> [..., D_lm]."""

    def __init__(self, config: PanoramaConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.ray: nn.Linear | None = None
        self.adds_yaw = config.position_encoding == "yaw"
        if config.position_encoding == "rays":
            self.ray = nn.Linear(3 + 6 * config.ray_frequencies, config.latent_dimension, bias=False)
            # The squares of a code add up to 1 (the ray) and 3 for each octave (sine and cosine of three coordinates).
            start_at(self.ray, RAY_SCALE / (1 + 3 * config.ray_frequencies) ** 0.5)
        self.norm: nn.Module | None = None
        if config.projection_norm is not None:
            norm = nn.LayerNorm if config.projection_norm == "layer" else UnitOffsetNorm
            self.norm = norm(config.latent_dimension // config.projection_norm_parts, eps=config.projection_norm_eps)
        self.norm_parts = config.projection_norm_parts
        bias = config.projection_bias
        if config.projection_depth == 0:
            self.layers = nn.Sequential()
            return
        if config.projection_depth == 1:
            self.layers = nn.Sequential(nn.Linear(config.latent_dimension, width, bias=bias))
            return
        hidden, activation = config.projection_hidden or width, config.projection_activation
        gated = activation == "swiglu"
        self.layers = nn.Sequential(
            nn.Linear(config.latent_dimension, hidden, bias=bias),
            _SwiGLU() if gated else ACT2FN[activation],
            nn.Linear(hidden // 2 if gated else hidden, width, bias=bias),
        )

    def forward(self, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """[..., D_latent] and codes [..., 3 + 6K] of `"rays"` or [..., D_latent] of `"yaw"` -> [..., D_lm]."""
        if self.ray is not None:
            tokens = tokens + self.ray(codes.to(tokens.dtype))
        elif self.adds_yaw:
            tokens = tokens + codes.to(tokens.dtype)
        if self.norm is not None:
            tokens = self.norm(tokens.unflatten(-1, (self.norm_parts, -1))).flatten(-2)
        return self.layers(tokens)


def _kept(features: torch.Tensor, kept: torch.Tensor) -> list[torch.Tensor]:
    """Of the features [B, T, D] of each panorama those that are kept, bool [B, T]: B times [tokens, D]."""
    return list(features[kept].split(kept.sum(1).tolist()))


class PanoramaPreTrainedModel(CheckedLoading, PreTrainedModel):
    """What the headless model and the whole one have in common: configuration and what transformers may do."""

    config_class = PanoramaConfig
    config: PanoramaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def _init_weights(self, module: nn.Module) -> None:
        """As transformers does, but for layers that say how they start."""
        if not initialize_start(module):
            super()._init_weights(module)


class PanoramaModel(PanoramaPreTrainedModel):
    """The model without a head: panoramas and text in, hidden states out.

    Args:
        config: the configuration.
        vision_tower, language_model: ready modules that fit `config.vision_config` and `config.text_config`, the
            language model without its head; made from the configuration, with random weights, where not given.
    """

    _keys_to_ignore_on_load_unexpected = {LANGUAGE_HEAD, r"^vicreg_projector\."}

    def __init__(
        self,
        config: PanoramaConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = new_tower(config.vision_config) if vision_tower is None else vision_tower
        self.run_tower = config.tower
        self.resampler = RESAMPLERS[config.resampler_type](config, self.run_tower.width(config.vision_config))
        self.projection = PanoramaProjection(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        self.view_plan = config.view_plan
        self.token_grid = config.token_grid
        self.in_pieces = InPieces()
        # A configuration is slow to ask, and a step of generation short.
        self.further_layers = config.further_layers
        self.embeds_ids = bool(getattr(config.text_config, "hidden_size_per_layer_input", 0))
        self.on_the_grid = config.image_positions == "grid"
        self.sees_both_ways = config.image_attention == "bidirectional"
        no_split = [module._no_split_modules or [] for module in (self.vision_tower, self.language_model)]
        self._no_split_modules = sorted({name for names in no_split for name in names})
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the language model's."""
        self.language_model.set_input_embeddings(value)

    def check_pixels(self, pixel_values: torch.Tensor, num_views: int | None) -> torch.Tensor:
        """[B, 3, H, W] or [B, V, 3, H, W] -> [B, V, 3, H, W], with the wanted number of views."""
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"pixel_values must be a torch.Tensor, got {type(pixel_values).__name__}")
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values must be normalised views of floats, got {pixel_values.dtype}: use the processor saved "
                "with this model"
            )
        if pixel_values.ndim not in (4, 5):
            raise ValueError(
                "pixel_values must have 4 dimensions [B, 3, H, W] or 5 dimensions [B, V, 3, H, W], "
                f"got the shape {list(pixel_values.shape)}"
            )
        if pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(1)
        size = self.config.image_size
        if list(pixel_values.shape[2:]) != [3, size, size]:
            raise ValueError(
                f"each view must be [3, {size}, {size}] (config.image_size={size}), got {list(pixel_values.shape[2:])}"
            )
        if num_views is not None and pixel_values.shape[1] != num_views:
            has = "has" if num_views == self.config.num_views else "expects (vision_stage_expected_views)"
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} views a panorama, but the configuration {has} {num_views} "
                f"(view_strategy={self.config.view_strategy!r}, fov_deg={self.config.fov_deg}, "
                f"overlap_ratio={self.config.overlap_ratio}); use the processor saved with this model"
            )
        return pixel_values

    def check_view_mask(self, view_mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
        """The mask [B, V] as bool, on the device of the views' tokens [B, V, ...]."""
        if view_mask is None:
            return None
        if view_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"view_mask must be {list(tokens.shape[:2])}, one value a view of pixel_values, got "
                f"{list(view_mask.shape)}"
            )
        return view_mask.to(tokens.device, torch.bool)

    def tower_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The vision tower's patch tokens, [B, V, 3, H, W] -> [B, V, patches, D_vision]; CLS and registers left out."""
        images = pixel_values.flatten(0, 1).to(self.vision_tower.dtype)  # [B * V, 3, H, W]
        needed = images.requires_grad or any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
            run = partial(self.run_tower, self.vision_tower)
            tokens = self.in_pieces(run, images, self.vision_tower)  # [B * V, patches, D_vision]
        return tokens.unflatten(0, pixel_values.shape[:2])

    def encode_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Resampled tokens of the views, [B, V, 3, H, W] -> [B, V, S, D_latent]."""
        tokens = self.tower_tokens(pixel_values)
        return self.in_pieces(self.resampler, tokens.flatten(0, 1), self.resampler).unflatten(0, tokens.shape[:2])

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the language model is shown: [B, V, S, D_latent] -> [B, num_image_tokens, D_lm]."""
        indices, codes = self._image_tokens(tokens.device)
        return self.projection(tokens.flatten(1, 2)[:, indices], codes)

    def _image_tokens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the V * S tokens of a panorama the language model is shown, and their codes."""
        config = self.config
        return image_tokens(self.view_plan, self.token_grid, config.token_selection, config.position_code, device)

    def _shown_tokens(self, view_mask: torch.Tensor) -> torch.Tensor:
        """Which of them are of views that show something, bool [B, V] -> bool [B, num_image_tokens]."""
        indices, _ = self._image_tokens(view_mask.device)
        return view_mask[:, indices // self.config.tokens_per_view]

    def project_further(
        self, features: torch.Tensor, tokens: torch.Tensor, further_views: torch.Tensor, mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The features of panoramas [B, num_image_tokens, D_lm], each with those of its further views behind: B times
        [tokens, D_lm].

        Args:
            features: of the views of the plan.
            tokens: of the further views, [B, E, S, D_latent].
            further_views: [B, E, 3], NaN where there is none.
            mask: bool [B, V] of the views of the plan that show something.
        """
        codes = further_codes(further_views, self.token_grid, self.config.position_code)
        further = self.projection(tokens, codes).flatten(1, 2)  # [B, E * S, D_lm]
        there = further_views[..., 0].isfinite().repeat_interleave(tokens.shape[2], dim=1).to(tokens.device)
        shown = torch.ones(features.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is not None:
            shown = self._shown_tokens(mask)
        return _kept(torch.cat([features, further], 1), torch.cat([shown, there], 1))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        further_views: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Panoramas as the language model sees them.

        Args:
            pixel_values: [B, V, 3, H, W], or [B, 3, H, W] where a panorama is one view; with E further views
                [B, V + E, 3, H, W].
            view_mask: [B, V], false for views that show nothing.
            further_views: [B, E, 3], yaw, pitch and field of view in degrees of views beside those of the plan, NaN
                where a panorama has fewer. All of their tokens are shown, behind those of the panorama.
            kwargs: `output_hidden_states` and `output_attentions`, those of the vision tower.

        Returns:
            `last_hidden_state` [B, V, S, D_latent], the resampled tokens, and `pooler_output`
            [B, num_image_tokens, D_lm], what takes the place of the `<image>` tokens; with `view_mask` or
            `further_views` it is a list, [tokens, D_lm] for each panorama. Where asked for `hidden_states` and
            `attentions` of the tower's layers, as it gives them, for B * V images.
        """
        views = self.view_plan.num_views
        further = 0 if further_views is None else further_views.shape[1]
        with outputs_of(self.vision_tower, ("hidden_states", "attentions"), kwargs) as of_layers:
            tokens = self.encode_views(self.check_pixels(pixel_values, views + further))
        tokens, of_further = tokens[:, :views], tokens[:, views:]
        mask = self.check_view_mask(view_mask, tokens)
        projected = self.project_tokens(tokens)
        features: torch.Tensor | list[torch.Tensor] = projected
        if further_views is not None:
            if further_views.shape[::2] != (len(tokens), 3):
                raise ValueError(f"further_views must be [{len(tokens)}, E, 3], got {list(further_views.shape)}")
            features = self.project_further(projected, of_further, further_views, mask)
        elif mask is not None:
            features = _kept(projected, self._shown_tokens(mask))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=features, **of_layers)

    def get_panorama_features(
        self,
        pixel_values: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        directions: Sequence[Sequence[float]] | None = None,
    ) -> PanoramaFeatures:
        """What panoramas look like, one vector a panorama and one a direction: the means of the resampled tokens, each
        weighted by the solid angle for which it stands, so that every part of the sphere counts once.

        Args:
            pixel_values: [B, V, 3, H, W], or [B, 3, H, W] where a panorama is one view.
            view_mask: [B, V], false for views that show nothing.
            directions: yaw, pitch and field of view in degrees of N square perspective views, any; their vectors
                cost no vision compute. Not given: those of the plan's tiles (`view_plan.directions`).

        Raises:
            ValueError: for a direction that cannot be, or that no token looks in.
        """
        given = self.view_plan.directions if directions is None else directions
        wanted = tuple(check_direction(direction, "direction") for direction in given)
        pixel_values = self.check_pixels(pixel_values, self.view_plan.num_views)
        weights = pooling_weights(self.view_plan, self.token_grid, wanted, pixel_values.device)  # [1 + N, V, S]
        tokens = self.encode_views(pixel_values)
        embeds = pooled(tokens, weights, self.check_view_mask(view_mask, tokens))  # [B, 1 + N, D_latent]
        looking = torch.tensor(wanted, device=tokens.device).reshape(-1, 3)
        return PanoramaFeatures(panorama_embeds=embeds[:, 0], direction_embeds=embeds[:, 1:], directions=looking)

    def get_view_features(self, pixel_values: torch.Tensor, fov_deg: float = 60.0) -> torch.Tensor:
        """What single views look like, such as photographs, to be compared with `direction_embeds` of
        :meth:`get_panorama_features`.

        Args:
            pixel_values: [N, 3, H, W], as :meth:`PanoramaImageProcessor.photographs` makes them.
            fov_deg: their field of view in degrees, in (0, 180).

        Returns:
            [N, D_latent], of length 1.
        """
        view = View("perspective", *check_direction((0.0, 0.0, fov_deg), "view"))
        tokens = self.encode_views(self.check_pixels(pixel_values, 1))  # [N, 1, S, D_latent]
        return pooled(tokens, pooling_weights(ViewPlan((view,)), self.token_grid, (), tokens.device))[:, 0]

    def is_placeholder(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where the `<image>` tokens stand, [B, T] -> bool [B, T]."""
        token = self.config.image_token_id
        return torch.eq(input_ids, -1 if token is None else token)

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor | Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Where the `<image>` tokens stand, [B, T, 1].

        Args:
            input_ids: [B, T].
            inputs_embeds: not looked at: a placeholder has no embedding of its own.
            image_features: what is to take their place, [B, num_image_tokens, D_lm] or B times [tokens, D_lm].

        Raises:
            ValueError: where their number does not fit.
        """
        mask = self.is_placeholder(input_ids)
        wanted = 0 if image_features is None else sum(len(of_one) for of_one in image_features)
        if not torch.compiler.is_compiling() and wanted != (found := int(mask.sum())):
            listed = isinstance(image_features, Sequence)
            count = 0 if image_features is None else len(image_features)
            panoramas = "partial panoramas, or those with further views," if listed else f"{count} panoramas"
            each = self.config.num_image_tokens
            raise ValueError(
                f"{panoramas} need {wanted} <image> tokens ({each} each{', or others' * listed}), but "
                f"input_ids holds {found} (image_token_id={self.config.image_token_id}); use the processor saved with "
                "this model, and hand over all that it returns"
            )
        return mask[..., None]

    def embed(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | Sequence[torch.Tensor] | None,
        check: bool = True,
    ) -> torch.Tensor:
        """Embeddings of tokens [B, T] -> [B, T, D_lm], with the panoramas in place of the placeholders.

        `check`: whether their number is compared, for which a GPU has to be waited for.
        """
        if check or image_features is not None:
            mask = self.get_placeholder_mask(input_ids, None, image_features)
        else:
            mask = self.is_placeholder(input_ids)[..., None]
        # The placeholder's id may lie outside the vocabulary, and its embedding is never used.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(mask[..., 0], 0))
        if image_features is None:
            return embeddings
        if isinstance(image_features, Sequence):
            image_features = torch.cat(list(image_features))
        image_features = image_features[..., : embeddings.shape[-1]]  # behind that is what further layers are shown
        return embeddings.masked_scatter(mask.to(embeddings.device), image_features.to(embeddings))

    def panorama_positions(
        self,
        input_ids: torch.Tensor,
        panoramas: int,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        further_views: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Position ids of `position_encoding="panorope"`: the N tokens of a panorama share the N positions that they
        take up, from the left edge of the panorama to its right, each at the place of its own direction
        (:func:`yaw_places`), so that tokens of several views that look the same way stand at the same place. Text keeps
        its positions. After CORA (Woo, Jung, Youm 2026), which adds a count of columns to the ids of a tile.

        Args:
            input_ids: [B, T], with the placeholders of all panoramas in reading order.
            panoramas: how many there are.
            attention_mask: [B, T], zero where padded, or longer by what a cache holds.
            position_ids: [B, T] as they would be without; from the mask where not given.
            view_mask, further_views: as in :meth:`get_image_features`.

        Returns:
            float32 [B, T], or as long as the mask.
        """
        if position_ids is None:
            two = attention_mask is not None and attention_mask.ndim == 2
            mask = attention_mask if two else torch.ones_like(input_ids)
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)  # type: ignore[union-attr]
        positions = position_ids.to(input_ids.device).expand(len(input_ids), -1).float()
        places = image_places(self.view_plan, self.token_grid, input_ids.device)
        places = places[self._image_tokens(input_ids.device)[0]].expand(panoramas, -1)  # [panoramas, num_image_tokens]
        shown = torch.ones_like(places, dtype=torch.bool)
        if view_mask is not None:
            shown = self._shown_tokens(view_mask.to(input_ids.device, torch.bool))
        if further_views is not None:
            further = further_places(further_views, self.token_grid, self.view_plan).flatten(1, 2).to(places)
            there = further_views[..., 0].isfinite().repeat_interleave(self.config.tokens_per_view, dim=1)
            places, shown = torch.cat([places, further], 1), torch.cat([shown, there.to(shown.device)], 1)
        counts = shown.sum(1)  # [panoramas]
        new = positions[:, positions.shape[1] - input_ids.shape[1] :]
        is_image = self.is_placeholder(input_ids)
        of_images = new[is_image]  # [tokens of all panoramas]
        if not torch.compiler.is_compiling() and len(of_images) != int(counts.sum()):
            return positions  # an error that names both follows
        starts = of_images[counts.cumsum(0) - counts]
        moved = (starts[:, None] + places * counts[:, None])[shown]
        return torch.cat([positions[:, : -new.shape[1]], new.masked_scatter(is_image, moved)], 1)

    def _beside_embeddings(
        self, input_ids: torch.Tensor | None, features: Any, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What some language models are shown beside the embeddings: in the first layers of Qwen3-VL's the rest of the
        features (deepstack), in every layer of Gemma 4's small ones the ids, where those of images count as padding.

        Raises:
            ValueError: where embeddings are given, from which the first does not follow.
        """
        config = self.config
        if input_ids is None:
            if self.further_layers and "deepstack_visual_embeds" not in given:
                raise ValueError(
                    "inputs_embeds need visual_pos_masks [B, T] and deepstack_visual_embeds, what the first layers of "
                    "this language model are shown of images, and both may be None"
                )
            return {}
        beside: dict[str, Any] = {}
        if self.embeds_ids:
            ids = input_ids.masked_fill(self.is_placeholder(input_ids), config.text_config.pad_token_id or 0)
            beside["per_layer_inputs"] = self.language_model.get_per_layer_inputs(ids)
        if self.further_layers and features is not None:
            flat = torch.cat(list(features)) if isinstance(features, list) else features.flatten(0, 1)
            _, *further = flat.split(config.text_config.hidden_size, -1)
            beside |= {"visual_pos_masks": self.is_placeholder(input_ids), "deepstack_visual_embeds": further}
        return beside

    def grid_positions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Position ids of `image_positions="grid"`: text has the same on three axes; the tokens of a view have one in
        time, and in height and width their row and column behind it; what follows goes on behind the largest (M-RoPE,
        Wang et al. 2024, arXiv:2409.12191).

        Args:
            input_ids: [B, T], from the beginning, with a run of placeholders for each view.
            attention_mask: [B, T], zero where padded.

        Returns:
            [4, B, T]: the place in the sequence, and the three axes.
        """
        rows, columns = self.token_grid
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        is_image = self.is_placeholder(input_ids)
        starts = is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]
        is_text = there * ~is_image
        before = is_text.cumsum(1) - is_text + (starts.long().cumsum(1) - is_image.long()) * max(rows, columns)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        inside = places - torch.where(starts, places, 0).cummax(1).values  # of a view's tokens: which of them
        height, width = inside // columns * is_image, inside % columns * is_image
        sequence = (there.cumsum(1) - 1).clamp(min=0)
        return torch.stack([sequence, before, before + height, before + width]) * there

    def _on_the_grid(
        self, input_ids: torch.Tensor | None, mask: Any, positions: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """The position ids of a step. Raises where they cannot be known."""
        if positions is not None and positions.ndim == 3:
            return positions
        begins = cache is None or not cache.get_seq_length()
        two = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)
        if input_ids is None or not begins or not two or positions is not None:
            raise ValueError(
                "with image_positions='grid' packed rows, inputs_embeds and steps with a cache need the position_ids "
                "[4, B, T] that grid_positions(input_ids, attention_mask) gives for the whole text"
            )
        return self.grid_positions(input_ids, mask)

    def _check_positions(self, position_ids: torch.Tensor | None) -> None:
        """Raise where the positions of `panorope` cannot be known, or would be taken for those of packed texts."""
        attention = str(self.language_model.config._attn_implementation)
        if "flash" in attention:
            raise ValueError(
                f"attn_implementation={attention!r} takes positions that do not rise by one for those of packed texts; "
                "with position_encoding='panorope' use 'sdpa' or 'eager'"
            )
        if position_ids is None or not position_ids.is_floating_point():
            raise ValueError(
                "with position_encoding='panorope' inputs_embeds and mm_encoder_outputs need the position_ids that "
                "panorama_positions(input_ids, ...) gives"
            )

    def _with_image_blocks(
        self,
        input_ids: torch.Tensor | None,
        embeddings: Any,
        types: torch.Tensor | None,
        mask: Any,
        cache: Cache | None,
        positions: torch.Tensor | None,
    ) -> Any:
        """The mask of `image_attention="bidirectional"`; as it is where it is made already, and for a single token."""
        made = isinstance(mask, dict) or (
            isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype != torch.bool
        )
        made |= isinstance(mask, torch.Tensor) and mask.ndim == 4 and cache is not None  # of a static cache
        if made or embeddings.shape[1] == 1:
            return mask
        if types is None:
            if input_ids is None:
                raise ValueError(
                    "with image_attention='bidirectional' inputs_embeds need token_type_ids [B, T], 1 at image tokens"
                )
            types = self.is_placeholder(input_ids).long()
        return masks_with_image_blocks(self.language_model.config, embeddings, mask, cache, positions, types)

    def _as_attended(self, mask: Any, embeddings: torch.Tensor | None) -> Any:
        """A mask as the language model takes it: one of [B, 1, T, T] as zeros and lowest numbers where it is added.

        Raises:
            ValueError: for attention that knows no such mask.
        """
        if isinstance(mask, dict):
            return {layers: self._as_attended(each, embeddings) for layers, each in mask.items()}
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4:  # of a static cache it is made already
            return mask
        attention = self.language_model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(
                f"an attention_mask [B, 1, T, T] needs attn_implementation 'sdpa' or 'eager', got {attention!r}"
            )
        if attention == "sdpa" or mask.dtype != torch.bool:
            return mask
        dtype = embeddings.dtype  # type: ignore[union-attr]
        if torch.is_autocast_enabled(mask.device.type):
            dtype = torch.get_autocast_dtype(mask.device.type)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        further_views: torch.Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PanoramaModelOutput:
        """Hidden states of text with panoramas.

        Args:
            input_ids: [B, T], with `num_image_tokens` placeholders for each panorama, in reading order.
            pixel_values: [panoramas, V, 3, H, W], or [panoramas, 3, H, W] where a panorama is one view.
            attention_mask: [B, T], zero where padded; or bool [B, 1, T, T], true where a position (row) sees another.
            inputs_embeds: [B, T, D_lm] instead of `input_ids` and `pixel_values`.
            view_mask: [panoramas, V], false for views of a partial panorama that show nothing the camera saw; their
                tokens are not shown to the language model.
            further_views: [panoramas, E, 3], see :meth:`get_image_features`; `pixel_values` then has V + E views, and
                each further view S more placeholders.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`, as `generate` hands
                them over.
            token_type_ids: [B, T], 1 at image tokens, for `image_attention="bidirectional"`; they follow from
                `input_ids`, and have to be given with `inputs_embeds`.
            position_ids, past_key_values (`cache` since transformers 5.24), kwargs: as in any language model of
                transformers.

        Raises:
            ValueError: for a shape, a number of views or a number of placeholders that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        past_key_values = past_key_values if cache is None else cache
        image_features = tokens = None
        if (image := (mm_encoder_outputs or {}).get("image")) is not None:
            if pixel_values is not None:
                raise ValueError("give either pixel_values or mm_encoder_outputs, and not both")
            image_features = image.pooler_output
        elif pixel_values is not None:
            if input_ids is None:
                raise ValueError(
                    "pixel_values take the place of <image> tokens in input_ids; with inputs_embeds put "
                    "get_image_features(...).pooler_output into them and leave pixel_values out"
                )
            asked = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
            image = self.get_image_features(pixel_values, view_mask, further_views, return_dict=True, **asked)
            image_features, tokens = image.pooler_output, image.last_hidden_state
        if input_ids is not None:
            # A token that was just generated, or is guessed, is no placeholder: to look would cost a synchronisation.
            begins = past_key_values is None or (input_ids.shape[1] > 1 and not past_key_values.get_seq_length())
            if begins and not torch.compiler.is_compiling():
                self.language_model.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.embed(input_ids, image_features, check=begins)
        if self.further_layers or self.embeds_ids:
            kwargs = {**self._beside_embeddings(input_ids, image_features, kwargs), **kwargs}
        if self.on_the_grid:
            position_ids = self._on_the_grid(input_ids, attention_mask, position_ids, past_key_values)
        if self.config.position_encoding == "panorope" and (image_features is not None or input_ids is None):
            made = position_ids is not None and position_ids.is_floating_point()  # as `generate` makes them
            if input_ids is not None and pixel_values is not None and not made:
                position_ids = self.panorama_positions(
                    input_ids, len(pixel_values), attention_mask, position_ids, view_mask, further_views
                )
            self._check_positions(position_ids)
            if attention_mask is None and past_key_values is None:  # else they are taken for those of packed texts
                attention_mask = torch.ones_like(position_ids, dtype=torch.long)  # type: ignore[arg-type]
        if self.sees_both_ways:
            given = (attention_mask, past_key_values, position_ids)
            attention_mask = self._with_image_blocks(input_ids, inputs_embeds, token_type_ids, *given)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._as_attended(attention_mask, inputs_embeds),
            position_ids=position_ids,
            **{CACHE: past_key_values},
            **kwargs,
        )
        if len({inputs_embeds.shape[1], outputs.last_hidden_state.shape[1]}) > 1:  # type: ignore[union-attr]
            raise ValueError("adapters that put tokens in front (prompt or prefix tuning) are not supported; use LoRA")
        return PanoramaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            image_outputs=image,
            view_tokens=tokens,
        )


class PanoramaVLM(PanoramaGenerationMixin, StagesMixin, PanoramaPreTrainedModel):
    """A vision-language model for 360-degree panoramas.

    ```
    pixel_values [B, V, 3, H, W]                      input_ids [B, T]
          │ vision_tower                                    │
          ▼ [B·V, S, D_vision]                              │ embeddings of the language model
       resampler                                            │
          ▼ [B·V, S, D_latent]                              │
     ┌────┴──────────────────┐                              │
     │ stage "vision"        │ stages "resampler", "finetune" and generation
     │ vicreg_projector      │ + ray code, owned tokens only│
     │ -> overlap loss       │ -> projection [B, T_image, D_lm], in place of the <image> tokens
     └───────────────────────┘                              ▼
                                              language_model, lm_head -> loss, logits, text

    module             vision                      resampler                finetune
    vision_tower       frozen (option: the last    frozen (option: trains)  frozen (option: trains)
                       n blocks or all train)
    resampler          trains                      trains                   trains
    vicreg_projector   trains                      frozen                   frozen
    projection         unused                      trains                   trains
    language_model     not run                     frozen (option: whole)   LoRA (default) or whole, with its head
    ```

    Every token knows the direction it looks in (`geometry_panorama.py`). The overlap loss compares tokens of
    neighbouring views that look the same way; the ray code tells the language model where a token looks; and of the
    tokens that look the same way in several tiles the language model gets the one whose tile looks there most nearly.

    `model` is the headless :class:`PanoramaModel` with tower, resampler, projection and the language model's body.
    Where `use_vicreg_projector` is set, the VICReg projector stands between the resampler and the overlap loss, so that
    the loss shapes the resampler without flattening the features the language model reads. Later stages run it, frozen,
    where `overlap_loss_weight_finetune` is positive.

    Compose one from pretrained models with :meth:`from_vision_text_pretrained`; a bare `PanoramaVLM(config)` has
    random weights.

    Args:
        config: the configuration.
        vision_tower, language_model: ready models that fit `config.vision_config` and `config.text_config`, the
            language model with its head; made from them where not given.
    """

    # Of a folder, where it is switched off, and of a checkpoint, where training alone has it.
    _keys_to_ignore_on_load_unexpected = {r"^vicreg_projector\.", r"^label_head\."}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(
        self,
        config: PanoramaConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        **unknown: Any,
    ):
        check_option_names(unknown, config.option_names(), type(config).__name__)
        super().__init__(config)
        if language_model is None:
            body, head = new_language(config.text_config)
        else:
            body, head = language_parts(language_model)
        self.model = PanoramaModel(config, vision_tower, body)
        self.lm_head = head
        self.vicreg_projector = VICRegProjector(config) if config.use_vicreg_projector else None
        self.label_head: TokenLabelHead | None = None
        self.overlap = OverlapLoss(config)
        self.logit_transform = logit_transform(config.text_config)
        self.loss_type = "ForCausalLM"
        self._no_split_modules = self.model._no_split_modules
        self.post_init()
        self.freeze_unused()

    @property
    def _tied_weights_keys(self) -> dict[str, str]:  # looked up, because adapters rename what they wrap
        weight = self.get_input_embeddings().weight
        name = next(name for name, parameter in self.model.named_parameters() if parameter is weight)
        return {"lm_head.weight": f"model.{name}"}

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the language model's head."""
        self.lm_head = new_embeddings

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        further_views: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See :meth:`PanoramaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, view_mask, further_views, **kwargs)

    def get_panorama_features(
        self,
        pixel_values: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        directions: Sequence[Sequence[float]] | None = None,
    ) -> PanoramaFeatures:
        """See :meth:`PanoramaModel.get_panorama_features`."""
        return self.model.get_panorama_features(pixel_values, view_mask, directions)

    def get_view_features(self, pixel_values: torch.Tensor, fov_deg: float = 60.0) -> torch.Tensor:
        """See :meth:`PanoramaModel.get_view_features`."""
        return self.model.get_view_features(pixel_values, fov_deg)

    # Composing, loading and saving

    @classmethod
    def _from_config(cls, config: PanoramaConfig, **kwargs: Any) -> PanoramaPreTrainedModel:
        """As `PreTrainedModel._from_config`; but a serving engine, which brings its own head and says who it is by the
        attention of the language model, gets the headless model.

        Raises:
            ValueError: for an engine where `<image>` has no row in the table of embeddings: engines look it up.
        """
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs.pop("attn_implementation")
        if not str(config.text_config._attn_implementation).startswith(ENGINES):
            return super()._from_config(config, **kwargs)
        rows, token = config.text_config.vocab_size, config.image_token_id
        if token is None or token >= rows:
            raise ValueError(
                f"a serving engine looks <image> up in the table of embeddings, which has {rows} rows, and "
                f"image_token_id is {token}. Load the model without the engine, call "
                "resize_token_embeddings(config.image_token_id + 1), and save it"
            )
        own = config.image_attention == "bidirectional" or config.image_positions == "grid"
        if (config.view_words and config.num_views > 1) or own:
            raise ValueError(
                "a serving engine expects the tokens of a panorama side by side and lets each see what is before it; "
                "this model has words between its views (view_text, view_prefix, view_suffix), "
                "image_attention='bidirectional' or image_positions='grid': ask it through transformers"
            )
        if getattr(config.text_config, "hidden_size_per_layer_input", 0):
            raise ValueError(
                "a serving engine hands over embeddings alone, and this language model embeds the ids in every layer "
                "(hidden_size_per_layer_input): ask it through transformers"
            )
        if config.position_encoding == "panorope":
            raise ValueError(
                "a serving engine counts positions itself, and position_encoding='panorope' has its own: ask the model "
                "through transformers"
            )
        model = PanoramaModel._from_config(config, **kwargs)
        model._keys_to_ignore_on_load_unexpected.discard(LANGUAGE_HEAD)
        return model

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | PreTrainedModel,
        language: str | PreTrainedModel,
        vision_kwargs: dict[str, Any] | None = None,
        language_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> PanoramaVLM:
        """Compose a model from a pretrained vision tower and a pretrained language model.

        The resampler starts by keeping what the tower says, the projection from random weights; stages `vision` and
        `resampler` train them. A language model without an unused row for `<image>` gets one, whose logit is the
        lowest; all else of it stays as it is.

        Args:
            vision: Hub id or folder of a vision tower (or of a two-tower model such as SigLIP), or the model itself.
            language: Hub id or folder of a causal language model (of a vision-language model its language model is
                taken), or the model itself.
            vision_kwargs, language_kwargs: for their `from_pretrained`, such as `{"dtype": torch.float32}`.
            options: options of :class:`PanoramaConfig`. `image_token_id` is that of the processor made by
                :meth:`PanoramaProcessor.from_vision_text_pretrained`; it is found from the tokenizer where `language`
                is a name, and has to be given where it is a model.
        """
        tower, causal, options = parts_from_pretrained(vision, language, vision_kwargs, language_kwargs, options)
        model = cls(PanoramaConfig(**options), vision_tower=tower, language_model=causal)
        model.generation_config = copy.deepcopy(causal.generation_config) or model.generation_config
        model.to(dtype=causal.dtype)
        return model

    @classmethod
    def from_vlm_pretrained(
        cls,
        vlm: str | os.PathLike[str] | PreTrainedModel,
        processor: Any = None,
        vlm_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> PanoramaVLM:
        """Take a pretrained vision-language model apart into the parts of this one; it answers about panoramas at once.

        Each view is shown as the source's own classes show an image of its size: its tower, its connector (as resampler
        and projection) and its language model keep their weights, and the code of the ray starts at zero. Words say
        which way each view looks (`view_text`), and all tokens of a view are shown (`token_selection="all"`).

        Args:
            vlm: Hub id or folder of a vision-language model, of a type in `vlm_panorama.FAMILIES`, or the model itself,
                whose modules are then used and not copied.
            processor: the source's; where it is not given, that of its name.
            vlm_kwargs: for the source's `from_pretrained`, such as `{"dtype": torch.bfloat16}`.
            options: options of :class:`PanoramaConfig`, the same as for :meth:`PanoramaProcessor.from_vlm_pretrained`.

        Raises:
            ValueError: for a family that cannot be taken apart so that a view is shown as it would show it, for options
                that are the source's own, and for weights that would be lost.
        """
        tower, source, weights, options = vlm_parts(vlm, processor, vlm_kwargs, options)
        model = cls(PanoramaConfig(**options), vision_tower=tower, language_model=source)
        load_projection(model.model.projection, weights)
        for part in (model.model.resampler, model.model.projection, model.vicreg_projector):
            if part is not None:
                part.to(source.device)  # where `device_map` put the others
        model.generation_config = copy.deepcopy(source.generation_config) or model.generation_config
        return model.to(dtype=source.dtype)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> PanoramaVLM:
        """Load whatever training wrote, and log which it is: a training checkpoint (of one machine or DDP), a saved
        folder, or a folder of LoRA adapters (known by `adapter_config.json`), with what they belong to.

        Args:
            path: the folder.
            base: of adapters, what they belong to; without it the folder that they name.
            kwargs: for `from_pretrained`, such as `dtype`.

        Raises:
            ValueError: for a folder that is none of these or is not whole.
        """
        return load_checkpoint(cls, path, base, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`. LoRA adapters are saved merged into the language model, so that the
        folder loads anywhere, and without the head of the token labels; the model itself keeps both. The code of
        :class:`PanoramaPipeline`, which the configuration names, is saved with it."""
        from .pipeline_panorama import PanoramaPipeline

        adapted, head = self.model.language_model, self.label_head
        self.label_head = None
        if self.has_lora:
            shared = self.get_input_embeddings().weight  # maybe the head's, too
            self.model.language_model = copy.deepcopy(adapted, {id(shared): shared}).merge_and_unload()
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.model.language_model, self.label_head = adapted, head
        custom_object_save(PanoramaPipeline, save_directory)

    # Token labels

    def add_label_head(self, fields: Mapping[str, int]) -> TokenLabelHead:
        """Let `forward` take token labels, in training.

        Args:
            fields: how many classes each field has, in the order of `token_classes`.

        Returns:
            The head, `label_head`, which is not saved with the model.
        """
        self.label_head = TokenLabelHead(self.config.latent_dimension, fields)
        reference = self.get_input_embeddings().weight
        return self.label_head.to(reference.device, reference.dtype)

    def _label_loss(
        self, tokens: torch.Tensor | None, classes: torch.Tensor | None, places: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor] | None]:
        if self.label_head is None:
            if classes is not None:
                raise ValueError("token_classes are given, but the model has no label_head: call add_label_head first")
            return None, None
        return (None, None) if tokens is None else self.label_head(tokens, classes, places)

    # Overlap consistency

    def overlap_loss(
        self, tokens: torch.Tensor, view_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, VICRegTerms | None]:
        """The overlap loss of resampled tokens [B, V, S, D_latent], through the projector where there is one.

        See :class:`OverlapLoss` for what is returned.
        """
        return self.overlap(self._overlap_features(tokens), view_mask)

    def _overlap_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, V, S, D_latent] -> what the overlap loss compares, [B, V, S, D]."""
        return tokens if self.vicreg_projector is None else self.vicreg_projector(tokens)

    def _vision_stage(
        self,
        pixel_values: torch.Tensor | None,
        view_mask: torch.Tensor | None,
        token_classes: torch.Tensor | None,
        token_places: torch.Tensor | None,
    ) -> VisionStageOutput:
        if pixel_values is None:
            raise ValueError("stage 'vision' needs pixel_values, got None")
        expected = self.config.vision_stage_expected_views
        pixel_values = self.model.check_pixels(pixel_values, expected if expected and expected > 1 else None)
        if self.training and torch.is_grad_enabled() and self.vicreg_projector is not None:
            if not next(self.vicreg_projector.parameters()).requires_grad:
                warnings.warn("the VICReg projector is frozen: set_stage('vision') lets it train", stacklevel=4)
        tokens = self.model.encode_views(pixel_values)  # [B, V, S, D_latent]
        features = self._overlap_features(tokens)  # [B, V, S, D]
        label_loss, label_figures = self._label_loss(tokens, token_classes, token_places)
        if self.label_head is not None and self.config.vicreg_loss_weight == 0:
            raw, terms = features.sum() * 0.0, None  # views that have nothing in common can still be labelled
        else:
            raw, terms = self.overlap(features, self.model.check_view_mask(view_mask, features))
        loss = self.config.vicreg_loss_weight * raw
        return VisionStageOutput(
            loss=loss if label_loss is None else loss + label_loss,
            label_loss=label_loss,
            label_figures=label_figures,
            vicreg_loss=loss,
            vicreg_raw=raw,
            vicreg_weight=self.config.vicreg_loss_weight,
            vicreg_dim=features.shape[-1],
            invariance=None if terms is None else terms.invariance,
            variance=None if terms is None else terms.variance,
            covariance=None if terms is None else terms.covariance,
            hidden_states=features,
        )

    # Forward

    @overload
    def forward(
        self,
        pixel_values: torch.Tensor | None = ...,
        input_ids: torch.Tensor | None = ...,
        attention_mask: torch.Tensor | None = ...,
        labels: torch.Tensor | None = ...,
        *,
        stage: Literal["vision"],
        **kwargs: Any,
    ) -> VisionStageOutput: ...

    @overload
    def forward(
        self,
        pixel_values: torch.Tensor | None = ...,
        input_ids: torch.Tensor | None = ...,
        attention_mask: torch.Tensor | None = ...,
        labels: torch.Tensor | None = ...,
        stage: Literal["resampler", "finetune"] = ...,
        **kwargs: Any,
    ) -> TrainingStageOutput: ...

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        stage: Stage = "finetune",
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        view_mask: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_logits: bool | None = None,
        shift_labels: torch.Tensor | None = None,
        token_classes: torch.Tensor | None = None,
        token_places: torch.Tensor | None = None,
        further_views: torch.Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> VisionStageOutput | TrainingStageOutput:
        """One step of a stage.

        `model(input_ids)` and `model(input_ids, attention_mask)`, as other language models are called, work too:
        integers are ids.

        Args:
            pixel_values: [panoramas, V, 3, H, W], or [panoramas, 3, H, W] where a panorama is one view.
            input_ids: [B, T], with `num_image_tokens` placeholders for each panorama, in reading order.
            attention_mask: [B, T], zero where padded; or bool [B, 1, T, T], true where a position (row) sees another.
            labels: [B, T], -100 where nothing is supervised (placeholders never are); `shift_labels` [B, T] are they,
                already shifted.
            stage: `"vision"` computes the overlap loss of `pixel_values` and does not run the language model; the
                other two run it.
            inputs_embeds: [B, T, D_lm] instead of `input_ids` and `pixel_values`.
            view_mask: [panoramas, V], false for views of a partial panorama that show nothing the camera saw: they
                take no part in the overlap loss, and their tokens are not shown to the language model.
            position_ids, past_key_values (`cache` since transformers 5.24), use_cache, logits_to_keep, kwargs: as in
                any causal language model of transformers.
            num_items_in_batch: `ar_loss` is the sum over supervised tokens divided by it, instead of their mean: the
                losses of micro-batches then add up to that of the whole batch. `transformers.Trainer` gives it.
            return_logits: whether logits are computed where `labels` are given. Without them the loss costs what is
                supervised: the head runs on those positions only, in chunks, with the same loss and gradients, and
                `logits` is `None`. Not given: yes, but not in training mode, unless `logits_to_keep` asks for them or
                `model.loss_function` was set to one that needs them.
            token_classes, token_places: what the tokens show, [panoramas, V, S, fields] and [panoramas, V, S, 4], as
                :func:`token_labels_panorama.token_labels` makes them, for a model with a `label_head`.
            further_views: [panoramas, E, 3], views beside those of the plan, see
                :meth:`PanoramaModel.get_image_features`; not in stage `vision`.
            mm_encoder_outputs, token_type_ids: as in :meth:`PanoramaModel.forward`.

        Raises:
            ValueError: for a shape, a number of views or a number of placeholders that does not fit.
        """
        if stage not in TRAINED_PARTS:
            raise ValueError(f"stage must be one of {sorted(TRAINED_PARTS)}, got {stage!r}")
        pixel_values, input_ids, attention_mask = sort_inputs(pixel_values, input_ids, attention_mask)
        if stage == "vision":
            return self._vision_stage(pixel_values, view_mask, token_classes, token_places)
        past_key_values = past_key_values if cache is None else cache
        supervised = labels is not None or shift_labels is not None
        all_positions = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if return_logits is None:
            return_logits = not (self.training and all_positions) or hasattr(self, "_loss_function")
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            view_mask=view_mask,
            further_views=further_views,
            mm_encoder_outputs=mm_encoder_outputs,
            token_type_ids=token_type_ids,
            use_cache=bool(use_cache) if supervised and not return_logits else use_cache,
            **kwargs,
        )
        hidden, logits, ar_loss = outputs.last_hidden_state, None, None
        if return_logits or not supervised:
            keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(self.lm_head(hidden[:, keep]))
        if supervised:
            labels, shift_labels = self._without_placeholders(labels), self._without_placeholders(shift_labels)
            if num_items_in_batch is None:  # none at all, and the loss is 0
                wanted = labels[..., 1:] if shift_labels is None else shift_labels  # type: ignore[index]
                num_items_in_batch = wanted.ne(IGNORED).sum().clamp(min=1)
            given: dict[str, Any] = {"labels": labels, "shift_labels": shift_labels}
            given["num_items_in_batch"] = num_items_in_batch
            if logits is None:
                ar_loss = self._chunked_loss(hidden, **given)
            else:
                vocab_size = self.config.text_config.vocab_size
                ar_loss = self.loss_function(logits=logits, vocab_size=vocab_size, **given, **kwargs)
        loss, overlap_loss = ar_loss, None
        if ar_loss is not None and self.config.overlap_loss_weight_finetune > 0 and outputs.view_tokens is not None:
            mask = self.model.check_view_mask(view_mask, outputs.view_tokens)
            overlap_loss, _ = self.overlap_loss(outputs.view_tokens, mask)
            loss = ar_loss + self.config.overlap_loss_weight_finetune * overlap_loss
        label_loss, label_figures = self._label_loss(outputs.view_tokens, token_classes, token_places)
        return TrainingStageOutput(
            loss=loss if loss is None or label_loss is None else loss + label_loss,
            label_loss=label_loss,
            label_figures=label_figures,
            ar_loss=ar_loss,
            overlap_loss=overlap_loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )

    def _without_placeholders(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Labels in which no placeholder is a target, as it is in a copy of `input_ids`."""
        return None if labels is None else labels.masked_fill(self.model.is_placeholder(labels), IGNORED)

    if TYPE_CHECKING:
        __call__ = forward

    def _logits(self, output: torch.Tensor) -> torch.Tensor:
        """Output of the head [..., vocabulary] -> logits. That of `<image>`, which is no word, is the lowest."""
        logits = self.logit_transform(output)
        for token in (self.config.image_token_id, *self.config.silent_token_ids):
            if token is not None and token < logits.shape[-1]:
                logits[..., token] = torch.finfo(logits.dtype).min
        return logits

    @torch.compiler.disable  # it picks supervised positions, whose number the compiler cannot know
    def _chunked_loss(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """The autoregressive loss of hidden states [B, T, D_lm], from supervised positions only."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # [B, T]
        return chunked_cross_entropy(
            hidden,
            self.lm_head,
            shift_labels.to(hidden.device),
            self.config.text_config.vocab_size,
            num_items=num_items_in_batch,
            transform=self._logits,
            chunk_bytes=None if is_sharded(self.lm_head) else CHUNK_BYTES,
        )


PanoramaVLM.register_for_auto_class("AutoModel")
