"""Overlap consistency, stage `vision`: which tokens of two views look the same way, the projector between them and the
resampler, the loss that compares them, and the metrics that tell learning from collapse.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_panorama import PanoramaConfig
from .geometry_panorama import Grid, ViewPlan
from .losses_panorama import VICRegTerms, check_matched, densecl, no_autocast, vicreg
from .tokens_panorama import token_pairs


class VICRegProjector(nn.Module):
    """MLP between the resampler and the overlap loss, [..., D_latent] -> [..., vicreg_projector_dim].

    VICReg decorrelates and equalises the dimensions it sees. The projector takes that pressure, so that the
    resampled tokens stay free to hold what the language model needs, and agree less (`docs/overlap.md`); only stage
    `vision` trains it, and a model has none unless `use_vicreg_projector` is set. Its last layer has
    no bias, as in the paper's code: VICReg looks at differences and deviations, which a bias does not change.
    """

    def __init__(self, config: PanoramaConfig):
        super().__init__()
        hidden = config.vicreg_projector_hidden or config.vicreg_projector_dim
        layers: list[nn.Module] = []
        width = config.latent_dimension
        for _ in range(config.vicreg_projector_depth - 1):
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.vicreg_projector_dim, bias=False))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., D_latent] -> [..., vicreg_projector_dim]."""
        return self.layers(tokens)


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


