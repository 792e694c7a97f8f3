"""baselines/dppo_continuous.py: DDPM against DPPO's arithmetic in numpy, PPO's parts by hand.

What it shares with lpds_continuous.py is the same text (test_shared_code.py) and tested there;
test_resume.py has its runs.
"""

import math

import numpy as np
import pytest
import torch
from conftest import call, checkpoint, decoder_file, finish, load, metrics, refused
from dppo_reference import network, relu, schedule

import pretrain_backbone

SCRIPT = "baselines/dppo_continuous.py"
dppo = load(SCRIPT)
OBS, D, N, STEPS = 5, 6, 64, 20


def setup(moved=True, **settings):
    """(agent, batch of pairs): a small agent in float64, its copy moved away from the decoder."""
    torch.manual_seed(0)
    args = dppo.Args(**dict(hidden_size=16, tuned_steps=8) | settings)
    decoder = dppo.Decoder(dppo.all_steps(decoder_file(OBS, 2, chunk=3)))
    agent = dppo.Agent(args, decoder).double()
    for parameter in agent.actor.parameters() if moved else ():
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = {"obs": torch.randn(N, OBS), "x": torch.randn(N, D), "x_next": torch.randn(N, D)}
    batch |= {"advantage": torch.randn(N) * 3 + 1, "target": torch.randn(N)}
    batch = {name: column.double() for name, column in batch.items()}
    batch["k"] = torch.arange(N) % args.tuned_steps + STEPS - args.tuned_steps
    return agent, batch


def draws(agent, n=N):
    return torch.randn(n, OBS).double(), torch.randn(n, agent.decoder.dim).double()


def snapshot(agent) -> dict:
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def changed(agent, before: dict) -> set:
    now = agent.state_dict()
    return {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}


# --- denoising ---


def in_dppos_names(file: dict) -> dict:
    """The weights of a decoder file with one block, as a checkpoint of DPPO calls them."""
    names = {"first": "layers.0", "blocks.0.1": "layers.1.l1", "blocks.0.3": "layers.1.l2"}
    names["head"] = "layers.2"
    state = {}
    for name, tensor in file["model"].items():
        layer, kind = name.rsplit(".", 1)
        state[f"mlp_mean.{names[layer]}.{kind}"] = tensor
    time_network = file["training"]["time_network"].items()
    return state | {f"time_embedding.{name}": tensor for name, tensor in time_network}


@pytest.mark.parametrize("k", range(STEPS))
def test_a_step_is_ddpms_with_the_posterior_of_its_betas(k):
    file = decoder_file(OBS, 2, chunk=3)
    decoder = dppo.Decoder(dppo.all_steps(file)).double()
    rng = np.random.default_rng(k)
    obs, x = rng.normal(size=(9, OBS)), rng.normal(size=(9, D))
    mean, std = decoder.step(torch.from_numpy(obs), torch.from_numpy(x), k)

    t = STEPS - 1 - k  # DPPO counts down
    betas, abar = schedule(STEPS)
    beta, signal, before = float(betas[t]), abar[t], abar[t - 1] if t else 1.0
    noise = network(in_dppos_names(file), x, t, obs, relu)
    clean = np.clip((x - np.sqrt(1 - signal) * noise) / np.sqrt(signal), -1, 1)
    expected = beta * np.sqrt(before) * clean + (1 - before) * np.sqrt(1 - beta) * x
    np.testing.assert_allclose(mean, expected / (1 - signal), atol=2e-5)
    variance = beta * (1 - before) / (1 - signal)
    np.testing.assert_allclose(std.item(), np.sqrt(variance), rtol=1e-4, atol=1e-7)
    assert (std.item() == 0) == (k == STEPS - 1)


def test_steps_of_different_pairs_are_those_of_one_at_a_time():
    agent, batch = setup()
    mean, std = agent.actor.step(batch["obs"], batch["x"], batch["k"])
    for i in range(0, N, 9):
        one = agent.actor.step(batch["obs"][i : i + 1], batch["x"][i : i + 1], int(batch["k"][i]))
        torch.testing.assert_close((mean[i], std[i]), (one[0][0], one[1]))


