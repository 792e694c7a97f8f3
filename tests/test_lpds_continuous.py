"""lpds_continuous.py formula by formula, in this process: the three updates against the paper's equations, rewritten
here, the chunk wrapper against numpy, evaluation and probe on constructed cases, the command line against its pages.

What needs whole runs (exact resume, signals, full disks) is in test_reliability.py, the decoder in test_decoder.py.
"""

import ast
import copy
import dataclasses
import math
import re
import shlex
import sys
import types
import typing
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpds_continuous as lpds
from lpds_continuous import PRESETS, Agent, Args, Decoder, Replay, parse_args

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "lpds_continuous.py"
DOCS = ROOT / "docs" / "lpds_continuous.md"
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*", "ignore:.*precision lowered.*")
OBS, ACT, CHUNK = 5, 2, 3
D, N = CHUNK * ACT, 32
ENVS = [f"{name}-v{version}" for name in ("Hopper", "Walker2d", "HalfCheetah") for version in (4, 5)]


# --- a small agent ---


def tiny_decoder(kind="diffusion", obs_dim=OBS, action_dim=ACT, chunk=CHUNK):
    config = dict(kind=kind, obs_dim=obs_dim, action_dim=action_dim, chunk=chunk, hidden=[16] * 3, cond_hidden=[])
    decoder = Decoder(config | dict(time_dim=8, activation="relu", train_steps=20, sample_steps=5))
    return decoder.freeze()


def setup(moved=True, seed=0, n=N, **settings):
    """(agent, batch, args): moved gives Delta a head that is not zero, critics a target that differs."""
    torch.manual_seed(seed)
    args = Args(**dict(hidden_size=16, num_layers=2, batch_size=n, reward_scale=0.3) | settings)
    agent = Agent(args, tiny_decoder())
    if moved:
        for parameter in [*agent.perturbation[-1].parameters(), *agent.q_a_target.parameters()]:
            parameter.data += 0.3 * torch.randn_like(parameter)
    batch = {"obs": torch.randn(n, OBS), "action": torch.rand(n, D) * 2 - 1, "reward": torch.randn(n)}
    batch |= {"next_obs": torch.randn(n, OBS), "terminated": (torch.rand(n) < 0.4).float()}
    return agent, batch, args


def to_double(agent, batch):
    agent.double()
    agent.decoder.times = agent.decoder.times.double()
    return {name: column.double() for name, column in batch.items()}


def plain_gradient_step(agent, name):
    """From now on a step of this network is theta <- theta - gradient: weights show the gradient."""
    agent.optimizers[name] = torch.optim.SGD(getattr(agent, name).parameters(), lr=1.0)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, after):
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def flat(module):
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def drawn(seed, like):
    """The noise that an update draws first after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = torch.randn_like(like)
    torch.manual_seed(seed)
    return noise


class Constructed(nn.Module):
    """A critic given as a formula: rule(obs, x) -> (B,), for both twins; remembers what it was asked."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.asked = rule, []

    def forward(self, obs, x):
        self.asked.append(x.detach())
        value = self.rule(obs, x)
        return torch.stack([value, value + 1])  # the minimum of the twins is the first


# --- update_perturbation ---


def lagrangian(agent, batch, noise, args):
    """Equation 8 by hand, in numpy but for the networks: -(E[Q] - alpha (E||Delta||^2 - delta)), and sq_norm."""
    shift = agent.perturbation(batch["obs"])
    if args.perturb == "noise":
        w = noise + shift
        if args.noise_bound != "none":
            w = torch.where(w.abs() > args.noise_bound, args.noise_bound * w.sign(), w)
        q = agent.q_w(batch["obs"], w)
    else:
        action = agent.decoder(batch["obs"], noise) + shift
        q = agent.q_a(batch["obs"], torch.maximum(torch.minimum(action, torch.ones(())), -torch.ones(())))
    q, shift = q.detach().double().numpy(), shift.detach().double().numpy()
    norms = (shift**2).sum(1) if args.delta_norm == "sum" else (shift**2).mean(1)
    return -(np.minimum(*q).mean() - agent.alpha.item() * (norms.mean() - args.delta)), norms.mean()


@pytest.mark.parametrize("settings", [{}, {"perturb": "action"}, {"noise_bound": 0.8}, {"lagrangian": False}])
@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_the_loss_of_delta_is_minus_the_lagrangian(norm, settings):
    agent, batch, args = setup(delta_norm=norm, delta=0.2, alpha_init=1.7, **settings)
    noise = drawn(5, batch["action"])
    loss, sq_norm = lagrangian(agent, batch, noise, args)
    info = lpds.update_perturbation(agent, batch, args)
    assert info["losses/perturbation"].item() == pytest.approx(loss, rel=1e-5)
    assert info["trust_region/sq_norm"].item() == pytest.approx(sq_norm, rel=1e-5)
    assert info["trust_region/violation"].item() == pytest.approx(sq_norm / 0.2 - 1, rel=1e-5)
    kl = 0.5 * sq_norm * (1 if norm == "sum" else D)  # of N(Delta, I) from N(0, I)
    if args.perturb == "noise":
        assert info["trust_region/kl"].item() == pytest.approx(kl, rel=1e-5)
    else:
        assert not {"trust_region/kl", "trust_region/saturated"} & set(info)
    assert not any(value.requires_grad for value in info.values())


