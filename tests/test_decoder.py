"""The decoder and its loader against independent references: DPPO's arithmetic rewritten in numpy, diffusers, scipy.

Checkpoints are written here exactly as DPPO writes them (key names, shapes and the two weight sets of `state_*.pt`),
with random weights; nothing is downloaded. Files that must be refused are refused with one sentence and exit code 2.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpds_continuous as lpds
from lpds_continuous import Decoder

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*", "ignore:Initializing zero-element.*")
OBS, ACT, CHUNK = 11, 3, 4  # Hopper
D = CHUNK * ACT


def rng(seed=0):
    return np.random.default_rng(seed)


def tensor(x):
    return torch.as_tensor(np.asarray(x), dtype=torch.float32)


# --- references: numpy, float64, DPPO's key names ---


def reference_schedule(steps):
    """(betas, abar): Nichol and Dhariwal's cosine on DPPO's grid, which ends at steps + 1; betas are float32 there."""
    x = np.linspace(0, steps + 1, steps + 1)
    f = np.cos((x / (steps + 1) + 0.008) / (1 + 0.008) * np.pi / 2) ** 2
    f = f / f[0]
    betas = np.clip(1 - f[1:] / f[:-1], 0, 0.999).astype(np.float32)
    return betas, np.cumprod(1 - betas.astype(np.float64))


def reference_steps(train, sample):
    return [i * (train // sample) for i in range(sample)][::-1]


def mish(x):
    return x * np.tanh(np.logaddexp(0, x))


def relu(x):
    return np.maximum(x, 0)


def reference_network(state, x, t, obs, act):
    """DPPO's DiffusionMLP: the predicted noise for x (B, d) at integer timestep t."""
    w = {k.removeprefix("network."): v.double().numpy() for k, v in state.items()}

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    time_dim = len(w["time_embedding.3.bias"])
    frequency = np.exp(-np.log(1e4) * np.arange(time_dim // 2) / (time_dim // 2 - 1))
    emb = np.concatenate([np.sin(t * frequency), np.cos(t * frequency)])
    emb = linear("time_embedding.3", mish(linear("time_embedding.1", emb)))
    if "cond_mlp.moduleList.0.linear_1.weight" in w:
        obs = linear("cond_mlp.moduleList.1.linear_1", act(linear("cond_mlp.moduleList.0.linear_1", obs)))
    h = linear("mlp_mean.layers.0", np.concatenate([x, np.tile(emb, (len(x), 1)), obs], 1))
    last = max(int(k.split(".")[2]) for k in w if k.startswith("mlp_mean"))
    for i in range(1, last):
        block = f"mlp_mean.layers.{i}"
        h = h + linear(f"{block}.l2", act(linear(f"{block}.l1", act(h))))
    return linear(f"mlp_mean.layers.{last}", h)


def reference_decode(state, obs, noise, train, sample, act):
    """DDIM, eta 0: clean action clamped to [-1, 1], noise recomputed from it, 1 after the last step."""
    _, abar = reference_schedule(train)
    times, x = reference_steps(train, sample), noise.astype(np.float64)
    for i, t in enumerate(times):
        a, a_next = abar[t], abar[times[i + 1]] if i + 1 < sample else 1.0
        clean = np.clip((x - np.sqrt(1 - a) * reference_network(state, x, t, obs, act)) / np.sqrt(a), -1, 1)
        eps = (x - np.sqrt(a) * clean) / np.sqrt(1 - a)
        x = np.sqrt(a_next) * clean + np.sqrt(1 - a_next) * eps
    return x


# --- files ---


def dppo_state(seed=0, hidden=512, blocks=1, time_dim=16, cond=(), obs_dim=OBS, d=D):
    """State dict with DPPO's keys; weights of torch's initial size, but a larger head, so that the network matters."""
    sizes = {"time_embedding.1": (2 * time_dim, time_dim), "time_embedding.3": (time_dim, 2 * time_dim)}
    for i, (n, m) in enumerate(zip(cond, (obs_dim, *cond), strict=False)):
        sizes[f"cond_mlp.moduleList.{i}.linear_1"] = (n, m)
    sizes["mlp_mean.layers.0"] = (hidden, d + time_dim + (cond[-1] if cond else obs_dim))
    for i in range(1, blocks + 1):
        sizes |= {f"mlp_mean.layers.{i}.l1": (hidden, hidden), f"mlp_mean.layers.{i}.l2": (hidden, hidden)}
    sizes[f"mlp_mean.layers.{blocks + 1}"] = (d, hidden)
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, (n, m) in sizes.items():
        scale = 3 / m**0.5 if n == d else 1 / m**0.5
        state[f"network.{name}.weight"] = torch.randn(n, m, generator=generator) * scale
        state[f"network.{name}.bias"] = torch.randn(n, generator=generator) * scale
    return state


HOPPER = dict(hidden=512, blocks=1, time_dim=16)
SQUARE = dict(hidden=1024, blocks=1, time_dim=32, cond=(512, 64))
DEEP = dict(hidden=64, blocks=2, time_dim=16)  # mlp_dims of 5 layers
SMALL = dict(hidden=16, blocks=1, time_dim=8)

# The shapes that DPPO's networks have, as dumped from its own code (only the sizes of Hopper's space are ours)
TABLE = {
    "hopper": (HOPPER, 553_020, {"mlp_mean.layers.0": (512, 39), "mlp_mean.layers.2": (12, 512)}),
    "can": (
        HOPPER | dict(obs_dim=23, d=28),
        575_564,
        {"mlp_mean.layers.0": (512, 67), "time_embedding.1": (32, 16), "time_embedding.3": (16, 32)},
    ),
    "square": (
        SQUARE | dict(obs_dim=23, d=28),
        2_305_212,
        {
            "mlp_mean.layers.0": (1024, 124),
            "cond_mlp.moduleList.0.linear_1": (512, 23),
            "cond_mlp.moduleList.1.linear_1": (64, 512),
            "mlp_mean.layers.1.l1": (1024, 1024),
            "mlp_mean.layers.2": (28, 1024),
            "time_embedding.1": (64, 32),
        },
    ),
}

STATS = {
    "obs_min": np.linspace(-3, -0.5, OBS).astype(np.float32),
    "obs_max": np.linspace(0.5, 4, OBS).astype(np.float32),
    "action_min": np.full(ACT, -0.99, np.float32),
    "action_max": np.full(ACT, 0.98, np.float32),
}


@pytest.fixture
def dppo(tmp_path):
    """Writes a DPPO checkpoint with its normalization.npz; returns the arguments that load it."""

    def write(state, content=None, stats=STATS, **args):
        path, npz = tmp_path / "state_3000.pt", tmp_path / "normalization.npz"
        torch.save({"epoch": 3000, "model": state, "ema": state} if content is None else content, path)
        np.savez(npz, **stats)
        return lpds.Args(**(dict(env_id="Hopper-v4", backbone=str(path), normalization=str(npz)) | args))

    return write


def own_file(kind="diffusion", seed=0, **config):
    """Our checkpoint format, width 16; weights as above."""
    config = dict(kind=kind, obs_dim=OBS, action_dim=ACT, chunk=CHUNK, hidden=[16, 16, 16], cond_hidden=[], time_dim=8,
                  activation="relu", train_steps=20, sample_steps=5) | config  # fmt: skip
    state = dppo_state(seed, config["hidden"][0], len(config["hidden"]) // 2, config["time_dim"])
    model, stats = (
        {k.removeprefix("network."): v for k, v in state.items()},
        {k: torch.tensor(v) for k, v in STATS.items()},
    )
    card = {"env_id": "Hopper-v4", "frozen_return": 1.0}
    return {"format": 1, "kind": kind, "config": config, "normalization": stats, "model": model, "card": card}


def own_decoder(kind="diffusion", head=1.0, **config):
    """The decoder of such a file, its last layer scaled by `head`; not frozen."""
    file = own_file(kind, **config)
    for value in list(file["model"].values())[-2:]:
        value *= head
    decoder = Decoder(file["config"])
    decoder.load_state_dict(file["model"])
    return decoder


def inputs(n=64, seed=1):
    generator = rng(seed)
    return generator.uniform(-1, 1, (n, OBS)), generator.normal(size=(n, D))


def decode(decoder, obs, noise):
    return decoder(tensor(obs), tensor(noise)).numpy()


# --- schedule ---


def test_schedule_has_dppos_constants():
    betas, abar = reference_schedule(20)
    assert betas[0] == pytest.approx(0.0079927, rel=1e-4) and betas[19] == pytest.approx(0.999)
    assert abar[19] == pytest.approx(6.06e-6, rel=1e-3)
    assert reference_schedule(100)[0][0] == pytest.approx(6.313e-4, rel=1e-3)
    assert reference_schedule(100)[1][99] == pytest.approx(2.43e-7, rel=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100, 1000])
def test_schedule_equals_the_reference(steps):
    # rtol: whether the betas are rounded to float32 matters only where abar is next to 0, after beta was cut to 0.999
    np.testing.assert_allclose(Decoder.alpha_bar(steps), reference_schedule(steps)[1], rtol=2e-5)


PRINTED = {  # DPPO's DDIM grids, latest timestep first
    (20, 5): ([16, 12, 8, 4, 0], [0.05366, 0.26917, 0.57153, 0.84701, 0.99201]),
    (20, 8): ([14, 12, 10, 8, 6, 4, 2, 0], [0.14427, 0.26917, 0.41631, 0.57153, 0.71986, 0.84701, 0.94074, 0.99201]),
    (100, 8): (
        [84, 72, 60, 48, 36, 24, 12, 0],
        [0.05366, 0.16685, 0.32612, 0.50943, 0.69145, 0.84701, 0.95461, 0.99937],
    ),
}  # fmt: skip


@pytest.mark.parametrize("train, sample", PRINTED)
def test_ddim_grid_has_dppos_constants(train, sample):
    # With predicted noise 0 and a small w, x is sqrt(abar) times the final action at every step
    times, abar = PRINTED[train, sample]
    assert reference_steps(train, sample) == times
    np.testing.assert_allclose(reference_schedule(train)[1][times], abar, atol=5.1e-6)
    decoder, xs, embeddings = own_decoder(train_steps=train, sample_steps=sample).freeze(), [], []
    decoder.network = lambda x, time_emb, obs: (xs.append(x), embeddings.append(time_emb[0]), 0 * x)[2]
    final = decoder(torch.zeros(1, OBS), torch.full((1, D), 0.1))
    np.testing.assert_allclose([((x / final) ** 2).mean() for x in xs], abar, atol=6e-6)
    torch.testing.assert_close(torch.stack(embeddings), decoder.embed_time(torch.tensor(times)))


# --- the whole decode ---


@pytest.mark.parametrize("name", TABLE)
def test_the_written_state_dicts_have_dppos_shapes(name):
    sizes, parameters, shapes = TABLE[name]
    state = dppo_state(**sizes)
    assert sum(v.numel() for v in state.values()) == parameters
    for key, (n, m) in shapes.items():
        assert state[f"network.{key}.weight"].shape == (n, m) and state[f"network.{key}.bias"].shape == (n,)


@pytest.mark.parametrize("train, sample", PRINTED)
@pytest.mark.parametrize("sizes, activation", [(HOPPER, "relu"), (SQUARE, "mish"), (DEEP, "relu"), (DEEP, "mish")])
def test_ddim_decode_equals_numpy(dppo, sizes, activation, train, sample):
    state, (obs, noise) = dppo_state(**sizes), inputs()
    decoder, _, _ = lpds.load_decoder(dppo(state, activation=activation))
    if (train, sample) != (20, 5):  # the file does not say, and the loader takes Gym's 20 / 5
        weights, config = decoder.state_dict(), decoder.config | {"train_steps": train, "sample_steps": sample}
        decoder = Decoder(config)
        decoder.load_state_dict(weights)
        decoder.freeze()
    found = decode(decoder, obs, noise)
    truth = reference_decode(
        state, tensor(obs).numpy(), tensor(noise).numpy(), train, sample, dict(relu=relu, mish=mish)[activation]
    )
    np.testing.assert_allclose(found, truth, atol=1e-5)
    assert found.std() > 0.3 and np.mean(np.abs(found) < 0.999) > 0.2  # neither constant nor all clipped


@pytest.mark.parametrize("train, sample", PRINTED)
def test_ddim_decode_equals_diffusers(train, sample):
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    scheduler = schedulers.DDIMScheduler(
        num_train_timesteps=train, trained_betas=reference_schedule(train)[0], clip_sample=True, clip_sample_range=1.0,
        set_alpha_to_one=True, timestep_spacing="leading", prediction_type="epsilon",
    )  # fmt: skip
    scheduler.set_timesteps(sample)
    assert scheduler.timesteps.tolist() == PRINTED[train, sample][0]
    decoder = own_decoder(train_steps=train, sample_steps=sample).freeze()
    obs, noise = map(tensor, inputs())
    x = noise
    for t in scheduler.timesteps:
        eps = decoder.network(x, decoder.embed_time(t.expand(len(x))), obs)
        x = scheduler.step(eps, int(t), x, eta=0.0, use_clipped_model_output=True).prev_sample
    found = decoder(obs, noise)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert found.std() > 0.3 and found.abs().lt(0.999).float().mean() > 0.2


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_time_enters_in_units_of_training_steps(kind):
    decoder = own_decoder(kind, train_steps=40, sample_steps=4).freeze()
    times = [30, 20, 10, 0] if kind == "diffusion" else [0, 10, 20, 30]
    torch.testing.assert_close(decoder.times, decoder.embed_time(torch.tensor(times)))


# --- flow ---


def flow(sample, head=0.1):
    return own_decoder("flow", head, sample_steps=sample).freeze()


@pytest.mark.parametrize("sample", [1, 5, 10, 200])
def test_euler_decode_of_a_linear_field_in_closed_form(sample, monkeypatch):
    # v = M x + obs c with a rotation and decay M: Euler gives powers of I + M/S, the limit is the matrix exponential
    decoder, generator = flow(sample), rng()
    matrix, c = generator.normal(size=(D, D)) * 0.1 - 0.5 * np.eye(D), generator.normal(size=(OBS, D)) * 0.02
    monkeypatch.setattr(decoder, "network", lambda x, time_emb, obs: x @ tensor(matrix).T + obs @ tensor(c))
    obs, noise = inputs(seed=2)
    noise = 0.3 * noise
    step, offset = np.eye(D) + matrix / sample, obs @ c / sample
    fixed = np.linalg.solve(step - np.eye(D), -offset.T).T  # x* with x* = step x* + offset
    truth = (noise - fixed) @ np.linalg.matrix_power(step, sample).T + fixed
    assert np.abs(truth).max() < 1  # so that the clamp at the end plays no part
    np.testing.assert_allclose(decode(decoder, obs, noise), truth, atol=1e-5)


def test_euler_decode_of_an_affine_network_by_its_weights():
    # Second layers of all blocks at zero: the network is one affine map of [x, time embedding, obs]
    decoder, sample = flow(10), 10
    for name, parameter in decoder.named_parameters():
        if ".l2." in name:
            parameter.zero_()
    w = {k.removeprefix("mlp_mean.layers."): v.double().numpy() for k, v in decoder.state_dict().items()}
    obs, x = inputs()
    for i in range(sample):
        emb = np.tile(decoder.embed_time(torch.tensor([i * 20 / sample])).double().numpy(), (len(x), 1))
        h = np.concatenate([x, emb, obs], 1) @ w["0.weight"].T + w["0.bias"]
        x = x + (h @ w["2.weight"].T + w["2.bias"]) / sample
    np.testing.assert_allclose(decode(decoder, *inputs()), np.clip(x, -1, 1), atol=1e-5)


def test_euler_decode_converges_to_the_ode_at_first_order():
    obs, noise = (x[:4] for x in inputs())
    noise = 0.15 * noise
    base = flow(1)

    def velocity(time, x):
        emb = base.embed_time(torch.full((4,), time * 20, dtype=torch.float32))
        return base.network(tensor(x.reshape(4, D)), emb, tensor(obs)).double().numpy().ravel()

    truth = solve_ivp(velocity, (0, 1), noise.ravel(), rtol=1e-6, atol=1e-7).y[:, -1].reshape(4, D)
    assert np.abs(truth).max() < 1 and np.abs(truth - noise).max() > 0.1
    error = [np.abs(decode(flow(sample), obs, noise) - truth).max() for sample in (10, 100, 1000)]
    assert error[2] < 2e-4
    assert 5 < error[0] / error[1] < 20 and 5 < error[1] / error[2] < 20


def test_flow_output_is_clamped():
    found = np.abs(decode(flow(5, head=10.0), *inputs()))
    assert found.max() == 1 and (found == 1).mean() > 0.5


# --- what every decoder keeps ---


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_frozen_deterministic_and_independent_of_the_batch(kind):
    decoder = own_decoder(kind, head=0.1)
    assert all(p.requires_grad for p in decoder.parameters())
    decoder.freeze()
    assert not any(p.requires_grad for p in decoder.parameters()) and not decoder.times.requires_grad
    obs, noise = map(tensor, inputs(33))
    whole = decoder(obs, noise)
    assert torch.equal(whole, decoder(obs, noise)) and not whole.requires_grad
    assert whole.shape == (33, D) and whole.abs().max() <= 1
    for part in (slice(0, 1), slice(5, 12), slice(32, 33)):
        torch.testing.assert_close(decoder(obs[part], noise[part]), whole[part], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_gradients_reach_the_noise(kind):
    decoder = own_decoder(kind, head=0.1).freeze()
    obs, noise = map(tensor, inputs(4))
    noise = (0.1 * noise).requires_grad_()
    decoder(obs, noise).sum().backward()
    assert noise.grad.abs().sum() > 0 and all(p.grad is None for p in decoder.parameters())


# --- DPPO checkpoints ---


def test_sizes_are_read_off_the_shapes(dppo):
    decoder, stats, card = lpds.load_decoder(dppo(dppo_state(**SQUARE), activation="mish"))
    assert decoder.config == {
        "kind": "diffusion", "obs_dim": OBS, "action_dim": ACT, "chunk": CHUNK, "hidden": [1024] * 3,
        "cond_hidden": [512, 64], "time_dim": 32, "activation": "mish", "train_steps": 20, "sample_steps": 5,
    }  # fmt: skip
    for key, value in STATS.items():
        np.testing.assert_array_equal(stats[key], value)
    assert re.fullmatch("[0-9a-f]{12}", card["checksum"]) and card["path"].endswith("state_3000.pt")
    assert lpds.load_decoder(dppo(dppo_state(**DEEP)))[0].config["hidden"] == [64] * 5


def test_ema_is_preferred_and_a_file_with_only_model_works(dppo):
    ema, model = dppo_state(1, **SMALL), dppo_state(2, **SMALL)
    out = [
        decode(lpds.load_decoder(dppo(None, content))[0], *inputs())
        for content in (
            {"epoch": 1, "model": model, "ema": ema}, {"epoch": 1, "ema": ema},
            {"itr": 1, "model": model}, {"itr": 1, "model": ema},
        )
    ]  # fmt: skip
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], out[3])
    assert np.abs(out[0] - out[2]).max() > 0.1


def test_a_fine_tuned_checkpoint_gives_its_frozen_base(dppo):
    base = dppo_state(1, **SMALL)
    tuned = {k.replace("network.", "actor_ft."): v + 1 for k, v in base.items()} | {"critic.Q1.weight": torch.ones(3)}
    found = lpds.load_decoder(dppo(None, {"itr": 5, "model": base | tuned}))[0]
    np.testing.assert_array_equal(decode(found, *inputs()), decode(lpds.load_decoder(dppo(base))[0], *inputs()))


def test_the_activation_flag_changes_the_output(dppo):
    state = dppo_state(**SMALL)
    relu, mish = (lpds.load_decoder(dppo(state, activation=name))[0] for name in ("relu", "mish"))
    assert np.abs(decode(relu, *inputs()) - decode(mish, *inputs())).max() > 0.01


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_our_format_loads_to_the_same_numbers(tmp_path, kind):
    file = own_file(kind, hidden=[16] * 5)
    torch.save(file, tmp_path / "own.pt")
    decoder, stats, card = lpds.load_decoder(lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "own.pt")))
    same = own_decoder(kind, hidden=[16] * 5).freeze()
    np.testing.assert_array_equal(decode(decoder, *inputs()), decode(same, *inputs()))
    assert not any(p.requires_grad for p in decoder.parameters())
    assert card["frozen_return"] == 1.0 and set(stats) == set(STATS)


