"""lpds_robomimic.py: robosuite's tasks as environments, its decoder, runs of both methods.

Functions that it shares with lpds_continuous.py (test_shared_code.py) are tested there.
"""

import ctypes
import os
import re
import runpy
import signal
import subprocess
import sys
from functools import partial

import dppo_reference as dppo
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    call,
    checkpoint,
    decoder_file,
    finish,
    load,
    metrics,
    only_run,
)

robosuite = pytest.importorskip("robosuite")
import lpds_robomimic as robomimic  # noqa: E402
from pretrain_backbone import Backbone  # noqa: E402
from pretrain_backbone import play as play_frozen  # noqa: E402

SIZES = {"Lift": 19, "PickPlaceCan": 23, "NutAssemblySquare": 23}
SCRIPTS = ["lpds_robomimic.py", "baselines/dsrl_robomimic.py"]
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (25, 7))
ACTIONS[5:, 6] = 1  # the gripper closes


@pytest.fixture(scope="module", params=SIZES)
def two(request):
    """A task, and two environments of it in one process."""
    return request.param, gym.make(request.param), gym.make(request.param)


def play(env, **options):
    """An episode's first observations, (26, obs_dim)."""
    obs, _ = env.reset(**options)
    return np.array([obs, *(env.step(action)[0] for action in ACTIONS)])


def solve(env):
    """Sets the state of the simulator so that the task is done."""
    sim = env.robosuite.sim
    hand = sim.data.site_xpos[env.robosuite.robots[0].eef_site_id].copy()
    if env.spec.id == "Lift":
        joint, place = "cube_joint0", [hand[0], hand[1], 0.95]
    elif env.spec.id == "PickPlaceCan":
        joint, place = "Can_joint0", env.robosuite.target_bin_placements[3] + [0, -0.05, 0.05]
    else:
        joint, place = (
            "SquareNut_joint0",
            env.robosuite.sim.data.body_xpos[env.robosuite.peg1_body_id] + [0, 0, 0.02],
        )
    sim.data.set_joint_qpos(joint, [*place, 1, 0, 0, 0])
    sim.forward()


# --- the environment ---


def test_observations_are_robosuites_own_in_the_order_of_robomimic(two):
    task, env, _ = two
    obs, _ = env.reset(seed=1)
    for action in ACTIONS[:3]:
        obs, *_ = env.step(action)
    inner = env.unwrapped.robosuite
    named = inner._get_observations(force_update=True)
    start = 0
    sizes = [3, 4, 2, SIZES[task] - 9]
    keys = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state"]
    for key, size in zip(keys, sizes):
        np.testing.assert_array_equal(obs[start : start + size], named[key])
        start += size
    assert obs.shape == env.observation_space.shape == (start,) and obs.dtype == np.float64
    hand = inner.sim.data.site_xpos[inner.robots[0].eef_site_id]
    np.testing.assert_allclose(obs[:3], hand, atol=1e-9)
    name = {"Lift": "cube_main", "PickPlaceCan": "Can_main", "NutAssemblySquare": "SquareNut_main"}
    place = inner.sim.data.get_body_xpos(name[task])  # where robosuite 1.5 has another order
    np.testing.assert_allclose(obs[9:12], place, atol=1e-9)
    assert env.action_space.shape == inner.action_spec[0].shape == (7,)
    assert inner.control_freq == env.metadata["render_fps"] == 20


def test_the_robot_is_moved_by_the_pose_of_its_hand(two):
    _, env, _ = two
    controller = env.unwrapped.robosuite.robots[0].controller
    env.reset(seed=1)
    before = env.unwrapped.robosuite._get_observations()["robot0_eef_pos"]
    for _ in range(5):
        obs, *_ = env.step(np.array([0, 0, 1.0, 0, 0, 0, -1]))
    assert controller.name == "OSC_POSE" and controller.output_max[0] == 0.05
    assert obs[2] - before[2] > 0.04 and np.abs(obs[:2] - before[:2]).max() < 0.02


def test_a_reset_depends_on_the_seed_alone(two):
    _, one, other = two
    first = play(one, seed=3)
    second = play(one)
    play(other, seed=8)
    np.random.seed(5)  # noqa: NPY002
    np.testing.assert_array_equal(play(other, seed=3), first)
    one.reset(seed=4)
    np.testing.assert_array_equal(play(other), second)
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_environments_that_take_turns_do_not_disturb_each_other(two):
    _, one, other = two
    alone = play(one, seed=3), play(other, seed=8)
    found = [one.reset(seed=3)[0]], [other.reset(seed=8)[0]]
    for action in ACTIONS:
        found[0].append(one.step(action)[0])
        found[1].append(other.step(action)[0])
    np.testing.assert_array_equal(found, alone)


