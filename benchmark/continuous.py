"""The experiments behind docs/lpds_continuous.md: runs them, keeps their numbers, turns these into tables and figures.

python benchmark/continuous.py run seeds --jobs 2   # train; goes on where it was stopped; --dry-run shows commands
python benchmark/continuous.py collect seeds        # runs/benchmark/seeds -> benchmark/results/continuous/seeds
python benchmark/continuous.py plot                 # tables and figures, from the collected results alone
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import matplotlib.figure
import numpy as np
import tyro
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]  # every relative path starts here, and every command runs here
RUNS, RESULTS, FIGURES = Path("runs/benchmark"), Path("benchmark/results/continuous"), Path("benchmark/figures")
BUDGET, LONG = "--total-timesteps 100000", "--total-timesteps 150000"
FLOW = "--env-id Hopper-v4 --backbone backbones/hopper-v4-medium-flow.pt"
ENVS = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
DELTAS = {"Hopper-v4": (0.1, 0.35, 0.5, 0.66), "Walker2d-v4": (0.1, 0.35, 0.66)}  # the paper's among them: 0.5 and 0.35
PARTS = {"action": "--perturb action", "linear-dual": "--dual linear",
         "no-lagrangian": "--no-lagrangian --noise-bound none",
         "no-lagrangian-bound-2.5": "--no-lagrangian --noise-bound 2.5"}  # fmt: skip
SPECS = {  # spec -> label of a run -> its flags; runs whose labels differ only behind __seed are averaged
    # What the README quotes: the script's defaults
    "seeds": {f"{env}__seed{seed}": f"--env-id {env} --seed {seed} {BUDGET}" for env in ENVS for seed in (1, 2, 3)},
    # Which reading of equation 7, tried on a seed that is not among the reported ones
    "norm": {f"{env}-{norm}-{delta}__seed101": f"--env-id {env} --delta-norm {norm} --delta {delta} --seed 101 {LONG}"
             for env in DELTAS for norm in ("sum", "mean") for delta in DELTAS[env]}
            # and one run from the time when the mean was the default of Walker2d
            | {"Walker2d-v4-mean-0.35__seed1": f"--env-id Walker2d-v4 --delta-norm mean --seed 1 {BUDGET}"},
    # The same steering of another kind of decoder
    "flow": {f"Hopper-v4-flow__seed{seed}": f"{FLOW} --seed {seed} {BUDGET}" for seed in (1, 2, 3)},
    # DSRL's number of updates where the default is half of it
    "updates": {"HalfCheetah-v4-utd-20__seed1":
                f"--env-id HalfCheetah-v4 --utd 20 --distill-steps 10 --seed 1 {BUDGET}"},
    # One part removed or replaced at a time; `seeds` has the complete method
    "ablation": {f"Walker2d-v4-{name}__seed1": f"--env-id Walker2d-v4 --seed 1 {flags} {BUDGET}"
                 for name, flags in PARTS.items()},
}  # fmt: skip
Spec = Literal[tuple(SPECS)]


# --- Run folders ---
def newest(home: Path):
    """The run folder in `home` to go on with: the latest time stamp in its name, one with a checkpoint if any has."""
    folders = [f for f in home.glob("*__*__*__*") if f.is_dir()]
    return max(folders, key=lambda f: ((f / "checkpoint.pt").is_file(), f.name.rpartition("__")[2]), default=None)


def read_csv(path: Path) -> dict:
    """column -> float array, nan where a cell is empty; ValueError where lines are cut off or missing."""
    header, *lines = path.read_text().splitlines() or [""]
    cells = np.array([[float(c or "nan") for c in line.split(",")] for line in lines])
    return dict(zip(header.split(","), cells.T, strict=True))


def look(home: Path, flags: str):
    """(steps reached, finished, minutes of training, result in words) of a run as it stands on disk."""
    total = int(re.search(r"--total-timesteps (\d+)", flags)[1])
    try:
        m = read_csv(newest(home) / "metrics.csv")
        steps, returns = int(m["global_step"][-1]), m["eval/episodic_return"][np.isfinite(m["eval/episodic_return"])]
        minutes = m["wall_seconds"][-1] / 60
        text = f"return {returns[-1]:.0f} (frozen {returns[0]:.0f}), step {steps:,} of {total:,}, {minutes:.0f} min"
        return steps, steps >= total, minutes, text
    except (TypeError, OSError, ValueError, KeyError, IndexError):  # no run folder, or nothing whole in it
        return 0, False, 0.0, "nothing logged"


# --- run ---
def plan(home: Path, flags: str, script: str) -> list:
    """The command that starts a run, or continues it where a checkpoint lies."""
    folder = newest(home)
    resume = folder and (folder / "checkpoint.pt").is_file()  # with its flags again: changed ones are refused
    where = ["--resume", str(folder)] if resume else ["--run-dir", str(home)]
    return [sys.executable, script, *flags.split(), *where]


def start(command: list, home: Path, jobs: int):
    """Starts one run, its circumstances noted in starts.jsonl; BlockingIOError where another process is at it."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log.txt").open("a") as log, (home / "starts.jsonl").open("a") as starts:
        # The child inherits the lock with its stdout: it holds as long as the child lives, whatever becomes of us
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        cpuinfo, source = Path("/proc/cpuinfo"), Path(command[1]).read_bytes()
        cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
        note = {"date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu[1] if cpu else os.uname().machine,
                "cores": os.cpu_count(), "cores_used": 1, "jobs": jobs, "python": sys.version.split()[0],
                # The script's name in git: `git log --find-object` finds the commit that has exactly this version
                "script_blob": hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest()}  # fmt: skip
        print(json.dumps(note), file=starts)
        # A session of its own: Ctrl-C reaches it only through us, once
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def run(spec: Positional[Spec], jobs: int = 2, only: str = "", dry_run: bool = False, runs: Path = RUNS,
        script="lpds_continuous.py"):  # fmt: skip
    """Trains what is not finished, `jobs` runs at a time on one thread each; --dry-run prints the commands instead.

    --only takes a part of a label: the runs that have it in their name.
    """
    say = lambda event, text: print(f"{time.strftime('%H:%M:%S')} {event:>9} {text}", flush=True)  # noqa: E731
    waiting, active, failed, stop, told = [label for label in SPECS[spec] if only in label], {}, [], [], False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, frame: stop.append(n))
    while active or (waiting and not stop):
        if waiting and len(active) < max(jobs, 1) and not stop:
            label = waiting.pop(0)
            home, flags = runs / spec / label, SPECS[spec][label]
            command, (_, finished, _, text) = plan(home, flags, script), look(home, flags)
            if finished:
                print(f"# {label}: finished already, {text}")
            elif dry_run:
                print(f"cd {ROOT} && OMP_NUM_THREADS=1 {shlex.join(command)}")
            else:
                try:
                    active[label] = start(command, home, jobs)
                    say("continued" if "--resume" in command else "started", f"{label}: {text}")
                except BlockingIOError:
                    say("busy", f"{label}: another process trains it; left alone")
            continue
        time.sleep(0.1)
        if stop and not told:
            told = [process.terminate() for process in active.values()]  # they finish their step, save and exit
        for label in [label for label, process in active.items() if process.poll() is not None]:
            code = active.pop(label).returncode
            _, finished, _, text = look(runs / spec / label, SPECS[spec][label])
            say("finished" if finished else "stopped" if stop else "FAILED", f"{label}: {text}")
            failed += [] if finished or stop else [(label, code)]
    for label, code in failed:
        log = runs / spec / label / "log.txt"
        tail = "\n    ".join(log.read_text(errors="replace").rpartition("$ ")[2].splitlines()[-8:])
        print(f"\n{label} failed with exit code {code}; the end of {log}:\n    {tail}")
    if stop:
        print(f"stopped; the same command goes on from here: python benchmark/continuous.py run {spec} --jobs {jobs}")
    sys.exit(128 + stop[0] if stop else bool(failed))


