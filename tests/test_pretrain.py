"""pretrain_backbone.py: five sources of data, the file it writes, its two losses by hand, and whether it learns.

The script runs as it would from the command line, most of the time inside this process (an import of torch less), and
twice as a process of its own. All data is made here.
"""

import os
import pickle
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpds_continuous as lpds
import pretrain_backbone as pb
from pretrain_backbone import Decoder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "pretrain_backbone.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*", "ignore:.*eval_env.*", "ignore:.*env_spec.*")
TINY = "--hidden-size 8 --time-dim 4 --iterations 20 --batch-size 16 --log-every 10 --eval-episodes 2 --no-progress"


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Runs the script in this process on `data` with further flags: (exit code, stdout, stderr, output file)."""

    def run(data, flags="", tiny=TINY):
        output = tmp_path / "decoder.pt"
        argv = [str(SCRIPT), "--data", str(data), "--output", str(output), *tiny.split(), *shlex.split(flags)]
        monkeypatch.setattr(sys, "argv", argv)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err, output

    return run


def process(folder, *flags):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, flags), *TINY.split()],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def load(path):
    return torch.load(path, weights_only=True)


def last_layer(path):
    return list(load(path)["model"].values())[-2]


def phi(path):
    file = load(path)
    decoder = Decoder(file["config"])
    decoder.load_state_dict(file["model"])
    return decoder.freeze(), {k: v.numpy() for k, v in file["normalization"].items()}


# --- data ---


def episodes_of(*lengths, obs_dim=3, action_dim=2, seed=0):
    """Episode i, step t has observation 100 i + t (+ 1000 in the next dimension ...) and actions to match."""
    steps = [100.0 * i + np.arange(n) for i, n in enumerate(lengths)]
    return [
        (t[:, None] + 1000 * np.arange(obs_dim), np.stack([t, *[-2 * t] * (action_dim - 1)], 1)) for t in steps
    ]  # fmt: skip


def flat(episodes, **changes):
    """The arrays of our .npz and of D4RL's .hdf5: odd episodes end by `terminals`, even ones by `timeouts`."""
    ends = np.concatenate([np.arange(len(a)) == len(a) - 1 for _, a in episodes])
    number = np.concatenate([np.full(len(a), i) for i, (_, a) in enumerate(episodes)])
    arrays = {
        "observations": np.concatenate([o for o, _ in episodes]), "actions": np.concatenate([a for _, a in episodes]),
        "terminals": ends & (number % 2 == 1), "timeouts": ends & (number % 2 == 0),
    } | changes  # fmt: skip
    return {k: v for k, v in arrays.items() if v is not None}


@pytest.fixture
def npz(tmp_path):
    def write(*args, name="data.npz", **changes):
        np.savez(tmp_path / name, **flat(episodes_of(*(args or (9, 5, 12))), **changes))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """A dozen episodes of random actions in Hopper-v4."""
    env, episodes, generator = gym.make("Hopper-v4"), [], np.random.default_rng(0)
    for i in range(12):
        (obs, _), ended, rows = env.reset(seed=i), False, []
        while not ended:
            action = generator.uniform(-1, 1, 3)
            rows.append((obs, action))
            obs, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        episodes.append(tuple(np.array(column) for column in zip(*rows, strict=True)))
    path = tmp_path_factory.mktemp("hopper") / "hopper_random.npz"
    np.savez(path, **flat(episodes))
    return path


def write_robomimic(path, episodes, keys=("eef", "object")):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for i, (obs, actions) in enumerate(episodes):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = actions
            for key, part in zip(keys, (obs[:, :2], obs[:, 2:]), strict=True):
                demo[f"obs/{key}"] = part
            demo["obs/unused"] = obs * np.nan
        file["mask/train"] = np.array([b"demo_0"])
    return path


def write_d4rl(path, episodes, **changes):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, value in flat(episodes, **changes).items():
            file[key] = value
        file["infos/qpos"] = np.zeros(3)
    return path


def write_minari(episodes, name="toy/steps-v0", env=None):
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            id=i, observations=[*obs, obs[-1] + 50], actions=list(actions), rewards=[0.0] * len(obs),
            terminations=[False] * len(obs), truncations=[False] * (len(obs) - 1) + [True],
        )
        for i, (obs, actions) in enumerate(episodes)
    ]  # fmt: skip
    obs, actions = episodes[0]
    minari.create_dataset_from_buffers(
        name, buffers, algorithm_name="none", author="none", author_email="none", code_permalink="none",
        description="none",
        observation_space=gym.spaces.Box(-1e9, 1e9, obs.shape[1:], obs.dtype),
        action_space=gym.spaces.Box(-1e9, 1e9, actions.shape[1:], actions.dtype), env=env,
    )  # fmt: skip
    return f"minari:{name}"