def test_numpys_global_generator_is_left_as_it_was():
    env = gym.make("PickPlaceCan")
    np.random.seed(1)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    env.reset(seed=2)
    env.step(ACTIONS[0])
    env.reset()
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002


def test_every_step_costs_one_until_success_ends_the_episode(two):
    task, env, _ = two
    env.reset(seed=0)
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    _, reward, terminated, truncated, info = env.step(still)
    assert (reward, terminated, truncated, info["success"]) == (-1, False, False, False)
    solve(env.unwrapped)
    _, reward, terminated, truncated, info = env.step(still)
    assert (reward, terminated, truncated, info["success"]) == (0, True, False, True)
    _, _ = env.reset(seed=0)
    assert not env.step(still)[2]


@pytest.mark.parametrize("task, horizon", list(zip(SIZES, (300, 300, 400))))
def test_the_horizon_is_a_time_limit(task, horizon):
    assert gym.spec(task).max_episode_steps == horizon
    if task == "Lift":
        env = gym.make(task, max_episode_steps=3)
        env.reset(seed=0)
        ends = [env.step(ACTIONS[0])[1:4] for _ in range(3)]
        assert ends == [(-1, False, False), (-1, False, False), (-1, False, True)]


def test_evaluation_tells_success_from_the_time_limit(monkeypatch):
    file = decoder_file(19, 7)
    make = partial(robomimic.make_env, "Lift", file, max_episode_steps=10)
    envs = gym.vector.SyncVectorEnv([make] * 2, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    task = type(envs.envs[0].unwrapped)  # of whichever script has registered Lift last
    step = task.step

    def solved_once(self, action):
        if self.lucky and self.robosuite.timestep == 5:
            solve(self)
        return step(self, action)

    monkeypatch.setattr(task, "step", solved_once)
    for env, lucky in zip(envs.envs, (True, False)):
        env.unwrapped.lucky = lucky
    result = robomimic.evaluate(robomimic.Decoder(file), envs, "cpu")
    assert result == {"return": [-5, -10], "length": [6, 10], "success": [1, 0]}


def test_an_evaluation_depends_on_its_seed_alone():
    file = decoder_file(19, 7)
    env = robomimic.make_env("Lift", file, max_episode_steps=8)
    envs = gym.vector.SyncVectorEnv([lambda: env] * 2)  # as in the scripts, which play in turn
    decoder, seen = robomimic.Decoder(file), []

    def policy(obs, noise):
        seen.append(torch.cat([obs, noise], 1))
        return decoder(obs, noise)

    def found(seed):
        seen.clear()
        robomimic.evaluate(policy, envs, "cpu", seed)
        return torch.stack(seen).view(2, 2, -1)  # two episodes of two chunks

    state = torch.get_rng_state()
    first = found(0)
    assert torch.equal(torch.get_rng_state(), state)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    env.reset()
    torch.testing.assert_close(found(0), first, rtol=0, atol=0)
    assert (first[0] != first[1]).any(1).all() and (found(1) != first).any(2).all()


def test_a_film_can_be_drawn():
    try:
        env = gym.make("Lift", render_mode="rgb_array")
    except Exception as error:  # of any kind where there is no OpenGL
        pytest.skip(f"nothing can be drawn here: {error!r}")
    env.reset(seed=0)
    image = env.render()
    assert image.shape == (400, 400, 3) and image.dtype == np.uint8
    assert image[:200].std() > 5 and image[200:].std() > 5


# --- the decoder ---


def decodes_alike(file):
    backbone, decoder = Backbone(file), robomimic.Decoder(file)
    backbone.sample_by(file["solver"], len(file["time_emb"]))
    torch.manual_seed(0)
    obs, noise = torch.randn(9, file["obs_dim"]), torch.randn(9, decoder.dim)
    expected = backbone(obs, noise)
    torch.testing.assert_close(decoder(obs, noise), expected, rtol=0, atol=1e-5)
    assert expected.std(0).min() > 0


@pytest.mark.parametrize("cond_hidden", [[], [32, 8]])
def test_decoding_is_that_of_the_class_that_was_trained(cond_hidden):
    torch.manual_seed(1)
    file = {"kind": "diffusion", "obs_dim": 5, "action_dim": 2, "chunk": 3, "width": 16}
    file |= {"num_blocks": 2, "activation": "mish", "cond_hidden": cond_hidden}
    backbone = Backbone(file | {"training": {"train_steps": 20}})
    weights = backbone.state_dict()
    time_network = {k.removeprefix("time_network."): w for k, w in weights.items() if "time" in k}
    file |= backbone.sample_by("ddim", 8)
    file["training"] = {"train_steps": 20, "time_network": time_network}
    file["model"] = {name: w for name, w in weights.items() if "time" not in name}
    assert any(name.startswith("cond.2") for name in file["model"]) == bool(cond_hidden)
    decodes_alike(file)


CAN = dppo.HOPPER | dict(obs_dim=23, d=28)
SQUARE = dppo.SQUARE | dict(obs_dim=23, d=28)


@pytest.mark.parametrize("sizes, train", [(CAN, 20), (SQUARE, 20), (SQUARE, 100)])
def test_a_checkpoint_of_dppo_or_dsrl_decodes_as_it_did_there(sizes, train, tmp_path, monkeypatch):
    state = dppo.dppo_state(**sizes)
    torch.save({"epoch": 3000, "model": state, "ema": state}, tmp_path / "state_3000.pt")
    ranges = dict(obs_min=-np.ones(23), obs_max=np.ones(23))
    np.savez(tmp_path / "stats.npz", **ranges, action_min=-np.ones(7), action_max=np.ones(7))
    flags = f"--activation mish --train-steps {train} --sample-steps 8".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "state_3000.pt", "stats.npz", "new.pt", *flags])
    runpy.run_path(str(ROOT / "backbones" / "convert_dppo.py"), run_name="__main__")

    decoder = robomimic.Decoder(torch.load("new.pt", weights_only=True))
    torch.manual_seed(0)
    obs, noise = torch.randn(9, 23), torch.randn(9, 28)
    truth = dppo.decode(state, obs.numpy(), noise.numpy(), train, 8, dppo.mish)
    np.testing.assert_allclose(decoder(obs, noise), truth, atol=1e-5)
    assert truth.std() > 0.2


