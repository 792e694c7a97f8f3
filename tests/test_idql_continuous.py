"""baselines/idql_continuous.py: expectile and weights against closed forms, what is proposed and
played, and that it picks the better of two modes.

What it shares with lpds_continuous.py and dql_continuous.py is the same text (test_shared_code.py)
and tested there; test_resume.py has its runs.
"""

import copy
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import decoder_file, finish, load, metrics
from test_dql_continuous import (
    ACT,
    BANDIT,
    CHUNK,
    OBS,
    D,
    N,
    changed,
    flat,
    normal,
    play_bandit,
    register_bandit,
    setup,
    weights,
)
from torch import nn

SCRIPT = "baselines/idql_continuous.py"
idql = load(SCRIPT)


class Known(nn.Module):
    """A critic given as a formula, its twins 1 apart."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, obs, action):
        return torch.stack([self.rule(obs, action) + 1, self.rule(obs, action)])


class Constant(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, obs):
        return self.value.expand(len(obs), 1)


# --- V and Q^A ---


def test_the_loss_of_v_weighs_what_lies_above_it_by_the_expectile():
    agent, batch = setup(idql, expectile=0.7)
    agent.v[-1].bias.data -= 0.5  # into the midst of the values
    q = agent.q_a_target(batch["obs"], batch["action"]).min(0).values.detach().numpy()
    v = agent.v(batch["obs"])[:, 0].detach().numpy()
    above, below = np.maximum(q - v, 0), np.maximum(v - q, 0)
    assert above.any() and below.any()
    before = weights(agent)
    info = agent.update_value(batch)
    loss = (0.7 * above**2 + 0.3 * below**2).mean()
    assert info["losses/v"].item() == pytest.approx(loss, rel=1e-6)
    assert info["losses/v_value"].item() == pytest.approx(v.mean(), rel=1e-6)
    assert changed(before, agent) == {"v"}


@pytest.mark.parametrize("expectile", [0.5, 0.8, 0.95])
def test_v_converges_to_the_expectile_of_two_values(expectile):
    """Of 1 with probability p, and 0: e p / (e p + (1 - e)(1 - p))."""
    agent, batch = setup(idql, expectile=expectile)
    batch["action"][:, 0] = (torch.arange(N) < N // 4).double()
    agent.q_a_target, agent.v = Known(lambda obs, action: action[:, 0]), Constant()
    agent.optimizer = torch.optim.SGD(agent.parameters(), lr=0.5)
    for _ in range(200):
        agent.update_value(batch)
    expected = expectile * 0.25 / (expectile * 0.25 + (1 - expectile) * 0.75)
    assert agent.v.value.item() == pytest.approx(expected, abs=1e-6)


def test_the_critic_follows_v_of_what_comes_after():
    agent, batch = setup(idql, gamma=0.9, tau=0.05)
    v = agent.v(batch["next_obs"])[:, 0].detach()
    y = 0.3 * batch["reward"] + torch.where(batch["terminated"] == 1, 0, 0.9 * v)
    error = agent.q_a(batch["obs"], batch["action"]) - y
    loss = error.square().sum() / (2 * N)
    gradient = torch.autograd.grad(loss, list(agent.q_a.parameters()))
    gradient = torch.cat([g.reshape(-1) for g in gradient])
    before, fast, slow = weights(agent), flat(agent.q_a), flat(agent.q_a_target)
    info = agent.update_action_critic(batch)
    assert info["losses/q_a"].item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(fast - flat(agent.q_a), gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(flat(agent.q_a_target), 0.95 * slow + 0.05 * flat(agent.q_a))
    assert changed(before, agent) == {"q_a", "q_a_target"}


# --- the actor ---


def test_the_actor_clones_the_replay_whatever_it_is_worth():
    gradients = []
    for worth in (1.0, -7.0):
        agent, batch = setup(idql)
        agent.q_a_target = agent.q_a = Known(lambda obs, action, c=worth: c * action.sum(1))
        agent.v = Constant(worth)
        before, start = weights(agent), flat(agent.actor)
        loss = idql.denoising_loss(agent.actor, batch["obs"], batch["action"])
        expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
        torch.manual_seed(5)
        info = agent.update_actor(batch | {"reward": worth * batch["reward"]})
        gradients.append(start - flat(agent.actor))
        assert info["losses/actor"].item() == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(gradients[-1], torch.cat([g.reshape(-1) for g in expected]))
        assert changed(before, agent) == {"actor"}
    assert torch.equal(*gradients)


def test_proposals_are_draws_of_the_prior_each_valued_by_the_smaller_target_twin():
    agent, batch = setup(idql, samples=7)
    obs, noise = batch["obs"], normal(N, D)
    action, value = agent.propose(obs, noise)
    assert action.shape == (7, N, D) and value.shape == (7, N)
    gaussian = NormalDist()
    for i in range(7):
        shift = agent.shifts[i, 0].tolist()
        draw = [
            [gaussian.inv_cdf((gaussian.cdf(e) + s) % 1) for e, s in zip(row, shift)]
            for row in noise.tolist()
        ]
        draw = torch.tensor(draw, dtype=torch.float64)
        torch.testing.assert_close(action[i], agent.actor(obs, draw), rtol=1e-4, atol=1e-5)
        expected = agent.q_a_target(obs, action[i]).min(0).values
        torch.testing.assert_close(value[i], expected)
    different = (action[:, None] - action[None]).abs().amax((2, 3))
    assert (different + torch.eye(7) > 0.1).all()


class Noise(nn.Module):
    def forward(self, obs, noise):
        return noise


def test_every_proposal_comes_of_gaussian_noise_as_if_it_alone_was_drawn():
    agent, _ = setup(idql, samples=5)
    agent.actor = Noise()
    agent.q_a_target = Known(lambda obs, action: action[:, 0])
    draws, _ = agent.propose(torch.zeros(20_000, OBS), torch.randn(20_000, D))
    expected = torch.special.ndtri(torch.linspace(0.05, 0.95, 19))
    for draw in draws.float():
        found = draw.quantile(torch.linspace(0.05, 0.95, 19), dim=0)
        assert (found - expected[:, None]).abs().max() < 0.06
        corr = torch.corrcoef(draw.T) - torch.eye(D)
        assert corr.abs().max() < 0.04


def test_proposals_are_finite_however_far_the_noise_lies():
    agent, batch = setup(idql)
    agent.shifts[0] = 0
    for noise in (9.0, -9.0, 40.0):
        action, _ = agent.propose(batch["obs"], torch.full((N, D), noise))
        assert action.isfinite().all()


def constructed(values, v, expectile=0.8):
    """An agent in whose every state the proposals are worth `values`, and V is v."""
    agent, batch = setup(idql, samples=len(values), expectile=expectile)
    agent.v = Constant(v)

    def propose(obs, noise):
        n = torch.arange(len(values)).double()
        action = n[:, None, None] + torch.arange(len(obs)).double()[:, None] * 100
        return action.expand(-1, -1, D), torch.tensor(values).double()[:, None].expand(-1, len(obs))

    agent.propose = propose
    return agent


def test_the_best_proposal_of_each_state_is_played():
    agent, batch = setup(idql, samples=6)
    obs, noise = batch["obs"], normal(N, D)
    action, value = agent.propose(obs, noise)
    best = value.argmax(0)
    assert len(best.unique()) > 2
    played = agent.act(obs, noise)
    for n in range(N):
        assert torch.equal(played[n], action[best[n], n])
    assert not played.requires_grad


@pytest.mark.parametrize("expectile", [0.5, 0.8])
def test_exploration_chooses_by_the_weights_of_v(expectile):
    """One better than V among four: chosen e / (e + 3 (1 - e)) of the time, the others alike."""
    agent = constructed([0.5, 3.0, 0.0, 0.9], v=1.0, expectile=expectile)
    n = 20_000
    played = agent.explore(torch.zeros(n, OBS), torch.zeros(n, D))[:, 0]
    row, choice = played.div(100, rounding_mode="floor"), played % 100
    assert torch.equal(row, torch.arange(n).double()), "an action of another state"
    shares = np.bincount(choice.long().numpy(), minlength=4) / n
    weight = np.array([1 - expectile, expectile, 1 - expectile, 1 - expectile])
    np.testing.assert_allclose(shares, weight / weight.sum(), atol=0.02)


def test_each_network_has_its_rate():
    torch.manual_seed(0)
    decoder = idql.Decoder(decoder_file(OBS, ACT, CHUNK))
    agent = idql.Agent(idql.Args(hidden_size=16, lr=0.02, actor_lr=0.003), decoder)
    obs, noise = torch.randn(64, OBS), torch.randn(64, D)
    assert torch.equal(agent.actor(obs, noise), decoder(obs, noise))
    batch = {"obs": obs, "action": noise.tanh(), "reward": obs[:, 0], "next_obs": obs}
    for network, rate in (("v", 0.02), ("q_a", 0.02), ("actor", 0.003)):
        before = copy.deepcopy(getattr(agent, network))
        name = {"v": "value", "q_a": "action_critic", "actor": "actor"}[network]
        getattr(agent, f"update_{name}")(batch | {"terminated": torch.zeros(64)})
        moved = (flat(before) - flat(getattr(agent, network))).abs().max()
        assert moved == pytest.approx(rate, rel=1e-2)  # the first step of Adam is as long


# --- does it learn? ---


@pytest.mark.slow
def test_it_picks_the_better_mode_and_then_clones_it(bandit, tmp_path):
    run = finish(tmp_path, SCRIPT, *BANDIT, "--backbone", bandit, before=register_bandit)
    frozen, agent, obs, noise = play_bandit(idql, run)
    played, cloned = agent.act(obs, noise)[:, 0], agent.actor(obs, noise)[:, 0]
    print((played > 0).float().mean(), (played - 0.6).abs().mean(), (cloned > 0).float().mean())
    assert (played > 0).float().mean() > 0.97 and (played - 0.6).abs().mean() < 0.15
    assert (cloned > 0).float().mean() > (frozen > 0).float().mean() + 0.1
    with np.load(run / "eval.npz") as evals:
        returns = evals["return"].mean(1)
    assert returns[0] < 0.5 and returns[-1] > 0.85
    assert metrics(run)[-1]["entropy/action"] != metrics(run)[-1]["entropy/action_frozen"]
