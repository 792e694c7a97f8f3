"""Whole runs of lpds_continuous.py on Hopper with tiny networks: killed, resumed, starved of disk, misled, repeated.

"The same" means equal bit for bit: metrics.csv but for its two clock columns, eval.npz, and all of checkpoint.pt
(weights, optimisers, replay, generators, environments) but for the clock. Runs that are signalled or killed are
processes of their own; the others run in this one (runpy, as __main__), which saves their imports.
"""

import csv
import hashlib
import json
import math
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "lpds_continuous.py"
sys.path.insert(0, str(ROOT))
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*", "ignore:.*UserWarning.*")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
CLOCK = ("wall_seconds", "charts/SPS")
TINY = (
    "--hidden-size 16 --batch-size 32 --utd 3 --distill-steps 2 --num-envs 2 --eval-episodes 2 --no-progress "
    "--prior-steps 200 --warmup-steps 100 --eval-every 500 --log-every 100 --total-timesteps 1600"
)
SHORT = "--total-timesteps 700 --eval-every 300"


# --- running it ---


def command(*flags, before=""):
    """Argument list of a run; `before` is Python that is executed in its process ahead of the script."""
    flags = [str(flag) for flag in flags]
    if not before:
        return [sys.executable, str(SCRIPT), *flags]
    start = f"import runpy, sys\nsys.argv[0] = {str(SCRIPT)!r}\n{before}\n"
    return [sys.executable, "-c", start + "runpy.run_path(sys.argv[0], run_name='__main__')", *flags]


def process(*flags, before="", **kwargs):
    kwargs = dict(env=ENV, capture_output=True, text=True, timeout=500) | kwargs
    return subprocess.run(command(*flags, before=before), **kwargs)


@pytest.fixture
def inside(monkeypatch, capsys, tmp_path):
    """inside(*flags) -> (exit code, stdout, stderr) of the script in this process, which stays as it was."""

    def run(*flags):
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        threads, code = torch.get_num_threads(), 0
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.chdir(tmp_path)  # MuJoCo logs there what it thinks of NaN
        capsys.readouterr()
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
            torch.set_num_threads(threads)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def signal_when(monkeypatch):
    """signal_when(number, due): this process signals itself ahead of each vector step n (from 1) with due(n)."""
    original, count = gym.vector.SyncVectorEnv.step, []

    def arm(number, due):
        def step(envs, actions):
            count.append(0)
            if due(len(count)):
                signal.raise_signal(number)
            return original(envs, actions)

        monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", step)

    return arm


@pytest.fixture
def new(tiny_backbone, tmp_path):
    """Flags of a tiny new run below tmp_path."""
    return ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), "--run-dir", tmp_path / "runs", *TINY.split()]


def only(folder):
    (run,) = [path for path in Path(folder).glob("*__*") if path.is_dir()]
    return run


def refused(code, error, *parts):
    """Exit code 2 and one line that says all of `parts`."""
    assert code == 2 and "Traceback" not in error, error
    line = error.strip().splitlines()[-1]
    assert line.startswith(f"{SCRIPT.name}: error: ")
    assert [part for part in parts if str(part) not in line] == [], line


# --- reading what it left ---


def metrics(run):
    with open(run / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(file)]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def differences(a, b, where="checkpoint"):
    """Paths at which two nested structures differ in one bit or more."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if key not in CLOCK]
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [where]


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    with np.load(a / "eval.npz") as x, np.load(b / "eval.npz") as y:
        assert set(x) == set(y) and all(np.array_equal(x[key], y[key]) for key in x)
    x, y = checkpoint(a), checkpoint(b)
    assert {"agent", "optimizers", "replay", "rng", "loop", "args"} <= set(x)
    for key in ("run_dir", "resume", "total_timesteps"):
        x["args"].pop(key), y["args"].pop(key)
    assert differences(x, y) == []


def finite(structure):
    if isinstance(structure, torch.Tensor):
        return bool(structure.isfinite().all())
    parts = structure.values() if isinstance(structure, dict) else structure
    return not isinstance(structure, (dict, list, tuple)) or all(map(finite, parts))


@pytest.fixture(scope="module")
def whole(tiny_backbone, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), "--run-dir", folder, *TINY.split()]
    done = process(*flags)
    assert done.returncode == 0, done.stderr
    return only(folder)


SIGNAL_AT = """
import gymnasium, os
step, count = gymnasium.vector.SyncVectorEnv.step, 0
def counted(envs, actions):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), {number})
    return step(envs, actions)