@pytest.mark.parametrize("task", SIZES)
def test_the_committed_decoder_is_dppos_network_and_leaves_room(task):
    path = ROOT / "backbones" / robomimic.DEFAULTS[task]["backbone"]
    file = torch.load(path, weights_only=True)
    decodes_alike(file)
    known = {key: file[key] for key in ("solver", "activation", "chunk", "obs_dim", "action_dim")}
    expected = {"solver": "ddim", "activation": "mish", "chunk": 4}
    assert known == expected | {"obs_dim": SIZES[task], "action_dim": 7}
    assert len(file["time_emb"]) == 8 and file["training"]["train_steps"] == 20
    assert 0.2 <= file["card"]["frozen_success"] <= 0.7 and file["card"]["eval_episodes"] == 200


@pytest.mark.slow
def test_a_committed_decoder_plays_as_its_card_says():
    file = torch.load(ROOT / "backbones" / "robomimic-lift-diffusion.pt", weights_only=True)
    decoder, n = Backbone(file), 10
    decoder.sample_by("ddim", 8)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.ClipAction(gym.make("Lift")))
    successes = sum(play_frozen(decoder, file, env, seed)[2] for seed in range(n))
    p = file["card"]["frozen_success"]
    assert abs(successes - n * p) < 3 * (n * p * (1 - p)) ** 0.5


# --- whole runs ---

TINY = (
    "--hidden-size 16 --batch-size 32 --utd 2 --distill-steps 2 --num-envs 1 --eval-episodes 1 "
    "--prior-steps 20 --warmup-steps 10 --eval-every 60 --log-every 30 --total-timesteps 120"
).split()


def short_episodes(steps=15):
    gym.make = partial(gym.make, max_episode_steps=steps)


def critics_expect_failure(run):  # they started there, a few steps of 3e-4 ago
    last = [w for name, w in checkpoint(run)["agent"].items() if re.fullmatch("q_.*9.bias", name)]
    assert len(last) == 6 and torch.cat(last).sub(-15).abs().max() < 0.05


def time_limits_are_no_ends(run):  # 15 steps are chunks of 4, 4, 4 and 3
    replay = checkpoint(run)["replay"]
    assert set(replay["reward"].tolist()) == {-4.0, -3.0} and not replay["terminated"].any()
    last = (replay["reward"] == -3).nonzero()[:-1, 0]
    starts = replay["obs"][last + 1]  # of the episodes that follow
    assert (replay["next_obs"][last] != starts).any(1).all()
    others = (replay["reward"][:-1] == -4).nonzero()[:, 0]
    same = (replay["next_obs"][others] == replay["obs"][others + 1]).all(1)
    assert same.float().mean() > 0.5  # but where an evaluation cut an episode


