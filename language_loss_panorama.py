"""The language loss: cross-entropy where something is supervised, and how logits follow from the head."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.configuration_utils import PretrainedConfig

from .losses_panorama import full_precision, recomputed

IGNORED = -100  # the label of a position that is not supervised, as in torch and transformers
CHUNK_BYTES = 2**27  # of the logits that the language loss works on at a time


class LogitTransform(NamedTuple):
    """What a language model makes of the output of its head: `softcap * tanh(scale * output / softcap)`.

    `softcap` is that of Gemma 2 (Gemma Team, "Gemma 2", 2024, section 2), `None` where there is none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """Output of the head [..., vocabulary] -> logits of the same shape."""
        if self.scale != 1.0:
            output = output * self.scale
        return output if self.softcap is None else self.softcap * torch.tanh(output / self.softcap)


_PLAIN = (
    *("apertus", "arcee", "bitnet", "bloom", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe"),
    *("exaone4", "exaone_moe", "falcon", "flex_olmo", "gemma", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe"),
    *("lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "ministral", "ministral3", "mistral", "mixtral", "nemotron"),
    *("nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2"),
    *(
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "seed_oss",
        "smollm3",
    ),
    *("stablelm", "starcoder2", "youtu"),
)
_SOFT_CAP = ("gemma2", "gemma3_text", "gemma4_text", "nanochat", "vaultgemma")
_MULTIPLIED = ("cohere", "cohere2", "cohere2_moe")
_DIVIDED = (
    *("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "minicpm3"),
)


# By `model_type` of the text config. A family belongs here if its logits are `transform(head(last_hidden_state))`, and
# embeddings tell it all that ids do (Gemma 3n looks ids up in every layer, and leaves that out in silence where it gets
# embeddings); tests/test_language_heads.py shows both for each.
LANGUAGE_HEADS: dict[str, Callable[[PretrainedConfig], LogitTransform]] = {
    **dict.fromkeys(_PLAIN, lambda config: LogitTransform()),
    **dict.fromkeys(_SOFT_CAP, lambda config: LogitTransform(softcap=config.final_logit_softcapping)),
    **dict.fromkeys(_MULTIPLIED, lambda config: LogitTransform(scale=config.logit_scale)),
    **dict.fromkeys(_DIVIDED, lambda config: LogitTransform(scale=1 / config.logits_scaling)),
    "falcon_h1": lambda config: LogitTransform(scale=config.lm_head_multiplier),
    "hyperclovax": lambda config: LogitTransform(scale=config.logits_scaling),
    "recurrent_gemma": lambda config: LogitTransform(softcap=config.logits_soft_cap),
}


def logit_transform(text_config: PretrainedConfig) -> LogitTransform:
    """What the language model of a configuration makes of its head's output.

    Raises:
        ValueError: for a `model_type` of which it is not known, or a model of it that cannot be shown images.
    """
    kind = text_config.model_type
    if kind not in LANGUAGE_HEADS:
        raise ValueError(
            f"how the logits of a language model of type {kind!r} follow from its head is not known. Known are "
            f"{', '.join(sorted(LANGUAGE_HEADS))}; another one can be made known with "
            f"language_loss_panorama.LANGUAGE_HEADS[{kind!r}] = lambda config: LogitTransform()"
        )
    return LANGUAGE_HEADS[kind](text_config)


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    num_items: int | Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk_bytes: int | None = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy of `transform(head(hidden))` and `labels` at the cost of what is supervised, gradients too.

    The head sees supervised positions only, a chunk of them at a time. The logits of a chunk are computed again in
    backward instead of kept; those of the last chunk, which backward needs first, are kept. So there are never
    more than a few tensors of `chunk_bytes`, however many positions there are.

    Args:
        hidden: the language model's last hidden states, [..., D].
        head: [n, D] -> [n, vocab_size], as a rule a module. It is called, and its weights are not looked at, so that
            adapters and sharded weights work.
        labels: [...] integers in [0, vocab_size), already shifted: `labels[i]` is what `hidden[i]` should
            predict. -100 where nothing is supervised.
        vocab_size: how many logits a position has.
        num_items: the sum is divided by it, so that the losses of micro-batches (or processes) add up to that of the
            whole batch; by the number of supervised positions where it is not given.
        transform: what stands between the head and the softmax.
        chunk_bytes: bytes of a chunk of logits in float32 (float64 where the head computes in it); a chunk has one
            position at least. `None`: one chunk, for a head whose every call is a collective operation.

    Returns:
        The loss, a scalar, computed in float32 (float64 stays float64). Without any supervised position it is 0,
        whatever `num_items`, with a gradient that is zero and reaches everything (a mean over nothing would be NaN,
        and one such micro-batch would spoil the sum; processes that wait for all gradients get them). Where
        `num_items` is not given either, there is a warning.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {list(hidden.shape[:-1])}, one for each position, got {list(labels.shape)}")
    supervised = labels != IGNORED
    hidden, labels = hidden[supervised], labels[supervised]  # [N, D], [N]
    total = summed_cross_entropy(hidden, head, labels, vocab_size, transform, chunk_bytes)
    count = len(labels)
    if count == 0:
        if num_items is None:
            warnings.warn("a batch has no supervised token: its language loss is 0", stacklevel=2)
        return total
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (count if num_items is None else num_items)


def summed_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk_bytes: int | None = CHUNK_BYTES,
) -> Tensor:
    """The sum that :func:`chunked_cross_entropy` divides: hidden states [N, D] and labels [N], all supervised."""

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = full_precision(head(hidden))  # [n, vocab_size]
        if transform is not None:
            logits = transform(logits)
        return F.cross_entropy(logits, labels, reduction="sum")

    width = vocab_size * (8 if hidden.dtype == torch.float64 else 4)
    rows = max(len(labels), 1) if chunk_bytes is None else max(chunk_bytes // width, 1)
    *earlier, last = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.stack([*(recomputed(part, *chunk, random=True) for chunk in earlier), part(*last)]).sum()


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether each call of the module gathers weights from all processes (FSDP of its own, ZeRO-3)."""
    by_class = any(".fsdp" in base.__module__ for base in type(module).__mro__)
    return by_class or any(hasattr(parameter, "ds_id") for parameter in module.parameters())