def test_the_kl_is_that_of_torch_distributions():
    agent, batch, args = setup()
    shifted = torch.distributions.Normal(agent.perturbation(batch["obs"]).detach(), 1.0)
    kl = torch.distributions.kl_divergence(shifted, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert lpds.update_perturbation(agent, batch, args)["trust_region/kl"].item() == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"perturb": "action"}, {"noise_bound": 0.8}, {"lagrangian": False}])
@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_the_step_of_delta_follows_finite_differences_of_the_lagrangian(norm, settings):
    agent, batch, args = setup(delta_norm=norm, delta=0.2, alpha_init=1.7, **settings)
    batch = to_double(agent, batch)
    noise, before, copy_ = drawn(5, batch["action"]), flat(agent.perturbation), copy.deepcopy(agent)
    plain_gradient_step(agent, "perturbation")
    lpds.update_perturbation(agent, batch, args)
    gradient = before - flat(agent.perturbation)
    assert gradient.norm() > 1e-3
    for direction in (gradient / gradient.norm(), torch.randn(len(gradient), dtype=torch.float64)):
        side = []
        for h in (1e-6, -1e-6):
            nn.utils.vector_to_parameters(before + h * direction, copy_.perturbation.parameters())
            side.append(lagrangian(copy_, batch, noise, args)[0])
        assert (side[0] - side[1]) / 2e-6 == pytest.approx((gradient @ direction).item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("delta, step", [(1e-6, 5.0), (1e6, -1.0), (None, None)])
def test_log_dual_moves_alpha_by_clipped_relative_steps(delta, step):
    agent, batch, args = setup(alpha_init=0.7, alpha_lr=0.03)
    sq_norm = agent.perturbation(batch["obs"]).square().mean().item()
    args.delta = delta or sq_norm / 1.6
    info = lpds.update_perturbation(agent, batch, args)
    expected = 0.7 * math.exp(0.03 * (step if delta else 0.6))
    assert agent.alpha.item() == pytest.approx(expected, rel=1e-5)
    assert info["trust_region/alpha"].item() == agent.alpha.item()
    lpds.update_perturbation(agent, batch, args)
    assert info["trust_region/alpha"].item() == pytest.approx(expected, rel=1e-5)  # a value, not a view of alpha


def test_log_dual_at_delta_zero_falls_by_one_step():
    agent, batch, args = setup(moved=False, alpha_lr=0.03)
    lpds.update_perturbation(agent, batch, args)
    assert agent.alpha.item() == pytest.approx(math.exp(-0.03), rel=1e-6)


@pytest.mark.parametrize("alpha, delta", [(1.0, 0.01), (1.0, 3.0), (0.001, 3.0)])
@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_linear_dual_is_equation_10_projected_at_zero(norm, alpha, delta):
    agent, batch, args = setup(dual="linear", delta_norm=norm, alpha_init=alpha, delta=delta, alpha_lr=0.05)
    _, sq_norm = lagrangian(agent, batch, torch.zeros(N, D), args)
    lpds.update_perturbation(agent, batch, args)
    assert agent.alpha.item() == pytest.approx(max(0.0, alpha + 0.05 * (sq_norm - delta)), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("dual", ["log", "linear"])
def test_no_lagrangian_leaves_alpha_at_zero(dual):
    agent, batch, args = setup(lagrangian=False, dual=dual, delta=1e-4)
    for _ in range(3):
        lpds.update_perturbation(agent, batch, args)
    assert agent.alpha.item() == 0.0


@pytest.mark.parametrize("perturb", ["noise", "action"])
def test_an_update_of_delta_touches_nothing_but_delta_and_alpha(perturb):
    agent, batch, args = setup(perturb=perturb)
    before = weights(agent)
    lpds.update_perturbation(agent, batch, args)
    assert changed(before, weights(agent)) == {"perturbation", "alpha"}
    rest = [p for name, p in agent.named_parameters() if not name.startswith("perturbation")]
    assert all(p.grad is None for p in rest)
    assert not agent.optimizers["q_a"].state and not agent.optimizers["q_w"].state


def test_the_noise_bound_holds_and_is_counted():
    agent, batch, args = setup(noise_bound=1.1)
    agent.q_w = Constructed(lambda obs, w: w.sum(1))
    noise = drawn(5, batch["action"])
    beyond = ((noise + agent.perturbation(batch["obs"])).abs() > 1.1).float().mean().item()
    info = lpds.update_perturbation(agent, batch, args)
    assert 0.1 < beyond < 0.9 and info["trust_region/saturated"].item() == pytest.approx(beyond)
    assert agent.q_w.asked[0].abs().max() == pytest.approx(1.1)
    obs, far = torch.randn(64, OBS), 5 * torch.randn(64, D)
    clipped = (far + agent.perturbation(obs)).clamp(-1.1, 1.1)
    assert torch.equal(agent.act(obs, far), agent.decoder(obs, clipped))


def test_without_a_noise_bound_nothing_is_clipped_or_counted():
    agent, batch, args = setup()
    agent.q_w = Constructed(lambda obs, w: w.sum(1))
    noise = drawn(5, batch["action"])
    shifted = (noise + agent.perturbation(batch["obs"])).detach()
    assert lpds.update_perturbation(agent, batch, args)["trust_region/saturated"].item() == 0
    assert torch.equal(agent.q_w.asked[0], shifted)


@pytest.mark.parametrize("dual, norm", [("log", "sum"), ("log", "mean"), ("linear", "sum")])
def test_delta_and_alpha_converge_to_the_known_optimum(dual, norm):
    """Q^W(s, w) = c.w: the best Delta in the budget is c sqrt(delta) / |c|, at the price alpha = |c| / (2 sqrt(delta)).

    A mean over d coordinates is the sum with a budget of d * delta, and a price that is d times higher.
    """
    settings = dict(delta=0.3, dual=dual, delta_norm=norm, lr=2e-3, alpha_lr=0.02, n=64)
    agent, batch, args = setup(**settings)
    c = 2 * torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -0.3])
    agent.q_w = Constructed(lambda obs, w: w @ c)
    history = []
    for _ in range(2500):
        batch["obs"] = torch.randn(64, OBS)
        info = lpds.update_perturbation(agent, batch, args)
        history.append((info["trust_region/sq_norm"].item(), info["trust_region/alpha"].item()))
    sq_norm, alpha = np.mean(history[-500:], 0)
    budget, unit = (0.3, 1) if norm == "sum" else (0.3 * D, D)
    assert sq_norm / 0.3 == pytest.approx(1, abs=0.05)
    assert alpha == pytest.approx(unit * c.norm().item() / (2 * math.sqrt(budget)), rel=0.05)
    shift = agent.perturbation(torch.randn(256, OBS)).mean(0)
    torch.testing.assert_close(shift, c * math.sqrt(budget) / c.norm(), atol=0.1, rtol=0)