def test_a_decoder_of_other_training_is_refused(capsys):
    file = decoder_file(OBS, 2)
    file["training"]["train_steps"] = 100
    with pytest.raises(SystemExit):
        dppo.all_steps(file)
    assert "100 --train-steps" in capsys.readouterr().err


def test_the_frozen_decoder_draws_only_from_its_noise_and_ends_in_the_box():
    agent, _ = setup()
    obs, noise = draws(agent)
    action = agent.decoder(obs, 3 * noise)
    assert action.shape == (N, D) and action.abs().max() <= 1
    assert torch.equal(agent.decoder(obs, 3 * noise), action)
    for i in range(STEPS):  # of the draws all but the last matter, whose step has no width
        other = noise.clone()
        other[:, i * D : (i + 1) * D] += 1
        assert not torch.equal(agent.decoder(obs, other), agent.decoder(obs, noise))
    other = torch.cat([noise[:, :-D], -noise[:, -D:]], 1)
    assert torch.equal(agent.decoder(obs, other), agent.decoder(obs, noise))


def test_the_policy_starts_as_the_frozen_one():
    agent, _ = setup(moved=False)
    obs, noise = draws(agent)
    assert torch.equal(agent.act(obs, noise), agent.decoder(obs, noise))


@pytest.mark.parametrize("tuned", [2, 8, STEPS])
def test_the_copy_takes_the_last_steps_and_the_floor_is_that_of_the_noise(tuned):
    agent, _ = setup(tuned_steps=tuned)
    obs, noise = draws(agent)
    chain = agent.denoise(obs, noise, floor=0.3)
    assert chain.shape == (N, tuned + 1, D)
    x, *eps = noise.view(N, STEPS + 1, D).unbind(1)
    for k in range(STEPS):
        if k >= STEPS - tuned:
            assert torch.equal(x, chain[:, k - STEPS + tuned])
        mean, std = (agent.actor if k >= STEPS - tuned else agent.decoder).step(obs, x, k)
        x = mean + max(std.item(), 0.3) * eps[k]
    assert torch.equal(x, chain[:, -1])
    assert not torch.equal(x, agent.act(obs, noise))


# --- densities, advantages, the objective ---


@pytest.mark.parametrize("floor", [0.01, 0.5])
def test_log_probabilities_are_those_of_torch_distributions(floor):
    agent, batch = setup(noise_floor=floor)
    found = agent.log_prob(batch)
    for i in range(N):
        obs, x, k = batch["obs"][i : i + 1], batch["x"][i : i + 1], int(batch["k"][i])
        mean, std = agent.actor.step(obs, x, k)
        covariance = max(std.item(), floor) ** 2 * torch.eye(D).double()
        gaussian = torch.distributions.MultivariateNormal(mean[0], covariance)
        torch.testing.assert_close(found[i], gaussian.log_prob(batch["x_next"][i]) / D)


def test_the_clip_range_grows_exponentially_from_first_to_last():
    agent, _ = setup(tuned_steps=3, clip=0.01, clip_first=0.001)
    found = agent.clip_range(torch.tensor([17, 18, 19]))
    middle = 0.001 + 0.009 * (math.exp(1.5) - 1) / (math.exp(3) - 1)  # 0.00264
    assert found.tolist() == pytest.approx([0.001, middle, 0.01], rel=1e-5)
    agent, _ = setup(tuned_steps=3)  # DPPO's on Gym
    assert agent.clip_range(torch.tensor([17, 18, 19])).tolist() == pytest.approx([0.01] * 3)


class Table(torch.nn.Module):
    """V(s) is the first number of s."""

    def forward(self, obs):
        return obs[..., :1]


def rollout_of(reward, value, next_value, terminated, done, discounted) -> list:
    """Columns (T, N, ...) for estimate."""

    def states(values):
        return torch.tensor(values).unsqueeze(-1).expand(-1, -1, OBS).double()

    rest = (torch.tensor(x).double() for x in (terminated, done, discounted))
    return [states(value), torch.tensor(reward).double(), states(next_value), *rest]


