"""Overlap losses: what two views say of the same directions should agree, and should not collapse.

They work on *matched* features: `x[p, l]` and `y[p, l]` are what the two views of pair `p` say of the same
ray. Which tokens match is the business of the geometry; these functions only compare them.

Shapes: P pairs of views, L matched tokens a pair, D feature dimensions, S tokens a view.

Everything is computed in float32 (float64 stays float64), under autocast and for half precision too.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VICREG_MODES = ("pairwise", "batchwise")
POOLED_ROWS = 1024  # batchwise statistics take in at most this many tokens at a time


class VICRegTerms(NamedTuple):
    """The three terms of VICReg, unweighted, one value a pair: `[P]` each (`[1]` in batchwise mode).

    The paper's loss is `25 * invariance + 25 * variance + 1 * covariance`.
    """

    invariance: Tensor
    """Mean squared difference of matched features, >= 0."""
    variance: Tensor
    """Hinge on the standard deviation of each dimension, in [0, 2 * gamma]; 0 when no dimension is flat."""
    covariance: Tensor
    """Squared off-diagonal covariances, per dimension, >= 0; 0 when the dimensions are uncorrelated."""


def vicreg(
    x: Tensor,
    y: Tensor,
    gamma: float = 1.0,
    mode: Literal["pairwise", "batchwise"] = "pairwise",
    pair_chunk: int = 8,
    eps: float = 1e-4,
    gather: bool = False,
) -> VICRegTerms:
    """Variance-invariance-covariance regularisation of matched features.

    Algorithm 1 of Bardes, Ponce, LeCun, "VICReg" (ICLR 2022). With n tokens in the statistics and C the
    unbiased covariance (divided by n - 1) of one branch:

        invariance = mean over tokens and dimensions of (x - y)^2
        variance   = mean_d relu(gamma - sqrt(C_dd + eps)),   summed over the two branches
        covariance = sum_{i != j} C_ij^2 / D,                 summed over the two branches

    Args:
        x, y: matched features `[P, L, D]`, floating point.
        gamma: the standard deviation below which a dimension is pushed apart, > 0.
        mode: `"pairwise"`: statistics over the L tokens of each pair, terms `[P]`. `"batchwise"`: one set of
            statistics over all P * L tokens, terms `[1]`.
        pair_chunk: how many pairs are worked on at once, >= 1 (batchwise: their tokens, or 1024 if that is
            less). It bounds the temporaries and does not change the result.
        eps: keeps the gradient of the square root finite, > 0.
        gather: batchwise only (pairwise statistics never leave their pair, so it changes nothing there): the
            statistics are those of the tokens of all processes, which may hold different numbers of them, or none.
            Every process must call it, with the same D. Without a process group it changes nothing.

    **Covariance.** The off-diagonal has two exact forms: from the D x D covariance itself, or, because
    `||X^T X||_F = ||X X^T||_F`, from the n x n Gram matrix of the centred tokens less the squared variances.
    The smaller of the two matrices is computed. The gradient is analytic, so that autograd keeps this one
    matrix (never larger than the features it stands for) and no intermediate. Gathered statistics always
    take the D x D form: it is a sum over tokens, so that processes exchange D * D numbers, not tokens.

    **Gradient with `gather`.** Each process returns the joint loss, and its gradient is the number of
    processes times that of the joint loss with respect to its own tokens (as in `torch.distributed.nn`: the
    derivative of the sum of all processes' losses). DistributedDataParallel averages over processes, so that
    parameters get exactly the gradient of one process on the joined batch. Backward communicates nothing; it
    takes for granted that every process weights the loss alike.

    Raises:
        ValueError: shapes, dtypes, mode or numbers that are not as above, or fewer than two tokens in the
            statistics (L < 2; batchwise P * L < 2, over all processes with `gather`).
    """
    check_matched(x, y, may_be_empty=gather and mode == "batchwise")
    if mode not in VICREG_MODES:
        raise ValueError(f"vicreg mode must be one of {', '.join(map(repr, VICREG_MODES))}, got {mode!r}")
    if pair_chunk < 1:
        raise ValueError(f"pair_chunk must be at least 1, got {pair_chunk}. Typical range: [4, 16]")
    if not (gamma > 0 and eps > 0):
        raise ValueError(f"gamma and eps must be positive, got {gamma} and {eps}. Typical: 1.0 and 1e-4")

    with no_autocast(x):
        x, y = full_precision(x), full_precision(y)
        if mode == "pairwise":
            return _vicreg_pairwise(x, y, gamma, pair_chunk, eps)
        return _vicreg_batchwise(x, y, gamma, pair_chunk, eps, gather)


def _vicreg_pairwise(x: Tensor, y: Tensor, gamma: float, pair_chunk: int, eps: float) -> VICRegTerms:
    """`vicreg` with statistics inside each pair: `[P, L, D]` twice -> terms `[P]`."""
    _check_token_count(x.shape[1], "pairwise")
    chunks = []
    for x_part, y_part in zip(x.split(pair_chunk), y.split(pair_chunk), strict=True):  # [c, L, D]
        invariance = F.mse_loss(x_part, y_part, reduction="none").mean((1, 2))  # [c]
        moments = [_PairMoments.apply(part) for part in (x_part, y_part)]
        chunks.append((invariance, *_penalties(moments, gamma, eps)))
    return VICRegTerms(*(torch.cat(term) for term in zip(*chunks, strict=True)))


def _vicreg_batchwise(
    x: Tensor,
    y: Tensor,
    gamma: float,
    pair_chunk: int,
    eps: float,
    gather: bool,
) -> VICRegTerms:
    """`vicreg` with statistics over all tokens (of all processes with `gather`): terms `[1]`."""
    pairs, length, dim = x.shape
    gather = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    total = _count_over_processes(pairs * length, x.device) if gather else pairs * length
    _check_token_count(total, "batchwise")

    x, y = x.reshape(1, pairs * length, dim), y.reshape(1, pairs * length, dim)
    rows = max(1, min(pair_chunk * length, POOLED_ROWS))
    parts = zip(x.split(rows, 1), y.split(rows, 1), strict=True)
    squared = torch.stack([F.mse_loss(a, b, reduction="sum") for a, b in parts]).sum(0, keepdim=True)  # [1]
    if gather:
        squared = _SumOverProcesses.apply(squared)
    if gather or total > dim:
        moments = [_PooledMoments.apply(z[0], total, rows, gather) for z in (x, y)]
    else:
        moments = [_PairMoments.apply(z) for z in (x, y)]
    return VICRegTerms(squared / (total * dim), *_penalties(moments, gamma, eps))


def _penalties(moments: list[tuple[Tensor, Tensor]], gamma: float, eps: float) -> tuple[Tensor, Tensor]:
    """The variance and covariance terms, `[P]`, from what `_PairMoments` says of each branch."""
    variance = [F.relu(gamma - (diagonal + eps).sqrt()).mean(-1) for diagonal, _ in moments]
    covariance = [off_diagonal / diagonal.shape[-1] for diagonal, off_diagonal in moments]
    return torch.stack(variance).sum(0), torch.stack(covariance).sum(0)


class _PairMoments(torch.autograd.Function):
    """Tokens `[P, n, D]` -> of each pair's covariance the diagonal `[P, D]` and `sum_{i != j} C_ij^2` `[P]`.

    With X the centred tokens, `C = X^T X / (n - 1)` and `G = X X^T / (n - 1)`, the gradients are

        d C_dd / dX             = 2 / (n - 1) * X                       (column d)
        d sum_{i != j} C^2 / dX = 4 / (n - 1) * X (C - diag C) = 4 / (n - 1) * (G X - X diag C)

    Their columns sum to zero, so that they hold for the tokens before centring too.
    Left to autograd, the same forms took 1.5 to 1.7 times as long and 1.2 to 1.7 times the memory (L = 128 of D = 768
    and 1024, P = 16 to 64, one and two threads): it keeps the centred tokens and multiplies the matrix twice.

    The Gram form takes the difference of two sums. In float32 its value is good to 1e-6 for features of like
    scale, and to 2e-4 with one dimension a hundred times the others; the gradient keeps 1e-5 there.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        count, dim = tokens.shape[1:]
        centre = tokens.mean(1, keepdim=True)  # [P, 1, D]
        centred = tokens - centre
        ctx.gram_form = count < dim
        if ctx.gram_form:
            matrix = (centred @ centred.mT).div_(count - 1)  # [P, n, n]
            diagonal = centred.square_().sum(1) / (count - 1)  # [P, D]
            energy = matrix.square().sum((1, 2)) - diagonal.square().sum(1)
            off_diagonal = energy.clamp(min=0)  # rounding only: the two sums are equal when C is diagonal
        else:
            matrix = (centred.mT @ centred).div_(count - 1)  # [P, D, D]
            diagonal = _take_diagonal(matrix)
            off_diagonal = matrix.square().sum((1, 2))
        ctx.save_for_backward(tokens, centre, diagonal, matrix)
        return diagonal, off_diagonal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_diagonal: Tensor, grad_off_diagonal: Tensor) -> Tensor:
        tokens, centre, diagonal, matrix = ctx.saved_tensors
        scale = 1 / (tokens.shape[1] - 1)
        of_diagonal = (2 * scale) * grad_diagonal[:, None]  # [P, 1, D]
        of_energy = (4 * scale) * grad_off_diagonal[:, None, None]  # [P, 1, 1]
        with no_autocast(tokens):
            centred = tokens - centre
            if ctx.gram_form:
                own = centred * (of_diagonal - of_energy * diagonal[:, None])
                return torch.baddbmm(own, of_energy * matrix, centred)
            return torch.baddbmm(centred * of_diagonal, centred, of_energy * matrix)


