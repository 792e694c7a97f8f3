"""lpds_toy.py: its two worlds by hand and against an ODE solver, the demonstrator, its decoder, and real runs.

What it shares with lpds_continuous.py is the same text (test_shared_blocks.py) and tested there.
"""

import csv
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from scipy.integrate import solve_ivp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backbones"), str(ROOT / "benchmark")]
import avoiding_demonstrator as demonstrator  # noqa: E402

import lpds_toy as toy  # noqa: E402

ROUTES = list(itertools.product(range(2), range(3), range(4)))


@pytest.fixture
def avoiding():
    return gym.make("Avoiding-v0").unwrapped


# --- MultiGoal ---
@pytest.mark.parametrize("name", ["MultiGoal-v0", "Avoiding-v0"])
def test_gymnasium_accepts_the_environments(name):
    check_env(gym.make(name).unwrapped, skip_render_check=True)


def test_multigoal_by_hand():
    env = gym.make("MultiGoal-v0")
    obs, _ = env.reset(seed=3)
    assert obs.tolist() == [0, 0]  # exactly the origin
    # The reward is that of the state in which the action is taken, and actions are clipped
    expected = [((1, 1), (0.5, 0.5), -(2**0.5)), ((2, -9), (1, 0), -(0.5**0.5)), ((0, 1), (1, 0.5), -1)]
    expected += [((0, 1), (1, 1), -0.5), ((0.2, 0), (1.1, 1), 10), ((1, 1), (1.6, 1.5), 9.9)]
    for i, (action, position, reward) in enumerate(expected):
        obs, r, terminated, truncated, info = env.step(np.array(action, np.float32))
        assert obs == pytest.approx(position) and r == pytest.approx(reward) and not terminated and not truncated
        assert info["success"] == (i >= 3)
    for _ in range(14):
        assert not truncated
        obs, _, _, truncated, info = env.step(np.ones(2, np.float32))
    assert truncated and obs.tolist() == [2, 2]  # after 20 steps, and no further than the wall
    assert info["mode"] == 1 and info["path"].shape == (21, 2) and info["path"][-1].tolist() == [2, 2]


def test_the_first_goal_counts_and_none_is_no_mode():
    env = gym.make("MultiGoal-v0")
    for steps, mode in (([(-1, 1)] * 2 + [(1, 0)] * 18, 2), ([(1, 0)] * 20, -1)):
        env.reset()
        for action in steps:
            *_, info = env.step(np.array(action, np.float32))
        assert info["mode"] == mode and info["success"] == (mode >= 0)


def test_many_points_step_as_one_does():
    many, rng = gym.make_vec("MultiGoal-v0", 50, "vector_entry_point"), np.random.default_rng(0)
    many.reset(seed=1)
    actions = rng.uniform(-1.5, 1.5, (20, 50, 2)).astype(np.float32)
    steps = [many.step(a) for a in actions]
    final = steps[-1][4]["final_info"]
    for i in range(0, 50, 7):
        one = gym.make("MultiGoal-v0")
        one.reset()
        alone = [one.step(a) for a in actions[:, i]]
        assert [s[1][i] for s in steps] == pytest.approx([s[1] for s in alone])
        assert final["mode"][i] == alone[-1][4]["mode"] and final["episode"]["r"][i] == pytest.approx(
            sum(s[1] for s in alone)
        )
        np.testing.assert_allclose(steps[-1][4]["final_obs"][i], alone[-1][0])
    assert steps[-1][0].tolist() == np.zeros((50, 2)).tolist()  # the next episode has begun


def test_the_expert_reaches_every_goal():
    env = gym.make_vec("MultiGoal-v0", 400, "vector_entry_point", start_std=0.3)
    obs, _ = env.reset(seed=0)
    again, _ = env.reset(seed=0)
    other, _ = env.reset(seed=1)
    assert (obs == again).all() and (obs != other).all() and 0.25 < obs.std() < 0.35
    obs, nearest = other, np.linalg.norm(other[:, None] - toy.MultiGoalVector.GOALS, axis=-1).argmin(1)
    for _ in range(20):
        goals = toy.MultiGoalVector.GOALS[np.linalg.norm(obs[:, None] - toy.MultiGoalVector.GOALS, axis=-1).argmin(1)]
        obs, *_, info = env.step(np.clip(goals - obs, -1, 1))
    assert (info["final_info"]["mode"] == nearest).all() and set(nearest) == {0, 1, 2, 3}


