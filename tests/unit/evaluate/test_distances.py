"""KID, CMMD, precision and its relatives, Inception Score, diversity: closed forms, and independent implementations."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.evaluate.metrics.accumulate import AllFeatures, Diversity, InceptionScore
from fewstep.evaluate.metrics.distances import (
    cmmd,
    density_coverage,
    diversity,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fewstep.evaluate.metrics.frechet import frechet_distance, warn_few
from fewstep.evaluate.statistics import Moments, moments


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() + shift


# Kernel distances -----------------------------------------------------------------------------------------------------


def test_kid_of_two_points_is_written_out() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()
    # Kernels: x1.x2 = 0 -> 1; y1.y2 = 2 -> (2 / 2 + 1)^3 = 8; every x.y = 1 -> (1 / 2 + 1)^3 = 3.375.
    assert kernel_distance(x, y, subsets=3, subset_size=2) == pytest.approx(1 + 8 - 2 * 3.375, rel=1e-14)


def test_kid_is_unbiased() -> None:
    values = [kernel_distance(draw(40, 3, 2 * s), draw(40, 3, 2 * s + 1), subsets=1) for s in range(300)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error


def test_kid_equals_torch_fidelity() -> None:
    peer: Any = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = draw(300, 16, 0), draw(250, 16, 1, shift=0.2)
    settings = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    wanted = peer.kid_features_to_metric(x, y, **settings)[peer.KEY_METRIC_KID_MEAN]
    assert kernel_distance(x, y, subsets=20, subset_size=100) == pytest.approx(wanted, rel=1e-12)


def test_cmmd_of_two_directions_is_written_out() -> None:
    x, y = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[0.0, 0.5]]).double()
    # Unit vectors at a right angle are sqrt(2) apart: k = exp(-2 / 200).
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), rel=1e-12)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_equals_the_papers_formula_on_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.evaluate.metrics.distances.BLOCK", 7)
    x, y = draw(30, 8, 0), draw(20, 8, 1, shift=0.5)
    u, v = (a / a.norm(dim=1, keepdim=True) for a in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-torch.cdist(a, b).square() / (2 * 10.0**2)).mean())

    assert cmmd(x, y) == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)), rel=1e-9)


# Neighbours -----------------------------------------------------------------------------------------------------------


def test_neighbours_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]]).double()  # distances to the nearest: 1, 1, 1, 8
    generated = torch.tensor([[0.5], [1.5], [30.0]]).double()  # to the nearest: 1, 1, 28.5
    # 0.5 lies in the balls of 0 and 1; 1.5 in those of 1 and 2; 30 in none; none of them reaches 10 - 8 = 2.
    assert precision_recall(generated, real, nearest_k=1)[0] == pytest.approx(2 / 3)
    # Generated balls [-0.5, 1.5], [0.5, 2.5], [1.5, 58.5] hold all four real points.
    assert precision_recall(generated, real, nearest_k=1)[1] == 1
    density, coverage = density_coverage(generated, real, nearest_k=1)
    assert density == pytest.approx((2 + 2 + 0) / 3)
    assert coverage == pytest.approx(3 / 4)


def test_neighbours_equal_prdc_and_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.evaluate.metrics.distances.BLOCK", 64)
    x, y = draw(220, 4, 0, shift=0.8), draw(200, 4, 1)
    ours = precision_recall(x, y, nearest_k=5) + density_coverage(x, y, nearest_k=5)
    assert all(0.05 < value < 1.5 for value in ours)
    prdc: Any = pytest.importorskip("prdc")
    theirs = prdc.compute_prdc(y.numpy(), x.numpy(), nearest_k=5)
    assert ours == pytest.approx(tuple(theirs[k] for k in ("precision", "recall", "density", "coverage")), rel=1e-12)
    fidelity: Any = pytest.importorskip("torch_fidelity.metric_prc")
    assert ours[:2] == pytest.approx(fidelity.calculate_precision_recall_full(x, y, 5), rel=1e-6)


def test_collapse_shows_in_recall_and_coverage_not_in_precision() -> None:
    real = draw(300, 4, 0)
    collapsed = draw(300, 4, 1) * 0.05
    precision, recall = precision_recall(collapsed, real, nearest_k=5)
    assert precision > 0.95 and recall < 0.1
    assert density_coverage(collapsed, real, nearest_k=5)[1] < 0.3


def test_mismatches_are_reported() -> None:
    with pytest.raises(ValueError, match="found 3 dimensions of generated and 4 of real"):
        kernel_distance(draw(5, 3, 0), draw(5, 4, 0))
    with pytest.raises(ValueError, match="nearest_k: found 5 for 5 images"):
        precision_recall(draw(5, 3, 0), draw(9, 3, 0), nearest_k=5)


# Inception Score and diversity ------------------------------------------------------------------------------------------


def test_inception_score_of_certain_balanced_classes_is_their_number() -> None:
    metric = InceptionScore(12, 3, splits=2)
    logits = 1000 * torch.nn.functional.one_hot(torch.arange(12) % 3).double()
    metric.update(logits, range(12))
    assert metric.compute() == pytest.approx((3.0, 0.0), abs=1e-12)
    even = InceptionScore(12, 3, splits=2)
    even.update(torch.zeros(12, 3), range(12))
    assert even.compute() == pytest.approx((1.0, 0.0), abs=1e-12)


def test_inception_score_equals_torch_fidelity_in_any_order_and_from_two_processes() -> None:
    peer: Any = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * draw(103, 7, 0)
    wanted = peer.isc_features_to_metric(logits, splits=10, shuffle=False)
    shares = [InceptionScore(103, 7, splits=10) for _ in range(2)]
    for b, part in enumerate(torch.randperm(103, generator=torch.Generator().manual_seed(1)).split(17)):
        shares[b % 2].update(logits[part], part.tolist())
    shares[0].merge_state(shares[1])
    mean, deviation = shares[0].compute()
    assert mean == pytest.approx(wanted[peer.KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert deviation == pytest.approx(wanted[peer.KEY_METRIC_ISC_STD], rel=1e-10)


def test_inception_score_needs_an_image_in_every_part() -> None:
    with pytest.raises(ValueError, match="inception_score: found 3 images; expected at least 10"):
        InceptionScore(3, 5)
    assert inception_score(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([[1.0, 1.0]])) == pytest.approx(
        (2, 0)
    )


def test_diversity_is_the_mean_over_pairs_of_one_prompt() -> None:
    features, groups = draw(9, 5, 0), [0, 1, 0, 2, 1, 0, 3, 1, 1]
    metric = Diversity(groups, 5)
    for part in ([4, 0, 8], [1, 2, 3], [7, 6, 5]):
        metric.update(features[part], part)
    means = []
    for group in (0, 1):
        members = [i for i in range(9) if groups[i] == group]
        pairs = [(a, b) for a in members for b in members if a < b]
        cosines = [torch.nn.functional.cosine_similarity(features[a], features[b], dim=0) for a, b in pairs]
        means.append(float(1 - torch.stack(cosines).mean()))
    assert metric.compute() == pytest.approx(np.mean(means), rel=1e-12)
    same = torch.ones(3, 2).double()
    assert diversity(torch.tensor([3.0]).double(), torch.nn.functional.normalize(same, dim=1).sum(0)[None]) == (
        pytest.approx(0, abs=1e-12)
    )
    with pytest.raises(ValueError, match="drawn more than once"):
        diversity(torch.ones(4), torch.ones(4, 2))


def test_kept_features_stand_in_the_rows_of_their_images_and_are_counted() -> None:
    features = draw(7, 3, 0).float()
    shares = [AllFeatures(7, 3) for _ in range(2)]
    shares[0].update(features[[6, 0, 2]], [6, 0, 2])
    shares[1].update(features[[1, 5, 4]], [1, 5, 4])
    shares[0].merge_state(shares[1])
    with pytest.raises(RuntimeError, match="found 1 missing and 0 repeated"):
        shares[0].compute()
    shares[0].update(features[[3]], [3])
    assert torch.equal(shares[0].compute(), features)
    shares[0].update(features[[3]], [3])
    with pytest.raises(RuntimeError, match="found 0 missing and 1 repeated"):
        shares[0].compute()


# Frechet distance where covariances are singular or badly scaled ------------------------------------------------------------


def test_rank_one_covariances_have_their_closed_form() -> None:
    u, w = draw(1, 40, 0)[0], draw(1, 40, 1)[0]
    zero = torch.zeros(40).double()
    a, b = Moments(zero, u.outer(u), None), Moments(zero, w.outer(w), None)
    wanted = float(u @ u + w @ w - 2 * (u @ w).abs())
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-12)
    assert frechet_distance(a, Moments(zero, torch.zeros(40, 40).double(), None)) == pytest.approx(float(u @ u))


def exact(x: Tensor, y: Tensor) -> float:
    """From the features themselves: tr sqrt(A B) is the nuclear norm of X' Y, each centred and over sqrt(count - 1)."""
    u, v = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (x, y))
    squares = (x.mean(0) - y.mean(0)).square().sum() + u.square().sum() + v.square().sum()
    return float(squares - 2 * torch.linalg.matrix_norm(u @ v.T, "nuc"))


