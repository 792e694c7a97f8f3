"""benchmark/continuous.py: its commands parse, its tables repeat known numbers, its queue skips, resumes and reports.

Everything is written below pytest's tmp_path; training is played by a small fake script.
"""

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpds_continuous

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("benchmark_continuous", ROOT / "benchmark" / "continuous.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def dry_run(spec, runs, capsys) -> list:
    """Lines that `run SPEC --dry-run` prints."""
    with pytest.raises(SystemExit) as exit_code:
        bench.run(spec, dry_run=True, runs=runs)
    assert not exit_code.value.code
    return capsys.readouterr().out.splitlines()


def write_run(home, args, steps, returns, columns=None, checkpoint=True):
    """A run folder as lpds_continuous.py leaves it: `returns` (evaluations, episodes) at `steps`."""
    folder = home / f"{args['env_id']}__lpds_continuous__{args['seed']}__1700000000"
    folder.mkdir(parents=True)
    returns = np.asarray(returns, float)
    (folder / "args.json").write_text(json.dumps(args))
    columns = {"global_step": steps, "wall_seconds": [60.0 * i for i in range(len(steps))],
               "eval/episodic_return": returns.mean(1)} | (columns or {})  # fmt: skip
    rows = ["" if v is None else f"{v:.9g}" for row in zip(*columns.values(), strict=True) for v in row]
    rows = [",".join(rows[i : i + len(columns)]) for i in range(0, len(rows), len(columns))]
    (folder / "metrics.csv").write_text("\n".join([",".join(columns), *rows]) + "\n")
    np.savez_compressed(folder / "eval.npz", **{"global_step": np.array(steps), "return": returns,
                        "success": returns > 0, "length": np.full(returns.shape, 1000)})  # fmt: skip
    if checkpoint:
        versions = {"torch": "2.6.0", "gymnasium": "1.1.0", "mujoco": "3.2.0"}
        torch.save({"versions": versions, "cuda_rng": None, "replay": torch.zeros(3)}, folder / "checkpoint.pt")
    return folder


def args_of(flags: str) -> dict:
    return vars(lpds_continuous.parse_args(shlex.split(flags)))


# --- Commands ---
def test_every_command_of_every_spec_parses(tmp_path, capsys):
    seen = {}
    for spec, labels in bench.SPECS.items():
        lines = dry_run(spec, tmp_path, capsys)
        assert len(lines) == len(labels)
        for line, label in zip(lines, labels, strict=True):
            assert line.startswith(f"cd {ROOT} && OMP_NUM_THREADS=1 {sys.executable} lpds_continuous.py ")
            args = lpds_continuous.parse_args(shlex.split(line.partition("lpds_continuous.py ")[2]))
            assert args.run_dir == str(tmp_path / spec / label) and args.total_timesteps in (100_000, 150_000)
            seen[spec, label] = args
    assert list(tmp_path.iterdir()) == []
    assert len({json.dumps(vars(a) | {"run_dir": ""}) for a in seen.values()}) == len(seen)  # no experiment twice
    environments = {"Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"}
    assert {(a.env_id, a.seed) for (s, _), a in seen.items() if s == "seeds"} == {
        (e, n) for e in environments for n in (1, 2, 3)
    }
    norm = {(a.env_id, a.delta_norm, a.delta) for (s, _), a in seen.items() if s == "norm"}
    assert {delta for e, n, delta in norm if (e, n) == ("Hopper-v4", "mean")} == {0.1, 0.35, 0.5, 0.66}
    assert {delta for e, n, delta in norm if (e, n) == ("Walker2d-v4", "sum")} == {0.1, 0.35, 0.66}
    assert [label for (s, label), a in seen.items() if s == "norm" and a.seed != 101] == [
        "Walker2d-v4-mean-0.35__seed1"
    ]
    assert {a.backbone for (s, _), a in seen.items() if s == "flow"} == {"backbones/hopper-v4-medium-flow.pt"}
    assert {(a.perturb, a.lagrangian, a.noise_bound, a.dual) for (s, _), a in seen.items() if s == "ablation"} == {
        ("action", True, "none", "log"),
        ("noise", False, "none", "log"),
        ("noise", False, 2.5, "log"),
        ("noise", True, "none", "linear"),
    }


def test_dry_run_leaves_out_finished_runs_and_resumes_interrupted_ones(tmp_path, capsys):
    flags = bench.SPECS["flow"]
    home = {label: tmp_path / "flow" / label for label in flags}
    first, second, third = flags
    write_run(home[first], args_of(flags[first]), [0, 150_004], [[1, 2], [3, 4]])
    folder = write_run(home[second], args_of(flags[second]), [0, 20_000], [[1, 2], [3, 4]])
    (folder.parent / "Hopper-v4__lpds_continuous__2__1700000099").mkdir()  # a later start that died at once
    write_run(home[third], args_of(flags[third]), [0, 10_000], [[1, 2], [3, 4]], checkpoint=False)
    done, resumed, anew = dry_run("flow", tmp_path, capsys)
    assert done.startswith(f"# {first}: finished already, return 4 (frozen 2), step 150,004 of 100,000")
    assert resumed.endswith(f"--resume {folder}") and anew.endswith(f"--run-dir {home[third]}")
    # The script itself agrees that this continues the same experiment
    assert lpds_continuous.parse_args(shlex.split(resumed.partition("lpds_continuous.py ")[2])).seed == 2


# --- Results ---
def rows_of(table: Path) -> dict:
    """(name, seeds) -> the other cells."""
    lines = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    return {(line[0], line[1]): line[2:] for line in lines[1:]}


def test_collect_and_plot_repeat_known_numbers(tmp_path, capsys):
    runs, results, figures = tmp_path / "runs", tmp_path / "results", tmp_path / "figures"
    flags = bench.SPECS["seeds"]
    columns = {"trust_region/violation": [None, -0.5, -0.25, 0.1, 0.3],
               "trust_region/alpha": [None, 1, 0.5, 0.25, 0.0123456789],
               "entropy/action": [None, 1, 1, 1.5, 1.75], "entropy/action_frozen": [None, 2, 2, 2, 2],
               "losses/q_w_corr": [None, 0.1, 0.2, 0.5, 0.75], "charts/success": [None] * 5}  # fmt: skip
    steps = [0, 50_003, 99_999, 100_001, 150_001]  # the last third begins at 100,000.67
    for seed, shift in ((1, 0), (2, 100)):
        label = f"Hopper-v4__seed{seed}"
        returns = np.array([[100, 300], [900, 900], [1000, 1200], [1400, 1600], [1300, 1300.125]]) + shift
        returns[0] = [100, 300]
        write_run(runs / "seeds" / label, args_of(flags[label]), steps, returns, columns)
    start = {"cpu": "Testron 3000", "jobs": 2}
    (runs / "seeds" / "Hopper-v4__seed1" / "starts.jsonl").write_text(json.dumps(start) + "\n")
    # Unfinished, half-written, empty, empty without a run folder
    label = "Walker2d-v4__seed1"
    write_run(runs / "seeds" / label, args_of(flags[label]), [0], [[10, 20]])
    label = "Hopper-v4__seed3"
    folder = write_run(runs / "seeds" / label, args_of(flags[label]), steps, returns, columns)
    (folder / "metrics.csv").write_text((folder / "metrics.csv").read_text()[:-25])
    (runs / "seeds" / "Walker2d-v4__seed2" / "Walker2d-v4__lpds_continuous__2__1700000000").mkdir(parents=True)
    (runs / "seeds" / "Walker2d-v4__seed3").mkdir()
    label = "HalfCheetah-v4__seed1"
    folder = write_run(runs / "seeds" / label, args_of(flags[label]), steps, returns, columns)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:300])

    bench.collect("seeds", runs, results)
    out = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "finished, return 1300 (frozen 200)" in out["Hopper-v4__seed1"]
    assert "UNFINISHED" in out["Walker2d-v4__seed1"]
    for label in ("Hopper-v4__seed3", "Walker2d-v4__seed2", "HalfCheetah-v4__seed1"):
        assert f"left out, half-written: {bench.newest(runs / 'seeds' / label)}" in out[label]
    assert "left out, no run folder in" in out["Walker2d-v4__seed3"] and "not started" in out["HalfCheetah-v4__seed2"]
    (last,) = [line for line in out.values() if line.startswith(str(results / "seeds"))]
    size = sum(f.stat().st_size for f in (results / "seeds").iterdir())
    assert last.endswith(f"holds 3 of 9 runs in {size / 1000:.0f} kB")
    kept = ("Hopper-v4__seed1", "Hopper-v4__seed2", "Walker2d-v4__seed1")
    assert {f.name for f in (results / "seeds").iterdir()} == {f"{k}.{e}" for k in kept for e in ("csv", "json", "npz")}

    # The files: whole numbers exact, others at five digits, no empty columns
    header, *lines = (results / "seeds" / "Hopper-v4__seed1.csv").read_text().splitlines()
    assert "charts/success" not in header and "trust_region/alpha" in header
    assert lines[-1] == "150001,240,1300.1,0.3,0.012346,1.75,2,0.75" and lines[0] == "0,0,200,,,,,"
    meta = json.loads((results / "seeds" / "Hopper-v4__seed1.json").read_text())
    assert meta["finished"] is True and meta["steps"] == 150_001 and meta["versions"]["torch"] == "2.6.0"
    assert meta["starts"] == [start] and meta["device"] == "cpu" and meta["args"]["delta"] == 0.5
    assert json.loads((results / "seeds" / "Walker2d-v4__seed1.json").read_text())["finished"] is False
    with np.load(results / "seeds" / "Hopper-v4__seed1.npz", allow_pickle=False) as f:
        assert f["return"].shape == (5, 2) and {f[k].dtype for k in ("return", "success", "length")} == {np.dtype("f4")}
        assert f["global_step"].tolist() == steps

    # The table. Final: mean of 1000 1200 1400 1600 1300 1300.125 is 1300.02, standard deviation 200.0
    bench.plot("all", results, figures)
    out = capsys.readouterr().out
    table = rows_of(results / "seeds.md")
    late = ["1.20", "0.0123", "-0.38", "0.62"]
    assert table["Hopper-v4", "1"] == ["150,001", "200", "1300 ± 200", "1500", *late, "4"]
    assert table["Hopper-v4", "2"] == ["150,001", "200", "1400 ± 200", "1600", *late, "4"]
    assert table["**Hopper-v4**", "1 2"] == ["150,001", "200", "1350 ± 71", "1550", *late, "4"]
    assert table["Walker2d-v4", "1"] == ["0 (unfinished)", "15", "–", "–", "–", "–", "–", "–", "0"]
    assert len(table) == 4
    assert "Testron 3000, one core a run, 2 at a time, torch 2.6.0 on cpu" in (results / "seeds.md").read_text()
    assert [f.name for f in figures.iterdir()] == ["continuous_seeds.png"]
    for spec in ("norm", "flow", "ablation"):
        assert f"{spec}: nothing in {results / spec}; run and collect it first" in out