# --- the data as it was written ---


SOURCES = ("npz", "npz with lengths", "d4rl", "robomimic", "minari")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(kind, episodes):
        if kind == "npz":
            np.savez(tmp_path / "data.npz", **flat(episodes))
        elif kind == "npz with lengths":  # which count, not the flags: a file may have none where it was cut
            no = np.zeros(sum(len(a) for _, a in episodes), bool)
            lengths = [len(a) for _, a in episodes]
            np.savez(tmp_path / "data.npz", **flat(episodes, terminals=no, timeouts=no, lengths=lengths))
        elif kind == "d4rl":
            return write_d4rl(tmp_path / "data.hdf5", episodes)
        elif kind == "robomimic":
            return write_robomimic(tmp_path / "data.hdf5", episodes)
        else:
            return write_minari(episodes)
        return tmp_path / "data.npz"

    return write


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_episodes_back(source, kind):
    episodes = episodes_of(*range(2, 14))  # a dozen: demo_10 must come after demo_9
    path = source(kind, episodes)
    found = pb.load_episodes(pb.Args(data=str(path), output="x", obs_keys="eef,object"))
    assert len(found) == len(episodes)
    for (obs, actions), (true_obs, true_actions) in zip(found, episodes, strict=True):
        assert obs.dtype == actions.dtype == np.float32
        np.testing.assert_array_equal(obs, true_obs)
        np.testing.assert_array_equal(actions, true_actions)


def test_order_of_obs_keys_is_the_order_of_the_observation(tmp_path):
    path = write_robomimic(tmp_path / "data.hdf5", episodes_of(6))
    ((obs, _),) = pb.load_episodes(pb.Args(data=str(path), output="x", obs_keys="object,eef"))
    np.testing.assert_array_equal(obs, episodes_of(6)[0][0][:, [2, 0, 1]])


def test_an_episode_without_an_end_flag_closes_the_file(npz):
    no = np.zeros(26, bool)
    ends = no.copy()
    ends[8] = True
    found = pb.load_episodes(pb.Args(data=str(npz(terminals=no, timeouts=ends)), output="x"))
    assert [len(actions) for _, actions in found] == [9, 17]


@pytest.mark.parametrize("lengths", [None, np.array([9, 5, 12])])
def test_only_episodes_that_succeed_at_some_step(npz, script, lengths):
    success = np.arange(26) == 11  # in the second episode of 9, 5, 12 steps
    path = npz(success=success, **{} if lengths is None else {"lengths": lengths})
    (found,) = pb.load_episodes(pb.Args(data=str(path), output="", only_successful=True))
    assert len(pb.load_episodes(pb.Args(data=str(path), output=""))) == 3
    assert np.array_equal(found[0], episodes_of(9, 5, 12)[1][0])
    refused(script(npz(success=success & False), "--only-successful"), "--only-successful", "no episode", "succeeds")
    refused(script(npz(), "--only-successful"), "--only-successful", "0 flags `success` for 26 steps")
    refused(script("data.hdf5", "--only-successful"), "--only-successful True", "FILE.npz")


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_windows_are_all_full_ones_and_never_cross_episodes(chunk):
    episodes = episodes_of(9, 5, 3, 12)
    stats = pb.statistics(episodes)
    obs, chunks = pb.windows(episodes, chunk, stats)
    assert len(obs) == len(chunks) == sum(max(n - chunk + 1, 0) for n in (9, 5, 3, 12))
    assert obs.dtype == chunks.dtype == torch.float32 and chunks.shape[1] == 2 * chunk
    span = stats["action_max"] - stats["action_min"]
    steps = (chunks.view(-1, chunk, 2).double().numpy() + 1) / 2 * span + stats["action_min"]
    first = steps[:, :1, 0]
    np.testing.assert_allclose(steps[..., 0], first + np.arange(chunk), atol=1e-3)  # consecutive: 100 apart if not
    np.testing.assert_allclose(steps[..., 1], -2 * steps[..., 0], atol=1e-3)
    raw_obs = (obs.double().numpy() + 1) / 2 * (stats["obs_max"] - stats["obs_min"]) + stats["obs_min"]
    np.testing.assert_allclose(raw_obs[:, 0], first[:, 0], atol=1e-3)  # the observation is that of the first action


