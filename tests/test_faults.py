"""What goes wrong outside of the scripts: wrong flags and files, environments that give NaN,
weights that diverge. One sentence each, and nothing spoiled that is already on disk."""

import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import pytest
import torch
from conftest import SIZES, call, checkpoint, decoder_file, finish, load, metrics, only_run, refused
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from test_resume import OFTEN, RUNS, TINY

SCRIPT = "lpds_continuous.py"
SMALL = [*TINY, *OFTEN, "--total-timesteps", "700"]


@pytest.fixture
def hopper(tiny_backbone):
    return ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), *SMALL]


def finite(state) -> bool:
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, dict | list | tuple):
        return all(map(finite, state.values() if isinstance(state, dict) else state))
    return not isinstance(state, float) or math.isfinite(state)


# --- flags ---

BAD_FLAGS = [
    ("--env-id Pendulum-v1", ["--env-id Pendulum-v1", "pretrain_backbone.py", "--backbone"]),
    ("--env-id Hoper-v4", ["--env-id Hoper-v4", "pretrain_backbone.py", "--backbone"]),
    ("--env-id Walker2d-v4 --backbone tiny", ["--backbone", "11 observations", "Walker2d-v4"]),
    ("--env-id CartPole-v1 --backbone tiny", ["--backbone", "11 observations", "CartPole-v1"]),
    ("--backbone nowhere.pt", ["--backbone", "nowhere.pt", "no decoder", "pretrain_backbone.py"]),
    ("--delta -0.1", ["--delta -0.1", "above 0"]),
    ("--delta nan", ["--delta nan"]),
    ("--lr 0", ["--lr 0.0"]),
    ("--gamma 1", ["--gamma 1.0", "below 1"]),
    ("--tau 2", ["--tau 2.0", "below 1"]),
    ("--noise-bound 0", ["--noise-bound 0.0"]),
    ("--reward-scale 0", ["--reward-scale 0.0"]),
    ("--num-envs 0", ["--num-envs 0"]),
    ("--total-timesteps 300", ["--total-timesteps 300", "316"]),
    ("--num-envs 16 --eval-every 60", ["--eval-every 60", "--num-envs", "128"]),
    ("--num-envs 1000 --eval-every 8000", ["--total-timesteps 700", "8300"]),
    ("--resume nowhere", ["--resume nowhere", "checkpoint.pt"]),
]


