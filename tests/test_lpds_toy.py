"""The two worlds by hand and against an ODE solver, their demonstrators and decoders, and runs that
learn; what lpds_toy.py shares with lpds_continuous.py is tested there."""

import itertools
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, call, finish, load, metrics, refused
from gymnasium.utils.env_checker import check_env
from scipy.integrate import solve_ivp

sys.path += [str(ROOT / "backbones"), str(ROOT / "benchmark")]
import avoiding_demonstrator  # noqa: E402
import multigoal_demonstrator  # noqa: E402

import lpds_toy as toy  # noqa: E402

ROUTES = list(itertools.product(range(2), range(3), range(4)))


@pytest.mark.parametrize("name", ["MultiGoal-v0", "Avoiding-v0"])
def test_gymnasium_accepts_the_worlds(name):
    check_env(gym.make(name).unwrapped, skip_render_check=True)


# --- MultiGoal ---
def test_multigoal_by_hand():
    env = gym.make("MultiGoal-v0")
    obs, _ = env.reset(seed=3)
    assert obs.tolist() == [0, 0]  # exactly the origin
    # The reward is that of the state in which the action is taken
    steps = [((1, 1), (0.5, 0.5), -(2**0.5)), ((1, -1), (1, 0), -(0.5**0.5))]
    steps += [((0, 1), (1, 0.5), -1), ((0, 1), (1, 1), -0.5)]
    steps += [((0.2, 0), (1.1, 1), 10), ((1, 1), (1.6, 1.5), 9.9)]
    for action, position, expected in steps:
        obs, reward, terminated, truncated, info = env.step(np.array(action, np.float32))
        assert obs == pytest.approx(position) and reward == pytest.approx(expected)
        assert not terminated and not truncated
    for _ in range(14):
        assert not truncated
        obs, _, _, truncated, info = env.step(np.ones(2, np.float32))
    assert truncated and obs.tolist() == [2, 2]  # after 20 steps, and no further than the wall
    assert info["mode"] == 1 and info["success"] and info["path"].shape == (21, 2)
    assert info["path"][[0, 1, -1]].tolist() == [[0, 0], [0.5, 0.5], [2, 2]]


def test_the_first_goal_counts_and_none_is_no_mode():
    env = gym.make("MultiGoal-v0")
    for steps, mode in (([(-1, 1)] * 2 + [(1, 0)] * 18, 2), ([(1, 0)] * 20, -1)):
        env.reset()
        for action in steps:
            *_, info = env.step(np.array(action, np.float32))
        assert info["mode"] == mode and info["success"] == (mode >= 0)


def test_the_expert_heads_for_the_nearest_goal():
    obs, actions = multigoal_demonstrator.demonstrate(4000, 0.0, np.random.default_rng(0))
    assert np.abs(obs).max() <= 2 and np.histogram(obs[:, 0], 4)[0].min() > 800
    quadrant = np.sign(obs)
    np.testing.assert_allclose(actions, np.clip(quadrant - obs, -1, 1))
    noisy = multigoal_demonstrator.demonstrate(4000, 0.1, np.random.default_rng(0))[1]
    inside = np.abs(actions).max(1) < 0.7
    assert (noisy - actions)[inside].std() == pytest.approx(0.1, rel=0.05)


# --- Avoiding ---
@pytest.fixture
def avoiding():
    return toy.Avoiding()


def place(env, x, y):  # the rod, at rest
    env.data.qpos = env.polar([x, y])
    env.data.qvel = 0
    toy.mujoco.mj_forward(env.model, env.data)
    return env.data.ncon


POSTS = [(0.5, -0.1, 0.03), (0.425, 0.08, 0.025), (0.575, 0.08, 0.025)]
POSTS += [(0.35, 0.26, 0.025), (0.5, 0.26, 0.025), (0.65, 0.26, 0.025)]


def test_posts_are_touched_at_the_sum_of_the_radii_and_nowhere_else(avoiding):
    avoiding.reset()
    for x, y, radius in POSTS:
        for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False):
            direction = np.array([np.cos(angle), np.sin(angle)])
            assert place(avoiding, *(np.array([x, y]) + (radius + 0.0098) * direction)) > 0
            assert place(avoiding, *(np.array([x, y]) + (radius + 0.0102) * direction)) == 0


def test_the_start_and_the_lag_of_the_observation(avoiding):
    obs, _ = avoiding.reset()
    assert obs == pytest.approx([0.52492847, -0.27973673] * 2, abs=1e-9)
    start, action = obs[:2], np.array([0.002, 0.01])
    for i in range(10):
        obs, _, _, _, info = avoiding.step(action)
        assert obs[:2] == pytest.approx(start + (i + 1) * action)
        assert obs[2:] == pytest.approx(info["path"][i])  # where it was when the action was issued
    assert (np.diff(info["path"][:11, 1]) >= 0).all() and info["path"][10, 1] > -0.25