gymnasium.vector.SyncVectorEnv.step = counted
"""


def resume_flags(error, run):
    """Flags of the command that the message names; it must start this script again."""
    (line,) = [line for line in error.splitlines() if "--resume" in line]
    python, script, *flags = shlex.split(line[line.index("python") :])
    assert (python, Path(script)) == ("python", SCRIPT) and flags == ["--resume", str(run)]
    return flags


@pytest.fixture(scope="module")
def stopped(whole, tiny_backbone, tmp_path_factory):
    """A run that SIGTERM stopped at a random moment: (run folder, stderr). Copy it before going on with it."""
    folder, moment = tmp_path_factory.mktemp("stopped"), random.Random(time.time_ns())
    flags = ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), "--run-dir", folder, *TINY.split()]
    after, extra = moment.randint(2, 9), moment.uniform(0, 0.05)  # rows of metrics.csv, seconds
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command(*flags), env=ENV, **pipes) as run:
        deadline = time.time() + 500
        while time.time() < deadline and run.poll() is None:
            tables = list(folder.glob("*/metrics.csv"))
            if tables and len(tables[0].read_text().splitlines()) > after and list(folder.glob("*/checkpoint.pt")):
                break
            time.sleep(0.002)
        time.sleep(extra)
        run.send_signal(signal.SIGTERM)
        error = run.communicate(timeout=500)[1]
    step = checkpoint(only(folder))["loop"]["global_step"]
    print(f"SIGTERM after {after} rows and {extra:.3f} s, at step {step}")
    assert run.returncode == 128 + signal.SIGTERM, error
    assert 100 < step < 1600
    return only(folder), error


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    """In another place, as a run folder can be moved."""
    shutil.copytree(stopped[0], tmp_path / "moved")
    return tmp_path / "moved"


# --- exact resume ---


def test_stopped_by_sigterm_then_by_sigint_and_resumed_equals_uninterrupted(whole, stopped, stopped_copy):
    run, error = stopped
    assert "Traceback" not in error
    resume_flags(error, run)
    at = random.Random(time.time_ns()).randint(1, 50)
    print(f"SIGINT at vector step {at} after the resume")
    again = process("--resume", stopped_copy, before=SIGNAL_AT.format(at=at, number=int(signal.SIGINT)))
    assert again.returncode == 128 + signal.SIGINT and "Traceback" not in again.stderr
    assert checkpoint(run)["loop"]["global_step"] < checkpoint(stopped_copy)["loop"]["global_step"] < 1600
    done = process(*resume_flags(again.stderr, stopped_copy))
    assert done.returncode == 0, done.stderr
    assert (stopped_copy / "curves.png").stat().st_size > 10_000
    assert_same_run(whole, stopped_copy)
    assert differences(*(torch.load(r / "best.pt", weights_only=True)["agent"] for r in (whole, stopped_copy))) == []


@pytest.mark.parametrize("at, low, high", [(10, 50, 200), (33, 200, 300)])
def test_a_stop_in_any_phase_resumes_exactly(inside, new, tmp_path, whole, signal_when, at, low, high):
    """During the prior roll-outs, and while only the critics learn."""
    signal_when(signal.SIGINT, lambda n: n == at)
    assert inside(*new)[0] == 128 + signal.SIGINT
    run = only(tmp_path / "runs")
    assert low < checkpoint(run)["loop"]["global_step"] < high
    assert inside("--resume", run)[0] == 0
    assert_same_run(whole, run)


def test_the_same_seed_repeats_and_another_differs(inside, new, tmp_path, whole):
    assert inside(*new, "--run-dir", tmp_path / "same")[0] == 0
    assert_same_run(whole, only(tmp_path / "same"))
    assert inside(*new, *SHORT.split(), "--run-dir", tmp_path / "other", "--seed", 2)[0] == 0
    a, b = metrics(whole), metrics(only(tmp_path / "other"))
    assert a[0] == b[0]  # the frozen policy, on evaluation seeds that do not depend on --seed
    assert all(a[i]["losses/q_a"] != b[i]["losses/q_a"] for i in range(4, 7))


def test_rows_more_or_less_often_leave_training_as_it_is(inside, new, tmp_path, whole):
    """--log-every and --eval-every may change on resume: they must not decide what is learned."""
    assert inside(*new, "--log-every", 400, "--eval-every", 800)[0] == 0
    a, b = checkpoint(whole), checkpoint(only(tmp_path / "runs"))
    assert [d for key in ("agent", "optimizers", "replay", "rng") for d in differences(a[key], b[key], key)] == []


# --- broken off while saving ---

BREAK_THIRD_CHECKPOINT = """
import io, os, torch
save, count = torch.save, 0
def broken(state, file, *rest, **kwargs):
    global count
    count += "replay" in state
    if "replay" not in state or count < 3:
        return save(state, file, *rest, **kwargs)
    buffer = io.BytesIO()
    save(state, buffer)
    target = file if hasattr(file, "write") else open(file, "wb")
    target.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    target.flush()
    os.kill(os.getpid(), 9)