@pytest.mark.slow
def test_a_run_of_dsrl_that_is_resumed_is_the_run_that_was_not_interrupted(tiny_backbone, tmp_path):
    flags = ["--env-id", "Lift", "--backbone", tiny_backbone("Lift"), *TINY]
    go = partial(finish, before=short_episodes)
    whole = go(tmp_path / "whole", SCRIPTS[1], *flags)
    go(tmp_path / "parts", SCRIPTS[1], *flags, "--total-timesteps", 60)
    run = only_run(tmp_path / "parts")
    parts = go(tmp_path / "parts", SCRIPTS[1], "--resume", run, "--total-timesteps", 120)
    assert_same_run(whole, parts)
    critics_expect_failure(whole)
    time_limits_are_no_ends(whole)
    rows = metrics(whole)
    assert {row["eval/frozen_success"] for row in rows} <= {"", "0.0"}
    assert float(rows[-1]["charts/episodic_length"]) == 15


@pytest.mark.slow
@pytest.mark.parametrize("task", SIZES)
def test_a_task_runs_with_its_committed_decoder(task, tmp_path):
    flags = ["--env-id", task, *TINY, "--total-timesteps", 60]
    run = finish(tmp_path, SCRIPTS[0], *flags, before=short_episodes)
    critics_expect_failure(run)
    time_limits_are_no_ends(run)
    assert run.name.startswith(f"{task}__lpds_robomimic__1__")
    row = metrics(run)[-1]
    assert float(row["trust_region/sq_norm"]) > 0 and float(row["eval/success"]) in (0, 1)
    if task == "Lift":
        film = ["--episodes", 1, "--temperature", 1, "--video", "lift.mp4"]
        code, _, error = call(tmp_path, "enjoy.py", run, *film, before=short_episodes)
        if "nothing can be drawn here" in error:
            pytest.skip(error)
        frames = imageio.mimread(tmp_path / "lift.mp4")
        assert code == 0 and frames[0].shape == (400, 800, 3)
        assert len(frames) == 16  # the start and 15 steps, at 20 a second


def test_settings_are_those_of_table_2_and_of_dsrl():
    dsrl = load(SCRIPTS[1])
    for task, delta, gamma in zip(SIZES, (0.10, 0.35, 0.35), (0.99, 0.99, 0.999)):
        ours = robomimic.Args(**robomimic.DEFAULTS[task])
        theirs = dsrl.Args(**dsrl.DEFAULTS[task])
        assert (ours.delta, ours.gamma) == (delta, gamma)
        assert theirs.gamma == gamma and theirs.noise_bound == 1.5
        same = set(vars(ours)) & set(vars(theirs)) - {"exp_name", "noise_bound"}
        assert all(getattr(ours, name) == getattr(theirs, name) for name in same)


# --- robosuite itself ---


def start(code, *path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True)


REMEDY = ": pip install -r requirements/robomimic.txt; apt install libegl1 libgl1\n"


@pytest.mark.parametrize("code", ["import robosuit", "None.eglQueryString"])  # no OpenGL: as that
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_robosuite_or_opengl_it_says_what_to_install(script, code, tmp_path):
    (tmp_path / "robosuite.py").write_text(code)
    done = start([ROOT / script], tmp_path)
    assert done.returncode == 1 and done.stderr.endswith(REMEDY)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def signal_in_every_step():
    """SIGINT in a callback from C, where Python drops exceptions: numba's do likewise."""
    make = robosuite.make

    def disturbed(*args, **options):
        env = make(*args, **options)
        step, disturb = env.step, lambda: os.kill(os.getpid(), signal.SIGINT)
        env.step = lambda action: ctypes.CFUNCTYPE(None)(disturb)() or step(action)
        return env

    robosuite.make = disturbed


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_stops_the_run_wherever_it_comes(script, tmp_path):
    flags = "--total-timesteps 2000 --prior-steps 500 --warmup-steps 500 --eval-every 1000"
    flags = [*flags.split(), "--num-envs", 1, "--eval-episodes", 1]
    code, _, error = call(tmp_path, script, *flags, before=signal_in_every_step)
    assert code == 1 and error.startswith("stopped; go on with: python") and error.count("\n") == 1
    assert (only_run(tmp_path) / "checkpoint.pt").exists()


def test_a_task_that_does_not_exist_is_told_the_others():
    done = start([ROOT / "lpds_robomimic.py", "--env-id", "Can"])
    assert done.returncode == 2 and "'NutAssemblySquare'" in done.stderr


def test_robosuite_says_nothing_first():
    done = start(["-c", "import lpds_robomimic"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