def test_free_motion_is_that_of_the_equations(avoiding):
    """Lagrange's of a mass of 1 kg on a turning arm, with PD control of a low-passed target."""
    tau, kp = np.array([0.027, 0.0813]), np.array([22.509, 1068.37])
    kd, f = np.array([1.8696, 62.834]), np.array([1.3105, 2.3215])

    def slope(t, state, target):
        q, v, g = state[:2], state[2:4], state[4:]
        g_slope = (target - g) / tau
        torque, force = kp * (g - q) + kd * (f * g_slope - v)
        turn = (torque - 2 * q[1] * v[0] * v[1]) / (0.1831 + 1e-6 + 1e-5 + q[1] ** 2)
        return [*v, turn, force + q[1] * v[0] ** 2, *g_slope]

    def polar(xy):
        return np.array([np.arctan2(xy[1], xy[0]), np.hypot(*xy)])

    avoiding.reset()
    desired, rng = avoiding.START.copy(), np.random.default_rng(0)
    state = np.array([*polar(desired), 0, 0, *polar(desired)])
    for i in range(14):  # up to the first post, to the right of it
        action = np.array([0.008, 0.01]) + 0.002 * rng.standard_normal(2)
        desired = desired + action
        solved = solve_ivp(slope, (0, 0.035), state, args=(polar(desired),), rtol=1e-8, atol=1e-10)
        state = solved.y[:, -1]
        *_, info = avoiding.step(action)
        expected = state[1] * np.array([np.cos(state[0]), np.sin(state[0])])
        found = info["path"][i + 1]
        assert np.linalg.norm(found - expected) < 1e-3  # Euler's steps of a millisecond
    assert np.linalg.norm(found - avoiding.START) > 0.1 and avoiding.data.ncon == 0


def test_the_arm_cannot_reach_further_than_it_is_long(avoiding):
    avoiding.reset()
    for _ in range(60):
        obs, _, _, _, info = avoiding.step(np.array([0.0125, 0]))
    assert obs[0] > 1.2 and np.hypot(*info["path"][60]) == pytest.approx(0.8114, abs=1e-3)


def drive(points):
    """Moves the desired point of a new world through `points`, until that ends the episode."""
    env = gym.make("Avoiding-v0")
    obs, _ = env.reset()
    steps = []
    for point in points:
        while (gap := np.array(point) - obs[:2]).any():
            action = gap * min(1, 0.0125 / np.abs(gap).max())
            obs, reward, terminated, truncated, info = env.step(action)
            steps.append((reward, terminated, truncated))
            if terminated or truncated:
                return steps, info
    return steps, info


def test_an_episode_ends_behind_the_line_at_a_touch_or_after_150_steps():
    right = [(0.6, -0.2), (0.6, 0.0), (0.5, 0.04), (0.5, 0.12), (0.57, 0.2), (0.57, 0.48)]
    steps, info = drive(right)
    y = info["path"][:, 1]
    assert steps[-1] == (1.0, True, False) and set(steps[:-1]) == {(0.0, False, False)}
    assert y[len(steps)] > 0.35 >= y[len(steps) - 1] and (y[len(steps) :] == y[-1]).all()
    assert info["success"] and info["mode"] == 1 * 12 + 1 * 4 + 2

    steps, info = drive([(0.5, 0.0)])  # straight into the first post
    assert steps[-1] == (0.0, True, False) and not info["success"] and info["mode"] == -1

    steps, info = drive([(0.3, -0.28), (0.7, -0.28)] * 9)  # along the start
    assert len(steps) == 150 and steps[-1] == (0.0, False, True)
    assert not info["success"] and info["path"].shape == (151, 2)


def test_demonstrations_take_every_route_and_are_like_the_human_ones():
    rng, lengths = np.random.default_rng(0), []
    for i, route in enumerate(ROUTES):
        obs, actions = avoiding_demonstrator.demonstrate(route, rng)
        lengths.append(len(actions))
        np.testing.assert_allclose(np.diff(obs[:, :2], axis=0), actions[:-1], atol=1e-12)
        assert (actions[:, 1] >= 0).all() and np.abs(actions).max() < 0.0154

        env = toy.Avoiding()  # what was demonstrated is what happens
        env.reset()
        for action in actions:
            _, _, terminated, _, info = env.step(action)
            if terminated:
                break
        assert info["success"] and info["mode"] == i
    assert 70 < np.mean(lengths) < 84  # 77 +- 12


