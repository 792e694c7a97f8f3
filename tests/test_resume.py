"""A run that is killed at random moments and resumed is the run that nothing disturbed, to the bit:
metrics.csv but for its clock, eval.npz, weights, optimisers, replay, best.pt."""

import itertools
import os
import random
import shlex
import signal
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import ROOT, assert_same_run, call, finish, load, metrics, only_run, refused

TINY = (
    "--hidden-size 16 --batch-size 32 --utd 2 --num-envs 2 --eval-episodes 2 --prior-steps 200 "
    "--warmup-steps 100 --eval-every 300 --total-timesteps 1200"
).split()
OFTEN = "--log-every 100 --distill-steps 2".split()
ALONE = [*OFTEN, "--num-envs", "1"]  # an episode of 200 steps ends between two evaluations
SHORT = """--distill-steps 2 --log-every 10 --num-envs 1 --eval-episodes 1 --prior-steps 20
    --warmup-steps 10 --eval-every 30 --total-timesteps 120""".split()
ROLLOUTS = "--log-every 300 --rollout-steps 150".split()

# script, environment, its tiny decoder, further flags
RUNS = [
    ("lpds_continuous.py", "Hopper-v4", ("Hopper", "diffusion"), OFTEN),
    ("lpds_continuous.py", "Pendulum-v1", ("Pendulum", "flow"), OFTEN),
    ("lpds_adroit_flow.py", "AdroitHandPen-v1", ("AdroitHandPen", "flow"), ALONE),
    ("lpds_toy.py", "MultiGoal-v0", ("MultiGoal", "flow"), []),
    ("lpds_robomimic.py", "PickPlaceCan", ("PickPlaceCan", "diffusion"), SHORT),
    ("baselines/dsrl_continuous.py", "Hopper-v4", ("Hopper", "diffusion"), OFTEN),
    ("baselines/lpds_action_continuous.py", "Hopper-v4", ("Hopper", "flow"), OFTEN[:2]),
    ("baselines/dppo_continuous.py", "Hopper-v4", ("Hopper", "diffusion"), ROLLOUTS),
    ("baselines/dql_continuous.py", "Hopper-v4", ("Hopper", "diffusion"), OFTEN[:2]),
    ("baselines/idql_continuous.py", "Hopper-v4", ("Hopper", "diffusion"), OFTEN[:2]),
    ("baselines/dsrl_adroit_flow.py", "AdroitHandPen-v1", ("AdroitHandPen", "flow"), OFTEN),
    ("baselines/dsrl_toy.py", "MultiGoal-v0", ("MultiGoal", "flow"), []),
    ("baselines/dppo_toy.py", "MultiGoal-v0", ("MultiGoal", "diffusion"), ROLLOUTS[2:]),
]


def known(script: str, flags: list) -> list:
    """Those of flags with values that a script has."""
    fields = load(script).Args.__dataclass_fields__
    pairs = zip(flags[::2], flags[1::2])
    return [x for pair in pairs if pair[0][2:].replace("-", "_") in fields for x in pair]


@pytest.fixture
def moments():
    seed = time.time_ns() % 10**6
    print(f"random.Random({seed})")
    return random.Random(seed)


def prepare(script: str, then=None) -> None:
    """In the process of a run, ahead of it: robosuite's episodes become short enough for a test."""
    if "robomimic" in script:
        gym.make = partial(gym.make, max_episode_steps=15)
    return then() if then else None


def die_at_file(number: int, renamed: bool, name="") -> None:
    """SIGKILL at the n-th file (of that name) to be written: half of it there, or just renamed."""
    replace, count = Path.replace, itertools.count(1)

    def dying(path, target):
        if not target.name.endswith(name) or next(count) < number:
            return replace(path, target)
        if renamed:
            replace(path, target)
        else:
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = dying


def signal_at(number=0, moment=0):
    """Sends itself a signal at the n-th step, of its environments or down a gradient; a run that
    comes to its end leaves the number of them."""
    steps = []

    def counted(function):
        def wrapper(*args, **kwargs):
            steps.append(function)
            if len(steps) == moment:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return wrapper

    torch.Tensor.backward = counted(torch.Tensor.backward)
    gym.vector.SyncVectorEnv.step = counted(gym.vector.SyncVectorEnv.step)
    return lambda: Path("steps").write_text(str(len(steps)))