# --- Avoiding ---
POSTS = [(0.5, -0.1, 0.03), (0.425, 0.08, 0.025), (0.575, 0.08, 0.025)]
POSTS += [(0.35, 0.26, 0.025), (0.5, 0.26, 0.025), (0.65, 0.26, 0.025)]


def place(env, x, y):  # the rod, at rest
    env.data.qpos = env.polar([x, y])
    env.data.qvel = 0
    toy.mujoco.mj_forward(env.model, env.data)
    return env.data.ncon


@pytest.mark.parametrize("x, y, radius", POSTS)
def test_posts_are_touched_at_the_sum_of_the_radii_and_nowhere_else(avoiding, x, y, radius):
    avoiding.reset()
    for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False):
        direction = np.array([np.cos(angle), np.sin(angle)])
        assert place(avoiding, *(np.array([x, y]) + (radius + 0.01 - 2e-4) * direction)) > 0
        assert place(avoiding, *(np.array([x, y]) + (radius + 0.01 + 2e-4) * direction)) == 0


def test_the_start_and_the_lag_of_the_observation(avoiding):
    obs, _ = avoiding.reset()
    assert obs == pytest.approx([0.52492847, -0.27973673] * 2, abs=1e-9)
    positions = [avoiding.position]
    for i in range(10):
        obs, *_ = avoiding.step(np.array([0.002, 0.01]))
        assert obs[:2] == pytest.approx([0.52492847 + 0.002 * (i + 1), -0.27973673 + 0.01 * (i + 1)])
        assert obs[2:] == pytest.approx(positions[-1])  # where it was when the action was issued
        positions.append(avoiding.position)
    assert positions[-1][1] > positions[-2][1] > -0.27973673


def test_free_motion_is_that_of_the_equations(avoiding):
    """Lagrange's equations of a mass 1 kg on a turning arm, with filtered PD control, by scipy's solver."""
    taus, kp, kd, f = (np.array(v) for v in ((0.027, 0.0813), (22.509, 1068.37), (1.8696, 62.834), (1.3105, 2.3215)))

    def slope(t, state, target):
        q, v, g = state[:2], state[2:4], state[4:]
        g_slope = (target - g) / taus
        torque, force = kp * (g - q) + kd * (f * g_slope - v)
        turn = (torque - 2 * q[1] * v[0] * v[1]) / (0.1831 + 1e-6 + 1e-5 + q[1] ** 2)
        return [*v, turn, force + q[1] * v[0] ** 2, *g_slope]

    def polar(xy):
        return np.array([np.arctan2(xy[1], xy[0]), np.hypot(*xy)])

    avoiding.reset()
    desired, rng = avoiding.START.copy(), np.random.default_rng(0)
    state, way = np.array([*polar(desired), 0, 0, *polar(desired)]), 0.0
    for _ in range(14):  # up to the first post, to the right of it
        action = np.array([0.008, 0.01]) + 0.002 * rng.standard_normal(2)
        desired = desired + action
        state = solve_ivp(slope, (0, 0.035), state, args=(polar(desired),), rtol=1e-8, atol=1e-10).y[:, -1]
        avoiding.step(action)
        expected = state[1] * np.array([np.cos(state[0]), np.sin(state[0])])
        assert np.linalg.norm(avoiding.position - expected) < 1e-3  # Euler's steps of a millisecond
        way = np.linalg.norm(expected - avoiding.START)
    assert way > 0.1 and not avoiding.collided


def test_the_arm_cannot_reach_further_than_it_is_long(avoiding):
    avoiding.reset()
    for _ in range(60):
        obs, *_ = avoiding.step(np.array([0.0125, 0]))
    assert obs[0] > 1.2 and np.hypot(*avoiding.position) == pytest.approx(0.8114, abs=1e-3)


def drive(env, points, speed=0.0125):
    """Moves the desired point through `points`; [(reward, terminated, truncated, info), ...]."""
    env.reset()
    steps = []
    for point in points:
        while (gap := np.asarray(point) - env.desired).any() and not (steps and (steps[-1][1] or steps[-1][2])):
            steps.append(env.step(gap * min(1, speed / np.abs(gap).max()))[1:])
    return steps


RIGHT = [(0.6, -0.2), (0.6, 0.0), (0.5, 0.04), (0.5, 0.12), (0.57, 0.2), (0.57, 0.33)]


