"""What the model returns: one dataclass for each thing it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput

# What the cache of the language model is called in calls and outputs. transformers 5.24 gave it another name, and still
# understands the old one.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def take_cache(kwargs: dict[str, Any]) -> Any:
    """The cache that was given, by either name, out of `kwargs`; `None` where there is none."""
    old, new = kwargs.pop("past_key_values", None), kwargs.pop("cache", None)
    return old if new is None else new


@dataclass
class PanoramaModelOutput(BaseModelOutputWithPast):
    """Output of the headless model: that of the language model's body, and

    Args:
        image_hidden_states: what the language model was shown of the panoramas, [panoramas, num_image_tokens, D_lm];
            of partial ones, or with further views, [tokens, D_lm] for each.
        image_outputs: all of :meth:`PanoramaModel.get_image_features`, with the tower's layers where those are asked.
        view_tokens: the resampled tokens of all views, [panoramas, V, S, D_latent].
    """

    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    view_tokens: torch.Tensor | None = None


@dataclass
class PanoramaFeatures(ModelOutput):
    """What panoramas look like, for retrieval: vectors of length 1, float32, whose products are cosines.

    Args:
        panorama_embeds: [B, D_latent].
        direction_embeds: [B, N, D_latent]; zero where a partial panorama shows nothing in a direction.
        directions: [N, 3], which way each looks: yaw, pitch and field of view in degrees.
    """

    panorama_embeds: torch.Tensor | None = None
    direction_embeds: torch.Tensor | None = None
    directions: torch.Tensor | None = None


@dataclass
class VisionStageOutput(ModelOutput):
    """Output of stage `vision`.

    Args:
        loss: what to minimise; `vicreg_weight * vicreg_raw`, and the label loss where there is one.
        vicreg_loss: the same, by its own name.
        vicreg_raw: the overlap loss before `vicreg_weight`: the weighted sum of VICReg's terms, or DenseCL's loss.
        vicreg_weight: `config.vicreg_loss_weight`.
        vicreg_dim: width of the features that were compared.
        invariance, variance, covariance: VICReg's unweighted terms, mean over pairs; `None` for DenseCL.
        hidden_states: the features that were compared, [B, V, S, vicreg_dim].
        label_loss, label_figures: of token labels, see :class:`TokenLabelHead`; `None` without its head.
    """

    loss: torch.Tensor | None = None
    vicreg_loss: torch.Tensor | None = None
    vicreg_raw: torch.Tensor | None = None
    vicreg_weight: float | None = None
    vicreg_dim: int | None = None
    invariance: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    label_loss: torch.Tensor | None = None
    label_figures: dict[str, torch.Tensor] | None = None


@dataclass
class TrainingStageOutput(CausalLMOutputWithPast):
    """Output of stages `resampler` and `finetune`, and of generation: that of a causal language model, with

    Args:
        loss: what to minimise, where labels are given: `ar_loss`, the weighted overlap loss where one is asked for, and
            the label loss where there is one.
        logits: [B, T, vocabulary], or of the positions that `logits_to_keep` names; `None` where there are labels
            in training mode (see `return_logits`).
        image_hidden_states: what the language model was shown of the panoramas, [panoramas, num_image_tokens, D_lm];
            of partial ones, or with further views, [tokens, D_lm] for each.
        image_outputs: as of the headless model.
        ar_loss: the autoregressive loss (cross-entropy of the next token); 0 where nothing is supervised.
        overlap_loss: the unweighted overlap loss where `overlap_loss_weight_finetune` is positive.
        label_loss, label_figures: of token labels, see :class:`TokenLabelHead`; `None` without its head.
    """

    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    ar_loss: torch.Tensor | None = None
    overlap_loss: torch.Tensor | None = None
    label_loss: torch.Tensor | None = None
    label_figures: dict[str, torch.Tensor] | None = None


@dataclass
class GenerationOutput(GenerateBeamDecoderOnlyOutput):
    """Output of `generate(return_dict_in_generate=True)`: what `GenerationMixin` returns, and

    Args:
        sequences: prompt and new tokens, [B, T + new].
        generated_ids: the new tokens alone, [B, new].
        text: the new tokens decoded, where `tokenizer=` is given.
    """

    generated_ids: torch.Tensor | None = None
    text: list[str] | None = None
