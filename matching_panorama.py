"""The geometry as tensors: which tokens the language model gets, and which tokens of which views are compared.

Computed once a plan and device; to `torch.compile` it is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from .geometry_panorama import (
    Grid,
    ViewPlan,
    owned_tokens,
    plan_rays,
    ray_code,
    ray_correspondences,
    strip_correspondences,
)

P = ParamSpec("P")
T = TypeVar("T")


class MatchedFeatures(NamedTuple):
    """Features of tokens that look the same way, for P pairs of views of each of B panoramas.

    Args:
        x: tokens of the first views [N, L, D]; N = B * P, or fewer where views are masked.
        y: the second views, interpolated at the same rays [N, L, D].
        second: which views these are, counted through the batch [N], in [0, B * V).
        nearest: the token of the second view nearest to the place [N, L].
    """

    x: torch.Tensor
    y: torch.Tensor
    second: torch.Tensor
    nearest: torch.Tensor


def _constant(function: Callable[P, T]) -> Callable[P, T]:
    """Computed once for the same arguments, and a constant to `torch.compile`."""
    cached = lru_cache(maxsize=64)(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    return call


@_constant
def image_tokens(
    plan: ViewPlan, grid: Grid, selection: str, frequencies: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the V * S tokens the language model gets [num_image_tokens], and their ray codes [.., 3 + 6K]."""
    rays = plan_rays(plan, grid).reshape(-1, 3)  # [V * S, 3]
    indices = owned_tokens(plan, grid).reshape(-1).nonzero()[0] if selection == "owned" else range(len(rays))
    codes = ray_code(rays[indices], frequencies)
    return torch.tensor(indices, device=device), torch.tensor(codes, dtype=torch.float32, device=device)


def match_features(
    features: torch.Tensor,
    plan: ViewPlan,
    grid: Grid,
    overlap_pairs: tuple[str, ...] | None,
    overlap_ratio: float,
    view_mask: torch.Tensor | None = None,
) -> list[MatchedFeatures]:
    """Features of tokens that look the same way.

    Args:
        features: [B, V, S, D].
        plan: the views; V may differ from it where strips are asked for.
        grid: (rows, columns) of the S tokens of a view.
        overlap_pairs: by rays, between `"neighbours"` and/or `"global"`; `None` for sequential strips.
        overlap_ratio: for strips, the share of the columns that two views have in common.
        view_mask: [B, V], false for views that show nothing; no pair has one of these.

    Returns:
        One entry for each number L of matched tokens that occurs; none where nothing matches.
    """
    matched = []
    for first, second, tokens, corners, weights, nearest in _pairs(
        plan, grid, overlap_pairs, overlap_ratio, features.shape[1], features.device
    ):
        x = features[:, first, tokens]  # [B, P, L, D]
        y = torch.zeros_like(x)
        for corner in range(corners.shape[-1]):  # one at a time: all four would take four times the memory
            y = y + features[:, second, corners[:, :, corner]] * weights[:, :, corner].to(features.dtype)
        first_view = torch.arange(len(features), device=features.device)[:, None] * features.shape[1]
        pairs = [x, y, first_view + second[:, 0], nearest.expand(len(features), -1, -1)]  # each [B, P, ...]
        if view_mask is None:
            matched.append(MatchedFeatures(*(of_all.flatten(0, 1) for of_all in pairs)))
        elif (seen := view_mask[:, first[:, 0]] & view_mask[:, second[:, 0]]).any():
            matched.append(MatchedFeatures(*(of_all[seen] for of_all in pairs)))
    return matched


@_constant
def _pairs(
    plan: ViewPlan,
    grid: Grid,
    overlap_pairs: tuple[str, ...] | None,
    overlap_ratio: float,
    num_views: int,
    device: torch.device,
) -> list[tuple[torch.Tensor, ...]]:
    """Correspondences as tensors: first and second view [P, 1], tokens [P, L], corners [P, L, 4], weights
    [P, L, 4, 1], nearest [P, L]; by rays for `overlap_pairs`, as strips where it is `None`."""
    if overlap_pairs is not None:
        groups = ray_correspondences(plan, grid, overlap_pairs)
    else:
        loops = plan.loops if num_views == plan.num_views and plan.has_rays else (tuple(range(num_views)),)
        groups = tuple(strip_correspondences(loop, grid, overlap_ratio) for loop in loops)
    return [
        (
            torch.tensor(group.first[:, None], device=device),
            torch.tensor(group.second[:, None], device=device),
            torch.tensor(group.tokens, device=device),
            torch.tensor(group.corners, device=device),
            torch.tensor(group.weights[..., None], dtype=torch.float32, device=device),
            torch.tensor(group.nearest, device=device),
        )
        for group in groups
    ]