# --- refusals: exit code 2, one sentence that names flag and file, nothing executed ---


def refused(capsys, args, flag, path):
    with pytest.raises(SystemExit) as stop:
        lpds.load_decoder(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and f"error: {flag}" in error and str(path) in error, error
    return error


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_evil(path, side_effect):
    torch.save({"epoch": 1, "model": Evil(side_effect), "ema": {}}, path)


def write_evil_legacy(path, side_effect):
    torch.save({"format": 1, "model": Evil(side_effect)}, path, _use_new_zipfile_serialization=False)


def write_truncated(path, _):
    torch.save(own_file(), path)
    path.write_bytes(path.read_bytes()[:-500])


FILES = {
    "malicious pickle": write_evil,
    "malicious legacy pickle": write_evil_legacy,
    "text": lambda path, _: path.write_text("this is no checkpoint\n"),
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": write_truncated,
    "zeros": lambda path, _: path.write_bytes(bytes(4096)),
    "npz": lambda path, _: np.savez(path.open("wb"), a=np.zeros(3)),
    "list": lambda path, _: torch.save([1, 2], path),
    "tensor": lambda path, _: torch.save(torch.zeros(3), path),
    "number": lambda path, _: torch.save(7, path),
    "empty dict": lambda path, _: torch.save({}, path),
    "no weights": lambda path, _: torch.save({"epoch": 3, "ema": None}, path),
    "weights are a list": lambda path, _: torch.save({"ema": [torch.zeros(2)]}, path),
    "strange keys": lambda path, _: torch.save({"ema": {7: torch.zeros(2)}}, path),
    "foreign names": lambda path, _: torch.save({"model": {"actor.0.weight": torch.zeros(2, 2)}}, path),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_no_decoder_are_refused(tmp_path, capsys, what):
    path, side_effect = tmp_path / "bad.pt", tmp_path / "executed"
    FILES[what](path, side_effect)
    np.savez(tmp_path / "normalization.npz", **STATS)
    args = lpds.Args(env_id="Hopper-v4", backbone=str(path), normalization=str(tmp_path / "normalization.npz"))
    refused(capsys, args, "--backbone", path)
    assert not side_effect.exists()


def test_the_malicious_file_would_have_worked(tmp_path):
    write_evil(tmp_path / "bad.pt", tmp_path / "executed")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_missing_file_and_folder_are_refused(tmp_path, capsys):
    for path in (tmp_path / "none.pt", tmp_path):
        refused(capsys, lpds.Args(env_id="Hopper-v4", backbone=str(path)), "--backbone", path)


def test_damaged_files_never_end_in_a_traceback(tmp_path, capsys):
    """Every prefix and byte flips all over the file: loads, or is refused with one sentence."""
    path, generator, loaded = tmp_path / "own.pt", rng(), 0
    torch.save(own_file(hidden=[4, 4, 4], time_dim=4), path)
    whole = path.read_bytes()
    args = lpds.Args(env_id="Hopper-v4", backbone=str(path))
    damaged = [whole[: int(n)] for n in np.linspace(0, len(whole) - 1, 20)]
    for position in generator.integers(len(whole), size=60):
        damaged.append(whole[:position] + bytes([generator.integers(256)]) + whole[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            lpds.load_decoder(args)
            loaded += 1
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.count("\n") == 1 and "own.pt" in error
    assert 0 < loaded < len(damaged)


@pytest.mark.parametrize("key", ["config", "model", "normalization", "card"])
@pytest.mark.parametrize("change", ["missing", "number"])
def test_own_format_without_a_part_is_refused(tmp_path, capsys, key, change):
    file = own_file()
    file[key] = 7
    if change == "missing":
        del file[key]
    torch.save(file, tmp_path / "own.pt")
    args = lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "own.pt"))
    if (key, change) == ("card", "missing"):  # all that is lost is what is known about it
        assert set(lpds.load_decoder(args)[2]) == {"path", "checksum"}
    else:
        refused(capsys, args, "--", args.backbone)


ABSURD = {
    "kind": ["gan", "", 3, None], "activation": ["gelu", 0, None], "obs_dim": [0, -11, "11", 12, None],
    "action_dim": [0, -3, "3", 6, 1.5], "chunk": [0, -4, "4", 2, 1e9, 4.0], "cond_hidden": [[64], 3, ["a"], None],
    "hidden": [[], [0, 0, 0], [-16] * 3, ["16"] * 3, 16, None, [16], [10**6] * 3, [10**12] * 3],
    "time_dim": [0, 2, 7, -8, "8", 16, None], "train_steps": [0, -20, "20", 4, 20.5, None, 10**13],
    "sample_steps": [0, -5, "5", 21, 2.5, None, 10**13],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, name, value",
    [
        (kind, name, value)
        for kind in ("diffusion", "flow")
        for name, values in ABSURD.items()
        for value in values
        # For a flow, the number of training steps is but the scale of its time embedding
        if kind == "diffusion" or (name, value) != ("sample_steps", 21)
        if kind == "diffusion" or name != "train_steps" or not isinstance(value, (int, float))
    ],
)
def test_absurd_configurations_are_refused(tmp_path, capsys, kind, name, value):
    file = own_file(kind)
    file["config"][name] = value
    torch.save(file, tmp_path / "own.pt")
    refused(capsys, lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "own.pt")), "--backbone", tmp_path / "own.pt")