# --- collect ---
def collect(spec: Positional[Spec], runs: Path = RUNS, results: Path = RESULTS):
    """Condenses the run folders of SPEC, finished or not, into small files to commit."""
    import torch

    out = results / spec
    out.mkdir(parents=True, exist_ok=True)
    for label, flags in SPECS[spec].items():
        home = runs / spec / label
        folder, (steps, finished, minutes, text) = newest(home), look(home, flags)
        if folder is None:
            print(f"{label}: {'left out, no run folder in ' + str(home) if home.exists() else 'not started'}")
            continue
        try:
            # Five significant digits are enough, whole numbers stay exact, columns that are empty throughout go
            m = {k: v for k, v in read_csv(folder / "metrics.csv").items() if not np.isnan(v).all()}
            short = lambda v: "" if np.isnan(v) else f"{v:.0f}" if v.is_integer() else f"{v:.5g}"  # noqa: E731
            lines = [",".join(m), *(",".join(map(short, row)) for row in zip(*m.values(), strict=True)), ""]
            with np.load(folder / "eval.npz", allow_pickle=False) as f:
                evals = {k: f[k].astype(np.float32) for k in ("return", "success", "length")}  # (evaluations, episodes)
                evals["global_step"] = f["global_step"]
            state = torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True, weights_only=True)
            meta = {"label": label, "finished": finished, "steps": steps, "minutes": round(minutes, 1),
                    "date": time.strftime("%Y-%m-%d", time.localtime((folder / "metrics.csv").stat().st_mtime)),
                    "device": "cpu" if state["cuda_rng"] is None else "cuda", "versions": state["versions"],
                    # Where and when it ran; a run that was started by hand does not say
                    "starts": [json.loads(s) for f in home.glob("starts.jsonl") for s in f.read_text().splitlines()],
                    "args": json.loads((folder / "args.json").read_text())}  # fmt: skip
        except Exception as error:  # damaged files fail in many ways, and none of them may hide the other runs
            print(f"{label}: left out, half-written: {folder} ({type(error).__name__}: {str(error)[:90]})")
            continue
        (out / f"{label}.csv").write_text("\n".join(lines))
        (out / f"{label}.json").write_text(json.dumps(meta, indent=1) + "\n")
        np.savez_compressed(out / f"{label}.npz", **evals)
        print(f"{label}: {'finished' if finished else 'UNFINISHED'}, {text}")
    size = sum(f.stat().st_size for f in out.iterdir()) / 1000
    print(f"{out} holds {len(list(out.glob('*.json')))} of {len(SPECS[spec])} runs in {size:.0f} kB")


