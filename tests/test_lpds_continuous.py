"""lpds_continuous.py formula by formula: its updates against the paper's equations in numpy, the
chunk wrapper, evaluation and probe on constructed cases. Then tiny runs: order of the updates, what
is stored and written, and whether it learns.

Killed and resumed runs are in test_resume.py, wrong input in test_faults.py.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    Process,
    call,
    checkpoint,
    decoder_file,
    differences,
    finish,
    metrics,
    only_run,
)
from torch import nn

import lpds_continuous as lpds
from entropy import knn_entropy

SCRIPT = "lpds_continuous.py"
OBS, ACT, CHUNK, N = 5, 2, 3, 32
D = ACT * CHUNK


# --- a small agent, in double precision ---


def setup(moved=True, n=N, **settings):
    """(agent, batch): moved gives Delta a head that is not zero, and Q^A's target other weights."""
    torch.manual_seed(0)
    args = dict(hidden_size=16, batch_size=n, reward_scale=0.3, delta=0.2) | settings
    decoder = lpds.Decoder(decoder_file(OBS, ACT, CHUNK))
    agent = lpds.Agent(lpds.Args(**args), decoder).double()
    if moved:
        for parameter in [*agent.perturbation[-1].parameters(), *agent.q_a_target.parameters()]:
            parameter.data += 0.3 * torch.randn_like(parameter)
    batch = {"obs": torch.randn(n, OBS), "action": torch.rand(n, D) * 2 - 1}
    batch |= {"reward": torch.randn(n), "next_obs": torch.randn(n, OBS)}
    batch |= {"terminated": (torch.rand(n) < 0.4).float()}
    return agent, {name: column.double() for name, column in batch.items()}


def plain_gradient_steps(agent):
    """From now on theta <- theta - gradient: the weights show the gradient."""
    agent.optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)


def drawn(like):
    """The noise that an update draws first."""
    torch.manual_seed(5)
    noise = torch.randn_like(like)
    torch.manual_seed(5)
    return noise


def flat(module):
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def changed(before, agent):
    now = agent.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], now[name])}


def output(network, *inputs):
    """[Linear, LayerNorm, Tanh] x 3, Linear, in numpy."""
    x = np.concatenate([i.detach().numpy() for i in inputs], 1)
    parameters = [p.detach().numpy() for p in network.parameters()]
    for i in range(0, 12, 4):
        weight, bias, gain, offset = parameters[i : i + 4]
        x = x @ weight.T + bias
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = np.tanh(gain * x + offset)
    return x @ parameters[12].T + parameters[13]


def twins(critic, *inputs):  # (2, B)
    return np.stack([output(network, *inputs)[:, 0] for network in critic])


def act(agent, obs, noise, bound=math.inf):
    w = np.clip(noise.numpy() + output(agent.perturbation, obs), -bound, bound)
    return agent.decoder(obs, torch.from_numpy(w)).detach()


