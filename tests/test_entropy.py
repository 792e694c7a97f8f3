"""entropy.py against closed forms, a k-d tree as oracle, and invariances of differential entropy.

Exact properties are asserted to rounding error. Statistical ones use 8 x 2048 seeded samples: the
standard error, about sqrt(Var log p / 16384), is 0.007 to 0.02 nats for Gaussians of 1 to 12
dimensions, and the estimator's bias is given beside each tolerance.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import entropy
from entropy import knn_entropy

LOG_BALL = {
    1: math.log(2),
    2: math.log(math.pi),
    12: math.log(math.pi**6 / 720),
}  # log c_D, for even D pi^(D/2) / (D/2)!


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(samples, k=5, eps=0.0):
    return knn_entropy(samples, k=k, eps=eps)[0].item()


def oracle(samples, k, eps):
    """Equations 11 and 12 and the ties by scipy, one state at a time."""
    entropies, ties = [], []
    for points in samples.flatten(2).numpy():
        num, dim = points.shape
        rho = cKDTree(points).query(points, k=k + 1)[0][:, k]  # column 0 is the point itself
        mean_log = np.log(rho + eps).mean()
        entropies.append(-digamma(k) + digamma(num) + LOG_BALL[dim] + dim * mean_log)
        ties.append(np.mean(rho < eps))
    return np.mean(entropies), np.mean(ties)


# --- the formula, exactly ---


@pytest.mark.parametrize("dim", [1, 2, 12])
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
def test_equals_the_oracle(dim, k, eps):
    samples = randn(3, 100, dim) * torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)[:, None, None]
    found = knn_entropy(samples, k=k, eps=eps)
    assert [x.item() for x in found] == pytest.approx(oracle(samples, k, eps), abs=1e-10)


def test_two_points_by_hand():
    # k = 1, K = 2, rho = 1 for both: psi(2) - psi(1) = 1, the unit ball of a line is 2 long, and
    # rho < eps is strict.
    found, ties = knn_entropy(torch.tensor([[[0.0], [1.0]]]), k=1, eps=1.0)
    assert found.item() == pytest.approx(1 + math.log(2) + math.log(1 + 1.0), abs=1e-12)
    assert ties.item() == 0


@pytest.mark.parametrize(
    "k, psi_difference",
    [(1, sum(1 / i for i in range(1, 12))), (10, 1 / 10 + 1 / 11), (11, 1 / 11)],
)
def test_simplex_by_hand(k, psi_difference):
    # The 12 unit vectors of R^12 are all sqrt(2) apart: rho is the same for every k.
    truth = psi_difference + LOG_BALL[12] + 12 * math.log(math.sqrt(2) + 0.25)
    assert value(torch.eye(12)[None], k=k, eps=0.25) == pytest.approx(truth, abs=1e-10)


# --- closed forms ---


# Bias: below 0.01 at D = 1 and 2 (tolerance: 5 standard errors); +0.10 +- 0.03 at D = 12, k = 1.
# The tolerances are small enough to see a missing log c_D (0.7, 1.1, 0.3 nats) and a k off by one
# (0.2 nats at k = 5, 1 at k = 1).
@pytest.mark.parametrize("dim, k, tolerance", [(1, 5, 0.035), (2, 5, 0.05), (12, 1, 0.16)])
@pytest.mark.parametrize("correlation", [0.0, 0.2])
def test_gaussian(dim, k, tolerance, correlation):
    std = 2.0 if correlation else 1.0
    mixed = (1 - correlation) * torch.eye(dim) + correlation * torch.ones(dim, dim)
    covariance = std**2 * mixed.double()
    truth = 0.5 * torch.logdet(2 * math.pi * math.e * covariance).item()
    samples = randn(8, 2048, dim) @ torch.linalg.cholesky(covariance).T
    assert value(samples, k=k) == pytest.approx(truth, abs=tolerance)


# Up to D = 2 only: the density is flat except within rho of the faces, a share of order D *
# K^(-1/D) of the box (bias +0.03 at D = 2), which at D = 12 is all of it.
@pytest.mark.parametrize("sides", [[3.0], [0.1], [3.0, 0.5]])
def test_uniform_box(sides):
    samples = rand(8, 2048, len(sides)) * torch.tensor(sides).double()
    assert value(samples) == pytest.approx(sum(map(math.log, sides)), abs=0.05)


def test_bias_shrinks_with_samples():
    # D = 12: about +1.4, +0.8, +0.45, +0.25 nats, as K^(-2/12) and a little faster; the same points
    # at every K.
    points, truth = randn(8192, 12), 6 * math.log(2 * math.pi * math.e)
    bias = [value(points.view(-1, num, 12)) - truth for num in (32, 128, 512, 2048)]
    assert bias[0] > 1 and abs(bias[-1]) < 0.4
    assert all(small < large - 0.1 for large, small in pairwise(bias))


def test_neighbour_counts_agree():
    # D = 2, same points: the k-th distances differ by a factor sqrt(20), the estimates by their
    # bias, 0.02 at k = 20.
    found = [value(randn(8, 2048, 2), k=k) for k in (1, 2, 5, 10, 20)]
    assert max(found) - min(found) < 0.05


# --- laws of differential entropy ---


@pytest.mark.parametrize("scale", [1e-3, 0.5, 100.0])
def test_scale_law(scale):
    samples = randn(4, 128, 12)
    assert value(scale * samples) == pytest.approx(value(samples) + 12 * math.log(scale), abs=1e-5)


def test_rotation_translation_and_order_do_not_matter():
    samples = randn(4, 128, 12)
    rotation = torch.linalg.qr(randn(12, 12, seed=2))[0]
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    moved = (samples @ rotation + 3.0)[:, order]
    assert value(moved, eps=1e-3) == pytest.approx(value(samples, eps=1e-3), abs=1e-10)


def test_near_duplicates_keep_their_precision():
    # 1e-6 apart around 1000: |a|^2 - 2ab + |b|^2 would leave no digit of these distances, even in
    # float64.
    samples = 1e-6 * randn(2, 200, 2)
    assert value(samples + 1000.0) == pytest.approx(value(samples), abs=1e-4)


# --- ties ---


def test_equal_samples_leave_only_eps():
    found, ties = knn_entropy(torch.full((3, 50, 12), 0.7), k=5, eps=1e-3)
    truth = digamma(50) - digamma(5) + LOG_BALL[12] + 12 * math.log(1e-3)
    assert found.item() == pytest.approx(truth, abs=1e-10)
    assert ties.item() == 1


def test_ties_count_samples_with_k_copies():
    samples = randn(1, 80, 2)
    samples[:, :20] = samples[:, :1]  # 20 copies: 19 neighbours at distance 0
    for k, share in [(1, 20 / 80), (19, 20 / 80), (20, 0.0)]:
        found, ties = knn_entropy(samples, k=k, eps=1e-6)
        assert ties.item() == share and math.isfinite(found.item())
    assert value(samples, k=19, eps=0.0) == -math.inf  # no floor, no finite entropy


def test_clipped_actions_have_ties_and_the_floor_decides_their_entropy():
    samples = (2 * randn(4, 256, 2)).clamp(-1, 1)  # 0.62^2 = 38 % in the four corners, by erfc
    found, ties = torch.tensor([knn_entropy(samples, eps=eps) for eps in (1e-12, 1e-3)]).T
    assert ties[0].item() == pytest.approx(0.38, abs=0.05) and found.isfinite().all()
    assert found[1] - found[0] > 0.99 * ties[0] * 2 * math.log(1e9)


def test_a_face_of_the_box_lowers_entropy_without_ties():
    # One of two coordinates clipped: rho ~ 1/K on the line that is left, so H loses log K and
    # `ties` cannot tell.
    samples = rand(8, 1024, 2)
    samples[..., 1] = 1.0
    few, many = knn_entropy(samples.view(64, 128, 2), eps=1e-12), knn_entropy(samples, eps=1e-12)
    assert few[1] == many[1] == 0
    difference = (many[0] - few[0]).item()
    assert difference == pytest.approx(-math.log(8), abs=0.15)  # the ends of the line are the rest


# --- tensors ---


def test_batch_is_the_mean_over_states():
    samples = randn(6, 64, 12) * torch.logspace(-4, 1, 6, dtype=torch.float64)[:, None, None]
    batched = torch.stack(knn_entropy(samples))
    single = torch.stack([torch.stack(knn_entropy(state[None])) for state in samples]).mean(0)
    torch.testing.assert_close(batched, single, rtol=0, atol=1e-10)
    assert 0 < batched[1] < 1  # the narrowest state ties, the widest does not


@pytest.mark.parametrize("limit", [1, 3 * 64**2])
def test_chunking_changes_nothing(monkeypatch, limit):
    samples = randn(7, 64, 2)
    whole = knn_entropy(samples)
    monkeypatch.setattr(entropy, "MAX_DISTANCES", limit)
    assert knn_entropy(samples) == whole


def test_action_chunks_are_flattened():
    samples = randn(3, 64, 4, 3)
    assert knn_entropy(samples) == knn_entropy(samples.reshape(3, 64, 12))
    strided = samples.transpose(2, 3)  # not contiguous, and in another order of coordinates
    assert value(strided) == pytest.approx(value(samples), abs=1e-10)


def test_deterministic_and_leaves_its_input_alone():
    samples = randn(3, 64, 12).requires_grad_()
    before, state = samples.clone(), torch.get_rng_state()
    first, second = knn_entropy(samples), knn_entropy(samples)
    assert first == second
    assert torch.equal(samples, before) and torch.equal(torch.get_rng_state(), state)
    assert all(x.shape == () and x.dtype == torch.float64 and not x.requires_grad for x in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_costs_only_the_rounding_of_the_samples(dtype):
    samples = randn(3, 64, 12)
    rounded = samples.to(dtype)
    assert knn_entropy(rounded) == knn_entropy(rounded.double())
    # |d log rho| <= 2 |a| eps_machine / rho, with |a| < 10 and rho > 1 here
    assert value(rounded) == pytest.approx(value(samples), abs=12 * 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("k", [1, 5])
def test_nan_is_not_hidden(k):
    samples = randn(2, 32, 3)
    samples[1, 7, 2] = math.nan
    assert math.isnan(value(samples, k=k))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_without_a_synchronisation():
    samples = (2 * randn(4, 256, 12)).clamp(-1, 1)
    on_gpu = samples.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = knn_entropy(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = torch.stack(knn_entropy(samples))
    torch.testing.assert_close(torch.stack(found).cpu(), on_cpu, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "samples, options, message",
    [
        (torch.zeros(8, 2), {}, r"samples: found shape \(8, 2\), expected \(B, K, D\)"),
        (torch.zeros(0, 8, 2), {}, r"samples: found shape \(0, 8, 2\), expected .* not empty"),
        (torch.zeros(1, 8, 0), {}, r"samples: found shape \(1, 8, 0\), expected .* not empty"),
        (torch.zeros(1, 8, 2).long(), {}, "samples: found dtype torch.int64, expected a floating"),
        (torch.zeros(1, 5, 2), {}, "k: found 5 with K = 5 samples per state, expected 1 <= k < K"),
        (torch.zeros(1, 8, 2), {"k": 0}, "k: found 0 with K = 8 .* expected 1 <= k < K"),
        (torch.zeros(1, 8, 2), {"eps": -1e-3}, "eps: found -0.001, expected a distance >= 0"),
        (torch.zeros(1, 8, 2), {"eps": math.nan}, "eps: found nan, expected a distance >= 0"),
    ],
)
def test_bad_arguments_say_what_was_found_and_expected(samples, options, message):
    with pytest.raises(ValueError, match=message):
        knn_entropy(samples, **options)
