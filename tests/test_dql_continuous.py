"""baselines/dql_continuous.py: its losses by hand, the gradient through the chain by finite
differences, and that it moves to the better of two modes.

What it shares with lpds_continuous.py is the same text (test_shared_code.py) and tested there;
test_resume.py has its runs.
"""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, decoder_file, finish, load, metrics
from torch import nn

SCRIPT = "baselines/dql_continuous.py"
dql = load(SCRIPT)
OBS, ACT, CHUNK, N = 5, 2, 3, 32
D = ACT * CHUNK


def setup(script=dql, seed=5, **settings):
    """(agent, batch): a small agent in double precision, its targets other networks than theirs.

    The next draws are those of `seed`.
    """
    torch.manual_seed(0)
    args = script.Args(**dict(hidden_size=16, batch_size=N, reward_scale=0.3) | settings)
    agent = script.Agent(args, script.Decoder(decoder_file(OBS, ACT, CHUNK))).double()
    for name, parameter in agent.named_parameters():
        if "target" in name or name.startswith("actor"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    agent.optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)  # theta <- theta - gradient
    batch = {"obs": torch.randn(N, OBS), "action": torch.rand(N, D) * 2 - 1}
    batch |= {"reward": torch.randn(N), "next_obs": torch.randn(N, OBS)}
    batch |= {"terminated": (torch.rand(N) < 0.4).float()}
    torch.manual_seed(seed)
    return agent, {name: column.double() for name, column in batch.items()}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def flat(module):
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def changed(before, agent):
    now = agent.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], now[name])}


# --- the actor's losses, once more and in numpy ---


def predict(actor, x, time_emb, obs):
    """The residual MLP: noise in x (n, D) at one row of time_emb each."""
    first, one, two, head = (
        [p.detach().numpy() for p in layer.parameters()]
        for layer in (actor.first, actor.blocks[0][1], actor.blocks[0][3], actor.head)
    )
    h = np.concatenate([x, time_emb, obs], 1) @ first[0].T + first[1]
    inner = np.maximum(h, 0) @ one[0].T + one[1]
    h = h + np.maximum(inner, 0) @ two[0].T + two[1]
    return h @ head[0].T + head[1]


def decoded(actor, obs, noise):
    """DDIM with eta 0, the clean action clipped in each step."""
    x, obs = noise.numpy(), obs.numpy()
    for time_emb, (a, b, a_next, b_next) in zip(actor.time_emb.numpy(), actor.levels):
        e = predict(actor, x, np.tile(time_emb, (len(x), 1)), obs)
        clean = np.clip((x - b * e) / a, -1, 1)
        x = a_next * clean + b_next * (x - a * clean) / b
    return np.clip(x, -1, 1)


def cloning(actor, obs, action, level, noise):
    """Error of the predicted noise, each row at its own level."""
    a, b = np.array(actor.levels)[level.numpy(), :2].T[:, :, None]
    x = a * action + b * noise.numpy()
    e = predict(actor, x, actor.time_emb.numpy()[level.numpy()], obs.numpy())
    return ((e - noise.numpy()) ** 2).mean()


def test_cloning_is_the_loss_of_pretraining_at_the_levels_of_the_sampler():
    agent, batch = setup()
    level, noise = torch.randint(5, (N,)), normal(N, D)
    torch.manual_seed(5)
    loss = dql.denoising_loss(agent.actor, batch["obs"], batch["action"])
    expected = cloning(agent.actor, batch["obs"], batch["action"].numpy(), level, noise)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert {*level.tolist()} == {0, 1, 2, 3, 4}


def objective(agent, batch, draws):
    """BC + eta * Q, the scale of Q apart; and that scale, the mean size of the other's values."""
    noise, (judge, other), level, mixed = draws
    obs, action = batch["obs"], decoded(agent.actor, batch["obs"], draws[0])
    q = agent.q_a(obs, torch.from_numpy(action)).detach().numpy()
    cloned = batch["action"].numpy() if agent.args.bc_on == "replay" else action
    bc = cloning(agent.actor, obs, cloned, level, mixed)
    return bc, -q[judge].mean(), np.abs(q[other]).mean()


@pytest.mark.parametrize("bc_on", ["replay", "policy"])
@pytest.mark.parametrize("seed, eta", [(5, 1.0), (6, 3.0), (7, 0.0)])
def test_the_actor_follows_finite_differences_through_the_whole_chain(seed, eta, bc_on):
    agent, batch = setup(seed=seed, eta=eta, bc_on=bc_on)
    noise, judge = normal(N, D), torch.randperm(2).tolist()
    draws = noise, judge, torch.randint(5, (N,)), normal(N, D)
    bc, q, scale = objective(agent, batch, draws)
    before, parameters = flat(agent.actor), list(agent.actor.parameters())
    directions = [torch.randn(len(before)).double() for _ in range(3)]
    expected = []
    for direction in directions:
        side = []
        for h in (1e-6, -1e-6):
            nn.utils.vector_to_parameters(before + h * direction, parameters)
            bc_there, q_there, _ = objective(agent, batch, draws)
            side.append(bc_there + eta * q_there / scale)
        expected.append((side[0] - side[1]) / 2e-6)
    nn.utils.vector_to_parameters(before.clone(), parameters)

    torch.manual_seed(seed)
    info = agent.update_actor(batch)
    gradient = before - flat(agent.actor)
    assert [(gradient @ d).item() for d in directions] == pytest.approx(expected, rel=1e-4)
    assert info["losses/bc"].item() == pytest.approx(bc, rel=1e-5)
    assert info["losses/q"].item() == pytest.approx(q / scale, rel=1e-5)
    assert info["losses/actor"].item() == pytest.approx(bc + eta * q / scale, rel=1e-5)


