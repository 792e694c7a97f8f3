"""benchmark/entropy_sources.py: determinants of linear flows in closed form, entropies by integration, one real run."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import entropy_sources as sources  # noqa: E402

A = torch.tensor([[0.3, -0.8, 0.0], [0.5, -0.4, 0.2], [0.1, 0.0, 0.6]])


def flow(solver: str, dim: int, n: int, velocity):
    """n steps of dx/dt = velocity(x, obs), by the script's own integrator."""
    flow = SimpleNamespace(solver=solver, dim=dim, times=range(n + 1), velocity=lambda i, x, obs: velocity(x, obs))
    flow.integrate = lambda obs, x: sources.lpds_adroit_flow.FlowDecoder.integrate(flow, obs, x)
    return flow


def linear_flow(solver: str, n: int = 5):
    return flow(solver, 3, n, lambda x, obs: x @ A.T + obs)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_volume_of_a_linear_flow(solver):
    obs, w = torch.randn(7, 3), torch.randn(7, 3)
    one_step = torch.eye(3) + A / 5 + (solver == "heun") * A @ A / 50
    known = 5 * np.linalg.slogdet(one_step.numpy()).logabsdet
    log, sign = sources.log_volume(linear_flow(solver), obs, w)
    assert np.allclose(log, known, atol=1e-5) and (sign == 1).all()
    map_of_w = np.linalg.matrix_power(one_step.numpy(), 5)
    moved = linear_flow(solver).integrate(obs, w + 1) - linear_flow(solver).integrate(obs, w)
    assert np.allclose(moved, np.ones((7, 3)) @ map_of_w.T, atol=1e-4)


def test_a_shift_through_a_linear_flow_costs_nothing_and_the_parts_add_up():
    shift, bound = torch.tensor([0.5, -1.0, 2.0]), 1.5

    def steer(obs, eps):
        return (eps + shift).clamp(-bound, bound)

    agent = SimpleNamespace(
        decoder=linear_flow("euler"), perturbation=lambda obs: shift.expand(len(obs), 3), steer=steer
    )
    found = sources.take_apart(agent, 0.1 * torch.randn(20, 3))
    assert found["noise"] == 0 and abs(found["decoder"]) < 1e-5 and abs(found["random"]) < 1e-5
    assert abs(found["estimator"]) < 1e-5  # the same draws, moved together
    assert found["bound"] < -0.5 and abs(found["rms_shift"] - shift.square().mean() ** 0.5) < 1e-6
    assert abs(sum(found[part] for part in sources.PARTS) - found["total"]) < 1e-9


def test_what_does_not_steer_loses_nothing_and_what_is_clipped_away_is_lost_in_the_actions():
    shift = torch.zeros(3)
    agent = SimpleNamespace(decoder=flow("euler", 3, 1, lambda x, obs: 0 * x), steer=lambda obs, eps: eps + shift)
    agent.perturbation = lambda obs: shift.expand(len(obs), 3)
    found = sources.take_apart(agent, torch.zeros(20, 1))
    assert found["clipped_frozen"] == found["clipped_steered"] > 0.2
    assert all(found[name] == 0 for name in (*sources.PARTS, "total", "total_4x"))
    shift += 100  # every action is 1: all distances are 0, and each draw counts 3 log eps less the frozen mean
    eps = torch.randn(600, 64, 3).clamp(-1, 1)
    frozen = sources.knn_entropy(eps)[0].item()
    alone = sources.knn_entropy(torch.ones(1, 64, 3))[0].item()
    found = sources.take_apart(agent, torch.zeros(200, 1))
    assert abs(found["total"] - (alone - frozen)) < 0.1 and abs(found["actions"] - found["total"]) < 1e-3


def test_the_volume_of_a_curved_flow_by_hand():
    """dx/dt = x^2 / 2 in every coordinate: a step multiplies the volume by 1 + x / n; beyond -n it folds."""
    curved = flow("euler", 2, 2, lambda x, obs: x.square() / 2)
    w = torch.tensor([[0.5, -1.0], [-3.0, 1.0]])
    between = w + w.square() / 4
    known = ((1 + w / 2) * (1 + between / 2)).double().prod(1)
    log, sign = sources.log_volume(curved, torch.zeros(2, 1), w)
    assert np.allclose(log, known.abs().log(), atol=1e-5) and sign.tolist() == known.sign().tolist() == [1, -1]