def test_normalization_is_dppos_and_the_one_that_decoding_inverts():
    episodes = [(np.array([[-1.0, 5.0], [3.0, 5.0], [1.0, 5.0]]), np.array([[0.0], [0.5], [0.25]]))]
    stats = pb.statistics(episodes)
    assert {k: v.tolist() for k, v in stats.items()} == {
        "obs_min": [-1, 5], "obs_max": [3, 5], "action_min": [0], "action_max": [0.5],
    }  # fmt: skip
    obs, chunks = pb.windows(episodes, 1, stats)
    np.testing.assert_allclose(obs, [[-1, -1], [1, -1], [0, -1]], atol=1e-5)  # a constant dimension is -1
    np.testing.assert_allclose(chunks, [[-1], [1], [0]], atol=1e-5)
    wrapper = pb.ActionChunk(gym.make("Hopper-v4"), 4, stats)
    np.testing.assert_allclose(obs, [wrapper.normalize(row) for row in episodes[0][0]], atol=1e-6)


# --- losses ---


CONFIG = dict(kind="diffusion", obs_dim=1, action_dim=2, chunk=1, hidden=[4], cond_hidden=[], time_dim=4,
              activation="relu", train_steps=20, sample_steps=5)  # fmt: skip


def loss_with(network, kind, chunk=(0.3, -0.5), n=50_000, **config):
    """bc_loss where the data is one action and the network is a function of (x, t)."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG | {"kind": kind} | config)
    decoder.embed_time, decoder.network = lambda t: t, lambda x, t, obs: network(x, t[:, None])
    abar = torch.as_tensor(Decoder.alpha_bar(decoder.config["train_steps"])).float()
    return pb.bc_loss(decoder, torch.zeros(n, 1), torch.tensor(chunk).expand(n, 2), abar).item()


def test_loss_of_the_optimal_network_is_zero():
    a, c = torch.as_tensor(Decoder.alpha_bar(20)).float(), torch.tensor([0.3, -0.5])
    noise = lambda x, t: (x - a[t].sqrt() * c) / (1 - a[t]).sqrt()  # noqa: E731
    assert loss_with(noise, "diffusion") < 1e-9
    assert loss_with(lambda x, t: (c - x) / (1 - t / 20), "flow") < 1e-6
    assert loss_with(lambda x, t: (c - x) / (1 - t / 7), "flow", train_steps=7) < 1e-6  # time in training steps
    assert loss_with(lambda x, t: x - c, "flow") > 0.1


def test_loss_of_simple_networks_by_hand():
    # Network 0: E e^2 = 1, and E (a - e)^2 = a^2 + 1. Network x in a flow: a - e - (1 - u) e - u a has mean square
    # E[(1 - u)^2] a^2 + E[(2 - u)^2] = a^2 / 3 + 7 / 3; a^2 is 0.17 on average. Standard error: about 0.01
    assert loss_with(lambda x, t: 0 * x, "diffusion") == pytest.approx(1, abs=0.02)
    assert loss_with(lambda x, t: 0 * x, "flow") == pytest.approx(1.17, abs=0.02)
    assert loss_with(lambda x, t: x, "flow") == pytest.approx((0.17 + 7) / 3, abs=0.05)
    # Network x in a diffusion: (1 - sqrt(1 - abar)) e - sqrt(abar) a, averaged over all 20 steps
    a = Decoder.alpha_bar(20)
    truth = ((1 - np.sqrt(1 - a)) ** 2 + 0.17 * a).mean()
    assert loss_with(lambda x, t: x, "diffusion") == pytest.approx(truth, abs=0.02)


def test_loss_of_a_batch_number_by_number():
    torch.manual_seed(0)
    obs, chunks, abar = torch.randn(6, 1), torch.rand(6, 2), torch.as_tensor(Decoder.alpha_bar(20)).float()
    for kind in ("diffusion", "flow"):
        decoder, total = Decoder(CONFIG | {"kind": kind}), 0.0
        torch.manual_seed(5)
        found = pb.bc_loss(decoder, obs, chunks, abar).item()
        torch.manual_seed(5)
        noise = torch.randn(6, 2)
        draw = torch.randint(20, (6,)) if kind == "diffusion" else torch.rand(6, 1)[:, 0]
        for i in range(6):
            if kind == "diffusion":
                x = abar[draw[i]] ** 0.5 * chunks[i] + (1 - abar[draw[i]]) ** 0.5 * noise[i]
                target, t = noise[i], draw[i]
            else:
                x, target, t = noise[i] + draw[i] * (chunks[i] - noise[i]), chunks[i] - noise[i], 20 * draw[i]
            out = decoder.network(x[None], decoder.embed_time(t[None]), obs[i : i + 1])[0]
            total += ((out - target) ** 2).sum().item()
        assert found == pytest.approx(total / 12, rel=1e-5)


# --- does it learn? ---


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_recovers_a_distribution_with_two_modes(script, tmp_path, kind):
    # a = +-(0.5, 0.3) + 0.2 s (1, -1) + 0.06 N(0, I): where the modes lie depends on the state, which one does not
    generator, n, mode = np.random.default_rng(0), 20_000, np.array([0.5, 0.3])
    state = generator.uniform(-1, 1, (n, 1))
    actions = generator.choice([-1, 1], (n, 1)) * mode + 0.2 * state * [1, -1] + 0.06 * generator.normal(size=(n, 2))
    ends = np.arange(n) % 100 == 99
    np.savez(tmp_path / "two.npz", observations=state, actions=actions, terminals=ends & False, timeouts=ends)
    recipe = (
        "--chunk 1 --hidden-size 64 --iterations 3000 --batch-size 256 --lr 3e-3 --ema-decay 0.95 --sample-steps 20"
    )
    code, _, _, output = script(tmp_path / "two.npz", f"--kind {kind} {recipe} --log-every 3000", tiny="--no-progress")
    assert code == 0
    decoder, n = phi(output)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    for s in (-0.6, 0.0, 0.6):
        obs = 2 * ((s - n["obs_min"]) / (n["obs_max"] - n["obs_min"]) - 0.5)
        action = (decoder(torch.as_tensor(obs).float().expand(4000, 1), noise).numpy() + 1) / 2
        action = action * (n["action_max"] - n["action_min"]) + n["action_min"] - 0.2 * s * np.array([1, -1])
        upper = action.sum(1) > 0
        assert upper.mean() == pytest.approx(0.5, abs=0.08)
        for part, sign in ((action[upper], 1), (action[~upper], -1)):
            np.testing.assert_allclose(part.mean(0), sign * mode, atol=0.04)
            assert (part.std(0) > 0.04).all() and (part.std(0) < 0.09).all()


# --- the file ---


PARTS = {"format", "kind", "config", "normalization", "model", "card"}


def test_written_file_has_the_whole_format_and_plays(hopper, tmp_path):
    done = process(
        tmp_path, "--data", hopper, "--output", "h.pt", "--env-id", "Hopper-v4", "--source", "random actions"
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "frozen: return" in done.stdout and "--env-id Hopper-v4 --backbone h.pt" in done.stdout
    file = load(tmp_path / "h.pt")
    assert set(file) == PARTS and file["format"] == 1 and file["kind"] == file["config"]["kind"] == "diffusion"
    assert file["config"] == dict(
        kind="diffusion", obs_dim=11, action_dim=3, chunk=4, hidden=[8] * 3, cond_hidden=[], time_dim=4,
        activation="relu", train_steps=20, sample_steps=5,
    )  # fmt: skip
    with np.load(hopper) as data:
        for side, key in (("obs", "observations"), ("action", "actions")):
            assert np.allclose(file["normalization"][f"{side}_min"], data[key].min(0))
            assert np.allclose(file["normalization"][f"{side}_max"], data[key].max(0))
    card = file["card"]
    assert card["env_id"] == "Hopper-v4" and card["data"] == "hopper_random.npz" and card["source"] == "random actions"
    assert card["eval_episodes"] == 2 and 0 < card["frozen_return"] < 500 and 1 <= card["frozen_length"] < 1000
    assert card["recipe"]["iterations"] == 20 and card["recipe"]["hidden_size"] == 8 and "output" not in card["recipe"]
    assert [row["iteration"] for row in card["losses"]] == [10, 20] and card["loss"] == card["losses"][-1]["loss"]

    # ... and what the script evaluated is what comes back from the file
    args = lpds.Args(env_id="Hopper-v4", backbone=str(tmp_path / "h.pt"))
    decoder, stats, loaded = lpds.load_decoder(args)
    envs = [lpds.make_env("Hopper-v4", 4, stats) for _ in range(2)]
    again = lpds.evaluate(decoder, envs, card["eval_seed"], torch.device("cpu"))
    assert again["return"].mean() == pytest.approx(card["frozen_return"], rel=1e-6)
    assert loaded["frozen_return"] == card["frozen_return"]


def test_plain_data_without_an_environment(npz, tmp_path):
    done = process(tmp_path, "--data", npz(), "--output", "t.pt", "--kind", "flow", "--chunk", 2, "--held-out", 0.4)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    file = load(tmp_path / "t.pt")
    assert set(file) == PARTS and file["kind"] == "flow" and "frozen_return" not in file["card"]
    assert np.isfinite(file["card"]["held_out_loss"]) and "1 episodes held out" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "t.pt"]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_trains_to_the_same_file(source, script, tmp_path, kind):
    path = source(kind, episodes_of(9, 5, 12))
    code, _, error, output = script(path, "--obs-keys eef,object")
    assert code == 0, error
    file = load(output)
    assert file["card"]["data"] == (path if kind == "minari" else path.name)
    assert file["normalization"]["action_min"].tolist() == [0, -2 * 211]
    script(source("npz", episodes_of(9, 5, 12)))
    assert all(torch.equal(w, file["model"][k]) for k, w in load(output)["model"].items())


def test_same_seed_same_weights(npz, script):
    models = []
    for seed in (3, 3, 4):
        code, _, _, output = script(npz(), f"--seed {seed}")
        assert code == 0
        models.append(load(output)["model"])
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not all(torch.equal(models[0][k], models[2][k]) for k in models[0])


def test_what_is_saved_is_the_average(npz, script):
    # 30 iterations: a copy at 10, averages at 20 and 30, so m(d) = d^2 w10 + d (1 - d) w20 + (1 - d) w30
    m = {}
    for decay in (0.0, 0.3, 0.6, 0.9):
        code, _, _, output = script(npz(), f"--ema-decay {decay} --iterations 30 --lr 1e-2")
        assert code == 0
        m[decay] = last_layer(output).double()
    w30 = m[0.0]
    rest = [(m[d] - (1 - d) * w30) / d for d in (0.3, 0.6)]  # d w10 + (1 - d) w20
    w10, w20 = rest[1] + 4 / 3 * (rest[1] - rest[0]), rest[0] - (rest[1] - rest[0])
    torch.testing.assert_close(m[0.9], 0.81 * w10 + 0.09 * w20 + 0.1 * w30, rtol=0, atol=1e-5)
    assert (w10 - w20).abs().max() > 0.01 and (w20 - w30).abs().max() > 0.001


def test_runs_shorter_than_the_cadence_save_trained_weights(npz, script):
    weights = []
    for lr in ("1e-2", "1e-9"):
        _, _, _, output = script(npz(), f"--iterations 3 --lr {lr}")
        weights.append(last_layer(output))
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_learning_rate_falls_as_half_a_cosine_to_a_tenth(npz, script, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    assert script(npz(), "--lr 1e-2")[0] == 0
    truth = 1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(20) / 20))
    np.testing.assert_allclose(rates, truth, rtol=1e-6)


def test_short_episodes_cannot_empty_the_split(npz, script):
    # Only one of six episodes has a window: whichever are held out, that one is trained on
    for seed in range(3):
        code, out, error, _ = script(npz(2, 3, 9, 2, 1, 3), f"--held-out 0.5 --seed {seed}")
        assert code == 0 and "6 chunks from 1 episodes, 0 episodes held out, 5 shorter" in out, error


# --- refusals ---


def refused(result, *words):
    code, out, error, output = result
    assert code == 2 and "Traceback" not in error
    assert error.startswith("pretrain_backbone.py: error: ") and error.count("\n") == 1, error
    assert all(str(word) in error for word in words), error
    assert not output.exists() and not Path(f"{output}.tmp").exists()


nan_obs, huge, wide = (np.tile(np.arange(26.0)[:, None], (1, 3)) for _ in range(3))
nan_obs[7, 1], huge[7, 1] = np.nan, 1e300  # the second overflows float32
BAD_DATA = {
    "no timeouts": (dict(timeouts=None), "timeouts"),
    "no actions and no end flags": (dict(actions=None, terminals=None), "no actions and no terminals"),
    "flat actions": (dict(actions=np.zeros(26)), "(T, dim)"),
    "three axes": (dict(observations=np.zeros((26, 3, 1))), "(T, dim)"),
    "text": (dict(observations=np.full((26, 3), "a")), "numeric"),
    "complex": (dict(observations=np.zeros((26, 3), complex)), "numeric"),
    "nan": (dict(observations=nan_obs), "episode 0", "finite"),
    "beyond float32": (dict(observations=huge), "episode 0", "finite"),
    "fewer actions": (dict(actions=np.zeros((25, 2))), "[26, 25, 26, 26] rows"),
    "fewer flags": (dict(timeouts=np.zeros(7, bool)), "[26, 26, 26, 7] rows"),
    "one flag": (dict(timeouts=np.zeros(1, bool)), "[26, 26, 26, 1] rows"),
    "flags in pairs": (dict(timeouts=np.zeros((26, 2), bool), terminals=np.zeros((26, 2), bool)), "one flag a step"),
    "scalar": (dict(actions=np.float64(3)), "cannot be read"),
    "zero-length episode": (dict(lengths=np.array([9, 0, 17])), "episode 1 has zero length"),
    "lengths too long": (dict(lengths=np.array([9, 18])), "add up to 27", "26 steps"),
    "negative lengths": (dict(lengths=np.array([27, -1])), "lengths"),
    "no lengths": (dict(lengths=np.array([], int)), "lengths"),
    "object array": (dict(observations=np.array([[1, 2], [3]], object)), "cannot be read"),
    "nothing": ({k: np.zeros((0, 2)) for k in ("observations", "actions", "terminals", "timeouts")}, "zero length"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_DATA)
def test_arrays_that_cannot_be_cloned(npz, script, what):
    changes, *words = BAD_DATA[what]
    path = npz(**changes)
    refused(script(path), f"--data {path}", *words)


def test_files_that_cannot_be_read(npz, script, tmp_path):
    whole = npz().read_bytes()
    contents = {
        "empty": b"",
        "text": b"hello",
        "cut": whole[:-300],
        "head": whole[:90],
        "zip": b"PK\x03\x04" + bytes(99),
    }
    for name, content in contents.items():
        for suffix in (".npz", ".hdf5"):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(content)
            refused(script(path), f"--data {path}: cannot be read")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    refused(script(tmp_path / "array.npz"), "array.npz: cannot be read")
    (tmp_path / "data.csv").write_text("1,2\n")
    refused(script(tmp_path / "data.csv"), "--data", "data.csv: unknown kind of file", ".hdf5")
    refused(script(tmp_path / "none.npz"), "--data", "none.npz: no such file")
    refused(script(tmp_path), f"--data {tmp_path}: a folder without *.pkl")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(npz, script, tmp_path):
    path = npz(actions=np.array([Evil(tmp_path / "executed")], object))
    refused(script(path), f"--data {path}: cannot be read")
    assert not (tmp_path / "executed").exists()
    np.load(path, allow_pickle=True)["actions"]
    assert (tmp_path / "executed").exists()  # so it would have been


def test_hdf5_that_cannot_be_cloned(script, tmp_path):
    h5py = pytest.importorskip("h5py")
    episodes = episodes_of(9, 5)
    path = write_d4rl(tmp_path / "d4rl.hdf5", episodes, timeouts=None)
    refused(script(path), f"--data {path}: has no timeouts")
    path = write_robomimic(tmp_path / "robomimic.hdf5", episodes)
    refused(script(path), "--obs-keys robot0_eef_pos, robot0_eef_quat", "not in /data/demo_0", "eef, object, unused")
    refused(script(path, "--obs-keys eef,unused"), "episode 0 holds values that are not finite")
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/eef"]
    refused(script(path, "--obs-keys eef,object"), "--obs-keys eef: not in /data/demo_1")
    path = write_robomimic(tmp_path / "unequal.hdf5", [(episodes[0][0], episodes[0][1][:8])])
    refused(script(path, "--obs-keys eef,object"), "episode 0 has observations (9, 3) and actions (8, 2)")
    path = write_robomimic(tmp_path / "dims.hdf5", [episodes[0], (episodes[1][0], episodes[1][1][:, :1])])
    refused(script(path, "--obs-keys eef,object"), "episode 1 has (3, 1)", "(3, 2)")
    for name, build in (
        ("none", lambda f: f.create_group("data")),
        ("array", lambda f: f.create_dataset("data", data=[1])),
    ):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            build(file)
        refused(script(tmp_path / f"{name}.hdf5"), "--")


def test_minari_that_cannot_be_loaded(script, monkeypatch, tmp_path):
    minari = pytest.importorskip("minari")

    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(minari, "load_dataset", no_network)
    refused(script("minari:mujoco/hopper/medium-v0"), "--data minari:mujoco/hopper/medium-v0", "not known", "network")

    class Pictures:
        observation_space, action_space = gym.spaces.Dict({}), gym.spaces.Box(-1, 1, (2,))

    monkeypatch.setattr(minari, "load_dataset", lambda *args, **kwargs: Pictures())
    refused(script("minari:a/b-v0"), "Dict")
    monkeypatch.setitem(sys.modules, "minari", None)
    refused(script("minari:mujoco/hopper/medium-v0"), "pip install 'minari[hdf5]'")
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.hdf5").write_bytes(b"")
    refused(script(tmp_path / "a.hdf5"), "pip install h5py")


@pytest.mark.parametrize("env_id, same", [
    ("AdroitHandDoor-v1", True), ("gymnasium_robotics:AdroitHandDoor-v2", True), ("", True), ("Hopper-v5", False),
])  # fmt: skip
def test_minari_data_of_another_environment_is_noticed(env_id, same, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path = write_minari([(np.zeros((5, 39)), np.zeros((5, 28)))], env=gym.make("gymnasium_robotics:AdroitHandDoor-v1"))
    assert len(pb.read_minari(path, env_id)) == 1
    assert ("was recorded in AdroitHandDoor-v1, not in Hopper-v5" in capsys.readouterr().err) is not same


@pytest.mark.parametrize("env_id", ["Hopper-v4", "gymnasium_robotics:AdroitHandDoor-v1"])
def test_another_order_of_coordinates_is_noticed(env_id, capsys):
    """The environment's own roll-outs pass; with their coordinates turned round they are reported, not refused."""
    env = gym.make(env_id)
    env.action_space.seed(0)
    obs, actions = [env.reset(seed=100)[0]], []
    for i in range(400):
        actions.append(env.action_space.sample())
        obs.append(env.step(actions[-1])[0] if i % 20 else env.reset()[0])
    stats = pb.statistics([(np.array(obs[:-1]), np.array(actions))])
    pb.check_env(env_id, stats)
    assert "warning" not in capsys.readouterr().err  # the package prints a note of its own at import
    turned = stats | {key: stats[key][::-1].copy() for key in ("obs_min", "obs_max")}
    pb.check_env(env_id, turned)
    assert f"warning: --env-id {env_id}: its episodes begin where the data never is" in capsys.readouterr().err