def test_advantages_of_a_case_computed_by_hand():
    agent, _ = setup(gamma=0.5, gae_lambda=0.5)
    agent.critic = Table()
    # Returns 1 and 3 so far have mean 2 and standard deviation 1: rewards keep their size
    agent.returns.copy_(torch.tensor([1e9, 2e9, 5e9]))
    reward = [[1.0, 1.0], [2.0, 2.0], [50.0, 4.0]]
    value, after = [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]], [[2.0, 2.0], [8.0, 8.0], [8.0, 8.0]]
    terminated, done = [[0, 0], [1, 0], [0, 0]], [[0, 0], [1, 1], [0, 0]]
    columns = rollout_of(reward, value, after, terminated, done, np.zeros((3, 2)))
    advantage, target = agent.estimate(*columns)
    # First: errors 1 + 1 - 1 = 1, 2 - 2 = 0 (a fall), 10 + 4 - 4 = 10 (its reward is cut at 10)
    # Second: the same 1, 2 + 4 - 2 = 4 (a time limit: the value after it counts), 4 + 4 - 4 = 4
    expected = [[1 + 0.25 * 0, 1 + 0.25 * 4], [0, 4], [10, 4]]
    np.testing.assert_allclose(advantage, expected, atol=1e-6)
    np.testing.assert_allclose(target - advantage, value)


def test_advantages_with_lambda_1_are_returns_less_values():
    agent, _ = setup(gamma=0.9, gae_lambda=1.0)
    agent.critic = Table()
    agent.returns.copy_(torch.tensor([1e9, 0.0, 1e9]))  # standard deviation 1
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(7, 3)), rng.normal(size=(8, 3))
    no = np.zeros((7, 3))
    columns = rollout_of(reward, value[:-1], value[1:], no, no, no)
    advantage, _ = agent.estimate(*columns)
    for t in range(7):
        left = [0.9**i * reward[t + i] for i in range(7 - t)]
        expected = np.sum(left, 0) + 0.9 ** (7 - t) * value[7] - value[t]
        np.testing.assert_allclose(advantage[t], expected, rtol=1e-5)


def test_rewards_are_in_units_of_the_spread_of_all_returns_so_far():
    agent, _ = setup(gamma=0.5)
    agent.critic, seen = Table(), []
    rng = np.random.default_rng(0)
    for scale in (1, 30, 5):
        seen.append(scale * rng.normal(size=(40, 2)) + 7)
        reward, no = rng.normal(size=(40, 2)), np.zeros((40, 2))
        yes = np.ones((40, 2))  # every row an episode: advantages are the rewards
        advantage, _ = agent.estimate(*rollout_of(reward, no, no, yes, yes, seen[-1]))
        np.testing.assert_allclose(advantage, reward / np.std(np.concatenate(seen)), rtol=1e-5)


def objective(agent, batch) -> float:
    """PPO's, to be maximised, in numpy."""
    args = agent.args
    a = batch["advantage"].numpy()
    a = (a - a.mean()) / a.std() * args.gamma_denoise ** (19 - batch["k"].numpy())
    ratio = (agent.log_prob(batch) - batch["log_prob"]).exp().detach().numpy()
    eps = agent.clip_range(batch["k"]).numpy()
    return np.minimum(ratio * a, np.clip(ratio, 1 - eps, 1 + eps) * a).mean()