# --- plot: tables ---
COLUMNS = {"frozen return": ".0f", "final return": ".0f", "best evaluation": ".0f", "E‖Δ‖²/δ": ".2f", "α": ".3g",
           "entropy, steered − frozen (nats)": ".2f", "q_w_corr": ".2f", "minutes": ".0f"}  # fmt: skip
NOTE = """
Returns are means over evaluation episodes on fixed seeds. Final: the last three evaluations, ± the standard deviation
of their episodes, in bold rows that of the seeds. Best: the highest single evaluation, picked afterwards, so flattered.
E‖Δ‖²/δ, entropy, q_w_corr: means over the last third of the steps. α: last value. Band in figures: 2 standard errors.
"""


def load(folder: Path) -> list:
    """The collected runs of a spec: what collect put in the .json, curves to draw, numbers for the table."""
    runs = []
    for label in (label for label in SPECS[folder.name] if (folder / f"{label}.json").exists()):
        m, r = read_csv(folder / f"{label}.csv"), json.loads((folder / f"{label}.json").read_text())
        with np.load(folder / f"{label}.npz", allow_pickle=False) as f:
            step, returns = f["global_step"], f["return"].astype(float)  # (evaluations, episodes)
        column = lambda key, m=m: m.get(key, np.full(len(m["global_step"]), np.nan))  # noqa: E731
        curves = {"used": column("trust_region/violation") + 1, "alpha": column("trust_region/alpha"),
                  "entropy": column("entropy/action") - column("entropy/action_frozen"),
                  # LP-DS-A neither trains nor uses its latent critic
                  "corr": column("losses/q_w_corr" if r["args"]["perturb"] == "noise" else "")}  # fmt: skip
        late = {k: y[np.isfinite(y) & (m["global_step"] >= r["steps"] * 2 / 3)] for k, y in curves.items()}
        used, alpha, entropy, corr = (y if len(y) else np.array([np.nan]) for y in late.values())
        steered = returns[1:] if len(returns) > 1 else np.full((1, 2), np.nan)  # the first is of the frozen decoder
        numbers = [returns[0].mean(), steered[-3:].mean(), steered.mean(1).max(), used.mean(), alpha[-1],
                   entropy.mean(), corr.mean(), r["minutes"]]  # fmt: skip
        r["curves"] = {"return": (step, returns.mean(1))} | {k: (m["global_step"], y) for k, y in curves.items()}
        runs.append(r | {"group": label.rpartition("__seed")[0], "numbers": numbers, "spread": steered[-3:].std(ddof=1),
                         "frozen": returns[0]})  # fmt: skip
    return runs


