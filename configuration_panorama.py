"""The configuration: every option of the model, checked on construction."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from .geometry_panorama import ViewOptions, ViewPlan, owned_tokens
from .resampler_panorama import RESAMPLERS

# Which class of a saved folder's own code each Auto class loads.
AUTO_MAP = {
    "AutoConfig": "configuration_panorama.PanoramaConfig",
    "AutoModel": "modeling_panorama.PanoramaVLM",
    "AutoModelForCausalLM": "modeling_panorama.PanoramaVLM",
    "AutoModelForImageTextToText": "modeling_panorama.PanoramaVLM",
}
# SigLIP2 base, patch 16, 256 pixels, and Qwen3-0.6B: the shapes where none are given.
_DEFAULT_VISION = {"model_type": "siglip_vision_model", "image_size": 256, "vision_use_head": False}
_DEFAULT_TEXT = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


class PanoramaConfig(PretrainedConfig):
    """Configuration of :class:`PanoramaVLM`.

    Everything that can be wrong is found here, with the value, the allowed range and a typical value in the message.

    Args:
        vision_config, text_config: configs (or their dicts) of any vision tower with a patch grid and any causal
            language model that `AutoConfig` knows. Without them: the shapes of SigLIP2-base and Qwen3-0.6B.
        vision_name, language_model_name: Hub ids or folders the two were composed from; for the record.
        latent_dimension: width D_latent of the resampled tokens.
        resampler_type: `"mlp"`, `"avg_pool"` or `"perceiver"`.
        resampler_depth: linear layers of the MLPs, or layers of the perceiver.
        resampler_pool: side of the block of tokens that `"avg_pool"` averages.
        resampler_queries, resampler_heads: queries a view (a square number) and attention heads of `"perceiver"`.
        view_strategy: `"anyres_e2p"` (global view and loops of perspective tiles), `"e2p"` (the tiles alone),
            `"cubemap"` (six faces), `"sliding_window"` (windows of the ERP image) or `"resize"` (one view).
        fov_deg: field of view of a tile, or width of a window, in degrees, in (0, 180).
        overlap_ratio: share of the field of view that neighbouring tiles of a loop have in common, in (0, 1).
        pitch_rows: pitch in degrees of each row of tiles.
        pole_caps: whether a tile looks straight up and another straight down (`"anyres_e2p"` and `"e2p"`).
        image_size: side of a view in pixels; the vision tower's own where it is not given.
        token_selection: `"owned"` sends each direction seen by tiles to the language model once, `"all"` every token.
        ray_frequencies: octaves of the ray position code; 0 leaves the bare ray.
        vision_trainable_blocks: how many of the last blocks of the vision tower train in stage `vision`.
        finetune_vision_tower: whether the vision tower trains in stage `finetune`.
        vicreg_loss_weight: weight of the overlap loss in stage `vision`.
        vicreg_similarity_weight, vicreg_variance_weight, vicreg_covariance_weight: weights of VICReg's three terms.
        vicreg_gamma: the standard deviation that the variance term asks of each dimension.
        vicreg_mode: `"pairwise"` (statistics inside each pair of views) or `"batchwise"` (over all pairs).
        vicreg_pair_chunk: pairs processed at once, which bounds memory.
        vicreg_use_ddp_gather: gather the features of all processes in `"batchwise"` mode.
        use_vicreg_projector: whether an MLP stands between the resampler and the overlap loss.
        vicreg_projector_dim, vicreg_projector_depth, vicreg_projector_hidden: its output, layers and inner width.
        use_anyres_e2p_vicreg: pair tokens by rays (`True`), or as sequential strips (`False`); where it is not given,
            rays wherever the plan has them.
        overlap_loss: `"vicreg"` or `"densecl"`.
        overlap_pairs: which views are paired: `"neighbours"` and/or `"global"`.
        densecl_temperature: temperature of the contrastive loss.
        overlap_loss_weight_finetune: weight of the overlap loss in the later stages; 0.1 is usual where it is used.
        vision_stage_expected_views: views a panorama that stage `vision` expects; the plan's where it is not given.
        max_text_length: most text tokens (image tokens not counted) of one training sample.
        system_prompt: the system message where a conversation has none; the chat template's own where it is not given.
        default_generation_prompt: the question where none is asked.
        vision_token_fallback_position: `"start"` or `"end"`, where `<image>` goes in a text that lacks it.
        use_lora: whether stage `finetune` trains the language model through LoRA (else it trains it whole).
        lora_rank, lora_alpha, lora_dropout: as in `peft.LoraConfig`.
        lora_target_modules: names of the layers that get LoRA; all linear layers but the head where not given.
        image_token_id: id of the `<image>` placeholder. It may lie outside the vocabulary of the language model,
            which never sees it.
    """

    model_type = "panorama_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_name: str | None = None,
        language_model_name: str | None = None,
        latent_dimension: int = 768,
        resampler_type: str = "mlp",
        resampler_depth: int = 2,
        resampler_pool: int = 2,
        resampler_queries: int = 64,
        resampler_heads: int = 8,
        token_selection: str = "owned",
        ray_frequencies: int = 6,
        vision_trainable_blocks: int = 0,
        finetune_vision_tower: bool = False,
        vicreg_loss_weight: float = 1.0,
        vicreg_similarity_weight: float = 25.0,
        vicreg_variance_weight: float = 25.0,
        vicreg_covariance_weight: float = 1.0,
        vicreg_gamma: float = 1.0,
        vicreg_mode: str = "pairwise",
        vicreg_pair_chunk: int = 8,
        vicreg_use_ddp_gather: bool = False,
        use_vicreg_projector: bool = True,
        vicreg_projector_dim: int = 768,
        vicreg_projector_depth: int = 2,
        vicreg_projector_hidden: int | None = None,
        use_anyres_e2p_vicreg: bool | None = None,
        overlap_loss: str = "vicreg",
        overlap_pairs: Sequence[str] = ("neighbours",),
        densecl_temperature: float = 0.2,
        overlap_loss_weight_finetune: float = 0.0,
        vision_stage_expected_views: int | None = None,
        max_text_length: int = 1024,
        system_prompt: str | None = None,
        default_generation_prompt: str = "Describe this panorama.",
        vision_token_fallback_position: str = "start",
        use_lora: bool = True,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        lora_target_modules: Sequence[str] | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, _DEFAULT_VISION)
        self.text_config = _sub_config(text_config, _DEFAULT_TEXT).get_text_config()
        self.vision_name = vision_name
        self.language_model_name = language_model_name

        self.latent_dimension = _positive("latent_dimension", latent_dimension, 768)
        self.resampler_type = _one_of("resampler_type", resampler_type, sorted(RESAMPLERS))
        self.resampler_depth = _positive("resampler_depth", resampler_depth, 2)
        self.resampler_pool = _positive("resampler_pool", resampler_pool, 2)
        self.resampler_queries = _positive("resampler_queries", resampler_queries, 64)
        self.resampler_heads = _positive("resampler_heads", resampler_heads, 8)

        views = {name: kwargs.pop(name) for name in ViewOptions.names() if name in kwargs}
        _refuse_misspelt_options(kwargs)
        if views.get("image_size") is None:
            views["image_size"] = tower_image_size(self.vision_config)
        for name, value in asdict(ViewOptions(**views)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.token_selection = _one_of("token_selection", token_selection, ["owned", "all"])
        self.ray_frequencies = _at_least_zero("ray_frequencies", ray_frequencies, 6)
        self.vision_trainable_blocks = _at_least_zero("vision_trainable_blocks", vision_trainable_blocks, 0)
        self.finetune_vision_tower = finetune_vision_tower

        self.vicreg_loss_weight = _at_least_zero("vicreg_loss_weight", vicreg_loss_weight, 1.0)
        self.vicreg_similarity_weight = _at_least_zero("vicreg_similarity_weight", vicreg_similarity_weight, 25.0)
        self.vicreg_variance_weight = _at_least_zero("vicreg_variance_weight", vicreg_variance_weight, 25.0)
        self.vicreg_covariance_weight = _at_least_zero("vicreg_covariance_weight", vicreg_covariance_weight, 1.0)
        self.vicreg_gamma = _positive("vicreg_gamma", vicreg_gamma, 1.0)
        self.vicreg_mode = _one_of("vicreg_mode", vicreg_mode, ["pairwise", "batchwise"])
        self.vicreg_pair_chunk = _positive("vicreg_pair_chunk", vicreg_pair_chunk, 8)
        self.vicreg_use_ddp_gather = vicreg_use_ddp_gather
        self.use_vicreg_projector = use_vicreg_projector
        self.vicreg_projector_dim = _positive("vicreg_projector_dim", vicreg_projector_dim, 768)
        self.vicreg_projector_depth = _positive("vicreg_projector_depth", vicreg_projector_depth, 2)
        self.vicreg_projector_hidden = (
            None
            if vicreg_projector_hidden is None
            else _positive("vicreg_projector_hidden", vicreg_projector_hidden, 768)
        )
        self.overlap_loss = _one_of("overlap_loss", overlap_loss, ["vicreg", "densecl"])
        self.overlap_pairs = [_one_of("overlap_pairs", pair, ["neighbours", "global"]) for pair in overlap_pairs]
        if not self.overlap_pairs:
            raise ValueError("overlap_pairs must name at least one of 'neighbours' and 'global', got []")
        self.densecl_temperature = _positive("densecl_temperature", densecl_temperature, 0.2)
        self.overlap_loss_weight_finetune = _at_least_zero(
            "overlap_loss_weight_finetune", overlap_loss_weight_finetune, 0.1
        )
        self.vision_stage_expected_views = vision_stage_expected_views

        self.max_text_length = _positive("max_text_length", max_text_length, 1024)
        self.system_prompt = system_prompt
        self.default_generation_prompt = default_generation_prompt
        self.vision_token_fallback_position = _one_of(
            "vision_token_fallback_position", vision_token_fallback_position, ["start", "end"]
        )
        self.use_lora = use_lora
        self.lora_rank = _positive("lora_rank", lora_rank, 16)
        self.lora_alpha = _positive("lora_alpha", lora_alpha, 32)
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}. Typical value: 0.05")
        self.lora_dropout = lora_dropout
        self.lora_target_modules = None if lora_target_modules is None else list(lora_target_modules)
        self.image_token_id = image_token_id

        # The grids come last: they need everything above, and say what does not fit together.
        self.use_anyres_e2p_vicreg = self.view_plan.has_rays if use_anyres_e2p_vicreg is None else use_anyres_e2p_vicreg
        self._warn_about_the_vision_stage()
        RESAMPLERS[self.resampler_type].output_grid(self)

        kwargs.pop("auto_map", None)  # a folder saved from this config always holds its own code
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def _warn_about_the_vision_stage(self) -> None:
        expected = self.vision_stage_expected_views
        if expected is not None and expected < 2:
            warnings.warn(
                f"VICReg requires at least 2 views, vision_stage_expected_views is {expected}: "
                "stage 'vision' cannot train with it",
                stacklevel=3,
            )
        if self.vicreg_loss_weight == 0.0:
            warnings.warn("vicreg_loss_weight is 0.0: vision stage training will have no effect", stacklevel=3)
        if self.use_anyres_e2p_vicreg and not self.view_plan.has_rays:
            warnings.warn(
                f"use_anyres_e2p_vicreg=True, but view_strategy={self.view_strategy!r} has no rays to pair: "
                "falling back to sequential VICReg mode",
                stacklevel=3,
            )

    @property
    def view_options(self) -> ViewOptions:
        """What is cut out of a panorama; the image processor's are the same."""
        return ViewOptions(**{name: getattr(self, name) for name in ViewOptions.names()})

    @property
    def view_plan(self) -> ViewPlan:
        """The views of one panorama."""
        return self.view_options.plan

    @property
    def num_views(self) -> int:
        """V: views a panorama."""
        return self.view_plan.num_views

    @property
    def vision_grid(self) -> tuple[int, int]:
        """(rows, columns) of the vision tower's patches of one view."""
        patch = self.vision_config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return self.image_size // rows, self.image_size // columns

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of the resampled tokens of one view."""
        return RESAMPLERS[self.resampler_type].output_grid(self)

    @property
    def tokens_per_view(self) -> int:
        """S: resampled tokens a view."""
        rows, columns = self.token_grid
        return rows * columns

    @property
    def image_tokens_per_view(self) -> list[int]:
        """How many tokens of each view the language model gets, V numbers."""
        if self.token_selection == "owned":
            owned = owned_tokens(self.view_plan, self.token_grid)  # [V, S]
            return [int(of_one) for of_one in owned.reshape(self.num_views, -1).sum(1)]
        return [self.tokens_per_view] * self.num_views

    @property
    def num_image_tokens(self) -> int:
        """What one panorama costs the language model, in tokens; a partial one costs less."""
        return sum(self.image_tokens_per_view)


def tower_image_size(vision_config: PretrainedConfig) -> int:
    """Side in pixels of the square images a vision tower was made for."""
    size = getattr(vision_config, "image_size", None)
    if size is None and hasattr(vision_config, "num_patches"):  # SigLIP2 with patches of any aspect
        size = round(vision_config.num_patches**0.5) * vision_config.patch_size
    if size is None or not hasattr(vision_config, "patch_size"):
        raise ValueError(
            f"vision_config of type {vision_config.model_type!r} has no image_size or no patch_size; the vision tower "
            "must cut its image into a grid of patches, as SigLIP, SigLIP2, CLIP, DINOv2 and ViT do"
        )
    return size if isinstance(size, int) else min(size)


def _sub_config(config: dict[str, Any] | PretrainedConfig | None, default: dict[str, Any]) -> PretrainedConfig:
    """A config object of whatever `AutoConfig` knows; of a two-tower config (SigLIP, CLIP) the vision half."""
    if config is None:
        config = default
    if isinstance(config, dict):
        if "model_type" not in config:
            raise ValueError(
                f"a sub-config given as a dict needs its 'model_type', got the keys {sorted(config)}. "
                "Typical values: 'siglip_vision_model', 'qwen3'"
            )
        config = AutoConfig.for_model(**config)
    vision = getattr(config, "vision_config", None)
    if default is _DEFAULT_VISION and isinstance(vision, PretrainedConfig):
        return vision
    return config


def _refuse_misspelt_options(unknown: dict[str, Any]) -> None:
    """Raise `ValueError` for an option that is close to a known one: it would be ignored in silence."""
    known = [name for name in inspect.signature(PanoramaConfig.__init__).parameters if name not in ("self", "kwargs")]
    known += ViewOptions.names()
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close and not hasattr(PretrainedConfig, name):
            raise ValueError(f"unknown option {name!r}, did you mean {close[0]!r}?")


def _positive(name: str, value: Any, typical: float) -> Any:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}. Typical value: {typical}")
    return value


def _at_least_zero(name: str, value: Any, typical: float) -> Any:
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}. Typical value: {typical}")
    return value


def _one_of(name: str, value: str, allowed: list[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


PanoramaConfig.register_for_auto_class()