class Constructed(nn.Module):
    """A critic given as a formula, (obs, x) -> (B,); its twins differ by 1. Keeps its questions."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.asked = rule, []

    def forward(self, obs, x):
        self.asked.append((obs, x.detach()))
        value = self.rule(obs, x)
        return torch.stack([value, value + 1])


# --- Q^A ---


@pytest.mark.parametrize("bound", [math.inf, 0.8])
def test_the_action_critic_follows_its_td_target(bound):
    """Algorithm 1, lines 8 to 11 and 20."""
    agent, batch = setup(gamma=0.9, tau=0.05, noise_bound=bound)
    next_action = act(agent, batch["next_obs"], drawn(batch["action"]), bound)
    value = twins(agent.q_a_target, batch["next_obs"], next_action).min(0)
    reward, terminated = batch["reward"].numpy(), batch["terminated"].numpy()
    y = 0.3 * reward + np.where(terminated == 1, 0, 0.9 * value)
    q = twins(agent.q_a, batch["obs"], batch["action"])
    error = agent.q_a(batch["obs"], batch["action"]) - torch.from_numpy(y)
    gradient = torch.autograd.grad(error.square().sum() / (2 * N), list(agent.q_a.parameters()))
    gradient = torch.cat([g.reshape(-1) for g in gradient])
    before, slow = flat(agent.q_a), flat(agent.q_a_target)
    plain_gradient_steps(agent)

    info = agent.update_action_critic(batch)
    assert info["losses/q_a"].item() == pytest.approx(0.5 * ((q - y) ** 2).mean(1).sum(), rel=1e-6)
    assert info["losses/q_a_value"].item() == pytest.approx(q.mean(), rel=1e-6)
    torch.testing.assert_close(before - flat(agent.q_a), gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(flat(agent.q_a_target), 0.95 * slow + 0.05 * flat(agent.q_a))


def test_the_target_is_worth_less_than_each_of_its_twins():
    agent, batch = setup(gamma=0.9)
    agent.q_a_target = Constructed(lambda obs, x: obs.sum(1))
    batch |= {"terminated": torch.zeros(N).double()}
    y = 0.3 * batch["reward"] + 0.9 * batch["next_obs"].sum(1)
    loss = 0.5 * (agent.q_a(batch["obs"], batch["action"]) - y).square().mean(1).sum()
    assert agent.update_action_critic(batch)["losses/q_a"].item() == pytest.approx(loss.item())


def test_the_action_critic_values_the_steered_policy_and_touches_nothing_else():
    agent, batch = setup()
    before, asked = weights(agent), Constructed(lambda obs, x: x.sum(1))
    agent.q_a_target = asked
    noise = drawn(batch["action"])
    agent.update_action_critic(batch)
    torch.testing.assert_close(asked.asked[0][1], act(agent, batch["next_obs"], noise))
    assert not torch.allclose(asked.asked[0][1], agent.decoder(batch["next_obs"], noise))
    before = {name: tensor for name, tensor in before.items() if name in agent.state_dict()}
    assert changed(before, agent) == {"q_a"}


# --- Q^W ---


def test_the_latent_critic_is_distilled_slice_by_slice_member_to_member():
    """Lines 12 to 15, over the unshifted prior, unclipped, from the online Q^A."""
    agent, batch = setup(n=32, batch_size=8, lr=1e-3, noise_bound=0.5)
    before, reference = weights(agent), copy.deepcopy(agent.q_w)
    noise = drawn(batch["action"])
    y = torch.from_numpy(twins(agent.q_a, batch["obs"], agent.decoder(batch["obs"], noise)))
    x = torch.cat([batch["obs"], noise], 1)
    for i, twin in enumerate(reference):
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
        for rows in torch.arange(32).split(8):
            optimizer.zero_grad()
            (0.5 * (twin(x[rows])[:, 0] - y[i, rows]).square().mean()).backward()
            optimizer.step()

    info = agent.update_latent_critic(batch)
    for twin, network in zip(reference, agent.q_w):
        torch.testing.assert_close(flat(network), flat(twin), rtol=1e-5, atol=1e-8)
    assert info["losses/q_w_value"].item() == pytest.approx(y.mean().item(), rel=1e-6)
    assert changed(before, agent) == {"q_w"}


# --- Delta and alpha ---


def lagrangian(agent, batch, noise):
    """Equation 8, negative: alpha (E||Delta||^2 - delta) - E[Q^W]; and E||Delta||^2."""
    args, shift = agent.args, output(agent.perturbation, batch["obs"])
    w = np.clip(noise.numpy() + shift, -args.noise_bound, args.noise_bound)
    q = twins(agent.q_w, batch["obs"], torch.from_numpy(w)).min(0).mean()
    norm = {"sum": np.sum, "mean": np.mean}[args.delta_norm](shift**2, 1).mean()
    return agent.alpha.item() * (norm - args.delta) - q, norm


VARIANTS = [{}, {"delta_norm": "sum"}, {"noise_bound": 0.8}, {"lagrangian": False}]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_delta_follows_finite_differences_of_the_lagrangian(settings):
    agent, batch = setup(alpha_init=1.7, **settings)
    noise, before = drawn(batch["action"]), flat(agent.perturbation)
    loss, norm = lagrangian(agent, batch, noise)
    directions = [torch.randn(len(before)).double() for _ in range(3)]
    expected = []
    for direction in directions:
        side = []
        for h in (1e-5, -1e-5):
            moved = before + h * direction
            nn.utils.vector_to_parameters(moved, agent.perturbation.parameters())
            side.append(lagrangian(agent, batch, noise)[0])
        expected.append((side[0] - side[1]) / 2e-5)
    nn.utils.vector_to_parameters(before.clone(), agent.perturbation.parameters())
    plain_gradient_steps(agent)
    drawn(batch["action"])

    info = agent.update_perturbation(batch)
    gradient = before - flat(agent.perturbation)
    assert [(gradient @ d).item() for d in directions] == pytest.approx(expected, rel=1e-4)
    assert info["losses/perturbation"].item() == pytest.approx(loss, rel=1e-6)
    assert info["trust_region/sq_norm"].item() == pytest.approx(norm, rel=1e-6)
    assert info["trust_region/violation"].item() == pytest.approx(norm / 0.2 - 1, rel=1e-6)
    assert not any(value.requires_grad for value in info.values())


@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_the_kl_is_that_of_torch_distributions(norm):
    agent, batch = setup(delta_norm=norm)
    shifted = torch.distributions.Normal(agent.perturbation(batch["obs"]).detach(), 1.0)
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(shifted, prior).sum(1).mean().item()
    assert agent.update_perturbation(batch)["trust_region/kl"].item() == pytest.approx(kl)


@pytest.mark.parametrize("delta, step", [(1e-6, 5.0), (1e6, -1.0), (None, 0.6)])
def test_the_log_dual_takes_clipped_relative_steps(delta, step):
    agent, batch = setup(alpha_init=0.7, alpha_lr=0.03)
    agent.args.delta = delta or (output(agent.perturbation, batch["obs"]) ** 2).mean() / 1.6
    info = agent.update_perturbation(batch)
    expected = 0.7 * math.exp(0.03 * step)
    assert agent.alpha.item() == pytest.approx(expected, rel=1e-6)
    agent.update_perturbation(batch)
    assert info["trust_region/alpha"].item() == pytest.approx(expected, rel=1e-6)  # not a view


@pytest.mark.parametrize("alpha, delta", [(1.0, 0.01), (1.0, 3.0), (0.001, 3.0)])
@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_the_linear_dual_is_equation_10_projected_at_zero(norm, alpha, delta):
    settings = dict(dual="linear", delta_norm=norm, alpha_init=alpha, delta=delta, alpha_lr=0.05)
    agent, batch = setup(**settings)
    _, sq_norm = lagrangian(agent, batch, batch["action"])
    agent.update_perturbation(batch)
    expected = max(0.0, alpha + 0.05 * (sq_norm - delta))
    assert agent.alpha.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("dual", ["log", "linear"])
def test_no_lagrangian_leaves_alpha_at_zero(dual):
    agent, batch = setup(lagrangian=False, dual=dual, delta=1e-4)
    for _ in range(3):
        agent.update_perturbation(batch)
    assert agent.alpha.item() == 0.0


def test_an_update_of_delta_touches_delta_and_alpha_alone():
    agent, batch = setup()
    before = weights(agent)
    agent.update_perturbation(batch)
    assert changed(before, agent) == {"perturbation", "alpha"}


@pytest.mark.parametrize("bound", [math.inf, 1.1])
def test_the_noise_bound_holds_in_the_update_and_in_the_policy(bound):
    agent, batch = setup(noise_bound=bound)
    agent.q_w = Constructed(lambda obs, w: w.sum(1))
    obs, noise = batch["obs"], drawn(batch["action"])
    w = torch.from_numpy(np.clip(noise.numpy() + output(agent.perturbation, obs), -bound, bound))
    agent.update_perturbation(batch)
    torch.testing.assert_close(agent.q_w.asked[0][1], w)
    assert (w.abs().max() == 1.1) == (bound == 1.1)
    torch.testing.assert_close(agent.steer(obs, 5 * noise), act_noise(agent, obs, 5 * noise, bound))


def act_noise(agent, obs, noise, bound):
    return torch.from_numpy(np.clip(noise.numpy() + output(agent.perturbation, obs), -bound, bound))


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_the_first_policy_is_exactly_the_frozen_one(kind):
    torch.manual_seed(0)
    decoder = lpds.Decoder(decoder_file(OBS, ACT, CHUNK, kind))
    agent = lpds.Agent(lpds.Args(hidden_size=16), decoder)
    obs, noise = torch.randn(64, OBS), torch.randn(64, D)
    assert torch.equal(agent.act(obs, noise), decoder(obs, noise))
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("dual, norm", [("log", "sum"), ("log", "mean"), ("linear", "sum")])
def test_delta_and_alpha_converge_to_the_known_optimum(dual, norm):
    """Q^W(s, w) = c.w: the best shift in the budget is c sqrt(delta) / |c|, at the price
    |c| / (2 sqrt(delta)). A mean over d is a sum with a budget of d delta, at d times the price."""
    agent, batch = setup(delta=0.3, dual=dual, delta_norm=norm, lr=5e-3, alpha_lr=0.03)
    agent.float()
    c = 2 * torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -0.3])
    agent.q_w = Constructed(lambda obs, w: w @ c)
    history = []
    for _ in range(800):
        info = agent.update_perturbation({"obs": torch.randn(32, OBS), "action": torch.ones(32, D)})
        history.append([info["trust_region/sq_norm"].item(), info["trust_region/alpha"].item()])
    sq_norm, alpha = np.mean(history[-250:], 0)
    budget, unit = (0.3, 1) if norm == "sum" else (0.3 * D, D)
    assert sq_norm == pytest.approx(0.3, rel=0.05)
    assert alpha == pytest.approx(unit * c.norm().item() / (2 * math.sqrt(budget)), rel=0.05)
    shift = agent.perturbation(torch.randn(256, OBS)).mean(0)
    torch.testing.assert_close(shift, c * math.sqrt(budget) / c.norm(), atol=0.1, rtol=0)


# --- environment ---


class Counter(gym.Env):
    """Observation: (steps of this episode, resets); reward 10^-t; falls at step `fall`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-1, -0.5], "f4"), np.array([1, 0.25], "f4"))

    def __init__(self, fall=None, reward=None):
        self.fall, self.reward, self.resets, self.actions = fall, reward, 0, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        return np.array([0.0, self.resets]), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        reward = self.reward or 10.0**-self.t
        return np.array([self.t, self.resets], float), reward, self.t == self.fall, False, {}