def table(spec: str, runs: list) -> str:
    """SPEC.md: a row for every run, and a bold one where several seeds have finished."""
    lines = [f"<!-- written by: python benchmark/continuous.py plot {spec} -->", ""]
    lines += ["| run | seeds | steps | " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) + 2) + "|"]
    for group in dict.fromkeys(r["group"] for r in runs):
        members = [r for r in runs if r["group"] == group]
        done = [r for r in members if r["finished"]]
        for rows in [[r] for r in members] + ([done] if len(done) > 1 else []):
            numbers = np.array([r["numbers"] for r in rows])
            spread = numbers[:, 1].std(ddof=1) if len(rows) > 1 else rows[0]["spread"]
            cells = [f"{x:{form}}" for x, form in zip(numbers.mean(0), COLUMNS.values(), strict=True)]
            cells[1] += f" ± {spread:.0f}"
            steps = f"{min(r['steps'] for r in rows):,}" + ("" if rows[0]["finished"] else " (unfinished)")
            name, seeds = f"**{group}**" if len(rows) > 1 else group, " ".join(str(r["args"]["seed"]) for r in rows)
            line = f"| {name} | {seeds} | {steps} | {' | '.join(cells)} |"
            lines.append(line.replace("nan ± nan", "–").replace(" nan ", " – "))
    machines = {f"{n.get('cpu', 'processor not recorded')}, one core a run, {n.get('jobs', '?')} at a time, torch "
                f"{r['versions']['torch']} on {r['device']}" for r in runs for n in r["starts"] or [{}]}  # fmt: skip
    return "\n".join([*lines, NOTE, f"Machine: {'; '.join(sorted(machines))}.", ""])


# --- plot: figures ---
PANELS = {"norm": ["return", "used"], "ablation": ["return", "used", "entropy"]}  # the others show returns alone
YLABEL = {"return": "return", "used": "E‖Δ‖²/δ", "entropy": "entropy, steered − frozen (nats)"}
LINES = [("#0072B2", "-"), ("#D55E00", "-."), ("black", (0, (7, 1))), ("#009E73", (0, (4, 1, 1, 1))), ("#AA4499", ":")]
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"})