def test_either_twin_judges_the_actor():
    judges = set()
    for seed in range(8):
        agent, batch = setup(seed=seed)
        action = agent.actor(batch["obs"], normal(N, D))
        means = agent.q_a(batch["obs"], action).mean(1).tolist()
        scales = agent.q_a(batch["obs"], action).abs().mean(1).tolist()
        torch.manual_seed(seed)
        loss = agent.update_actor(batch)["losses/q"].item()
        judges.add([pytest.approx(-means[i] / scales[1 - i]) == loss for i in (0, 1)].index(True))
    assert judges == {0, 1}


def test_an_update_of_the_actor_moves_the_actor_and_its_target_alone():
    agent, batch = setup(tau=0.05)
    before, slow = weights(agent), flat(agent.actor_target)
    agent.update_actor(batch)
    assert changed(before, agent) == {"actor", "actor_target"}
    torch.testing.assert_close(flat(agent.actor_target), 0.95 * slow + 0.05 * flat(agent.actor))


# --- the critic ---


def test_the_critic_follows_the_target_actor_and_the_smaller_target_twin():
    agent, batch = setup(gamma=0.9, tau=0.05)
    noise = normal(N, D)
    action = torch.from_numpy(decoded(agent.actor_target, batch["next_obs"], noise))
    value = agent.q_a_target(batch["next_obs"], action).min(0).values.detach()
    y = 0.3 * batch["reward"] + torch.where(batch["terminated"] == 1, 0, 0.9 * value)
    error = agent.q_a(batch["obs"], batch["action"]) - y
    loss = error.square().sum() / (2 * N)
    gradient = torch.autograd.grad(loss, list(agent.q_a.parameters()))
    gradient = torch.cat([g.reshape(-1) for g in gradient])
    before, fast, slow = weights(agent), flat(agent.q_a), flat(agent.q_a_target)

    torch.manual_seed(5)
    info = agent.update_action_critic(batch)
    assert info["losses/q_a"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(fast - flat(agent.q_a), gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(flat(agent.q_a_target), 0.95 * slow + 0.05 * flat(agent.q_a))
    assert changed(before, agent) == {"q_a", "q_a_target"}


def test_the_first_policy_is_the_frozen_one_and_each_network_has_its_rate():
    torch.manual_seed(0)
    decoder = dql.Decoder(decoder_file(OBS, ACT, CHUNK))
    agent = dql.Agent(dql.Args(hidden_size=16, lr=0.02, actor_lr=0.003), decoder)
    obs, noise = torch.randn(64, OBS), torch.randn(64, D)
    assert torch.equal(agent.act(obs, noise), decoder(obs, noise))
    assert torch.equal(agent.actor_target(obs, noise), decoder(obs, noise))
    batch = {"obs": obs, "action": noise.tanh(), "reward": obs[:, 0], "next_obs": obs}
    actor, critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.q_a)
    agent.update_action_critic(batch | {"terminated": torch.zeros(64)})
    agent.update_actor(batch)
    # The first step of Adam is as long as its rate
    assert (flat(critic) - flat(agent.q_a)).abs().max() == pytest.approx(0.02, rel=1e-2)
    assert (flat(actor) - flat(agent.actor)).abs().max() == pytest.approx(0.003, rel=1e-2)
    assert torch.equal(flat(decoder), flat(actor)), "the frozen decoder has moved"


# --- does it learn? ---


class Bandit(gym.Env):
    """One step, worth 1 - |a - 0.6| of the first of two actions."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1), {}

    def step(self, action):
        return np.zeros(1), 1 - abs(float(action[0]) - 0.6), True, False, {}


def register_bandit():
    gym.register("Bandit-v0", Bandit)


def play_bandit(script, run):
    """(first actions of the frozen policy, the run's agent, observations, noise)"""
    file = torch.load(run / "backbone.pt", weights_only=True)
    agent = script.Agent(script.Args(hidden_size=32), script.Decoder(file))
    agent.load_state_dict(checkpoint(run)["agent"])
    generator = torch.Generator().manual_seed(0)
    obs = 2 * torch.rand(2_000, 1, generator=generator) - 1
    noise = torch.randn(2_000, 2, generator=generator)
    return agent.decoder(obs, noise)[:, 0], agent, obs, noise


BANDIT = """--env-id Bandit-v0 --hidden-size 32 --actor-lr 1e-3 --batch-size 128 --num-envs 8
    --utd 10 --prior-steps 300 --warmup-steps 300 --total-timesteps 1600 --eval-every 800
    --eval-episodes 200 --log-every 800""".split()


@pytest.mark.slow
def test_it_moves_to_the_better_mode(bandit, tmp_path):
    run = finish(tmp_path, SCRIPT, *BANDIT, "--backbone", bandit, before=register_bandit)
    frozen, agent, obs, noise = play_bandit(dql, run)
    assert 0.4 < (frozen > 0).float().mean() < 0.6 and (frozen.abs() - 0.6).abs().mean() < 0.15
    learned = agent.act(obs, noise)[:, 0]
    print(learned.mean(), (learned > 0).float().mean(), (learned - 0.6).abs().mean())
    assert (learned > 0).float().mean() > 0.97 and (learned - 0.6).abs().mean() < 0.15
    with np.load(run / "eval.npz") as evals:
        returns = evals["return"].mean(1)
    assert returns[0] < 0.5 and returns[-1] > 0.85
    last = metrics(run)[-1]
    assert float(last["entropy/action"]) < float(last["entropy/action_frozen"])