COUNTER = decoder_file(2, 2, 4)
LOW, HIGH = np.array([-1.0, 3.0]), np.array([3.0, 3.5])
ACTION_LOW, ACTION_HIGH = np.array([-2.0, -0.5]), np.array([1.0, 1.5])
RANGES = dict(obs_min=LOW, obs_max=HIGH, action_min=ACTION_LOW, action_max=ACTION_HIGH)
COUNTER["normalization"] = {name: torch.tensor(value).float() for name, value in RANGES.items()}


def counter(limit, **kwargs):
    """An environment of chunks of 4, made as the script makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gym.registry, "Counter-v0", None)
        del gym.registry["Counter-v0"]
        gym.register("Counter-v0", Counter, max_episode_steps=limit)
        return lpds.make_env("Counter-v0", COUNTER, **kwargs)


def seen(t, resets=1):
    """The observation after t steps, by DPPO's formula."""
    return (2 * ((np.array([t, resets]) - LOW) / (HIGH - LOW + 1e-6) - 0.5)).astype(np.float32)


def play(env, chunks=1):
    return [env.step(np.zeros(8, np.float32)) for _ in range(chunks)]


def test_a_chunk_is_executed_open_loop_and_its_rewards_are_summed():
    env = counter(100)
    obs, _ = env.reset(seed=0)
    assert np.array_equal(obs, seen(0)) and obs.dtype == np.float32
    assert env.action_space == gym.spaces.Box(-1, 1, (8,), np.float32)
    (obs, reward, terminated, truncated, _), (obs2, reward2, *_) = play(env, 2)
    assert np.array_equal(obs, seen(4)) and np.array_equal(obs2, seen(8))
    assert reward == pytest.approx(0.1111) and reward2 == pytest.approx(0.00001111)
    assert (terminated, truncated, env.steps) == (False, False, 4)


