"""Sweeps: scripts x environments x seeds x settings from a small YAML file, run on Ray.

    python benchmark/run.py continuous/main             # train what is not finished, collect
    python benchmark/run.py continuous/main --dry-run   # print the commands; none needs Ray
    python benchmark/run.py continuous/main --collect   # condense what lies there, train nothing

benchmark/specs/continuous/main.yaml explains the keys of a spec. Ctrl-C stops; the same command
goes on from the last evaluation of every run. --address needs --runs on storage of all machines.
"""

import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
import yaml
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]  # relative paths start here, and every command runs here
SPECS = ROOT / "benchmark" / "specs"
RETRIES = 5  # of a run that was killed; what fails by itself would fail again

# Keys of an arm and of a spec, with their defaults
ARM = {"script": "", "flags": "", "envs": [], "seeds": [1], "grid": {}}
ARM |= {"resources": {"num_cpus": 1, "num_gpus": 0}, "final_episodes": 0, "temperatures": [1, 0]}
SPEC = ARM | {"title": "", "score": "return", "include": [], "arms": {}}

# Arrays of eval.npz that are kept, where the script writes them
KEPT = {"global_step": np.int64, "return": np.float32, "length": np.float32, "success": np.float32}
KEPT |= {"mode": np.int8, "path": np.float16}


@dataclass
class Args:
    spec: Positional[str]
    """name below benchmark/specs, without .yaml, or path of a .yaml file"""
    dry_run: bool = False
    """print the commands, train nothing"""
    collect: bool = False
    """condense what lies there, train nothing"""
    only: str = ""
    """part of a label: other runs are left alone"""
    jobs: int = 0
    """cores to use of this machine; 0: all"""
    address: str = ""
    """of a Ray cluster; empty: Ray on this machine"""
    runs: Path = Path("runs/benchmark")
    """where run folders are made"""
    results: Path = Path("benchmark/results")
    """where the condensed runs go"""


@dataclass(frozen=True, eq=False)
class Run:
    spec: str  # path below benchmark/specs, without .yaml
    arm: str
    env_id: str
    seed: int
    flags: str
    total: int  # steps after which it is finished
    paths: bool  # keep the paths that its evaluations drew, where the script writes some
    home: Path  # RUNS/SPEC/LABEL: log.txt, starts.jsonl and the script's run folder
    script: str
    resources: dict
    final_episodes: int
    temperatures: list
    label = property(lambda self: self.home.name)


