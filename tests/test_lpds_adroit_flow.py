"""lpds_adroit_flow.py and its baseline: the ODE against closed forms and scipy, cloning of two modes, the four hands,
whole runs, the committed decoders. What they share with lpds_continuous.py is tested there.
"""

import csv
import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from scipy.integrate import solve_ivp
from scipy.linalg import expm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]
import dsrl_adroit_flow as dsrl  # noqa: E402

import lpds_adroit_flow as adroit  # noqa: E402
import pretrain_backbone as pretrain  # noqa: E402

SIZES = {"Pen": (45, 24), "Hammer": (46, 26), "Door": (39, 28), "Relocate": (39, 30)}  # observation, action
SCRIPTS = ["lpds_adroit_flow.py", "baselines/dsrl_adroit_flow.py"]
PAGE = ROOT / "docs" / "lpds_adroit_flow.md"


# --- the ODE ---
def flow(n=5, solver="euler", obs_dim=3, action_dim=2, train_steps=20, seed=0):
    torch.manual_seed(seed)
    config = dict(kind="flow", obs_dim=obs_dim, action_dim=action_dim, chunk=2, hidden=[32] * 3, cond_hidden=[])
    config |= dict(time_dim=8, activation="relu", train_steps=train_steps, sample_steps=n)
    return adroit.FlowDecoder(config, solver).freeze()


def to_double(decoder):
    decoder.double().times = decoder.times.double()
    return decoder