def test_dppo_reward_pays_behind_the_line_and_punishes_contact_for_good(avoiding):
    steps = drive(avoiding, [*RIGHT, (0.57, 0.48), (0.57, 2.0)])
    rewards, lines = np.array([s[0] for s in steps]), avoiding.path[1 : len(steps) + 1, 1]
    assert len(steps) == 100 and steps[-1][2] and not any(s[1] for s in steps)
    x = avoiding.path[1 : len(steps) + 1, 0]
    assert rewards.tolist() == [-0.1 if not 0.2 < a < 0.8 else float(y > 0.4) for a, y in zip(x, lines)]
    assert rewards.sum() > 20 and steps[-1][3]["success"] and steps[-1][3]["mode"] == 1 * 12 + 1 * 4 + 2
    first = next(i for i, s in enumerate(steps) if s[3]["success"])
    assert lines[first] > 0.35 >= lines[first - 1]

    steps = drive(avoiding, [(0.5, 0.0), (0.57, 2.0)])  # straight into the first post
    hit = next(i for i, s in enumerate(steps) if s[3]["collided"])
    assert all(s[0] == 0 for s in steps[:hit]) and all(s[0] == -0.1 for s in steps[hit:]) and hit < 30
    assert not steps[-1][3]["success"] and steps[-1][3]["mode"] == -1 and len(steps) == 100

    steps = drive(avoiding, [(0.1, -0.28), (0.1, -0.2), (0.15, -0.2)])  # out to the left
    assert min(s[0] for s in steps) == -0.1 and not avoiding.collided


def test_sparse_reward_ends_at_the_line_at_a_contact_or_after_150_steps():
    env = gym.make("Avoiding-v0", reward="sparse").unwrapped
    steps = drive(env, [*RIGHT, (0.57, 0.48)])
    assert steps[-1][:2] == (1.0, True) and {s[:2] for s in steps[:-1]} == {(0.0, False)}
    assert env.path[len(steps), 1] > 0.35 >= env.path[len(steps) - 1, 1]
    steps = drive(env, [(0.5, 0.0)])
    assert steps[-1][:2] == (0.0, True) and steps[-1][3]["collided"]
    env.reset()
    ends = [env.step(np.zeros(2))[2:4] for _ in range(150)]
    assert ends[-1] == (False, True) and set(ends[:-1]) == {(False, False)}


def test_what_is_past_the_line_stays_a_success(avoiding):
    steps = drive(avoiding, [*RIGHT, (0.57, 0.4), (0.5, 0.4), (0.5, 0.27)])  # and back into a post from behind
    assert steps[-1][3]["collided"] and steps[-1][3]["success"] and steps[-1][0] == -0.1


@pytest.mark.parametrize("route", ROUTES)
def test_the_demonstrator_takes_every_route_without_contact(avoiding, route):
    obs, actions, _ = demonstrator.demonstrate(route, np.random.default_rng(5), avoiding)
    replayed = [avoiding.reset()[0]]
    for action in actions:
        o, *_, info = avoiding.step(action)
        replayed.append(o)
    assert info["success"] and not info["collided"] and info["mode"] == route[0] * 12 + route[1] * 4 + route[2]
    np.testing.assert_array_equal(replayed[:-1], obs)  # the same commands give the same motion to the bit
    assert (actions[:, 1] >= 0).all() and np.abs(actions).max() <= 0.0151 and 50 < len(actions) < 130


