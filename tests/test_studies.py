"""benchmark/studies: determinants and entropies in closed form, shifts of the promised length, and
the pages that quote both."""

import json
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from conftest import ROOT, decoder_file

sys.path[:0] = [str(ROOT / "benchmark" / "studies"), str(ROOT / "baselines")]
import dsrl_adroit_flow  # noqa: E402
import entropy_sources as sources  # noqa: E402
import falls  # noqa: E402
import shifts  # noqa: E402
import temperature  # noqa: E402

import lpds_adroit_flow  # noqa: E402

SCRIPTS = {"lpds_adroit_flow.py": lpds_adroit_flow, "dsrl_adroit_flow.py": dsrl_adroit_flow}
A = torch.tensor([[0.3, -0.8, 0.0], [0.5, -0.4, 0.2], [0.1, 0.0, 0.6]])


def flow(dim: int, steps: int, velocity, solver="euler"):
    """Steps of dx/dt = velocity(x, obs)."""
    field = SimpleNamespace(dim=dim, steps=steps, solver=solver)
    field.velocity = lambda i, x, obs: velocity(x, obs)
    return field


def linear_flow(solver="euler"):
    return flow(3, 5, lambda x, obs: x @ A.T + obs, solver)


def shifted(decoder, shift, bound=math.inf):
    """An LP-DS whose Delta is the same everywhere."""
    agent = SimpleNamespace(decoder=decoder, perturbation=lambda obs: shift.expand(len(obs), -1))
    agent.steer = lambda obs, eps: (eps + shift).clamp(-bound, bound)
    return agent


# --- entropy_sources ---


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_volume_of_a_linear_flow(solver):
    step = torch.eye(3) + A / 5 + (solver == "heun") * A @ A / 50
    log, sign = sources.log_volume(linear_flow(solver), torch.randn(20, 3), torch.randn(20, 3))
    known = 5 * np.linalg.slogdet(step.numpy()).logabsdet
    assert log.shape == (20,) and np.allclose(log, known, atol=1e-5) and (sign == 1).all()


def test_the_volume_of_a_curved_flow_by_hand():
    """dx/dt = x^2 / 2: a step multiplies the volume by 1 + x / n; beyond -n it folds."""
    curved = flow(2, 2, lambda x, obs: x.square() / 2)
    w = torch.tensor([[0.5, -1.0], [-3.0, 1.0]])
    between = w + w.square() / 4
    known = ((1 + w / 2) * (1 + between / 2)).double().prod(1)
    log, sign = sources.log_volume(curved, torch.zeros(2, 1), w)
    assert np.allclose(log, known.abs().log(), atol=1e-5) and sign.tolist() == [1, -1]
    agent = shifted(flow(1, 2, lambda x, obs: x.square() / 2), torch.tensor([-9.0]))
    assert 0.5 < sources.take_apart(agent, torch.zeros(50, 1))["folded"] < 0.6  # nearly all of w


def test_a_shift_through_a_linear_flow_costs_nothing_but_what_its_bound_clips():
    agent = shifted(linear_flow(), torch.tensor([0.5, -1.0, 2.0]), bound=1.5)
    found = sources.take_apart(agent, 0.1 * torch.randn(20, 3))
    for part in ("decoder", "random", "estimator"):  # the estimator's draws are moved together
        assert abs(found[part]) < 1e-5
    assert found["noise"] == 0 and found["bound"] < -0.5 and found["folded"] == 0
    assert abs(sum(found[part] for part in sources.PARTS) - found["total"]) < 1e-9


def test_a_shift_through_a_curved_flow_costs_what_its_determinants_say():
    agent = shifted(flow(1, 1, lambda x, obs: 0.1 * x.exp()), torch.tensor([2.0]))
    found = sources.take_apart(agent, torch.zeros(600, 1), draws=6, exact=1)

    def mean_log_slope(mean):  # E log(1 + 0.1 e^x), x ~ N(mean, 1)
        def density(x):
            return math.exp(-0.5 * (x - mean) ** 2) / math.sqrt(2 * math.pi)

        return scipy.integrate.quad(lambda x: density(x) * math.log1p(0.1 * math.exp(x)), -9, 9)[0]

    there, back = (mean_log_slope(shift) - mean_log_slope(0) for shift in (2, -2))
    assert abs(found["decoder"] - there) < 5 * found["decoder_se"] < 0.2
    assert abs(found["random"] - (there + back) / 2) < 5 * found["random_se"] < 0.2


def test_what_is_clipped_away_is_lost_in_the_actions():
    still = flow(3, 1, lambda x, obs: 0 * x)
    found = sources.take_apart(shifted(still, torch.zeros(3)), torch.zeros(20, 1))
    assert all(found[name] == 0 for name in (*sources.PARTS, "total", "total_4x"))
    found = sources.take_apart(shifted(still, torch.full((3,), 100.0)), torch.zeros(100, 1))
    alone = sources.knn_entropy(torch.ones(1, 64, 3))[0]  # every action is 1
    frozen = sources.knn_entropy(torch.randn(600, 64, 3).clamp(-1, 1))[0]
    assert abs(found["total"] - (alone - frozen)) < 0.15
    assert abs(found["actions"] - found["total"]) < 1e-3


