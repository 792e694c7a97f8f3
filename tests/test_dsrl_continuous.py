"""baselines/dsrl_continuous.py: what DSRL does otherwise, by torch.distributions and by hand.

What it shares with lpds_continuous.py is the same text (test_shared_code.py) and tested there;
test_resume.py has its runs.
"""

import math

import numpy as np
import pytest
import torch
from conftest import checkpoint, decoder_file, finish, load, metrics

SCRIPT = "baselines/dsrl_continuous.py"
dsrl = load(SCRIPT)
OBS, D, N = 5, 6, 64


def setup(started=True, **settings):
    """(agent, batch): a small agent whose log sigma varies from state to state."""
    torch.manual_seed(0)
    args = dsrl.Args(**dict(hidden_size=16, batch_size=N, reward_scale=0.3) | settings)
    agent = dsrl.Agent(args, dsrl.Decoder(decoder_file(OBS, 2, chunk=3, kind="flow"))).double()
    agent.actor[-1].weight.data *= 5
    agent.started.fill_(started)
    batch = {"obs": torch.randn(N, OBS), "action": torch.rand(N, D) * 2 - 1}
    batch |= {"reward": torch.randn(N), "next_obs": torch.randn(N, OBS)}
    batch |= {"terminated": (torch.rand(N) < 0.4).float()}
    return agent, {name: column.double() for name, column in batch.items()}


def by_torch(agent, obs, noise):
    """w / b (N, D) and log pi (N,) by torch.distributions."""
    mu, log_sigma = agent.actor(obs).detach().chunk(2, -1)
    gaussian = torch.distributions.Normal(mu, log_sigma.clamp(-20, 2).exp())
    u, tanh = gaussian.mean + gaussian.stddev * noise, torch.distributions.TanhTransform()
    log_prob = gaussian.log_prob(u) - tanh.log_abs_det_jacobian(u, tanh(u))
    return tanh(u), log_prob.sum(-1)


def drawn():
    """The noise that an update draws first."""
    torch.manual_seed(3)
    noise = torch.randn(N, D, dtype=torch.float64)
    torch.manual_seed(3)
    return noise


# --- the noise policy ---


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_noise_and_its_density_are_those_of_torch_distributions(bound):
    agent, batch = setup(noise_bound=bound)
    noise = torch.randn(N, D).double()
    w, log_prob = agent.squash(batch["obs"], noise)
    x, log_density = by_torch(agent, batch["obs"], noise)
    torch.testing.assert_close(w, bound * x)
    # No Jacobian of the bound: the density is that in [-1, 1]^d, where the target entropy is, too
    torch.testing.assert_close(log_prob, log_density)


def test_the_density_of_one_coordinate_integrates_to_one():
    agent, batch = setup()
    agent.actor[-1].weight.data.zero_()
    mu, log_sigma = [0.4] + [0.0] * (D - 1), [-0.3] * D
    agent.actor[-1].bias.data.copy_(torch.tensor(mu + log_sigma))
    x = torch.linspace(-1, 1, 20_003)[1:-1].double()  # where the first coordinate of w / b is
    noise = torch.zeros(len(x), D).double()
    noise[:, 0] = (torch.atanh(x) - 0.4) / math.exp(-0.3)
    _, log_prob = agent.squash(batch["obs"][:1].expand(len(x), -1), noise)
    others = (D - 1) * (-0.5 * math.log(2 * math.pi) + 0.3)  # log density of the others, at 0
    assert torch.trapezoid((log_prob - others).exp(), x).item() == pytest.approx(1, abs=1e-3)


def test_no_noise_beyond_the_bound_however_far_the_policy_goes():
    agent, batch = setup(noise_bound=1.5)
    for scale in (1, 100, 1e6):
        agent.actor[-1].weight.data *= scale
        w, log_prob = agent.squash(batch["obs"], 10 * torch.randn(N, D).double())
        assert w.abs().max() <= 1.5 and log_prob.isfinite().all()
    assert w.abs().max() > 1.49


def test_until_its_first_update_the_policy_is_the_frozen_one():
    agent, batch = setup(started=False)
    obs, noise = batch["obs"], 3 * torch.randn(N, D).double()
    assert torch.equal(agent.act(obs, noise), agent.decoder(obs, noise))
    agent.update_action_critic(batch)
    assert not agent.started
    agent.update_actor(batch)
    w, _ = agent.squash(obs, noise)
    assert agent.started and torch.equal(agent.act(obs, noise), agent.decoder(obs, w))


