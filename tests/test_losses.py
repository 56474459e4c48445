"""The overlap losses against the papers' formulas, written out plainly in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from panorama_vlm.losses_panorama import VICRegTerms, densecl, vicreg
from panorama_vlm.overlap_panorama import check_finite, effective_rank, overlap_metrics
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = {"rtol": 1e-6, "atol": 1e-12}
WEIGHTS = (25.0, 25.0, 1.0)
NARROW, WIDE = (5, 24, 7), (5, 9, 40)  # P, L, D with L > D (covariance form) and L < D (Gram form)


def random_features(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two correlated branches off the origin, whose dimensions lie on both sides of the variance hinge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = x + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.2, 2.0, shape[-1], dtype=torch.float64)
    return (x * scale + 0.7).to(dtype).requires_grad_(), (y * scale - 0.3).to(dtype).requires_grad_()


def paper_vicreg(x: Tensor, y: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, ...]:
    """Algorithm 1 of the VICReg paper on one set of tokens, `[n, D]` twice -> three scalars."""

    def variance_and_covariance(z: Tensor) -> tuple[Tensor, Tensor]:
        n, dim = z.shape
        std = torch.sqrt(z.var(dim=0) + eps)
        z = z - z.mean(dim=0)
        covariance = (z.T @ z) / (n - 1)
        off_diagonal = covariance[~torch.eye(dim, dtype=torch.bool)]
        return torch.mean(F.relu(gamma - std)), off_diagonal.pow(2).sum() / dim

    (var_x, cov_x), (var_y, cov_y) = variance_and_covariance(x), variance_and_covariance(y)
    return F.mse_loss(x, y), var_x + var_y, cov_x + cov_y


def paper_terms(x: Tensor, y: Tensor, mode: str, **options: float) -> VICRegTerms:
    sets = zip(x, y, strict=True) if mode == "pairwise" else [(x.flatten(0, 1), y.flatten(0, 1))]
    terms = [paper_vicreg(a, b, **options) for a, b in sets]
    return VICRegTerms(*(torch.stack(term) for term in zip(*terms, strict=True)))


def weighted(terms: VICRegTerms) -> Tensor:
    """A scalar to which pairs contribute unequally, so that a gradient on the wrong pair shows."""
    pair_weights = torch.arange(1, len(terms.invariance) + 1)
    return sum(weight * (pair_weights * term).sum() for weight, term in zip(WEIGHTS, terms, strict=True))


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_close(actual: object, expected: object, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TOLERANCE))


# VICReg


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["tokens>dimensions", "tokens<dimensions"])
@pytest.mark.parametrize("mode", ["pairwise", "batchwise"])
@pytest.mark.parametrize("pair_chunk", [1, 3, 7])
def test_terms_and_gradients_are_those_of_the_papers_formula(shape, mode, pair_chunk):
    x, y = random_features(shape)
    terms, expected = vicreg(x, y, mode=mode, pair_chunk=pair_chunk), paper_terms(x, y, mode)
    assert_close(tuple(terms), tuple(expected))
    for term, reference in zip(terms, expected, strict=True):  # each alone: large weights hide small terms
        assert_close(
            gradients(weighted(VICRegTerms(term, term * 0, term * 0)), x, y),
            gradients(weighted(VICRegTerms(reference, reference * 0, reference * 0)), x, y),
        )
    assert_close(gradients(weighted(vicreg(x, y, mode=mode)), x, y), gradients(weighted(expected), x, y))


@pytest.mark.parametrize("mode", ["pairwise", "batchwise"])
def test_as_many_tokens_as_dimensions_and_two_tokens_are_no_special_cases(mode):
    for shape in [(3, 8, 8), (3, 2, 6), (2, 9, 1), (1, 2, 4)]:
        x, y = random_features(shape)
        terms, expected = vicreg(x, y, mode=mode), paper_terms(x, y, mode)
        assert_close(tuple(terms), tuple(expected))
        assert_close(gradients(weighted(terms), x, y), gradients(weighted(expected), x, y))


@pytest.mark.parametrize("mode", ["pairwise", "batchwise"])
def test_a_wider_hinge_and_another_epsilon_are_those_of_the_formula(mode):
    x, y = random_features(WIDE)
    terms = vicreg(x, y, gamma=1.7, eps=1e-2, mode=mode)
    assert_close(tuple(terms), tuple(paper_terms(x, y, mode, gamma=1.7, eps=1e-2)))


def test_pooled_statistics_take_in_many_tokens_piece_by_piece():
    x, y = random_features((3, 1100, 5))  # more tokens than are taken in at once
    terms, expected = vicreg(x, y, mode="batchwise"), paper_terms(x, y, "batchwise")
    assert_close(tuple(terms), tuple(expected))
    assert_close(gradients(weighted(terms), x, y), gradients(weighted(expected), x, y))


def test_terms_are_one_value_a_pair_or_one_in_all():
    x, y = random_features(WIDE)
    assert [term.shape for term in vicreg(x, y)] == [(5,)] * 3
    assert [term.shape for term in vicreg(x, y, mode="batchwise")] == [(1,)] * 3


@pytest.mark.parametrize("shape", [NARROW, WIDE])
def test_equal_views_have_no_invariance_and_constant_ones_no_covariance(shape):
    x, _ = random_features(shape)
    assert_close(vicreg(x, x).invariance, torch.zeros(5, dtype=x.dtype))
    constant = torch.full(shape, 3.0)
    terms = vicreg(constant, constant, gamma=2.0)
    assert_close(terms.variance, torch.full((5,), 2 * (2.0 - 0.01)))  # both branches, sqrt(eps) = 0.01
    assert_close(terms.covariance, torch.zeros(5))


@pytest.mark.parametrize("shape", [(4, 96, 24), (4, 24, 96)])
@pytest.mark.parametrize("mode", ["pairwise", "batchwise"])
def test_half_precision_features_under_autocast_give_float32_terms(shape, mode):
    x, y = random_features(shape, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = vicreg(x, y, mode=mode)
        grads = gradients(weighted(terms), x, y)  # a backward under autocast must not lose precision either
    reference = [z.detach().double().requires_grad_() for z in (x, y)]
    expected = paper_terms(*reference, mode)
    assert {term.dtype for term in terms} == {torch.float32}
    assert_close(tuple(term.double() for term in terms), tuple(expected), rtol=5e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, gradients(weighted(expected), *reference), strict=True):
        assert grad.dtype == torch.bfloat16
        assert_close(grad.double(), expected_grad, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16


def test_float32_features_under_autocast_are_not_rounded_to_half_precision():
    x, y = random_features(WIDE, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [*vicreg(x, y), *gradients(weighted(vicreg(x, y)), x, y), densecl(x, y)]
    outside = [*vicreg(x, y), *gradients(weighted(vicreg(x, y)), x, y), densecl(x, y)]
    assert_close(inside, outside)


@pytest.mark.parametrize("shape", [(13, 12, 64), (13, 64, 12)])
def test_autograd_keeps_no_matrix_larger_than_the_features_of_a_chunk(shape):
    pair_chunk = 3
    x, y = random_features(shape, torch.float32)
    features = {z.untyped_storage().data_ptr() for z in (x, y)}  # there anyway
    for mode in ("pairwise", "batchwise"):
        kept = kept_for_backward(lambda mode=mode: weighted(vicreg(x, y, mode=mode, pair_chunk=pair_chunk)))
        new = [tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in features]
        bound = pair_chunk * min(shape[1], shape[2]) ** 2 if mode == "pairwise" else shape[2] ** 2
        assert max(new) <= max(bound, pair_chunk * shape[2])
        assert sum(new) <= 3 * x.numel()


def kept_for_backward(forward) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return kept


def test_vicreg_refuses_what_has_no_statistics_and_says_why():
    x, y = random_features(WIDE)
    with pytest.raises(ValueError, match="pairwise VICReg needs at least 2 .* in each pair, got 1"):
        vicreg(x[:, :1], y[:, :1])
    assert vicreg(x[:, :1], y[:, :1], mode="batchwise").covariance.shape == (1,)  # five tokens in all
    with pytest.raises(ValueError, match="batchwise VICReg needs at least 2 .* in the whole batch, got 1"):
        vicreg(x[:1, :1], y[:1, :1], mode="batchwise")


@pytest.mark.parametrize("loss", [vicreg, densecl])
def test_features_of_other_shapes_or_types_are_refused(loss):
    x, y = random_features(WIDE)
    with pytest.raises(ValueError, match=r"got \[5, 9, 40\] and \[5, 8, 40\]"):
        loss(x, y[:, 1:])
    with pytest.raises(ValueError, match=r"got \[9, 40\] and \[9, 40\]"):
        loss(x[0], y[0])
    with pytest.raises(ValueError, match=r"got \[0, 9, 40\]"):
        loss(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        loss(x.long(), y.long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "global"}, "must be one of 'pairwise', 'batchwise', got 'global'"),
        ({"pair_chunk": 0}, "pair_chunk must be at least 1, got 0"),
        ({"gamma": 0.0}, "must be positive, got 0.0"),
        ({"eps": float("nan")}, "must be positive, got 1.0 and nan"),
    ],
)
def test_vicreg_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vicreg(*random_features(WIDE), **options)


# VICReg over processes. Each process runs this file as a script: see the last lines.

PAIRS_OF_RANK = (3, 5)  # pairs that the two processes hold: unequal on purpose
DISTRIBUTED_SHAPES = {"tokens>dimensions": (8, 6, 7), "tokens<dimensions": (8, 3, 40)}


def one_of_two_processes(rank: int, folder: Path) -> None:
    """Saves this process's joint terms and the gradient of a shared weight, before DDP would average it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, shape in DISTRIBUTED_SHAPES.items():
        x, y = (z.detach().split(PAIRS_OF_RANK)[rank] for z in random_features(shape))
        weight = shared_weight(shape[-1])
        terms = vicreg(x @ weight, y @ weight, mode="batchwise", pair_chunk=2, gather=True)
        results[name] = (tuple(term.detach() for term in terms), *gradients(weighted(terms), weight))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def shared_weight(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5).requires_grad_()


