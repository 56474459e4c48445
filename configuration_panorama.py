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
from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .geometry_panorama import (
    ViewOptions,
    ViewPlan,
    check_view_text,
    owned_tokens,
    ray_correspondences,
    share_in_no_token,
)
from .language_loss_panorama import logit_transform
from .options_panorama import (
    DEFAULT_PROMPT,
    MAX_TEXT_LENGTH,
    check_flag,
    check_number,
    check_one_of,
    check_option_names,
    check_text,
    check_texts,
    check_whole,
)
from .resampler_panorama import RESAMPLERS
from .towers_panorama import Tower, tower_of

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
_MUCH = 0.25  # of what tiles see, in no token; of the plans in docs/views.md 14 % at most
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


# Language models whose positions have three axes, and those that take features of an image in their first layers.
MROPE = ("qwen2_5_vl_text", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_vl_moe_text", "qwen3_vl_text")
DEEPSTACK = ("qwen3_vl_moe_text", "qwen3_vl_text")


class PanoramaConfig(PretrainedConfig):
    """Configuration of :class:`PanoramaVLM`.

    Everything that can be wrong is found here, with the value, the allowed range and a typical value in the message.

    Args:
        vision_config, text_config: configs (or their dicts) of any vision tower with a patch grid and any causal
            language model that `AutoConfig` knows. Without them: the shapes of SigLIP2-base and Qwen3-0.6B.
        vision_name, language_model_name: Hub ids or folders the two were composed from; for the record.
        vlm_name: the same of a whole vision-language model (:meth:`PanoramaVLM.from_vlm_pretrained`).
        vision_feature_layer: which hidden states of the tower are its tokens, of several side by side: 0 what its first
            block is given, -1 what its last gives, before any last norm. Not given: its output.
        latent_dimension: width D_latent of the resampled tokens. Where it is not given, 768, or what follows from the
            tower's width where the resampler has no weights.
        resampler_type: `"mlp"`, `"mlp_v1"`, `"avg_pool"`, `"perceiver"`, `"qformer"`, `"c_abstractor"` or `"bimamba"`;
            or, without weights, `"identity"` (the tower's tokens as they are) or `"pixel_shuffle"` (blocks of tokens
            side by side in one). `docs/backbones.md` says what each is and costs.
        resampler_depth: linear layers of the MLPs, or layers of the others; of `"c_abstractor"` before its pooling and
            as many behind it; 0 of `"avg_pool"` is the mean alone, without weights.
        resampler_hidden: width of the inner layers of `"mlp_v1"`; where it is not given, the larger of the tower's and
            `latent_dimension`.
        resampler_norms: the layer norms of `"mlp_v1"`: `"inner"`, behind each layer but the last, and `"input"`, before
            the first.
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
        projection_depth: linear layers of the projection: 2, as in LLaVA-1.5, or 1, as in PanoLLaVA v1.0; 0 where the
            tower gives the language model's width (and, where that takes more in its first layers, a multiple of it).
        projection_hidden: width between the two; the language model's where it is not given.
        projection_activation: between the two, a name that transformers knows, such as `"gelu"`, or `"swiglu"`, which
            halves the width.
        projection_bias: whether they have biases.
        projection_norm, projection_norm_eps: norm before them: `"layer"`, or `"rms"` as Gemma has it (times 1 + w);
            none where it is not given.
        projection_norm_parts: into how many equal parts a token falls that are normed each by itself, such as the
            patches of a block side by side.
        image_attention: whether tokens of one view, standing side by side, see each other (`"bidirectional"`, as in
            Gemma 3) or what is before them (`"causal"`).
        image_positions: `"sequence"`, one position after the other; or `"grid"` for a language model with positions of
            three axes (M-RoPE): each token of a view stands at its row and column, and a view takes up as many
            positions as it has rows.
        view_text: words before the tokens of each view, that say which way it looks: a template that may hold
            `{direction}` (front, right, up, ...; "panorama" for the global one), `{yaw}` and `{pitch}` (whole degrees),
            such as `"{direction}: "`. None where it is not given.
        view_prefix, view_suffix: what stands right before and behind the tokens of each view, such as control tokens
            of a pretrained vision-language model.
        silent_token_ids: ids beside `image_token_id` whose logit is the lowest: rows of the table of embeddings that
            are no words.
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
        resampler_hidden: int | None = None,
        resampler_norms: Sequence[str] = ("inner",),
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
        vlm_name: str | None = None,
        vision_feature_layer: int | Sequence[int] | None = None,
        projection_depth: int = 2,
        projection_hidden: int | None = None,
        projection_activation: str = "gelu",
        projection_bias: bool = True,
        projection_norm: str | None = None,
        projection_norm_eps: float = 1e-6,
        projection_norm_parts: int = 1,
        image_attention: str = "causal",
        image_positions: str = "sequence",
        view_text: str | None = None,
        view_prefix: str = "",
        view_suffix: str = "",
        silent_token_ids: Sequence[int] = (),
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, _DEFAULT_VISION)
        self.text_config = _sub_config(text_config, _DEFAULT_TEXT).get_text_config()
        logit_transform(self.text_config)  # or an error
        self.vision_name = None if vision_name is None else check_text("vision_name", vision_name)
        self.language_model_name = language_model_name
        if language_model_name is not None:
            check_text("language_model_name", language_model_name)
        self.vlm_name = None if vlm_name is None else check_text("vlm_name", vlm_name)
        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        self.vision_feature_layer = None if layers is None else _whole_numbers("vision_feature_layer", layers)

        self.resampler_type = check_one_of("resampler_type", resampler_type, sorted(RESAMPLERS))
        bare = resampler_depth == 0 and self.resampler_type == "avg_pool"
        self.resampler_depth = 0 if bare else check_whole("resampler_depth", resampler_depth, 2)
        hidden = resampler_hidden
        self.resampler_hidden = None if hidden is None else check_whole("resampler_hidden", hidden, 1536)
        if isinstance(resampler_norms, str) or not isinstance(resampler_norms, Sequence):
            raise ValueError(
                f"resampler_norms must be a list of names, got {resampler_norms!r}. Typical value: ['inner']"
            )
        self.resampler_norms = [check_one_of("resampler_norms", norm, ["inner", "input"]) for norm in resampler_norms]
        is_new = "transformers_version" not in kwargs  # else it comes from a file
        self.resampler_skip = is_new if resampler_skip is None else check_flag("resampler_skip", resampler_skip)
        self.resampler_pool = check_whole("resampler_pool", resampler_pool, 2)
        self.resampler_queries = check_whole("resampler_queries", resampler_queries, 64)
        self.resampler_heads = check_whole("resampler_heads", resampler_heads, 8)

        views = {name: kwargs.pop(name) for name in ViewOptions.names() if name in kwargs}
        self._check_names(kwargs)
        if views.get("image_size") is None:
            views["image_size"] = self.tower.image_size(self.vision_config)
        for name, value in asdict(ViewOptions(**views)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.tower.check(self.vision_config, self.image_size)
        width = self.tower.width(self.vision_config)
        follows = RESAMPLERS[self.resampler_type].output_width(self, width)
        if latent_dimension is None:
            latent_dimension = follows or 768
        self.latent_dimension = check_whole("latent_dimension", latent_dimension, 768)
        if follows not in (None, latent_dimension):
            raise ValueError(
                f"latent_dimension must be {follows} where resampler_type={self.resampler_type!r}, which has no "
                f"weights, got {latent_dimension}: leave it out"
            )
        self.token_selection = check_one_of("token_selection", token_selection, ["owned", "all"])
        self.position_encoding = _position_encoding(position_encoding, use_ray_code)
        self._set_projection(
            projection_depth,
            projection_hidden,
            projection_activation,
            projection_bias,
            projection_norm,
            projection_norm_eps,
        )
        self.projection_norm_parts = check_whole("projection_norm_parts", projection_norm_parts, 1)
        if self.latent_dimension % self.projection_norm_parts:
            raise ValueError(
                f"projection_norm_parts must divide latent_dimension={self.latent_dimension}, got "
                f"{self.projection_norm_parts}. Typical value: 1"
            )
        self.view_text = check_view_text(view_text)
        self.view_prefix = check_text("view_prefix", view_prefix)
        self.view_suffix = check_text("view_suffix", view_suffix)
        self.image_attention = check_one_of("image_attention", image_attention, ["causal", "bidirectional"])
        self.image_positions = check_one_of("image_positions", image_positions, ["sequence", "grid"])
        self.silent_token_ids = _whole_numbers("silent_token_ids", silent_token_ids, least=0)
        self._check_position_encoding()
        self.ray_frequencies = check_whole("ray_frequencies", ray_frequencies, 6, least=0)
        if vision_trainable_blocks != "all" and not (
            type(vision_trainable_blocks) is int and vision_trainable_blocks >= 0
        ):
            raise ValueError(
                "vision_trainable_blocks must be a number of blocks, at least 0, or 'all', got "
                f"{vision_trainable_blocks!r}. Typical value: 0"
            )
        self.vision_trainable_blocks = vision_trainable_blocks
        self.resampler_vision_tower = check_flag("resampler_vision_tower", resampler_vision_tower)
        self.resampler_language_model = check_flag("resampler_language_model", resampler_language_model)
        self.finetune_vision_tower = check_flag("finetune_vision_tower", finetune_vision_tower)

        self.vicreg_loss_weight = check_number("vicreg_loss_weight", vicreg_loss_weight, 1.0, least=0)
        self.vicreg_similarity_weight = check_number(
            "vicreg_similarity_weight", vicreg_similarity_weight, 25.0, least=0
        )
        self.vicreg_variance_weight = check_number("vicreg_variance_weight", vicreg_variance_weight, 25.0, least=0)
        self.vicreg_covariance_weight = check_number("vicreg_covariance_weight", vicreg_covariance_weight, 1.0, least=0)
        self.vicreg_gamma = check_number("vicreg_gamma", vicreg_gamma, 1.0)
        self.vicreg_mode = check_one_of("vicreg_mode", vicreg_mode, ["pairwise", "batchwise"])
        self.vicreg_pair_chunk = check_whole("vicreg_pair_chunk", vicreg_pair_chunk, 8)
        self.vicreg_use_ddp_gather = check_flag("vicreg_use_ddp_gather", vicreg_use_ddp_gather)
        self.use_vicreg_projector = check_flag("use_vicreg_projector", use_vicreg_projector)
        self.vicreg_projector_dim = check_whole("vicreg_projector_dim", vicreg_projector_dim, 768)
        self.vicreg_projector_depth = check_whole("vicreg_projector_depth", vicreg_projector_depth, 2)
        self.vicreg_projector_hidden = (
            None
            if vicreg_projector_hidden is None
            else check_whole("vicreg_projector_hidden", vicreg_projector_hidden, 768)
        )
        self.overlap_loss = check_one_of("overlap_loss", overlap_loss, ["vicreg", "densecl"])
        pairs = check_texts("overlap_pairs", overlap_pairs)
        self.overlap_pairs = [check_one_of("overlap_pairs", pair, ["neighbours", "global"]) for pair in pairs]
        self.densecl_temperature = check_number("densecl_temperature", densecl_temperature, 0.07)
        self.overlap_loss_weight_finetune = check_number(
            "overlap_loss_weight_finetune", overlap_loss_weight_finetune, 0.1, least=0
        )
        self.vision_stage_expected_views = vision_stage_expected_views
        if vision_stage_expected_views is not None:
            self.vision_stage_expected_views = check_whole(
                "vision_stage_expected_views", vision_stage_expected_views, 9, least=0
            )

        self.max_text_length = check_whole("max_text_length", max_text_length, MAX_TEXT_LENGTH)
        self.system_prompt = None if system_prompt is None else check_text("system_prompt", system_prompt)
        self.default_generation_prompt = check_text("default_generation_prompt", default_generation_prompt)
        self.vision_token_fallback_position = check_one_of(
            "vision_token_fallback_position", vision_token_fallback_position, ["start", "end"]
        )
        self.use_lora = check_flag("use_lora", use_lora)
        self.lora_rank = check_whole("lora_rank", lora_rank, 16)
        self.lora_alpha = check_number("lora_alpha", lora_alpha, 32)
        self.lora_dropout = check_number("lora_dropout", lora_dropout, 0.05, least=0)
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}. Typical value: 0.05")
        self.lora_target_modules = lora_target_modules
        if lora_target_modules is not None:
            self.lora_target_modules = check_texts("lora_target_modules", lora_target_modules)
        self.image_token_id = image_token_id
        if image_token_id is not None:
            self.image_token_id = check_whole("image_token_id", image_token_id, 151669, least=0)

        # The grids come last: they need everything above, and say what does not fit together.
        by_rays = self.view_plan.has_rays if use_anyres_e2p_vicreg is None else use_anyres_e2p_vicreg
        self.use_anyres_e2p_vicreg = check_flag("use_anyres_e2p_vicreg", by_rays)
        RESAMPLERS[self.resampler_type].output_grid(self)
        self._check_ownership(is_new)
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

    def _set_projection(
        self, depth: int, hidden: int | None, activation: str, bias: bool, norm: str | None, eps: float
    ) -> None:
        depth = check_whole("projection_depth", depth, 2, least=0)
        if depth > 2:
            raise ValueError(f"projection_depth must be 0, 1 or 2, got {depth}. Typical value: 2")
        self.projection_depth = depth
        taken = self.text_config.hidden_size * (1 + self.further_layers)
        if depth == 0 and self.latent_dimension != taken:
            raise ValueError(
                "projection_depth=0 shows the language model the tokens as they are, which have "
                f"{self.latent_dimension} dimensions where it takes {taken}"
            )
        self.projection_hidden = None if hidden is None else check_whole("projection_hidden", hidden, 1024)
        self.projection_activation = check_one_of("projection_activation", activation, sorted({*ACT2FN, "swiglu"}))
        if activation == "swiglu" and (hidden or self.text_config.hidden_size) % 2:
            raise ValueError(f"projection_hidden must be even with projection_activation='swiglu', got {hidden}")
        self.projection_bias = check_flag("projection_bias", bias)
        self.projection_norm = None if norm is None else check_one_of("projection_norm", norm, ["layer", "rms"])
        self.projection_norm_eps = check_number("projection_norm_eps", eps, 1e-6)

    def _check_position_encoding(self) -> None:
        """Raise for a position encoding that the parts cannot have."""
        if self.position_encoding == "yaw" and self.latent_dimension % 2:
            raise ValueError(
                f"latent_dimension must be even where position_encoding='yaw', got {self.latent_dimension}"
            )
        words = self.view_words
        if self.image_attention == "bidirectional" and not words and self.num_views > 1:
            raise ValueError(
                "image_attention='bidirectional' needs words between the views, which say where one ends: set "
                "view_text or view_prefix"
            )
        if self.image_positions == "grid":
            if self.text_config.model_type not in MROPE:
                raise ValueError(
                    f"image_positions='grid' needs positions of three axes (M-RoPE), as {', '.join(MROPE)} have them, "
                    f"which text_config of type {self.text_config.model_type!r} has not"
                )
            if self.token_selection != "all" or (not words and self.num_views > 1):
                raise ValueError(
                    "image_positions='grid' needs whole views with words between them: token_selection='all', and "
                    "view_text or view_prefix"
                )
        if self.position_encoding != "panorope":
            return
        if words and self.num_views > 1:
            raise ValueError(
                "position_encoding='panorope' lets the tokens of all views share their places, and view_text, "
                "view_prefix and view_suffix put words between them: leave these empty, or use 'rays'"
            )
        rope = getattr(self.text_config, "rope_parameters", None)
        family = f"text_config of type {self.text_config.model_type!r}"
        if not rope:
            raise ValueError(f"position_encoding='panorope' needs rotary positions, which {family} has not; use 'rays'")
        if "mrope_section" in str(rope):
            raise ValueError(
                f"position_encoding='panorope' gives one position a token, and {family} has three (M-RoPE); use 'rays'"
            )

    def _check_ownership(self, is_new: bool) -> None:
        """Warn where tokens are so coarse that many directions are in none of the tile that owns them, and raise where
        the language model would get none at all."""
        if self.token_selection != "owned":
            return
        lost = share_in_no_token(self.view_plan, self.token_grid)
        words = (
            f"token_selection='owned' on a grid of {self.token_grid} tokens leaves {lost:.0%} of what the tiles see "
            f"(fov_deg={self.fov_deg}, overlap_ratio={self.overlap_ratio}) in no token: a token goes with its middle. "
            "Use token_selection='all', a finer grid, or another overlap_ratio (docs/views.md)"
        )
        if self.num_image_tokens == 0:
            raise ValueError(words)
        if lost > _MUCH and is_new:
            warnings.warn(words, stacklevel=3)

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
        if expected is not None and expected < 2 and self.vicreg_loss_weight > 0:
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
        if self.vicreg_loss_weight > 0 and (problem := self.overlap_problem):
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
        """Why no two of the plan's views have tokens to compare; `None` where they have, or where it is not the plan
        that decides (strips, which pair whatever views are given)."""
        loss = f"overlap_loss={self.overlap_loss!r} compares at least {self.least_matched} tokens a pair of views"
        if not self.pairs_by_rays:
            rows, columns = self.token_grid
            if rows * max(1, round(self.overlap_ratio * columns)) >= self.least_matched:
                return None
            return f"{loss}, and strips of a grid of {rows} x {columns} tokens have one. Take a larger image_size"
        groups = ray_correspondences(self.view_plan, self.token_grid, tuple(self.overlap_pairs))
        if any(group.tokens.shape[1] >= self.least_matched for group in groups):
            return None
        if groups:
            return f"{loss}, and there is one on a grid of {self.token_grid} tokens. Typical overlap_ratio: [0.3, 0.7]"
        if not self.uses_overlap_ratio:
            return f"the views of view_strategy={self.view_strategy!r} meet at their edges and do not overlap"
        return (
            f"no token looks the same way in two views: fov_deg={self.fov_deg} with "
            f"overlap_ratio={self.overlap_ratio} on a grid of {self.token_grid} tokens leaves no overlap. "
            "Typical overlap_ratio: [0.3, 0.7]"
        )

    @property
    def least_matched(self) -> int:
        """How many matched tokens a pair of views needs to be compared: two where its statistics are its own."""
        return 1 if self.overlap_loss == "vicreg" and self.vicreg_mode == "batchwise" else 2

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
    def further_layers(self) -> int:
        """In how many of its first layers the language model is shown more of an image (deepstack)."""
        deep = self.text_config.model_type in DEEPSTACK and self.projection_depth == 0
        return len(getattr(self.vision_config, "deepstack_visual_indexes", ())) if deep else 0

    @property
    def view_words(self) -> bool:
        """Whether something is said before or behind the tokens of each view."""
        return bool(self.view_text or self.view_prefix or self.view_suffix)

    @property
    def tower(self) -> Tower:
        """How the vision tower is run."""
        return tower_of(self.vision_config, self.vision_feature_layer or ())

    @property
    def vision_grid(self) -> tuple[int, int]:
        """(rows, columns) of the vision tower's patches of one view."""
        return self.tower.grid(self.vision_config, self.image_size)

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
        former = "rays" if check_flag("use_ray_code", use_ray_code) else "none"
    if encoding is None:
        return former or "rays"
    if former not in (None, encoding):
        raise ValueError(
            f"position_encoding={encoding!r} and use_ray_code={use_ray_code} contradict each other: "
            "give position_encoding alone"
        )
    return check_one_of("position_encoding", encoding, ["rays", "yaw", "panorope", "none"])


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


def _whole_numbers(name: str, values: Any, least: int | None = None) -> list[int]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of whole numbers, got {values!r}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            allowed = "whole numbers" if least is None else f"whole numbers of at least {least}"
            raise ValueError(f"{name} must be {allowed}, got {value!r} among {list(values)!r}"[:300])
    return list(values)


PanoramaConfig.register_for_auto_class()
# `transformers serve` knows by this table of names, and by nothing else, which models take images.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(PanoramaConfig.model_type, "PanoramaVLM")
