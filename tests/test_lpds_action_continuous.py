"""baselines/lpds_action_continuous.py: LP-DS-A, what differs from LP-DS."""

import numpy as np
import pytest
import torch
from conftest import decoder_file, finish, load, metrics

SCRIPT = "baselines/lpds_action_continuous.py"
lpds_a = load(SCRIPT)
OBS, D, N = 5, 6, 32


def setup(**settings):
    torch.manual_seed(0)
    args = lpds_a.Args(**dict(hidden_size=16, batch_size=N, reward_scale=0.3, delta=0.2) | settings)
    agent = lpds_a.Agent(args, lpds_a.Decoder(decoder_file(OBS, 2, chunk=3))).double()
    for parameter in agent.perturbation[-1].parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    batch = {"obs": torch.randn(N, OBS).double(), "action": torch.rand(N, D).double() * 2 - 1}
    torch.manual_seed(5)
    noise = torch.randn_like(batch["action"])
    torch.manual_seed(5)
    return agent, batch, noise


def lagrangian(agent, batch, noise):
    """Equation 8 with Q^A of the shifted, clipped action, negative; and E||Delta||^2."""
    shift = agent.perturbation(batch["obs"]).detach().numpy()
    action = np.clip(agent.decoder(batch["obs"], noise).numpy() + shift, -1, 1)
    q = agent.q_a(batch["obs"], torch.from_numpy(action)).detach().numpy().min(0).mean()
    norm = {"sum": np.sum, "mean": np.mean}[agent.args.delta_norm](shift**2, 1).mean()
    return agent.alpha.item() * (norm - 0.2) - q, norm


def test_the_policy_shifts_and_clips_the_action():
    agent, batch, noise = setup()
    agent.perturbation[-1].bias.data += torch.tensor([9.0, -9.0, 0, 0, 0, 0])
    action, shift = agent.act(batch["obs"], noise), agent.perturbation(batch["obs"]).detach()
    assert (action[:, 0] == 1).all() and (action[:, 1] == -1).all()
    expected = np.clip((agent.decoder(batch["obs"], noise) + shift).numpy(), -1, 1)
    np.testing.assert_array_equal(action, expected)


@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_delta_follows_finite_differences_of_the_lagrangian(norm):
    agent, batch, noise = setup(delta_norm=norm, alpha_init=1.7)
    parameters = list(agent.perturbation.parameters())
    before = torch.nn.utils.parameters_to_vector(parameters).detach()
    loss, sq_norm = lagrangian(agent, batch, noise)
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(len(before)))
    side = []
    for h in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(before + h * direction, parameters)
        side.append(lagrangian(agent, batch, noise)[0])
    torch.nn.utils.vector_to_parameters(before.clone(), parameters)
    rest = {n: t.clone() for n, t in agent.state_dict().items() if n.startswith("q_a")}
    agent.optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)

    info = agent.update_perturbation(batch)
    gradient = before - torch.nn.utils.parameters_to_vector(parameters).detach()
    assert (gradient @ direction).item() == pytest.approx((side[0] - side[1]) / 2e-5, rel=1e-4)
    assert info["losses/perturbation"].item() == pytest.approx(loss)
    assert info["trust_region/sq_norm"].item() == pytest.approx(sq_norm)
    assert all(torch.equal(agent.state_dict()[name], tensor) for name, tensor in rest.items())


def test_a_run_has_no_latent_critic(tiny_backbone, tmp_path):
    flags = """--env-id Hopper-v4 --hidden-size 16 --batch-size 32 --utd 3 --num-envs 2
        --prior-steps 200 --warmup-steps 100 --eval-every 300 --eval-episodes 2 --log-every 100
        --total-timesteps 600""".split()
    run = finish(tmp_path, SCRIPT, *flags, "--backbone", tiny_backbone())
    last = metrics(run)[-1]
    assert not {"losses/q_w", "losses/q_w_corr", "trust_region/kl"} & last.keys()
    assert float(last["trust_region/sq_norm"]) > 0
    assert last["entropy/action"] != last["entropy/action_frozen"]