class _PooledMoments(torch.autograd.Function):
    """`_PairMoments` of one set of tokens `[n, D]`, `rows` at a time, in the D x D form: `[1, D]` and `[1]`.

    `total` is the number of tokens, of all processes when `gather`; then sums run over all processes, and the
    gradient is multiplied by their number (see `vicreg`).
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, total: int, rows: int, gather: bool) -> tuple[Tensor, Tensor]:
        centre = tokens.sum(0)
        if gather:
            dist.all_reduce(centre)
        centre /= total
        matrix = tokens.new_zeros(tokens.shape[1], tokens.shape[1])  # [D, D]
        for part in tokens.split(rows):
            centred = part - centre
            matrix.addmm_(centred.T, centred)
        if gather:
            dist.all_reduce(matrix)
        matrix /= total - 1
        diagonal = _take_diagonal(matrix)
        ctx.save_for_backward(tokens, centre, matrix)
        ctx.rows = rows
        ctx.scale = (dist.get_world_size() if gather else 1) / (total - 1)
        return diagonal[None], matrix.square().sum()[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_diagonal: Tensor, grad_off_diagonal: Tensor) -> tuple[Tensor | None, ...]:
        tokens, centre, matrix = ctx.saved_tensors
        of_diagonal = (2 * ctx.scale) * grad_diagonal  # [1, D]
        of_matrix = (4 * ctx.scale) * grad_off_diagonal * matrix  # [D, D]
        grad = torch.empty_like(tokens)
        with no_autocast(tokens):
            for part, out in zip(tokens.split(ctx.rows), grad.split(ctx.rows), strict=True):
                centred = part - centre
                torch.addmm(centred * of_diagonal, centred, of_matrix, out=out)
        return grad, None, None, None


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is multiplied by their number (see `vicreg`)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * dist.get_world_size()


def _count_over_processes(count: int, device: torch.device) -> int:
    """The sum of `count` over all processes."""
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


def _take_diagonal(matrix: Tensor) -> Tensor:
    """Returns the diagonal of `[..., D, D]` and leaves zeros in its place."""
    view = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal = view.clone()
    view.zero_()
    return diagonal


def densecl(x: Tensor, y: Tensor, temperature: float = 0.2, max_entries: int = 2**22) -> Tensor:
    """Symmetric InfoNCE over matched tokens: each token must find its match among all tokens of its pair.

    The dense contrastive loss of Wang et al., "DenseCL" (CVPR 2021, eq. 2), with InfoNCE's in-batch negatives
    (van den Oord, Li, Vinyals, "CPC", 2018, eq. 4). With s_lm the cosine of x_l and y_m:

        loss = -1/2L * sum_l [log softmax_m(s_lm / temperature)_l + log softmax_m(s_ml / temperature)_l]

    Args:
        x, y: matched features `[P, L, D]`, floating point; they need no normalisation. The negatives of a
            token are all other tokens of the other side of the same pair.
        temperature: > 0; the paper's is 0.2.
        max_entries: the most entries a similarity matrix may have at once, >= L. Larger ones are computed in
            parts and once more in backward, so that none is kept: while a part is worked on, a few tensors
            of at most this many entries exist. The result does not depend on it.

    Returns:
        The loss of each pair, `[P]`: 0 when every match stands out, log(L) when all tokens look the same.

    Raises:
        ValueError: shapes, dtypes or numbers that are not as above, or L < 2 (there would be no negatives).
    """
    check_matched(x, y)
    length = x.shape[1]
    if length < 2:
        raise ValueError(f"densecl needs 2 or more matched tokens a pair, got {length}: use a larger overlap")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}. Typical range: [0.07, 0.5]")
    if max_entries < length:
        raise ValueError(f"max_entries must hold one row of {length} matched tokens, got {max_entries}")

    with no_autocast(x):
        x = F.normalize(full_precision(x), dim=-1)
        y = F.normalize(full_precision(y), dim=-1)
        match = (x * y).sum(-1) / temperature  # [P, L]
        x_to_y = _row_logsumexp(x, y, temperature, max_entries)  # [P, L]
        y_to_x = _row_logsumexp(y, x, temperature, max_entries)
        return ((x_to_y + y_to_x) / 2 - match).mean(-1)


def _row_logsumexp(queries: Tensor, keys: Tensor, temperature: float, max_entries: int) -> Tensor:
    """`logsumexp_m(queries_l . keys_m / temperature)` `[P, L]`, keeping no `[.., L]` matrix for backward."""

    def part(q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).div_(temperature).logsumexp(-1)

    length = keys.shape[1]
    rows = min(length, max_entries // length)
    pairs = max(1, max_entries // (rows * length))
    sums = [
        torch.cat([recomputed(part, q, k) for q in queries_of_pairs.split(rows, 1)], 1)
        for queries_of_pairs, k in zip(queries.split(pairs), keys.split(pairs), strict=True)
    ]
    return torch.cat(sums)


def recomputed(function: Any, *tensors: Tensor, random: bool = False) -> Tensor:
    """`function(*tensors)`, whose intermediates are computed again in backward instead of kept.

    `random`: whether it may draw random numbers, which then are the same again.
    """
    result: Tensor = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=random)
    return result


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A block without autocast on the device of a tensor."""
    return torch.autocast(tensor.device.type, enabled=False)


def full_precision(features: Tensor) -> Tensor:
    """float64 stays float64, everything else becomes float32."""
    return features if features.dtype == torch.float64 else features.float()


def check_matched(x: Tensor, y: Tensor, may_be_empty: bool = False) -> None:
    """Raises `ValueError` unless `x` and `y` are `[P, L, D]`, floating point and not empty (where that is asked)."""
    if x.ndim != 3 or x.shape != y.shape or (math.prod(x.shape) == 0 and not may_be_empty):
        raise ValueError(
            "matched features must be two non-empty tensors of one shape [pairs, tokens, dimensions], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"matched features must be floating point, got {x.dtype} and {y.dtype}")


def _check_token_count(count: int, mode: str) -> None:
    if count < 2:
        where = "each pair" if mode == "pairwise" else "the whole batch"
        raise ValueError(
            f"{mode} VICReg needs at least 2 matched tokens in {where}, got {count}: "
            "use a larger overlap" + (" or mode 'batchwise'" if mode == "pairwise" else " or more pairs")
        )