def test_plot_draws_every_spec_beside_the_complete_method(tmp_path, capsys, monkeypatch):
    drawn = []
    draw = bench.draw
    monkeypatch.setattr(bench, "draw", lambda *a: (drawn.append((*a[1:4], [r["label"] for r in a[4]])), draw(*a)))
    steps, returns = [0, 80_000, 150_000], np.arange(6).reshape(3, 2) * 100.0
    columns = {"trust_region/violation": [None, 0.1, 0.2], "trust_region/alpha": [None, 1, 2],
               "entropy/action": [None, 1, 2], "entropy/action_frozen": [None, 2, 2],
               "losses/q_w_corr": [None, 0.5, 0.5]}  # fmt: skip
    for spec, label in (
        ("seeds", "Hopper-v4__seed1"),
        ("seeds", "Walker2d-v4__seed1"),
        ("flow", "Hopper-v4-flow__seed2"),
        ("norm", "Walker2d-v4-sum-0.1__seed101"),
        ("updates", "HalfCheetah-v4-utd-20__seed1"),
        ("ablation", "Walker2d-v4-action__seed1"),
    ):
        write_run(tmp_path / spec / label, args_of(bench.SPECS[spec][label]), steps, returns, columns)
    for spec in bench.SPECS:
        bench.collect(spec, tmp_path, tmp_path / "results")
        bench.plot(spec, tmp_path / "results", tmp_path / "figures")
    assert {f.name for f in (tmp_path / "figures").iterdir()} == {f"continuous_{spec}.png" for spec in bench.SPECS}
    walker = ["Walker2d-v4__seed1", "Walker2d-v4-action__seed1"]
    assert drawn == [
        ("seeds", "return", "Hopper-v4", ["Hopper-v4__seed1"]),
        ("seeds", "return", "Walker2d-v4", ["Walker2d-v4__seed1"]),
        *[("norm", key, "Walker2d-v4", ["Walker2d-v4-sum-0.1__seed101"]) for key in ("return", "used")],
        ("flow", "return", "Hopper-v4", ["Hopper-v4__seed1", "Hopper-v4-flow__seed2"]),
        ("updates", "return", "HalfCheetah-v4", ["HalfCheetah-v4-utd-20__seed1"]),
        *[("ablation", key, "Walker2d-v4", walker) for key in ("return", "used", "entropy")],
    ]
    # LP-DS-A has no use for its latent critic: its correlation is not quoted
    assert rows_of(tmp_path / "results" / "ablation.md")["Walker2d-v4-action", "1"][-2:] == ["–", "2"]
    assert rows_of(tmp_path / "results" / "norm.md")["Walker2d-v4-sum-0.1", "101"][-2:] == ["0.50", "2"]