def test_the_noise_of_dsrl_loses_what_integration_says():
    """Its squashed Gaussian, a fifth as large so that nothing is clipped: all is lost in w."""
    mu, sigma, bound = 0.4, 0.3, 2.5
    row = torch.tensor([mu, mu, math.log(sigma), math.log(sigma)])
    agent = SimpleNamespace(args=SimpleNamespace(noise_bound=bound))
    agent.actor = lambda obs: row.expand(len(obs), 4)
    agent.squash = lambda obs, eps: dsrl_adroit_flow.Agent.squash(agent, obs, eps)
    agent.steer = lambda obs, eps: agent.squash(obs, eps)[0]
    agent.decoder = flow(2, 1, lambda x, obs: -0.8 * x)
    found = sources.take_apart(agent, torch.zeros(200, 1), exact=16)

    def term(u):  # of the entropy of b tanh(u), u ~ N(mu, sigma^2), less that of N(0, 1)
        density = math.exp(-0.5 * ((u - mu) / sigma) ** 2) / sigma / math.sqrt(2 * math.pi)
        return density * (math.log(bound * (1 - math.tanh(u) ** 2)) + math.log(sigma))

    known = 2 * scipy.integrate.quad(term, mu - 8 * sigma, mu + 8 * sigma)[0]
    assert abs(found["noise"] - known) < 5 * found["noise_se"] < 0.1
    for name in ("total", "total_4x"):
        assert abs(found[name] - known) < 0.08 and found[f"{name}_se"] < 0.01
    assert found["total_4x_se"] < 0.7 * found["total_se"] and abs(found["decoder"]) < 1e-6


def write_run(folder, script: str, solver: str, started=True):
    """A run folder, as far as it is read; the agent in it."""
    folder.mkdir(parents=True)
    file = decoder_file(45, 24, chunk=8, kind="flow") | {"solver": solver}
    torch.save(file, folder / "backbone.pt")
    args = SCRIPTS[script].Args(hidden_size=16, seed=7)
    (folder / "args.json").write_text(json.dumps(asdict(args)))
    agent = SCRIPTS[script].Agent(args, SCRIPTS[script].Decoder(file))
    if script.startswith("lpds"):
        agent.perturbation[-1].bias.data.fill_(0.5)
    else:
        agent.started.fill_(started)
    state = {"script": script, "agent": agent.state_dict(), "replay": {"obs": torch.randn(9, 45)}}
    torch.save(state, folder / "checkpoint.pt")
    return agent


@pytest.mark.parametrize("script, solver", list(zip(SCRIPTS, ["euler", "heun"])))
def test_runs_of_the_scripts_are_taken_apart(tmp_path, capsys, script, solver):
    run = tmp_path / "AdroitHandPen-v1__arm__7" / "AdroitHandPen-v1__script__7__1"
    decoder = write_run(run, script, solver).decoder
    obs, noise = torch.randn(5, 45), torch.randn(5, 192)
    inside = sources.integrate(decoder, obs, noise)
    assert torch.equal(inside.clamp(-1, 1), decoder(obs, noise)) and (inside.abs() > 1).any()

    out = tmp_path / "out.json"
    sources.main((run,), states=2, out=out)
    (found,) = json.loads(out.read_text())["runs"]
    assert (found["run"], found["seed"]) == ("AdroitHandPen-v1__arm", 7)
    assert abs(sum(found[part] for part in sources.PARTS) - found["total"]) < 1e-4
    assert (found["noise"] == 0) == ("random" in found) == script.startswith("lpds")
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"| AdroitHandPen-v1 arm | {found['noise']:.1f} |")


def test_a_run_that_does_not_steer_is_refused(tmp_path, capsys):
    write_run(tmp_path / "run", "dsrl_adroit_flow.py", "euler", started=False)
    with pytest.raises(SystemExit):
        sources.load(tmp_path / "run")
    assert "stopped before it steered" in capsys.readouterr().err


# --- shifts ---


