"""benchmark/run.py: its specs make the commands meant, its sweep skips, retries and resumes, its
results are what benchmark/plot.py reads. Training is played by a small fake script."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "baselines")]
import plot  # noqa: E402
import run as bench  # noqa: E402

# Takes flags in pairs, and leaves what a script leaves; evaluates at 0, 50 and 100
FAKE = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
mood = flags.get("--mood")
folder = Path(flags.get("--resume") or f"{flags['--run-dir']}/{flags['--env-id']}__fake__1")
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts.txt").open("a") as file:
    print(flags.get("--resume", "new"), os.environ["OMP_NUM_THREADS"], file=file)
if mood == "fails":
    sys.exit(print("the reason is told here") or 3)
args = {"seed": int(flags["--seed"]), "run_dir": str(folder)}
args |= {"backbone": f"{os.getcwd()}/backbones/some.pt"}
(folder / "args.json").write_text(json.dumps(args))
steps = np.load(folder / "eval.npz")["global_step"].tolist() if "--resume" in flags else []
while mood != "idles" and 100 not in steps:
    steps.append(50 * len(steps))
    (folder / "checkpoint.pt").touch()
    rows = [f"{step},{0.6 * step},{-0.25 if step else ''}" for step in steps]
    rows = ["global_step,wall_seconds,trust_region/violation", *rows, ""]
    (folder / "metrics.csv").write_text(chr(10).join(rows))
    returns = np.array([[step, step + 2] for step in steps])
    arrays = {"return": returns, "length": returns, "success": returns > 0, "path": returns}
    np.savez(folder / "eval.npz", global_step=steps, **arrays)
    if steps[-1] == 50 and mood == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if steps[-1] == 50 and mood == "is stopped":
        sys.exit("stopped; go on with: this")
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """spec(arms=..., seeds=...) -> path of a spec of runs of the fake script."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "fake.py").write_text(FAKE)

    def write(**keys):
        known = {"script": str(tmp_path / "fake.py"), "envs": ["Hopper-v4"], "arms": {"x": {}}}
        known |= {"flags": "--total-timesteps 100"} | keys
        (tmp_path / "fake.yaml").write_text(json.dumps(known))
        return str(tmp_path / "fake.yaml")

    return write


def moody(*moods) -> dict:
    return {mood: {"flags": f"--mood '{mood}'"} for mood in moods}


def starts(run) -> list:
    return (run.home / "Hopper-v4__fake__1/starts.txt").read_text().splitlines()


def write_final(run, **changes):
    """What enjoy.py --json writes after the last step."""
    folder = run.home / "Hopper-v4__fake__1"
    folder.mkdir(parents=True, exist_ok=True)
    final = {"env_id": run.env_id, "script": "fake.py", "global_step": 100, "seed": 1}
    final |= {"episodes": run.final_episodes, "temperatures": [float(t) for t in run.temperatures]}
    for who, score in (("frozen", 10.0), ("steered", 20.0)):
        final[who] = {}
        for tau in run.temperatures:
            episodes = {key: [score + tau] * 3 for key in ("return", "length", "success")}
            final[who][f"{tau:g}"] = episodes | {"entropy": score, "ties": 0.0}
    (folder / "final.json").write_text(json.dumps(final | changes))


