"""The sweep behind `python lpds_toy.py`, whose flags it takes: every method, delta and seed, then one figure of all.

python benchmark/toy.py --deltas 0.05 0.2 --seeds 5
python benchmark/toy.py --resume runs/FOLDER
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import plot_toy  # noqa: E402

import lpds_toy  # noqa: E402
from lpds_toy import blame, require, save  # noqa: E402

FREE = [name for name in lpds_toy.FREE if name != "resume"]


def commands(args, folder: Path) -> list:
    """[(folder of the run, command), ...] of what is still to do; the first seed of everything, then the second."""
    names = list(asdict(args))
    ours, both = names[names.index("delta_norm") : names.index("env_id")], names[names.index("env_id") :]
    both = [name for name in both if name not in ("backbone", "seed", "exp_name", "run_dir", "resume")]

    def flags(chosen):
        for name in chosen:
            value, flag = getattr(args, name), name.replace("_", "-")
            on_off = isinstance(value, bool)
            yield from [f"--{flag}" if value else f"--no-{flag}"] if on_off else [f"--{flag}", str(value)]

    lpds, dsrl = str(ROOT / "lpds_toy.py"), str(ROOT / "baselines" / "dsrl_toy.py")
    methods = [(f"delta-{delta:g}", [lpds, "--delta", str(delta), *flags(ours)]) for delta in args.deltas]
    methods = methods * ("lpds" in args.methods) + [("dsrl", [dsrl])] * ("dsrl" in args.methods)
    labels = [label for label, _ in methods]
    require(len({*labels}) == len(labels), f"--deltas {args.deltas}: two of them are the same; give each once")
    left = []
    for seed in range(args.seed, args.seed + args.seeds):
        for label, command in methods:
            home = folder / f"{label}__{seed}"
            # curves.png is the last file that a run writes, perhaps of a smaller budget
            done = sorted(home.glob("*/curves.png"))[-1:]
            if done and plot_toy.read_csv(done[0].with_name("metrics.csv"))["global_step"][-1] >= args.total_timesteps:
                continue
            where = ["--backbone", str(folder / "backbone.pt"), "--seed", str(seed), "--run-dir", str(home)]
            where += ["--exp-name", label]
            command = [sys.executable, *command, *flags(both), *where]
            for checkpoint in sorted(home.glob("*/checkpoint.pt"))[-1:]:
                command = [sys.executable, command[1], "--resume", str(checkpoint.parent), *flags(("env_id", *FREE))]
            left.append((home, command))
    return left


def sweep(args) -> Path:
    """Runs what is still to do, as many at once as there are cores, each with one thread; the sweep's folder."""
    folder = Path(args.resume or Path(args.run_dir, f"{args.env_id}__{args.exp_name}__sweep__{int(time.time())}"))
    with blame(f"--run-dir {args.run_dir}: {folder.name} cannot be made there"):
        folder.mkdir(parents=True, exist_ok=True)
    save(folder / "args.json", lambda file: file.write_text(json.dumps(asdict(args) | {"resume": ""}, indent=1)))
    if not (folder / "backbone.pt").is_file():  # cloned here if it is missing, not by every run at once
        args.resume = ""
        save(folder / "backbone.pt", partial(shutil.copy, lpds_toy.load_decoder(args)[2]["path"]))
    waiting, running, failed, stop = commands(args, folder), {}, [], []
    jobs = os.cpu_count() or 1
    print(f"{len(waiting)} runs, {jobs} at once, in {folder}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    bar = tqdm(total=len(waiting), disable=args.no_progress or None, unit="run")
    while waiting and not stop or running:
        while waiting and not stop and len(running) < jobs:
            home, command = waiting.pop(0)
            home.mkdir(exist_ok=True)
            with (home / "log.txt").open("a") as log:  # a session of its own: Ctrl-C reaches it through us, once
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                running[home] = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        time.sleep(0.1)
        for home, child in list(running.items()):
            if child.poll() is not None:
                del running[home]
                bar.update()
                failed += [home] * (child.returncode != 0 and not stop)
                if failed:  # the others would fail alike
                    waiting.clear()
            elif stop:
                child.terminate()  # it saves at the end of its round
    bar.close()
    again = f"python lpds_toy.py {shlex.join(['--resume', str(folder)])}"
    log = failed and failed[0] / "log.txt"
    require(not failed, f"{len(failed)} runs failed, the end of {log} says why; then go on with: {again}")
    if stop:
        print(f"stopped, what was running is saved; go on with: {again}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    return folder


if __name__ == "__main__":
    args = lpds_toy.parse_args()
    require(args.delta is None, f"--delta {args.delta}: is one run of lpds_toy.py; a sweep takes --deltas {args.delta}")
    folder = sweep(args)
    print(f"finished: {plot_toy.draw(folder)}, {plot_toy.table(folder)}")
