"""Figures of lpds_toy.py.

python benchmark/plot_toy.py runs/SWEEP              # figure.png: paths, modes, constraint; table.md: numbers
python benchmark/plot_toy.py runs/SWEEP --keep DIR   # and condenses what they need into DIR, small enough to commit
python benchmark/plot_toy.py runs/RUN                # states.png: where in the plane a run spends its budget
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from run import read_csv
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import lpds_toy  # noqa: E402
from lpds_toy import Avoiding, MultiGoalVector, require, save  # noqa: E402

GOALS = [tuple(goal) for goal in MultiGoalVector.GOALS.astype(int).tolist()]


def read(folder: Path) -> tuple:
    """(settings of the sweep, label -> [run of each seed, ...]); a run's keys are those of metrics.csv and eval.npz."""
    runs = {}
    homes = sorted(folder.glob("*__*/"), key=lambda home: int(home.name.rpartition("__")[2]))  # by their seeds
    for file in [file for home in homes for file in sorted(home.glob("*__*/eval.npz"))[-1:]]:
        with np.load(file, allow_pickle=False) as arrays:
            run = read_csv(file.with_name("metrics.csv")) | {f"eval.{key}": arrays[key] for key in arrays.files}
        args = run["args"] = json.loads(file.with_name("args.json").read_text())
        if "trust_region/violation" in run:  # neither DSRL nor before the end of the warm-up
            d = {"MultiGoal": 2, "Avoiding": 8}[args["env_id"]] if args["delta_norm"] == "mean" else 1
            run["start/delta"] = run["trust_region/start_sq_norm"] / (d * args["delta"])
            run["ratio"] = run["trust_region/replay_sq_norm"] / (d * args["delta"])
        runs.setdefault(file.parents[1].name.rpartition("__")[0], []).append(run)
    require(runs, f"{folder}: holds no runs; give the folder of a sweep of lpds_toy.py")
    order = sorted(runs, key=lambda label: (label == "dsrl", runs[label][0]["args"].get("delta")))
    return json.loads((folder / "args.json").read_text()), {label: runs[label] for label in order}


def draw_paths(axis, world: str, paths, modes) -> None:
    """At most 100 episodes in the plane, in the colour of the goal or route; failures are grey."""
    wheel = matplotlib.colormaps["hsv"](np.linspace(0, 0.95, 24))
    for path, mode in zip(paths[:100], modes):
        color = "0.7" if mode < 0 else f"C{mode}" if world == "MultiGoal" else wheel[mode]
        axis.plot(*path.T, color=color, linewidth=0.5, alpha=0.7)
    for x, y, radius in Avoiding.POSTS if world == "Avoiding" else [(*goal, 0.2) for goal in GOALS]:
        axis.add_patch(Circle((x, y), radius, fill=world == "Avoiding", color="0.2", linewidth=0.8, zorder=3))
    limits = [(0.15, 0.85), (-0.32, 0.55)] if world == "Avoiding" else [(-1.6, 1.6)] * 2
    axis.set(xlim=limits[0], ylim=limits[1], aspect="equal", xticks=[], yticks=[])