def given(velocity, n, solver, train_steps=20):
    """A decoder whose velocity at time t in [0, 1] is the function velocity(x, t)."""
    decoder = flow(n, solver, train_steps=train_steps)
    decoder.embed_time = lambda t: t[:, None] / train_steps
    decoder.network = lambda x, t, obs: velocity(x, t)
    return to_double(decoder.freeze())


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_a_linear_flow_is_solved_in_its_closed_form(solver, order):
    matrix = torch.tensor(np.random.default_rng(0).normal(0, 0.7, (4, 4)))
    w, exact, errors = torch.randn(6, 4).double() / 20, torch.tensor(expm(matrix.numpy())), []
    for n in (10, 20, 40):
        one = sum(torch.matrix_power(matrix / n, k) / (1, 1, 2)[k] for k in range(order + 1))  # what one step does
        found = given(lambda x, t: x @ matrix.T, n, solver)(torch.zeros(6, 3), w)
        assert found == pytest.approx(w @ torch.matrix_power(one, n).T, abs=1e-12)
        errors.append((found - w @ exact.T).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("solver, reached", [("euler", 0.9 * 0.3), ("heun", 0.3)])
def test_time_runs_from_noise_to_action(solver, reached):
    found = given(lambda x, t: 2 * 0.3 * t.expand_as(x), 10, solver, train_steps=7)(
        torch.zeros(1, 3), torch.zeros(1, 4)
    )
    assert found == pytest.approx(torch.full((1, 4), reached), abs=1e-6)


@pytest.mark.parametrize("solver, n, tolerance", [("euler", 4000, 1e-3), ("heun", 400, 1e-5)])
def test_a_network_is_integrated_as_scipy_does(solver, n, tolerance):
    decoder, obs, w = to_double(flow(n, solver)), torch.randn(3).double(), torch.randn(4).double() / 4

    embed = flow(n, solver).embed_time  # the scripts embed time in single precision

    def velocity(t, x):
        with torch.no_grad():
            time_emb = embed(torch.tensor([20 * t])).double()
            return decoder.network(torch.tensor(x)[None], time_emb, obs[None])[0].numpy()

    exact = solve_ivp(velocity, (0, 1), w.numpy(), rtol=1e-9, atol=1e-9).y[:, -1]
    assert np.abs(exact).max() < 1 and np.abs(exact - w.numpy()).max() > 0.05  # it moves, and is not clipped
    assert decoder(obs[None], w[None])[0].numpy() == pytest.approx(exact, abs=tolerance)


def test_eulers_method_is_that_of_the_other_scripts_and_the_result_lies_in_the_box():
    decoder = flow(6)
    plain = adroit.Decoder(decoder.config)
    plain.load_state_dict(decoder.state_dict())
    obs, w = torch.randn(20, 3), 3 * torch.randn(20, 4)
    assert torch.equal(decoder(obs, w), plain.freeze()(obs, w))
    assert decoder(obs, 100 * w).abs().max() == 1


def test_cloning_learns_both_of_two_modes():
    torch.manual_seed(0)
    config = flow(20, obs_dim=1, action_dim=1).config | dict(hidden=[64] * 3)
    decoder = adroit.FlowDecoder(config, "euler")
    modes, share = torch.tensor([[-0.6, 0.3], [0.5, -0.2]]), 0.3
    optimizer, abar = torch.optim.Adam(decoder.parameters(), 3e-3), torch.zeros(20)
    for _ in range(1_500):
        chunks = modes[(torch.rand(256) > share).long()] + 0.05 * torch.randn(256, 2)
        loss = pretrain.bc_loss(decoder, torch.zeros(256, 1), chunks, abar)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = decoder.freeze()(torch.zeros(4_000, 1), torch.randn(4_000, 2))
    first = (found - modes[0]).norm(dim=1) < (found - modes[1]).norm(dim=1)
    assert first.float().mean() == pytest.approx(share, abs=0.05)
    for members, mode in ((found[first], modes[0]), (found[~first], modes[1])):
        assert members.median(0).values == pytest.approx(mode, abs=0.05)
        assert ((members - mode).norm(dim=1) < 0.2).float().mean() > 0.9  # few lie between the two


# --- the hands ---
def make(task, reward=""):
    obs_dim, action_dim = SIZES[task]
    stats = {"obs_min": -np.ones(obs_dim), "obs_max": np.ones(obs_dim)}
    stats |= {"action_min": -np.ones(action_dim), "action_max": np.ones(action_dim)}
    return adroit.make_env(f"AdroitHand{task}{reward}-v1", 8, stats)


def chunks(task, seed, n, scale=0.5):
    return np.random.default_rng(seed).uniform(-scale, scale, (n, 8 * SIZES[task][1])).astype(np.float32)


@pytest.mark.parametrize("task", SIZES)
def test_an_episode_is_25_chunks_and_reports_every_kind_of_success(task):
    env, plain = make(task, "Sparse"), make(task, "Sparse").unwrapped
    env.reset(seed=4)
    plain.reset(seed=4)
    total, flags = 0.0, []
    for i, chunk in enumerate(chunks(task, 0, 25)):
        _, reward, terminated, truncated, info = env.step(chunk)
        steps = [plain.step(action) for action in chunk.reshape(8, -1)]
        total, flags = total + sum(step[1] for step in steps), flags + [bool(step[4]["success"]) for step in steps]
        assert reward == pytest.approx(sum(step[1] for step in steps)) and info["steps"] == 8
        assert info["success"] == any(flags) and not terminated and truncated == (i == 24)
        assert ("success_share" in info) == truncated
    assert info["success_end"] == flags[-1] and info["success_share"] == np.mean(flags)
    assert info["episode"]["l"] == 200 and info["episode"]["r"] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("flag", ["success", "is_success"])  # Adroit's name; that of Fetch and of the Shadow hand
def test_success_at_any_step_at_the_end_and_its_share_differ(flag, monkeypatch):
    env = make("Pen")
    env.reset(seed=0)
    count, step = iter(range(200)), type(env.unwrapped).step
    held = lambda self, a: (*step(self, a)[:4], {flag: 40 <= next(count) < 70})  # noqa: E731
    monkeypatch.setattr(type(env.unwrapped), "step", held)
    result = adroit.evaluate(lambda obs, noise: torch.zeros_like(noise), [env], 0, "cpu")
    assert result["success"].tolist() == [True] and result["success_end"].tolist() == [0]
    assert result["success_share"].tolist() == [30 / 200] and result["length"].tolist() == [200]


@pytest.mark.parametrize("task", SIZES)
def test_a_hand_goes_on_from_its_state_to_the_bit(task, tmp_path):
    """Into a fresh environment, where pen, nail, door or ball lie elsewhere until the state is put back."""

    def go_on(env):
        trace = []
        for chunk in chunks(task, 2, 25):  # over the end of the episode, with the reset that the generator draws
            obs, reward, _, truncated, info = env.step(chunk)
            trace.append([*obs, reward, truncated, info["success"]])
            if truncated:
                trace.append([info["success_share"], info["episode"]["r"], *env.reset()[0]])
        return [np.asarray(row, np.float64).tobytes() for row in trace]

    env = make(task)
    env.reset(seed=3)
    for chunk in chunks(task, 1, 8):
        env.step(chunk)
    torch.save(adroit.env_state(env), tmp_path / "state.pt")
    expected, fresh = go_on(env), make(task)
    fresh.reset(seed=99)
    adroit.env_state(fresh, torch.load(tmp_path / "state.pt", weights_only=True))
    assert go_on(fresh) == expected


# --- settings ---
@pytest.mark.parametrize("reward", ["", "Sparse"])
@pytest.mark.parametrize("task, delta", [("Pen", 0.35), ("Hammer", 0.10), ("Door", 0.35), ("Relocate", 0.35)])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_settings_are_those_of_tables_1_and_2_and_alike_for_both_methods(preset, task, delta, reward):
    flags = ["--env-id", f"AdroitHand{task}{reward}-v1", "--preset", preset]
    ours, theirs = vars(adroit.parse_args(flags)), vars(dsrl.parse_args(flags))
    table_1 = dict(hidden_size=256, utd=10, distill_steps=10, gamma=0.99, noise_bound=2.5)
    table_1 |= dict(prior_steps=2_000) if preset == "paper" else dict(num_envs=16, total_timesteps=160_000)
    assert ours.items() >= (table_1 | dict(num_layers=3, ode_steps=10, delta=delta)).items()
    own = {"delta", "delta_norm", "dual", "alpha_lr", "lagrangian", "perturb"}
    assert set(ours) - set(theirs) == own and set(theirs) - set(ours) == {"variant", "target_entropy"}
    assert {k for k in set(ours) & set(theirs) if ours[k] != theirs[k]} == {"exp_name"}
    assert theirs["target_entropy"] == 0


def test_the_diff_is_short_enough_to_be_a_lesson():
    ours, theirs = ((ROOT / name).read_text().splitlines() for name in SCRIPTS)
    hunks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    assert sum(op[0] != "equal" for op in hunks) <= 30


# --- whole runs ---
TINY = "--hidden-size 16 --batch-size 32 --utd 2 --distill-steps 2 --num-envs 2 --eval-episodes 2 --no-progress " \
       "--prior-steps 200 --warmup-steps 200 --eval-every 800 --log-every 200 --total-timesteps 1200"  # fmt: skip


def run(script, *flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(process, code=0):
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, text
    return text


def rows(folder):
    with open(folder / "metrics.csv") as file:
        clock = ("wall_seconds", "charts/SPS")
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(file)]


@pytest.mark.parametrize("script, task", [*zip(SCRIPTS, ["Hammer", "Relocate"])])
def test_it_runs_stops_and_resumes_exactly(script, task, tiny_backbone, tmp_path):
    flags = [
        "--env-id",
        f"AdroitHand{task}-v1",
        "--backbone",
        tiny_backbone(f"AdroitHand{task}", "flow"),
        *TINY.split(),
    ]
    whole, cut = (run(script, *flags, "--run-dir", tmp_path / name) for name in ("whole", "cut"))
    while not [row for file in tmp_path.glob("cut/*/metrics.csv") for row in rows(file.parent)][3:]:
        assert cut.poll() is None, cut.communicate()  # until step 600: critics and policy have moved
        time.sleep(0.05)
    cut.send_signal(signal.SIGTERM)
    finish(whole)
    again = shlex.split(finish(cut, 128 + signal.SIGTERM).partition("go on with: ")[2])
    assert again[0] == "python" and Path(again[1]).name == Path(script).name
    finish(run(script, *again[2:]))
    (whole,), (cut,) = ((tmp_path / name).iterdir() for name in ("whole", "cut"))
    assert rows(whole) == rows(cut)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, cut))
    assert all(torch.equal(a["agent"][key], b["agent"][key]) for key in a["agent"])
    assert all(torch.equal(a["replay"][key], b["replay"][key]) for key in a["replay"])
    assert {"eval/success", "eval/success_end", "eval/success_share", "eval/frozen_success"} <= set(rows(whole)[-1])
    with np.load(whole / "eval.npz") as file:
        assert file["success_share"].shape == file["success"].shape == (3, 2)


