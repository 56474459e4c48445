"""PanoramaVLM: vision tower -> resampler -> VICReg projector, or projection + language model."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, is_flash_attn_2_available
from transformers.utils.generic import can_return_tuple

from .checkpoint_panorama import load_checkpoint
from .configuration_panorama import PanoramaConfig
from .losses_panorama import (
    CHUNK_BYTES,
    IGNORED,
    LogitTransform,
    VICRegTerms,
    check_finite,
    chunked_cross_entropy,
    densecl,
    logit_transforms,
    overlap_metrics,
    vicreg,
)
from .matching_panorama import MatchedFeatures, image_tokens, match_features
from .outputs_panorama import GenerationOutput, TrainingStageOutput, VisionStageOutput
from .resampler_panorama import RESAMPLERS

logger = logging.getLogger(__name__)

Stage = Literal["vision", "resampler", "finetune"]

# What trains in which stage; everything else is frozen. Of the vision tower, `blocks` are the last
# `vision_trainable_blocks`, and `tower` is all of it where `finetune_vision_tower` is set; of a language model with
# LoRA only the adapters train.
TRAINED_PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("blocks", "resampler", "vicreg_projector"),
    "resampler": ("resampler", "projection"),
    "finetune": ("tower", "resampler", "projection", "language_model"),
}
TEMPERATURE_RANGE = (0.1, 1.0)


def choose_attention(device: str | int | torch.device | None, dtype: torch.dtype | None) -> str:
    """The attention implementation for models on a device: the one place where this is decided.

    Flash attention 2 where it is installed, the device is a CUDA device and the precision half; else SDPA.
    `DISABLE_FLASH_ATTN=1` forbids flash attention.

    Args:
        device: where the model will run, as `torch.device` takes it.
        dtype: the precision it computes in.
    """
    on_cuda = device is not None and torch.device(device).type == "cuda"
    if not (on_cuda and dtype in (torch.float16, torch.bfloat16)):
        return "sdpa"
    if os.environ.get("DISABLE_FLASH_ATTN") == "1":
        logger.info("DISABLE_FLASH_ATTN=1: using SDPA.")
        return "sdpa"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    logger.info("Using SDPA. For flash attention 2: pip install flash-attn --no-build-isolation")
    return "sdpa"


class VICRegProjector(nn.Module):
    """MLP between the resampler and the overlap loss, [..., D_latent] -> [..., vicreg_projector_dim].

    VICReg decorrelates and equalises the dimensions it sees. The projector takes that pressure, so that the
    resampled tokens stay free to hold what the language model needs; only stage `vision` trains it.
    """

    def __init__(self, config: PanoramaConfig):
        super().__init__()
        hidden = config.vicreg_projector_hidden or config.vicreg_projector_dim
        layers: list[nn.Module] = []
        width = config.latent_dimension
        for _ in range(config.vicreg_projector_depth - 1):
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.vicreg_projector_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens)


class PanoramaProjection(nn.Module):
    """Adds the ray code and goes to the language model's width, [..., D_latent] -> [..., D_lm]."""

    def __init__(self, config: PanoramaConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.ray = nn.Linear(3 + 6 * config.ray_frequencies, config.latent_dimension, bias=False)
        self.layers = nn.Sequential(nn.Linear(config.latent_dimension, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: torch.Tensor, ray_codes: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens + self.ray(ray_codes.to(tokens.dtype)))


class PanoramaVLM(PreTrainedModel, GenerationMixin):
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
                                              language_model -> loss, logits, text

    module             vision                      resampler      finetune
    vision_tower       frozen (last n blocks: option)  frozen     frozen (option: trains)
    resampler          trains                      trains         trains
    vicreg_projector   trains                      frozen         frozen
    projection         unused                      trains         trains
    language_model     not run                     frozen         LoRA (default) or whole
    ```

    Every token knows the direction it looks in (`geometry_panorama.py`). The overlap loss compares tokens of
    neighbouring views that look the same way; the ray code tells the language model where a token looks; and of the
    tokens that look the same way in several tiles the language model gets the one whose tile looks there most nearly.

    The VICReg projector stands between the resampler and the overlap loss so that the loss shapes the resampler
    without flattening the features the language model reads. Later stages run it, frozen, where
    `overlap_loss_weight_finetune` is positive.

    Compose one from pretrained models with :meth:`from_vision_text_pretrained`; a bare `PanoramaVLM(config)` has
    random weights.

    Args:
        config: the configuration.
        vision_tower, language_model: ready modules that fit `config.vision_config` and `config.text_config`; made
            from them where not given.
    """

    config_class = PanoramaConfig
    config: PanoramaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(
        self,
        config: PanoramaConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.resampler = RESAMPLERS[config.resampler_type](config, config.vision_config.hidden_size)
        self.vicreg_projector = VICRegProjector(config) if config.use_vicreg_projector else None
        self.projection = PanoramaProjection(config)
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.loss_type = "ForCausalLM"
        self._logit_transforms: dict[tuple[type, ...], LogitTransform | None] = {}  # see `_logit_transform`
        self.view_plan = config.view_plan
        self.token_grid = config.token_grid
        self.num_image_tokens = config.num_image_tokens
        no_split = [module._no_split_modules or [] for module in (self.vision_tower, self.language_model)]
        self._no_split_modules = sorted({name for names in no_split for name in names})
        self.post_init()

    # Composing, loading and saving

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

        Resampler, projector and projection start from random weights; stages `vision` and `resampler` train them.

        Args:
            vision: Hub id or folder of a vision tower (or of a two-tower model such as SigLIP), or the model itself.
            language: Hub id or folder of a causal language model, or the model itself.
            vision_kwargs, language_kwargs: for their `from_pretrained`, such as `{"dtype": torch.float32}`.
            options: options of :class:`PanoramaConfig`. `image_token_id` is that of the processor made by
                :meth:`PanoramaProcessor.from_vision_text_pretrained`; it is found from the tokenizer where `language`
                is a name, and has to be given where it is a model.
        """
        vision_kwargs, language_kwargs = vision_kwargs or {}, language_kwargs or {}
        if isinstance(vision, str):
            options.setdefault("vision_name", vision)
            vision_config = AutoConfig.from_pretrained(vision, **vision_kwargs)
            vision_config = getattr(vision_config, "vision_config", vision_config)
            vision = AutoModel.from_pretrained(vision, **{**vision_kwargs, "config": vision_config})
        if isinstance(language, str):
            options.setdefault("language_model_name", language)
            if options.get("image_token_id") is None:
                from .processing_panorama import IMAGE_TOKEN

                tokenizer = AutoTokenizer.from_pretrained(language, **language_kwargs)
                tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
                options["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            language = AutoModelForCausalLM.from_pretrained(language, **language_kwargs)
        if options.get("image_token_id") is None:
            raise ValueError(
                "image_token_id must be given where the language model is given as a model; "
                "it is PanoramaProcessor.image_token_id"
            )
        _forget_gguf(language)
        attention = {"vision_config": vision.config, "text_config": language.config}
        attention = {part: config._attn_implementation for part, config in attention.items()}
        config = PanoramaConfig(vision.config, language.config, attn_implementation=attention, **options)
        model = cls(config, vision_tower=vision, language_model=language)
        model.generation_config = copy.deepcopy(language.generation_config) or GenerationConfig()
        model.to(dtype=language.dtype)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PanoramaVLM:
        """As `PreTrainedModel.from_pretrained`; where `device_map` names a CUDA device, `dtype` is half and
        `attn_implementation` is not given, :func:`choose_attention` decides."""
        device = kwargs.get("device_map")
        if isinstance(device, str | int | torch.device) and device not in ("auto", "balanced", "sequential"):
            dtype = kwargs.get("dtype")
            dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if (choice := choose_attention(device, dtype)) != "sdpa":  # SDPA is the default where it is supported
                kwargs.setdefault("attn_implementation", choice)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

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
        folder loads anywhere; the model itself keeps them."""
        adapted = self.language_model
        if self.has_lora:
            self.language_model = copy.deepcopy(adapted).merge_and_unload()
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.language_model = adapted

    # Stages

    @property
    def has_lora(self) -> bool:
        """Whether the language model carries LoRA adapters."""
        return hasattr(self.language_model, "merge_and_unload")

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
            task_type="CAUSAL_LM",
        )
        self.language_model = get_peft_model(self.language_model, lora)

    def merge_lora(self) -> None:
        """Merge the LoRA adapters into the language model and drop them."""
        if self.has_lora:
            self.language_model = self.language_model.merge_and_unload()

    def set_stage(self, stage: Stage) -> list[str]:
        """Set what trains, from the table `TRAINED_PARTS`, and put everything frozen into evaluation mode.

        Args:
            stage: `"vision"`, `"resampler"` or `"finetune"`. `"finetune"` adds LoRA adapters where `use_lora` is set.

        Returns:
            The names of the parameters that train.
        """
        if stage not in TRAINED_PARTS:
            raise ValueError(f"stage must be one of {sorted(TRAINED_PARTS)}, got {stage!r}")
        if stage == "finetune" and self.config.use_lora:
            self.add_lora()
        self.requires_grad_(False)
        for part in TRAINED_PARTS[stage]:
            if part == "blocks":
                self._train_last_blocks(self.config.vision_trainable_blocks)
            elif part == "tower":
                self.vision_tower.requires_grad_(self.config.finetune_vision_tower)
            elif part == "language_model" and self.has_lora:
                for name, parameter in self.language_model.named_parameters():
                    parameter.requires_grad_("lora_" in name)
            elif getattr(self, part) is not None:
                getattr(self, part).requires_grad_(True)
        self.training = True
        for module in self.children():
            module.train(any(parameter.requires_grad for parameter in module.parameters()))
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def _train_last_blocks(self, count: int) -> None:
        if count == 0:
            return
        depth = self.config.vision_config.num_hidden_layers
        lists = [m for m in self.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if count > depth or not lists:
            raise ValueError(f"vision_trainable_blocks must be at most the tower's {depth} blocks, got {count}")
        for block in lists[0][-count:]:
            block.requires_grad_(True)

    # Embeddings belong to the language model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.language_model.get_decoder(*args, **kwargs)

    # From pixels to tokens

    def _check_pixels(self, pixel_values: torch.Tensor, num_views: int | None) -> torch.Tensor:
        """[B, 3, H, W] or [B, V, 3, H, W] -> [B, V, 3, H, W], with the wanted number of views."""
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"pixel_values must be a torch.Tensor, got {type(pixel_values).__name__}")
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
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} views a panorama, but the configuration has {num_views} "
                f"(view_strategy={self.config.view_strategy!r}, fov_deg={self.config.fov_deg}, "
                f"overlap_ratio={self.config.overlap_ratio}); use the processor saved with this model"
            )
        return pixel_values

    def tower_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The vision tower's patch tokens, [B, V, 3, H, W] -> [B, V, patches, D_vision]; CLS and registers left out."""
        images = pixel_values.flatten(0, 1).to(self.vision_tower.dtype)  # [B * V, 3, H, W]
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            hidden = self._run_tower(images)  # [B * V, prefix + patches, D_vision]
        rows, columns = self.config.vision_grid
        prefix = hidden.shape[1] - rows * columns  # CLS and register tokens come first
        if prefix < 0:
            raise ValueError(
                f"the vision tower gives {hidden.shape[1]} tokens a view, fewer than the {rows} x {columns} patches of "
                f"image_size={self.config.image_size} and patch_size={self.config.vision_config.patch_size}"
            )
        return hidden[:, prefix:].unflatten(0, pixel_values.shape[:2])

    def encode_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Resampled tokens of the views, [B, V, 3, H, W] -> [B, V, S, D_latent]."""
        tokens = self.tower_tokens(pixel_values)
        return self.resampler(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])

    def _run_tower(self, images: torch.Tensor) -> torch.Tensor:
        config = self.config.vision_config
        if config.model_type == "siglip2_vision_model":  # takes patches of any aspect instead of images
            rows, columns = self.config.vision_grid
            patches = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # [N, 3, rows, p, columns, p]
            patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, S, p * p * 3]
            return self.vision_tower(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
                spatial_shapes=torch.tensor([[rows, columns]] * len(images), device=images.device),
            ).last_hidden_state
        own_size = config.image_size if isinstance(config.image_size, int) else min(config.image_size)
        resized = {} if own_size == self.config.image_size else {"interpolate_pos_encoding": True}
        if config.model_type.startswith("dinov2"):
            resized = {}  # does so by itself
        return self.vision_tower(pixel_values=images, **resized).last_hidden_state

    def project_tokens(self, tokens: torch.Tensor, view_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the language model is shown: [B, V, S, D_latent] -> [B, num_image_tokens, D_lm].

        With `view_mask` [B, V] the tokens of views that show nothing are left out: [tokens of all panoramas, D_lm].
        """
        indices, codes = image_tokens(
            self.view_plan, self.token_grid, self.config.token_selection, self.config.ray_frequencies, tokens.device
        )
        features = self.projection(tokens.flatten(1, 2)[:, indices], codes)
        return features if view_mask is None else features[view_mask[:, indices // tokens.shape[2]]]

    def get_image_features(
        self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Panoramas as the language model sees them.

        Args:
            pixel_values: [B, V, 3, H, W], or [B, 3, H, W] where a panorama is one view.
            view_mask: [B, V], false for views that show nothing.

        Returns:
            `last_hidden_state` [B, V, S, D_latent], the resampled tokens, and `pooler_output`
            [B, num_image_tokens, D_lm], what takes the place of the `<image>` tokens; with `view_mask` it is
            [tokens of all panoramas, D_lm].
        """
        tokens = self.encode_views(self._check_pixels(pixel_values, self.view_plan.num_views))
        view_mask = self._check_view_mask(view_mask, tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=self.project_tokens(tokens, view_mask)
        )

    def _check_view_mask(self, view_mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
        """The mask where it says something, [B, V] bool."""
        if view_mask is None:
            return None
        if view_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"view_mask must be {list(tokens.shape[:2])}, one value a view of pixel_values, got "
                f"{list(view_mask.shape)}"
            )
        return view_mask.to(tokens.device, torch.bool)

    def _is_placeholder(self, input_ids: torch.Tensor) -> torch.Tensor:
        token = self.config.image_token_id
        return torch.eq(input_ids, -1 if token is None else token)  # [B, T]

    def get_placeholder_mask(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Where the `<image>` tokens stand, [B, T]. Raises `ValueError` where their number does not fit."""
        mask = self._is_placeholder(input_ids)
        wanted = 0 if image_features is None else image_features.shape[:-1].numel()
        if not torch.compiler.is_compiling() and wanted != (found := int(mask.sum())):
            partial = image_features is not None and image_features.ndim == 2
            count = 0 if image_features is None else len(image_features)
            panoramas = "partial panoramas" if partial else f"{count} panoramas"
            raise ValueError(
                f"{panoramas} need {wanted} <image> tokens ({self.num_image_tokens} each{', or fewer' * partial}), but "
                f"input_ids holds {found} (image_token_id={self.config.image_token_id}); use the processor saved with "
                "this model, and hand over all that it returns"
            )
        return mask

    def _embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings [B, T, D_lm] with the panoramas in place of the placeholders."""
        mask = self.get_placeholder_mask(input_ids, image_features)
        # The placeholder's id may lie outside the vocabulary, and its embedding is never used.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        if image_features is None:
            return embeddings
        return embeddings.masked_scatter(mask[..., None], image_features.to(embeddings.dtype))

    # Overlap consistency

    def matched_features(
        self, features: torch.Tensor, by_rays: bool | None = None, view_mask: torch.Tensor | None = None
    ) -> list[MatchedFeatures]:
        """Features of tokens that look the same way, by rays or as sequential strips.

        Args:
            features: [B, V, S, D].
            by_rays: `config.use_anyres_e2p_vicreg` where it is not given.
            view_mask: [B, V], false for views that show nothing; no pair has one of these.

        Returns:
            One entry for each number L of matched tokens that occurs.
        """
        by_rays = self.config.use_anyres_e2p_vicreg if by_rays is None else by_rays
        if by_rays and not (self.view_plan.has_rays and features.shape[1] == self.view_plan.num_views):
            reason = (
                f"pixel_values has {features.shape[1]} views and the plan {self.view_plan.num_views}"
                if self.view_plan.has_rays
                else f"view_strategy={self.config.view_strategy!r} has no rays to pair"
            )
            _warn_once(f"{reason}: falling back to sequential VICReg mode")
            by_rays = False
        overlap_pairs = tuple(self.config.overlap_pairs) if by_rays else None
        return match_features(
            features, self.view_plan, self.token_grid, overlap_pairs, self.config.overlap_ratio, view_mask
        )

    def _compute_vicreg_overlap_loss(
        self, features: torch.Tensor, view_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, VICRegTerms | None]:
        """The overlap loss of the features of a batch of panoramas.

        Two modes say which tokens are a pair. With rays (`use_anyres_e2p_vicreg=True`) each token of a view is paired
        with the exact place of its neighbour that looks the same way, interpolated between four tokens. Sequential
        mode pairs the right columns of a view with the left columns of the next, row by row: exact for windows slid
        over the ERP image, several degrees off for perspective tiles; it is also the warned fallback where the plan
        has no rays.

        VICReg then asks three things of the pairs: that both say the same (invariance), that each dimension varies
        (variance, a hinge at `vicreg_gamma`), and that dimensions do not repeat each other (covariance), weighted by
        `vicreg_similarity_weight`, `vicreg_variance_weight` and `vicreg_covariance_weight`. Statistics are those of
        each pair of views (`"pairwise"`) or of all pairs together (`"batchwise"`). `overlap_loss="densecl"` is a
        contrastive loss on the same pairs. VICReg works through `vicreg_pair_chunk` pairs at a time, DenseCL through
        pieces of its similarity matrix, which bounds memory and changes no value.

        Args:
            features: [B, V, S, D].
            view_mask: [B, V], false for views that show nothing; no pair has one of these.

        Returns:
            The loss, a scalar, and VICReg's unweighted terms, scalars each (`None` for DenseCL).

        Raises:
            ValueError: for fewer than two views, or views that have no token in common.
            FloatingPointError: for features that are not finite.
        """
        if features.shape[1] < 2:
            raise ValueError(f"VICReg requires at least 2 views, got {features.shape[1]}")
        if not torch.compiler.is_compiling():
            check_finite(features, "the features of stage 'vision'")
        matched = self.matched_features(features, view_mask=view_mask)
        if not matched and view_mask is not None:
            raise ValueError(
                "no two views of these partial panoramas see the same part of what their cameras saw, there is nothing "
                "to compare; leave such panoramas out of stage 'vision'"
            )
        if not matched:
            raise ValueError(
                f"no token looks the same way in two views: fov_deg={self.config.fov_deg} with "
                f"overlap_ratio={self.config.overlap_ratio} on a grid of {self.config.token_grid} tokens leaves no "
                "overlap. Typical overlap_ratio: [0.3, 0.7]"
            )
        if self.config.overlap_loss == "densecl":
            losses = [densecl(m.x, m.y, temperature=self.config.densecl_temperature) for m in matched]
            return torch.cat(losses).mean(), None
        if self.config.vicreg_mode == "batchwise":
            x, y = (torch.cat([m[side].flatten(0, 1) for m in matched])[None] for side in (0, 1))  # [1, all, D]
            matched_terms = [self._vicreg(x, y)]
        else:
            matched_terms = [self._vicreg(m.x, m.y) for m in matched]
        # In float32 the mean of hundreds of pairs is rounded by more than what two and one process differ in.
        dtype = matched_terms[0].invariance.dtype
        wide = dtype if features.device.type == "mps" else torch.float64  # MPS has no float64
        terms = VICRegTerms(*(torch.cat(term).mean(dtype=wide) for term in zip(*matched_terms, strict=True)))
        loss = (
            self.config.vicreg_similarity_weight * terms.invariance
            + self.config.vicreg_variance_weight * terms.variance
            + self.config.vicreg_covariance_weight * terms.covariance
        )
        return loss.to(dtype), VICRegTerms(*(term.to(dtype) for term in terms))

    def _vicreg(self, x: torch.Tensor, y: torch.Tensor) -> VICRegTerms:
        return vicreg(
            x,
            y,
            gamma=self.config.vicreg_gamma,
            mode=self.config.vicreg_mode,  # type: ignore[arg-type]
            pair_chunk=self.config.vicreg_pair_chunk,
            gather=self.config.vicreg_use_ddp_gather,
        )

    def overlap_metrics(self, features: torch.Tensor, view_mask: torch.Tensor | None = None) -> dict[str, float]:
        """Is stage `vision` learning or collapsing? See :func:`losses_panorama.overlap_metrics`.

        Args:
            features: [B, V, S, D], such as `VisionStageOutput.hidden_states`.
            view_mask: [B, V], false for views that show nothing.

        Returns:
            Means over the pairs of views, always of the pairs by rays where the plan has rays: `cosine_matched`,
            `cosine_random`, `retrieval`, `feature_std`, `effective_rank`.
        """
        totals: dict[str, float] = {}
        matched = self.matched_features(features, self.view_plan.has_rays, view_mask)
        pairs = sum(len(m.x) for m in matched)
        for m in matched:
            candidates = features.flatten(0, 1)[m.second]  # [N, S, D]
            for name, value in overlap_metrics(m.x, m.y, candidates, m.nearest).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(m.x) / pairs
        return totals

    def overlap_loss(
        self, tokens: torch.Tensor, view_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, VICRegTerms | None]:
        """The overlap loss of resampled tokens [B, V, S, D_latent], through the projector where there is one.

        See :meth:`_compute_vicreg_overlap_loss` for what is returned.
        """
        return self._compute_vicreg_overlap_loss(self._overlap_features(tokens), view_mask)

    def _overlap_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, V, S, D_latent] -> what the overlap loss compares, [B, V, S, D]."""
        return tokens if self.vicreg_projector is None else self.vicreg_projector(tokens)

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
        **kwargs: Any,
    ) -> VisionStageOutput | TrainingStageOutput:
        """One step of a stage.

        Args:
            pixel_values: [panoramas, V, 3, H, W], or [panoramas, 3, H, W] where a panorama is one view.
            input_ids: [B, T], with `num_image_tokens` placeholders for each panorama, in reading order.
            attention_mask: [B, T], zero where padded.
            labels: [B, T], -100 where nothing is supervised.
            stage: `"vision"` computes the overlap loss of `pixel_values` and does not run the language model; the
                other two run it.
            inputs_embeds: [B, T, D_lm] instead of `input_ids` and `pixel_values`.
            view_mask: [panoramas, V], false for views of a partial panorama that show nothing the camera saw: they
                take no part in the overlap loss, and their tokens are not shown to the language model.
            position_ids, past_key_values, use_cache, logits_to_keep, kwargs: as in any causal language model of
                transformers.
            num_items_in_batch: `ar_loss` is the sum over supervised tokens divided by it, instead of their mean: the
                losses of micro-batches then add up to that of the whole batch. `transformers.Trainer` gives it.
            return_logits: whether logits are computed where `labels` are given. Without them the loss costs what is
                supervised: the head runs on those positions only, in chunks, with the same loss and gradients, and
                `logits` is `None`. Not given: yes, but not in training mode, unless `logits_to_keep` asks for them or
                `model.loss_function` was set to one that needs them.

        Raises:
            ValueError: for a shape, a number of views or a number of placeholders that does not fit.
        """
        if stage not in TRAINED_PARTS:
            raise ValueError(f"stage must be one of {sorted(TRAINED_PARTS)}, got {stage!r}")
        if stage == "vision":
            return self._vision_stage(pixel_values, view_mask)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        image_features = tokens = None
        if pixel_values is not None:
            tokens = self.encode_views(self._check_pixels(pixel_values, self.view_plan.num_views))
            view_mask = self._check_view_mask(view_mask, tokens)
            image_features = self.project_tokens(tokens, view_mask)
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, image_features)  # [B, T, D_lm]

        given = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        if return_logits is None:
            all_positions = isinstance(logits_to_keep, int) and logits_to_keep == 0
            return_logits = not (self.training and all_positions) or hasattr(self, "_loss_function")
        loss = ar_loss = overlap_loss = logits = None
        if labels is not None and not return_logits:
            outputs, ar_loss = self._loss_without_logits(
                labels, num_items_in_batch, **given, use_cache=bool(use_cache), **kwargs
            )
        else:
            outputs = self.language_model(**given, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs)
            logits = outputs.logits
            if labels is not None:
                ar_loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    **kwargs,
                )
        if ar_loss is not None:
            loss = ar_loss
            if self.config.overlap_loss_weight_finetune > 0 and tokens is not None:
                overlap_loss, _ = self.overlap_loss(tokens, view_mask)
                loss = ar_loss + self.config.overlap_loss_weight_finetune * overlap_loss
        return TrainingStageOutput(
            loss=loss,
            ar_loss=ar_loss,
            overlap_loss=overlap_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def _loss_without_logits(
        self,
        labels: torch.Tensor,
        num_items: int | torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> tuple[ModelOutput, torch.Tensor]:
        """The outputs of the language model's body and the autoregressive loss, from supervised positions only.

        Args:
            labels: [B, T]; `shift_labels` [B, T] are they, already shifted.
            inputs: of the language model.
        """
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # [B, T]
        transform = self._logit_transform(inputs["inputs_embeds"])
        if transform is not None:
            outputs = self.get_decoder()(**inputs)
            head = self.get_output_embeddings()
            hidden, chunk_bytes = outputs.last_hidden_state, None if _is_sharded(head) else CHUNK_BYTES
        else:  # the language model's own logits, of the positions where any of the batch is supervised
            keep = (shift_labels != IGNORED).any(0)
            keep[0] |= ~keep.any()
            positions = keep.nonzero()[:, 0].to(inputs["inputs_embeds"].device)  # [K]
            outputs = self.language_model(**inputs, logits_to_keep=positions)
            hidden, head, chunk_bytes = outputs.logits, nn.Identity(), CHUNK_BYTES  # [B, K, vocabulary]
            if hidden.shape[1] != len(positions):  # a language model that does not know logits_to_keep
                hidden = hidden[:, positions]
            shift_labels = shift_labels[:, keep]
        loss = _language_loss(
            hidden,
            head,
            shift_labels.to(hidden.device),
            self.config.text_config.vocab_size,
            num_items=num_items,
            transform=transform,
            chunk_bytes=chunk_bytes,
        )
        return outputs, loss

    @torch.compiler.disable
    def _logit_transform(self, inputs_embeds: torch.Tensor) -> LogitTransform | None:
        """How the language model's logits follow from its head, found once for each language model.

        `None`, with a warning, where they follow in no way that is known.
        """
        parts = (self.language_model, self.get_decoder(), self.get_output_embeddings())
        kind = tuple(type(part) for part in parts)
        if kind not in self._logit_transforms:
            self._logit_transforms[kind] = self._find_logit_transform(inputs_embeds[:1, :2].detach())
            if self._logit_transforms[kind] is None:
                _warn_once(
                    f"the logits of {kind[0].__name__} are not those of its head, as far as is known: the language "
                    "loss takes the model's own logits of all supervised positions at once, which needs more memory"
                )
        return self._logit_transforms[kind]

    @torch.no_grad()
    def _find_logit_transform(self, probe: torch.Tensor) -> LogitTransform | None:
        """Runs the language model on `probe` [1, n, D_lm], and tries what its logits are.

        It runs in evaluation mode (so draws no random numbers) with the last hidden state made so large that a soft
        cap shows. Autocast keeps no copies of weights meanwhile: copies made here would have no gradient later.
        """
        decoder, head = self.get_decoder(), self.get_output_embeddings()
        if head is None or decoder is self.language_model:
            return None
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, ModelOutput) and output.get("last_hidden_state") is not None:
                hidden = output["last_hidden_state"]
                peak = head(hidden).abs().max().float().clamp(min=1e-6)
                output["last_hidden_state"] = (hidden * (64 / peak)).to(hidden.dtype)
                seen.append((hidden, output["last_hidden_state"]))
            return output

        device = probe.device.type
        modes = {module: module.training for module in self.language_model.modules()}
        handle = decoder.register_forward_hook(enlarge)
        try:
            self.language_model.eval()
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
                logits = self.language_model(inputs_embeds=probe, use_cache=False).logits
                handle.remove()
                if len(seen) != 1:
                    return None
                own, enlarged = seen[0]
                alone = decoder(inputs_embeds=probe, use_cache=False).last_hidden_state
                output = head(enlarged)
        finally:
            handle.remove()
            for module, mode in modes.items():
                module.training = mode
        if own.shape != alone.shape:
            raise ValueError(
                f"the language model makes {own.shape[1]} positions of {probe.shape[1]}: adapters that put tokens in "
                "front (prompt or prefix tuning) are not supported; use LoRA"
            )
        if output.shape != logits.shape or not _agree(alone, own):
            return None
        output = output if output.dtype == torch.float64 else output.float()
        transforms = logit_transforms(self.config.text_config)
        return next((transform for transform in transforms if _agree(transform(output), logits)), None)

    def _vision_stage(self, pixel_values: torch.Tensor | None, view_mask: torch.Tensor | None) -> VisionStageOutput:
        if pixel_values is None:
            raise ValueError("stage 'vision' needs pixel_values, got None")
        expected = self.config.vision_stage_expected_views
        pixel_values = self._check_pixels(pixel_values, expected if expected and expected > 1 else None)
        features = self._overlap_features(self.encode_views(pixel_values))  # [B, V, S, D]
        raw, terms = self._compute_vicreg_overlap_loss(features, self._check_view_mask(view_mask, features))
        loss = self.config.vicreg_loss_weight * raw
        return VisionStageOutput(
            loss=loss,
            vicreg_loss=loss,
            vicreg_raw=raw,
            vicreg_weight=self.config.vicreg_loss_weight,
            vicreg_dim=features.shape[-1],
            invariance=None if terms is None else terms.invariance,
            variance=None if terms is None else terms.variance,
            covariance=None if terms is None else terms.covariance,
            hidden_states=features,
        )

    # Generation

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        view_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerationOutput:
        """Answer.

        Args:
            pixel_values: [panoramas, V, 3, H, W], or [panoramas, 3, H, W] where a panorama is one view.
            input_ids: [B, T]; without them (and with `tokenizer=`) each panorama is asked the default prompt, with a
                warning.
            attention_mask: [B, T].
            tokenizer: decodes the answer into `GenerationOutput.text`; also for `stop_strings`.
            view_mask: [panoramas, V], as in :meth:`forward`.
            kwargs: as in `GenerationMixin.generate`: `max_new_tokens`, `do_sample`, `streamer`,
                `return_dict_in_generate`, ... A `temperature` outside [0.1, 1.0] is clamped, with a warning.

        Returns:
            `sequences` [B, T + new], the prompt and the new tokens; with `return_dict_in_generate=True` a
            :class:`GenerationOutput`.
        """
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        given["view_mask"] = view_mask
        for name, value in given.items():
            if value is not None and not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        max_new_tokens = kwargs.get("max_new_tokens")
        if max_new_tokens is not None and max_new_tokens <= 0:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}. Typical value: 128")
        if kwargs.get("temperature") is not None:
            kwargs["temperature"] = _clamp_temperature(kwargs["temperature"])
        if tokenizer is not None and kwargs.get("stop_strings") is not None:
            kwargs["tokenizer"] = tokenizer
        if pixel_values is not None:
            pixel_values = self._check_pixels(pixel_values, self.view_plan.num_views)
        if input_ids is None and "inputs" in kwargs:
            input_ids = kwargs.pop("inputs")
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            input_ids, attention_mask = self._default_prompt(pixel_values, tokenizer, view_mask)

        prompt = input_ids
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            image_features = None
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values, view_mask).pooler_output
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            # The panoramas are embedded once, here. Everything that looks at ids while generating (penalties,
            # stopping) sees a placeholder from inside the vocabulary.
            kwargs["inputs_embeds"] = self._embed(input_ids, image_features)
            input_ids = input_ids.masked_fill(self._is_placeholder(input_ids), 0)
        outputs = super().generate(inputs=input_ids, attention_mask=attention_mask, **kwargs)

        is_dict = not isinstance(outputs, torch.Tensor)
        sequences = outputs.sequences if is_dict else outputs
        start = 0 if prompt is None else prompt.shape[1]
        if prompt is not None:
            repeated = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
            sequences = torch.cat([repeated, sequences[:, start:]], dim=1)
        if not is_dict:
            return sequences
        known = {name: outputs.get(name) for name in GenerationOutput.__dataclass_fields__ if name in outputs}
        known["sequences"] = sequences
        known["generated_ids"] = sequences[:, start:]
        if tokenizer is not None:
            known["text"] = tokenizer.batch_decode(known["generated_ids"], skip_special_tokens=True)
        return GenerationOutput(**known)

    def _default_prompt(
        self,
        pixel_values: torch.Tensor | None,
        tokenizer: PreTrainedTokenizerBase | None,
        view_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask` that ask each panorama the default prompt."""
        if pixel_values is None or tokenizer is None:
            raise ValueError("generate needs input_ids, or pixel_values and tokenizer= to ask the default prompt")
        words = self.config.default_generation_prompt
        _warn_once(f"no input_ids: asking the default prompt {words!r}")
        words = tokenizer(words, add_special_tokens=False)["input_ids"]
        counts = torch.tensor(self.config.image_tokens_per_view)
        seen = torch.ones(len(pixel_values), len(counts)) if view_mask is None else view_mask.cpu()
        images = [[self.config.image_token_id] * int(counts[views.bool()].sum()) for views in seen]
        width = max(map(len, images))
        padded = [[0] * (width - len(tokens)) for tokens in images]  # on the left
        ids = torch.tensor([zeros + tokens + words for zeros, tokens in zip(padded, images, strict=True)])
        mask = torch.tensor([zeros + [1] * (len(row) - len(zeros)) for zeros, row in zip(padded, ids, strict=True)])
        return ids.to(pixel_values.device), mask.to(pixel_values.device)


def _forget_gguf(language: PreTrainedModel) -> None:
    """A model read from a GGUF file without special kernels has plain weights, but its configuration still says GGUF,
    and what is saved could not be loaded and saved again."""
    quantization = getattr(language.config, "quantization_config", None)
    if str(getattr(quantization, "quant_method", "")).split(".")[-1].lower() != "gguf":
        return
    if not all(parameter.is_floating_point() for parameter in language.parameters()):
        raise ValueError(
            "the language model keeps the blocks of its GGUF file, which cannot be trained or saved; load it with "
            "quantization_config=GgufConfig(dequantize=True)"
        )
    del language.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in language.__dict__:
            delattr(language, name)


def _clamp_temperature(temperature: float) -> float:
    low, high = TEMPERATURE_RANGE
    clamped = min(max(temperature, low), high)
    if clamped != temperature:
        warnings.warn(f"temperature {temperature} is outside [{low}, {high}]: clamped to {clamped}", stacklevel=3)
    return clamped


# The loss picks supervised positions, whose number the compiler cannot know.
_language_loss = torch.compiler.disable(chunked_cross_entropy)


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two ways to compute the same in the precision of `b` gave the same."""
    tolerance = 4 * torch.finfo(b.dtype).eps ** (1.0 if b.dtype.itemsize == 2 else 0.75)
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _is_sharded(module: nn.Module) -> bool:
    """Whether each call of the module gathers weights from all processes (FSDP of its own, ZeRO-3)."""
    by_class = any(".fsdp" in base.__module__ for base in type(module).__mro__)
    return by_class or any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


PanoramaVLM.register_for_auto_class("AutoModel")