def test_demonstrations_have_the_statistics_of_people(tmp_path, monkeypatch, capsys):
    script = [sys.executable, ROOT / "backbones" / "avoiding_demonstrator.py", "--output"]
    done = subprocess.run([*script, tmp_path / "demos.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "demos.npz") as file:
        ends, actions, obs = file["terminals"], file["actions"], file["observations"]
    lengths = np.diff(np.append(-1, np.flatnonzero(ends)))
    assert len(lengths) == 96 and 74 < lengths.mean() < 80 and 8 < lengths.std() < 16  # people: 77.1 +- 12.0
    assert actions.std(0) == pytest.approx([0.0066, 0.0044], rel=0.15) and obs.shape[1] == 4
    done = subprocess.run([*script, tmp_path / "demos.csv"], capture_output=True, text=True)
    assert done.returncode == 2 and "demos.csv" in done.stderr and done.stderr.count("\n") == 1


# --- decoder and Delta ---
@pytest.fixture(scope="session")
def decoders(tmp_path_factory):
    """kind -> file of a MultiGoal decoder, cloned for a quarter of the time."""
    folder, before = tmp_path_factory.mktemp("toy"), dict(toy.CLONE)
    toy.CLONE["iterations"] = 1_000
    found = {}
    for kind in ("flow", "diffusion"):
        found[kind] = folder / f"{kind}.pt"
        with torch.random.fork_rng():
            toy.clone(found[kind], kind)
    toy.CLONE |= before
    return found


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_the_frozen_decoder_reaches_all_goals(decoders, kind):
    args = toy.Args(backbone=str(decoders[kind]))
    decoder, normalization, _ = toy.load_decoder(args)
    result = toy.evaluate(decoder, toy.make_envs(1000, args, decoder, normalization), 0, "cpu")
    assert np.bincount(result["mode"], minlength=4).min() >= 150 and result["success"].all()
    assert 150 < result["return"].mean() < 165 and (result["length"] == 20).all()


def test_a_decoder_is_cloned_once(tmp_path, monkeypatch):
    calls, whole = [], toy.clone
    monkeypatch.setitem(toy.CLONE, "iterations", 3)
    monkeypatch.setattr(toy, "clone", lambda path, kind: (calls.append(kind), whole(path, kind)))
    for kind in ("flow", "flow", "diffusion", "flow"):
        toy.load_decoder(toy.Args(decoder=kind, run_dir=str(tmp_path / "runs")))
    monkeypatch.setitem(toy.CLONE, "iterations", 4)
    toy.load_decoder(toy.Args(run_dir=str(tmp_path / "runs")))
    assert calls == ["flow", "diffusion", "flow"]


def test_the_committed_decoder_of_avoiding(avoiding):
    args = toy.Args(env_id="Avoiding", eval_episodes=60)
    decoder, normalization, card = toy.load_decoder(args)
    assert 0.3 < card["frozen_success"] < 0.7 and card["frozen_modes"] >= 12 and card["eval_episodes"] == 500
    result = toy.evaluate(decoder, toy.make_envs(60, args, decoder, normalization), 0, "cpu")
    assert abs(result["success"].mean() - card["frozen_success"]) < 0.25
    assert ((result["mode"] >= 0) == result["success"]).all() and toy.modes(result, args)["eval/modes"] >= 5


def test_evaluation_of_a_list_and_of_a_vector_are_alike(decoders):
    args = toy.Args(backbone=str(decoders["flow"]))
    decoder, normalization, _ = toy.load_decoder(args)
    one = toy.evaluate(decoder, toy.make_envs(20, args, decoder, normalization), 7, "cpu")
    two = toy.evaluate(decoder, [toy.make_env("MultiGoal-v0", 1, normalization) for _ in range(20)], 7, "cpu")
    for key in one:  # the list's wrapper divides by a range of 2 + 1e-6
        np.testing.assert_allclose(one[key], two[key], atol=1e-3)


def test_modes_by_hand():
    result = {"mode": np.array([0, 0, 1, -1, 3, 0])}
    assert toy.modes(result, toy.Args()) == {
        "eval/modes": 3, "eval/mode_max": 0.6,
        "eval/mode_entropy": pytest.approx(-(0.6 * np.log(0.6) + 2 * 0.2 * np.log(0.2)) / np.log(4)),
    }  # fmt: skip
    nobody = toy.modes({"mode": np.array([-1, -1])}, toy.Args(env_id="Avoiding"))
    assert nobody == {"eval/modes": 0, "eval/mode_max": 0, "eval/mode_entropy": 0}
    alike = toy.modes({"mode": np.arange(24)}, toy.Args(env_id="Avoiding"))
    assert alike["eval/mode_entropy"] == pytest.approx(1) and alike["eval/modes"] == 24


@pytest.mark.parametrize("norm, budget", [("sum", 0.2), ("mean", 0.2 * 6)])
def test_with_a_trust_region_per_state_no_state_spends_more(norm, budget):
    torch.manual_seed(0)
    args = toy.Args(delta=0.2, delta_norm=norm, trust_region="state", hidden_size=16)
    shift, obs = toy.perturbation_mlp(5, 6, args), torch.randn(500, 5)
    assert (shift(obs) == 0).all()
    shift[-2].weight.data.normal_(0, 5)
    raw = shift[:-1](obs)
    spent = shift(obs).square().sum(1)
    assert spent.max() <= budget * (1 + 1e-5) and spent.max() > 0.9 * budget
    assert torch.cosine_similarity(raw, shift(obs)).min() > 0.999  # only the length changes
    small = raw * 1e-3 / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(shift[-1](small), small, rtol=1e-4, atol=1e-9)
    zero = torch.zeros(1, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(shift[-1](zero).sum(), zero)
    torch.testing.assert_close(gradient, torch.ones(1, 6), rtol=1e-4, atol=1e-4)


# --- runs ---
def run(script, *flags, **kwargs):
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / script), *map(str, flags), "--no-progress"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs)


def finish(process, code=0):
    out, error = process.communicate(timeout=600)
    assert process.returncode == code, error
    return out + error


def only(folder):
    (path,) = [p for p in Path(folder).iterdir() if p.is_dir() and p.name != "wandb"]
    return path


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]


