"""The geometry as tensors: which tokens the language model gets, and which tokens of which views are compared.

Computed once a plan and device; to `torch.compile` it is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from .geometry_panorama import (
    Direction,
    Grid,
    View,
    ViewPlan,
    direction_weights,
    narrowest_cell,
    owned_tokens,
    plan_rays,
    ray_code,
    ray_correspondences,
    strip_correspondences,
    yaw_code,
    yaw_places,
)

P = ParamSpec("P")
T = TypeVar("T")


_forget: list[Callable[[], None]] = []


def _constant(function: Callable[P, T]) -> Callable[P, T]:
    """Computed once for the same arguments, and a constant to `torch.compile`."""
    cached = lru_cache(maxsize=64)(function)
    _forget.append(cached.cache_clear)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False):  # tensors made in inference mode could never be trained with
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return call


def forget_constants() -> None:
    """Compute all of them anew: those of a fake tensor mode are no use outside it."""
    for clear in _forget:
        clear()


# What is added to a token for its direction, and its size: of `"rays"` the octaves K, of `"yaw"` the width.
Code = tuple[str, int]


def direction_codes(rays: np.ndarray, code: Code) -> np.ndarray:
    """Codes of rays [..., 3]: [..., 3 + 6K] for `"rays"`, [..., width] for `"yaw"`, [..., 0] where none is added."""
    kind, size = code
    if kind == "rays":
        return ray_code(rays, size)
    return yaw_code(rays, size) if kind == "yaw" else rays[..., :0]


@_constant
def image_tokens(
    plan: ViewPlan, grid: Grid, selection: str, code: Code, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the V * S tokens the language model gets [num_image_tokens], and their codes [num_image_tokens, ..]."""
    rays = plan_rays(plan, grid).reshape(-1, 3)  # [V * S, 3]
    indices = owned_tokens(plan, grid).reshape(-1).nonzero()[0] if selection == "owned" else range(len(rays))
    codes = direction_codes(rays[indices], code)
    return torch.tensor(indices, device=device), torch.tensor(codes, dtype=torch.float32, device=device)


@_constant
def image_places(plan: ViewPlan, grid: Grid, device: torch.device) -> torch.Tensor:
    """:func:`yaw_places` of all tokens of a plan, float32 [V * S]."""
    places = yaw_places(plan_rays(plan, grid).reshape(-1, 3), narrowest_cell(plan, grid))
    return torch.tensor(places, dtype=torch.float32, device=device)


@_constant
def pooling_weights(
    plan: ViewPlan, grid: Grid, directions: tuple[Direction, ...], device: torch.device
) -> torch.Tensor:
    """:func:`direction_weights` as a tensor, float32.

    Raises:
        ValueError: for a direction that no token looks in.
    """
    weights = direction_weights(plan, grid, directions)  # [1 + N, V, S]
    for direction, of_it in zip(directions, weights[1:], strict=True):
        if not of_it.any():
            raise ValueError(
                f"no token of these views looks in the direction {direction} (yaw, pitch, fov): a wider field of view, "
                "or a view_strategy that sees more. Typical value: (30, 0, 90)"
            )
    return torch.tensor(weights, dtype=torch.float32, device=device)


def pooled(tokens: torch.Tensor, weights: torch.Tensor, view_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted means of tokens [B, V, S, D], scaled to length 1, float32 [B, N, D].

    Args:
        weights: [N, V, S].
        view_mask: bool [B, V], false for views that are left out; the mean of none is zero.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        if view_mask is not None:
            tokens = tokens * view_mask[..., None, None]
        return F.normalize(torch.einsum("bvsd,nvs->bnd", tokens.float(), weights.to(tokens.device)), dim=-1)


def further_codes(further_views: torch.Tensor, grid: Grid, code: Code) -> torch.Tensor:
    """Codes [B, E, S, ..] of the tokens of perspective views [B, E, 3] of yaw, pitch and field of view in degrees; zero
    for a view that is not there (NaN)."""
    return _of_further_views(further_views, grid, lambda rays: direction_codes(rays, code))


def further_places(further_views: torch.Tensor, grid: Grid, plan: ViewPlan) -> torch.Tensor:
    """:func:`yaw_places` [B, E, S] of the tokens of perspective views [B, E, 3] beside a plan; zero for NaN."""
    cell = narrowest_cell(plan, grid)
    return _of_further_views(further_views, grid, lambda rays: yaw_places(rays, cell))


def _of_further_views(
    further_views: torch.Tensor, grid: Grid, function: Callable[[np.ndarray], np.ndarray]
) -> torch.Tensor:
    """What a function of rays [S, 3] gives for each view, float32 [B, E, S, ..]."""
    size = function(np.array([[0.0, 0.0, 1.0]])).shape[1:]
    found = torch.zeros(*further_views.shape[:2], grid[0] * grid[1], *size)
    for place in further_views[..., 0].isfinite().nonzero().tolist():
        yaw, pitch, fov = further_views[tuple(place)].tolist()
        rays = View("perspective", yaw, pitch, fov).rays(grid).reshape(-1, 3)
        found[tuple(place)] = torch.from_numpy(function(rays)).float()
    return found.to(further_views.device)


@_constant
def token_pairs(
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