# --- update_action_critic ---


def td_target(agent, batch, args, noise):
    """Algorithm 1, line 10, in numpy but for the networks."""
    shift = agent.perturbation(batch["next_obs"]).detach()
    if args.perturb == "noise":
        w = noise + shift
        action = agent.decoder(batch["next_obs"], w if args.noise_bound == "none" else w.clamp(-0.8, 0.8))
    else:
        action = torch.from_numpy(np.clip((agent.decoder(batch["next_obs"], noise) + shift).numpy(), -1, 1))
    value = np.minimum(*agent.q_a_target(batch["next_obs"], action).detach().numpy())
    reward, terminated = batch["reward"].numpy(), batch["terminated"].numpy()
    return agent.reward_scale.item() * reward + args.gamma * np.where(terminated == 1, 0, value)


@pytest.mark.parametrize("settings", [{}, {"perturb": "action"}, {"noise_bound": 0.8}])
def test_the_action_critic_follows_its_td_target(settings):
    agent, batch, args = setup(gamma=0.9, tau=0.05, **settings)
    batch = to_double(agent, batch)
    y = td_target(agent, batch, args, drawn(5, batch["action"]))
    frozen = copy.deepcopy(agent)
    nn.init.zeros_(frozen.perturbation[-1].weight)
    nn.init.zeros_(frozen.perturbation[-1].bias)
    assert np.abs(td_target(frozen, batch, args, drawn(5, batch["action"])) - y).max() > 1e-3  # steering matters here
    before, target_before = flat(agent.q_a), flat(agent.q_a_target)
    q = agent.q_a(batch["obs"], batch["action"])
    loss = sum(0.5 * np.mean((member - y) ** 2) for member in q.detach().numpy())
    reference = copy.deepcopy(agent.q_a)
    error = reference(batch["obs"], batch["action"]) - torch.from_numpy(y)
    gradient = torch.autograd.grad((error**2).sum() / (2 * N), list(reference.parameters()))
    plain_gradient_step(agent, "q_a")
    torch.manual_seed(5)
    info = lpds.update_action_critic(agent, batch, args)

    assert info["losses/q_a"].item() == pytest.approx(loss, rel=1e-9)
    assert info["losses/q_a_value"].item() == pytest.approx(q.mean().item(), rel=1e-9)
    torch.testing.assert_close(before - flat(agent.q_a), torch.cat([g.reshape(-1) for g in gradient]))
    # Polyak, towards the weights after the step
    torch.testing.assert_close(flat(agent.q_a_target), 0.95 * target_before + 0.05 * flat(agent.q_a))