# --- decoders ---
def play(env_id: str, episodes: int) -> dict:
    name = toy.DEFAULTS[env_id]["backbone"]
    file = torch.load(ROOT / "backbones" / name, weights_only=True)
    envs = gym.vector.SyncVectorEnv(
        [lambda: toy.make_env(f"{env_id}-v0", file)] * episodes,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    result = toy.evaluate(toy.Decoder(file), envs, "cpu")
    return {key: np.array(value) for key, value in result.items()}


def test_the_frozen_policy_reaches_the_four_goals_about_equally():
    result = play("MultiGoal", 1000)
    assert (np.bincount(result["mode"].astype(int)) > 190).sum() == 4
    assert result["success"].all() and 153 < result["return"].mean() < 160
    assert (result["length"] == 20).all() and result["path"].shape == (100, 21, 2)
    goals = toy.MultiGoal.GOALS[result["mode"][:100].astype(int)]
    assert np.abs(result["path"][:, -1] - goals).max() < 0.5  # where they went, they stayed


def test_half_of_the_frozen_policy_gets_through_on_many_routes():
    result = play("Avoiding", 150)
    assert 0.35 < result["success"].mean() < 0.65
    np.testing.assert_array_equal(result["success"], result["mode"] >= 0)
    np.testing.assert_array_equal(result["success"], result["return"])
    assert len(np.unique(result["mode"])) > 14


# --- runs ---
@pytest.mark.slow
def test_a_larger_budget_returns_more_on_fewer_goals_and_both_are_kept(tmp_path):
    """Half of a usual run: alpha starts where it would only come to."""
    flags = ["--total-timesteps", 5_000, "--eval-every", 500, "--eval-episodes", 200]
    flags += ["--alpha-init", 0.1]
    last = {}
    for delta in (0.1, 1.0):
        run = finish(tmp_path / str(delta), "lpds_toy.py", "--delta", delta, *flags)
        rows = [{key: float(x or "nan") for key, x in row.items()} for row in metrics(run)]
        spent = [row["trust_region/replay_sq_norm"] / delta for row in rows[-3:]]
        assert 0.75 < np.mean(spent) < 1.25, spent
        last[delta] = rows[-1]
        assert (run / "paths.png").stat().st_size > 20_000
        with np.load(run / "eval.npz") as file:
            assert file["mode"].shape == file["return"].shape == (11, 200)
            assert file["path"].shape == (2, 100, 21, 2)
            assert (file["mode"][0] != file["mode"][-1]).any()
    frozen = last[1.0]["eval/frozen_return"]
    returns = [frozen, last[0.1]["eval/episodic_return"], last[1.0]["eval/episodic_return"]]
    assert returns[0] + 0.5 < returns[1] < returns[2] - 2, returns
    assert last[0.1]["eval/modes"] == 4
    assert 0.4 < last[0.1]["eval/mode_max"] < 0.8 < last[1.0]["eval/mode_max"]


SPEC = """
title: a small sweep
flags: --total-timesteps 600 --prior-steps 200 --warmup-steps 100 --eval-every 300
       --eval-episodes 20 --hidden-size 16
envs: [MultiGoal]
seeds: [1, 2]
arms:
  LP-DS: {script: lpds_toy.py, grid: {delta: [0.1]}}
  DSRL: {script: baselines/dsrl_toy.py}
"""


@pytest.mark.slow
def test_a_sweep_is_drawn_from_what_is_committed_of_it(tmp_path, monkeypatch):
    bench, plot_toy = load("benchmark/run.py"), load("benchmark/plot_toy.py")
    (tmp_path / "small.yaml").write_text(SPEC)
    monkeypatch.chdir(ROOT)
    runs = bench.load_spec(str(tmp_path / "small.yaml"), tmp_path / "runs")
    assert len(runs) == 4
    for run in runs:
        _, script, *flags = bench.plan(run)
        code, _, error = call(run.home, script, *flags)
        assert code == 0, error
    bench.collect(runs, tmp_path)
    plot_toy.main((str(tmp_path / "small.yaml"),), tmp_path, tmp_path)
    rows = (tmp_path / "small_modes.md").read_text().splitlines()[-3:]
    assert [row.split(" | ")[0] for row in rows] == ["| frozen", "| LP-DS delta=0.1", "| DSRL"]
    assert rows[1].count(",") == 9 and "nan" not in "".join(rows)
    for name in ("small_paths.png", "small_modes.png"):
        assert (tmp_path / name).stat().st_size > 20_000


def test_the_specs_name_what_there_is():
    bench = load("benchmark/run.py")
    for name, runs in (("toy/multigoal", 21), ("toy/avoiding", 12)):
        assert len(bench.load_spec(name, ROOT)) == runs


def test_a_decoder_of_the_other_world_is_refused(tmp_path):
    flags = ["--env-id", "Avoiding", "--backbone", "multigoal-flow.pt"]
    refused(call(tmp_path, "lpds_toy.py", *flags), "--backbone", "2 observations", "Avoiding")