class OverlapLoss:
    """The overlap loss of a configuration.

    Two modes say which tokens are a pair. With rays each token of a view is paired with the exact place of another view
    that looks the same way, interpolated between four tokens. Sequential strips pair the right columns of a view with
    the left columns of the next, row by row: exact for windows slid over the ERP image, several degrees off for
    perspective tiles; they are also the warned fallback where the plan has no rays.

    DenseCL, the default, is a contrastive loss: each token must find its pair among all of its pair of views.

    VICReg (`overlap_loss="vicreg"`) asks three things of the pairs: that both say the same (invariance), that each
    dimension varies (variance, a hinge at `vicreg_gamma`), and that dimensions do not repeat each other (covariance),
    weighted by `vicreg_similarity_weight`, `vicreg_variance_weight` and `vicreg_covariance_weight`. Statistics are
    those of each pair of views (`"pairwise"`) or of all pairs together (`"batchwise"`). VICReg works through
    `vicreg_pair_chunk` pairs at a time, DenseCL through pieces of its similarity matrix, which bounds memory and
    changes no value.

    Args:
        config: of the model.

    Attributes:
        checks_finite: whether features that are not finite are an error (else the loss is not finite, either). A
            trainer on several processes wants the second: one that raises leaves the others waiting for it.
    """

    def __init__(self, config: PanoramaConfig):
        self.config = config
        self.checks_finite = True
        self.plan, self.grid = config.view_plan, config.token_grid

    def match(
        self, features: torch.Tensor, by_rays: bool | None = None, view_mask: torch.Tensor | None = None
    ) -> list[MatchedFeatures]:
        """Features of tokens that look the same way, by rays or as sequential strips.

        Args:
            features: [B, V, S, D].
            by_rays: as the configuration says where it is not given.
            view_mask: [B, V], false for views that show nothing; no pair has one of these.

        Returns:
            One entry for each number L of matched tokens that occurs and is enough to be compared
            (`PanoramaConfig.least_matched`); none where nothing matches.
        """
        by_rays = self.config.use_anyres_e2p_vicreg if by_rays is None else by_rays
        if by_rays and not self._has_rays(features.shape[1]):
            reason = (
                f"pixel_values has {features.shape[1]} views and the plan {self.plan.num_views}"
                if self.plan.has_rays
                else f"view_strategy={self.config.view_strategy!r} has no rays to pair"
            )
            warnings.warn(f"{reason}: falling back to sequential VICReg mode", stacklevel=2)
            by_rays = False
        pairs = tuple(self.config.overlap_pairs) if by_rays else None
        matched = match_features(features, self.plan, self.grid, pairs, self.config.overlap_ratio, view_mask)
        return [of_one for of_one in matched if of_one.x.shape[1] >= self.config.least_matched]

    def count_pairs(self, panoramas: int, views: int, view_mask: torch.Tensor | None = None) -> int:
        """Pairs of views that are compared: the loss is a mean over them, so batches add up by their numbers of pairs.

        Args:
            panoramas, views: B and V of the batch.
            view_mask: [B, V], false for views that show nothing.
        """
        if views < 2:
            return 0
        by_rays = self.config.use_anyres_e2p_vicreg and self._has_rays(views)
        pairs = tuple(self.config.overlap_pairs) if by_rays else None
        groups = token_pairs(self.plan, self.grid, pairs, self.config.overlap_ratio, views, torch.device("cpu"))
        groups = [group for group in groups if group[2].shape[1] >= self.config.least_matched]
        if not groups:
            return 0
        first, second = (torch.cat([group[side][:, 0] for group in groups]) for side in (0, 1))
        if view_mask is None:
            return panoramas * len(first)
        shown = view_mask.cpu().bool()
        return int((shown[:, first] & shown[:, second]).sum())

    def _has_rays(self, views: int) -> bool:
        return self.plan.has_rays and views == self.plan.num_views

    def __call__(
        self, features: torch.Tensor, view_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, VICRegTerms | None]:
        """The loss of a batch of panoramas.

        Args:
            features: [B, V, S, D].
            view_mask: [B, V], false for views that show nothing; no pair has one of these.

        Returns:
            The loss, a scalar, and VICReg's unweighted terms, scalars each (`None` for DenseCL).

        Raises:
            ValueError: for fewer than two views, or views that have no token in common.
            FloatingPointError: for features that are not finite, unless `checks_finite` is false.
        """
        if features.shape[1] < 2:
            raise ValueError(f"VICReg requires at least 2 views, got {features.shape[1]}")
        if self.checks_finite and not torch.compiler.is_compiling():
            check_finite(features, "the features of stage 'vision'")
        matched = self.match(features, view_mask=view_mask)
        if not matched and self.joins_processes:  # the other processes have something, and wait for this one
            nothing = features.flatten(1, 2)[:1, :0]  # [1, 0, D]
            terms = self._terms([(nothing, nothing)])
            return self._weighted(terms), terms
        if not matched:
            raise ValueError(
                self.config.overlap_problem
                or "no two views of these partial panoramas see the same part of what their cameras saw, there is "
                "nothing to compare; leave such panoramas out of stage 'vision'"
            )
        if self.config.overlap_loss == "densecl":
            losses = [densecl(m.x, m.y, temperature=self.config.densecl_temperature) for m in matched]
            return torch.cat(losses).mean(), None
        pairs = [(m.x, m.y) for m in matched]
        if self.config.vicreg_mode == "batchwise":
            x, y = (torch.cat([side.flatten(0, 1) for side in of_all])[None] for of_all in zip(*pairs, strict=True))
            pairs = [(x, y)]  # [1, all, D] each
        terms = self._terms(pairs)
        return self._weighted(terms), terms

    @property
    def joins_processes(self) -> bool:
        """Whether statistics are those of all processes, each of which then has to take part."""
        asked = self.config.vicreg_use_ddp_gather and self.config.vicreg_mode == "batchwise"
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return asked and several and self.config.overlap_loss == "vicreg"

    def _terms(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> VICRegTerms:
        """VICReg's terms, scalars, of matched features [P, L, D]."""
        config = self.config
        terms_of_each = [
            vicreg(
                x,
                y,
                gamma=config.vicreg_gamma,
                mode=config.vicreg_mode,  # type: ignore[arg-type]
                pair_chunk=config.vicreg_pair_chunk,
                gather=config.vicreg_use_ddp_gather,
            )
            for x, y in pairs
        ]
        # In float32 the mean of hundreds of pairs is rounded by more than what two and one process differ in.
        dtype = terms_of_each[0].invariance.dtype
        wide = dtype if terms_of_each[0].invariance.device.type == "mps" else torch.float64  # MPS has no float64
        means = (torch.cat(term).mean(dtype=wide) for term in zip(*terms_of_each, strict=True))
        return VICRegTerms(*(mean.to(dtype) for mean in means))

    def _weighted(self, terms: VICRegTerms) -> torch.Tensor:
        """The loss, a scalar."""
        return (
            self.config.vicreg_similarity_weight * terms.invariance
            + self.config.vicreg_variance_weight * terms.variance
            + self.config.vicreg_covariance_weight * terms.covariance
        )

    def metrics(self, features: torch.Tensor, view_mask: torch.Tensor | None = None) -> dict[str, float]:
        """Is stage `vision` learning or collapsing? See :func:`overlap_metrics`.

        Args:
            features: [B, V, S, D], such as `VisionStageOutput.hidden_states`.
            view_mask: [B, V], false for views that show nothing.

        Returns:
            Means over the pairs of views, always of the pairs by rays where the plan has rays: `cosine_matched`,
            `cosine_random`, `retrieval`, `feature_std`, `effective_rank`.
        """
        totals: dict[str, float] = {}
        matched = self.match(features, self.plan.has_rays, view_mask)
        pairs = sum(len(m.x) for m in matched)
        for m in matched:
            candidates = features.flatten(0, 1)[m.second]  # [N, S, D]
            for name, value in overlap_metrics(m.x, m.y, candidates, m.nearest).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(m.x) / pairs
        return totals


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
        One entry for each number L of matched tokens that occurs, in float32 (float64 stays float64): half precision
        would be off by what interpolation is to avoid. None where nothing matches.
    """
    precision = torch.promote_types(features.dtype, torch.float32)
    matched = []
    for first, second, tokens, corners, weights, nearest in token_pairs(
        plan, grid, overlap_pairs, overlap_ratio, features.shape[1], features.device
    ):
        x = features[:, first, tokens].to(precision)  # [B, P, L, D]
        y = torch.zeros_like(x)
        for corner in range(corners.shape[-1]):  # one at a time: all four would take four times the memory
            y = y + features[:, second, corners[:, :, corner]].to(precision) * weights[:, :, corner]
        first_view = torch.arange(len(features), device=features.device)[:, None] * features.shape[1]
        pairs = [x, y, first_view + second[:, 0], nearest.expand(len(features), -1, -1)]  # each [B, P, ...]
        if view_mask is None:
            matched.append(MatchedFeatures(*(of_all.flatten(0, 1) for of_all in pairs)))
        elif (both := view_mask[:, first[:, 0]] & view_mask[:, second[:, 0]]).any():
            matched.append(MatchedFeatures(*(of_all[both] for of_all in pairs)))
    return matched


@torch.no_grad()
def overlap_metrics(x: Tensor, y: Tensor, candidates: Tensor, target_index: Tensor) -> dict[str, Tensor]:
    """Is it learning or collapsing? Scalars to log beside an overlap loss, without gradient.

    Args:
        x: features of the matched tokens of the one view, `[P, L, D]`, L >= 2.
        y: what the other view says at the same rays (as a rule interpolated), `[P, L, D]`.
        candidates: all tokens of the other view, `[P, S, D]`.
        target_index: of each `x[p, l]`, the token of `candidates[p]` nearest to its true place, `[P, L]`
            integers in [0, S).

    Returns:
        Float32 scalars. Cosines are plain (features are not centred): where all tokens share a large common
        part, `cosine_random` is near 1, and only its distance from `cosine_matched` says something.

        - `cosine_matched`: mean cosine of `x[p, l]` and `y[p, l]`.
        - `cosine_random`: mean cosine of `x[p, l]` and `y[p, m]` over all m != l (all, none sampled).
        - `retrieval`: share of `x[p, l]` whose candidate of largest cosine is `target_index[p, l]`, in
          [0, 1]; 1 / S is chance. Among equal cosines the lowest index counts.
        - `feature_std`: standard deviation over all P * L tokens of `x`, mean over dimensions; 0 is collapse.
        - `effective_rank`: of the same tokens, see `effective_rank`; 1 is collapse to a line.

        Learning: matched above random, retrieval far above 1 / S. Collapse: both cosines near 1, a falling
        `feature_std` (to a point) or `effective_rank` (to few dimensions).

    Raises:
        ValueError: shapes or dtypes that are not as above, L < 2, or an index outside [0, S).
    """
    check_matched(x, y)
    _check_candidates(x, candidates, target_index)
    with no_autocast(x):
        tokens = x.float().flatten(0, 1)  # [P * L, D]
        x, y, candidates = (F.normalize(features.float(), dim=-1) for features in (x, y, candidates))
        length = x.shape[1]
        matched = (x * y).sum((1, 2))  # [P], sums over l
        all_pairs = (x.sum(1) * y.sum(1)).sum(-1)  # [P], sums over l and m
        found = torch.stack([(a @ b.T).argmax(-1) for a, b in zip(x, candidates, strict=True)])  # [P, L]
        return {
            "cosine_matched": matched.mean() / length,
            "cosine_random": (all_pairs - matched).mean() / (length * (length - 1)),
            "retrieval": (found == target_index).float().mean(),
            "feature_std": tokens.std(0).mean(),
            "effective_rank": effective_rank(tokens),
        }


def effective_rank(features: Tensor) -> Tensor:
    """How many directions the centred features `[n, D]` really use: a scalar in [1, min(n - 1, D)].

    Roy, Vetterli, "The effective rank" (EUSIPCO 2007): exp of the entropy of the singular values, normalised
    to sum 1. Singular values below the rounding of the largest count as 0, and constant features have rank 1.
    """
    centred = features - features.mean(0)
    values = torch.linalg.svdvals(centred)  # descending
    noise = max(centred.shape) * torch.finfo(values.dtype).eps
    values = values * (values > noise * values[0])
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum().exp()


def check_finite(features: Tensor, name: str) -> None:
    """Raises `FloatingPointError`, naming `name`, when `features` hold NaN or infinity."""
    if torch.isfinite(features).all():
        return
    nan, infinite = int(features.isnan().sum()), int(features.isinf().sum())
    raise FloatingPointError(
        f"{name} must be finite, got {nan} NaN and {infinite} infinite of {features.numel()} values "
        f"(shape {list(features.shape)}, {features.dtype}). Look at the inputs and at the step before; "
        "in half precision use bfloat16, and for training a lower learning rate or gradient clipping"
    )


def _check_candidates(x: Tensor, candidates: Tensor, target_index: Tensor) -> None:
    pairs, length, dim = x.shape
    if length < 2:
        raise ValueError(f"overlap_metrics needs at least 2 matched tokens in each pair, got {length}")
    if candidates.ndim != 3 or candidates.shape[::2] != (pairs, dim) or candidates.shape[1] == 0:
        raise ValueError(f"candidates must be [{pairs}, tokens, {dim}], got {list(candidates.shape)}")
    if target_index.shape != (pairs, length) or target_index.is_floating_point():
        raise ValueError(
            f"target_index must be integers [{pairs}, {length}], one for each matched token, "
            f"got {target_index.dtype} {list(target_index.shape)}"
        )
    low, high, size = int(target_index.min()), int(target_index.max()), candidates.shape[1]
    if low < 0 or high >= size:
        raise ValueError(f"target_index must be in [0, {size - 1}], got values from {low} to {high}")