def test_a_configuration_without_a_value_is_refused(tmp_path, capsys):
    for name in own_file()["config"]:
        file = own_file()
        del file["config"][name]
        torch.save(file, tmp_path / "own.pt")
        args = lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "own.pt"))
        assert name in refused(capsys, args, "--backbone", args.backbone)


def test_own_format_with_bad_normalization_is_refused(tmp_path, capsys):
    file = own_file()
    file["normalization"]["obs_min"][0] = np.nan
    torch.save(file, tmp_path / "own.pt")
    args = lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "own.pt"))
    assert "finite" in refused(capsys, args, "--", args.backbone)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(dppo, capsys, tmp_path, value):
    state = dppo_state(**SMALL)
    state["network.mlp_mean.layers.1.l1.bias"][3] = value
    args = dppo(state)
    assert "finite" in refused(capsys, args, "--backbone", args.backbone)
    file = own_file()
    list(file["model"].values())[-1][0] = value
    torch.save(file, tmp_path / "own.pt")
    args = lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "own.pt"))
    assert "finite" in refused(capsys, args, "--backbone", args.backbone)


def test_a_decoder_for_another_environment_is_refused(dppo, capsys):
    args = dppo(dppo_state(**SMALL), env_id="Walker2d-v4")
    error = refused(capsys, args, "--backbone", args.backbone)
    assert all(word in error for word in ("11", "17", "Walker2d-v4"))