@pytest.mark.parametrize("task, flags", [
    ("PenSparse", "--no-lagrangian"), ("DoorSparse", "--no-lagrangian --noise-bound none"),
    ("RelocateSparse", "--ode-solver heun --ode-steps 3"), ("HammerSparse", "--perturb action"),
])  # fmt: skip
def test_every_task_and_ablation_runs_with_the_committed_decoder(task, flags, tmp_path):
    run_dir = ["--run-dir", tmp_path, "--total-timesteps", 800]
    text = finish(run(SCRIPTS[0], "--env-id", f"AdroitHand{task}-v1", *TINY.split(), *run_dir, *flags.split()))
    (folder,) = tmp_path.iterdir()
    last, saved = rows(folder)[-1], torch.load(folder / "backbone.pt", weights_only=True)
    assert float(last["trust_region/sq_norm"]) > 0 and "success" in text
    assert (float(last["trust_region/alpha"]) == 0) == ("--no-lagrangian" in flags)
    assert saved["config"]["sample_steps"] == (3 if "heun" in flags else 10)
    if "trust_region/saturated" in last:
        assert (float(last["trust_region/saturated"]) == 0) == ("none" in flags)


def test_the_figure_of_a_run_has_a_panel_for_whatever_it_logged(tmp_path, monkeypatch):
    made, figure = [], adroit.Figure
    monkeypatch.setattr(adroit, "Figure", lambda *args, **kwargs: made.append(figure(*args, **kwargs)) or made[-1])
    first = {"global_step": 0, "eval/episodic_return": -1.0, "eval/success": 0.25, "eval/frozen_success": 0.25}
    last = first | {"global_step": 8, "losses/alpha": 0.5, "trust_region/alpha": 0.0, "losses/q_w_corr": 0.1}
    adroit.plot_curves(tmp_path / "curves.png", [first, last])  # alpha 0: --no-lagrangian
    titles = ["eval/episodic_return", "eval/success", "losses/alpha", "losses/q_w_corr"]
    shown = [
        axis.get_title() or axis.get_title(loc="left") for axis in made[0].axes
    ]  # benchmark/plot.py's style is left
    assert shown == titles and (tmp_path / "curves.png").stat().st_size > 1_000
    assert made[0].axes[1].lines[0].get_xydata().tolist() == [[0, 0.25], [8, 0.25]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_gymnasium_robotics_it_says_what_to_install(script, tmp_path):
    (tmp_path / "gymnasium_robotics.py").write_text("raise ImportError")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / script)], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "requirements/adroit.txt" in done.stderr and "Traceback" not in done.stderr


