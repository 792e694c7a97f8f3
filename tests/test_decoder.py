"""Decoding against independent references: DPPO's schedule in numpy, diffusers, scipy.

`Backbone` of pretrain_backbone.py samples by every solver; the scripts' `Decoder` must do the same
from the constants in the file alone, to the bit.
"""

import dppo_reference as dppo
import numpy as np
import pytest
import torch
from dppo_reference import OBS, PRINTED, D, inputs
from scipy.integrate import solve_ivp

from lpds_continuous import Decoder
from pretrain_backbone import Backbone


def sizes(kind, train_steps=20):
    """A decoder file without weights, as pretrain_backbone.py begins one."""
    file = {"kind": kind, "obs_dim": OBS, "action_dim": 3, "chunk": 4, "width": 16, "num_blocks": 2}
    file |= {"cond_hidden": [], "activation": "relu", "training": {"train_steps": train_steps}}
    return file


def backbone(kind="diffusion", train=20, sample=5, solver="euler", head=1.0):
    """A network of random weights, its last layer scaled by `head`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Backbone(sizes(kind, train)).requires_grad_(False)
    network.head.weight *= head
    network.sample_by(solver, sample)
    return network


def file_of(network):
    """The file that holds it."""
    weights = network.state_dict().items()
    file = sizes(network.kind) | {"model": {k: w for k, w in weights if "time_network" not in k}}
    constants = {"levels": network.levels, "time_emb": network.time_emb, "solver": network.solver}
    return file | constants


# --- schedule ---


def test_schedule_has_dppos_constants():
    betas, abar = dppo.schedule(20)
    assert betas[0] == pytest.approx(0.0079927, rel=1e-4) and betas[19] == pytest.approx(0.999)
    assert abar[19] == pytest.approx(6.06e-6, rel=1e-3)
    assert dppo.schedule(100)[0][0] == pytest.approx(6.313e-4, rel=1e-3)
    assert dppo.schedule(100)[1][99] == pytest.approx(2.43e-7, rel=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100, 1000])
def test_schedule_equals_the_reference(steps):
    # rtol: whether betas are rounded to float32 matters only where alpha bar is next to 0
    found = Backbone(sizes("diffusion", steps)).alpha_bar
    np.testing.assert_allclose(found, dppo.schedule(steps)[1], rtol=2e-5)


@pytest.mark.parametrize("train, sample", PRINTED)
def test_ddim_takes_dppos_steps(train, sample):
    times, abar = PRINTED[train, sample]
    np.testing.assert_allclose(dppo.schedule(train)[1][times], abar, atol=5.1e-6)
    network = backbone(train=train, sample=sample)
    np.testing.assert_allclose(np.square(network.levels)[:, 0], abar, atol=6e-6)
    np.testing.assert_allclose(np.square(network.levels)[:, 2], [*abar[1:], 1], atol=6e-6)
    np.testing.assert_allclose(np.square(network.levels)[:, :2].sum(1), 1)
    torch.testing.assert_close(network.time_emb, network.embed_time(torch.tensor(times)))


@pytest.mark.parametrize(
    "solver, times", [("euler", [0, 10, 20, 30]), ("heun", [0, 10, 20, 30, 40])]
)
def test_the_time_of_a_flow_is_counted_in_training_steps(solver, times):
    network = backbone("flow", train=40, sample=4, solver=solver)
    torch.testing.assert_close(network.time_emb, network.embed_time(torch.tensor(times)))


# --- DDIM ---


@pytest.mark.parametrize("train, sample", PRINTED)
def test_ddim_equals_diffusers(train, sample):
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    scheduler = schedulers.DDIMScheduler(
        num_train_timesteps=train,
        trained_betas=dppo.schedule(train)[0],
        clip_sample=True,
        clip_sample_range=1.0,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(sample)
    assert scheduler.timesteps.tolist() == PRINTED[train, sample][0]
    network, (obs, noise) = backbone(train=train, sample=sample, head=3), inputs()
    x = noise
    for t in scheduler.timesteps:
        eps = network.network(x, network.embed_time(t.expand(len(x))), obs)
        x = scheduler.step(eps, int(t), x, eta=0.0, use_clipped_model_output=True).prev_sample
    found = network(obs, noise)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert found.std() > 0.3 and found.abs().lt(0.999).float().mean() > 0.2


# --- flows ---


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("sample", [1, 5, 10])
def test_a_linear_field_in_closed_form(solver, sample, monkeypatch):
    # v = M x + obs c. A step of Euler is I + M/S, one of Heun I + M/S + (M/S)^2 / 2
    network, generator = backbone("flow", sample=sample, solver=solver), np.random.default_rng(0)
    matrix = generator.normal(size=(D, D)) * 0.1 - 0.5 * np.eye(D)
    c = generator.normal(size=(OBS, D)) * 0.02
    m, k = torch.as_tensor(matrix).float(), torch.as_tensor(c).float()
    monkeypatch.setattr(network, "network", lambda x, time_emb, obs: x @ m.T + obs @ k)
    obs, noise = inputs(seed=2)
    noise = 0.3 * noise
    h = matrix / sample
    step = np.eye(D) + h + (h @ h / 2 if solver == "heun" else 0)
    fixed = np.linalg.solve(matrix, -(obs.double().numpy() @ c).T).T  # where v is 0
    truth = (noise.double().numpy() - fixed) @ np.linalg.matrix_power(step, sample).T + fixed
    assert np.abs(truth).max() < 1  # so that the clamp at the end plays no part
    np.testing.assert_allclose(network(obs, noise), truth, atol=1e-5)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solvers_converge_to_the_ode_at_their_order(solver, order):
    obs, noise = (x[:4] for x in inputs())
    noise = 0.15 * noise

    # In double, and with an activation that is smooth: else the order cannot be seen
    def network(steps):
        file = sizes("flow") | {"activation": "mish"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            result = Backbone(file).double().requires_grad_(False)
        result.steps, result.solver = steps, solver
        times = torch.arange(steps + (solver == "heun")).double() * 20 / steps
        result.time_emb = result.embed_time(times)
        return result

    base, obs = network(1), obs.double()

    def velocity(time, x):
        emb = base.embed_time(torch.full((4,), time * 20, dtype=torch.float64))
        return base.network(torch.as_tensor(x.reshape(4, D)), emb, obs).numpy().ravel()

    solution = solve_ivp(velocity, (0, 1), noise.double().numpy().ravel(), rtol=1e-9, atol=1e-10)
    truth = solution.y[:, -1].reshape(4, D)
    assert np.abs(truth).max() < 1 and np.abs(truth - noise.numpy()).max() > 0.05
    errors = [np.abs(network(n)(obs, noise.double()).numpy() - truth).max() for n in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2**order, rel=0.3)


def test_a_flow_is_clamped():
    found = backbone("flow", head=30.0)(*inputs()).abs()
    assert found.max() == 1 and (found == 1).float().mean() > 0.5


# --- what every decoder keeps ---


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_the_scripts_decoder_is_the_same_to_the_bit(kind, activation):
    torch.manual_seed(0)
    network = Backbone(sizes(kind) | {"activation": activation}).requires_grad_(False)
    network.sample_by("euler", 5)
    decoder = Decoder(file_of(network) | {"activation": activation})
    for n in (1, 7, 64):
        assert torch.equal(decoder(*inputs(n)), network(*inputs(n)))
    assert not any(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_deterministic_and_independent_of_the_batch(kind):
    decoder, (obs, noise) = Decoder(file_of(backbone(kind))), inputs(33)
    whole = decoder(obs, noise)
    assert torch.equal(whole, decoder(obs, noise))
    assert whole.shape == (33, D) and whole.abs().max() <= 1
    for part in (slice(0, 1), slice(5, 12), slice(32, 33)):
        torch.testing.assert_close(decoder(obs[part], noise[part]), whole[part], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_gradients_reach_the_noise(kind):
    decoder, (obs, noise) = Decoder(file_of(backbone(kind))), inputs(4)
    noise = (0.1 * noise).requires_grad_()
    decoder(obs, noise).sum().backward()
    assert noise.grad.abs().sum() > 0 and all(p.grad is None for p in decoder.parameters())