def test_a_termination_stops_the_bootstrap():
    agent, batch, args = setup()
    batch["terminated"][:] = 1
    other = batch | {"next_obs": torch.randn(N, OBS)}
    losses = [lpds.update_action_critic(copy.deepcopy(agent), b, args)["losses/q_a"] for b in (batch, other)]
    assert losses[0] == losses[1]


def test_polyak_at_its_ends():
    for tau in (0.0, 1.0):
        agent, batch, args = setup(tau=tau)
        before = flat(agent.q_a_target)
        lpds.update_action_critic(agent, batch, args)
        assert torch.equal(flat(agent.q_a_target), flat(agent.q_a) if tau else before)


@pytest.mark.parametrize("perturb", ["noise", "action"])
def test_an_update_of_the_action_critic_touches_it_and_its_target_alone(perturb):
    agent, batch, args = setup(perturb=perturb)
    before = weights(agent)
    lpds.update_action_critic(agent, batch, args)
    assert changed(before, weights(agent)) == {"q_a", "q_a_target"}
    assert all(p.grad is None for name, p in agent.named_parameters() if not name.startswith("q_a."))


# --- update_latent_critic ---


def test_the_latent_critic_equals_slice_by_slice_distillation():
    agent, batch, args = setup(n=4 * 8, batch_size=8, lr=1e-3, noise_bound=0.5)
    noise, reference, before = drawn(5, batch["action"]), copy.deepcopy(agent.q_w), weights(agent)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for step in range(4):
        rows = slice(8 * step, 8 * step + 8)
        obs, w = batch["obs"][rows], noise[rows]  # the unshifted prior, unclipped
        with torch.no_grad():
            y = agent.q_a(obs, agent.decoder(obs, w))
        q = reference(obs, w)
        loss = sum(0.5 * ((q[i] - y[i]) ** 2).mean() for i in range(2))  # member to member
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    info = lpds.update_latent_critic(agent, batch, args)
    torch.testing.assert_close(flat(agent.q_w), flat(reference), atol=1e-6, rtol=1e-5)
    assert info["losses/q_w"].item() == pytest.approx(loss.item(), rel=1e-4)
    with torch.no_grad():
        values = agent.q_a(batch["obs"], agent.decoder(batch["obs"], noise))
    assert info["losses/q_w_value"].item() == pytest.approx(values.mean().item(), rel=1e-5)
    assert changed(before, weights(agent)) == {"q_w"}
    assert all(p.grad is None for name, p in agent.named_parameters() if not name.startswith("q_w."))


# --- the policy ---


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("perturb", ["noise", "action"])
def test_the_first_policy_is_exactly_the_frozen_one(kind, perturb):
    torch.manual_seed(0)
    agent = Agent(Args(hidden_size=16, perturb=perturb), tiny_decoder(kind))
    obs, noise = torch.randn(64, OBS), torch.randn(64, D)
    assert torch.equal(agent.act(obs, noise), agent.decoder(obs, noise))
    assert all(parameter.requires_grad is False for parameter in agent.decoder.parameters())


def test_the_steered_policy_decodes_shifted_noise_or_shifts_and_clips_the_action():
    agent, batch, _ = setup()
    obs, noise, shift = batch["obs"], batch["action"], agent.perturbation(batch["obs"]).detach()
    assert torch.equal(agent.act(obs, noise), agent.decoder(obs, noise + shift))
    agent, batch, _ = setup(perturb="action")
    agent.perturbation[-1].bias.data += torch.tensor([9.0, -9.0, 0, 0, 0, 0])
    shift, action = agent.perturbation(obs).detach(), agent.act(obs, noise)
    assert (action[:, 0] == 1).all() and (action[:, 1] == -1).all()
    torch.testing.assert_close(action, (agent.decoder(obs, noise) + shift).clamp(-1, 1))


# --- chunks ---