def draw(folder: Path) -> Path:
    """figure.png of a sweep: paths of its first seed; what happened to modes and constraint, mean and single seeds."""
    args, runs = read(folder)
    world = args["env_id"]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
    colors = {label: "black" if label == "dsrl" else shades[i] for i, label in enumerate(runs)}
    names = {label: label.upper() if label == "dsrl" else label.replace("delta-", "$\\delta$ = ") for label in runs}
    figure = Figure((max(2.2 * (len(runs) + 1), 9), 8.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 5])

    some = next(iter(runs.values()))[0]
    axes = top.subplots(1, len(runs) + 1)
    draw_paths(axes[0], world, some["eval.path"][0], some["eval.mode"][0])
    axes[0].set_title("frozen")
    for axis, (label, members) in zip(axes[1:], runs.items()):
        draw_paths(axis, world, members[0]["eval.path"][1], members[0]["eval.mode"][-1])
        axis.set_title(names[label])

    panels = {f"share of goal {goal}": i for i, goal in enumerate(GOALS)}
    if world == "Avoiding":
        panels = {"success": "eval/success", "routes among successes": "eval/modes"}
        panels |= {"entropy of the routes (log 24)": "eval/mode_entropy"}
    panels |= {"largest share": "eval/mode_max", "return": "eval/episodic_return"}
    panels |= {r"$E\|\Delta\|^2 / \delta$": "ratio", r"$\|\Delta(start)\|^2 / \delta$": "start/delta"}
    panels |= {r"$\alpha$": "trust_region/alpha"} if args["trust_region"] == "average" else {}
    axes = bottom.subplots(2, -(-len(panels) // 2)).flat
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, key) in zip(axes, panels.items()):
        axis.set_title(title, fontsize=10)
        for label, members in runs.items():
            curves = [(run["eval.mode"] == key).mean(1) if isinstance(key, int) else run.get(key) for run in members]
            if curves[0] is None:  # DSRL has no constraint
                continue
            n = min(map(len, curves))
            style = {"color": colors[label], "linestyle": "--" if label == "dsrl" else "-"}
            for run, curve in zip(members, curves):
                axis.plot(run["global_step"][:n], curve[:n], **style, linewidth=0.5, alpha=0.5)
            mean = np.mean([curve[:n] for curve in curves], 0)
            axis.plot(members[0]["global_step"][:n], mean, **style, linewidth=1.8, label=names[label])
        if isinstance(key, int):
            axis.set_ylim(0, 1)
        if key in ("start/delta", "trust_region/alpha"):
            axis.set(yscale="log", ylim=(1e-2, None) if key == "start/delta" else None)
        if key == "ratio":
            axis.axhline(1, color="0.5", linewidth=0.8)
            axis.set_ylim(0, 2.5)
        axis.set_xlim(0, args["total_timesteps"])
        axis.locator_params(axis="x", nbins=3)
    handles, texts = axes[0].get_legend_handles_labels()
    bottom.legend(handles, texts, loc="outside lower center", ncols=len(runs))
    seeds = f"seeds {args['seed']} to {args['seed'] + args['seeds'] - 1}"
    what = f"100 episodes of seed {args['seed']} after {args['total_timesteps']:,} steps, and curves against steps"
    figure.suptitle(f"{world}: {what} ({seeds}; thick: their mean)")
    save(folder / "figure.png", lambda file: figure.savefig(file, format="png", dpi=100))
    return folder / "figure.png"


def table(folder: Path) -> Path:
    """table.md of a sweep: a row for each delta or method, in each cell the seeds one by one, averaged over the last
    fifth of their evaluations."""
    args, runs = read(folder)
    n = {"MultiGoal": 4, "Avoiding": 24}[args["env_id"]]

    def late(run, key):  # what follows the noise of single evaluations
        values = run[key][-max(len(run[key]) // 5, 1) :] if key in run else [np.nan]
        return np.nanmean(values) if np.isfinite(values).any() else np.nan

    def shares(run):  # (evaluations, modes), of the successes
        mode = run["eval.mode"]
        return np.stack([(mode == i).sum(1) for i in range(n)], 1) / np.maximum((mode >= 0).sum(1), 1)[:, None]

    ends = ("modes above 5 % at the end", lambda run: f"{(shares(run)[-1] >= 0.05).sum()}")
    if args["env_id"] == "Avoiding":
        ends = ("routes at the end", lambda run: f"{run['eval/modes'][-1]:.0f}")
    columns = {
        "return": lambda run: f"{late(run, 'eval/episodic_return'):.1f}",
        "success": lambda run: f"{late(run, 'eval/success'):.2f}",
        "largest share": lambda run: f"{late(run, 'eval/mode_max'):.2f}",
        "its highest": lambda run: f"{run['eval/mode_max'].max():.2f}",
        ends[0]: ends[1],
        f"entropy (log {n})": lambda run: f"{late(run, 'eval/mode_entropy'):.2f}",
        "E\\|\\|Delta\\|\\|^2 / delta": lambda run: f"{late(run, 'ratio'):.2f}",
        "\\|\\|Delta(start)\\|\\|^2 / delta": lambda run: f"{late(run, 'start/delta'):.1f}",
        "minutes": lambda run: f"{run['wall_seconds'][-1] / 60:.1f}",
    }
    rows = [["", *columns], ["---", *["---:"] * len(columns)]]
    for label, members in runs.items():
        cells = (", ".join(column(run) for run in members).replace("nan", "-") for column in columns.values())
        rows.append([label.upper() if label == "dsrl" else label.replace("-", " "), *cells])
    first = next(iter(runs.values()))[0]
    frozen = [f"{first['eval/frozen_return'][0]:.1f}", f"{first['eval/frozen_success'][0]:.2f}"]
    frozen += [f"{first[key][0]:.2f}" for key in ("eval/mode_max", "eval/mode_max")]
    rows.insert(2, ["frozen", *frozen, *["-"] * (len(columns) - 4)])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    save(folder / "table.md", lambda file: file.write_text(text))
    return folder / "table.md"


def keep(folder: Path, target: Path) -> None:
    """Copies what `draw` and `table` read: settings, metrics, and of evaluations modes and the first seed's paths."""
    first = json.loads((folder / "args.json").read_text())["seed"]
    for pattern in ("args.json", "*__*/*__*/args.json", "*__*/*__*/metrics.csv", "*__*/*__*/eval.npz"):
        for file in folder.glob(pattern):
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".npz":
                save(copy, partial(shutil.copy, file))
                continue
            with np.load(file, allow_pickle=False) as arrays:  # fine enough for the eye, a tenth of the size
                small = {"mode": arrays["mode"].astype(np.int8)}
                if file.parents[1].name.endswith(f"__{first}"):
                    small["path"] = arrays["path"].astype(np.float16)
            save(copy, lambda file: np.savez_compressed(file.open("wb"), **small))  # noqa: B023


@torch.no_grad()
def draw_states(run: Path) -> Path:
    """states.png of a MultiGoal run: Delta(s), ||Delta(s)||^2 / delta in the plane; noise and actions at the start."""
    settings = json.loads((run / "args.json").read_text())
    known = settings.get("perturb") == "noise"
    require(known, f"{run}: has no shift of noise to draw (DSRL, or --perturb action); give a run of LP-DS")
    args = lpds_toy.Args(**settings | {"resume": str(run)})
    require(args.env_id == "MultiGoal", f"{run}: is not of MultiGoal, the only world that fits into a plane")
    decoder, *_ = lpds_toy.load_decoder(args)
    agent = lpds_toy.Agent(args, decoder)
    agent.load_state_dict(lpds_toy.read_tensors(run / "checkpoint.pt", "RUN")["agent"])
    grid = torch.linspace(-2, 2, 81)
    obs = torch.cartesian_prod(grid, grid)
    shift = agent.perturbation(obs)
    spent = shift.square().sum(1) / (args.delta * (2 if args.delta_norm == "mean" else 1))
    figure = Figure((15, 4.6), layout="constrained")
    plane, before, after = figure.subplots(1, 3)
    levels = spent.view(81, 81).T.clamp(1e-2).log10()
    image = plane.imshow(levels, origin="lower", extent=(-2, 2, -2, 2), cmap="viridis")
    figure.colorbar(image, ax=plane, label=r"log$_{10}$ of $\|\Delta(s)\|^2 / \delta$")
    few = slice(None, None, 8)
    x, y, u, v = (column.view(81, 81)[few, few] for column in (*obs.T, *shift.T))
    plane.quiver(x, y, u, v, color="white", angles="xy")
    with np.load(run / "eval.npz") as arrays:  # where episodes pass; elsewhere Delta costs and means nothing
        plane.scatter(*arrays["path"][1].reshape(-1, 2).T, s=1, color="black", alpha=0.3)
    plane.plot(*MultiGoalVector.GOALS.T, "o", color="white", fillstyle="none", markersize=14)
    plane.set_title(r"where the budget goes; arrows: $\Delta(s)$")
    start, noise = torch.zeros(1_000, 2), torch.randn(1_000, 2, generator=torch.Generator().manual_seed(0))
    for name, w, color in (("frozen", noise, "0.6"), ("steered", agent.steer(start, noise), "C0")):
        before.scatter(*w.T, s=4, color=color, label=name)
        after.scatter(*decoder(start, w).T, s=4, color=color, label=name)
    before.set(aspect="equal", title="noise w at the start")
    after.set(aspect="equal", title="and the actions that it becomes")
    before.legend()
    save(run / "states.png", lambda file: figure.savefig(file, format="png", dpi=100))
    return run / "states.png"


def main(folder: Positional[Path], keep_in: Annotated[Path | None, tyro.conf.arg(name="keep")] = None):
    """Draws the figure of a sweep, or the states of one run.

    Args:
        folder: of a sweep or of a run of lpds_toy.py
        keep_in: folder for a small copy of the sweep, which is what is drawn then
    """
    require((folder / "args.json").is_file(), f"{folder}: has no args.json; give a folder that lpds_toy.py has made")
    if (folder / "checkpoint.pt").is_file():
        print(draw_states(folder))
        return
    if keep_in:
        keep(folder, keep_in)
    print(draw(keep_in or folder), table(keep_in or folder))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