def require(condition, message: str) -> None:
    """Ends the program with one sentence in place of a traceback, for mistakes easily made."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def check(place: str, given, known: dict) -> dict:
    """A mapping with keys of `known` and values like those in there."""
    given = {} if given is None else given
    require(isinstance(given, dict), f"{place}: must hold `key: value` lines, not {given!r}")
    for key, value in given.items():
        require(key in known, f"{place}: unknown key {key!r}; known are {', '.join(known)}")
        good = isinstance(value, (type(known[key]), dict))
        require(good, f"{place}: {key} must be like {known[key]!r}, not {value!r}")
    return given


def arm_runs(arm: str, own: dict, spec: dict, runs: Path) -> list:
    """The runs of one arm, whose `own` settings go before those of the spec."""
    place = f"{spec['name']}, arm {arm}"
    settings = ARM | spec | own
    envs, seeds, grid = (settings[key] for key in ("envs", "seeds", "grid"))
    require(settings["script"] and envs, f"{place}: lacks script or envs")
    require((ROOT / settings["script"]).is_file(), f"{place}: no script {settings['script']}")
    settings["resources"] = ARM["resources"] | settings["resources"]
    same = {key: settings[key] for key in Run.__dataclass_fields__ if key in ARM and key != "flags"}
    envs = envs if isinstance(envs, dict) else dict.fromkeys(envs, "")
    lists = all(isinstance(values, list) for values in grid.values())
    require(lists, f"{place}: grid must hold lists like delta: [0.1, 1], not {grid}")

    found = []
    for values, env_id, seed in itertools.product(itertools.product(*grid.values()), envs, seeds):
        point = list(zip(grid, values))
        name = " ".join([arm, *(f"{flag}={value}" for flag, value in point)])
        flags = [spec.get("flags", ""), envs[env_id], own.get("flags", "")]
        flags = " ".join(filter(None, flags + [f"--{flag} {value}" for flag, value in point]))
        total = re.findall(r"--total[-_]timesteps[ =]([\d_]+)(?:\s|$)", flags)
        require(total, f"{place}: its flags need --total-timesteps and a whole number of steps")
        parts = (re.sub(r"[^A-Za-z0-9.=-]+", "-", str(part)) for part in (env_id, name, seed))
        home = runs / spec["name"] / "__".join(parts)
        which = (spec["name"], name, env_id, seed, flags, int(total[-1]), seed == seeds[0], home)
        found.append(Run(*which, **same))
    return found


def load_spec(name: str, runs: Path) -> list:
    """Every run of a spec, those of the specs that it includes first."""
    path = Path(name) if name.endswith(".yaml") else SPECS / f"{name}.yaml"
    there = sorted(str(p.relative_to(SPECS).with_suffix("")) for p in SPECS.rglob("*.yaml"))
    require(path.is_file(), f"{name}: no such spec; give one of {', '.join(there)}")
    spec = check(name, yaml.safe_load(path.read_text()), SPEC)
    found = {run.home: run for other in spec.get("include", []) for run in load_spec(other, runs)}
    spec["name"] = path.stem if name.endswith(".yaml") else name
    for arm, own in spec.get("arms", {}).items():
        for run in arm_runs(str(arm), check(f"{name}, arm {arm}", own, ARM), spec, runs):
            require(run.home not in found, f"{name}: {run.label} is there twice; rename an arm")
            found[run.home] = run
    return list(found.values())


def newest(home: Path):
    """The script's run folder in `home`, with a checkpoint to go on from; None where none is."""
    folders = [checkpoint.parent for checkpoint in home.glob("*/checkpoint.pt")]
    return max(folders, key=lambda folder: folder.name.rpartition("__")[2], default=None)


def returns_of(run: Run):
    """(steps, mean return) of every evaluation; before the first one, of none."""
    folder = newest(run.home)
    if folder is None or not (folder / "eval.npz").is_file():
        return np.zeros(0, int), np.zeros(0)
    with np.load(folder / "eval.npz", allow_pickle=False) as file:
        return file["global_step"], file["return"].mean(1)


def is_trained(run: Run) -> bool:
    return bool(returns_of(run)[0].max(initial=0) >= run.total)