def test_episodes_shorter_than_a_chunk(npz, script):
    refused(script(npz(3, 2, 3)), "--chunk 4", "3 steps")
    assert script(npz(3, 2, 3), "--chunk 3")[0] == 0


def test_environment_is_checked_before_training(hopper, npz, script, monkeypatch):
    code, _, _, output = script(hopper, "--env-id gymnasium:Hopper-v4")
    assert code == 0
    output.unlink()
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: pytest.fail("training has begun"))
    for data, env_id, *words in (
        (hopper, "Hoper-v4", "unknown", "did you mean Hopper-v4"),
        (hopper, "nowhere:Hopper-v4", "nowhere"),
        (hopper, "Walker2d-v4", "(17,)", "(6,)", "(11,)", "(3,)"),
        (hopper, "CartPole-v1", "(4,)"),
        (npz(), "Hopper-v4", "(3,) and (2,)"),
    ):
        refused(script(data, f"--env-id {env_id}"), f"--env-id {env_id}", *words)


@pytest.mark.parametrize(
    "flags",
    ["--chunk 0", "--iterations 0", "--batch-size -1", "--hidden-size 0", "--num-layers 4", "--num-layers -1",
     "--time-dim 2", "--time-dim 7", "--sample-steps 21", "--sample-steps 0", "--train-steps 0",
     "--log-every 0", "--eval-episodes 0", "--lr 0", "--lr nan", "--lr inf", "--weight-decay -1", "--ema-decay 1",
     "--ema-decay nan", "--held-out 1", "--held-out -0.1", "--seed -1", "--num-threads 0",
     "--device gpu", "--device cuda:99"],
)  # fmt: skip
def test_flags_out_of_range(npz, script, flags):
    refused(script(npz(), flags), flags.split()[0], flags.split()[1])