@pytest.mark.parametrize(("n", "m"), [(10, 12), (50, 30), (20, 500), (500, 20)])
def test_fewer_images_than_dimensions_give_a_warning_and_the_exact_distance(
    n: int, m: int, caplog: pytest.LogCaptureFixture
) -> None:
    warn_few.cache_clear()
    x, y = draw(n, 64, 0), draw(m, 64, 1, shift=0.1)
    for _ in range(2):
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(exact(x, y), rel=1e-10)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-10)
    warned = f"covariance: found {min(n, m)} images; expected more than the 64 dimensions"
    assert caplog.text.count(warned) == 1  # once in a process


@pytest.mark.parametrize(("n", "m", "decay"), [(100, 500, 0.5), (500, 500, 2.0)])
def test_few_images_in_inceptions_2048_dimensions_have_the_exact_distance(n: int, m: int, decay: float) -> None:
    scales = (torch.arange(2048) + 1.0).double() ** -decay
    x, y = draw(n, 2048, 0) * scales, draw(m, 2048, 1) * scales.flip(0).sqrt() * scales
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(exact(x, y), rel=1e-9)


def test_features_that_share_few_directions_have_the_exact_distance() -> None:
    """Nearly all singular values are 0: as roots of squares they would add up to 1e-6."""
    x, y = draw(60, 128, 0), draw(60, 128, 1)
    x[:, 70:], y[:, :64] = 0, 0
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(exact(x, y), rel=1e-10)
    apart = y.clone()
    apart[:, :70] = 0
    assert frechet_distance(moments(x), moments(apart)) == pytest.approx(exact(x, apart), rel=1e-12)


