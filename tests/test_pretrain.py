"""pretrain_backbone.py: its kinds of data, the samples, the losses by hand, the file, and refusals.

The script runs as from the command line, most of the time inside this process, on data made here.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro

import lpds_continuous as lpds
import pretrain_backbone as pb

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "pretrain_backbone.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*", "ignore:.*env_spec.*")
TINY = "--hidden-size 8 --iterations 20 --batch-size 16 --eval-episodes 2"

# An environment of a module of its own, without a simulator: succeeds at its sixth step
MODULE = """
import gymnasium as gym
import numpy as np

class Walk(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-100.0, 100.0, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = self.np_random.uniform(size=3).astype(np.float32), 0
        return self.state, {}

    def step(self, action):
        self.t += 1
        self.state = self.state + np.float32([action[0], action[1], 1])
        return self.state, float(action[0]), self.t == 9, False, {"success": self.t == 6}

gym.register("Walk-v0", Walk, max_episode_steps=12)
"""


@pytest.fixture
def walk(tmp_path, monkeypatch):
    (tmp_path / "walkmodule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "walkmodule", raising=False)
    return "walkmodule:Walk-v0"


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Runs the script on `data`: (exit code, stdout, stderr, the file or None, its variables)."""

    def run(data, flags="", tiny=TINY):
        output = tmp_path / "decoder.pt"
        argv = [SCRIPT, "--output", output, *(["--data", data] if data else [])]
        argv = [*map(str, argv), *tiny.split(), *shlex.split(flags)]
        monkeypatch.setattr(sys, "argv", argv)
        code, variables = 0, {}
        try:
            variables = runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        file = torch.load(output, weights_only=True) if output.exists() else None
        return code, captured.out, captured.err, file, variables

    return run


def load(path, limit=np.inf, **args):
    return pb.load_data(pb.Args(data=str(path), output="x.pt", **args), limit)


def phi(file):
    """The decoder of a file with its own sampling steps."""
    decoder = pb.Backbone(file).requires_grad_(False)
    decoder.sample_by(file["solver"], len(file["time_emb"]) - (file["solver"] == "heun"))
    return decoder


# --- data ---


def episodes_of(*lengths):
    """Episode i, step t has observation 100 i + t (+ 1000 in the next dimension ...)."""
    steps = [100.0 * i + np.arange(n) for i, n in enumerate(lengths)]
    return [(t[:, None] + 1000 * np.arange(3), np.stack([t, -2 * t], 1)) for t in steps]


def flat(episodes, **changes):
    """Arrays of an .npz or of D4RL: odd episodes end by `terminals`, even ones by `timeouts`."""
    ends = np.concatenate([np.arange(len(a)) == len(a) - 1 for _, a in episodes])
    number = np.concatenate([np.full(len(a), i) for i, (_, a) in enumerate(episodes)])
    arrays = {
        "observations": np.concatenate([o for o, _ in episodes]),
        "actions": np.concatenate([a for _, a in episodes]),
        "terminals": ends & (number % 2 == 1),
        "timeouts": ends & (number % 2 == 0),
    } | changes
    return {key: x for key, x in arrays.items() if x is not None}


@pytest.fixture
def npz(tmp_path):
    def write(*lengths, episodes=None, **changes):
        arrays = flat(episodes or episodes_of(*(lengths or (9, 5, 12))), **changes)
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


def write_robomimic(path, episodes, masks=("train",)):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for i, (obs, actions) in enumerate(episodes):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = actions
            demo["obs/eef"], demo["obs/object"], demo["obs/unused"] = obs[:, :2], obs[:, 2:], obs
        for mask in masks:
            file[f"mask/{mask}"] = np.array([b"demo_0", b"demo_2"])
    return path


def write_d4rl(path, episodes, **changes):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, value in flat(episodes, **changes).items():
            file[key] = value
        file["infos/qpos"] = np.zeros(3)
    return path


def write_minari(episodes):
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            id=i,
            observations=[*obs, obs[-1] + 50],
            actions=list(actions),
            rewards=[0.0] * len(obs),
            terminations=[False] * len(obs),
            truncations=[False] * (len(obs) - 1) + [True],
        )
        for i, (obs, actions) in enumerate(episodes)
    ]
    about = ("algorithm_name", "author", "author_email", "code_permalink", "description")
    boxes = [gym.spaces.Box(-1e9, 1e9, x.shape[1:], x.dtype) for x in episodes[0]]
    minari.create_dataset_from_buffers(
        "toy/steps-v0",
        buffers,
        observation_space=boxes[0],
        action_space=boxes[1],
        **dict.fromkeys(about, "none"),
    )
    return "minari:toy/steps-v0"