def way_back(error: str) -> list:
    """Flags of the command in the one line with which a stopped run ends."""
    assert error.startswith("stopped") and error.count("\n") == 1, error
    python, script, *flags = shlex.split(error[error.index("python ") :])
    assert python == "python" and flags[0] == "--resume"
    return flags


@pytest.mark.slow
@pytest.mark.parametrize("script, env_id, decoder, more", RUNS)
def test_killed_and_resumed_equals_undisturbed(
    script, env_id, decoder, more, tiny_backbone, tmp_path, moments
):
    flags = ["--env-id", env_id, "--backbone", tiny_backbone(*decoder)]
    kill_and_resume(script, [*flags, *known(script, TINY), *more], tmp_path, moments)


def kill_and_resume(script, flags, tmp_path, moments):
    ready = partial(prepare, script)
    whole = finish(tmp_path / "whole", script, *flags, before=partial(ready, signal_at))
    steps, folder = int((tmp_path / "whole" / "steps").read_text()), tmp_path / "parts"

    die = partial(die_at_file, moments.randint(2, 3), renamed=False, name="checkpoint.pt")
    codes = [call(folder, script, *flags, before=partial(ready, die))[0]]
    again = ["--resume", only_run(folder).relative_to(folder)]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    for number in moments.sample(signals, 1) if "robomimic" in script else signals:
        die = partial(signal_at, number, moments.randint(1, steps // 8))
        code, _, error = call(folder, script, *again, before=partial(ready, die))
        codes.append(code)
        if number != signal.SIGKILL:
            again = way_back(error)
    die = partial(die_at_file, moments.randint(1, 12), renamed=moments.random() < 0.5)
    codes.append(call(folder, script, *again, before=partial(ready, die))[0])
    assert all(codes[:-1]) and set(codes) <= {0, 1, -signal.SIGKILL}, codes

    parts = finish(folder, script, *again, before=ready)
    assert_same_run(whole, parts)
    refused(call(folder, script, *again, "--seed", 7), "--seed 7", "keeps its settings")
    again = finish(folder, script, *again, before=ready)
    assert_same_run(whole, again)  # a run that is over stays as it is


def test_a_longer_budget_continues_as_if_it_had_been_there_from_the_start(tiny_backbone, tmp_path):
    flags = ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), *TINY, *OFTEN]
    long = finish(tmp_path / "long", "lpds_continuous.py", *flags)
    short = finish(tmp_path / "short", "lpds_continuous.py", *flags, "--total-timesteps", 600)
    again = ["--resume", short]
    less = call(tmp_path / "short", "lpds_continuous.py", *again, "--total-timesteps", 500)
    refused(less, "--total-timesteps 500", "keeps its settings")
    finish(tmp_path / "short", "lpds_continuous.py", *again, "--total-timesteps", 1200)
    assert_same_run(long, short)
    finish(tmp_path / "short", "lpds_continuous.py", *again)  # and it is remembered
    assert_same_run(long, short)


def test_every_script_is_killed_here():
    scripts = {*ROOT.glob("lpds_*.py"), *ROOT.glob("baselines/*.py")}
    elsewhere = {ROOT / "lpds_libero_pi0.py"}  # in its own test, as it needs LIBERO
    elsewhere |= {ROOT / "baselines/dsrl_robomimic.py"}  # slow; test_lpds_robomimic.py resumes it
    assert {ROOT / script for script, *_ in RUNS} | elsewhere == scripts


def test_rows_more_or_less_often_change_no_training(tiny_backbone, tmp_path):
    flags = ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), *TINY, *OFTEN]
    often = finish(tmp_path / "often", "lpds_continuous.py", *flags)
    rarely = finish(tmp_path / "rarely", "lpds_continuous.py", *flags, "--log-every", 1000)
    assert len(metrics(rarely)) < len(metrics(often))
    assert metrics(rarely)[-1]["losses/q_a"] == metrics(often)[-1]["losses/q_a"]
