"""benchmark/run.py: its specs make the commands meant, its sweep skips, retries and resumes, its results are complete.

Everything is written below pytest's tmp_path (Ray: below /tmp/ray); training is mostly played by a small fake script.
"""

import importlib.util
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(f"tested_{Path(path).stem}", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load("benchmark/run.py")

# Takes flags in pairs. Ten steps at a time to 100, each followed by a checkpoint that --resume goes on from.
FAKE = """
import json, os, shutil, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags.get("--resume") or f"{flags['--run-dir']}/{flags['--env-id']}__fake__{flags['--seed']}__1700000001")
folder.mkdir(parents=True, exist_ok=True)
assert os.environ["OMP_NUM_THREADS"] == "1" and os.getcwd() == ROOT
step, here = int((folder / "step.txt").read_text()) if "--resume" in flags else 0, Path(__file__).parent
with (folder / "calls.txt").open("a") as f:
    f.write(f"{step} {' '.join(sys.argv[1:])}" + chr(10))
if (folder / "calls.txt").read_text().count(chr(10)) > 9:
    sys.exit(9)  # who starts it for ever is to fail, not to hang
if "--boom" in flags:
    print("boom: the reason is told here", flush=True)
    sys.exit(int(flags["--boom"]))
if "--suicide" in flags:
    os.kill(os.getpid(), signal.SIGKILL)
def save(*stop):
    rows = "global_step,wall_seconds,eval/episodic_return", "0,1,10", f"{step},120,77"
    (folder / "m.tmp").write_text(chr(10).join([*rows, ""]))
    os.replace(folder / "m.tmp", folder / "metrics.csv")
    (folder / "args.json").write_text(json.dumps(flags))
    (folder / "step.txt").write_text(str(step))
    for name in ("eval.npz", "checkpoint.pt"):
        shutil.copy(here / name, folder)
    if stop:
        sys.exit(143)
signal.signal(signal.SIGTERM, save)
if "--hang" in flags and "--resume" in flags:
    time.sleep(4)  # the table looks once a second: a retry that is done at once would never show
while step < 100:
    step += 10
    save()
    if step == 50 and "--hang" in flags and "--resume" not in flags:
        (folder / "pids.txt").write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path):
    """fake(arms, seeds) -> path of a spec of runs of the fake script, on Hopper-v4."""
    (tmp_path / "fake.py").write_text(f"ROOT = {str(ROOT)!r}\n" + FAKE)
    np.savez(tmp_path / "eval.npz", **{"global_step": [0, 100], "return": np.ones((2, 3)),
                                       "success": np.ones((2, 3)), "length": np.ones((2, 3))})  # fmt: skip
    torch.save({"versions": {"torch": "2"}, "cuda_rng": None}, tmp_path / "checkpoint.pt")

    def write(arms, seeds=(1,)):
        spec = {"script": str(tmp_path / "fake.py"), "flags": "--total-timesteps 100", "envs": ["Hopper-v4"]}
        path = tmp_path / "fake.yaml"
        path.write_text(yaml.safe_dump(spec | {"seeds": list(seeds), "arms": arms}, sort_keys=False))
        return path

    return write


def command(tmp_path, spec, *more) -> list:
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return [sys.executable, str(ROOT / "benchmark" / "run.py"), str(spec), *where, *more]


def write_run(run, steps, returns, columns=None, checkpoint=True):
    """A run folder as a script leaves it: `returns` (evaluations, episodes) at `steps`."""
    folder = run.home / f"{run.env_id}__lpds_continuous__{run.seed}__1700000000"
    folder.mkdir(parents=True)
    returns = np.asarray(returns, float)
    (folder / "args.json").write_text(json.dumps({"seed": run.seed, "delta": 0.5}))
    columns = {"global_step": steps, "wall_seconds": [60.0 * i for i in range(len(steps))],
               "eval/episodic_return": returns.mean(1)} | (columns or {})  # fmt: skip
    rows = [",".join("" if v is None else f"{v:.9g}" for v in row) for row in zip(*columns.values(), strict=True)]
    (folder / "metrics.csv").write_text("\n".join([",".join(columns), *rows]) + "\n")
    np.savez_compressed(folder / "eval.npz", **{"global_step": np.array(steps), "return": returns,
                        "success": returns > 0, "success_share": returns / 2_000,
                        "length": np.full(returns.shape, 1000)})  # fmt: skip
    if checkpoint:
        state = {"versions": {"torch": "2.6.0"}, "cuda_rng": None, "replay": torch.zeros(3)}
        torch.save(state, folder / "checkpoint.pt")
    return folder


def write_final(run, episodes):
    """final.json as enjoy.py writes it: three numbers per episode, others per policy."""

    def one(x):
        episodic = {"return": [x] * episodes, "success": [True] * episodes, "length": [9] * episodes}
        episodic["success_share"] = [x / 10] * episodes
        return episodic | {"entropy": -x, "ties": 0.0, "sq_norm": x, "ratio": None, "kl": 0.5}

    final = {"env_id": "-", "script": "-", "checkpoint": "-", "global_step": 9, "episodes": episodes, "seed": 2_000_000}
    (run.home / "final.json").write_text(json.dumps(final | {"frozen": one(1.5), "steered": one(2.5)}))


# --- Specs ---
def test_every_command_of_every_committed_spec_parses_and_is_the_experiment_meant(tmp_path):
    scripts = [
        f"{place}_{family}.py" for family in ("continuous", "adroit_flow") for place in ("lpds", "baselines/dsrl")
    ]
    parse = {name: load(name).parse_args for name in scripts}
    names = sorted(str(p.relative_to(bench.SPECS).with_suffix("")) for p in bench.SPECS.rglob("*.yaml"))
    known = "ablation bound", "ablation flow norm seeds updates"
    known = [f"{family}/{name}" for family, names in zip(("adroit", "continuous"), known) for name in names.split()]
    assert names == sorted(["adroit", "cpu", "gpu", *known])
    seen = {}
    for name in names:
        runs = bench.load_spec(name, tmp_path)
        for run in runs:
            args = parse[run.script](bench.plan(run)[2:])
            assert (args.env_id, args.seed, args.total_timesteps) == (run.env_id, run.seed, run.total)
            assert Path(args.run_dir) == run.home == tmp_path / run.spec / run.label and run.final_episodes == 200
            seen[run.home] = args
        seen[name] = {run.label for run in runs if run.spec == name}
    labels = lambda *arms: {f"{e}__{a}__{s}" for e in ENVS for a in arms for s in (1, 2, 3)}  # noqa: E731
    assert seen["continuous/seeds"] == labels("LP-DS") and seen["gpu"] == labels("LP-DS", "DSRL")
    assert seen["cpu"] == labels("DSRL", "DSRL-as-released")
    assert {run.spec for run in bench.load_spec("cpu", tmp_path)} == {"cpu", "continuous/seeds"}
    deltas = {"Hopper-v4": (0.1, 0.35, 0.5, 0.66), "Walker2d-v4": (0.1, 0.35, 0.66)}
    assert seen["continuous/norm"] == {"Walker2d-v4__LP-DS-mean__1"} | {
        f"{e}__LP-DS-delta-norm={n}-delta={d}__101" for e in deltas for n in ("sum", "mean") for d in deltas[e]
    }
    for label in seen["continuous/norm"]:  # what the label says is what the flags do
        args, words = seen[tmp_path / "continuous/norm" / label], label.replace("__", "-").split("-")
        assert f"norm={args.delta_norm}" in words or args.delta_norm in words
        assert f"delta={args.delta}" in words or args.delta == 0.35
    part = {
        label.split("__")[1]: seen[tmp_path / "continuous/ablation" / label] for label in seen["continuous/ablation"]
    }
    assert {k: (a.perturb, a.lagrangian, a.noise_bound, a.dual) for k, a in part.items()} == {
        "LP-DS-A": ("action", True, "none", "log"),
        "linear-dual": ("noise", True, "none", "linear"),
        "no-Lagrangian": ("noise", False, "none", "log"),
        "no-Lagrangian-bound-2.5": ("noise", False, 2.5, "log"),
    }
    hands = [f"AdroitHand{task}-v1" for task in ("Pen", "Hammer", "Door", "Relocate")]
    assert seen["adroit"] == {f"{e}__{arm}__{s}" for e in hands for arm in ("LP-DS", "DSRL") for s in (1, 2)}
    part = {label.split("__")[1]: seen[tmp_path / "adroit/ablation" / label] for label in seen["adroit/ablation"]}
    assert {k: (a.lagrangian, a.noise_bound, a.delta_norm) for k, a in part.items()} == {
        "without-Lagrangian": (False, 2.5, "mean"),
        "without-both": (False, "none", "mean"),
        "sum-over-d": (True, 2.5, "sum"),
    }
    assert {(a.preset, a.device) for path, a in seen.items() if isinstance(path, Path) and "gpu" in path.parts} == {
        ("paper", "cuda")
    }
    assert bench.load_spec("gpu", tmp_path)[0].resources == {"num_cpus": 2, "num_gpus": 0.25}


ENVS = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")


def test_arms_override_the_spec_and_includes_come_first(tmp_path):
    (tmp_path / "base.yaml").write_text("script: entropy.py\nenvs: [A/B]\nflags: --total-timesteps 5\narms: {x: }\n")
    text = """
    include: [base.yaml]
    script: entropy.py
    flags: --total-timesteps 7 --k v
    envs: [E1, E2]
    seeds: [4, 5]
    final_episodes: 3
    arms:
      plain:
      "Ä b, c": {script: enjoy.py, flags: --total-timesteps 9, envs: [E3], seeds: [6], resources: {num_gpus: 0.5}}
      g: {grid: {m: [sum, mean], n: [1, 0.5]}, envs: [E1], seeds: [1]}
    """
    (tmp_path / "top.yaml").write_text(text)
    runs = {run.label: run for run in bench.load_spec(str(tmp_path / "top.yaml"), Path("R"))}
    plain = [f"{e}__plain__{s}" for e in ("E1", "E2") for s in (4, 5)]
    grid = [f"E1__g-m={m}-n={n}__1" for m in ("sum", "mean") for n in (1, 0.5)]
    assert list(runs) == ["A-B__x__1", *plain, "E3__-b-c__6", *grid]
    own, base = runs["E3__-b-c__6"], runs["A-B__x__1"]
    assert base.home == Path("R/base/A-B__x__1") and base.env_id == "A/B" and base.final_episodes == 0
    assert (own.script, own.total, own.resources) == ("enjoy.py", 9, {"num_cpus": 1, "num_gpus": 0.5})
    assert own.flags.split() == "--total-timesteps 7 --k v --total-timesteps 9".split()
    assert runs["E1__g-m=sum-n=0.5__1"].arm == "g m=sum n=0.5"
    assert runs["E1__g-m=sum-n=0.5__1"].flags.endswith("--k v  --m sum --n 0.5") and own.final_episodes == 3


GOOD = {"script": "entropy.py", "envs": ["E"], "flags": "--total-timesteps 5", "arms": {"x": {}}}


@pytest.mark.parametrize(
    "text, message",
    [
        (yaml.safe_dump(GOOD | {"sedes": [1]}), "unknown key 'sedes'; known are title, include,"),
        (yaml.safe_dump(GOOD | {"arms": {"x": {"title": "t"}}}), "arm x: unknown key 'title'"),
        (yaml.safe_dump(GOOD | {"seeds": 3}), "seeds must be a list, and no empty one, not 3"),
        (yaml.safe_dump(GOOD | {"envs": []}), "envs must be a list, and no empty one, not []"),
        (yaml.safe_dump(GOOD | {"seeds": ["a"]}), "seeds must be whole numbers"),
        (yaml.safe_dump(GOOD | {"script": "no.py"}), "there is no script no.py"),
        (yaml.safe_dump(GOOD | {"flags": "--x 5"}), "arm x: its flags lack --total-timesteps"),
        (yaml.safe_dump(GOOD | {"resources": {"gpus": 1}}), "resources: unknown key 'gpus'; known are num_cpus"),
        (yaml.safe_dump(GOOD | {"arms": {"a b": {}, "a-b": {}}}), "arm a-b: E__a-b__1 is there already"),
        (yaml.safe_dump(GOOD | {"arms": {}}), "has neither arms nor runs"),
        (yaml.safe_dump(GOOD | {"include": ["spec.yaml"]}), "includes itself"),
        (
            yaml.safe_dump(GOOD | {"include": ["nowhere"]}),
            "nowhere: no such spec; give one of adroit, adroit/ablation, adroit/bound,",
        ),
        ("script: entropy.py\narms: {x: {}}", "arm x: lacks script or envs"),
        ("- a\n- b", "must hold `key: value` lines"),
        ("a: [", "is no YAML"),
    ],
    ids=range(15),
)
def test_mistakes_in_a_spec_are_told_in_one_sentence(tmp_path, capsys, text, message):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_code:
        bench.load_spec(str(tmp_path / "spec.yaml"), tmp_path)
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("run.py: error: ") and message in error and error.count("\n") == 1


def test_dry_run_skips_finished_and_resumes_interrupted_runs_without_ray(tmp_path, fake):
    spec = fake({"x": {}, "other": {}}, seeds=(1, 2, 3))
    spec.write_text(spec.read_text() + "final_episodes: 4\n")
    evaluated, unevaluated, interrupted, *_ = runs = bench.load_spec(str(spec), tmp_path / "runs")
    folders = [write_run(run, [0, step], [[1, 2], [3, 4]]) for run, step in zip(runs, (150, 100, 90))]
    (interrupted.home / "Hopper-v4__fake__3__1700000099").mkdir()  # a later start that died at once
    write_final(evaluated, 4)
    (tmp_path / "ray.py").write_text("raise ImportError('as if Ray were not installed')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(
        command(tmp_path, spec, "--dry-run", "--only", "__x__"), capture_output=True, text=True, env=env
    )
    assert result.returncode == 0 and sorted(tmp_path.rglob("*")) == before, result.stderr
    first, second, third = result.stdout.splitlines()
    assert first == f"# {evaluated.label}: finished already, return 4 (frozen 2), step 150 of 100, 1 min"
    start = f"cd {ROOT} && OMP_NUM_THREADS=1 "
    assert second.startswith(start) and f"enjoy.py {folders[1]} --script {tmp_path}/fake.py --checkpoint last" in second
    assert second.endswith(f"--episodes 4 --json {unevaluated.home}/final.json")
    assert third.startswith(start) and third.endswith(
        f"fake.py --env-id Hopper-v4 --seed 3 --total-timesteps 100 --resume {folders[2]}"
    )
    assert "enjoy.py" in bench.plan(replace(evaluated, final_episodes=5))
    # By hand in a shell, the printed command does what the sweep would do
    (folders[2] / "step.txt").write_text("90")
    assert subprocess.run(third, shell=True).returncode == 0 and bench.look(interrupted).finished
    # Training, however, needs it
    result = subprocess.run(command(tmp_path, spec, "--only", "other"), capture_output=True, text=True, env=env)
    assert result.returncode == 2 and "error: Ray is not installed; pip install" in result.stderr


# --- One run ---
def test_a_run_that_fails_is_not_retried_and_one_that_is_killed_only_so_often(tmp_path, fake, monkeypatch):
    spec = fake({"a": {"flags": "--boom 3"}, "b": {"flags": "--boom 0"}, "c": {"flags": "--suicide yes"},
                 "d": {"flags": "--boom 143"}, "e": {}})  # fmt: skip
    monkeypatch.setattr(bench, "RETRIES", 2)
    runs = {run.arm: run for run in bench.load_spec(str(spec), tmp_path / "runs")}
    ends = {arm: bench.work(run) for arm, run in runs.items()}
    assert ends == {"a": "FAILED with exit code 3", "b": "FAILED with exit code 0", "c": "FAILED with exit code -9",
                    "d": "stopped", "e": "finished"}  # fmt: skip
    calls = {arm: len((bench.newest(run.home) / "calls.txt").read_text().splitlines()) for arm, run in runs.items()}
    assert calls == {"a": 1, "b": 1, "c": 3, "d": 1, "e": 1}
    start = json.loads((runs["e"].home / "starts.jsonl").read_text())
    assert set(start) == {"date", "cpu", "cores", "python", "script_blob"}
    blob = subprocess.run(["git", "hash-object", tmp_path / "fake.py"], capture_output=True, text=True)
    assert blob.returncode or start["script_blob"] == blob.stdout.strip()


def test_two_sweeps_never_train_the_same_run(tmp_path, fake, monkeypatch):
    (run,) = bench.load_spec(str(fake({"x": {}})), tmp_path / "runs")
    run.home.mkdir(parents=True)
    holder = ["flock", str(run.home / "log.txt"), "sleep", "60"]
    other = subprocess.Popen(holder, start_new_session=True)
    try:
        time.sleep(0.5)
        monkeypatch.setattr(bench, "LOCK_WAIT", 0.5)
        assert bench.work(run) == "busy" and bench.newest(run.home) is None
    finally:
        os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert bench.work(run) == "finished"


# --- Collect ---
def test_collect_repeats_known_numbers_and_leaves_out_what_is_damaged(tmp_path, fake, capsys):
    spec = fake({"x": {}}, seeds=range(1, 9))
    spec.write_text(spec.read_text() + "final_episodes: 5\n")
    runs = {run.seed: run for run in bench.load_spec(str(spec), tmp_path / "runs")}
    columns = {"trust_region/alpha": [None, 1, 0.0123456789], "charts/success": [None] * 3}
    returns = [[100, 300], [900, 900], [1300, 1300.125]]
    write_run(runs[1], [0, 50, 101], returns, columns)
    write_final(runs[1], 5)
    start = {"cpu": "Testron 3000"}
    (runs[1].home / "starts.jsonl").write_text(json.dumps(start) + "\n")
    write_run(runs[2], [0, 50, 99], returns)
    write_final(runs[2], 5)
    os.utime(runs[2].home / "final.json", (0, 0))  # of an earlier checkpoint, so not its final evaluation
    folder = write_run(runs[3], [0, 50, 99], returns)
    (folder / "metrics.csv").write_text((folder / "metrics.csv").read_text()[:-25])
    folder = write_run(runs[4], [0, 50, 99], returns)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:300])
    (runs[5].home / "Hopper-v4__lpds_continuous__5__1700000000").mkdir(parents=True)
    runs[6].home.mkdir()
    out = tmp_path / "results" / "fake"
    out.mkdir(parents=True)
    (out / f"{runs[7].label}.json").write_text("from another machine")  # stays
    bench.collect(list(runs.values()), tmp_path / "results")
    said = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said[runs[1].label].endswith(": finished, return 1300 (frozen 200), step 101 of 100, 2 min")
    assert "UNFINISHED" in said[runs[2].label] and "no final evaluation" in said[runs[2].label]
    for seed in (3, 4, 5):
        assert f"left out, half-written: {bench.newest(runs[seed].home)}" in said[runs[seed].label]
    assert "left out, no run folder in" in said[runs[6].label] and said[runs[8].label].endswith("not started here")
    size = sum(f.stat().st_size for f in out.iterdir()) / 1000
    assert f"{out} holds 3 of 8 runs in {size:.0f} kB" in said
    assert (out / f"{runs[7].label}.json").read_text() == "from another machine"
    assert len(list(out.iterdir())) == 3 + 3 + 1

    # The files: whole numbers exact, others at five digits, no empty columns, every episode
    header, *lines = (out / f"{runs[1].label}.csv").read_text().splitlines()
    assert header == "global_step,wall_seconds,eval/episodic_return,trust_region/alpha"
    assert lines == ["0,0,200,", "50,60,900,1", "101,120,1300.1,0.012346"]
    meta = json.loads((out / f"{runs[1].label}.json").read_text())
    assert (meta["label"], meta["spec"], meta["arm"], meta["env_id"], meta["seed"]) == (
        "Hopper-v4__x__1", "fake", "x", "Hopper-v4", 1)  # fmt: skip
    assert (meta["finished"], meta["steps"], meta["minutes"], meta["device"]) == (True, 101, 2.0, "cpu")
    assert meta["versions"] == {"torch": "2.6.0"} and meta["starts"] == [start] and meta["args"]["delta"] == 0.5
    numbers = {"entropy": -2.5, "ties": 0.0, "sq_norm": 2.5, "ratio": None, "kl": 0.5}
    assert meta["final"]["steered"] == numbers and meta["final"]["episodes"] == 5 and "final" not in json.loads(
        (out / f"{runs[2].label}.json").read_text())  # fmt: skip
    with np.load(out / f"{runs[1].label}.npz", allow_pickle=False) as f:
        kept = {"return", "success", "length", "success_share"}
        assert set(f) == {f"final_{who}_{key}" for who in ("frozen", "steered") for key in kept} | kept | {
            "global_step"
        }
        assert f["return"].tolist() == returns and f["global_step"].tolist() == [0, 50, 101]
        assert f["final_steered_return"].tolist() == [2.5] * 5 and f["final_frozen_success"].tolist() == [1] * 5
        assert {f[key].dtype for key in f if key != "global_step"} == {np.dtype("f4")}


def test_the_model_script_is_trained_evaluated_and_collected(tmp_path, tiny_backbone, capsys, monkeypatch):
    flags = (f"--backbone {tiny_backbone()} --total-timesteps 120 --prior-steps 40 --warmup-steps 0 --eval-every 60 "
             "--eval-episodes 2 --hidden-size 16 --batch-size 8 --utd 2 --device cpu")  # fmt: skip
    spec = {"script": "lpds_continuous.py", "flags": flags, "envs": ["Hopper-v4"], "arms": {"LP-DS": {}}}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(spec | {"final_episodes": 3}))
    (run,) = bench.load_spec(str(tmp_path / "real.yaml"), tmp_path / "runs")
    monkeypatch.chdir(ROOT)
    assert bench.execute(run) == ("lpds_continuous.py", 0), (run.home / "log.txt").read_text()
    bench.collect([run], tmp_path / "results")  # makes up for the final evaluation, which nobody has made
    assert "no final evaluation" not in capsys.readouterr().out
    written = (run.home / "final.json").stat().st_mtime_ns
    assert bench.work(run) == "finished" and (run.home / "final.json").stat().st_mtime_ns == written  # not made twice
    with np.load(tmp_path / "results" / "real" / f"{run.label}.npz", allow_pickle=False) as f:
        assert f["return"].shape == (len(f["global_step"]), 2) and f["final_steered_return"].shape == (3,)
    meta = json.loads((tmp_path / "results" / "real" / f"{run.label}.json").read_text())
    assert meta["finished"] and meta["args"]["utd"] == 2 and np.isfinite(meta["final"]["steered"]["entropy"])


# --- The sweep on Ray ---
@pytest.fixture(scope="module")
def cluster():
    """Address of a Ray of two processors, which sweeps join as they would join a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else it writes one into the home directory
        import ray  # reads these as it is imported

        context = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield context.address_info["address"]
        ray.shutdown()


def wait_for(found, seconds=120):
    deadline = time.time() + seconds
    while not (got := found()) and time.time() < deadline:
        time.sleep(0.05)
    return got


def test_sweep_skips_finished_continues_killed_and_reports_failed_runs(tmp_path, fake, cluster):
    arms = {"child": {"flags": "--hang yes"}, "worker": {"flags": "--hang yes"}, "fails": {"flags": "--boom 3"}}
    spec = fake(arms | {"done": {}, "interrupted": {}})
    runs = {run.arm: run for run in bench.load_spec(str(spec), tmp_path / "runs")}
    write_run(runs["done"], [0, 100], [[1, 2], [3, 4]])
    folder = write_run(runs["interrupted"], [0, 70], [[1, 2], [3, 4]])
    (folder / "step.txt").write_text("70")
    queue = subprocess.Popen(
        command(tmp_path, spec, "--address", cluster), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    killed = []
    try:
        for arm, which in (("child", 0), ("worker", 1)):
            (pids,) = wait_for(lambda arm=arm: list(runs[arm].home.glob("*/pids.txt")))
            pids = [int(pid) for pid in wait_for(pids.read_text).split()]
            killed += [pids[0]]
            os.kill(pids[which], signal.SIGKILL)
        output, _ = queue.communicate(timeout=180)
    finally:
        queue.kill()
        for arm in ("child", "worker"):  # nothing is left behind where the test fails
            for pids in runs[arm].home.glob("*/pids.txt"):
                if (Path("/proc") / pids.read_text().split()[0] / "cmdline").exists():
                    os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)
    calls = {arm: bench.newest(run.home) / "calls.txt" for arm, run in runs.items()}
    assert not calls["done"].exists() and f"# {runs['done'].label}" not in output
    for arm in ("child", "worker"):  # twice: from the start, and from the checkpoint at 50
        first, second = calls[arm].read_text().splitlines()
        assert first.startswith("0 ") and second.startswith("50 ") and f"--resume {calls[arm].parent}" in second
        assert f"retry 1 {runs[arm].label}" in output and f"finished {runs[arm].label}: return 77" in output
        assert len((runs[arm].home / "starts.jsonl").read_text().splitlines()) == 2
    assert calls["interrupted"].read_text().startswith("70 ") and calls["interrupted"].read_text().count("\n") == 1
    assert calls["fails"].read_text().count("\n") == 1 and queue.returncode == 1
    assert f"{runs['fails'].label} FAILED with exit code 3; the end of {runs['fails'].home}/log.txt:" in output
    assert output.count("boom: the reason is told here") == 1
    kept = {f"{runs[arm].label}.{end}" for arm in runs if arm != "fails" for end in ("csv", "json", "npz")}
    assert {f.name for f in (tmp_path / "results" / "fake").iterdir()} == kept
    starts = json.loads((tmp_path / "results" / "fake" / f"{runs['worker'].label}.json").read_text())["starts"]
    assert len(starts) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_every_run_save_and_the_same_command_goes_on(tmp_path, fake, number):
    spec = fake({"x": {"flags": "--hang yes"}}, seeds=(1, 2, 3))
    first, second, third = bench.load_spec(str(spec), tmp_path / "runs")
    # A Ray of its own, as by default; a terminal sends Ctrl-C to the whole group, Ray's processes included
    line = command(tmp_path, spec, "--jobs", "2")
    background = number == signal.SIGTERM  # started with `&`, which makes all of Ray ignore SIGINT
    ignore = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None
    queue = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=ignore)
    try:
        wait_for(lambda: len(list(tmp_path.glob("runs/fake/*/*/pids.txt"))) == 2)
        for run in (first, second):
            bench.newest(run.home).joinpath("step.txt").write_text("not saved on the signal")
        os.kill(queue.pid, number) if background else os.killpg(queue.pid, number)
        output, _ = queue.communicate(timeout=120)
    finally:
        queue.kill()
    assert queue.returncode == 128 + number
    for run in (first, second):
        assert bench.newest(run.home).joinpath("step.txt").read_text() == "50"
        assert f"stopped {run.label}" in output and "--resume" in bench.plan(run)
    assert not third.home.exists() and "FAILED" not in output and not (tmp_path / "results").exists()
    assert f"stopped; the same command goes on from here: python {shlex.join(line[1:])}" in output
    # What the same command then does with each of them
    assert bench.work(first) == "finished"
    assert bench.newest(first.home).joinpath("calls.txt").read_text().splitlines()[1].startswith("50 ")


def test_what_this_machine_can_never_give_is_refused(tmp_path, fake, monkeypatch, capsys):
    stub = SimpleNamespace(init=lambda **kwargs: None, cluster_resources=lambda: {"CPU": 4.0})
    monkeypatch.setitem(sys.modules, "ray", stub)
    arms = {"x": {"resources": {"num_cpus": 4}}, "y": {"resources": {"num_gpus": 0.25}}}
    x, y = bench.load_spec(str(fake(arms)), tmp_path)
    bench.connect("", [x])
    bench.connect("a cluster that may grow", [x, y])
    with pytest.raises(SystemExit):
        bench.connect("", [x, y])
    assert "y__1: wants num_gpus 0.25, but this machine has 0; change resources" in capsys.readouterr().err