def test_statistics_of_unknown_origin_that_are_singular_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    few, other = moments(draw(10, 64, 0)), moments(draw(100, 64, 1))
    unknown = Moments(few.mean, few.covariance, None)
    assert frechet_distance(unknown, other) == pytest.approx(frechet_distance(few, other), rel=1e-12)
    assert "covariance: found rank 9; expected the 64 dimensions" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_that_are_not_finite_give_no_distance(value: float) -> None:
    """A Python max(0, nan) would be 0."""
    good = moments(draw(20, 3, 0))
    broken = Moments(good.mean.clone(), good.covariance.clone(), 20)
    broken.mean[1] = value
    for pair in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance(*pair)
    broken = Moments(good.mean, good.covariance * value, None)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, broken)


@pytest.mark.parametrize("count", [None, 1000])
def test_ill_conditioned_covariances_equal_the_closed_form(count: int | None) -> None:
    """By either root: the symmetric one, and Cholesky's where there were more images than dimensions."""
    basis, _ = torch.linalg.qr(draw(19, 19, 0))
    scales, zero = torch.logspace(-12, 6, 19).double(), torch.zeros(19).double()
    a, b = (Moments(zero, basis @ (f * scales).diag() @ basis.T, count) for f in (1, 4))
    assert frechet_distance(a, b) == pytest.approx(float(scales.sum()), rel=1e-7)


def test_a_feature_that_is_always_zero_makes_no_difference() -> None:
    x, y = draw(100, 6, 0), draw(80, 6, 1, shift=1.0)
    dead = [torch.cat([v, torch.zeros(len(v), 1).double()], 1) for v in (x, y)]
    wanted = frechet_distance(moments(x), moments(y))
    assert frechet_distance(*map(moments, dead)) == pytest.approx(wanted, rel=1e-9)


def test_features_that_never_vary_in_one_or_both_leave_the_quick_way_open(caplog: pytest.LogCaptureFixture) -> None:
    """As ReLU's that never fire; the same value in all images, up to the rounding of sums, is no variance."""
    x, y = draw(100, 40, 0), draw(80, 40, 1, shift=1.0)
    x[:, 3], x[:, 7], y[:, 7], y[:, 11] = 0.3, 0.0, 0.1, 0.7
    m = moments(x)
    assert frechet_distance(m, moments(y)) == pytest.approx(exact(x, y), rel=1e-10)
    residue = Moments(m.mean, m.covariance + 1e-17 * torch.eye(40).double(), m.count)
    assert frechet_distance(residue, moments(y)) == pytest.approx(exact(x, y), rel=1e-10)
    assert "rank" not in caplog.text


def test_distance_equals_torch_fidelity_and_pytorch_fids_formula() -> None:
    peer: Any = pytest.importorskip("torch_fidelity.metric_fid")
    linalg: Any = pytest.importorskip("scipy.linalg")
    a, b = moments(draw(200, 24, 0)), moments(draw(150, 24, 1, shift=0.3) @ draw(24, 24, 2))
    ours = frechet_distance(a, b)
    statistics = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
    theirs = peer.fid_statistics_to_metric(*statistics, verbose=False)[peer.KEY_METRIC_FID]
    assert ours == pytest.approx(float(theirs), rel=1e-8)
    root = linalg.sqrtm(statistics[0]["sigma"] @ statistics[1]["sigma"]).real
    gap = statistics[0]["mu"] - statistics[1]["mu"]
    wanted = gap @ gap + np.trace(statistics[0]["sigma"]) + np.trace(statistics[1]["sigma"]) - 2 * np.trace(root)
    assert ours == pytest.approx(float(wanted), rel=1e-8)