def test_learning_holds_the_constraint_and_raises_the_return(decoders, tmp_path):
    """Real runs of a third of the usual length, two at once; 0.35 collapses towards few goals, 0.05 does not."""
    flags = ["--backbone", decoders["flow"], "--total-timesteps", 14_000, "--eval-every", 2_000, "--seed", 11]
    runs = {
        delta: run("lpds_toy.py", "--delta", delta, "--run-dir", tmp_path / str(delta), *flags)
        for delta in (0.05, 0.35)
    }
    last = {}
    for delta, process in runs.items():
        finish(process)
        table = rows(only(tmp_path / str(delta)))
        late = [row["trust_region/replay_sq_norm"] / delta for row in table if row["global_step"] > 8_000]
        assert 0.85 < np.mean(late) < 1.15, late
        last[delta] = table[-1]
    frozen, largest = last[0.35]["eval/frozen_return"], {delta: row["eval/mode_max"] for delta, row in last.items()}
    assert last[0.35]["eval/episodic_return"] > frozen + 1.5
    assert largest[0.05] + 0.1 < largest[0.35] and last[0.05]["eval/modes"] == 4
    folder = only(tmp_path / "0.35")
    assert {"args.json", "backbone.pt", "best.pt", "checkpoint.pt", "curves.png", "eval.npz", "metrics.csv"} == {
        p.name for p in folder.iterdir()
    }
    with np.load(folder / "eval.npz") as file:
        assert file["mode"].shape == file["return"].shape == (8, 1000) and file["path"].shape == (2, 100, 21, 2)


TINY = "--num-envs 5 --prior-steps 300 --warmup-steps 200 --eval-every 400 --eval-episodes 20 --hidden-size 16".split()