# --- The queue ---
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags.get("--resume") or f"{flags['--run-dir']}/{flags['--env-id']}__fake__{flags['--seed']}__1700000001")
folder.mkdir(parents=True, exist_ok=True)
assert os.environ["OMP_NUM_THREADS"] == "1" and os.getcwd() == ROOT
with (folder / "calls.txt").open("a") as f:
    f.write(" ".join(sys.argv[1:]) + chr(10))
if MODE == "wait":
    signal.signal(signal.SIGTERM, lambda *a: ((folder / "checkpoint.pt").write_text("saved"), sys.exit(143)))
    (folder / "ready").touch()
    time.sleep(60)
if flags["--seed"] == "3":
    print("boom: the reason is told here", flush=True)
    sys.exit(3)
rows = "global_step,wall_seconds,eval/episodic_return", "0,1,10", "150002,120,77"
(folder / "metrics.csv").write_text(chr(10).join(rows))
"""


def command(tmp_path, mode, *more) -> list:
    script = tmp_path / f"{mode}.py"
    script.write_text(f"MODE, ROOT = {mode!r}, {str(ROOT)!r}\n" + FAKE)
    return [sys.executable, str(ROOT / "benchmark" / "continuous.py"), "run", "flow", "--runs", str(tmp_path / "runs"),
            "--script", str(script), *more]  # fmt: skip


def test_queue_skips_finished_resumes_interrupted_and_reports_failed_runs(tmp_path):
    flags = bench.SPECS["flow"]
    first, second, third = (tmp_path / "runs" / "flow" / label for label in flags)
    done = write_run(first, args_of(flags[first.name]), [0, 150_000], [[1, 2], [3, 4]])
    interrupted = write_run(second, args_of(flags[second.name]), [0, 20_000], [[1, 2], [3, 4]])
    result = subprocess.run(command(tmp_path, "train"), capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 1, result.stderr
    assert f"# {first.name}: finished already, return 4 (frozen 2), step 150,000 of 100,000" in result.stdout
    assert not (done / "calls.txt").exists() and not (first / "log.txt").exists()
    assert f"--resume {interrupted}\n" in (interrupted / "calls.txt").read_text()
    assert f"continued {second.name}: return 4 (frozen 2), step 20,000 of 100,000" in result.stdout
    assert f"finished {second.name}: return 77 (frozen 10), step 150,002 of 100,000, 2 min" in result.stdout
    assert f"FAILED {third.name}: nothing logged" in result.stdout
    assert f"{third.name} failed with exit code 3" in result.stdout.splitlines()[-3]
    assert result.stdout.splitlines()[-1].strip() == "boom: the reason is told here"
    (start,) = map(json.loads, (second / "starts.jsonl").read_text().splitlines())
    assert start["cores_used"] == 1 and start["jobs"] == 2 and start["cpu"]
    blob = subprocess.run(["git", "hash-object", tmp_path / "train.py"], capture_output=True, text=True)
    assert blob.returncode or start["script_blob"] == blob.stdout.strip()
    # Again: only the failed one is tried, from the start, since it left no checkpoint
    again = subprocess.run(command(tmp_path, "train"), capture_output=True, text=True, timeout=60)
    assert again.stdout.count("finished already") == 2 and f"started {third.name}" in again.stdout
    assert again.stdout.count("boom") == 1  # of this attempt, not of the one before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_queue_after_every_run_has_saved(tmp_path, number):
    first, second, third = (tmp_path / "runs" / "flow" / label for label in bench.SPECS["flow"])
    queue = subprocess.Popen(command(tmp_path, "wait", "--jobs", "2"), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 30
        while len(list(tmp_path.glob("runs/flow/*/*/ready"))) < 2 and time.time() < deadline:
            time.sleep(0.05)
        if number == signal.SIGINT:  # meanwhile a second queue leaves alone what the first one trains
            for home in (first, second):
                with pytest.raises(BlockingIOError):
                    bench.start([sys.executable, str(tmp_path / "wait.py")], home, 1)
        queue.send_signal(number)
        output, _ = queue.communicate(timeout=30)
    finally:
        queue.kill()
    assert queue.returncode == 128 + number
    for home in (first, second):
        assert f"stopped {home.name}" in output and bench.newest(home).joinpath("checkpoint.pt").read_text() == "saved"
    assert not third.exists() and "failed" not in output.lower()
    assert "python benchmark/continuous.py run flow --jobs 2" in output