def test_the_actor_follows_finite_differences_of_ppos_objective():
    agent, batch = setup(clip=0.3, clip_first=0.1, gamma_denoise=0.8, noise_floor=0.4)
    old = agent.log_prob(batch).detach()
    batch["log_prob"] = old + 0.2 * torch.randn_like(old)  # some ratios are clipped, some not
    parameters = list(agent.actor.parameters())
    before = torch.nn.utils.parameters_to_vector(parameters).detach()
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(len(before)))
    side = []
    for h in (1e-6, -1e-6):
        torch.nn.utils.vector_to_parameters(before + h * direction, parameters)
        side.append(objective(agent, batch))
    torch.nn.utils.vector_to_parameters(before.clone(), parameters)
    expected, rest = objective(agent, batch), snapshot(agent)
    agent.optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)

    info = agent.update_actor(batch)
    step = torch.nn.utils.parameters_to_vector(parameters).detach() - before
    assert (step @ direction).item() == pytest.approx((side[0] - side[1]) / 2e-6, rel=1e-4)
    assert info["losses/policy"].item() == pytest.approx(-expected)
    ratio = (old - batch["log_prob"]).exp()
    outside = ((ratio - 1).abs() > agent.clip_range(batch["k"])).float().mean().item()
    assert 0.2 < outside < 0.9 and info["losses/clipfrac"].item() == pytest.approx(outside)
    kl = (ratio - 1 - ratio.log()).mean().item()
    assert info["losses/approx_kl"].item() == pytest.approx(kl, rel=1e-5)
    assert changed(agent, rest) == {"actor"}


def test_the_critic_descends_its_squared_error_alone():
    agent, batch = setup()
    value, rest = agent.critic(batch["obs"])[:, 0], snapshot(agent)
    info = agent.update_critic(batch)
    loss = 0.5 * (value - batch["target"]).square().mean().item()
    assert info["losses/value"].item() == pytest.approx(loss)
    assert changed(agent, rest) == {"critic"}


# --- an iteration ---


def played(agent, reward_of, n: int) -> list:
    """A roll-out of n one-step episodes from one state, for agent.learn."""
    obs, noise = torch.zeros(n, OBS), torch.randn(n, agent.decoder.dim)
    chain = agent.denoise(obs, noise, agent.args.noise_floor)
    reward, yes = reward_of(chain[:, -1]), torch.ones(n)
    return [[chain, obs, reward, obs, yes, yes, reward]]