@pytest.mark.parametrize("script", ["lpds_toy.py", "baselines/dsrl_toy.py"])
@pytest.mark.parametrize("world", ["MultiGoal", "Avoiding"])
def test_it_runs_stops_and_resumes_exactly(script, world, decoders, tmp_path):
    flags = ["--env-id", world, "--batch-size", 16, "--utd", 1, *TINY]
    flags += ["--backbone", decoders["flow"]] if world == "MultiGoal" else []
    flags += ["--delta", 0.2] if script == "lpds_toy.py" else []
    n = 2_000
    whole, cut = (
        run(script, *flags, "--total-timesteps", n, "--run-dir", tmp_path / name) for name in ("whole", "cut")
    )
    while not list((tmp_path / "cut").glob("*/checkpoint.pt")):
        assert cut.poll() is None, cut.communicate()
        time.sleep(0.05)
    cut.send_signal(signal.SIGTERM)
    finish(whole)
    text = finish(cut, 128 + signal.SIGTERM)
    again = shlex.split(text.partition("go on with: ")[2])
    assert again[0] == "python" and Path(again[1]).name == Path(script).name
    finish(run(script, *again[2:]))
    a, b = (torch.load(only(tmp_path / name) / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert a["loop"]["global_step"] == b["loop"]["global_step"] >= n
    for key in a["agent"]:
        assert torch.equal(a["agent"][key], b["agent"][key]), key
    for one, two in zip(rows(only(tmp_path / "whole")), rows(only(tmp_path / "cut")), strict=True):
        skip = {"wall_seconds", "charts/SPS"}
        assert {k: v for k, v in one.items() if k not in skip} == pytest.approx(
            {k: v for k, v in two.items() if k not in skip}, nan_ok=True, rel=1e-12
        )


def test_the_sweep_makes_one_figure_goes_on_and_skips_what_is_finished(decoders, tmp_path):
    flags = ["--deltas", 0.05, 0.7, "--seeds", 1, "--seed", 3, "--backbone", decoders["flow"], "--run-dir", tmp_path]
    flags += [*TINY, "--total-timesteps", 1200, "--trust-region", "state", "--track"]
    process = run("lpds_toy.py", *flags)
    while not list(tmp_path.glob("*/*/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = finish(process, 128 + signal.SIGINT)
    again = shlex.split(text.partition("go on with: ")[2])[1:]
    text = finish(run(*again))
    folder = only(tmp_path)
    assert (folder / "figure.png").stat().st_size > 20_000 and f"finished: {folder / 'figure.png'}" in text
    names = {"delta-0.05__3", "delta-0.7__3", "dsrl__3"}
    assert {p.name for p in folder.iterdir() if p.is_dir()} == names
    finished = {name: next((folder / name).glob("*/curves.png")) for name in names}  # one that a stop met too early to
    stamps = {name: file.stat().st_mtime_ns for name, file in finished.items()}  # save leaves a folder of its own
    assert "0 runs" in finish(run(*again))
    assert stamps == {name: file.stat().st_mtime_ns for name, file in finished.items()}
    done = rows(finished["delta-0.7__3"].parent)[-1]
    assert done["trust_region/alpha"] == 0 and done["trust_region/sq_norm"] <= 0.7
    plot = [sys.executable, str(ROOT / "benchmark" / "plot_toy.py"), str(finished["delta-0.7__3"].parent)]
    assert subprocess.run(plot, capture_output=True, text=True).returncode == 0
    assert finished["delta-0.7__3"].with_name("states.png").stat().st_size > 20_000
    small = tmp_path / "kept"
    kept = subprocess.run([*plot[:2], str(folder), "--keep", str(small)], capture_output=True, text=True)
    assert kept.returncode == 0, kept.stderr
    assert (small / "table.md").read_text() == (folder / "table.md").read_text()  # drawn from the condensed files alone
    assert not list(small.rglob("*.pt")) and len(list(small.rglob("eval.npz"))) == 3
    play = [sys.executable, str(ROOT / "enjoy.py"), str(finished["dsrl__3"].parent), "--episodes", "5"]
    played = subprocess.run(play, capture_output=True, text=True)
    assert played.returncode == 0 and "action entropy" in played.stdout, played.stderr


BAD = {
    "--delta 0": "--delta 0.0: must lie in",
    "--delta -1": "--delta -1.0: must lie in",
    "--deltas 0.1 0": "--deltas (0.1, 0.0): must lie in",
    "--seeds 0": "--seeds 0: must lie in [1, ",
    "--delta 0.1 --total-timesteps 5000": "--total-timesteps 5000: steering starts only after 5000 steps",
    "--delta 0.1 --seeds 5": "--seeds 5: with --delta there is one run",
    "--delta 0.1 --gamma 1 --prior-steps 0 --warmup-steps 0": "--reward-scale auto: no reward yet, or --gamma is 1",
    "--delta 0.1 --gamma 2": "--gamma 2.0: must lie in [0, 1]",
    "--delta 0.1 --device tpu": "--device tpu: not usable",
    "--delta 0.1 --backbone no.pt": "--backbone no.pt: no such file",
    "--delta 0.1 --env-id Avoiding --backbone {flow}": "has (obs, action) sizes [2, 2], Avoiding [4, 2]",
    "--delta 0.1 --resume no": "--resume no: no run",
    "--delta 0.1 --run-dir {flow}": "cannot be made there",
    "--delta 0.1 --alpha-init 0": "--alpha-init 0",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_sentence(flags, decoders, monkeypatch, capsys, tmp_path):
    import runpy

    backbone = [] if "--backbone" in flags else ["--backbone", str(decoders["flow"])]
    where = [] if "--run-dir" in flags else ["--run-dir", str(tmp_path)]
    argv = [str(ROOT / "lpds_toy.py"), *flags.format(flow=decoders["flow"]).split(), *backbone, *where, "--no-progress"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(argv[0], run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[flags] in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir()) or "--alpha-init" in flags or "--gamma 1 " in flags


def test_success_on_avoiding_rises_in_a_short_run(tmp_path):
    flags = ["--env-id", "Avoiding", "--delta", 0.3, "--seed", 11, "--run-dir", tmp_path, "--total-timesteps", 25_000]
    finish(run("lpds_toy.py", *flags, "--eval-every", 25_000))
    last = rows(only(tmp_path))[-1]
    assert last["eval/success"] > last["eval/frozen_success"] + 0.15
