"""Tables and figures from the results of benchmark/run.py; its sweep may still be going on.

    python benchmark/plot.py                   # every spec of benchmark/specs that has results
    python benchmark/plot.py continuous/main   # one of them

Reads benchmark/results/SPEC/LABEL.{csv,npz,json}, never a run folder. Writes
benchmark/results/SPEC.md and benchmark/figures/SPEC_{return|success,entropy,front}.png. Averaged
are finished runs of equal length and settings, one a seed; any other is named, with the reason.
docs/benchmark.md says how to read them.
"""

import itertools
import json
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import run as bench
import tyro
import yaml
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import Positional

HERE = Path(__file__).resolve().parent
FREE = ("seed", "device", "track", "exp_name", "total_timesteps")  # what seeds may not share
SHOWN = [("return", 1, ".0f"), ("success", 1, ".3f"), ("return", 0, ".0f"), ("success", 0, ".3f")]
SCORED = [f"{what}, tau {tau}" for what, tau, _ in SHOWN]  # in tables; figures have every tau


# --- Statistics (Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice") ---
# In numpy, not with the authors' package: rliable 1.2.0 does not run with pandas 3, and draws from
# numpy's global generator whatever random_state it gets. The numbers agree, see the tests.
def iqm(*strata):
    """Interquartile mean over the last axis of all strata: a quarter is cut at either end."""
    scores = np.sort(np.concatenate(strata, -1), -1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def improvement(*strata):
    """P(X > Y) + P(X = Y) / 2 for random runs (Mann-Whitney's U), mean over strata x1 .. y1 .."""
    half = len(strata) // 2
    found = []
    for x, y in zip(strata[:half], strata[half:]):
        x, y = x[..., :, None], y[..., None, :]
        found.append(((x > y) + 0.5 * (x == y)).mean((-2, -1)))
    return np.mean(found, 0)


def interval(statistic, *strata, draws: int = 10_000):
    """95 % percentile interval: runs (last axis) drawn with replacement, in every stratum alone."""
    rng = np.random.default_rng(0)
    drawn = [s[..., rng.integers(s.shape[-1], size=(draws, s.shape[-1]))] for s in strata]
    return np.percentile(statistic(*drawn), [2.5, 97.5], axis=-1)


# --- Reading ---
def group(runs: list, key: str) -> dict:
    """Value of r[key] -> the runs that have it."""
    values = dict.fromkeys(r[key] for r in runs)
    return {value: [r for r in runs if r[key] == value] for value in values}


def read(run, results: Path) -> dict:
    """A run: its .json, every episode, rows by column, curves. Raises where it is damaged."""
    base = str(results / run.spec / run.label)
    r = json.loads(Path(f"{base}.json").read_text())
    if r["label"] != run.label:
        raise ValueError(f"its .json is of {r['label']}")
    with np.load(f"{base}.npz", allow_pickle=False) as file:
        evals = {key: file[key].astype(float) for key in file.files if key != "path"}
    header, *lines = Path(f"{base}.csv").read_text().splitlines()
    cells = [[float(cell or "nan") for cell in line.split(",")] for line in lines]
    nothing = np.full(len(lines), np.nan)
    named = zip(header.split(","), np.array(cells).T, strict=True)
    rows = defaultdict(lambda: nothing, named)  # no method has all columns

    rows["entropy"] = entropy = rows["entropy/action"] - rows["entropy/action_frozen"]
    rows["budget"] = rows["trust_region/violation"] + 1  # E||Delta||^2 / delta
    known = np.isfinite(entropy)
    curves = {"entropy": (rows["global_step"][known] / 1000, entropy[known])}
    for kind in ("return", "success"):
        curves[kind] = (evals["global_step"] / 1000, evals[kind].mean(1))
    r |= {"run": run, "evals": evals, "rows": rows, "curves": curves, "frozen": "frozen"}
    return r | {"steps": int(evals["global_step"][-1]), "minutes": rows["wall_seconds"][-1] / 60}


def progress(r: dict) -> str:
    """What is missing of an unfinished run."""
    if r["steps"] < r["run"].total:
        return f"is at step {r['steps']:,} of {r['run'].total:,}"
    return "has no final evaluation" if r["run"].final_episodes and "final" not in r else ""


def fault(r: dict, others: list) -> str:
    """Why a run may not be averaged with the `others` of its arm and environment."""
    if r["steps"] > 1.02 * r["run"].total:  # the last chunks reach a little beyond
        return f"has {r['steps']:,} steps, not {r['run'].total:,}"
    for other in others:
        if other["args"]["seed"] == r["args"]["seed"]:
            return f"has seed {r['args']['seed']} like {other['label']}"
        differs = [key for key in r["args"] if r["args"][key] != other["args"].get(key)]
        if differs := [key for key in differs if key not in FREE]:
            return f"differs from {other['label']} in {', '.join(differs)}"
    return ""


def judge(runs: list) -> None:
    """Gives every run its `fault` and `left_out` (why it is not averaged), and names these."""
    good = {}
    for r in runs:
        others = good.setdefault((r["arm"], r["env_id"]), [])
        r["fault"] = fault(r, others)
        r["left_out"] = r["fault"] or progress(r)
        if not r["fault"]:
            others.append(r)
        if r["left_out"]:
            print(f"{r['run'].spec}/{r['label']}: not averaged, it {r['left_out']}")


def frozen_name(r: dict) -> str:  # its decoder, and how that is sampled if not as its file says
    ddpm = Path(r["run"].script).name.startswith("dppo_")
    return f"frozen {Path(r['args'].get('backbone') or r['args']['policy']).stem}" + ", DDPM" * ddpm


def load(name: str, results: Path) -> tuple:
    """(spec, its runs as far as there are results), included ones first, on its environments."""
    planned = bench.load_spec(name, Path())
    path = Path(name) if name.endswith(".yaml") else bench.SPECS / f"{name}.yaml"
    spec = {"title": name, "score": "return"} | yaml.safe_load(path.read_text())
    spec["name"] = path.stem if name.endswith(".yaml") else name
    own = [run for run in planned if run.spec == spec["name"]]
    spec["envs"] = list(dict.fromkeys(run.env_id for run in own or planned))
    planned = [run for run in planned if run.env_id in spec["envs"]]
    spec["planned"] = Counter((run.arm, run.env_id) for run in planned)
    spec["looks"] = {arm: look(i) for i, arm in enumerate(dict.fromkeys(r.arm for r in planned))}

    runs = []
    for run in planned:
        try:
            if list((results / run.spec).glob(f"{run.label}.*")):
                runs.append(read(run, results))
        except Exception as error:  # damaged files fail in many ways, and hide no other run
            print(f"{run.spec}/{run.label}: not read ({type(error).__name__}: {error})")
    for here in group(runs, "env_id").values():
        for r in here if len({frozen_name(r) for r in here}) > 1 else ():
            r["frozen"] = frozen_name(r)
    judge(runs)
    return spec, runs


# --- Numbers ---
def episodes(r: dict, who: str, tau: float, what: str):
    """Fresh episodes of a policy at a temperature. Where there are none, of tau 1 those of
    training: the first evaluation of the frozen policy, the last three of the steered one."""
    evals, none = r["evals"], np.zeros(0)
    if "final" in r:
        return evals.get(f"final_{who}_{tau:g}_{what}", none)
    if tau != 1:
        return none
    return evals[what][0] if who == "frozen" else evals[what][1:][-3:].ravel()


def scores(runs: list, who: str, tau: float, what: str):
    """The mean over its episodes, of every run."""
    played = [episodes(r, who, tau, what) for r in runs]
    return np.array([x.mean() if len(x) else np.nan for x in played])


def level(played: list) -> tuple:
    """Mean, low and high end of its 95 % interval over [episodes of a run, ...]. Runs that steer
    one decoder played the same ones, on other CPUs not to the bit: each counts once, as a mean."""
    same = [[x for x in played if len(x) == n] for n in {len(x) for x in played}]
    x = np.concatenate([np.mean(of, 0) for of in same])
    if len(x) < 2:
        return np.nan, np.nan, np.nan
    half = 1.96 * x.std(ddof=1) / len(x) ** 0.5
    return x.mean(), max(x.mean() - half, x.min()), min(x.mean() + half, x.max())


def late(r: dict, key: str) -> float:
    """Mean over the rows of the last third of the steps."""
    y = r["rows"][key][r["rows"]["global_step"] >= r["steps"] * 2 / 3]
    y = y[np.isfinite(y)]
    return y.mean() if len(y) else np.nan


def entropy(r: dict, who: str, tau: float) -> float:
    """Action entropy less that of the frozen policy at temperature 1, in nats, in the final
    evaluation; -inf where most samples coincide, as at temperature 0."""
    final = r.get("final", {})
    if not final.keys() >= {f"{who}_{tau:g}", "frozen_1"}:
        return np.nan
    mine = final[f"{who}_{tau:g}"]
    return mine["entropy"] - final["frozen_1"]["entropy"] if mine["ties"] < 0.5 else -np.inf


def numbers(r: dict) -> list:
    """Entropy given up at temperature 1, and the share of the budget that is used."""
    final = entropy(r, "steered", 1)
    return [late(r, "entropy") if np.isnan(final) else final, late(r, "budget")]


# --- Tables: lists of rows, the first one the header ---
NUMBERS = ["entropy, steered − frozen", "E‖Δ‖²/δ"]


def number(x, form: str, spread: str = "") -> str:
    return f"{x:{form}}{spread}" if np.isfinite(x) else "–"


def over(statistic, *strata, form: str) -> str:
    """A statistic of runs and its interval; of single runs the number alone."""
    limits = ""
    if min(len(x) for x in strata) > 1:
        low, high = interval(statistic, *strata)
        limits = f" [{low:{form}}, {high:{form}}]"
    return number(statistic(*strata), form, limits)


def machine(r: dict) -> list:
    """What a run was trained on, in words; several where it went on elsewhere."""
    words = []
    for start in r["starts"]:
        where = start.get("gpu") or f"{start['cpu']}, {start['cores']} cores"
        words.append(f"{where}, torch {start['torch']}, mujoco {start['mujoco']}")
    return list(dict.fromkeys(words or ["not recorded"]))


def comparison(spec: dict, used: list, letters: dict) -> list:
    """Frozen and steered policies side by side."""
    rows = [["environment", "policy", "seeds", *SCORED, *NUMBERS, "minutes", "steps", "machine"]]
    for env, here in group(used, "env_id").items():
        for name, of in group(here, "frozen").items():
            cells = []
            for what, tau, form in SHOWN:
                mean, low, high = level([episodes(r, "frozen", tau, what) for r in of])
                cells.append(number(mean, form, f" [{low:{form}}, {high:{form}}]"))
            rows.append([env, name, "–", *cells, "0", "–", "–", "–", "–"])
        for name, of in group(here, "arm").items():
            cells = [f"{len(of)} of {spec['planned'][name, env]}"]
            cells += [over(iqm, scores(of, "steered", t, what), form=f) for what, t, f in SHOWN]
            cells += [over(iqm, x, form=".2f") for x in np.array([numbers(r) for r in of]).T]
            cells.append(f"{np.mean([r['minutes'] for r in of]):.0f}")
            cells.append(f"{min(r['steps'] for r in of):,}")
            cells.append("".join(sorted({letters[text] for r in of for text in machine(r)})))
            rows.append([env, name, *cells])
    return rows


def chances(spec: dict, used: list) -> list:
    """P(LP-DS > it) for every other arm at both temperatures; no rows where no two arms have two
    seeds each."""
    arms = group(used, "arm")
    ours = "LP-DS" if "LP-DS" in arms else next(iter(arms), "")
    rows = [[f"P({ours} > it), {spec['score']}", "tau", *spec["envs"], "all"]]

    def strata(name: str, tau: float) -> list:
        of = [[r for r in arms[name] if r["env_id"] == env] for env in spec["envs"]]
        return [scores(runs, "steered", tau, spec["score"]) for runs in of]

    def chance(*strata) -> str:
        whole = all(len(x) > 1 and np.isfinite(x).all() for x in strata)
        return over(improvement, *strata, form=".2f") if whole else "–"

    for name, tau in itertools.product(arms, (1, 0)):
        x, y = strata(ours, tau), strata(name, tau)
        cells = [chance(*pair) for pair in zip(x, y)] + [chance(*x, *y)]
        if name != ours and set(cells) != {"–"}:
            rows.append([name, str(tau), *cells])
    return rows


def run_table(runs: list, letters: dict) -> list:
    """A row for every run, averaged or not."""
    head = ["environment", "arm", "seed", "steps", "episodes", *SCORED, *NUMBERS, "α at the end"]
    head += ["q_w_corr", "minutes", "machine", "date", "script", "not averaged, because it"]
    rows = [head]
    for r in runs:
        kind = "fresh" if "final" in r else "last 3"
        cells = [f"{r['steps']:,}", f"{len(episodes(r, 'steered', 1, 'return'))} {kind}"]
        for what, tau, form in SHOWN:
            x = episodes(r, "steered", tau, what)
            spread = f" ± {x.std(ddof=1):.0f}" if what == "return" and len(x) > 1 else ""
            cells.append(number(x.mean() if len(x) else np.nan, form, spread))
        cells += [number(x, ".2f") for x in numbers(r)]
        cells.append(number(r["rows"]["trust_region/alpha"][-1], ".3g"))
        cells += [number(late(r, "losses/q_w_corr"), ".2f"), f"{r['minutes']:.0f}"]
        cells.append("".join(letters[text] for text in machine(r)))
        cells.append(max((start["date"][:10] for start in r["starts"]), default="–"))
        cells.append(" ".join({start["script_blob"][:7]: 0 for start in r["starts"]}) or "–")
        rows.append([r["env_id"], r["arm"], str(r["seed"]), *cells, r["left_out"]])
    return rows


def to_markdown(rows: list) -> str:
    rows = [rows[0], ["---", "---", *["---:"] * (len(rows[0]) - 2)], *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- Figures ---
# Okabe and Ito's colours, the dark ones first; dashes and markers tell the lines apart without them
COLORS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9"]
DASHES = ["-", (0, (5, 1.5)), (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (8, 1, 1, 1, 1, 1))]
MARKERS = "osD^vXP*"
GREY = {"color": "0.45", "ls": (0, (3, 2))}
SEEDS = "Interquartile mean over seeds and its 95 % bootstrap interval"
CURVES = f"{SEEDS}; thin: single seeds. Grey: the frozen policy"
FRONT = f"""{SEEDS}. Along every line the noise is turned down, from tau = 1 (filled) to 0, left of
the dotted line, where all samples coincide and no entropy can be told"""


def look(i: int) -> dict:
    return {"color": COLORS[i % 7], "ls": DASHES[i % 5], "marker": MARKERS[i % 8]}


def curve(of: list, kind: str) -> tuple:
    """x, interquartile mean, its limits, as far as all runs have come."""
    curves = [r["curves"][kind] for r in of]
    x = min((x for x, _ in curves), key=lambda x: x[-1])
    y = np.stack([np.interp(x, *points) for points in curves], -1)  # (points, seeds)
    return x, iqm(y), interval(iqm, y, draws=2_000)


def draw_curves(axis, here: list, kind: str, looks: dict) -> None:
    """A line for every arm: its finished runs, or all while none is."""
    for of in group(here, "frozen").values():
        mean, low, high = 0, 0, 0  # of entropy, which is told as a difference
        if kind != "entropy":
            mean, low, high = level([r["evals"][kind][0] for r in of])
        axis.axhline(mean, **GREY, label="frozen")
        axis.axhspan(low, high, color="0.45", alpha=0.15, lw=0)
    for name, of in group(here, "arm").items():
        of = [r for r in of if not r["left_out"]] or of
        x, y, limits = curve(of, kind)
        for r in of if len(of) > 1 else ():
            axis.plot(*r["curves"][kind], color=looks[name]["color"], lw=0.5, alpha=0.6)
        axis.fill_between(x, *limits, color=looks[name]["color"], alpha=0.15, lw=0)
        axis.plot(x, y, **looks[name], lw=1.8, ms=4.5, markevery=max(len(x) // 8, 1), label=name)
    axis.set(xlabel="thousand environment steps", xlim=(0, None))


def front(of: list, who: str, score: str) -> tuple:
    """Of a policy at all its temperatures, from high to low: entropy (T,), score (T,) and its
    limits (2, T)."""
    x, y, limits = [], [], []
    for tau in sorted({tau for r in of for tau in r["run"].temperatures}, reverse=True):
        runs = [r for r in of if len(episodes(r, who, tau, score))]
        if runs:
            x.append(np.mean([entropy(r, who, tau) for r in runs]))
            y.append(iqm(scores(runs, who, tau, score)))
            limits.append(interval(iqm, scores(runs, who, tau, score)))
    return np.array(x), np.array(y), np.array(limits).T


def draw_front(axis, here: list, score: str, looks: dict) -> None:
    """Score against entropy, a line for every policy through its temperatures."""
    lines = {}
    for name, of in group(here, "frozen").items():
        lines[name] = front(of, "frozen", score), GREY | {"marker": "o", "label": "frozen"}
    for name, of in group(here, "arm").items():
        lines[name] = front(of, "steered", score), looks[name] | {"label": name}
    known = np.concatenate([x[np.isfinite(x)] for (x, _, _), _ in lines.values()])
    span = max(np.ptp(known), 1)
    edge = known.min() - 0.15 * span
    axis.axvline(known.min() - 0.08 * span, color="0.7", lw=0.8, ls=":")
    for (x, y, limits), line in lines.values():
        x = np.where(np.isfinite(x), x, edge)
        style = line | dict(mfc="white", lw=1.4, ms=5, elinewidth=0.6)
        axis.errorbar(x, y, abs(limits - y), **style)
        axis.plot(x[:1], y[:1], line["marker"], color=line["color"], ms=5, zorder=3)
    axis.set(xlabel="action entropy, less frozen (nats)")


def make_figure(path: Path, spec: dict, runs: list, kind: str) -> None:
    """An axis for every environment, and one legend."""
    envs = group(runs, "env_id")
    columns = min(len(envs), 3)
    rows = -(-len(envs) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 5), 3 * rows + 1), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    handles = {}
    for axis, (env, here) in zip(axes, envs.items()):
        if kind == "front":
            draw_front(axis, here, spec["score"], spec["looks"])
        else:
            draw_curves(axis, here, kind, spec["looks"])
        axis.set_title(env, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        handles |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
    for axis in axes[len(envs) :]:
        axis.remove()
    axes[0].set_ylabel({"entropy": NUMBERS[0], "front": spec["score"]}.get(kind, kind))
    place = dict(loc="outside upper center", ncols=2 * columns, frameon=False, fontsize=9)
    figure.legend(handles.values(), handles.keys(), **place)
    caption = textwrap.fill(FRONT if kind == "front" else CURVES, int(15 * figure.get_figwidth()))
    figure.supxlabel(caption, fontsize=8, color="0.3")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    shrink(path)


def shrink(path: Path) -> None:  # to 256 colours, a third of the size
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def write(spec: dict, runs: list, results: Path, figures: Path) -> None:
    """The page and the figures of a spec, as far as there are data."""
    used = [r for r in runs if not r["left_out"]]
    texts = dict.fromkeys(text for r in runs for text in machine(r))
    letters = {text: chr(65 + i) for i, text in enumerate(texts)}
    tables = comparison(spec, used, letters), chances(spec, used), run_table(runs, letters)
    parts = [f"<!-- written by: python benchmark/plot.py {spec['name']} -->", f"# {spec['title']}"]
    parts += [to_markdown(rows) for rows in tables if len(rows) > 1]
    parts.append("Machine " + "; ".join(f"{letter}: {text}" for text, letter in letters.items()))
    parts.append("How to read these tables: docs/benchmark.md\n")
    (results / f"{spec['name']}.md").write_text("\n\n".join(parts))

    good = [r for r in runs if not r["fault"]]
    shown = {spec["score"]: good, "entropy": [r for r in good if len(r["curves"]["entropy"][0])]}
    shown["front"] = [r for r in used if "final" in r]
    figures.mkdir(parents=True, exist_ok=True)
    for kind, some in shown.items():
        if some:
            make_figure(figures / f"{spec['name'].replace('/', '_')}_{kind}.png", spec, some, kind)


def main(
    specs: Positional[tuple[str, ...]] = (),
    results: Path = HERE / "results",
    figures: Path = HERE / "figures",
):
    """See above.

    Args:
        specs: as below benchmark/specs, without .yaml, or paths of .yaml files; none: all
        results: where run.py put its condensed runs, and where the tables go
        figures: where the pictures go
    """
    files = sorted(bench.SPECS.rglob("*.yaml"))
    for name in specs or [str(p.relative_to(bench.SPECS).with_suffix("")) for p in files]:
        spec, runs = load(name, results)
        if any(r["run"].spec == spec["name"] for r in runs):  # included ones alone compare nothing
            write(spec, runs, results, figures)
        print(f"{name}: {sum(not r['left_out'] for r in runs)} of {spec['planned'].total()} runs")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
