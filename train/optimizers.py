"""The optimizer of a stage: AdamW, or Muon for hidden matrices beside AdamW for the rest; and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.pytorch_utils import Conv1D

from ..modeling_panorama import PanoramaVLM
from ..stages_panorama import PARTS, part_of
from .config import DECAY_RATIO, STABLE, StageConfig


def make_optimizer(model: PanoramaVLM, options: StageConfig) -> Optimizer:
    """The optimizer of a model whose stage is set."""
    hidden, rest = parameter_groups(model, options)
    if not hidden:
        if options.optimizer == "muon":
            raise ValueError("optimizer 'muon', but no hidden matrix trains: use optimizer 'adamw'")
        return AdamW(rest, lr=options.learning_rate)
    return MuonAndAdamW(hidden, rest, lr=options.learning_rate)


def make_schedule(optimizer: Optimizer, options: StageConfig, steps: int) -> LRScheduler:
    """The schedule of the learning rates over all `steps` of a stage."""
    shape: dict[str, Any] = {}
    if options.schedule == STABLE:
        share = DECAY_RATIO if options.decay_ratio is None else options.decay_ratio
        shape = {"num_decay_steps": max(1, int(steps * share)), "decay_type": "linear"}
    return get_scheduler(options.schedule, optimizer, int(steps * options.warmup_ratio), steps, shape)


def parameter_groups(model: PanoramaVLM, options: StageConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What trains by Muon and what by AdamW: by part of the model, matrices apart from vectors, which do not decay."""
    by_muon = hidden_matrices(model) if options.optimizer == "muon" else set()
    hidden: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for part in PARTS:
        group = {"lr": options.learning_rates.get(part, options.learning_rate), "name": part}
        trained = [(n, p) for n, p in model.named_parameters() if part_of(n) == part and p.requires_grad]
        if chosen := [p for n, p in trained if n in by_muon]:
            hidden.append({"params": chosen, "weight_decay": options.weight_decay, **group})
        for decays in (True, False):
            if chosen := [p for n, p in trained if n not in by_muon and (p.ndim > 1) == decays]:
                rest.append({"params": chosen, "weight_decay": options.weight_decay if decays else 0.0, **group})
    return hidden, rest


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon is for: weights of linear layers between a model's first and last ones.

    Not embeddings of tokens, patches and positions (in whatever shape), nor heads, as its author advises (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, arXiv:2502.16982, does likewise); nor the two
    factors of a LoRA adapter, of which neither is a matrix of the model; nor experts that are stacked in one tensor.
    """
    found = set()
    for name, module in model.named_modules():
        words = name.split(".")
        is_end = any("embed" in word or word.startswith("lora_") or word.endswith(("head", "heads")) for word in words)
        if isinstance(module, nn.Linear | Conv1D) and not is_end:
            found.add(f"{name}.weight")
    return found


class MuonAndAdamW(Optimizer):
    """torch's Muon and AdamW as one optimizer, with the groups and the state of both: schedules, gradient scalers,
    Accelerate and checkpoints take a single one.

    Muon's steps have the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982, equation 4), so that learning
    rates and weight decay of AdamW fit.

    Args:
        hidden: parameter groups of matrices, for Muon.
        rest: parameter groups for AdamW.
        lr: of groups that have none.
    """

    def __init__(self, hidden: list[dict[str, Any]], rest: list[dict[str, Any]], lr: float):
        self.muon, self.adamw = Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw"), AdamW(rest, lr=lr)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; the result of `closure`, which computes the loss and its gradients, if one is given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        split = len(self.muon.param_groups)
        # Loading and sharding replace groups and state: what the two work on are always those of this one.
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        for optimizer in (self.muon, self.adamw):
            optimizer.state = self.state
            optimizer.step()
        return loss