class Counter(gym.Env):
    """Observation: (steps of this episode, resets); reward of step t: 10^-t; ends in a fall at step `fall`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-1, -0.5], np.float32), np.array([1, 0.25], np.float32))

    def __init__(self, fall=None, success=None):
        self.fall, self.success, self.resets, self.actions = fall, success, 0, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        return np.array([0.0, self.resets]), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        info = {} if self.success is None else {"success": self.t == self.success}
        return np.array([self.t, self.resets], float), 10.0**-self.t, self.t == self.fall, False, info


STATS = {"obs_min": [-1.0, 3.0], "obs_max": [3.0, 3.5], "action_min": [-2.0, -0.5], "action_max": [1.0, 1.5]}


@pytest.fixture
def toy():
    """toy(limit, fall=...) -> an environment of chunks of 4, made as the script makes it."""
    made = []

    def make(limit, **kwargs):
        name = f"LpdsCounter{len(made)}-v0"
        made.append(name)
        gym.register(name, Counter, max_episode_steps=limit)
        return lpds.make_env(name, 4, STATS, **kwargs)

    yield make
    for name in made:
        del gym.registry[name]


def seen(t, resets=1):
    """The observation after t steps, normalised by DPPO's formula, in numpy."""
    low, high = np.array(STATS["obs_min"]), np.array(STATS["obs_max"])
    return (2 * ((np.array([t, resets]) - low) / (high - low + 1e-6) - 0.5)).astype(np.float32)


def play(env, chunks=1, value=0.0):
    return [env.step(np.full(8, value, np.float32)) for _ in range(chunks)]


def test_a_chunk_is_executed_open_loop_and_its_rewards_are_summed(toy):
    env = toy(100)
    assert isinstance(env, lpds.ActionChunk)
    obs, info = env.reset(seed=0)
    assert np.array_equal(obs, seen(0)) and obs.dtype == np.float32 and env.observation_space.contains(obs)
    assert env.action_space == gym.spaces.Box(-1, 1, (8,), np.float32)
    (obs, reward, terminated, truncated, info), (obs2, reward2, *_) = play(env, 2)
    assert np.array_equal(obs, seen(4)) and np.array_equal(obs2, seen(8))
    assert reward == pytest.approx(0.1111) and reward2 == pytest.approx(0.00001111)
    assert (terminated, truncated) == (False, False) and info == {"steps": 4, "success": False}


def test_actions_are_unnormalised_row_by_row_and_clipped_to_the_box(toy):
    env, action = toy(100), np.random.default_rng(0).uniform(-1, 1, 8).astype(np.float32)
    env.reset(seed=0)
    env.step(action)
    low, high, box = np.array(STATS["action_min"]), np.array(STATS["action_max"]), env.unwrapped.action_space
    wanted = (action.reshape(4, 2).astype(np.float64) + 1) / 2 * (high - low) + low
    assert (wanted < box.low).any() and (wanted > box.high).any()
    executed = np.array(env.unwrapped.actions)
    np.testing.assert_allclose(executed, np.clip(wanted, box.low, box.high), rtol=1e-6)
    assert all(box.contains(a) for a in executed)


def test_a_chunk_stops_at_the_time_limit_inside_it(toy):
    env = toy(6)
    env.reset(seed=0)
    _, (obs, reward, terminated, truncated, info) = play(env, 2)
    assert (terminated, truncated) == (False, True) and len(env.unwrapped.actions) == 6
    assert np.array_equal(obs, seen(6)) and reward == pytest.approx(0.000011)
    assert info["steps"] == 2 and info["success"] is True  # no success flag: reaching the time limit counts
    assert info["episode"]["r"] == pytest.approx(0.111111) and info["episode"]["l"] == 6
    env.reset()
    assert play(env)[0][4]["success"] is False


def test_a_chunk_stops_at_a_fall_inside_it(toy):
    env = toy(6, fall=3)
    env.reset(seed=0)
    ((obs, reward, terminated, truncated, info),) = play(env)
    assert (terminated, truncated) == (True, False) and len(env.unwrapped.actions) == 3
    assert np.array_equal(obs, seen(3)) and reward == pytest.approx(0.111)
    assert info["steps"] == 3 and info["success"] is False and info["episode"]["l"] == 3


def test_a_fall_at_the_time_limit_is_no_success(toy):
    env = toy(4, fall=4)
    env.reset(seed=0)
    ((_, _, terminated, truncated, info),) = play(env)
    assert terminated and truncated and info["success"] is False


def test_the_success_flag_of_an_environment_counts_at_any_step(toy):
    env = toy(12, success=2)  # true at step 2 only, false again afterwards
    env.reset(seed=0)
    assert [info["success"] for *_, info in play(env, 3)] == [True, True, True]
    env.reset()
    env.unwrapped.success = 99
    assert [info["success"] for *_, info in play(env, 3)] == [False, False, False]  # its time limit is no success