def test_actions_come_from_the_range_of_the_data_and_are_clipped_to_the_box():
    env, action = counter(100), np.random.default_rng(0).uniform(-1, 1, 8).astype(np.float32)
    env.reset(seed=0)
    env.step(action)
    box, rows = env.unwrapped.action_space, action.reshape(4, 2).astype(np.float64)
    wanted = (rows + 1) / 2 * (ACTION_HIGH - ACTION_LOW) + ACTION_LOW
    assert (wanted < box.low).any() and (wanted > box.high).any()
    executed = np.array(env.unwrapped.actions)
    np.testing.assert_allclose(executed, np.clip(wanted, box.low, box.high), rtol=1e-6)


@pytest.mark.parametrize("fall, limit", [(None, 6), (6, 100), (6, 6)])
def test_a_chunk_stops_with_its_episode(fall, limit):
    env = counter(limit, fall=fall)
    env.reset(seed=0)
    _, (obs, reward, terminated, truncated, info) = play(env, 2)
    assert (terminated, truncated) == (fall == 6, limit == 6)
    assert len(env.unwrapped.actions) == 6 and env.steps == 2
    assert np.array_equal(obs, seen(6)) and reward == pytest.approx(0.000011)
    assert info["episode"]["r"] == pytest.approx(0.111111) and info["episode"]["l"] == 6


# --- evaluation ---