def test_shifts_are_as_long_as_the_budget_and_come_in_opposite_pairs(tmp_path, monkeypatch):
    torch.save(decoder_file(11, 3), tmp_path / "backbone.pt")
    obs, noise, seen = torch.zeros(1, 11), torch.randn(1, 12), []

    def fake(policy, envs, device, seed):
        assert envs.num_envs == 2 and seed != 0  # of training's own evaluations
        seen.append(policy(obs, noise))
        return {"return": [len(seen), len(seen) + 1]}

    monkeypatch.setattr(shifts, "evaluate", fake)
    monkeypatch.setattr(shifts.Decoder, "forward", lambda self, obs, noise: noise)
    result = shifts.play("Hopper-v4", tmp_path / "backbone.pt", delta=0.2, shifts=3, episodes=2)
    moved = [(w - noise)[0] for w in seen]
    for there, back in zip(moved[0:6:2], moved[1:6:2]):
        assert torch.allclose(there, -back, atol=1e-6)
        assert there.square().mean() == pytest.approx(0.2, rel=1e-4)
    assert moved[6].abs().max() == 0  # the frozen policy
    assert result == {"delta": 0.2, "frozen": 7.5, "returns": [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]}
    result |= {"returns": [100, 300]}
    row = shifts.markdown({"environments": {"Hopper-v4": result}}).splitlines()[2]
    assert row == "| Hopper-v4 | 0.2 | 8 | 200 | 141 | 100 | 300 |"


def test_shifts_play_real_episodes(tmp_path):
    torch.save(decoder_file(11, 3, kind="flow"), tmp_path / "backbone.pt")
    result = shifts.play("Hopper-v4", tmp_path / "backbone.pt", delta=0.5, shifts=1, episodes=2)
    assert len({result["frozen"], *result["returns"]}) == 3 and np.isfinite(result["returns"]).all()


# --- pages ---


@pytest.mark.parametrize("study", [sources, shifts], ids=["entropy_sources", "shifts"])
def test_the_pages_have_the_tables_of_the_committed_numbers(study):
    results = json.loads((ROOT / f"benchmark/results/{study.__name__}.json").read_text())
    page = (ROOT / f"docs/studies/{study.__name__}.md").read_text()
    assert study.markdown(results) in page and results["date"] in page


# --- falls, temperature ---


def test_values_before_falls_by_hand():
    """Two episodes of 120 chunks; the first falls in its last, and its value falls to 0 before."""
    q = np.full((120, 2), 7.0)
    q[:, 1] = np.linspace(6, 8, 120)
    q[-3:, 0] = 4, 2, 0
    last, fell = np.array([119, 119]), np.array([True, False])
    found = falls.before_falls(q, last, fell, (1, 2, 50))
    assert (found["1"]["mean"], found["2"]["mean"], found["50"]["mean"]) == (2, 4, 7)
    assert found["1"]["auc"] == 1 and found["1"]["falls"] == 1
    calm = np.concatenate([q[19:79, 0], q[19:79, 1]])
    assert found["calm"] == calm.mean() and found["50"]["auc"] == (7 < calm).mean()


def test_rank_correlation_is_scipys():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    expected = scipy.stats.spearmanr(x, y).statistic
    assert falls.rank_correlation(x, y) == pytest.approx(expected)


class Counting(gym.Env):
    """Pays the first action once, and takes thrice that back in every later step; over when its
    counter, a state that can be set, reaches 5."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, **kwargs):
        self.t = 0.0
        return np.zeros(2, np.float32), {}

    def set_state(self, qpos, qvel):
        self.t, self.first = float(qpos[0]), None

    def step(self, action):
        self.t += 1
        if self.first is None:
            self.first = reward = float(action[0])
        else:
            reward = -3 * self.first  # discounted by 1/4 it leaves the first in the lead
        return np.zeros(2, np.float32), reward, self.t >= 5, False, {}


def test_noises_are_played_from_the_state_and_ranked_by_what_came_out():
    agent = SimpleNamespace(
        decoder=lambda obs, w: w, steer=lambda obs, eps: eps, args=SimpleNamespace(gamma=0.25)
    )
    agent.decoder.dim = 1
    agent.act = lambda obs, eps: torch.zeros_like(eps)  # what follows does not matter
    agent.q_a = lambda obs, x: torch.stack([x[:, 0], x[:, 0] + 1])  # so this ranks without fault
    agent.q_w = lambda obs, x: torch.stack([-x[:, 0], 1 - x[:, 0]])
    state = torch.zeros(2), np.zeros(1), np.zeros(1)
    found = falls.between_noises(agent, Counting, state, 6, 4, horizon=4, seed=0)
    assert found == {"q_a": 1, "q_w": -1, "halves": 1, "fell": 0}
    late = torch.zeros(2), np.array([3.0]), np.zeros(1)
    assert falls.between_noises(agent, Counting, late, 6, 4, horizon=4, seed=0)["fell"] == 1


def test_training_at_a_temperature_still_finds_its_three_lines():
    source = temperature.changed(temperature.SCRIPT.read_text())
    assert source.count("TAU") == 3
    compile(source, "changed", "exec")


def test_the_page_of_walker2d_quotes_its_files():
    page = (ROOT / "docs" / "studies" / "walker2d.md").read_text()
    runs = json.loads((ROOT / "benchmark" / "results" / "falls.json").read_text())
    for numbers in runs.values():
        for k in (4, 8, 16, 40):
            found = numbers[f"noises, {k} chunks before"]
            cells = f"{k} | {found['q_a']:.2f} | {found['q_w']:.2f} | {found['halves']:.2f}"
            assert cells in page
