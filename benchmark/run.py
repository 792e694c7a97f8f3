"""Sweeps: scripts x environments x seeds x settings from one small YAML file, on Ray, down to small result files.

python benchmark/run.py cpu             # train what benchmark/specs/cpu.yaml lists and is not finished, then collect
python benchmark/run.py cpu --dry-run   # print the commands instead; each of them can be run by hand
python benchmark/run.py cpu --collect   # condense what lies there, finished or not, without training (needs no Ray)

Ctrl-C lets every run save, and the same command goes on from there. A run whose worker or machine is lost continues
from its checkpoint. On a cluster (--address), this repository and --runs must lie under the same path on storage that
all its machines share. benchmark/specs/cpu.yaml explains the keys of a spec.
"""

import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
import yaml
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]  # every relative path starts here, and every command runs here
SPECS = ROOT / "benchmark" / "specs"
RETRIES = 5  # after a lost worker, and again after a run that a signal killed; what fails by itself would fail again
LOCK_WAIT = 60  # seconds: a lock held by a lost machine is freed only when its storage notices
ARM = {"script": str, "flags": str, "envs": list, "seeds": list, "resources": dict, "grid": dict}
SPEC = {"title": str, "include": list, "final_episodes": int, "arms": dict} | {k: ARM[k] for k in ARM if k != "grid"}
RESOURCES = dict.fromkeys(("num_cpus", "num_gpus", "memory", "resources", "accelerator_type"), object)  # Ray's names


@dataclass
class Args:
    spec: Positional[str]
    """name below benchmark/specs, without .yaml, or path of a .yaml file"""
    dry_run: bool = False
    """print the commands, train nothing"""
    collect: bool = False
    """condense what lies there, train nothing"""
    only: str = ""
    """part of a label: runs that do not have it in theirs are left alone"""
    jobs: int = 0
    """at most so many runs at once; 0: as many as the resources allow"""
    address: str = ""
    """of a Ray cluster; empty: Ray on this machine"""
    runs: Path = Path("runs/benchmark")
    """where run folders are made; like all relative paths from the repository on"""
    results: Path = Path("benchmark/results")
    """where the condensed runs go"""


@dataclass(frozen=True, eq=False)
class Run:
    spec: str  # path below benchmark/specs, without .yaml
    arm: str
    env_id: str
    seed: int
    script: str
    flags: str
    total: int  # steps after which it is finished
    resources: dict
    final_episodes: int
    home: Path  # RUNS/SPEC/LABEL: log.txt, starts.jsonl, final.json, and the folder that the script makes
    label = property(lambda self: self.home.name)