class Recorder(gym.Env):
    """An episode of `length` chunks, or until an action above 50; keeps seeds and actions."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (D,), np.float32)

    def __init__(self, length):
        self.length, self.seeds, self.episodes = length, [], []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episodes.append([])
        return self.np_random.standard_normal(OBS).astype(np.float32), {}

    def step(self, action):
        self.episodes[-1].append(action.copy())
        over = len(self.episodes[-1]) == self.length
        reward = float(len(self.episodes))  # 1 in the first episode
        return np.zeros(OBS, np.float32), reward, bool(action[0] > 50), over, {}


def recorders(*lengths):
    makers = [lambda n=n: gym.wrappers.RecordEpisodeStatistics(Recorder(n)) for n in lengths]
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def test_an_evaluation_is_the_first_episode_of_each_and_independent_of_the_others():
    def cut(obs, noise):  # the first and the third end at once
        return torch.where(torch.arange(4)[:, None] % 2 == 0, 99.0, noise)

    results, envs = [], []
    for policy in (lambda obs, noise: noise, cut):
        envs.append(recorders(4, 7, 2, 5))
        results.append(lpds.evaluate(policy, envs[-1], "cpu"))
    assert results[0] == {"return": [4, 7, 2, 5], "length": [4, 7, 2, 5], "success": [1, 1, 1, 1]}
    assert results[1] == {"return": [1, 7, 1, 5], "length": [1, 7, 1, 5], "success": [0, 1, 0, 1]}
    first = [[env.unwrapped.episodes[0] for env in both.envs] for both in envs]
    for i in (1, 3):
        np.testing.assert_array_equal(first[0][i], first[1][i])
    noise = np.concatenate(first[0])
    assert len(np.unique(noise)) == noise.size and abs(noise.mean()) < 0.3  # fresh at each step


def test_an_evaluation_repeats_and_leaves_the_generators_alone(tiny_backbone):
    file = torch.load(tiny_backbone("Hopper"), weights_only=True)
    makers = [partial(lpds.make_env, "Hopper-v5", file)] * 3
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    torch.manual_seed(0)
    agent = lpds.Agent(lpds.Args(hidden_size=16), lpds.Decoder(file))
    state = torch.get_rng_state()
    policies = (agent.decoder, agent.decoder, agent.act)
    first, again, steered = (lpds.evaluate(policy, envs, "cpu") for policy in policies)
    assert first == again == steered and np.std(first["return"]) > 0
    assert lpds.evaluate(agent.decoder, envs, "cpu", seed=1)["return"] != first["return"]
    assert torch.equal(state, torch.get_rng_state())


# --- probe and replay ---


def replay_of(batch):
    replay = lpds.Replay(len(batch["obs"]), OBS, D, "cpu")
    replay.add(*batch.values())
    return replay


@pytest.mark.parametrize("sign, corr, tolerance", [(3, 1, 1e-3), (-1, -1, 1e-3), (0, 0, 0.1)])
def test_probe_finds_how_well_the_latent_critic_ranks_noise(sign, corr, tolerance):
    """However far off it is from state to state; a random one ranks nothing."""
    agent, batch = setup()
    agent.float()

    def q_w(obs, w):
        value = agent.q_a(obs, agent.decoder(obs, w)).mean(0)
        return sign * value + 10 * obs.sum(1) if sign else torch.randn(len(w))

    agent.q_w = Constructed(q_w)
    info = lpds.probe(agent, replay_of(batch), seed=0)
    assert info["losses/q_w_corr"].item() == pytest.approx(corr, abs=tolerance)


def test_probe_is_about_the_steered_policy_state_by_state():
    agent, batch = setup(noise_bound=1.0)
    agent.float()
    asked = []
    agent.q_w.register_forward_hook(lambda module, inputs, out: asked.append((*inputs, out)))
    info = lpds.probe(agent, replay_of(batch), seed=3, states=16, n=64)
    obs, w, q_w = (x.detach().float() for x in asked[0])
    assert len(w) == 16 * 64 and w.abs().max() == 1.0  # steered and bounded
    action = agent.decoder(obs, w)
    q_a, q_w = agent.q_a(obs, action).mean(0).detach(), q_w.mean(0)
    states = torch.unique(obs, dim=0)
    rows = [(obs == state).all(1) for state in states]
    corr = [np.corrcoef(q_a[r], q_w[r])[0, 1] for r in rows for _ in range(r.sum() // 64)]
    assert info["losses/q_w_corr"].item() == pytest.approx(np.mean(corr), abs=0.02)
    entropy, ties = knn_entropy(action.view(16, 64, D))
    assert info["entropy/action"] == pytest.approx(entropy.item(), abs=1e-4)
    assert info["entropy/ties"] == ties


def test_probe_sees_no_difference_at_delta_zero_and_one_beyond():
    agent, batch = setup(moved=False)
    agent.float()
    replay, state = replay_of(batch), torch.get_rng_state()
    info, again = (lpds.probe(agent, replay, seed=3) for _ in range(2))
    assert info["entropy/action"] == info["entropy/action_frozen"]
    assert info == again and torch.equal(state, torch.get_rng_state())  # logging changes no run
    agent.perturbation[-1].bias.data += 3.0
    moved = lpds.probe(agent, replay, seed=3)
    assert moved["entropy/action"] < info["entropy/action"] - 0.1
    assert moved["entropy/action_frozen"] == info["entropy/action_frozen"]


def test_replay_returns_rows_as_they_were_stored():
    torch.manual_seed(0)
    replay, rng = lpds.Replay(50, OBS, D, "cpu"), np.random.default_rng(0)
    for start in range(0, 40, 4):
        key = np.arange(start, start + 4)
        obs, action, next_obs = (key[:, None] + rng.random((4, n)) for n in (OBS, D, OBS))
        replay.add(obs, action, key + 0.5, next_obs, key % 2 == 1)
    batch = replay.sample(4000)
    key = batch["reward"].floor()
    for name in ("obs", "action", "next_obs"):
        assert torch.equal(batch[name].floor(), key[:, None].expand_as(batch[name]))
    assert torch.equal(batch["terminated"], key % 2)
    counts = np.bincount(key.long().numpy(), minlength=50)
    assert (counts[:40] > 50).all() and not counts[40:].any()  # all that was stored, nothing else


# --- a tiny run, on an environment whose every step is known ---


class Known(gym.Env):
    """Observation: (steps of this episode, resets); reward -1; episodes alternate between a fall
    after three steps and the time limit after six."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))
    resets = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        return np.array([0.0, self.resets]), {}

    def step(self, action):
        self.t += 1
        falls = self.resets % 2 == 0 and self.t == 3
        return np.array([self.t, self.resets], float), -1.0, falls, False, {}