SPECS = sorted(str(p.relative_to(bench.SPECS).with_suffix("")) for p in bench.SPECS.rglob("*.yaml"))
TOTALS = {"continuous": 100_000, "adroit": 160_000, "continuous/long": 10**6, "paper": 10**6}
HOW = dict(capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("name", SPECS)
def test_commands_of_a_committed_spec_are_parsed_by_their_scripts(tmp_path, monkeypatch, name):
    for run in bench.load_spec(name, tmp_path):
        _, script, *flags = bench.plan(run)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        args = import_module(Path(script).stem).parse_args()
        assert (args.env_id, args.seed, args.run_dir) == (run.env_id, run.seed, str(run.home))
        total = TOTALS.get(run.spec, TOTALS.get(run.spec.split("/")[0], run.total))
        assert args.total_timesteps == run.total == total
        backbone = getattr(args, "backbone", "libero57-tiny-pi0.pt")
        file = torch.load(ROOT / "backbones" / backbone, weights_only=True)
        assert file["card"]["env_id"].split(":")[-1].startswith(run.env_id)
        assert "flow" not in run.arm or file["kind"] == "flow"
        for flag, value in (part.split("=") for part in run.arm.split() if "=" in part):
            assert getattr(args, flag.replace("-", "_")) == float(value)  # as the label says


def test_arms_go_before_the_spec_and_included_specs_come_first(tmp_path, spec):
    (tmp_path / "base.yaml").write_text(Path(spec()).read_text())
    own = {"flags": "--total-timesteps 9", "seeds": [6], "resources": {"num_gpus": 0.5}}
    grid = {"envs": {"E/1": "--bound 2"}, "grid": {"m": ["a", "b"], "n": [0.5]}}
    name = spec(include=[f"{tmp_path}/base.yaml"], arms={"Ä b, c": own, "g": grid})
    first, second, *others = bench.load_spec(name, tmp_path)
    assert (first.spec, first.label, first.total) == ("base", "Hopper-v4__x__1", 100)
    assert (second.label, second.total) == ("Hopper-v4__-b-c__6", 9)
    assert second.resources == {"num_cpus": 1, "num_gpus": 0.5}
    assert [run.label for run in others] == [f"E-1__g-m={m}-n=0.5__1" for m in "ab"]
    assert others[0].flags == "--total-timesteps 100 --bound 2 --m a --n 0.5"


MISTAKES = {
    "unknown key 'sedes'; known are": {"sedes": [1]},
    "seeds must be like [1], not 3": {"seeds": 3},
    "need --total-timesteps and a whole number": {"flags": "--total-timesteps 1e5"},
    "Hopper-v4__a-b__1 is there twice": {"arms": {"a b": {}, "a-b": {}}},
    "grid must hold lists like delta: [0.1, 1], not": {"grid": {"delta": "0.1"}},
    "nowhere: no such spec; give one of adroit/ablation,": {"include": ["nowhere"]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_in_a_spec_are_told_in_one_sentence(tmp_path, spec, capsys, message):
    with pytest.raises(SystemExit):
        bench.load_spec(spec(**MISTAKES[message]), tmp_path)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_what_a_run_needs_next_and_1_000_steps_are_a_thousand(tmp_path, spec):
    flags = "--total-timesteps 1_000 --k v"
    (run,) = bench.load_spec(spec(flags=flags, final_episodes=3, temperatures=[1, 0.5]), tmp_path)
    train = f"{run.script} {flags} --env-id Hopper-v4 --seed 1"
    folder = run.home / "Hopper-v4__fake__1"
    folder.mkdir(parents=True)  # of a start that has died before its first checkpoint
    assert bench.plan(run)[1:] == f"{train} --run-dir {run.home}".split()
    (folder / "checkpoint.pt").touch()
    np.savez(folder / "eval.npz", **{"global_step": [0, 1], "return": np.ones((2, 3))})
    assert bench.plan(run)[1:] == f"{train} --resume {folder}".split()
    np.savez(folder / "eval.npz", **{"global_step": [0, 1_000], "return": np.ones((2, 3))})
    evaluate = f"enjoy.py {folder} --episodes 3 --temperature 1 0.5 --json {folder}/final.json"
    assert bench.plan(run)[1:] == evaluate.split()
    for wrong in ({"episodes": 2}, {"temperatures": [1.0]}, {"global_step": 50}):
        write_final(run, **{"global_step": 1_000} | wrong)
        assert bench.plan(run)[1:] == evaluate.split()
    write_final(run, global_step=1_000)
    assert bench.plan(run) is None
    again = shutil.copytree(folder, run.home / "Hopper-v4__fake__2")  # trained anew by hand
    (again / "final.json").unlink()
    assert bench.plan(run)[2] == str(again)


def test_a_killed_run_goes_on_and_no_other_is_tried_again(tmp_path, spec, monkeypatch):
    arms = moody("dies", "fails", "idles", "is stopped")
    arms["dies"]["seeds"] = [1, 2]
    dies, dies_again, fails, idles, stopped = bench.load_spec(spec(arms=arms), tmp_path)
    assert bench.work(dies) == "finished" and bench.work(stopped) == "stopped"
    assert [bench.work(run)[-1] for run in (fails, idles)] == ["3", "0"]  # exit codes
    assert starts(dies) == ["new 1", f"{dies.home}/Hopper-v4__fake__1 1"]
    assert bench.returns_of(dies)[0].tolist() == [0, 50, 100]
    assert len(starts(fails)) == len(starts(idles)) == len(starts(stopped)) == 1
    notes = [json.loads(line) for line in (dies.home / "starts.jsonl").open()]
    blob = subprocess.run(["git", "hash-object", dies.script], capture_output=True, text=True)
    assert [note["script_blob"] for note in notes] == 2 * [blob.stdout.strip()]
    assert bench.work(dies) == "finished" and len(starts(dies)) == 2
    monkeypatch.setattr(bench, "RETRIES", 0)
    assert bench.work(dies_again) == "FAILED with exit code -9"
    plans = iter(5 * [[sys.executable, "-c", ""]])  # which does not help
    monkeypatch.setattr(bench, "plan", lambda run: next(plans))
    assert bench.work(fails) == "FAILED with exit code 0"


def test_two_sweeps_never_train_the_same_run(tmp_path, spec, monkeypatch):
    (run,) = bench.load_spec(spec(), tmp_path)
    run.home.mkdir(parents=True)
    with (run.home / "log.txt").open("a") as other, monkeypatch.context() as patch:
        fcntl.flock(other, fcntl.LOCK_EX)
        patch.delattr(bench.time, "sleep")
        with pytest.raises(AttributeError):  # it would wait
            bench.work(run)
    assert not (run.home / "starts.jsonl").exists() and bench.work(run) == "finished"


def command(tmp_path, name, *more) -> list:
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "out")]
    return [sys.executable, "benchmark/run.py", name, *where, *more]


def test_results_are_what_plot_reads_and_name_no_place(tmp_path, spec, capsys):
    arms = moody("works", "is stopped")
    arms["works"]["seeds"] = [1, 2]
    name, out = spec(arms=arms, final_episodes=3), tmp_path / "out"
    runs = done, second, stopped = bench.load_spec(name, tmp_path / "runs")
    for run in runs:
        write_final(run)
        bench.work(run)
    bench.collect(runs, out)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{done.label}: finished, step 100 of 100, return 101 (frozen 1)"
    assert said[2].startswith(f"{stopped.label}: UNFINISHED, step 50 of 100")
    _, (first, _, third) = plot.load(name, out)
    assert (first["seed"], first["steps"], first["minutes"]) == (1, 100, 1.0)
    assert first["left_out"] == "" and third["left_out"] == "is at step 50 of 100"
    assert first["evals"]["return"].tolist() == [[0, 2], [50, 52], [100, 102]]
    assert plot.episodes(first, "steered", 1, "return").tolist() == [21, 21, 21]
    assert plot.episodes(first, "frozen", 0, "success").tolist() == [10, 10, 10]
    assert plot.entropy(first, "steered", 1) == 10 and plot.late(first, "budget") == 0.75
    assert first["args"] == {"seed": 1, "backbone": "backbones/some.pt"}
    assert "path" in np.load(out / f"fake/{done.label}.npz")
    assert "path" not in np.load(out / f"fake/{second.label}.npz")  # of the first seed alone
    text = "".join(path.read_text() for path in out.rglob("*.[cj]s*"))
    places = ROOT, run.home, Path.home()
    assert first["starts"] and not [place for place in places if f"{place}/" in text]


def test_robosuite_can_draw_in_a_run_that_sees_no_gpu(tmp_path, spec):
    [run] = bench.load_spec(spec(arms=moody("works")), tmp_path)
    code = "from robosuite.renderers.context.egl_context import *; GLContext = EGLGLContext(9, 9)"
    env = os.environ | {"MUJOCO_GL": "egl"}
    if subprocess.run([sys.executable, "-c", code], env=env, **HOW).returncode:
        pytest.skip("nothing can be drawn here at all")
    done = subprocess.run([sys.executable, "-c", code], env=env | bench.environment(run), **HOW)
    assert done.returncode == 0, done.stderr


def test_a_spec_edited_after_its_runs_is_not_given_their_results(tmp_path, spec, capsys):
    [run] = bench.load_spec(spec(arms=moody("works")), tmp_path / "runs")
    bench.work(run)
    edited = replace(run, flags=run.flags + " --lr 1")
    with pytest.raises(SystemExit):
        bench.collect([edited], tmp_path / "out")
    assert "rename its arm" in capsys.readouterr().err and not list(tmp_path.glob("out/*/*.json"))


def test_printed_commands_do_by_hand_what_the_sweep_would_do_without_ray(tmp_path, spec):
    name = spec(arms=moody("works", "fails"))
    (tmp_path / "ray.py").write_text("raise ImportError('as if Ray were not installed')")
    how = HOW | {"env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    for state in ("--run-dir", "is finished"):
        result = subprocess.run(command(tmp_path, name, "--dry-run", "--only", "works"), **how)
        (line,) = result.stdout.splitlines()
        assert state in line and result.returncode == 0
        assert subprocess.run(line, shell=True, cwd=ROOT).returncode == 0
    result = subprocess.run(command(tmp_path, name), **how)
    assert result.returncode == 2 and result.stderr.startswith("error: no Ray: pip install")


@pytest.mark.slow
def test_a_sweep_on_ray_trains_evaluates_and_collects(tmp_path, spec, tiny_backbone):
    flags = f"--backbone {tiny_backbone()} --prior-steps 200 --warmup-steps 0 --num-envs 1 --utd 2 "
    flags += "--total-timesteps 400 --eval-episodes 2 --hidden-size 16 --batch-size 8 --device cpu"
    real = {"script": "lpds_continuous.py", "flags": flags, "final_episodes": 2}
    name = spec(arms={"LP-DS": real} | moody("dies", "fails"))
    runs = {run.arm: run for run in bench.load_spec(name, tmp_path / "runs")}
    sweep = subprocess.run(command(tmp_path, name, "--jobs", "2"), **HOW)
    assert sweep.returncode == 1 and sweep.stdout.count("the reason is told here") == 1
    assert len(starts(runs["dies"])) == 2 and len(starts(runs["fails"])) == 1
    _, found = plot.load(name, tmp_path / "out")
    assert {r["arm"]: r["left_out"] for r in found} == {"LP-DS": "", "dies": ""}