@pytest.mark.parametrize(
    "flags", ["--kind gan", "--activation gelu", "--chunk four", "--iterations 1e5", "--no-such-flag"]
)
def test_flags_tyro_refuses(npz, script, flags):
    code, _, error, output = script(npz(), flags)
    assert code == 2 and flags.split()[0] in error and "Traceback" not in error and not output.exists()


def test_output_that_cannot_be_written(npz, script, tmp_path):
    for output in (tmp_path, tmp_path / "none" / "x.pt", npz()):
        refused(script(npz(), f"--output {output}")[:3] + (tmp_path / "decoder.pt",), f"--output {output}")
    assert npz().read_bytes()[:2] == b"PK"


def test_a_disk_that_fills_up_leaves_the_old_file(npz, script, monkeypatch):
    code, _, _, output = script(npz())
    before = output.read_bytes()

    def full(obj, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    code, _, error, _ = script(npz())
    assert code == 2 and error.count("\n") == 1 and f"--output {output}" in error
    assert output.read_bytes() == before and not Path(f"{output}.tmp").exists()


def test_a_loss_that_explodes_stops(npz, script):
    refused(script(npz(), "--lr 1e30 --iterations 200"), "--lr 1e+30", "smaller")


def test_interrupt_says_so(npz, tmp_path):
    command = [sys.executable, SCRIPT, "--data", npz(), "--output", "x.pt", "--hidden-size", "8", "--no-progress"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(command, **pipes, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "parameters" in run.stdout.readline()
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 130 and error == "stopped; nothing was written\n" and not (tmp_path / "x.pt").exists()


# --- what is said about it ---


def test_help_and_commands(capsys, monkeypatch):
    page = (ROOT / "docs" / "pretrain_backbone.md").read_text()
    commands = re.findall(r"^ *python pretrain_backbone\.py (.+)$", page.replace("\\\n", " ") + pb.__doc__, re.M)
    assert len(commands) >= 6
    for command in commands:
        pb.check_args(tyro.cli(pb.Args, args=shlex.split(command)))
    with pytest.raises(SystemExit) as stop:
        tyro.cli(pb.Args, args=["--help"], description=pb.__doc__)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in pb.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    for flag in re.findall(r"`(--[a-z-]+)", page):
        assert flag.replace("--no-", "--") in text or flag in text + "--backbone --normalization", flag


def test_cards_table(hopper, npz, script, tmp_path):
    (tmp_path / "backbones").mkdir()
    for name, arguments in (("a", (hopper, "--env-id Hopper-v4 --held-out 0.2")), ("b", (npz(), "--kind flow"))):
        code, _, _, output = script(*arguments)
        output.rename(tmp_path / "backbones" / f"{name}.pt")
    command = [sys.executable, ROOT / "benchmark" / "cards.py", tmp_path / "backbones"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == 4 and {len(row) for row in rows} == {len(rows[0])}, done.stderr
    card = load(tmp_path / "backbones" / "a.pt")["card"]
    a, b = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert (a["file"], a["kind"], a["width"], a["data"]) == ("a.pt", "diffusion", "3 x 8", "hopper_random.npz")
    assert (
        a["frozen return"] == f"{card['frozen_return']:.0f} +- {card['frozen_return_std']:.0f}" and a["episodes"] == "2"
    )
    assert a["held-out loss"] == f"{card['held_out_loss']:.4f}" and a["size"].endswith("MiB")
    assert (b["file"], b["kind"], b["frozen return"], b["episodes"]) == ("b.pt", "flow", "", "")
    done = subprocess.run(command[:-1] + [tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


# --- D3IL's Avoiding demonstrations ---
def d3il_folder(folder, lengths=(9, 12, 7)):
    """Files as D3IL stores them, in the protocols that are about; the desired xy of each."""
    folder.mkdir()
    rng, desired = np.random.default_rng(0), []
    for i, n in enumerate(lengths):
        robot = {key: rng.standard_normal((n, 3)) for key in ("des_c_pos", "c_pos", "j_pos")}
        (folder / f"env_{i:03}.pkl").write_bytes(pickle.dumps({"robot": robot}, protocol=(2, 4, 5)[i % 3]))
        desired.append(robot)
    return folder, desired


def test_a_d3il_folder_pairs_positions_with_the_next_move(tmp_path):
    folder, robots = d3il_folder(tmp_path / "d3il")
    for (obs, actions), robot in zip(pb.read_d3il(str(folder)), robots, strict=True):
        np.testing.assert_array_equal(obs[:, :2], robot["des_c_pos"][:-1, :2])
        np.testing.assert_array_equal(obs[:, 2:], robot["c_pos"][:-1, :2])
        np.testing.assert_allclose(obs[:-1, :2] + actions[:-1], obs[1:, :2], atol=1e-12)
        np.testing.assert_allclose(obs[-1, :2] + actions[-1], robot["des_c_pos"][-1, :2], atol=1e-12)


def test_a_d3il_folder_is_cloned(script, tmp_path):
    code, _, error, output = script(d3il_folder(tmp_path / "d3il")[0])
    assert code == 0, error
    config = torch.load(output, weights_only=True)["config"]
    assert (config["obs_dim"], config["action_dim"]) == (4, 2)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_a_d3il_pickle_asks_for_is_not_run(script, tmp_path, protocol):
    folder, _ = d3il_folder(tmp_path / "d3il")
    (folder / "env_999.pkl").write_bytes(pickle.dumps({"robot": Evil(tmp_path / "proof")}, protocol=protocol))
    refused(script(folder), f"--data {folder}: cannot be read")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("robot", [{}, {"des_c_pos": np.zeros((5, 3))}, {"des_c_pos": 1, "c_pos": 2}])
def test_a_d3il_pickle_without_the_arrays(script, tmp_path, robot):
    folder, _ = d3il_folder(tmp_path / "d3il")
    (folder / "env_999.pkl").write_bytes(pickle.dumps({"robot": robot}))
    refused(script(folder), f"--data {folder}: cannot be read")