def test_two_processes_with_gather_give_the_loss_and_gradient_of_one_on_the_joined_batch(tmp_path):
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, shape in DISTRIBUTED_SHAPES.items():
        x, y = (z.detach() for z in random_features(shape))
        weight = shared_weight(shape[-1])
        expected = paper_terms(x @ weight, y @ weight, "batchwise")
        assert_close(first[name][0], tuple(term.detach() for term in expected))
        assert_close(second[name][0], first[name][0])
        averaged = (first[name][1] + second[name][1]) / 2  # what DistributedDataParallel does
        assert_close((averaged,), gradients(weighted(expected), weight))


def test_gather_without_other_processes_changes_nothing():
    x, y = random_features(NARROW)
    assert_close(tuple(vicreg(x, y, mode="batchwise", gather=True)), tuple(vicreg(x, y, mode="batchwise")))


# DenseCL


def plain_densecl(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions on the full matrices `[L, L]`, one pair after the other -> `[P]`."""
    losses = []
    for a, b in zip(x, y, strict=True):
        logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature
        target = torch.arange(len(a))
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses)


@pytest.mark.parametrize("max_entries", [11, 25, 64, 121, 300, 2**22])  # one row .. one pair .. all at once
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_densecl_is_cross_entropy_on_the_full_matrix_however_it_is_cut(max_entries, temperature):
    x, y = random_features((5, 11, 6))
    loss, expected = densecl(x, y, temperature, max_entries), plain_densecl(x, y, temperature)
    weights = torch.arange(1, 6)
    assert_close(loss, expected)
    assert_close(gradients((weights * loss).sum(), x, y), gradients((weights * expected).sum(), x, y))


def test_densecl_computes_and_keeps_no_matrix_above_its_bound():
    x, y = random_features((6, 50, 4), torch.float32)
    bound = 8 * 50
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if is_matrix(t))
            return result

    def is_matrix(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim == 3 and value.shape[-1] == 50

    with Watch():
        loss = densecl(x, y, max_entries=bound).sum()
        loss.backward()
    assert max(seen) == bound  # the largest was made, and none above it
    kept = kept_for_backward(lambda: densecl(x, y, max_entries=bound))
    assert max(tensor.numel() for tensor in kept) <= x.numel()
    assert not any(is_matrix(tensor) for tensor in kept)


def test_densecl_is_small_for_matches_that_stand_out_and_log_of_the_count_for_equal_tokens():
    distinct = torch.eye(16).expand(2, 16, 16)
    assert densecl(distinct, distinct, temperature=0.05).max() < 1e-6
    assert_close(densecl(torch.ones(2, 16, 4), torch.ones(2, 16, 4)), torch.full((2,), 16.0).log())


def test_densecl_options_out_of_range_are_named():
    x, y = random_features(WIDE)
    with pytest.raises(ValueError, match="got 1: use a larger overlap"):
        densecl(x[:, :1], y[:, :1])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        densecl(x, y, temperature=0)
    with pytest.raises(ValueError, match="max_entries must hold one row of 9 matched tokens, got 8"):
        densecl(x, y, max_entries=8)


# Metrics


def test_metrics_of_identical_views_are_perfect_and_random_ones_at_chance():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(4, 64, 48, generator=generator)
    target = torch.stack([torch.randperm(64, generator=generator)[:40] for _ in range(4)])
    matched = candidates.gather(1, target[..., None].expand(-1, -1, 48))
    same = overlap_metrics(matched, matched, candidates, target)
    assert_close(same["cosine_matched"], torch.tensor(1.0))
    assert same["retrieval"] == 1.0
    assert abs(same["cosine_random"]) < 0.02
    other = overlap_metrics(torch.randn(4, 40, 48, generator=generator), matched, candidates, target)
    assert other["retrieval"] < 5 / 64
    assert abs(other["cosine_matched"]) < 0.05


def test_random_cosine_is_the_mean_over_all_other_tokens_of_the_pair():
    x, y = random_features((3, 7, 5), torch.float32)
    cosines = F.cosine_similarity(x[:, :, None], y[:, None], dim=-1)  # [P, L, L]
    metrics = overlap_metrics(x, y, y, torch.arange(7).expand(3, 7))
    assert_close(metrics["cosine_random"], cosines[:, ~torch.eye(7, dtype=torch.bool)].mean().detach())
    assert_close(metrics["cosine_matched"], cosines.diagonal(dim1=1, dim2=2).mean().detach())
    assert_close(metrics["retrieval"], (cosines.argmax(-1) == torch.arange(7)).float().mean())


def test_metrics_show_collapse_to_a_point_and_to_a_line():
    target = torch.zeros(2, 16, dtype=torch.long)
    point = torch.full((2, 16, 8), 0.3)
    metrics = overlap_metrics(point, point, point, target)
    assert metrics["feature_std"] < 1e-6
    assert_close(metrics["effective_rank"], torch.tensor(1.0))
    assert_close(metrics["cosine_random"], torch.tensor(1.0))
    line = torch.randn(2, 16, 1) * torch.ones(8)
    metrics = overlap_metrics(line, line, line, target)
    assert_close(metrics["effective_rank"], torch.tensor(1.0), rtol=1e-4, atol=0)


def test_effective_rank_counts_directions_used_alike():
    directions = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    for rank in (1, 3, 16):
        features = torch.cat([directions[:rank], -directions[:rank]])  # centred, equal singular values
        assert_close(effective_rank(features), torch.tensor(float(rank), dtype=torch.float64))
    assert effective_rank(torch.randn(500, 32)) > 30


def test_metrics_are_float32_scalars_without_gradient_for_any_precision():
    x, y = random_features(WIDE, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = overlap_metrics(x, y, y, torch.arange(9).expand(5, 9))
    assert list(metrics) == ["cosine_matched", "cosine_random", "retrieval", "feature_std", "effective_rank"]
    for value in metrics.values():
        assert (value.dtype, value.shape, value.requires_grad) == (torch.float32, (), False)
    exact = overlap_metrics(x.double(), y.double(), y.double(), torch.arange(9).expand(5, 9))
    assert_close(metrics, exact, rtol=1e-5, atol=1e-6)


def test_metrics_refuse_candidates_and_targets_that_do_not_fit():
    x, y = random_features(WIDE)
    target = torch.zeros(5, 9, dtype=torch.long)
    with pytest.raises(ValueError, match=r"candidates must be \[5, tokens, 40\], got \[4, 9, 40\]"):
        overlap_metrics(x, y, y[1:], target)
    with pytest.raises(ValueError, match=r"must be integers \[5, 9\].* got torch.float32 \[5, 9\]"):
        overlap_metrics(x, y, y, target.float())
    with pytest.raises(ValueError, match=r"target_index must be in \[0, 8\], got values from 0 to 9"):
        overlap_metrics(x, y, y, target.index_fill(1, torch.tensor([3]), 9))
    with pytest.raises(ValueError, match="at least 2 matched tokens"):
        overlap_metrics(x[:, :1], y[:, :1], y, target[:, :1])


def test_features_that_are_not_finite_are_named():
    features = torch.zeros(2, 3, dtype=torch.bfloat16)
    check_finite(features, "the resampler's output")
    features[0, 1], features[1, 2], features[1, 0] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(FloatingPointError, match="resampler's output must be .* 1 NaN and 2 infinite of 6"):
        check_finite(features, "the resampler's output")


if __name__ == "__main__":
    one_of_two_processes(rank=int(sys.argv[1]), folder=Path(sys.argv[2]))