def test_bad_input_gets_one_sentence(tiny_backbone, tmp_path):
    flow_file = tiny_backbone("AdroitHandPen", "flow")
    for flags, parts in (
        (["--backbone", tiny_backbone("AdroitHandPen", "diffusion")], ["is a diffusion decoder", "--kind flow"]),
        (
            ["--env-id", "Hopper-v4"],
            ["--env-id Hopper-v4: no decoder", "--backbone", "AdroitHandPenSparse-v1"],
        ),
        (["--env-id", "Hopper-v4", "--preset", "paper"], ["--preset paper: has no settings for Hopper-v4"]),
        (["--backbone", flow_file, "--env-id", "AdroitHandDoor-v1"], ["45 obs coordinates", "AdroitHandDoor-v1"]),
        (["--backbone", flow_file, "--activation", "mish"], [f"--backbone {flow_file}: has its own normalization"]),
        (["--ode-steps", 0], ["--ode-steps 0: must lie in [1, "]),
        (["--total-timesteps", 32_000], ["--total-timesteps 32000: steering starts only after 32000 steps"]),
        (["--ode-steps", 1001], ["--ode-steps 1001", "must lie in [1, 1000]"]),  # a run that --resume would refuse
        (["--env-id", "AdroitHandPenn-v1"], ["did you mean AdroitHandPen-v1"]),
        (["--noise-bound", -1.0], ["--noise-bound -1.0"]),
    ):
        text = finish(run(SCRIPTS[0], *flags, "--run-dir", tmp_path), 2)
        assert "lpds_adroit_flow.py: error: " in text and "Traceback" not in text
        assert all(part in text for part in parts), text
    assert list(tmp_path.iterdir()) == []


# --- the committed decoders ---
@pytest.mark.parametrize("task", SIZES)
def test_the_committed_decoder_succeeds_as_often_as_its_card_says(task):
    args = adroit.parse_args(["--env-id", f"AdroitHand{task}-v1"])
    decoder, stats, card = adroit.load_decoder(args)
    envs = [adroit.make_env(args.env_id, 8, stats) for _ in range(50)]
    found, said = adroit.evaluate(decoder, envs, 77_000, "cpu")["success"].mean(), card["frozen_success"]
    assert 0.2 <= said <= 0.7 and decoder.config["chunk"] == 8
    spread = np.sqrt(said * (1 - said) * (1 / 50 + 1 / card["eval_episodes"]))
    assert abs(found - said) < 2.5 * spread, f"{found} of 50 episodes, {said} by the card"


# --- the page ---
def test_the_page_lists_every_departure_and_its_commands_parse():
    page, script = (" ".join(path.read_text().split()) for path in (PAGE, ROOT / SCRIPTS[0]))
    tags = re.findall(r"`(differs from [^`]*?:[^`]*)`", page)
    assert all(tag in script for tag in tags)
    for mark in re.findall(r"# (differs from [^:]*: .{30})", script):
        assert any(mark.startswith(tag[: len(mark)]) for tag in tags), mark
    for module, name in ((adroit, "lpds_adroit_flow.py"), (dsrl, "baselines/dsrl_adroit_flow.py")):
        commands = re.findall(rf"^python {name}([^#\n]*)", PAGE.read_text(), re.M)
        parsed = [module.parse_args(shlex.split(command)) for command in commands if "--resume" not in command]
        assert parsed and all(args.env_id.startswith("AdroitHand") for args in parsed)
    recipes = re.findall(r"^python pretrain_backbone.py(.*)$", PAGE.read_text(), re.M)
    assert len(recipes) == 4
    for recipe in recipes:  # the printed commands are those that made the files
        args = vars(tyro.cli(pretrain.Args, args=shlex.split(recipe)))
        card = torch.load(ROOT / args["output"], weights_only=True)["card"]
        assert card["recipe"] == {key: args[key] for key in card["recipe"]} and card["data"] == args["data"]