def test_a_shift_through_a_curved_flow_changes_the_entropy_by_what_its_determinants_say():
    curved = flow("euler", 1, 1, lambda x, obs: 0.1 * x.exp())
    shift = torch.tensor([1.0])
    agent = SimpleNamespace(
        decoder=curved, perturbation=lambda obs: shift.expand(len(obs), 1), steer=lambda obs, e: e + shift
    )
    found = sources.take_apart(agent, torch.zeros(2_000, 1), draws=6, exact=1)

    def mean_log_slope(mean):  # E log(1 + 0.1 e^x), x ~ N(mean, 1)
        normal = lambda x: math.exp(-0.5 * (x - mean) ** 2) / math.sqrt(2 * math.pi)  # noqa: E731
        return scipy.integrate.quad(lambda x: normal(x) * math.log1p(0.1 * math.exp(x)), -9, 9)[0]

    assert abs(found["decoder"] - (mean_log_slope(1) - mean_log_slope(0))) < 5 * found["decoder_se"] < 0.05
    assert found["folded"] == 0 and found["bound"] == 0


def test_the_noise_of_dsrl_loses_what_integration_says():
    mu, sigma, b = 0.4, 0.3, 2.5
    agent = SimpleNamespace(args=SimpleNamespace(noise_bound=b))
    agent.actor = lambda obs: torch.tensor([mu, mu, math.log(sigma), math.log(sigma)]).expand(len(obs), 4)
    agent.squash = lambda obs, eps: sources.dsrl_adroit_flow.Agent.squash(agent, obs, eps)
    _, lost = sources.unbounded(agent, torch.zeros(2_000, 1), torch.randn(2_000, 2))

    def integrand(w):  # -p log p of w = b tanh(u)
        u = math.atanh(w / b)
        p = math.exp(-0.5 * ((u - mu) / sigma) ** 2) / sigma / math.sqrt(2 * math.pi) / (b * (1 - (w / b) ** 2))
        return -p * math.log(p) if p > 0 else 0.0

    of_w = scipy.integrate.quad(integrand, -b + 1e-9, b - 1e-9, limit=500)[0]
    assert abs(lost.mean() - 2 * (of_w - 0.5 * math.log(2 * math.pi * math.e))) < 0.02


def test_more_draws_find_what_integration_says_too():
    """The squashed Gaussian above, a fifth as large so that nothing is clipped: all is lost in the noise."""
    mu, sigma, b = 0.4, 0.3, 2.5
    agent = SimpleNamespace(args=SimpleNamespace(noise_bound=b), decoder=flow("euler", 2, 1, lambda x, obs: -0.8 * x))
    agent.actor = lambda obs: torch.tensor([mu, mu, math.log(sigma), math.log(sigma)]).expand(len(obs), 4)
    agent.squash = lambda obs, eps: sources.dsrl_adroit_flow.Agent.squash(agent, obs, eps)
    agent.steer = lambda obs, eps: agent.squash(obs, eps)[0]
    found = sources.take_apart(agent, torch.zeros(200, 1), exact=16)

    def term(u):  # of the entropy of b tanh(u), u ~ N(mu, sigma^2), less that of N(0, 1)
        p = math.exp(-0.5 * ((u - mu) / sigma) ** 2) / sigma / math.sqrt(2 * math.pi)
        return p * (math.log(b * (1 - math.tanh(u) ** 2)) + math.log(sigma))

    known = 2 * scipy.integrate.quad(term, mu - 8 * sigma, mu + 8 * sigma)[0]
    assert abs(found["noise"] - known) < 5 * found["noise_se"] < 0.1
    for name in ("total", "total_4x"):  # the estimator's own eps, 1e-3, hides some of what lies that close together
        assert abs(found[name] - known) < 0.08 and found[f"{name}_se"] < 0.01, name
    assert found["total_4x_se"] < 0.7 * found["total_se"] and abs(found["decoder"]) < 1e-6
    assert found["bound"] == found["actions"] == found["clipped_steered"] == 0


@pytest.mark.parametrize("script", ["lpds_adroit_flow.py", "baselines/dsrl_adroit_flow.py"])
def test_real_runs_are_taken_apart(script, tmp_path):
    flags = [
        "--total-timesteps",
        "900",
        "--prior-steps",
        "300",
        "--warmup-steps",
        "0",
        "--eval-episodes",
        "1",
        "--utd",
        "2",
    ]
    command = [sys.executable, ROOT / script, *flags, "--distill-steps", "1", "--run-dir", tmp_path, "--no-progress"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (run,) = tmp_path.iterdir()
    out = tmp_path / "sources.json"
    sources.main((run,), states=2, out=out)
    (found,) = json.loads(out.read_text())["runs"]
    assert abs(sum(found[part] for part in sources.PARTS) - found["total"]) < 1e-6
    assert (found["noise"] == 0) == ("rms_shift" in found) == script.startswith("lpds")
    assert f"| {found['total']:.1f} ± {found['total_se']:.1f} |" in out.with_suffix(".md").read_text()
    _, _, agent, obs = sources.load(run)
    noise = torch.randn(len(obs), agent.decoder.dim)
    assert torch.equal(agent.decoder.integrate(obs, noise).clamp(-1, 1), agent.decoder(obs, noise))


def test_without_runs_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        sources.main()
    assert stop.value.code == 2 and "RUNS: none given" in capsys.readouterr().err