BAD_STATS = {
    "missing key": {"obs_min": None},
    "short": {"obs_min": np.zeros(OBS - 1)},
    "both short": {"obs_min": np.zeros(OBS - 1), "obs_max": np.ones(OBS - 1)},
    "scalar": {"obs_max": np.float32(3)},
    "rows": {"action_min": -np.ones((1, ACT))},
    "no actions": {"action_min": np.zeros(0), "action_max": np.zeros(0)},
    "more actions": {"action_min": -np.ones(4), "action_max": np.ones(4)},
    "min above max": {"obs_min": np.full(OBS, 9.0)},
    "nan": {"obs_max": np.full(OBS, np.nan)},
    "infinite": {"action_max": np.full(ACT, np.inf)},
    "text": {"obs_min": np.array(["a"] * OBS)},
    "complex": {"obs_max": np.full(OBS, 9 + 1j)},
}


@pytest.mark.parametrize("what", BAD_STATS)
def test_bad_normalization_is_refused(dppo, capsys, what):
    stats = {k: v for k, v in (STATS | BAD_STATS[what]).items() if v is not None}
    with pytest.raises(SystemExit) as stop:
        lpds.load_decoder(dppo(dppo_state(**SMALL), stats=stats))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.search(r"error: --(normalization|backbone) \S+", error), error


def test_normalization_that_cannot_be_read_is_refused(dppo, capsys, tmp_path):
    args = dppo(dppo_state(**SMALL))
    path, side_effect = Path(args.normalization), tmp_path / "executed"
    np.savez(path, **(STATS | {"obs_min": np.array([Evil(side_effect)], object)}))
    refused(capsys, args, "--normalization", path)
    assert not side_effect.exists()
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:200], whole[:-40], b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        refused(capsys, args, "--normalization", path)
    np.save(path.open("wb"), np.zeros(3))
    refused(capsys, args, "--normalization", path)
    path.unlink()
    refused(capsys, args, "--normalization", path)
    args.normalization = ""
    refused(capsys, args, "--normalization", "")


def test_the_script_refuses_a_malicious_file_in_one_line(tmp_path):
    path, side_effect = tmp_path / "bad.pt", tmp_path / "executed"
    write_evil(path, side_effect)
    done = subprocess.run(
        [sys.executable, ROOT / "lpds_continuous.py", "--env-id", "Hopper-v4", "--backbone", path, "--run-dir", "r"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"lpds_continuous.py: error: --backbone {path}")
    assert not side_effect.exists() and not (tmp_path / "r").exists()