SOURCES = ("npz", "npz with lengths", "d4rl", "robomimic", "minari")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(kind, episodes):
        if kind == "d4rl":
            return write_d4rl(tmp_path / "data.hdf5", episodes)
        if kind == "robomimic":
            return write_robomimic(tmp_path / "data.hdf5", episodes)
        if kind == "minari":
            return write_minari(episodes)
        arrays = flat(episodes)
        if kind == "npz with lengths":  # a file may have no flags where it was cut
            no = np.zeros(len(arrays["actions"]), bool)
            arrays |= {"terminals": no, "timeouts": no, "lengths": [len(a) for _, a in episodes]}
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_episodes_back(source, kind):
    episodes = episodes_of(*range(2, 14))  # a dozen: demo_10 must come after demo_9
    obs, actions, lengths = load(source(kind, episodes), obs_keys="eef,object")
    assert lengths.tolist() == [*range(2, 14)] and obs.dtype == actions.dtype == np.float64
    np.testing.assert_array_equal(obs, np.concatenate([o for o, _ in episodes]))
    np.testing.assert_array_equal(actions, np.concatenate([a for _, a in episodes]))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_trains_to_the_same_weights(source, script, kind):
    path = source(kind, episodes_of(9, 5, 12))
    code, _, error, file, _ = script(path, "--obs-keys eef,object")
    assert code == 0, error
    assert file["card"]["data"] == (path if kind == "minari" else path.name)
    other = script(source("npz", episodes_of(9, 5, 12)))[3]
    assert all(torch.equal(w, file["model"][name]) for name, w in other["model"].items())


def test_order_of_obs_keys_is_the_order_of_the_observation(tmp_path):
    path = write_robomimic(tmp_path / "data.hdf5", episodes_of(6))
    obs, _, _ = load(path, obs_keys="object,eef")
    np.testing.assert_array_equal(obs, episodes_of(6)[0][0][:, [2, 0, 1]])