torch.save = broken
"""


def test_kill_9_in_the_middle_of_a_save_leaves_the_previous_checkpoint(new, tmp_path, whole):
    dead = process(*new, before=BREAK_THIRD_CHECKPOINT)
    run = only(tmp_path / "runs")
    assert dead.returncode == -signal.SIGKILL
    assert 500 <= checkpoint(run)["loop"]["global_step"] < 600  # the second of them, at the first evaluation after 0
    done = process("--resume", run)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, run)
    assert not list(run.glob("*.tmp"))


def test_a_full_disk_stops_with_a_sentence_and_resumes(inside, new, tmp_path, whole, monkeypatch):
    save, count = torch.save, []

    def full(state, file, *rest, **kwargs):
        count.extend([0] if "replay" in state else [])
        if len(count) == 2:
            (file if hasattr(file, "write") else open(file, "wb")).write(b"half")
            raise OSError(28, "No space left on device")
        return save(state, file, *rest, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    code, _, error = inside(*new)
    run = only(tmp_path / "runs")
    refused(code, error, "--run-dir", run / "checkpoint.pt", "No space left on device", "--resume")
    assert not list(run.glob("*.tmp")) and checkpoint(run)["loop"]["global_step"] == 0
    monkeypatch.undo()
    assert inside("--resume", run)[0] == 0
    assert_same_run(whole, run)


def test_a_real_write_error_of_torch_stops_with_a_sentence(new, tmp_path, whole):
    """A limit on the size of files instead of a full disk: torch's own writer fails, half-way through a file."""
    limit = int(0.8 * (whole / "checkpoint.pt").stat().st_size)
    done = process(*new, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    run = only(tmp_path / "runs")
    refused(done.returncode, done.stderr, "--run-dir", run / "checkpoint.pt")
    assert not list(run.glob("*.tmp")) and checkpoint(run)["loop"]["global_step"] >= 0


# --- losses that are no numbers ---


def test_a_non_finite_loss_stops_the_run(inside, new, tmp_path):
    code, _, error = inside(*new, *SHORT.split(), "--lr", "1e30")
    refused(code, error, "--lr 1e+30", "not finite")
    run = only(tmp_path / "runs")
    assert finite(checkpoint(run)) and all(math.isfinite(float(v)) for row in metrics(run) for v in row.values() if v)


@pytest.fixture
def poison(monkeypatch):
    """poison(n): the n-th optimiser step of a run writes a NaN into a weight."""
    step, count = torch.optim.Adam.step, []

    def start(n):
        count.clear()

        def poisoned(self, *rest):
            step(self, *rest)
            count.append(0)
            if len(count) == n:
                self.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

        monkeypatch.setattr(torch.optim.Adam, "step", poisoned)

    return start


def test_the_last_good_checkpoint_outlives_a_non_finite_loss(inside, new, tmp_path, poison):
    poison(400)
    code, _, error = inside(*new)
    run = only(tmp_path / "runs")
    refused(code, error, "not finite", run)
    assert checkpoint(run)["loop"]["gradient_steps"] > 0 and finite(checkpoint(run))


def test_a_signal_does_not_save_what_is_not_finite(inside, new, tmp_path, poison, signal_when):
    """The loss is only looked at when a row is due; a signal before that saves, and must not spoil the checkpoint."""
    poison(10)
    signal_when(signal.SIGTERM, lambda n: n == 60)
    inside(*new, "--log-every", 100_000, "--eval-every", 100_000)
    assert finite(checkpoint(only(tmp_path / "runs")))


# --- what is refused ---


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--env-id Hoper-v4", ["--env-id Hoper-v4", "did you mean Hopper-v4", "Walker2d-v5", "HalfCheetah-v4"]),
        ("--env-id halfcheetah-v5", ["--env-id halfcheetah-v5", "did you mean HalfCheetah-v5"]),
        ("--delta -0.1", ["--delta -0.1"]),
        ("--delta nan", ["--delta nan"]),
        ("--lr 0", ["--lr 0"]),
        ("--gamma 1.5", ["--gamma 1.5"]),
        ("--tau 2", ["--tau 2"]),
        ("--alpha-init 0", ["--alpha-init 0", "--dual linear"]),
        ("--noise-bound -1", ["--noise-bound -1"]),
        ("--reward-scale 0", ["--reward-scale 0"]),
        ("--num-envs 0", ["--num-envs 0: must lie in [1, "]),
        ("--backbone nowhere.pt", ["--backbone nowhere.pt", "backbones/", "pretrain_backbone.py"]),
        ("--env-id Walker2d-v5", ["--backbone", "Hopper-diffusion.pt", "11 obs", "Walker2d-v5", "17"]),
        ("--env-id Hopper-v3", ["--env-id Hopper-v3"]),
        ("--device cuda:99", ["--device cuda:99"]),
        ("--device abacus", ["--device abacus"]),
        ("--resume nowhere", ["--resume nowhere", "no run"]),
    ],
)
def test_refused_before_anything_starts(inside, new, tmp_path, flags, parts):
    code, _, error = inside(*new, *flags.split())
    refused(code, error, *parts)
    assert not (tmp_path / "runs").exists()