def test_vector_environments_hand_out_the_real_final_observation(toy):
    makers = [lambda: toy(6, fall=3), lambda: toy(6)]
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    obs, reward, terminated, truncated, info = envs.step(np.zeros((2, 8), np.float32))
    assert terminated.tolist() == [True, False] and np.array_equal(info["final_obs"][0], seen(3))
    assert np.array_equal(obs, [seen(0, 2), seen(4)])
    assert info["final_info"]["steps"][0] == 3 and info["steps"].tolist() == [0, 4]
    obs, reward, terminated, truncated, info = envs.step(np.zeros((2, 8), np.float32))
    assert truncated.tolist() == [False, True] and terminated.tolist() == [True, False]
    assert np.array_equal(info["final_obs"][1], seen(6)) and info["final_info"]["steps"].tolist() == [3, 2]
    assert info["final_info"]["success"].tolist() == [False, True]
    assert info["final_info"]["episode"]["l"].tolist() == [3, 6]


@pytest.mark.parametrize("env_id", ENVS)
def test_an_environment_goes_on_from_its_state_to_the_bit(env_id, tmp_path):
    """Into a fresh environment, through a file; physics, time limit, statistics and the generator of later resets."""
    size = gym.spec(env_id).make().action_space.shape[0]
    dims = gym.spec(env_id).make().observation_space.shape[0]
    stats = {"obs_min": -np.ones(dims), "obs_max": np.ones(dims)}
    stats |= {"action_min": -np.ones(size), "action_max": np.ones(size)}
    make = partial(lpds.make_env, env_id, 4, stats, max_episode_steps=30)

    def go_on(env):
        rng, trace = np.random.default_rng(1), []
        for _ in range(12):
            obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 4 * size))
            trace.append([*obs, reward, terminated, truncated, info["steps"], info["success"]])
            if terminated or truncated:
                trace += [list(info["episode"][key] for key in "rl"), env.reset()[0]]
        return [np.asarray(row, np.float64).tobytes() for row in trace]

    env = make()
    env.reset(seed=3)
    for chunk in np.random.default_rng(0).uniform(-0.3, 0.3, (3, 4 * size)):
        env.step(chunk)
    torch.save(lpds.env_state(env), tmp_path / "state.pt")
    expected = go_on(env)
    fresh = make()
    fresh.reset(seed=99)
    fresh.step(np.ones(4 * size))
    lpds.env_state(fresh, torch.load(tmp_path / "state.pt", weights_only=True))
    assert go_on(fresh) == expected


# --- evaluation and probe ---


class Recorder:
    """An episode of `length` steps, or until an action above 50; writes down seed and actions."""

    action_space = gym.spaces.Box(-1, 1, (D,), np.float32)

    def __init__(self, length):
        self.length = length

    def reset(self, seed):
        self.seed, self.t, self.actions = seed, 0, []
        return np.full(OBS, seed, np.float32), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action.copy())
        over = self.t == self.length
        obs = np.full(OBS, self.seed, np.float32)
        return obs, 1.0, bool(action[0] > 50), over, {"steps": 3, "success": over}


def test_an_evaluation_episode_does_not_depend_on_the_others():
    policies = [lambda obs, noise: noise, lambda obs, noise: torch.where(obs[:, :1] % 2 == 0, 99.0, noise)]
    sets = [[Recorder(length) for length in (4, 7, 2, 5)] for _ in policies]
    whole, cut = (lpds.evaluate(policy, envs, 100, "cpu") for policy, envs in zip(policies, sets))
    assert [env.seed for env in sets[0]] == [100, 101, 102, 103]
    for i in (1, 3):
        np.testing.assert_array_equal(sets[0][i].actions, sets[1][i].actions)
    assert whole["return"].tolist() == [4, 7, 2, 5] and whole["length"].tolist() == [12, 21, 6, 15]
    assert whole["success"].all() and cut["success"].tolist() == [False, True, False, True]
    assert cut["return"].tolist() == [1, 7, 1, 5]
    drawn_noise = np.concatenate([env.actions for env in sets[0]])
    assert len(np.unique(drawn_noise)) == drawn_noise.size and abs(drawn_noise.mean()) < 0.3  # fresh in each step


def test_evaluation_repeats_and_frozen_equals_unmoved_agent():
    torch.manual_seed(0)
    agent = Agent(Args(hidden_size=16), tiny_decoder(obs_dim=11, action_dim=3, chunk=4))
    stats = {"obs_min": -np.ones(11), "obs_max": np.ones(11), "action_min": -np.ones(3), "action_max": np.ones(3)}
    envs, state = [lpds.make_env("Hopper-v5", 4, stats) for _ in range(3)], torch.get_rng_state()
    first, again, steered = (lpds.evaluate(p, envs, 7, "cpu") for p in (agent.decoder, agent.decoder, agent.act))
    other = lpds.evaluate(agent.decoder, envs, 8, "cpu")
    for key in ("return", "success", "length"):
        assert first[key].shape == (3,) and np.array_equal(first[key], again[key])
        assert np.array_equal(first[key], steered[key])
    assert not np.array_equal(first["return"], other["return"])
    assert torch.equal(state, torch.get_rng_state())  # evaluating more or less often leaves training as it is