def final(run: Run):
    """The final evaluation, if it is the one that the spec wants of the last checkpoint."""
    try:
        result = json.loads(Path(newest(run.home) or run.home, "final.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    wanted = [run.final_episodes, run.temperatures, returns_of(run)[0][-1:].tolist()]
    found = [result.get("episodes"), result.get("temperatures"), [result.get("global_step")]]
    return result if found == wanted else None


def describe(run: Run) -> str:
    steps, returns = returns_of(run)
    if not len(steps):
        return "nothing evaluated"
    score = f"return {returns[-1]:.0f} (frozen {returns[0]:.0f})"
    return f"step {steps[-1]:,} of {run.total:,}, {score}"


def plan(run: Run):
    """The command that a run needs next: train, continue, evaluate; None when it has all."""
    folder = newest(run.home)
    if not is_trained(run):
        where = ["--resume", str(folder)] if folder else ["--run-dir", str(run.home)]
        named = [] if "--task-id" in run.flags else ["--env-id", run.env_id]  # LIBERO's are numbers
        flags = [*shlex.split(run.flags), *named, "--seed", str(run.seed)]
        return [sys.executable, run.script, *flags, *where]
    if run.final_episodes and not final(run):
        temperatures = [f"{temperature:g}" for temperature in run.temperatures]
        flags = ["--episodes", str(run.final_episodes), "--temperature", *temperatures]
        return [sys.executable, "enjoy.py", str(folder), *flags, "--json", f"{folder}/final.json"]
    return None


def environment(run: Run) -> dict:
    """One thread a run, as its matrices are small; who asked for no GPU sees none."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "MUJOCO_EGL_DEVICE_ID": "0"}  # or robosuite parses the ""
    return {"OMP_NUM_THREADS": "1"} | ({} if run.resources["num_gpus"] else hidden)


def note_start(run: Run) -> None:
    """A line in starts.jsonl: when, where and with what a run was started or went on."""
    info, source = Path("/proc/cpuinfo"), Path(run.script).read_bytes()
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    note = {"date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu[1] if cpu else os.uname().machine}
    note |= {"cores": os.cpu_count(), "flags": run.flags}
    note |= {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    # The script's name in git; `git log --find-object` finds commits that have this version of it
    note["script_blob"] = hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest()
    if run.resources["num_gpus"]:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        note["gpu"] = subprocess.check_output(query, text=True).splitlines()[0]
    with (run.home / "starts.jsonl").open("a") as file:
        print(json.dumps(note), file=file)


def lock(log) -> None:
    """Waits for another sweep that is at this run, and not in flock, which would hold up Ctrl-C."""
    while True:
        try:
            return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)


def execute(run: Run):
    """Does what `plan` finds, its output in log.txt; (script, exit code), None if nothing is."""
    libc = ctypes.CDLL(None)

    def die_with_parent():  # an orphan of a killed worker would keep the retry locked out
        if sys.platform == "linux":
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; scripts' files are always whole

    run.home.mkdir(parents=True, exist_ok=True)
    with (run.home / "log.txt").open("a") as log:
        lock(log)  # the child inherits it with its output, and holds it too
        command = plan(run)
        if command is None:
            return None
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        if command[1] == run.script:
            note_start(run)
        process = subprocess.Popen(
            command,
            env=os.environ | environment(run),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us
            preexec_fn=die_with_parent,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)  # not wait(): ray.cancel interrupts only between lines of Python
        finally:
            process.terminate()
            process.wait()
    return command[1], process.returncode


def last_lines(run: Run, n: int) -> str:
    return "\n    ".join((run.home / "log.txt").read_text(errors="replace").splitlines()[-n:])


def work(run: Run) -> str:
    """The Ray task: does all that is left of a run; how it ended, in words."""
    os.chdir(ROOT)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so shells start what is in the
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background; ray.cancel needs it
    kills = 0
    while done := execute(run):
        script, code = done
        if "stopped; go on with" in last_lines(run, 1):
            return "stopped"  # by somebody's Ctrl-C or kill
        kills += code < 0  # by a signal: kill -9, or a system that is out of memory
        again = plan(run)
        idle = code == 0 and again and again[1] == script  # it would go on like that for ever
        if code > 0 or kills > RETRIES or idle:
            return f"FAILED with exit code {code}"
    return "finished"


def connect(address: str, jobs: int, runs: list):
    """Ray on this machine, or the cluster at `address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it reports to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # or runs give way to everything else
    try:
        import ray
    except ImportError:
        require(False, "no Ray: pip install -r requirements/benchmark.txt, or see --dry-run")
    local = dict(num_cpus=jobs or None, include_dashboard=False, object_store_memory=100_000_000)
    where = dict(address=address) if address else dict(address="local", **local)
    ray.init(**where, log_to_driver=False, logging_level="ERROR")
    for run in [] if address else runs:  # a cluster may grow; here it would wait for ever
        for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            want, have = run.resources[key], ray.cluster_resources().get(name, 0)
            require(want <= have, f"{run.label}: wants {key} {want}, there are {have:g}")
    return ray


def sweep(runs: list, jobs: int, address: str):
    """Does on Ray what is left of `runs`; (run -> how it ended, the signal that stopped it)."""
    ends = {run: "finished" for run in runs if not plan(run)}
    todo = sorted(set(runs) - set(ends), key=lambda run: (run.seed, runs.index(run)))
    if not todo:  # by seed, so that a sweep which is stopped early leaves whole comparisons
        return ends, 0
    ray, stop, cancelled = connect(address, jobs, todo), [], False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stop.append(number))
    task = ray.remote(max_retries=RETRIES)(work)  # Ray tries again where worker or machine is lost
    active = {task.options(**run.resources).remote(run): run for run in todo}
    print(f"{len(todo)} of {len(runs)} runs to do", flush=True)

    while active and len(stop) < 2:  # who asks twice does not want to wait
        if stop and not cancelled:
            for ref in active:
                ray.cancel(ref)  # interrupts `work`, which ends its child
            cancelled = True
        for ref in ray.wait(list(active), timeout=1)[0]:
            run = active.pop(ref)
            try:
                ends[run] = ray.get(ref)
            except ray.exceptions.RayError as error:  # cancelled, or its worker lost too often
                ends[run] = "stopped" if stop else f"FAILED in Ray, {error}"
            how = ends[run].partition("\n")[0]
            print(time.strftime("%H:%M:%S"), how, run.label, describe(run), flush=True)
    ray.shutdown()
    return ends, stop[0] if stop else 0


def condense(run: Run, out: Path) -> None:
    """Writes LABEL.csv, .npz and .json of a run folder into `out`."""
    folder = newest(run.home)
    with np.load(folder / "eval.npz", allow_pickle=False) as file:
        names = [name for name in KEPT if name in file and (run.paths or name != "path")]
        arrays = {name: file[name].astype(KEPT[name]) for name in names}
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [[f"{float(x):.8g}" if x else "" for x in line.split(",")] for line in lines]
    args = json.loads((folder / "args.json").read_text().replace(f"{ROOT}/", ""))
    starts = run.home / "starts.jsonl"  # a run that was started by hand has none
    meta = {key: getattr(run, key) for key in ("label", "spec", "arm", "env_id", "seed", "script")}
    meta["finished"] = is_trained(run)
    meta["args"] = {key: args[key] for key in args if key not in ("run_dir", "resume")}
    meta["starts"] = [json.loads(line) for line in starts.open()] if starts.exists() else []
    last = meta["starts"][-1].get("flags", run.flags) if meta["starts"] else run.flags
    require(last == run.flags, f"{run.home}: ran with {last!r}; remove it or rename its arm")
    if last := final(run):
        meta["final"] = {key: last[key] for key in ("episodes", "seed", "global_step")}
        for who, tau in itertools.product(("frozen", "steered"), last["temperatures"]):
            numbers, name = last[who][f"{tau:g}"], f"{who}_{tau:g}"
            episodic = [key for key in numbers if isinstance(numbers[key], list)]
            arrays |= {f"final_{name}_{k}": np.float32(numbers.pop(k)) for k in episodic}
            meta["final"][name] = numbers
    (out / f"{run.label}.csv").write_text("\n".join([header, *map(",".join, rows), ""]))
    (out / f"{run.label}.json").write_text(json.dumps(meta, indent=1) + "\n")
    np.savez_compressed(out / f"{run.label}.npz", **arrays)


def collect(runs: list, results: Path) -> None:
    """Condenses the run folders, finished or not, into small files to commit."""
    for run in runs:
        if is_trained(run) and plan(run):
            report(run, work(run))  # its final evaluation was missing
        out = results / run.spec
        out.mkdir(parents=True, exist_ok=True)
        lacks = ", no final evaluation" if run.final_episodes and not final(run) else ""
        state = "finished" if is_trained(run) else "UNFINISHED"
        try:
            if len(returns_of(run)[0]):
                condense(run, out)
            print(f"{run.label}: {state}, {describe(run)}{lacks}")
        except Exception as error:  # damaged files fail in many ways, and hide no other run
            print(f"{run.label}: left out ({type(error).__name__}: {error})")


def report(run: Run, how: str) -> None:
    if how.startswith("FAILED"):
        print(f"\n{run.label} {how}; the end of {run.home}/log.txt:\n    {last_lines(run, 8)}")


if __name__ == "__main__":
    os.chdir(ROOT)
    args = tyro.cli(Args, description=__doc__)
    runs = [run for run in load_spec(args.spec, args.runs) if args.only in run.label]
    require(runs, f"--only {args.only}: no run of {args.spec} has that in its label")
    if args.dry_run:
        for run in runs:
            command = plan(run)
            variables = " ".join(f"{key}={value}" for key, value in environment(run).items())
            print(f"{variables} {shlex.join(command)}" if command else f"# {run.label} is finished")
        sys.exit()
    ends, stop = ({}, 0) if args.collect else sweep(runs, args.jobs, args.address)
    for run, how in ends.items():
        report(run, how)
    if stop:
        print(f"stopped; the same command goes on: {shlex.join(['python', *sys.argv])}")
        sys.exit(128 + stop)
    collect(runs, args.results)
    sys.exit(any(how != "finished" for how in ends.values()))
