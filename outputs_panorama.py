"""What the model returns: one dataclass for each thing it does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class PanoramaModelOutput(ModelOutput):
    """Output of the headless model.

    Args:
        last_hidden_state: of the language model, [B, T, D_lm].
        past_key_values: the language model's cache.
        hidden_states, attentions: the language model's, where asked for.
        image_hidden_states: what the language model was shown of the panoramas, [panoramas, num_image_tokens, D_lm];
            of partial ones, or with further views, [tokens, D_lm] for each.
        view_tokens: the resampled tokens of all views, [panoramas, V, S, D_latent].
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None
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
class TrainingStageOutput(ModelOutput):
    """Output of stages `resampler` and `finetune`, and of generation.

    Args:
        loss: what to minimise, where labels are given: `ar_loss`, the weighted overlap loss where one is asked for, and
            the label loss where there is one.
        logits: [B, T, vocabulary], or of the positions that `logits_to_keep` names; `None` where there are labels
            in training mode (see `return_logits`).
        past_key_values: the language model's cache.
        hidden_states, attentions: the language model's, where asked for.
        image_hidden_states: what the language model was shown of the panoramas, [panoramas, num_image_tokens, D_lm];
            of partial ones, or with further views, [tokens, D_lm] for each.
        ar_loss: the autoregressive loss (cross-entropy of the next token); 0 where nothing is supervised.
        overlap_loss: the unweighted overlap loss where `overlap_loss_weight_finetune` is positive.
        label_loss, label_figures: of token labels, see :class:`TokenLabelHead`; `None` without its head.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None
    ar_loss: torch.Tensor | None = None
    overlap_loss: torch.Tensor | None = None
    label_loss: torch.Tensor | None = None
    label_figures: dict[str, torch.Tensor] | None = None


@dataclass
class GenerationOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)`: what `GenerationMixin` returns, and

    Args:
        sequences: prompt and new tokens, [B, T + new].
        generated_ids: the new tokens alone, [B, new].
        text: the new tokens decoded, where `tokenizer=` is given.
        scores, logits, attentions, hidden_states, past_key_values: as in `GenerateDecoderOnlyOutput`.
        sequences_scores, beam_indices: as in `GenerateBeamDecoderOnlyOutput`.
    """

    sequences: torch.Tensor | None = None
    generated_ids: torch.Tensor | None = None
    text: list[str] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    past_key_values: Cache | None = None
    sequences_scores: torch.Tensor | None = None
    beam_indices: torch.Tensor | None = None