@pytest.mark.parametrize("sign, corr, tolerance", [(3, 1, 1e-3), (-1, -1, 1e-3), (0, 0, 0.1)])
def test_probe_finds_a_perfect_latent_critic(sign, corr, tolerance):
    """However far off it is from state to state; a random one ranks nothing."""
    agent, batch, _ = setup()

    def q_w(obs, w):
        value = agent.q_a(obs, agent.decoder(obs, w)).mean(0)
        return sign * value + 10 * obs.sum(1) if sign else torch.randn(len(w))

    agent.q_w = Constructed(q_w)
    assert lpds.probe(agent, batch["obs"], 0)["losses/q_w_corr"].item() == pytest.approx(corr, abs=tolerance)


def test_probe_correlates_within_states_over_steered_noise():
    agent, batch, _ = setup(noise_bound=1.0)
    asked = []
    agent.q_w.register_forward_hook(lambda module, inputs, output: asked.append((*inputs, output)))
    corr = lpds.probe(agent, batch["obs"], 3)["losses/q_w_corr"].item()
    obs, w, q_w = (x.detach() for x in asked[0])
    assert len(w) == N * 64 and w.abs().max() == 1.0  # steered and bounded
    q_a = agent.q_a(obs, agent.decoder(obs, w)).detach().mean(0).view(N, 64).numpy()
    q_w = q_w.mean(0).view(N, 64).numpy()
    assert (obs.view(N, 64, OBS) == batch["obs"][:, None]).all()
    assert corr == pytest.approx(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q_a, q_w)]), abs=1e-4)


def test_probe_sees_no_difference_at_delta_zero_and_one_beyond():
    agent, batch, _ = setup(moved=False)
    info, state = lpds.probe(agent, batch["obs"], 3), torch.get_rng_state()
    assert info["entropy/action"] == info["entropy/action_frozen"]
    again = lpds.probe(agent, batch["obs"], 3)
    assert all(torch.equal(torch.as_tensor(info[key]), torch.as_tensor(again[key])) for key in info)
    assert torch.equal(state, torch.get_rng_state())
    agent.perturbation[-1].bias.data += 3.0
    moved = lpds.probe(agent, batch["obs"], 3)
    assert moved["entropy/action"] != info["entropy/action"]
    assert moved["entropy/action_frozen"] == info["entropy/action_frozen"]
    agent, batch, _ = setup(perturb="action")
    assert "losses/q_w_corr" not in lpds.probe(agent, batch["obs"], 3)  # there is no latent critic to judge


# --- replay and files ---


def test_replay_returns_rows_as_they_were_stored():
    torch.manual_seed(0)
    replay, rng = Replay(50, OBS, D, "cpu"), np.random.default_rng(0)
    for start in range(0, 40, 4):
        key = np.arange(start, start + 4)
        row = {"obs": key[:, None] + rng.random((4, OBS)), "action": key[:, None] + rng.random((4, D))}
        row |= {"reward": key + 0.5, "next_obs": key[:, None] + rng.random((4, OBS)), "terminated": key % 2 == 1}
        replay.add(**row)
    batch = replay.sample(4000)
    key = batch["reward"].floor()
    for name in ("obs", "action", "next_obs"):
        assert torch.equal(batch[name].floor(), key[:, None].expand_as(batch[name]))
    assert torch.equal(batch["terminated"], key % 2)
    counts = np.bincount(key.long().numpy(), minlength=50)
    assert (counts[:40] > 50).all() and not counts[40:].any()  # all that was stored, nothing beyond


def test_a_failed_save_leaves_what_was_there_before(tmp_path, capsys):
    path = tmp_path / "file"
    lpds.save(path, lambda file: file.write_text("first"))
    assert path.read_text() == "first"
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")):

        def write(file, error=error):
            file.write_text("half")
            raise error

        with pytest.raises(SystemExit) as stop:
            lpds.save(path, write)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and str(path) in message and str(error) in message
        assert path.read_text() == "first" and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_csv_has_every_column_and_leaves_gaps_empty(tmp_path):
    lpds.write_csv(tmp_path / "metrics.csv", [{"a": 1.0, "b": 1 / 3}, {"a": 20_000_000.0, "c": -1e-30}])
    assert (tmp_path / "metrics.csv").read_text() == "a,b,c\n1,0.333333333,\n20000000,,-1e-30\n"


# --- command line ---


def fits(value, kind):
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    return type(value) is kind


HINTS = typing.get_type_hints(Args)