# --- Specs ---
def require(condition, message: str) -> None:
    """Unless condition holds, ends the program with one sentence on stderr and exit code 2, as argparse does."""
    if not condition:
        print(f"run.py: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def check(place: str, given, kinds: dict) -> dict:
    """A mapping of a spec whose keys and types are those in `kinds`; nothing at all counts as an empty one."""
    require(isinstance(given or {}, dict), f"{place}: must hold `key: value` lines, not {given!r}")
    for key, value in (given or {}).items():
        require(key in kinds, f"{place}: unknown key {key!r}; known are {', '.join(kinds)}")
        good = isinstance(value, kinds[key]) and not (value == [] and key != "include")
        require(good, f"{place}: {key} must be a {kinds[key].__name__}, and no empty one, not {value!r}")
    return given or {}


def arm_runs(place: str, arm: str, spec: dict, own: dict, runs: Path) -> list:
    """The runs of one arm, whose `own` settings go before those of the spec; its flags go behind the common ones."""
    both = {"seeds": [1], "script": "", "envs": [], "final_episodes": 0} | spec | own
    require(both["script"] and both["envs"], f"{place}: lacks script or envs; give both here or for the whole spec")
    require((ROOT / both["script"]).is_file(), f"{place}: there is no script {both['script']}")
    require(all(type(seed) is int for seed in both["seeds"]), f"{place}: seeds must be whole numbers")
    resources = {"num_cpus": 1, "num_gpus": 0} | check(f"{place}, resources", both.get("resources"), RESOURCES)
    grid = [[(key, v) for v in (x if isinstance(x, list) else [x])] for key, x in own.get("grid", {}).items()]
    found = []
    for point, env_id, seed in itertools.product(itertools.product(*grid), both["envs"], both["seeds"]):
        name = " ".join([arm, *(f"{key}={value}" for key, value in point)])
        flags = " ".join([spec.get("flags", ""), own.get("flags", ""), *(f"--{k} {value}" for k, value in point)])
        total = re.findall(r"--total[-_]timesteps[ =](\d+)", flags)
        require(total, f"{place}: its flags lack --total-timesteps, which says when a run is finished")
        label = "__".join(re.sub(r"[^A-Za-z0-9.=-]+", "-", str(part)) for part in (env_id, name, seed))
        found.append(Run(spec["name"], name, env_id, seed, both["script"], flags, int(total[-1]), resources,
                         both["final_episodes"], runs / spec["name"] / label))  # fmt: skip
    return found


def load_spec(name: str, runs: Path, folder: Path = ROOT, above: tuple = ()) -> list:
    """Every run of a spec, those of the specs that it includes first."""
    path = (folder / name if name.endswith((".yaml", ".yml")) else SPECS / f"{name}.yaml").resolve()
    there = ", ".join(sorted(str(p.relative_to(SPECS).with_suffix("")) for p in SPECS.rglob("*.yaml")))
    require(path.is_file(), f"{name}: no such spec; give one of {there}, or the path of a .yaml file")
    require(path not in above, f"{name}: includes itself; take it out of its `include`")
    try:
        spec = check(name, yaml.safe_load(path.read_text()), SPEC)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        require(False, f"{name}: is no YAML ({' '.join(str(error).split())[:160]})")
    spec["name"] = str(path.relative_to(SPECS).with_suffix("")) if path.is_relative_to(SPECS) else path.stem
    found = {run.home: run for other in spec.get("include", [])
             for run in load_spec(str(other), runs, path.parent, (*above, path))}  # fmt: skip
    for arm, own in spec.get("arms", {}).items():
        place = f"{name}, arm {arm}"
        for run in arm_runs(place, str(arm), spec, check(place, own, ARM), runs):
            require(run.home not in found, f"{place}: {run.label} is there already; rename the arm")
            found[run.home] = run
    require(found, f"{name}: has neither arms nor runs to include; give one of both")
    return list(found.values())


# --- Run folders ---
def newest(home: Path):
    """The run folder in `home` to go on with: the latest time stamp in its name, one with a checkpoint if any has."""
    folders = [f for f in home.glob("*__*__*__*") if f.is_dir()]
    return max(folders, key=lambda f: ((f / "checkpoint.pt").is_file(), f.name.rpartition("__")[2]), default=None)


def read_csv(path: Path) -> dict:
    """column -> float array, nan where a cell is empty; ValueError where lines are cut off or missing."""
    text = path.read_text()
    header, *lines = text.splitlines() or [""]
    if not lines or not text.endswith("\n"):
        raise ValueError("no row, or the last one is cut off")
    cells = np.array([[float(c or "nan") for c in line.split(",")] for line in lines])
    return dict(zip(header.split(","), cells.T, strict=True))


class Look(NamedTuple):
    """A run as it stands on disk."""

    total: int
    step: int = 0
    minutes: float = 0.0  # of training
    steered: float = np.nan  # return at the last evaluation
    frozen: float = np.nan  # and at the first one

    finished = property(lambda self: self.step >= self.total)

    def __str__(self):
        returns = f"return {self.steered:.0f} (frozen {self.frozen:.0f})"
        done = f"step {self.step:,} of {self.total:,}, {self.minutes:.0f} min"
        return f"{returns}, {done}" if self.steered == self.steered else "nothing logged"


def look(run: Run) -> Look:
    try:
        m = read_csv(newest(run.home) / "metrics.csv")
        returns = m["eval/episodic_return"][np.isfinite(m["eval/episodic_return"])]
        return Look(run.total, int(m["global_step"][-1]), m["wall_seconds"][-1] / 60, returns[-1], returns[0])
    except (TypeError, OSError, ValueError, KeyError, IndexError):  # no run folder, or nothing whole in it
        return Look(run.total)


def final(run: Run):
    """The final evaluation, if it is of the last checkpoint and of as many episodes as the spec wants; else None."""
    file, folder = run.home / "final.json", newest(run.home)
    try:
        fresh = file.stat().st_mtime >= (folder / "checkpoint.pt").stat().st_mtime
        numbers = json.loads(file.read_text())
        return numbers if fresh and numbers["episodes"] == run.final_episodes else None
    except (TypeError, OSError, ValueError, KeyError):
        return None


# --- One run ---
def plan(run: Run):
    """The command that a run needs next: train, continue, evaluate; None when nothing is left to do."""
    folder = newest(run.home)
    if not look(run).finished:
        resume = folder and (folder / "checkpoint.pt").is_file()  # with its flags again: changed ones are refused
        where = ["--resume", str(folder)] if resume else ["--run-dir", str(run.home)]
        what = ["--env-id", run.env_id, "--seed", str(run.seed), *shlex.split(run.flags)]
        return [sys.executable, run.script, *what, *where]
    if run.final_episodes and not final(run):  # more episodes than training can afford, on seeds it never used
        return [sys.executable, "enjoy.py", str(folder), "--script", run.script, "--checkpoint", "last",
                "--episodes", str(run.final_episodes), "--json", str(run.home / "final.json")]  # fmt: skip
    return None


def environment(run: Run) -> dict:
    """One thread per run, as its matrices are small; who asked for no GPU sees none, or --device auto would take it."""
    hide = not run.resources["num_gpus"] and shutil.which("nvidia-smi")
    return {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if hide else {})


def note_start(run: Run) -> None:
    """Adds a line to starts.jsonl: where and with which version of the script a run went on."""
    cpuinfo, source = Path("/proc/cpuinfo"), Path(run.script).read_bytes()
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    note = {"date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu[1] if cpu else os.uname().machine,
            "cores": os.cpu_count(), "python": sys.version.split()[0],
            # The script's name in git: `git log --find-object` finds the commit that has exactly this version
            "script_blob": hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest()}  # fmt: skip
    if run.resources["num_gpus"] and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        note["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    with (run.home / "starts.jsonl").open("a") as file:
        print(json.dumps(note), file=file)


@contextmanager
def locked(run: Run):
    """Yields log.txt, locked; BlockingIOError where another process is at this run for longer than LOCK_WAIT."""
    run.home.mkdir(parents=True, exist_ok=True)
    with (run.home / "log.txt").open("a") as log:
        deadline = time.time() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() > deadline:
                    raise
                time.sleep(0.2)
        yield log


def execute(run: Run):
    """Does the next thing that `plan` finds, its output in log.txt: (script, exit code), or None if nothing is left."""
    libc, process = ctypes.CDLL(None), None  # loaded here: a forked child had better do as little as it can

    def die_with_parent():  # kill -9 lets a parent pass nothing on, and an orphan would keep the retry locked out
        if sys.platform == "linux":
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; scripts keep their files whole at any moment

    with locked(run) as log:  # the child inherits the lock with its output: it holds as long as the child lives
        command = plan(run)  # only now: who held the lock may have got further
        if command is None:
            return None
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        if command[1] == run.script:
            note_start(run)
        try:  # a session of its own: Ctrl-C reaches it only through us, once
            process = subprocess.Popen(command, env=os.environ | environment(run), stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                       preexec_fn=die_with_parent)  # fmt: skip
            while process.poll() is None:
                time.sleep(0.2)  # not wait(): ray.cancel interrupts only between two lines of Python
        finally:
            if process and process.poll() is None:
                process.terminate()  # it finishes its step, saves and exits
                process.wait()
    return command[1], process.returncode


def work(run: Run) -> str:
    """The Ray task, anywhere in the cluster: does all that is left of a run; how it ended, in words."""
    os.chdir(ROOT)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so shells start what is in the background, and it is
        signal.signal(signal.SIGINT, signal.default_int_handler)  # inherited; but ray.cancel comes as this signal
    kills = 0
    try:
        while done := execute(run):
            script, code = done
            kills += code < 0  # by a signal: somebody's kill -9, or the system that is out of memory
            if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                return "stopped"  # by somebody, and saved
            idle = code == 0 and (left := plan(run)) and left[1] == script
            if code > 0 or kills > RETRIES or idle:
                return f"FAILED with exit code {code}"
    except BlockingIOError:
        return "busy"
    return "finished"


# --- The sweep ---
def connect(address: str, runs: list) -> None:
    """ray.init(): this machine, or the cluster at `address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it reports to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # or runs give way to everything else on the machine
    try:
        import ray
    except ImportError:
        require(False, "Ray is not installed; pip install -r requirements/benchmark.txt, or take --dry-run's commands")
    here = {} if address else {"include_dashboard": False, "object_store_memory": 100_000_000}  # nothing big is passed
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **here)
    for run in [] if address else runs:  # a cluster may grow; here such a run would wait for ever
        for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            want, have = run.resources[key], ray.cluster_resources().get(name, 0)
            advice = f"change resources in the spec {run.spec} or give a cluster's --address"
            require(want <= have, f"{run.label}: wants {key} {want}, but this machine has {have:g}; {advice}")


@contextmanager
def display(state: dict, seen: dict):
    """Yields a function that shows all runs: as a live table, or without a terminal as one line per event."""
    told = dict.fromkeys(state, "queued")

    def lines():
        for run in (run for run in state if told[run] != state[run]):
            print(f"{time.strftime('%H:%M:%S')} {state[run]:>10} {run.label}: {seen[run]}", flush=True)
        told.update(state)

    def table():
        right = (Column(name, justify="right") for name in ("step", "return (frozen)", "minutes"))
        out, order = Table("run", "state", *right, box=None), {"queued": 1, "finished": 2}
        for run in sorted(state, key=lambda run: order.get(state[run], 0)):  # a small terminal cuts the end
            r = seen[run]
            numbers = (f"{r.step:,}/{r.total:,}", f"{r.steered:.0f} ({r.frozen:.0f})", f"{r.minutes:.1f}")
            out.add_row(run.label, state[run], *(x.replace("nan (nan)", "") for x in numbers))
        live.update(out, refresh=True)

    if not sys.stdout.isatty():
        yield lines
        return
    from rich.live import Live
    from rich.table import Column, Table

    with Live(auto_refresh=False) as live:
        yield table


def outcome(ref) -> str:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        return "stopped"
    except ray.exceptions.RayError as error:  # lost too often, or an error of ours
        return f"FAILED in Ray: {str(error).strip().splitlines()[-1]}"


def sweep(runs: list, jobs: int, address: str):
    """Does on Ray what is left of `runs`; (run -> how it ended, the signal that stopped it or 0)."""
    seen, waiting = {run: look(run) for run in runs}, [run for run in runs if plan(run)]
    state = {run: "queued" if run in waiting else "finished" for run in runs}
    if not waiting:
        return state, 0
    connect(address, waiting)
    import ray

    starts = lambda run: sum(f.read_text().count("\n") for f in run.home.glob("starts.jsonl"))  # noqa: E731
    before, active, cancelled = {run: starts(run) for run in runs}, {}, False
    task = ray.remote(max_retries=RETRIES)(work)  # Ray tries again where the worker or its machine is gone
    stop, numbers = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, lambda n, frame: stop.append(n)) for number in numbers]
    with display(state, seen) as show:
        while active or (waiting and not stop):
            while waiting and len(active) < (jobs or len(runs)) and not stop:
                run = waiting.pop(0)
                active[task.options(**run.resources).remote(run)] = run
            if stop and not cancelled:
                cancelled = [ray.cancel(ref) for ref in active]  # interrupts `work`, and its child saves
            if len(stop) > 1:  # who asks twice does not want to wait for that
                break
            ready = ray.wait(list(active), timeout=1)[0] if active else []
            for ref, run in list(active.items()):
                if n := starts(run) - before[run]:
                    seen[run], state[run] = look(run), f"retry {n - 1}" if n > 1 else "training"
                state[run] = "evaluating" if seen[run].finished and run.final_episodes else state[run]
                if ref in ready:
                    state[active.pop(ref)] = outcome(ref)
            show()
    ray.shutdown()
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    return state, stop[0] if stop else 0


def report(run: Run, how: str) -> None:
    log = run.home / "log.txt"
    text = log.read_text(errors="replace").rpartition("\n$ ")[2] if log.exists() else ""
    print(f"\n{run.label} {how}; the end of {log}:\n    " + "\n    ".join(text.splitlines()[-8:]))


# --- Collect ---
def condense(run: Run, out: Path) -> str:
    """Writes LABEL.csv, .npz and .json of a run folder into `out`; what there is to say about it."""
    import torch

    folder, state = newest(run.home), look(run)
    if folder is None:
        return f"left out, no run folder in {run.home}" if run.home.exists() else "not started here"
    try:
        # Five significant digits are enough, whole numbers stay exact, columns that are empty throughout go
        m = {k: v for k, v in read_csv(folder / "metrics.csv").items() if not np.isnan(v).all()}
        short = lambda v: "" if np.isnan(v) else f"{v:.0f}" if v.is_integer() else f"{v:.5g}"  # noqa: E731
        lines = [",".join(m), *(",".join(map(short, row)) for row in zip(*m.values(), strict=True)), ""]
        with np.load(folder / "eval.npz", allow_pickle=False) as f:
            # Each (evaluations, episodes); hands also have success_end and success_share
            kept = [k for k in f.files if k in ("return", "length") or k.startswith("success")]
            arrays = {k: f[k].astype(np.float32) for k in kept} | {"global_step": f["global_step"]}
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True, weights_only=True)
        meta = {"label": run.label, "spec": run.spec, "arm": run.arm, "env_id": run.env_id, "seed": run.seed,
                "finished": state.finished, "steps": state.step, "minutes": round(state.minutes, 1),
                "date": time.strftime("%Y-%m-%d", time.localtime((folder / "metrics.csv").stat().st_mtime)),
                "device": "cpu" if checkpoint["cuda_rng"] is None else "cuda", "versions": checkpoint["versions"],
                # Where and when it ran; a run that was started by hand does not say
                "starts": [json.loads(s) for f in run.home.glob("starts.jsonl") for s in f.read_text().splitlines()],
                "args": json.loads((folder / "args.json").read_text())}  # fmt: skip
        if last := final(run):
            pairs = [(who, key) for who in ("frozen", "steered") for key, v in last[who].items() if isinstance(v, list)]
            arrays |= {f"final_{who}_{key}": np.float32(last[who].pop(key)) for who, key in pairs}  # (episodes,)
            meta["final"] = {key: last[key] for key in ("episodes", "seed", "global_step", "frozen", "steered")}
    except Exception as error:  # damaged files fail in many ways, and none of them may hide the other runs
        return f"left out, half-written: {folder} ({type(error).__name__}: {str(error)[:90]})"
    (out / f"{run.label}.csv").write_text("\n".join(lines))
    (out / f"{run.label}.json").write_text(json.dumps(meta, indent=1) + "\n")
    np.savez_compressed(out / f"{run.label}.npz", **arrays)
    lacks = ", no final evaluation" if run.final_episodes and not last else ""
    return f"{'finished' if state.finished else 'UNFINISHED'}, {state}{lacks}"


def collect(runs: list, results: Path) -> None:
    """Condenses the run folders, finished or not, into small files to commit; others that lie there stay."""
    for spec in dict.fromkeys(run.spec for run in runs):
        own, out = [run for run in runs if run.spec == spec], results / spec
        out.mkdir(parents=True, exist_ok=True)
        for run in own:
            if look(run).finished and plan(run) and (how := work(run)) != "finished":  # the final evaluation is missing
                report(run, f"was not evaluated: {how}")
            print(f"{run.label}: {condense(run, out)}")
        names = [run.label for run in own if (out / f"{run.label}.json").exists()]
        size = sum(f.stat().st_size for f in out.iterdir() if f.is_file()) / 1000
        print(f"{out} holds {len(names)} of {len(own)} runs in {size:.0f} kB")


if __name__ == "__main__":
    os.chdir(ROOT)
    args = tyro.cli(Args, description=__doc__)
    require(args.jobs >= 0, f"--jobs {args.jobs}: must be 0, as many as the resources allow, or more")
    runs = [run for run in load_spec(args.spec, args.runs) if args.only in run.label]
    require(runs, f"--only {args.only}: no label of {args.spec} has that in it; --dry-run shows them all")
    if args.dry_run:
        for run in runs:
            variables = " ".join(f"{key}={value}" for key, value in environment(run).items())
            command = plan(run)
            done = f"# {run.label}: finished already, {look(run)}"
            print(f"cd {ROOT} && {variables} {shlex.join(command)}" if command else done)
        sys.exit()
    state, stop = ({}, 0) if args.collect else sweep(runs, args.jobs, args.address)
    for run, how in state.items():
        if how.startswith("FAILED"):
            report(run, how)
    if stop:
        print(f"stopped; the same command goes on from here: {shlex.join(['python', *sys.argv])}")
        sys.exit(128 + stop)
    collect(runs, args.results)
    sys.exit(any(how not in ("finished", "busy") for how in state.values()))
