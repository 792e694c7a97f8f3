"""What delta does to modes: a table and two figures for each of lpds_toy.py's sweeps.

    python benchmark/run.py toy/multigoal         # train and collect; and toy/avoiding
    python benchmark/plot_toy.py                  # both, as far as there are results
    python benchmark/plot_toy.py toy/multigoal    # one of them

Reads benchmark/results/SPEC/LABEL.{csv,npz,json}, never a run folder. Writes
benchmark/results/SPEC_modes.md (figures of single seeds) and benchmark/figures/SPEC_paths.png,
SPEC_modes.png. Runs that are not finished or do not fit the others are named and left out.
"""

import sys
from pathlib import Path

import numpy as np
import plot
import tyro
from matplotlib.figure import Figure
from tyro.conf import Positional

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import lpds_toy  # noqa: E402

WORLDS = {"MultiGoal": lpds_toy.MultiGoal, "Avoiding": lpds_toy.Avoiding}
SPECS = ("toy/multigoal", "toy/avoiding")
GOALS = ["bottom left", "top right", "top left", "bottom right"]  # in the order of MultiGoal.GOALS
SPENT = ["E‖Δ‖²/δ", "‖Δ(start)‖²/δ"]
PANELS = {
    "MultiGoal": [*GOALS, "return", "largest share", *SPENT],
    "Avoiding": ["success", "modes", "entropy of modes", "largest share", *SPENT],
}


def shares(r: dict):
    """Of all successes, how many took each goal or route, at every evaluation: (E, modes)."""
    mode = r["evals"]["mode"]  # (E, episodes), -1 for failures
    n = {"MultiGoal": 4, "Avoiding": 24}[r["env_id"]]
    counts = np.stack([(mode == i).sum(1) for i in range(n)], 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def entropy(r: dict):
    """Of these shares: 0 where all took one, 1 where all are equally frequent; (E,)."""
    p = shares(r)
    logs = np.log(np.where(p > 0, p, 1))
    return -(p * logs).sum(1) / np.log(p.shape[1])


def columns(r: dict) -> dict:
    """Title -> values at every evaluation, which is every row of metrics.csv, too."""
    rows, delta = r["rows"], r["args"].get("delta", np.nan)
    found = {"return": rows["eval/episodic_return"], "success": rows["eval/success"]}
    found |= {"largest share": shares(r).max(1), "modes": (shares(r) > 0).sum(1)}
    found["entropy of modes"] = entropy(r)
    spent = rows["trust_region/replay_sq_norm"], rows["trust_region/start_sq_norm"]
    return found | {title: norm / delta for title, norm in zip(SPENT, spent)}


def late(r: dict) -> dict:
    """Their means over the last third of the steps."""
    last = r["evals"]["global_step"] >= r["steps"] * 2 / 3
    return {title: values[last].mean() for title, values in columns(r).items()}


def table(spec: dict, runs: list) -> str:
    """A row for each frozen policy and for each arm, in each cell the seeds one by one."""
    titles = list(columns(runs[0]))
    lines = [["policy", "seeds", *titles, "minutes"]]
    for name, of in plot.group(runs, "frozen").items():
        lines.append([name, "–", *(values[0] for values in columns(of[0]).values()), np.nan])
    for arm, of in plot.group(runs, "arm").items():
        numbers = [late(r) | {"minutes": r["minutes"]} for r in of]
        cells = [[x[title] for x in numbers] for title in numbers[0]]
        lines.append([arm, ", ".join(str(r["seed"]) for r in of), *cells])

    def show(cell, title: str) -> str:
        if isinstance(cell, str):
            return cell
        digits = {"modes": 1, "minutes": 1}.get(title, 2)
        return ", ".join(plot.number(x, f".{digits}f") for x in np.atleast_1d(cell))

    head, *body = lines
    body = [[show(cell, title) for cell, title in zip(line, head)] for line in body]
    return "\n".join(
        [
            f"<!-- written by: python benchmark/plot_toy.py {spec['name']} -->",
            f"# {spec['title']}: modes\n",
            "Means over the last third of the steps, seed by seed; frozen: the first evaluation.\n",
            plot.to_markdown([head, *body]) + "\n",
        ]
    )


def draw_paths(path: Path, runs: list, results: Path) -> None:
    """A hundred episodes of the frozen policy and of each arm's first seed, at its end."""
    panels = {}
    for arm, of in plot.group(runs, "arm").items():
        with np.load(results / of[0]["spec"] / f"{of[0]['label']}.npz", allow_pickle=False) as file:
            if "path" not in file:  # kept of the first seed alone
                continue
            frozen, steered = file["path"]
        mode = of[0]["evals"]["mode"]
        panels.setdefault("frozen", (frozen, mode[0]))  # the first; DPPO has another
        panels[arm] = steered, mode[-1]
    lpds_toy.draw(path, WORLDS[runs[0]["env_id"]], panels)
    plot.shrink(path)


def draw_modes(path: Path, spec: dict, runs: list) -> None:
    """Against steps: thin lines are seeds, thick ones their means."""
    titles = PANELS[runs[0]["env_id"]]
    figure = Figure((14, 6.5), layout="constrained")
    for axis, title in zip(figure.subplots(2, len(titles) // 2).flat, titles):
        axis.set_title(f"share of {title}" if title in GOALS else title, loc="left")
        for arm, of in plot.group(runs, "arm").items():
            look = {"color": spec["looks"][arm]["color"], "ls": spec["looks"][arm]["ls"]}
            steps = of[0]["evals"]["global_step"] / 1000
            curves = [columns(r) | dict(zip(GOALS, shares(r).T)) for r in of]
            lines = np.array([curve[title] for curve in curves])
            axis.plot(steps, lines.T, **look, lw=0.5, alpha=0.6)
            axis.plot(steps, lines.mean(0), **look, lw=1.8, label=arm)
        if title in GOALS:
            axis.set_ylim(0, 1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("thousand environment steps; thin: single seeds, thick: their mean")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plot.shrink(path)


def main(
    specs: Positional[tuple[str, ...]] = SPECS,
    results: Path = HERE / "results",
    figures: Path = HERE / "figures",
):
    """See above.

    Args:
        specs: as below benchmark/specs, without .yaml, or paths of .yaml files
        results: where run.py put its condensed runs, and where the tables go
        figures: where the pictures go
    """
    figures.mkdir(parents=True, exist_ok=True)
    for name in specs:
        spec, runs = plot.load(name, results)
        runs = [r for r in runs if not r["left_out"]]
        print(f"{name}: {len(runs)} of {spec['planned'].total()} runs")
        if runs:
            (results / f"{spec['name']}_modes.md").write_text(table(spec, runs))
            base = spec["name"].replace("/", "_")
            draw_paths(figures / f"{base}_paths.png", runs, results)
            draw_modes(figures / f"{base}_modes.png", spec, runs)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