def test_every_setting_has_a_docstring_and_a_default_of_its_type():
    (body,) = [node.body for node in ast.parse(SCRIPT.read_text()).body if getattr(node, "name", "") == "Args"]
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    for i in fields:
        text = body[i + 1].value.value if i + 1 < len(body) and isinstance(body[i + 1], ast.Expr) else ""
        name = body[i].target.id
        assert len(text.split()) >= 3, f"--{name}: says too little about itself"
        assert fits(getattr(Args(), name), HINTS[name]), name
    assert len(fields) == len(HINTS) == len(dataclasses.fields(Args))


@pytest.mark.parametrize("preset, values", [(p, v) for p, envs in PRESETS.items() for v in envs.values()])
def test_presets_fill_existing_settings_with_values_of_their_type(preset, values):
    assert {name: value for name, value in values.items() if not fits(value, HINTS[name])} == {}


@pytest.mark.parametrize("env_id", ENVS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_presets_beat_defaults_and_flags_beat_presets(env_id, preset):
    family, plain = env_id.split("-")[0], dataclasses.asdict(Args())
    command = ["--env-id", env_id, "--preset", preset]
    args, values = dataclasses.asdict(parse_args(command)), PRESETS[preset].get(family, {})
    assert args == plain | values | {"env_id": env_id, "preset": preset}
    for name, value in values.items():
        flag = [f"--{name.replace('_', '-')}", str(plain[name])]  # even a flag that repeats the field's default
        assert value == plain[name] or dataclasses.asdict(parse_args(command + flag)) == args | {name: plain[name]}


@pytest.mark.parametrize("env_id, delta", [*zip(ENVS, (0.5, 0.5, 0.35, 0.35, 0.35, 0.35))])
def test_delta_is_that_of_table_2(env_id, delta):
    assert {parse_args(["--env-id", env_id, "--preset", preset]).delta for preset in PRESETS} == {delta}


def test_help_renders_and_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in HINTS:
        assert re.search(rf"--(no-)?{name.replace('_', '-')}\b", text), name


DOCUMENTED = [(path.name, path.read_text()) for path in (SCRIPT, DOCS, ROOT / "README.md") if path.exists()]
COMMAND = re.compile(r"python lpds_continuous\.py((?:\\\n|[^\n`|#])*)")
COMMANDS = sorted({(name, c.strip()) for name, text in DOCUMENTED for c in COMMAND.findall(text.replace("\\\n", " "))})


@pytest.mark.parametrize("where, command", [c for c in COMMANDS if "--resume" not in c[1]])
def test_documented_commands_parse(where, command):
    parse_args(shlex.split(command))


@pytest.mark.parametrize("path", [SCRIPT, DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_every_page_shows_a_command(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    assert any(where == path.name for where, _ in COMMANDS)


ABLATIONS = re.findall(r"^\|[^|]*\| (`--[^|]*) \|$", DOCS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("flags", [f for row in ABLATIONS for f in re.findall("`(.*?)`", row)])
def test_documented_ablations_parse(flags):
    parse_args(flags.split())


def words(text):
    return " ".join(text.split())


def test_departures_are_marked_in_the_script_and_listed_in_its_page():
    """Both ways: a tag `differs from X: first words` of the page opens exactly one comment of the script."""
    blocks = re.findall(r"(?:[^\n]*# .*\n)+", SCRIPT.read_text())
    comments = [words(re.sub(r"^\s*#", "", block, flags=re.M)) for block in blocks]
    marked = [words(m) for c in comments for m in re.findall(r"differs from .*?:.*?(?=differs from|$)", c)]
    listed = [words(tag) for tag in re.findall(r"`(differs from [^`]*?:[^`]*)`", DOCS.read_text())]
    assert marked and all(len(tag.split(":")[1].split()) >= 2 for tag in listed)
    for tag in listed:
        assert sum(comment.startswith(tag) for comment in marked) == 1, f"the script has no comment `{tag} ...`"
    for comment in marked:
        assert any(comment.startswith(tag) for tag in listed), f"the page does not list `{comment[:60]} ...`"


# --- dependencies ---


def header(path):
    """Requirements of PEP 723, or None."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    source = block and re.sub(r"^# ?", "", block[1], flags=re.M)
    return block and ast.literal_eval(re.search(r"dependencies = (\[.*\])", source, re.S)[1])


def listed(path):
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-")}


HEADERS = {
    path.name: header(path) for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]) if header(path)
}


def test_the_header_of_the_model_script_is_the_core_set():
    assert set(HEADERS["lpds_continuous.py"]) == listed(ROOT / "requirements.txt")


@pytest.mark.parametrize("script", HEADERS)
def test_headers_agree_with_requirements(script):
    """A script may need less than the core set, or one of the extra sets; never other bounds."""
    files = [ROOT / "requirements.txt", *ROOT.glob("requirements/*.txt")]
    assert set(HEADERS[script]) <= set.union(*map(listed, files))