def test_an_iteration_reaches_the_copy_and_only_its_last_steps(monkeypatch):
    agent, _ = setup(moved=False, tuned_steps=3, epochs=2, batch_size=50)
    agent.float()
    seen, update = [], agent.update_actor
    monkeypatch.setattr(agent, "update_actor", lambda batch: seen.append(batch) or update(batch))
    before = snapshot(agent)
    rollout = played(agent, lambda action: action.sum(1), 40)
    agent.learn(rollout)
    assert changed(agent, before) == {"actor", "critic", "returns"}
    assert not any(parameter.requires_grad for parameter in agent.decoder.parameters())
    assert [len(batch["k"]) for batch in seen] == [50, 50, 20] * 2  # 40 chunks x 3 steps, twice
    chain = rollout[0][0]
    for epoch in (seen[:3], seen[3:]):  # every pair once, each with its own step of its own chain
        rows = {key: torch.cat([batch[key] for batch in epoch]) for key in epoch[0]}
        assert torch.bincount(rows["k"]).tolist() == [0] * 17 + [40] * 3
        for k in (17, 18, 19):
            for key, i in (("x", k - 17), ("x_next", k - 16)):
                found = rows[key][rows["k"] == k].sort(0).values
                assert torch.equal(found, chain[:, i].sort(0).values)
    reward = rollout[0][2]
    for i in range(50):  # and each with the reward of its own chunk, here the target of V
        k, x = seen[0]["k"][i], seen[0]["x"][i]
        chunk = (x == chain[:, k - 17]).all(1).nonzero().item()
        assert torch.equal(seen[0]["x_next"][i], chain[chunk, k - 16])
        expected = (reward[chunk] / reward.std(correction=0)).item()
        assert seen[0]["target"][i].item() == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def decoder_of_two_modes():
    """A decoder of one action, near -0.5 or 0.5 with equal chances."""
    torch.manual_seed(0)
    file = decoder_file(OBS, 1, chunk=1, width=32)
    sizes = {k: file[k] for k in ("kind", "activation", "obs_dim", "action_dim", "chunk", "width")}
    sizes |= {k: file[k] for k in ("num_blocks", "cond_hidden")} | {"training": {"train_steps": 20}}
    net = pretrain_backbone.Backbone(sizes)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(800):
        mode = torch.randint(2, (256, 1)) - 0.5
        loss = net.loss(torch.zeros(256, OBS), mode + 0.05 * torch.randn(256, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = net.state_dict()
    file["model"] = {k: w for k, w in weights.items() if "time_network" not in k}
    training = {"train_steps": 20, "time_network": dict(net.time_network.state_dict())}
    file |= sizes | net.sample_by("euler", 5) | {"training": training}
    return dppo.Decoder(dppo.all_steps(file))


@pytest.mark.slow
@pytest.mark.parametrize("better", [-1, 1])
def test_on_a_bandit_with_two_modes_it_moves_to_the_better_one(better, decoder_of_two_modes):
    decoder = decoder_of_two_modes
    settings = dict(hidden_size=16, lr=1e-3, batch_size=512, tuned_steps=15)
    agent = dppo.Agent(dppo.Args(**settings, clip=0.1, clip_first=0.1), decoder)

    def reward_of(action):
        return (better * action[:, 0] > 0).float() + 0.2 * torch.randn(len(action))

    def share_and_distance(policy):
        action = policy(torch.zeros(2000, OBS), torch.randn(2000, decoder.dim))[:, 0]
        return (better * action > 0).float().mean(), (action.abs() - 0.5).abs().mean()

    share, distance = share_and_distance(decoder)
    assert 0.35 < share < 0.65 and distance < 0.1
    for _ in range(7):
        agent.learn(played(agent, reward_of, 256))
    share, distance = share_and_distance(agent.act)
    assert share > 0.85 and distance < 0.2


# --- a run ---


@pytest.mark.parametrize("kind, flags, parts", [
    ("flow", [], ["--backbone", "no diffusion"]),
    ("diffusion", ["--tuned-steps", 21], ["--tuned-steps 21", "2 to 20"]),
    ("diffusion", ["--tuned-steps", 1], ["--tuned-steps 1", "2 to 20"]),
])  # fmt: skip
def test_what_ppo_cannot_train_is_refused(kind, flags, parts, tiny_backbone, tmp_path):
    flags = ["--env-id", "Hopper-v4", "--backbone", tiny_backbone("Hopper", kind), *flags]
    refused(call(tmp_path, SCRIPT, *flags), *parts)
    assert not (tmp_path / "runs").exists()


KEYS = {"losses/policy", "losses/value", "losses/approx_kl", "losses/clipfrac", "trust_region/kl"}


def test_a_run_starts_frozen_learns_and_logs_what_it_does(tiny_backbone, tmp_path):
    flags = """--env-id Hopper-v4 --hidden-size 16 --batch-size 64 --num-envs 2 --eval-every 1000
        --eval-episodes 2 --rollout-steps 100 --log-every 300 --total-timesteps 600
        --lr 0.01 --gamma 0.9""".split()
    run = finish(tmp_path, SCRIPT, *flags, "--backbone", tiny_backbone())
    assert run.name.startswith("Hopper-v4__dppo_continuous__1__")
    rows, agent = metrics(run), checkpoint(run)["agent"]
    assert rows[-1].keys() >= KEYS and not rows[0]["losses/policy"] and rows[1]["losses/policy"]
    assert rows[-1]["entropy/action"] != rows[-1]["entropy/action_frozen"]
    assert 0 < float(rows[1]["trust_region/kl"]) < float(rows[-1]["trust_region/kl"])
    frozen = torch.load(tiny_backbone(), weights_only=True)["model"]
    for name, tensor in frozen.items():
        assert torch.equal(agent[f"decoder.{name}"], tensor)
        assert not torch.equal(agent[f"actor.{name}"], tensor)

    # Discounted returns so far, of both environments: an episode starts anew, a roll-out does not
    replay, returns, last = checkpoint(run)["replay"], [], np.zeros(2)
    for reward, fell in zip(replay["reward"].view(-1, 2), replay["terminated"].view(-1, 2)):
        returns.append(0.9 * last + reward.numpy())
        last = returns[-1] * (1 - fell.numpy())
    assert 3 < replay["terminated"].sum() < len(returns)
    expected = [np.size(returns), np.sum(returns), np.sum(np.square(returns))]
    np.testing.assert_allclose(agent["returns"], expected, rtol=1e-5)