PRIOR, WARMUP, EVALUATE, LOG, TOTAL = 60, 60, 100, 40, 300
UTD, DISTILL, ENVS, EPISODES = 3, 2, 2, 3
FLAGS = f"""--env-id Known-v0 --num-envs {ENVS} --eval-episodes {EPISODES} --prior-steps {PRIOR}
    --warmup-steps {WARMUP} --eval-every {EVALUATE} --log-every {LOG} --total-timesteps {TOTAL}
    --utd {UTD} --distill-steps {DISTILL} --hidden-size 16 --batch-size 8
    --noise-bound 2.5""".split()


def register_and_count():
    """In the process of a run: Known-v0, and calls.json with the functions of the script called."""
    gym.register("Known-v0", Known, max_episode_steps=6)
    calls = []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.endswith(SCRIPT):
            calls.append(code.co_name)

    sys.setprofile(profile)
    return lambda: Path("calls.json").write_text(json.dumps(calls))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(run folder, names of called functions)"""
    folder = tmp_path_factory.mktemp("known")
    torch.save(decoder_file(2, 2, 4), folder / "known.pt")
    run = finish(folder, SCRIPT, *FLAGS, "--backbone", "known.pt", before=register_and_count)
    return run, json.loads((folder / "calls.json").read_text())


def steps_after_each_vector_step(replay):
    return (-replay["reward"]).view(-1, ENVS).sum(1).cumsum(0).int().tolist()


def test_updates_come_in_the_order_and_number_of_the_schedule(known):
    run, calls = known
    expected, before, vector_step = ["evaluate"], 0, 0
    for after in steps_after_each_vector_step(checkpoint(run)["replay"]):
        vector_step += 1
        if after >= PRIOR and vector_step % 2 == 0:
            one = ["update_action_critic", "descend"]
            if after >= PRIOR + WARMUP:
                one += ["update_perturbation", "descend"]
            expected += one * UTD + ["update_latent_critic"] + ["descend"] * DISTILL
        evaluates = after // EVALUATE > before // EVALUATE
        if evaluates or after // LOG > before // LOG:
            expected.append("probe")
        if evaluates:
            expected.append("evaluate")
            vector_step = 0
        before = after
    assert [name for name in calls if name in expected] == expected
    assert expected.count("evaluate") == 4 and expected.count("update_perturbation") > 20


def test_only_a_fall_ends_the_bootstrap_and_a_time_limit_leads_to_its_real_observation(known):
    replay = checkpoint(known[0])["replay"]
    ranges = 2 + 1e-6 / 2  # of the observations, from -2 to 2
    t, resets = (replay["obs"] * ranges).round().T.numpy()
    t_next, resets_next = (replay["next_obs"] * ranges).round().T.numpy()
    falls = (resets % 2 == 0) & (t == 0)
    assert set(t) == {0, 4} and falls.any() and (t == 4).any()
    np.testing.assert_array_equal(t_next, np.where(falls, 3, np.where(t == 0, 4, 6)))
    np.testing.assert_array_equal(resets_next, resets)
    np.testing.assert_array_equal(replay["terminated"].numpy() == 1, falls)
    np.testing.assert_array_equal(-replay["reward"].numpy(), t_next - t)
    assert replay["action"].abs().max() <= 1


def test_automatic_reward_scale_makes_the_mean_reward_for_ever_worth_15(known):
    replay, agent = (checkpoint(known[0])[key] for key in ("replay", "agent"))
    steps = steps_after_each_vector_step(replay)
    rows = ENVS * (1 + next(i for i, step in enumerate(steps) if step >= PRIOR))
    mean = replay["reward"][:rows].abs().mean().item()
    assert agent["reward_scale"].item() * mean / (1 - 0.99) == pytest.approx(15)


KEYS = """global_step wall_seconds charts/episodic_return charts/episodic_length charts/SPS
    losses/q_a losses/q_w losses/perturbation losses/q_a_value losses/q_w_value losses/q_w_corr
    trust_region/alpha trust_region/sq_norm trust_region/violation trust_region/kl
    entropy/action entropy/action_frozen entropy/ties
    eval/episodic_return eval/success eval/frozen_return eval/frozen_success"""


def test_the_table_has_its_keys_at_its_steps(known):
    rows = metrics(known[0])
    assert {*rows[0], "wall_seconds", "charts/SPS"} == set(KEYS.split())
    steps = steps_after_each_vector_step(checkpoint(known[0])["replay"])
    due = [0]
    for before, after in zip([0, *steps], steps):
        if any(after // every > before // every for every in (LOG, EVALUATE)):
            due.append(after)
    assert [float(row["global_step"]) for row in rows] == due and due[-1] >= TOTAL
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert [row["charts/episodic_length"] for row in rows[1:]] != []
    last = rows[-1]
    kl, sq_norm = float(last["trust_region/kl"]), float(last["trust_region/sq_norm"])
    assert kl == pytest.approx(0.5 * 8 * sq_norm, rel=1e-5) and sq_norm > 0  # a mean over d = 8


def test_every_episode_of_an_evaluation_is_kept(known):
    with np.load(known[0] / "eval.npz") as evals:
        assert set(evals) == {"global_step", "return", "length", "success"}
        # Start and evaluation: the first episode reaches the limit, the next one falls, and so on
        assert evals["return"].shape == (4, EPISODES) and evals["global_step"][0] == 0
        np.testing.assert_array_equal(evals["return"], -evals["length"])
        np.testing.assert_array_equal(evals["success"], evals["length"] == 6)
        means = dict(zip(evals["global_step"].tolist(), evals["return"].mean(1)))
    for row in metrics(known[0]):
        if row["eval/episodic_return"]:
            assert float(row["eval/episodic_return"]) == means[int(float(row["global_step"]))]
            assert float(row["eval/frozen_return"]) == means[0]


def test_the_run_folder_holds_what_the_pages_say(known):
    run = known[0]
    names = {"args.json", "backbone.pt", "best.pt", "checkpoint.pt", "eval.npz", "metrics.csv"}
    assert {path.name for path in run.iterdir()} == names
    assert run.name.startswith("Known-v0__lpds_continuous__1__")
    args = json.loads((run / "args.json").read_text())
    assert (args["hidden_size"], args["delta"], args["noise_bound"]) == (16, 0.35, 2.5)
    assert differences(torch.load(run / "backbone.pt"), decoder_file(2, 2, 4)) == []
    state = checkpoint(run)
    assert state.keys() == {"script", "rows", "evals", "agent", "optimizer", "replay"}
    assert state["script"] == SCRIPT


@pytest.mark.parametrize("env_id, values", lpds.DEFAULTS.items())
def test_help_shows_what_holds_for_the_environment(env_id, values, tmp_path):
    code, out, _ = call(tmp_path, SCRIPT, "--env-id", f"{env_id}-v4", "--help")
    words = " ".join(out.replace("\u2502", " ").split())
    assert code == 0
    for name, value in values.items():
        flag = name.replace("_", "-")
        shown = re.search(rf"--{flag} [A-Z{{][^ ]* .*?\(default: (.*?)\)", words)[1]
        assert shown == str(value), name


def test_a_flag_wins_over_the_defaults_of_its_environment(monkeypatch):
    for flags, delta, width in (([], 0.5, 128), (["--delta", "0.35"], 0.35, 128)):
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--env-id", "Hopper-v5", *flags])
        args = lpds.parse_args()
        assert (args.delta, args.hidden_size) == (delta, width)


def test_seeds_differ_and_share_the_frozen_evaluation(tiny_backbone, tmp_path):
    small = [*FLAGS, "--env-id", "Hopper-v4", "--backbone", tiny_backbone()]
    runs = [finish(tmp_path / str(seed), SCRIPT, *small, "--seed", seed) for seed in (1, 2)]
    a, b = (metrics(run) for run in runs)
    assert a[0] == b[0]
    assert a[-1]["losses/q_a"] != b[-1]["losses/q_a"]
    x, y = (checkpoint(run)["replay"]["obs"] for run in runs)
    assert not set(map(tuple, x.tolist())) & set(map(tuple, y.tolist()))


def test_two_runs_started_at_once_get_two_folders(tiny_backbone, tmp_path):
    small = [*FLAGS, "--env-id", "Hopper-v4", "--backbone", tiny_backbone()]
    for process in [Process(tmp_path, SCRIPT, *small) for _ in range(2)]:
        assert process.wait()[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_two_files_run_alone_and_are_tracked_offline(tiny_backbone, tmp_path):
    """Copied into an empty folder, as for a fork; with wandb, in a process that nobody prepared."""
    for name in (SCRIPT, "entropy.py"):
        shutil.copy(ROOT / name, tmp_path)
    small = [*FLAGS, "--env-id", "Hopper-v4", "--backbone", str(tiny_backbone()), "--track"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, SCRIPT, *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("\n") == 5  # what it steers, and four evaluations
    assert len(list(only_run(tmp_path).glob("wandb/offline-run-*/*.wandb"))) == 1


# --- does it learn? ---


class Sign(gym.Env):
    """One step: reward s a for the first of two actions; s = -1 or 1 is all there is to see."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = self.np_random.choice([-1.0, 1.0])
        return np.array([self.sign]), {}

    def step(self, action):
        return np.array([self.sign]), self.sign * action[0], True, False, {}