def test_without_noise_it_plays_the_mean_action():
    agent, batch = setup(noise_bound=1.5)
    mu, _ = agent.actor(batch["obs"]).chunk(2, -1)
    mean = agent.decoder(batch["obs"], 1.5 * mu.tanh())
    assert torch.equal(agent.act(batch["obs"], torch.zeros(N, D).double()), mean)


# --- its updates ---


@pytest.mark.parametrize("started", [True, False])
def test_the_td_target_holds_the_entropy_of_the_policy(started):
    agent, batch = setup(started, alpha_init=0.7, gamma=0.9)
    noise, obs = drawn(), batch["next_obs"]
    q = agent.q_a(batch["obs"], batch["action"]).detach()
    x, log_prob = by_torch(agent, obs, noise)
    w = 1.5 * x if started else noise
    value = agent.q_a_target(obs, agent.decoder(obs, w)).min(0).values
    value = value - 0.3 * 0.7 * log_prob * started  # alpha scales with the rewards
    target = 0.3 * batch["reward"] + 0.9 * (1 - batch["terminated"]) * value
    loss = 0.5 * (q - target).square().mean(1).sum().item()
    assert agent.update_action_critic(batch)["losses/q_a"].item() == pytest.approx(loss)


def test_the_loss_of_the_policy_is_that_of_sac_on_the_critic_of_noise():
    agent, batch = setup(alpha_init=0.7)
    noise = drawn()
    x, log_prob = by_torch(agent, batch["obs"], noise)
    w = 1.5 * x
    q = agent.q_w(batch["obs"], w).min(0).values.detach()
    prior = torch.distributions.Normal(0, 1).log_prob(w).sum(-1)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}

    info = agent.update_actor(batch)
    loss = (0.3 * 0.7 * log_prob - q).mean().item()
    assert info["losses/actor"].item() == pytest.approx(loss, rel=1e-6)
    assert info["losses/log_prob"].item() == pytest.approx(log_prob.mean().item())
    # KL(pi, N(0, I)) by the same sample; the density of w itself is that of w / b over b^d
    kl = log_prob - D * math.log(1.5) - prior
    assert info["trust_region/kl"].item() == pytest.approx(kl.mean().item())
    now = agent.state_dict()
    changed = {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}
    assert changed == {"actor", "log_alpha"}


@pytest.mark.parametrize("surplus", [-2.0, 2.0])
def test_the_temperature_follows_the_gap_to_the_target_entropy(surplus):
    agent, batch = setup(alpha_init=0.7)
    entropy = -agent.squash(batch["obs"], drawn())[1].mean().item()
    agent.args.target_entropy = entropy - surplus
    agent.optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    drawn()
    agent.update_actor(batch)
    # d/dlog_alpha of log_alpha (entropy - target): too much entropy makes it cheaper
    assert agent.alpha.item() == pytest.approx(0.3 * 0.7 * math.exp(-0.1 * surplus), rel=1e-5)


def test_the_temperature_holds_a_reachable_entropy():
    agent, batch = setup(target_entropy=2.0, lr=6e-3, reward_scale=1.0)
    agent.float()

    class Peak(torch.nn.Module):  # worth most at w = 0.3, so that entropy has a price
        def forward(self, obs, w):
            return -4 * (w - 0.3).square().sum(-1).expand(2, -1)

    agent.q_w = Peak()
    batch = {name: column.float() for name, column in batch.items()}
    entropies = [-agent.update_actor(batch)["losses/log_prob"].item() for _ in range(900)]
    assert np.mean(entropies[-200:]) == pytest.approx(2.0, abs=0.3)
    assert 0.05 < agent.alpha.item() < 20


# --- a run ---

KEYS = {"losses/actor", "losses/log_prob", "losses/alpha", "trust_region/kl", "losses/q_w_corr"}


def test_a_run_samples_the_prior_first_and_logs_what_it_is(tiny_backbone, tmp_path):
    flags = """--env-id Hopper-v4 --hidden-size 16 --batch-size 32 --utd 3 --distill-steps 2
        --num-envs 2 --prior-steps 200 --warmup-steps 100 --eval-every 300 --eval-episodes 2
        --log-every 100 --total-timesteps 600 --lr 0.01""".split()
    run = finish(tmp_path, SCRIPT, *flags, "--backbone", tiny_backbone("Hopper", "flow"))
    assert run.name.startswith("Hopper-v4__dsrl_continuous__1__")
    rows, state = metrics(run), checkpoint(run)
    assert rows[-1].keys() >= KEYS and state["agent"]["started"]
    assert not rows[1]["losses/actor"] and rows[-1]["losses/actor"]
    assert rows[1]["entropy/action"] == rows[1]["entropy/action_frozen"]
    assert rows[-1]["entropy/action"] != rows[-1]["entropy/action_frozen"]