@pytest.mark.parametrize("flags, parts", BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_a_wrong_flag_gets_one_sentence_before_anything_is_written(
    flags, parts, tiny_backbone, tmp_path
):
    shutil.copy(tiny_backbone(), tmp_path / "tiny")
    more = [] if "--env-id" in flags else ["--env-id", "Hopper-v4", "--backbone", "tiny"]
    refused(call(tmp_path, SCRIPT, *more, *SMALL, *flags.split()), *parts)
    assert not (tmp_path / "runs").exists()


def test_what_is_no_flag_at_all_ends_likewise(tmp_path):
    for flags in (["--dual", "cubic"], ["--delta", "big"], ["--no-such-flag"]):
        code, out, err = call(tmp_path, SCRIPT, *flags)
        assert code == 2 and flags[-1] in out + err and "Traceback" not in out + err


# --- decoder files ---


def of_format_1(path):
    file = decoder_file(*SIZES["Hopper"])
    config = dict(kind=file["kind"], obs_dim=11, action_dim=3, chunk=4)
    torch.save({"format": 1, "config": config, "model": file["model"]}, path)


def of_dppo(path):
    weights = {"network.mlp_mean.layers.0.weight": torch.zeros(3)}
    torch.save({"epoch": 3, "model": weights, "ema": weights}, path)


@pytest.mark.parametrize("write", [of_format_1, of_dppo])
def test_a_decoder_of_another_format_is_refused_with_the_converter(write, tmp_path):
    write(tmp_path / "other.pt")
    result = call(tmp_path, SCRIPT, "--env-id", "Hopper-v4", "--backbone", "other.pt", *SMALL)
    refused(result, "--backbone other.pt", "format 2", "convert_dppo.py")


def test_a_file_that_is_no_decoder_at_all_is_refused(tmp_path):
    (tmp_path / "notes.pt").write_text("weights")
    result = call(tmp_path, SCRIPT, "--env-id", "Hopper-v4", "--backbone", "notes.pt", *SMALL)
    refused(result, "--backbone notes.pt", "no decoder")


def test_no_code_in_a_file_is_run(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"cposix\nsystem\n(S'touch was_run'\ntR.")
    code, _, _ = call(tmp_path, SCRIPT, "--env-id", "Hopper-v4", "--backbone", "bad.pt", *SMALL)
    assert code and not (tmp_path / "was_run").exists()


# --- resume ---


def test_a_resumed_run_keeps_its_settings_and_its_script(hopper, tmp_path):
    run = finish(tmp_path, SCRIPT, *hopper)
    before = (run / "metrics.csv").read_bytes()
    for flags in (["--delta", 0.1], ["--seed", 7], ["--env-id", "Hopper-v5"], ["--no-lagrangian"]):
        named = [f"{flags[0]} {flags[1]}"] if flags[1:] else ["--lagrangian False"]
        refused(call(tmp_path, SCRIPT, "--resume", run, *flags), *named, "keeps its settings")
    refused(call(tmp_path, "baselines/dsrl_continuous.py", "--resume", run), "another script")
    assert (run / "metrics.csv").read_bytes() == before
    moved = shutil.move(run, tmp_path / "moved")  # a run folder holds all that it needs
    assert call(tmp_path, SCRIPT, "--resume", moved)[0] == 0


def register_hands() -> None:
    gym.register_envs(gymnasium_robotics)


def test_a_run_of_another_script_with_the_same_flags_is_refused(tiny_backbone, tmp_path):
    backbone = tiny_backbone("AdroitHandPen", "flow")
    flags = ["--env-id", "AdroitHandPen-v1", "--backbone", backbone, *TINY, *OFTEN]
    run = finish(tmp_path, "lpds_adroit_flow.py", *flags)
    before = {path: path.read_bytes() for path in run.iterdir()}
    result = call(tmp_path, SCRIPT, "--resume", run, before=register_hands)
    refused(result, "--resume", "lpds_adroit_flow.py")
    assert before == {path: path.read_bytes() for path in run.iterdir()}


# --- numbers that are not ---


def give_nan(key: str, first: int) -> None:
    """Four steps of Hopper in this process, any chunk of it, have NaN as reward or observation."""
    step, count = HopperEnv.step, itertools.count(1)

    def broken(self, action):
        obs, reward, *rest = step(self, action)
        if first <= next(count) < first + 4:
            reward = math.nan if key == "reward" else reward
            obs = np.full_like(obs, math.nan) if key == "obs" else obs
        return obs, reward, *rest

    HopperEnv.step = broken


def test_nan_from_an_environment_is_named_and_does_not_get_into_the_run(hopper, tmp_path):
    whole = finish(tmp_path / "whole", SCRIPT, *hopper)
    for key in ("reward", "obs"):
        folder = tmp_path / key
        result = call(folder, SCRIPT, *hopper, before=partial(give_nan, key, 500))
        refused(result, "Hopper-v4", "step ", "not finite")
        run = only_run(folder)
        assert finite(checkpoint(run)["replay"]) and len(checkpoint(run)["replay"]["reward"]) > 0
    assert call(folder, SCRIPT, "--resume", run)[0] == 0
    assert metrics(run) == metrics(whole)


def test_weights_that_diverge_are_not_saved(hopper, tmp_path):
    refused(call(tmp_path, SCRIPT, *hopper, "--lr", 1e30), "--lr", "not finite")
    state = checkpoint(only_run(tmp_path))
    assert finite(state["agent"]) and finite(state["replay"])


def test_rewards_that_are_all_zero_need_a_scale(hopper, tmp_path):
    result = call(tmp_path, SCRIPT, *hopper, before=no_reward)
    refused(result, "--reward-scale auto", "no reward")
    given = ["--reward-scale", 1, "--total-timesteps", 400]
    result = call(tmp_path / "given", SCRIPT, *hopper, *given, before=no_reward)
    assert result[0] == 0, result


def no_reward() -> None:
    step = HopperEnv.step

    def worthless(self, action):
        obs, _, *rest = step(self, action)
        return obs, 0.0, *rest

    HopperEnv.step = worthless


# --- every script ---


def note_seeds():
    """seeds.json: with which seeds the environments were reset, one list for each reset."""
    reset, seeds = gym.vector.SyncVectorEnv.reset, []

    def noting(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    gym.vector.SyncVectorEnv.reset = noting
    return lambda: Path("seeds.json").write_text(json.dumps(seeds))


SCRIPTS = {script: (env_id, decoder) for script, env_id, decoder, _ in RUNS}
FEW = ["lpds_continuous.py", "lpds_toy.py", "lpds_adroit_flow.py"]  # the others copy from these
SLOW = [pytest.param(script, marks=pytest.mark.slow) for script in FEW[1:]]


@pytest.mark.parametrize("script", [FEW[0], *SLOW])
def test_runs_of_any_seed_and_evaluations_never_start_alike(script, tiny_backbone, tmp_path):
    """All starts of training are different ones, all evaluations have the same starts."""
    env_id, decoder = SCRIPTS[script]
    flags = ["--env-id", env_id, "--backbone", tiny_backbone(*decoder), "--hidden-size", 16]
    flags += "--prior-steps 140 --warmup-steps 1 --total-timesteps 157 --num-envs 2".split()
    flags += "--eval-episodes 3 --eval-every 50".split()
    training, evaluations = [], []
    for seed in (0, 1, 2):
        finish(tmp_path / str(seed), script, *flags, "--seed", seed, before=note_seeds)
        seeds = json.loads((tmp_path / str(seed) / "seeds.json").read_text())
        evaluations += [s for s in seeds if len(s) == 3]
        training += [n for s in seeds if len(s) == 2 for n in s]
    assert len(evaluations) >= 9 and len(training) >= 12
    assert all(seeds == evaluations[0] for seeds in evaluations)
    different = {*training, *evaluations[0]}
    assert len(different) == len(training) + 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_and_refuses_in_one_sentence(script, tmp_path):
    load(script)  # skips what is not installed
    code, out, err = call(tmp_path, script, "--help")
    assert code == 0 and not err and f"python {script} " in out and "--resume" in out
    refused(call(tmp_path, script, "--gamma", -1), "--gamma -1.0", "above 0")
    strange = call(tmp_path, script, "--env-id", "Ant-v5")
    if "robomimic" in script:  # its tasks are a closed list, which tyro prints
        assert strange[0] == 2 and "'PickPlaceCan'" in strange[2]
    else:
        refused(strange, "--env-id Ant-v5", "--backbone")
    refused(call(tmp_path, script, "--resume", "nowhere"), "--resume nowhere", "checkpoint.pt")
