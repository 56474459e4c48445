"""The configuration: every option of the model, checked on construction."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .geometry_panorama import ViewOptions, ViewPlan, owned_tokens, ray_correspondences
from .language_loss_panorama import logit_transform
from .options_panorama import DEFAULT_PROMPT, MAX_TEXT_LENGTH, check_option_names
from .resampler_panorama import RESAMPLERS
from .towers_panorama import tower_of

IMAGE_TOKEN = "<image>"  # what stands for a panorama in a text
# Which class of a saved folder's own code each Auto class loads.
AUTO_MAP = {
    "AutoConfig": "configuration_panorama.PanoramaConfig",
    "AutoModel": "modeling_panorama.PanoramaVLM",
    "AutoModelForCausalLM": "modeling_panorama.PanoramaVLM",
    "AutoModelForImageTextToText": "modeling_panorama.PanoramaVLM",
    "AutoModelForMultimodalLM": "modeling_panorama.PanoramaVLM",
}
# The pipeline of a saved folder, with the class of transformers that loads its model.
PIPELINE_TASK = "panorama-text-to-text"
CUSTOM_PIPELINES = {
    PIPELINE_TASK: {
        "impl": "pipeline_panorama.PanoramaPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
# What may stand in a configuration of transformers beside the fields of its class.
_TRANSFORMERS_OPTIONS = (
    *(field.name for field in fields(PretrainedConfig)),
    *("_name_or_path", "attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "model_type"),
    *("name_or_path", "num_labels", "output_attentions", "per_layer_config", "quantization_config"),
    *("tie_last_hidden_states", "tie_word_embeddings", "torch_dtype"),
)
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
        latent_dimension: width D_latent of the resampled tokens. Where it is not given, 768, or what follows from the
            tower's width where the resampler has no weights.
        resampler_type: `"mlp"`, `"avg_pool"`, `"perceiver"`, `"qformer"`, `"c_abstractor"` or `"bimamba"`; or, without
            weights, `"identity"` (the tower's tokens as they are) or `"pixel_shuffle"` (blocks of tokens side by side
            in one). `docs/backbones.md` says what each is and costs.
        resampler_depth: linear layers of the MLPs, or layers of the others; of `"c_abstractor"` before its pooling and
            as many behind it.
        resampler_skip: whether the resampler starts by keeping what the tower says: a layer that leads past the MLP (of
            layers with skips their own), orthogonal at the start, when the rest adds nothing. Where it is not given,
            `True`; a file that does not say is from before there was one.
        resampler_pool: side of the block of tokens that `"avg_pool"` and `"c_abstractor"` average and
            `"pixel_shuffle"` joins.
        resampler_queries, resampler_heads: queries a view (a square number) and attention heads of `"perceiver"` and
            `"qformer"`.
        view_strategy, fov_deg, overlap_ratio, pitch_rows, pole_caps, image_size: what is cut out of a panorama, see
            :class:`ViewOptions`; `image_size` is the vision tower's own where it is not given.
        token_selection: `"owned"` sends each direction seen by tiles to the language model once, `"all"` every token.
        position_encoding: how the language model is told where each token looks (`docs/backbones.md`). `"rays"` (where
            it is not given): a learned layer on a code of the ray is added to the token. `"yaw"`: sines of the yaw are
            added. `"panorope"`: nothing is added, the rotary positions of the tokens follow the yaw. `"none"`: not.
        ray_frequencies: octaves of the code of `"rays"`; 0 leaves the bare ray.
        vision_trainable_blocks: how many of the last blocks of the vision tower train in stage `vision`; `"all"` for
            the whole tower, its embeddings and last norm too.
        resampler_vision_tower, finetune_vision_tower: whether the vision tower trains in stage `resampler`, `finetune`.
        resampler_language_model: whether the language model trains, whole, in stage `resampler`: one with random
            weights has nothing yet that the resampler could be aligned with.
        vicreg_loss_weight: weight of the overlap loss in stage `vision`.
        vicreg_similarity_weight, vicreg_variance_weight, vicreg_covariance_weight: weights of VICReg's three terms.
        vicreg_gamma: the standard deviation that the variance term asks of each dimension.
        vicreg_mode: `"pairwise"` (statistics inside each pair of views) or `"batchwise"` (over all pairs).
        vicreg_pair_chunk: pairs processed at once, which bounds memory.
        vicreg_use_ddp_gather: gather the features of all processes in `"batchwise"` mode.
        use_vicreg_projector: whether an MLP stands between the resampler and the overlap loss. With it the resampled
            tokens keep more of what the tower says, without it they agree better (`docs/overlap.md`).
        vicreg_projector_dim, vicreg_projector_depth, vicreg_projector_hidden: its output, layers and inner width.
        use_anyres_e2p_vicreg: pair tokens by rays (`True`), or as sequential strips (`False`); where it is not given,
            rays wherever the plan has them.
        overlap_loss: `"densecl"` (contrastive) or `"vicreg"`.
        overlap_pairs: which views are paired: `"neighbours"` and/or `"global"`.
        densecl_temperature: temperature of the contrastive loss.
        overlap_loss_weight_finetune: weight of the overlap loss in the later stages; 0.1 is usual where it is used.
        vision_stage_expected_views: views a panorama that stage `vision` expects; the plan's where it is not given.
        max_text_length: most text tokens (image tokens not counted) of one training sample; longer ones are refused.
        system_prompt: the system message where a conversation has none; the chat template's own where it is not given.
        default_generation_prompt: the question where none is asked.
        vision_token_fallback_position: `"start"` or `"end"`, where `<image>` goes in a text that lacks it.
        use_lora: whether stage `finetune` trains the language model through LoRA (else it trains it whole).
        lora_rank, lora_alpha, lora_dropout: as in `peft.LoraConfig`.
        lora_target_modules: names of the layers that get LoRA; all linear layers but the head where not given.
        use_ray_code: what `position_encoding` was before there was a choice, understood and not kept: `True` is
            `"rays"`, `False` is `"none"`.
        image_token_id: id of the `<image>` placeholder, whose embedding is never used, and whose logit is the lowest
            where there is one. A composed model has a row for it in its table of embeddings, as serving engines need;
            elsewhere it may lie outside.
        kwargs: what any configuration of transformers takes. Another name is an error; in a file that is loaded
            (of a quantiser, a converter, a newer version) it is kept, with a warning.

    Raises:
        ValueError: for an option that is unknown or out of range, and for options that contradict each other.
    """

    model_type = "panorama_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "image_hidden_states",
        "image_outputs",
        "ar_loss",
        "overlap_loss",
        "label_loss",
        "label_figures",
    ]

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_name: str | None = None,
        language_model_name: str | None = None,
        latent_dimension: int | None = None,
        resampler_type: str = "mlp",
        resampler_depth: int = 2,
        resampler_skip: bool | None = None,
        resampler_pool: int = 2,
        resampler_queries: int = 64,
        resampler_heads: int = 8,
        token_selection: str = "owned",
        position_encoding: str | None = None,
        ray_frequencies: int = 6,
        vision_trainable_blocks: int | str = 0,
        resampler_vision_tower: bool = False,
        resampler_language_model: bool = False,
        finetune_vision_tower: bool = False,
        vicreg_loss_weight: float = 1.0,
        vicreg_similarity_weight: float = 25.0,
        vicreg_variance_weight: float = 25.0,
        vicreg_covariance_weight: float = 1.0,
        vicreg_gamma: float = 1.0,
        vicreg_mode: str = "pairwise",
        vicreg_pair_chunk: int = 8,
        vicreg_use_ddp_gather: bool = False,
        use_vicreg_projector: bool = False,
        vicreg_projector_dim: int = 768,
        vicreg_projector_depth: int = 2,
        vicreg_projector_hidden: int | None = None,
        use_anyres_e2p_vicreg: bool | None = None,
        overlap_loss: str = "densecl",
        overlap_pairs: Sequence[str] = ("neighbours",),
        densecl_temperature: float = 0.07,
        overlap_loss_weight_finetune: float = 0.0,
        vision_stage_expected_views: int | None = None,
        max_text_length: int = MAX_TEXT_LENGTH,
        system_prompt: str | None = None,
        default_generation_prompt: str = DEFAULT_PROMPT,
        vision_token_fallback_position: str = "start",
        use_lora: bool = True,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        lora_target_modules: Sequence[str] | None = None,
        image_token_id: int | None = None,
        use_ray_code: bool | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, _DEFAULT_VISION)
        self.text_config = _sub_config(text_config, _DEFAULT_TEXT).get_text_config()
        logit_transform(self.text_config)  # or an error
        self.vision_name = vision_name
        self.language_model_name = language_model_name

        self.resampler_type = _one_of("resampler_type", resampler_type, sorted(RESAMPLERS))
        self.resampler_depth = _positive("resampler_depth", resampler_depth, 2)
        is_new = "transformers_version" not in kwargs  # else it comes from a file
        self.resampler_skip = is_new if resampler_skip is None else _flag("resampler_skip", resampler_skip)
        self.resampler_pool = _positive("resampler_pool", resampler_pool, 2)
        self.resampler_queries = _positive("resampler_queries", resampler_queries, 64)
        self.resampler_heads = _positive("resampler_heads", resampler_heads, 8)

        views = {name: kwargs.pop(name) for name in ViewOptions.names() if name in kwargs}
        self._check_names(kwargs)
        if views.get("image_size") is None:
            views["image_size"] = tower_of(self.vision_config).image_size(self.vision_config)
        for name, value in asdict(ViewOptions(**views)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        tower_of(self.vision_config).check(self.vision_config, self.image_size)
        width = tower_of(self.vision_config).width(self.vision_config)
        follows = RESAMPLERS[self.resampler_type].output_width(self, width)
        if latent_dimension is None:
            latent_dimension = follows or 768
        self.latent_dimension = _positive("latent_dimension", latent_dimension, 768)
        if follows not in (None, latent_dimension):
            raise ValueError(
                f"latent_dimension must be {follows} where resampler_type={self.resampler_type!r}, which has no "
                f"weights, got {latent_dimension}: leave it out"
            )
        self.token_selection = _one_of("token_selection", token_selection, ["owned", "all"])
        self.position_encoding = _position_encoding(position_encoding, use_ray_code)
        self._check_position_encoding()
        self.ray_frequencies = _at_least_zero("ray_frequencies", ray_frequencies, 6)
        if vision_trainable_blocks != "all" and not (
            type(vision_trainable_blocks) is int and vision_trainable_blocks >= 0
        ):
            raise ValueError(
                "vision_trainable_blocks must be a number of blocks, at least 0, or 'all', got "
                f"{vision_trainable_blocks!r}. Typical value: 0"
            )
        self.vision_trainable_blocks = vision_trainable_blocks
        self.resampler_vision_tower = _flag("resampler_vision_tower", resampler_vision_tower)
        self.resampler_language_model = _flag("resampler_language_model", resampler_language_model)
        self.finetune_vision_tower = _flag("finetune_vision_tower", finetune_vision_tower)

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
        self.densecl_temperature = _positive("densecl_temperature", densecl_temperature, 0.07)
        self.overlap_loss_weight_finetune = _at_least_zero(
            "overlap_loss_weight_finetune", overlap_loss_weight_finetune, 0.1
        )
        self.vision_stage_expected_views = vision_stage_expected_views

        self.max_text_length = _positive("max_text_length", max_text_length, MAX_TEXT_LENGTH)
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
        RESAMPLERS[self.resampler_type].output_grid(self)
        self._check_overlap()
        if "transformers_version" not in kwargs:  # else it comes from a file, and was warned of when it was made
            self._warn_about_the_vision_stage()

        for name in ("auto_map", "custom_pipelines"):  # a folder saved from this config always holds its own code
            kwargs.pop(name, None)
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    @property
    def custom_pipelines(self) -> dict[str, dict[str, Any]]:
        """What `transformers.pipeline` makes of a saved folder; a copy each time, since it writes classes into it."""
        return copy.deepcopy(CUSTOM_PIPELINES)

    @custom_pipelines.setter
    def custom_pipelines(self, value: Any) -> None:
        """A pipeline that is saved sets it; it is what it was."""

    def to_dict(self) -> dict[str, Any]:
        """As `PretrainedConfig.to_dict`, with the pipeline."""
        return {**super().to_dict(), "custom_pipelines": self.custom_pipelines}

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        own = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
        return (*ViewOptions.names(), *own)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PanoramaConfig:
        """As `PretrainedConfig.from_dict`. Options among `kwargs` are checked as on construction, and what a file holds
        that is not known is kept, with a warning."""
        known = {*cls.option_names(), *_TRANSFORMERS_OPTIONS}
        overrides = {name: kwargs.pop(name) for name in cls.option_names() if name in kwargs}
        for name in cls.sub_configs:  # `text_config={"vocab_size": 20}` changes this and leaves the rest as it is
            if isinstance(overrides.get(name), dict) and "model_type" not in overrides[name]:
                overrides[name] = {**(config_dict.get(name) or {}), **overrides[name]}
        names = {"position_encoding", "use_ray_code"}  # the one that is given replaces the other that a file says
        if not names.isdisjoint(overrides):
            config_dict = {name: value for name, value in config_dict.items() if name not in names}
        foreign = {name: value for name, value in config_dict.items() if name not in known}
        if named := sorted(name for name in foreign if not name.startswith("_")):
            _warn_of_foreign_keys(tuple(named))
        own = {name: value for name, value in config_dict.items() if name in known}
        config = super().from_dict({**own, **overrides}, **kwargs)
        for name, value in foreign.items():
            setattr(config[0] if isinstance(config, tuple) else config, name, value)
        return config

    @classmethod
    def _check_names(cls, given: dict[str, Any]) -> None:
        """Refuse what is neither an option nor known to transformers."""
        for name in given:
            if isinstance(getattr(cls, name, None), property) and name not in _TRANSFORMERS_OPTIONS:
                options = ", ".join(ViewOptions.names())
                raise ValueError(f"{name} cannot be set: it follows from other options, such as {options}")
        unknown = [name for name in given if name not in _TRANSFORMERS_OPTIONS]
        check_option_names(unknown, cls.option_names(), cls.__name__)

    def _check_position_encoding(self) -> None:
        """Raise for a position encoding that the parts cannot have."""
        if self.position_encoding == "yaw" and self.latent_dimension % 2:
            raise ValueError(
                f"latent_dimension must be even where position_encoding='yaw', got {self.latent_dimension}"
            )
        if self.position_encoding != "panorope":
            return
        rope = getattr(self.text_config, "rope_parameters", None)
        family = f"text_config of type {self.text_config.model_type!r}"
        if not rope:
            raise ValueError(f"position_encoding='panorope' needs rotary positions, which {family} has not; use 'rays'")
        if "mrope_section" in str(rope):
            raise ValueError(
                f"position_encoding='panorope' gives one position a token, and {family} has three (M-RoPE); use 'rays'"
            )

    def _check_overlap(self) -> None:
        """Raise where options of the overlap loss ask for what the views do not have."""
        plan = self.view_plan
        if "global" in self.overlap_pairs and len(plan.tiles) == plan.num_views > 1 and self.pairs_by_rays:
            raise ValueError(
                f"overlap_pairs={self.overlap_pairs} pairs tiles with the global view, and view_strategy="
                f"{self.view_strategy!r} has none. Use overlap_pairs=['neighbours'], or a strategy with a global view "
                "such as 'anyres_e2p'"
            )
        if plan.has_rays and not self.pairs_by_rays and min(map(len, plan.loops)) < 2:
            raise ValueError(
                "use_anyres_e2p_vicreg=False pairs each view with the next of its row, and view_strategy="
                f"{self.view_strategy!r} with pole_caps={self.pole_caps} has a row of a single view. Use "
                "use_anyres_e2p_vicreg=True, which pairs by rays"
            )
        if self.overlap_loss_weight_finetune > 0 and (problem := self.overlap_problem):
            raise ValueError(f"overlap_loss_weight_finetune={self.overlap_loss_weight_finetune}, but {problem}")

    def _warn_about_the_vision_stage(self) -> None:
        expected = self.vision_stage_expected_views
        if not self.view_plan.has_rays and self.use_anyres_e2p_vicreg:
            warnings.warn(
                f"use_anyres_e2p_vicreg=True, but view_strategy={self.view_strategy!r} has no rays to pair: "
                "falling back to sequential VICReg mode",
                stacklevel=3,
            )
        if expected is not None and expected < 2:
            warnings.warn(
                f"VICReg requires at least 2 views, vision_stage_expected_views is {expected}: "
                "stage 'vision' cannot train with it",
                stacklevel=3,
            )
        if self.vicreg_projector_dim != 768 and not self.use_vicreg_projector:
            warnings.warn(
                f"vicreg_projector_dim={self.vicreg_projector_dim} has no effect: there is no projector, because "
                "use_vicreg_projector is False",
                stacklevel=3,
            )
        if self.vicreg_loss_weight == 0.0:
            warnings.warn("vicreg_loss_weight is 0.0: vision stage training will have no effect", stacklevel=3)
        if problem := self.overlap_problem:
            warnings.warn(f"stage 'vision' cannot train: {problem}", stacklevel=3)

    @property
    def pairs_by_rays(self) -> bool:
        """Whether the overlap loss pairs tokens by their rays (else as sequential strips)."""
        return self.use_anyres_e2p_vicreg and self.view_plan.has_rays

    @property
    def uses_overlap_ratio(self) -> bool:
        """Whether `overlap_ratio` has a meaning for these views: not for those that touch, and not for a single one."""
        other = 0.9 if self.overlap_ratio < 0.8 else 0.1
        return replace(self.view_options, overlap_ratio=other).plan != self.view_plan

    @property
    def overlap_problem(self) -> str | None:
        """Why no two of the plan's views have a token to compare; `None` where they have, or where it is not the plan
        that decides (strips, which pair whatever views are given)."""
        if not self.pairs_by_rays or ray_correspondences(self.view_plan, self.token_grid, tuple(self.overlap_pairs)):
            return None
        if not self.uses_overlap_ratio:
            return f"the views of view_strategy={self.view_strategy!r} meet at their edges and do not overlap"
        return (
            f"no token looks the same way in two views: fov_deg={self.fov_deg} with "
            f"overlap_ratio={self.overlap_ratio} on a grid of {self.token_grid} tokens leaves no overlap. "
            "Typical overlap_ratio: [0.3, 0.7]"
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
    def position_code(self) -> tuple[str, int]:
        """What is added to a token for its direction, and its size (`tokens_panorama.direction_codes`)."""
        size = self.ray_frequencies if self.position_encoding == "rays" else self.latent_dimension
        return self.position_encoding, size

    @property
    def num_views(self) -> int:
        """V: views a panorama."""
        return self.view_plan.num_views

    @property
    def vision_grid(self) -> tuple[int, int]:
        """(rows, columns) of the vision tower's patches of one view."""
        return tower_of(self.vision_config).grid(self.vision_config, self.image_size)

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


def _position_encoding(encoding: str | None, use_ray_code: bool | None) -> str:
    """The position encoding, from the option and from its former name."""
    former = None
    if use_ray_code is not None:
        former = "rays" if _flag("use_ray_code", use_ray_code) else "none"
    if encoding is None:
        return former or "rays"
    if former not in (None, encoding):
        raise ValueError(
            f"position_encoding={encoding!r} and use_ray_code={use_ray_code} contradict each other: "
            "give position_encoding alone"
        )
    return _one_of("position_encoding", encoding, ["rays", "yaw", "panorope", "none"])


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


@cache
def _warn_of_foreign_keys(names: tuple[str, ...]) -> None:
    warnings.warn(f"the configuration holds {', '.join(names)}, not known here: kept as they are", stacklevel=4)


def _positive(name: str, value: Any, typical: float) -> Any:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}. Typical value: {typical}")
    return value


def _at_least_zero(name: str, value: Any, typical: float) -> Any:
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}. Typical value: {typical}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _one_of(name: str, value: str, allowed: list[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


PanoramaConfig.register_for_auto_class()
# `transformers serve` knows by this table of names, and by nothing else, which models take images.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(PanoramaConfig.model_type, "PanoramaVLM")