def draw(axis, spec: str, key: str, env: str, runs: list):
    """One panel: a line for every group of runs, labelled at its end; several seeds each thin, their mean thick."""
    ends, decoders = [], {r["args"]["backbone"]: r["frozen"] for r in runs} if key == "return" else {}
    for i, group in enumerate(dict.fromkeys(r["group"] for r in runs)):
        members, (color, dashes) = [r for r in runs if r["group"] == group], LINES[i % len(LINES)]
        name, args = group.removeprefix(env).strip("-") or {"flow": "diffusion"}.get(spec, "LP-DS"), members[0]["args"]
        if spec == "norm":  # the smaller delta the lighter, dashed where coordinates are summed
            color = matplotlib.colormaps["viridis"](0.9 - 1.35 * args["delta"])
            dashes, name = "--" if args["delta_norm"] == "sum" else "-", f"{args['delta_norm']}, δ {args['delta']}"
        curves = [r["curves"][key] for r in members]
        n = min(len(y) for _, y in curves)  # the mean goes as far as all seeds have come
        x, y = (np.mean([c[i][:n] for c in curves], 0) for i in (0, 1))
        for thin in curves if len(members) > 1 else []:
            axis.plot(thin[0] / 1000, thin[1], color=color, ls=dashes, lw=0.6)
        axis.plot(x / 1000, y, color=color, ls=dashes, lw=2.2 if len(members) > 1 else 1.4)
        ends.append((y[-1], name, color))
    for backbone, episodes in decoders.items():  # the frozen decoder, with two standard errors of its mean
        mean, band = episodes.mean(), 2 * episodes.std(ddof=1) / len(episodes) ** 0.5
        axis.axhline(mean, color="0.35", ls="--", lw=1)
        axis.axhspan(mean - band, mean + band, color="0.35", alpha=0.12, lw=0)
        kind = "" if len(decoders) == 1 else " flow" if "flow" in backbone else " diffusion"
        ends.append((mean, "frozen" + kind, "0.35"))
    scale = {"yscale": "log", "ylim": (0.1, None)} if key == "used" else {}
    axis.set(title=env, xlabel="thousand environment steps", ylabel=YLABEL[key], **scale, xlim=(0, None))
    height = lambda y: (axis.transData - axis.transAxes).transform((0, y))[1]  # noqa: E731
    ends = sorted((height(y), name, color) for y, name, color in ends if np.isfinite(y))
    rank = 0.065 * np.arange(len(ends))  # labels of lines that end close together are pushed apart
    at = np.minimum(np.maximum.accumulate([y for y, _, _ in ends] - rank) + rank, 1 - rank[::-1])
    for y, (_, name, color) in zip(at, ends, strict=True):
        axis.text(1.02, y, name, color=color, transform=axis.transAxes, va="center")


def plot(spec: Positional[Literal["all", Spec]] = "all", results: Path = RESULTS, figures: Path = FIGURES):
    """Writes the table and the figure of SPEC, or of all that have results, from the collected files alone."""
    figures.mkdir(parents=True, exist_ok=True)
    for name in SPECS if spec == "all" else [spec]:
        runs, path = load(results / name), figures / f"continuous_{name}.png"
        if not runs:
            print(f"{name}: nothing in {results / name}; run and collect it first")
            continue
        (results / f"{name}.md").write_text(table(name, runs))
        # Beside a variant stands the complete method on the same environment, from `seeds`
        ours = {"flow": "Hopper-v4", "ablation": "Walker2d-v4__seed1", "updates": "HalfCheetah-v4__seed1"}
        ours = ours.get(name, "none")
        runs = [r for r in load(results / "seeds") if r["label"].startswith(ours)] + runs
        envs, keys = list(dict.fromkeys(r["args"]["env_id"] for r in runs)), PANELS.get(name, ["return"])
        shape = (len(envs), len(keys)) if len(keys) > 1 else (1, len(envs))
        figure = matplotlib.figure.Figure(figsize=(4.8 * shape[1], 3.2 * shape[0]), layout="constrained")
        axes = figure.subplots(*shape, squeeze=False).flat
        for axis, (env, key) in zip(axes, [(env, key) for env in envs for key in keys], strict=True):
            draw(axis, name, key, env, [r for r in runs if r["args"]["env_id"] == env])
        figure.savefig(path, dpi=130)
        print(f"{name}: {len(runs)} run(s) in {results / name}.md and {path}")


if __name__ == "__main__":
    os.chdir(ROOT)
    tyro.extras.subcommand_cli_from_dict({"run": run, "collect": collect, "plot": plot}, description=__doc__)