def register_sign():
    gym.register("Sign-v0", Sign)


def two_modes():
    """A decoder written by hand: a = clip(5 w), so -1 or 1 but for a narrow band between them."""
    file = decoder_file(1, 2, chunk=1, kind="flow", width=2)
    file["time_emb"] = torch.zeros(1, 8)
    file["model"] = {name: torch.zeros_like(value) for name, value in file["model"].items()}
    file["model"]["first.weight"][:, :2] = torch.eye(2)
    file["model"]["head.weight"] = 4 * torch.eye(2)
    file["normalization"]["obs_min"], file["normalization"]["obs_max"] = (
        -torch.ones(1),
        torch.ones(1),
    )
    return file


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.3])
def test_it_learns_what_the_budget_allows(delta, tmp_path):
    """The best shift is s sqrt(delta) along the first coordinate, and all of its value is known."""
    torch.save(two_modes(), tmp_path / "two.pt")
    flags = """--env-id Sign-v0 --backbone two.pt --delta-norm sum --hidden-size 32 --lr 1e-3
        --batch-size 64 --num-envs 8 --utd 10 --distill-steps 10 --prior-steps 300
        --warmup-steps 500 --total-timesteps 3200 --eval-every 1600 --eval-episodes 1000
        --log-every 200"""
    run = finish(tmp_path, SCRIPT, *flags.split(), "--delta", delta, before=register_sign)
    noise = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    best = (5 * (noise + math.sqrt(delta))).clamp(-1, 1).mean().item()
    with np.load(run / "eval.npz") as evals:
        returns = evals["return"].mean(1)
    spent = [float(row["trust_region/sq_norm"]) for row in metrics(run)[-6:]]
    print(f"returns {returns}, at best {best:.3f}; E||Delta||^2 {spent}")
    assert abs(returns[0]) < 0.1 and returns[-1] > 0.8 * best
    assert np.mean(spent) == pytest.approx(delta, rel=0.25)