def test_refused_by_tyro_as_by_argparse(inside, new):
    for flag in (["--dual", "cubic"], ["--delta", "big"], ["--no-such-flag"]):
        code, out, error = inside(*new, *flag)
        assert code == 2 and flag[-1] in out + error and "Traceback" not in out + error


def test_a_run_folder_that_cannot_be_made_is_refused(inside, new, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, error = inside(*new, "--run-dir", tmp_path / "file")
    refused(code, error, "--run-dir", tmp_path / "file")


def test_the_script_runs_alone_in_an_empty_folder(new, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("lpds_continuous.py", "entropy.py"):
        shutil.copy(ROOT / name, alone)
    environment = {key: value for key, value in ENV.items() if key != "PYTHONPATH"}
    start = [sys.executable, "lpds_continuous.py"]
    done = subprocess.run([*start, "--env-id", "Hopper-v4"], cwd=alone, env=environment, capture_output=True, text=True)
    refused(done.returncode, done.stderr, "--backbone", COMMITTED.name, "backbones/", "pretrain_backbone.py")
    done = subprocess.run(
        [*start, *map(str, new), *SHORT.split(), "--run-dir", "runs"],
        cwd=alone, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in only(alone / "runs").iterdir()} == {
        *("args.json", "metrics.csv", "eval.npz", "checkpoint.pt", "best.pt", "backbone.pt", "curves.png"),
    }


def test_resume_refuses_another_experiment(inside, stopped_copy):
    for flags in (["--delta", "0.1"], ["--seed", "7"], ["--env-id", "Hopper-v5"], ["--no-lagrangian"]):
        code, _, error = inside("--resume", stopped_copy, *flags)
        refused(code, error, *(flags if flags[1:] else ["--lagrangian"]), stopped_copy)


def test_resume_with_a_larger_budget_goes_on(inside, stopped_copy, whole):
    assert inside("--resume", stopped_copy, "--total-timesteps", 2000)[0] == 0
    rows, before = metrics(stopped_copy), metrics(whole)
    assert 2000 <= int(rows[-1]["global_step"]) < 2010
    assert rows[: len(before) - 1] == before[:-1]  # the last row of the shorter run is there because it ended


def test_a_larger_budget_is_remembered_by_the_next_resume(inside, stopped_copy, signal_when, monkeypatch):
    """The command that a stopped run names goes on to the budget that the run had."""
    signal_when(signal.SIGTERM, lambda n: int(metrics(stopped_copy)[-1]["global_step"]) > 1700)
    code, _, error = inside("--resume", stopped_copy, "--total-timesteps", 2000)
    assert code == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert inside(*resume_flags(error, stopped_copy))[0] == 0
    assert int(metrics(stopped_copy)[-1]["global_step"]) >= 2000


def test_resume_of_a_finished_run_changes_nothing(inside, whole, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    assert inside("--resume", run)[0] == 0
    assert_same_run(whole, run)


def test_resume_with_less_than_was_done_is_no_crash(inside, whole, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    code, _, error = inside("--resume", run, "--total-timesteps", 300)
    if code:
        refused(code, error, "--total-timesteps 300")
    assert_same_run(whole, run)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


def nothing(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def pickled(path):
    path.write_bytes(b"cposix\nsystem\n(S'touch /tmp/lpds-was-run'\ntR.")  # what weights_only is there for


def another(path):
    torch.save({"weights": torch.zeros(3)}, path)


def other_sizes(path):
    state = torch.load(path, weights_only=True)
    state["agent"] = {name: torch.zeros(3) for name in state["agent"]}
    torch.save(state, path)


@pytest.mark.parametrize("damage", [truncated, nothing, missing, pickled, another, other_sizes])
def test_a_damaged_checkpoint_is_refused(inside, stopped_copy, damage):
    damage(stopped_copy / "checkpoint.pt")
    code, _, error = inside("--resume", stopped_copy)
    refused(code, error, "--resume", stopped_copy / "checkpoint.pt")


# --- every branch, with updates ---


def column(rows, name):
    return np.array([float(row[name]) for row in rows if row.get(name)])


VARIANTS = {
    "default": "",
    "sum": "--delta-norm sum",
    "linear": "--dual linear",
    "bounded": "--noise-bound 1.5",
    "no lagrangian": "--no-lagrangian --noise-bound none",
    "LP-DS-A": "--perturb action",
    "no distillation": "--distill-steps 0",
    "raw rewards": "--reward-scale 1.0",
    "no prior": "--prior-steps 0 --warmup-steps 0",
    "one environment": "--num-envs 1 --train-freq 3",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_and_log_what_they_are(inside, new, tmp_path, variant):
    code, _, error = inside(*new, *SHORT.split(), "--lr", "0.003", *VARIANTS[variant].split())
    assert code == 0, error
    run = only(tmp_path / "runs")
    rows, agent = metrics(run), checkpoint(run)["agent"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert agent["perturbation.9.bias"].abs().max() > 0 and column(rows, "gradient_steps")[-1] > 50
    sq_norm, kl = column(rows, "trust_region/sq_norm"), column(rows, "trust_region/kl")
    alpha, saturated = column(rows, "trust_region/alpha"), column(rows, "trust_region/saturated")
    if variant != "LP-DS-A":
        np.testing.assert_allclose(kl, 0.5 * sq_norm * (1 if variant == "sum" else 12), rtol=1e-5)
    np.testing.assert_allclose(column(rows, "trust_region/violation"), sq_norm / 0.5 - 1, rtol=1e-4, atol=1e-6)
    assert (alpha == 0).all() if variant == "no lagrangian" else (alpha > 0).all() and (alpha != 1).all()
    assert 0.05 < saturated.mean() < 0.5 if variant == "bounded" else not saturated.any()
    latent = variant not in ("LP-DS-A", "no distillation")
    assert len(kl) == len(saturated) == (0 if variant == "LP-DS-A" else len(sq_norm))  # they are about noise
    assert ("losses/q_w" in rows[-1]) == latent and ("losses/q_w_corr" in rows[-1]) == (variant != "LP-DS-A")
    assert (agent["reward_scale"] == 1) == (variant == "raw rewards")  # with auto it is set, prior roll-outs or none


OTHERS = [("Walker2d-v5", "diffusion"), ("HalfCheetah-v5", "flow"), ("Hopper-v5", "flow")]


@pytest.mark.parametrize("env_id, kind", OTHERS)
def test_other_environments_and_flow_decoders(inside, new, tmp_path, tiny_backbone, env_id, kind):
    flags = ["--env-id", env_id, "--backbone", tiny_backbone(env_id.split("-")[0], kind), *SHORT.split()]
    code, _, error = inside(*new, *flags, "--eval-every", 10_000, "--eval-episodes", 1)
    assert code == 0, error
    state = checkpoint(only(tmp_path / "runs"))
    assert state["loop"]["global_step"] >= 700 and state["agent"]["perturbation.9.bias"].abs().max() > 0


def test_steps_are_primitive_steps_of_training_and_none_is_lost(inside, new, tmp_path, monkeypatch):
    step, count = HopperEnv.step, []
    monkeypatch.setattr(HopperEnv, "step", lambda env, action: count.append(0) or step(env, action))
    assert inside(*new, *SHORT.split())[0] == 0
    run = only(tmp_path / "runs")
    state, rows = checkpoint(run), metrics(run)
    with np.load(run / "eval.npz") as evals:
        assert len(count) == state["loop"]["global_step"] + evals["length"].sum()
        assert evals["return"].shape == (len(evals["global_step"]), 2)
        means = dict(zip(evals["global_step"], evals["return"].mean(1)))
    for row in rows:
        if row["eval/episodic_return"]:
            assert float(row["eval/episodic_return"]) == pytest.approx(means[int(row["global_step"])])
            assert float(row["eval/frozen_return"]) == pytest.approx(means[0])
    logged = [int(row["global_step"]) for row in rows]
    assert [b // 100 - a // 100 for a, b in zip(logged, logged[1:])] == [1] * 7  # a row each 100 steps, from 0 to 700
    assert sorted(means)[0] == 0 and [step // 300 for step in sorted(means)] == [0, 1, 2, 2]  # and at the end


def test_replay_holds_the_real_next_observations(whole):
    """Rows of the two environments alternate: next_obs is the obs two rows on, unless the episode ended there."""
    replay = checkpoint(whole)["replay"]
    obs, next_obs, over = replay["obs"], replay["next_obs"], replay["terminated"] == 1
    follows = (next_obs[:-2] == obs[2:]).all(1)
    assert over.any() and torch.equal(follows, ~over[:-2])
    height, angle = next_obs[:, 0] * 2, next_obs[:, 1] * 2  # the tiny decoder's ranges are -2 to 2
    healthy = (height > 0.7) & (angle.abs() < 0.2) & (next_obs[:, 1:].abs() < 50).all(1)
    assert torch.equal(healthy, ~over)
    assert replay["action"].abs().max() <= 1


def test_rows_and_pages(whole):
    """Every column is explained in the page, and what the contract asks for is there."""
    page, rows = (ROOT / "docs" / "lpds_continuous.md").read_text(), metrics(whole)
    assert [key for key in rows[-1] if f"`{key}`" not in page] == []
    wanted = "charts/episodic_return charts/episodic_length charts/success losses/q_a losses/q_w losses/perturbation "
    wanted += "losses/q_a_value losses/q_w_value losses/q_w_corr trust_region/alpha trust_region/delta "
    wanted += "trust_region/sq_norm trust_region/violation trust_region/kl trust_region/saturated entropy/action "
    wanted += "entropy/action_frozen entropy/ties eval/episodic_return eval/success eval/frozen_return "
    wanted += "eval/frozen_success global_step gradient_steps"
    assert set(wanted.split()) == set(rows[-1])
    settings = json.loads((whole / "args.json").read_text())
    assert settings["delta"] == 0.5 and settings["hidden_size"] == 16  # a preset's value and a flag's, resolved
    versions = checkpoint(whole)["versions"]
    assert versions["torch"] == torch.__version__ and versions["gymnasium"] == gym.__version__


# --- trackers ---


def test_wandb_offline_writes_into_the_run_folder(new, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    environment = ENV | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = process(*new, *SHORT.split(), "--track", env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    run = only(tmp_path / "runs")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize("where", ["import", "init", "log"])
def test_a_failing_tracker_warns_and_training_goes_on(inside, new, tmp_path, monkeypatch, where):
    fail = 'raise RuntimeError("the tracker is down")'
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        f"{fail if where == 'import' else ''}\n"
        f"class Run:\n    def log(self, *a, **k):\n        {fail}\n    def finish(self, *a, **k):\n        pass\n"
        f"def init(**kwargs):\n    {fail if where == 'init' else 'return Run()'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        code, _, error = inside(*new, *SHORT.split(), "--track")
    finally:
        sys.modules.pop("wandb", None)
    assert code == 0 and error.count("warning: --track") == 1 and "the tracker is down" in error
    assert (only(tmp_path / "runs") / "curves.png").exists()


# --- the committed decoder ---

COMMITTED = ROOT / "backbones" / "hopper-v4-medium-diffusion.pt"


def test_the_committed_decoder_scores_what_its_card_says(tmp_path):
    if not COMMITTED.exists():
        pytest.skip(f"{COMMITTED.relative_to(ROOT)} is not there: the default command has no decoder to run with")
    card = torch.load(COMMITTED, weights_only=True)["card"]
    budget = "--env-id Hopper-v4 --total-timesteps 3000 --prior-steps 1000 --warmup-steps 500 --no-progress"
    done = process(*budget.split(), "--run-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(only(tmp_path) / "eval.npz") as evals:
        assert evals["return"].shape == (2, 20)
        frozen = evals["return"][0]
    error = math.hypot(frozen.std() / 20**0.5, card["frozen_return_std"] / card["eval_episodes"] ** 0.5)
    assert abs(frozen.mean() - card["frozen_return"]) < 4 * error + 1
    last = metrics(only(tmp_path))[-1]
    assert int(last["gradient_steps"]) > 300 and float(last["trust_region/sq_norm"]) > 0


def test_every_known_environment_has_a_decoder():
    """What the first command of the docs needs, for -v4 and -v5: a file that fits, with a score in its card."""
    import lpds_continuous

    for env_id in lpds_continuous.KNOWN_ENVS:
        decoder, _, card = lpds_continuous.load_decoder(lpds_continuous.parse_args(["--env-id", env_id]))
        assert card["frozen_return"] > 1000 and card["eval_episodes"] == 100
        assert card["recipe"]["sample_steps"] == decoder.config["sample_steps"] == len(decoder.times)


def test_the_banner_and_the_way_back(inside, new, tmp_path, tiny_backbone, signal_when):
    """What was resolved, which decoder, how long; and a resume command that survives a shell, spaces included."""
    home = tmp_path / "two words"
    signal_when(signal.SIGTERM, lambda n: n == 100)
    code, out, error = inside(*new, "--run-dir", home, "--total-timesteps", 1600)
    checksum = hashlib.sha256(tiny_backbone().read_bytes()).hexdigest()[:12]
    assert code == 128 + signal.SIGTERM and checksum in out and "Ta 4" in out and "d 12" in out
    assert "'delta': 0.5" in out and "minutes to go" in out and "return" in out
    command = shlex.split(error.strip().splitlines()[-1].split("go on with: ")[1])
    assert command[0] == "python" and command[2:] == ["--resume", str(only(home))]