def test_a_low_dimensional_file_of_robomimic_is_read_by_default(tmp_path):
    h5py = pytest.importorskip("h5py")
    sizes = dict(robot0_eef_pos=3, robot0_eef_quat=4, robot0_gripper_qpos=2, object=14)
    obs = np.random.default_rng(0).normal(size=(6, 23))
    with h5py.File(tmp_path / "low_dim_v141.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = "{}"
        demo, start = file["data"].create_group("demo_0"), 0
        for key, size in sizes.items():
            demo[f"obs/{key}"] = demo[f"next_obs/{key}"] = obs[:, start : start + size]
            start += size
        demo["obs/robot0_joint_pos"], demo["states"] = np.zeros((6, 7)), np.zeros((6, 45))
        demo["actions"], demo["rewards"] = np.ones((6, 7)), np.zeros(6)
    found, actions, lengths = load(tmp_path / "low_dim_v141.hdf5")
    np.testing.assert_array_equal(found, obs)
    assert actions.shape == (6, 7) and lengths.tolist() == [6]


def test_an_episode_without_an_end_flag_closes_the_file(npz):
    ends = np.arange(26) == 8
    assert load(npz(terminals=ends & False, timeouts=ends))[2].tolist() == [9, 17]


@pytest.mark.parametrize("lengths", [None, [9, 5, 12]])
def test_only_episodes_that_an_array_flags(npz, script, lengths):
    success = np.arange(26) == 11  # in the second episode of 9, 5, 12 steps
    path = npz(success=success, lengths=lengths)
    obs, _, found = load(path, only="success")
    assert found.tolist() == [5] and load(path)[2].tolist() == [9, 5, 12]
    np.testing.assert_array_equal(obs, episodes_of(9, 5, 12)[1][0])
    refused(script(npz(success=success & False), "--only success"), "--data")
    refused(script(npz(), "--only success"), "success")
    refused(script(npz(success=np.ones(3)), "--only success"), "--only success", "(3,)")
    refused(script("minari:a/b-v0", "--only success"), "--only success", "FILE.npz")


def test_masks_of_robomimic_are_used_or_named(script, tmp_path, capsys):
    path = write_robomimic(tmp_path / "data.hdf5", episodes_of(9, 5, 12), ("train", "valid"))
    assert load(path, obs_keys="eef,object", only="train")[2].tolist() == [9, 12]
    assert capsys.readouterr().out == ""
    assert load(path, obs_keys="eef,object")[2].tolist() == [9, 5, 12]
    assert "train, valid" in capsys.readouterr().out
    refused(script(path, "--obs-keys eef,object --only test"), "'test'")


# --- samples ---


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_samples_are_all_full_chunks_and_never_cross_episodes(npz, script, chunk):
    lengths = (9, 5, 3, 12)
    code, _, _, file, v = script(npz(*lengths), f"--chunk {chunk} --held-out 0.4")
    assert code == 0 and v["obs"].dtype == v["chunks"].dtype == torch.float32
    stats = {name: x.numpy() for name, x in file["normalization"].items()}
    span = stats["action_max"] - stats["action_min"]
    steps = (v["chunks"].view(-1, chunk, 2).double().numpy() + 1) / 2 * span + stats["action_min"]
    first = steps[:, :1, 0]
    np.testing.assert_allclose(steps[..., 0], first + np.arange(chunk), atol=1e-3)
    np.testing.assert_allclose(steps[..., 1], -2 * steps[..., 0], atol=1e-3)
    raw = (v["obs"].double().numpy() + 1) / 2 * (stats["obs_max"] - stats["obs_min"])
    np.testing.assert_allclose(raw[:, 0] + stats["obs_min"][0], first[:, 0], atol=1e-3)

    # Every start of every episode, once; held out are whole episodes
    starts = np.round(first[:, 0]).astype(int)
    truth = [100 * i + t for i, n in enumerate(lengths) for t in range(n - chunk + 1)]
    assert sorted(starts) == truth
    assert not set(starts[: v["split"]] // 100) & set(starts[v["split"] :] // 100)
    assert v["n_held"] == 1 and v["split"] > 0


def test_what_is_held_out_is_not_trained_on(npz, script, monkeypatch):
    drawn, randint = [], torch.randint

    def record(*args, **kwargs):
        drawn.append(randint(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randint", record)
    variables = script(npz(), "--kind flow --held-out 0.4")[4]
    drawn = torch.cat(drawn)
    assert drawn.min() == variables["split"] > 0 and drawn.max() == len(variables["obs"]) - 1


def test_short_episodes_cannot_empty_the_split(npz, script):
    # Only one of six episodes has a sample: whichever are held out, that one is trained on
    for seed in range(3):
        path = npz(2, 3, 9, 2, 1, 3)
        code, out, error, _, _ = script(path, f"--held-out 0.5 --seed {seed}")
        assert code == 0 and "6 chunks of 1 episodes; held out are 0 of 0" in out, error


def test_normalization_is_dppos_and_the_one_of_the_scripts():
    obs, actions = np.array([[-1.0, 5.0], [3.0, 7.0], [1.0, 5.0]]), np.array([[0.0], [0.5], [0.25]])
    stats = pb.statistics(obs, actions)
    assert {name: x.tolist() for name, x in stats.items()} == {
        "obs_min": [-1, 5],
        "obs_max": [3, 7],
        "action_min": [0],
        "action_max": [0.5],
    }
    found = pb.normalize(obs, stats, "obs")
    np.testing.assert_allclose(found, [[-1, -1], [1, 1], [0, -1]], atol=2e-6)
    np.testing.assert_allclose(pb.normalize(actions, stats, "action")[:, 0], [-1, 1, 0], atol=4e-6)


def test_constant_coordinates_are_named_and_get_span_1(npz, script):
    (obs, actions), *_ = episodes_of(20)
    obs[:, 1] = 7.0
    obs[:, 2] = 1e-8 * (np.arange(20) % 2)  # as good as constant
    actions[:, 0] = 0.25
    code, out, _, file, v = script(npz(episodes=[(obs, actions)]), "--held-out 0")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("constant")]
    assert len(lines) == 2 and "obs coordinates [1, 2]" in lines[0]
    assert "action coordinates [0]" in lines[1]
    stats = file["normalization"]
    np.testing.assert_allclose(stats["obs_min"], [0, 6.5, -0.5], atol=1e-7)
    np.testing.assert_allclose(stats["obs_max"], [19, 7.5, 0.5], atol=1e-7)
    assert (stats["action_min"][0], stats["action_max"][0]) == (-0.25, 0.75)
    assert v["obs"][:, 1:].abs().max() < 1e-5 and v["chunks"][:, ::2].abs().max() < 1e-5

    # In play such a coordinate moves by 3: that is 6, and not six million
    moved = pb.normalize(np.array([[0.0, 10.0, 3.0]]), stats, "obs")
    np.testing.assert_allclose(moved, [[-1, 6, 6]], rtol=1e-5)


def test_large_coordinates_keep_their_small_differences(npz, script):
    (obs, actions), *_ = episodes_of(26)
    obs[:, 0] = 400_000 + 0.001 * np.arange(26)  # float32 has steps of 0.03 there
    _, _, _, file, v = script(npz(episodes=[(obs, actions)]), "--held-out 0 --chunk 1")
    truth = np.arange(26) / 25 * 2 - 1
    np.testing.assert_allclose(v["obs"][:, 0], truth, atol=2e-4)  # 2 * 1e-6 / 0.025, DPPO's
    assert file["normalization"]["obs_min"].dtype == torch.float64


# --- losses ---


def network_of(kind, function=None, train_steps=20):
    """A tiny Backbone for one observation and two actions; or its network is function(x, t)."""
    sizes = {"kind": kind, "obs_dim": 1, "action_dim": 2, "chunk": 1, "width": 4, "num_blocks": 1}
    sizes |= {"cond_hidden": [], "activation": "relu", "training": {"train_steps": train_steps}}
    network = pb.Backbone(sizes)
    if function:
        network.embed_time = lambda t: t
        network.network = lambda x, t, obs: function(x, t[:, None])
    return network


def loss_with(function, kind, train_steps=20, n=50_000):
    torch.manual_seed(0)
    network = network_of(kind, function, train_steps)
    return network.loss(torch.zeros(n, 1), torch.tensor([0.3, -0.5]).expand(n, 2)).item()


ABAR = network_of("diffusion").alpha_bar


def test_loss_of_the_optimal_network_is_zero():
    a, c = torch.as_tensor(ABAR).float(), torch.tensor([0.3, -0.5])

    def noise(x, t):
        return (x - a[t].sqrt() * c) / (1 - a[t]).sqrt()

    assert loss_with(noise, "diffusion") < 1e-9
    assert loss_with(lambda x, t: (c - x) / (1 - t / 20), "flow") < 1e-6
    assert loss_with(lambda x, t: (c - x) / (1 - t / 7), "flow", train_steps=7) < 1e-6
    assert loss_with(lambda x, t: x - c, "flow") > 0.1


def test_loss_of_simple_networks_by_hand():
    # Network 0: E e^2 = 1, and E (a - e)^2 = a^2 + 1. Network x in a flow: a - e - (1 - u) e - u a
    # has mean square E[(1 - u)^2] a^2 + E[(2 - u)^2] = a^2 / 3 + 7 / 3; a^2 is 0.17 on average
    assert loss_with(lambda x, t: 0 * x, "diffusion") == pytest.approx(1, abs=0.02)
    assert loss_with(lambda x, t: 0 * x, "flow") == pytest.approx(1.17, abs=0.02)
    assert loss_with(lambda x, t: x, "flow") == pytest.approx((0.17 + 7) / 3, abs=0.05)
    # Network x in a diffusion: (1 - sqrt(1 - abar)) e - sqrt(abar) a, averaged over all steps
    truth = ((1 - np.sqrt(1 - ABAR)) ** 2 + 0.17 * ABAR).mean()
    assert loss_with(lambda x, t: x, "diffusion") == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_loss_of_a_batch_number_by_number(kind):
    torch.manual_seed(0)
    obs, chunks, abar = torch.randn(6, 1), torch.rand(6, 2), torch.as_tensor(ABAR).float()
    network, total = network_of(kind), 0.0
    torch.manual_seed(5)
    found = network.loss(obs, chunks).item()
    torch.manual_seed(5)
    noise = torch.randn(6, 2)
    draw = torch.randint(20, (6,)) if kind == "diffusion" else torch.rand(6, 1)[:, 0]
    for i in range(6):
        if kind == "diffusion":
            x = abar[draw[i]] ** 0.5 * chunks[i] + (1 - abar[draw[i]]) ** 0.5 * noise[i]
            target, t = noise[i], draw[i]
        else:
            x = noise[i] + draw[i] * (chunks[i] - noise[i])
            target, t = chunks[i] - noise[i], 20 * draw[i]
        out = network.network(x[None], network.embed_time(t[None]), obs[i : i + 1])[0]
        total += ((out - target) ** 2).sum().item()
    assert found == pytest.approx(total / 12, rel=1e-5)


# --- does it learn? ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_recovers_a_distribution_with_two_modes(script, tmp_path, kind):
    # a = +-(0.5, 0.3) + 0.2 s (1, -1) + 0.06 N(0, I): where the modes are depends on the state
    generator, n, mode = np.random.default_rng(0), 20_000, np.array([0.5, 0.3])
    state = generator.uniform(-1, 1, (n, 1))
    actions = generator.choice([-1, 1], (n, 1)) * mode + 0.2 * state * [1, -1]
    actions += 0.06 * generator.normal(size=(n, 2))
    ends = np.arange(n) % 100 == 99
    arrays = {"terminals": ends & False, "timeouts": ends}
    np.savez(tmp_path / "two.npz", observations=state, actions=actions, **arrays)
    recipe = "--chunk 1 --hidden-size 64 --iterations 3000 --batch-size 256 --lr 3e-3"
    flags = f"--kind {kind} {recipe} --ema-decay 0.95 --sample-steps 20"
    code, _, _, file, _ = script(tmp_path / "two.npz", flags, tiny="")
    assert code == 0
    decoder, stats = phi(file), {name: x.numpy() for name, x in file["normalization"].items()}
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    for s in (-0.6, 0.0, 0.6):
        obs = pb.normalize(np.full((4000, 1), s), file["normalization"], "obs")
        action = (decoder(obs, noise).numpy() + 1) / 2 * (stats["action_max"] - stats["action_min"])
        action = action + stats["action_min"] - 0.2 * s * np.array([1, -1])
        upper = action.sum(1) > 0
        assert upper.mean() == pytest.approx(0.5, abs=0.08)
        for part, sign in ((action[upper], 1), (action[~upper], -1)):
            np.testing.assert_allclose(part.mean(0), sign * mode, atol=0.04)
            assert (part.std(0) > 0.04).all() and (part.std(0) < 0.09).all()


def test_same_seed_same_weights(npz, script):
    models = [script(npz(), f"--seed {seed}")[3]["model"] for seed in (3, 3, 4)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not all(torch.equal(models[0][k], models[2][k]) for k in models[0])


def test_what_is_saved_is_the_average(npz, script):
    # A copy at 10, averages at 20 and 30, so m(d) = d^2 w10 + d (1 - d) w20 + (1 - d) w30
    m = {}
    for decay in (0.0, 0.3, 0.6, 0.9):
        file = script(npz(), f"--ema-decay {decay} --iterations 30 --lr 1e-2")[3]
        m[decay] = file["model"]["head.weight"].double()
    w30 = m[0.0]
    rest = [(m[d] - (1 - d) * w30) / d for d in (0.3, 0.6)]  # d w10 + (1 - d) w20
    w10, w20 = rest[1] + 4 / 3 * (rest[1] - rest[0]), rest[0] - (rest[1] - rest[0])
    expected = 0.81 * w10 + 0.09 * w20 + 0.1 * w30
    torch.testing.assert_close(m[0.9], expected, rtol=0, atol=1e-5)
    assert (w10 - w20).abs().max() > 0.01 and (w20 - w30).abs().max() > 0.001


def test_learning_rate_falls_as_half_a_cosine_to_a_tenth(npz, script, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def record(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    assert script(npz(), "--lr 1e-2")[0] == 0
    truth = 1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(20) / 20))
    np.testing.assert_allclose(rates, truth, rtol=1e-6)


# --- the file, and playing it ---


PARTS = {"format", "kind", "solver", "obs_dim", "action_dim", "chunk", "width", "num_blocks"}
PARTS |= {"cond_hidden", "activation", "time_emb", "levels", "model", "normalization"}
PARTS |= {"card", "training"}


@pytest.mark.parametrize("kind, solver", [("diffusion", "ddim"), ("flow", "euler")])
def test_the_file_is_whole_and_plays_in_the_scripts(walk, npz, script, kind, solver):
    flags = f"--env-id {walk} --kind {kind} --chunk 2 --held-out 0.4 --source 'made here'"
    code, out, error, file, _ = script(npz(), flags)
    assert code == 0 and set(file) == PARTS, error
    assert (file["format"], file["kind"], file["solver"]) == (2, kind, solver)
    assert file["time_emb"].shape == (5, 16) and len(file["levels"]) == 5 * (kind == "diffusion")
    card = file["card"]
    assert card["env_id"] == walk and card["data"] == "data.npz" and card["source"] == "made here"
    assert card["recipe"]["iterations"] == 20 and card["recipe"]["solver"] == solver
    assert not {"output", "data", "device"} & set(card["recipe"])
    assert card["losses"][-1]["loss"] == card["loss"] and np.isfinite(card["held_out_loss"])
    assert (card["frozen_length"], card["frozen_success"], card["eval_episodes"]) == (9, 1, 2)
    assert f"frozen: return {card['frozen_return']:.0f} +- " in out
    assert f"python lpds_continuous.py --env-id {walk} --backbone " in out

    # Its score is what the scripts' own environment and decoder give for the same noise
    decoder, env, returns = lpds.Decoder(file), lpds.make_env(walk, file), []
    for seed in (10_000, 10_001):
        (obs, _), ended, generator = env.reset(seed=seed), False, torch.Generator()
        generator.manual_seed(seed)
        while not ended:
            noise = torch.randn(1, decoder.dim, generator=generator)
            action = decoder(torch.as_tensor(obs)[None], noise)[0].numpy()
            obs, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        returns.append(info["episode"]["r"])
    assert np.mean(returns) == pytest.approx(card["frozen_return"], rel=1e-5)
    assert np.std(returns) == pytest.approx(card["frozen_return_std"], rel=1e-4, abs=1e-4)


def test_without_an_environment_the_card_has_no_score(npz, script):
    code, out, _, file, _ = script(npz(), "--kind flow --held-out 0")
    assert code == 0 and "--env-id ENV_ID" in out and "frozen" not in out
    assert not [key for key in file["card"] if key.startswith(("frozen", "eval"))]
    assert np.isnan(file["card"]["held_out_loss"])


def test_it_names_the_script_whose_task_it_is(npz, script, tmp_path, capsys):
    file = script(npz(), "--kind flow")[3]
    args = pb.Args(output=str(tmp_path / "lift.pt"), env_id="lpds_robomimic:Lift")
    pb.finish(args, file, phi(file), None)
    assert "python lpds_robomimic.py --env-id Lift --backbone" in capsys.readouterr().out


@pytest.mark.slow
def test_an_environment_without_mujoco_is_cloned_and_steered(tmp_path):
    env, rows = gym.make("Pendulum-v1"), []
    for seed in range(3):
        (obs, _), ended = env.reset(seed=seed), False
        while not ended:
            action = 2 * np.sin([len(rows)])
            following, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            rows.append((obs, action, terminated, truncated))
            obs = following
    arrays = zip(("observations", "actions", "terminals", "timeouts"), zip(*rows))
    np.savez(tmp_path / "p.npz", **{name: np.array(x) for name, x in arrays})

    def run(command):
        here = dict(cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return subprocess.run(shlex.split(command), capture_output=True, text=True, **here)

    clone = f"{sys.executable} {SCRIPT} --env-id Pendulum-v1 --data p.npz --output p.pt {TINY}"
    done = run(clone)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    command = done.stdout.strip().rpartition("steer it with: python ")[2]
    assert command == "lpds_continuous.py --env-id Pendulum-v1 --backbone p.pt"
    short = "--total-timesteps 2000 --prior-steps 500 --warmup-steps 500 --utd 1 --distill-steps 1"
    short += " --hidden-size 8 --batch-size 8 --eval-every 2000 --eval-episodes 1 --num-envs 1"
    done = run(f"{sys.executable} {ROOT}/{command} {short}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_resampling_changes_the_steps_and_nothing_else(walk, npz, script, tmp_path):
    base = script(npz(), f"--env-id {walk} --kind flow --source s")[3]
    (tmp_path / "decoder.pt").rename(tmp_path / "base.pt")
    flags = f"--resample {tmp_path / 'base.pt'} --env-id {walk} --solver heun --sample-steps 3"
    code, out, error, file, _ = script("", flags)
    assert code == 0 and "lpds_adroit_flow.py" in out, error
    assert (file["solver"], file["time_emb"].shape) == ("heun", (4, 16))
    for part in ("model", "normalization"):
        assert all(torch.equal(x, file[part][name]) for name, x in base[part].items())
    card = file["card"]
    assert card["resampled"] == "base.pt" and card["recipe"]["solver"] == "heun"
    assert card["recipe"]["sample_steps"] == 3 and card["recipe"]["iterations"] == 20
    assert card["source"] == "s" and card["frozen_return"] != base["card"]["frozen_return"]

    # Back again, which is what it was to the bit; without an environment the score is gone
    (tmp_path / "decoder.pt").rename(tmp_path / "heun.pt")
    file = script("", f"--resample {tmp_path / 'heun.pt'}")[3]
    assert file["solver"] == "euler" and torch.equal(file["time_emb"], base["time_emb"])
    assert "frozen_return" not in file["card"]


def test_what_cannot_be_resampled(walk, npz, script, tmp_path):
    assert script(npz())[0] == 0
    decoder = tmp_path / "base.pt"
    (tmp_path / "decoder.pt").rename(decoder)
    refused(script("", f"--resample {decoder} --sample-steps 21"), "--sample-steps 21", "20")
    refused(script("", f"--resample {decoder} --env-id Pendulum-v1"), "Pendulum-v1", "(3, 1)")
    refused(script(npz(), f"--resample {decoder}"), "--resample")
    refused(script(""), "--data", "--resample")
    torch.save({"format": 1}, decoder)
    refused(script("", f"--resample {decoder}"), f"--resample {decoder}", "format 2")


# --- refusals ---


def refused(result, *words):
    code, _, error, file, _ = result
    assert code == 2 and file is None
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(str(word) in error for word in words), error


NO = np.zeros(26, bool)
STEPS = np.arange(26)
nan_obs = np.tile(STEPS[:, None].astype(float), (1, 3))
nan_obs[11, 1] = np.nan
BAD_DATA = {
    "no timeouts": (dict(timeouts=None), "timeouts"),
    "no end flag is set": (dict(terminals=NO, timeouts=NO), "no end of an episode is flagged"),
    "flags inside an episode": (dict(lengths=[14, 12]), "flagged", "[9]"),
    "lengths too short": (dict(lengths=[9, 5]), "[14]", "26"),
    "lengths too long": (dict(lengths=[9, 18]), "[27]", "26"),
    "a length of zero": (dict(lengths=[9, 5, 0, 12]), "episode 2 has 0"),
    "a negative length": (dict(lengths=[27, -1], timeouts=NO, terminals=NO), "episode 1 has 0"),
    "no lengths": (dict(lengths=np.array([], int)), "lengths"),
    "flat actions": (dict(actions=np.zeros(26)), "(N, dim)"),
    "three axes": (dict(observations=np.zeros((26, 3, 1))), "(N, dim)"),
    "text": (dict(observations=np.full((26, 3), "a")), "cannot be read"),
    "nan": (dict(observations=nan_obs), "episode 1", "finite"),
    "fewer actions": (dict(actions=np.zeros((25, 2))), "25 actions", "26"),
    "fewer flags": (dict(timeouts=NO[:7]), "shape"),
    "one flag": (dict(timeouts=NO[:1]), "shape"),
    "a scalar": (dict(actions=np.float64(3)), "cannot be read"),
    "objects": (dict(observations=np.array([[1, 2], [3]], object)), "cannot be read"),
    "nothing": ({k: np.zeros((0, 2)) for k in flat(episodes_of(1))}, "--data"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_arrays_that_cannot_be_cloned(npz, script, what):
    changes, *words = BAD_DATA[what]
    path = npz(**changes)
    refused(script(path), f"--data {path}", *words)


def test_episodes_longer_than_the_time_limit_lack_an_end(walk, npz, script, tmp_path):
    ends = STEPS == 25
    path = write_d4rl(tmp_path / "d4rl.hdf5", episodes_of(13, 5))
    refused(script(path, f"--env-id {walk}"), "13 steps", "limit of 12")
    path = npz(terminals=NO, timeouts=ends)
    refused(script(path, f"--env-id {walk}"), f"--data {path}", "26 steps", "limit of 12")
    assert script(path)[0] == 0  # of what environment, it cannot know
    assert script(npz(12, 12), f"--env-id {walk}")[0] == 0
    # Demonstrations may be longer where the file itself says where they end
    assert script(npz(20, 6, lengths=[20, 6]), f"--env-id {walk}")[0] == 0


def test_the_environment_is_checked_before_training(walk, npz, script, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: pytest.fail("has begun"))
    refused(script(npz(), "--env-id Pendulum-v1"), "--env-id Pendulum-v1", "(3, 1)")
    refused(script(npz(), "--env-id CartPole-v1"), "--env-id CartPole-v1", "(4,)")
    refused(script(npz(), "--sample-steps 21"), "--sample-steps 21", "20")
    with pytest.raises(gym.error.NameNotFound):
        script(npz(), "--env-id Pendulumm-v1")


def test_files_that_cannot_be_read(npz, script, tmp_path):
    whole = npz().read_bytes()
    contents = {"empty": b"", "text": b"hello", "cut": whole[:-300], "zip": b"PK\3\4" + bytes(99)}
    for name, content in contents.items():
        for suffix in (".npz", ".hdf5"):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(content)
            refused(script(path), f"--data {path}: cannot be read")
    refused(script(tmp_path / "none.npz"), "none.npz", "No such file")
    refused(script(tmp_path), f"--data {tmp_path}", "FILE.npz")
    refused(script("data.csv"), "data.csv", "FILE.npz")


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(npz, script, tmp_path):
    path = npz(actions=np.array([Evil(tmp_path / "proof")], object))
    refused(script(path), f"--data {path}: cannot be read")
    assert not (tmp_path / "proof").exists()
    np.load(path, allow_pickle=True)["actions"]
    assert (tmp_path / "proof").exists()  # so it would have been


def test_hdf5_that_cannot_be_cloned(script, tmp_path):
    path = write_d4rl(tmp_path / "d4rl.hdf5", episodes_of(9, 5), timeouts=None)
    refused(script(path), f"--data {path}", "timeouts")
    path = write_robomimic(tmp_path / "robomimic.hdf5", episodes_of(9, 5))
    refused(script(path), "--obs-keys", "robot0_eef_pos", "eef, object, unused")
    (obs, actions), other = episodes_of(9, 5)
    path = write_robomimic(tmp_path / "unequal.hdf5", [(obs, actions[:8]), other])
    refused(script(path, "--obs-keys eef"), "episode 0 has 9 observations and 8 actions")
    path = write_robomimic(tmp_path / "dims.hdf5", [(obs, actions[:, :1]), other])
    refused(script(path, "--obs-keys eef"), "cannot be read")


def test_minari_that_cannot_be_loaded(script, monkeypatch):
    minari = pytest.importorskip("minari")

    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(minari, "load_dataset", no_network)
    refused(script("minari:mujoco/hopper/medium-v0"), "minari:mujoco/hopper/medium-v0", "not known")

    class Pictures:
        observation_space = gym.spaces.Dict({})

    monkeypatch.setattr(minari, "load_dataset", lambda *args, **kwargs: Pictures())
    refused(script("minari:a/b-v0"), "Box")


def test_episodes_shorter_than_a_chunk(npz, script):
    refused(script(npz(3, 2, 3)), "--chunk 4")
    assert script(npz(3, 2, 3), "--chunk 3")[0] == 0


FLAGS = ("--chunk 0", "--iterations 0", "--batch-size -1", "--hidden-size 0", "--sample-steps 0")
FLAGS += ("--train-steps 0", "--eval-episodes 0", "--lr 0", "--lr nan", "--ema-decay 1")
FLAGS += (
    "--ema-decay nan",
    "--held-out 1",
    "--held-out -0.1",
    "--output x.npz",
    "--output no/x.pt",
)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_out_of_range(npz, script, flags):
    refused(script(npz(), flags), *flags.split())


def test_a_crash_leaves_the_old_file(npz, script, monkeypatch, tmp_path):
    assert script(npz())[0] == 0
    before = (tmp_path / "decoder.pt").read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        script(npz())
    assert (tmp_path / "decoder.pt").read_bytes() == before


def test_a_loss_that_explodes_stops(npz, script):
    code, _, error, file, _ = script(npz(), "--lr 1e30 --iterations 200")
    assert code == 2 and file is None and "--lr 1e+30: the loss is not finite" in error


# --- what is said about it ---


def test_help_and_commands(capsys):
    page = (ROOT / "docs" / "pretrain_backbone.md").read_text()
    text = page.replace("\\\n", " ") + pb.__doc__
    commands = re.findall(r"^ *python pretrain_backbone\.py (.+)$", text, re.M)
    assert len(commands) >= 6
    for command in commands:
        pb.check_args(tyro.cli(pb.Args, args=shlex.split(command)))
    with pytest.raises(SystemExit) as stop:
        tyro.cli(pb.Args, args=["--help"], description=pb.__doc__)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in re.findall(r"`(--[a-z-]+)", page):
        assert flag in text + "--backbone", flag
