"""Turns the results of benchmark/run.py into tables, figures and a report that a browser opens without a network.

python benchmark/plot.py                            # every spec of benchmark/specs that has results
python benchmark/plot.py cpu --report cpu.html      # one of them

Reads RESULTS/SPEC/LABEL.{csv,npz,json}, never a run folder; a run whose files are missing, cut off or contradict each
other is named in one line and left out. Writes RESULTS/SPEC.md, FIGURES/SPEC_{returns,minutes,success,training,entropy,
budget,sweep}.png and .svg, and the report, which holds what was asked for and nothing else.
"""

import base64
import html
import json
import os
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import tyro
import yaml
from matplotlib.ticker import LogLocator, NullFormatter
from run import read_csv
from tyro.conf import Positional

HERE = Path(__file__).resolve().parent
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "font.sans-serif": ["DejaVu Sans"], "svg.hashsalt": "LP-DS", "svg.fonttype": "none",
})  # fmt: skip


def fail(text: str):
    print(f"plot.py: error: {text}", file=sys.stderr)
    sys.exit(2)


# --- Statistics (Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice") ---
# In numpy, not with the authors' package: rliable 1.2.0 runs on numpy 2.4, but not with pandas 3 (its dependency arch
# fails on import), brings a dozen packages for what is 15 lines, and draws from numpy's global generator whatever
# random_state it gets, so that no table could be made again. The numbers agree, see tests/test_benchmark_plot.py.
def iqm(*strata):
    """Interquartile mean over the last axis of all strata together: a quarter, rounded down, is cut at either end."""
    scores = np.sort(np.concatenate(strata, -1), -1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def improvement(*strata):
    """P(X > Y) + P(X = Y) / 2 for a random run of each: Mann-Whitney's U, averaged over strata x1, ..., y1, ..."""
    half = len(strata) // 2
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(strata[:half], strata[half:], strict=True)]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], 0)


def interval(statistic, *strata, draws: int = 10_000):
    """95 % percentile interval: runs (last axis) drawn with replacement, in every stratum (environment) by itself."""
    rng = np.random.default_rng(0)
    drawn = [s[..., rng.integers(s.shape[-1], size=(draws, s.shape[-1]))] for s in strata]
    return np.percentile(statistic(*drawn), [2.5, 97.5], axis=-1)


def moving_average(y, keep: float = 0.8):
    """Exponential moving average over rows (n,): each keeps 0.8 of the average before it, the first one is its own."""
    out = list(y[:1])
    for value in y[1:]:
        out.append(keep * out[-1] + (1 - keep) * value)
    return np.array(out)


# --- Reading ---
def read(folder: Path, label: str) -> dict:
    """One run: its .json, every evaluation episode, curves to draw, means for the table. Raises where it is damaged."""
    r, m = json.loads((folder / f"{label}.json").read_text()), read_csv(folder / f"{label}.csv")
    with np.load(folder / f"{label}.npz", allow_pickle=False) as f:
        e = {k: f[k].astype(float) for k in f.files}
    step, returns, at = e["global_step"], e["return"], m["global_step"]
    finals = ("final_frozen_return", "final_steered_return", "final_frozen_success", "final_steered_success")
    faults = {
        f"the .json is of {r['label']}": r["label"] != label,
        "the .npz holds no episode": not returns.size,
        "the .npz differs in length": not (returns.shape == e["success"].shape and len(step) == len(returns)),
        "its fresh episodes are incomplete": len({e[k].shape if k in e else 0 for k in finals}) > 1,
        "the steps go backwards": (np.diff(step) <= 0).any() or (np.diff(at) < 0).any(),
        f"the .json says step {r['steps']}, the .csv {at[-1]:.0f}": r["steps"] != at[-1] or step[-1] > at[-1],
        "it is finished, but has one evaluation": r["finished"] and len(returns) < 2,
        "an episode has no number": not all(np.isfinite(v).all() for v in e.values()),
    }
    for fault in (text for text, found in faults.items() if found):
        raise ValueError(fault)
    column = lambda key: m.get(key, np.full(len(at), np.nan))  # noqa: E731
    curves = {"used": column("trust_region/violation") + 1, "alpha": column("trust_region/alpha"),
              "entropy": column("entropy/action") - column("entropy/action_frozen"),
              # LP-DS-A neither trains nor uses its latent critic
              "corr": column("losses/q_w_corr" if r["args"].get("perturb", "noise") == "noise" else "")}  # fmt: skip
    late = {k: y[np.isfinite(y) & (at >= r["steps"] * 2 / 3)] for k, y in curves.items()}
    means = {k: np.nan if not len(y) else y[-1] if k == "alpha" else y.mean() for k, y in late.items()}
    known = {k: np.isfinite(y) for k, y in curves.items()}
    curves = {k: (at[known[k]] / 1000, y[known[k]]) for k, y in curves.items()}
    curves["return"] = (step / 1000, returns.mean(1))
    curves["minutes"] = (np.interp(step, at, m["wall_seconds"] / 60), returns.mean(1))
    flagged = slice(None if "success_share" in e else 0)  # locomotion tells no success: nothing to draw
    curves["success"] = (step[flagged] / 1000, e["success"][flagged].mean(1))
    played = np.isfinite(column("charts/success")) & ("success_share" in e)
    curves["training"] = (at[played] / 1000, moving_average(column("charts/success")[played]))
    best = returns[1:].mean(1).max() if len(returns) > 1 else np.nan
    return r | {"evals": e, "curves": curves, "means": means | {"best": best, "minutes": float(r["minutes"])}}


def load(results: Path, specs: Path, name: str, above: tuple = ()):
    """(spec, its runs behind included ones on the same environments); what cannot be read is reported and left out."""
    try:
        text, runs = (specs / f"{name}.yaml").read_text(), []
        spec = {"title": name, "include": [], "arms": {}, "envs": []} | yaml.safe_load(text)
        if name in above:
            raise ValueError("it includes itself")
        others = [load(results, specs, other, (*above, name))[1] for other in spec["include"] or []]
    except FileNotFoundError:
        known = sorted(str(f.relative_to(specs))[:-5] for f in specs.rglob("*.yaml"))
        fail(f"there is no spec {name!r} in {specs}; give some of: {', '.join(known) or 'none is there'}")
    except (yaml.YAMLError, TypeError, ValueError) as error:
        fail(f"{specs / name}.yaml is not a spec that can be read: {' '.join(str(error).split())[:150]}")
    for label in sorted({f.stem for f in (results / name).glob("*") if f.suffix in (".json", ".csv", ".npz")}):
        try:
            r = read(results / name, label)
            rank = [i for i, arm in enumerate(spec["arms"]) if f"{r['arm']} ".startswith(f"{arm} ")] or [99]
            runs.append(r | {"spec": name, "name": r["arm"], "order": (rank[-1], r["arm"], r["seed"])})
        except Exception as error:  # damaged files fail in many ways, and none of them may hide the other runs
            print(f"{name}/{label}: left out ({type(error).__name__}: {' '.join(str(error).split())[:110]})")
    envs = {*spec["envs"], *(r["env_id"] for r in runs)} or {r["env_id"] for r in sum(others, [])}
    unique = {(r["spec"], r["label"]): r for r in sum(others, []) if r["env_id"] in envs}
    for r in unique.values():  # the same arm here and there stays two arms
        r["name"] += f" ({r['spec']})" if r["name"] in {own["name"] for own in runs} else ""
    spec["envs"] = sorted(envs, key=lambda env: ([*spec["envs"], env].index(env), env))
    return spec, [*unique.values(), *sorted(runs, key=lambda r: r["order"])]


# --- Numbers ---
def is_fresh(runs: list) -> bool:
    return all("final_steered_return" in r["evals"] for r in runs)


def episodes(r: dict, fresh: bool, what: str = "return"):
    """(frozen, steered) final episodes: those on fresh seeds, or the frozen evaluation and the last three others."""
    if fresh:
        return r["evals"][f"final_frozen_{what}"].ravel(), r["evals"][f"final_steered_{what}"].ravel()
    return r["evals"][what][0], r["evals"][what][1:][-3:].ravel()


def finals(runs: list, fresh: bool, what: str = "return"):
    """(frozen, steered) final return, or share of successful episodes, of every run."""
    return np.array([[x.mean() if x.size else np.nan for x in episodes(r, fresh, what)] for r in runs]).T


def frozen_level(runs: list, fresh: bool, what: str = "return"):
    """Mean of the frozen decoder and half of its 95 % interval, over the distinct episodes that the runs played."""
    distinct = {episodes(r, fresh)[0].tobytes(): episodes(r, fresh, what)[0] for r in runs}
    x = np.concatenate(list(distinct.values()))
    return x.mean(), 1.96 * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan


def decoders(runs: list) -> dict:
    """Name of the frozen line -> the runs that steer this decoder."""
    paths = list(dict.fromkeys(r["args"].get("backbone", "") for r in runs))
    names = ["frozen" + (f" {Path(p).stem or 'default'}" if len(paths) > 1 else "") for p in paths]
    return {n: [r for r in runs if r["args"].get("backbone", "") == p] for n, p in zip(names, paths, strict=True)}


def arms_of(runs: list, env: str) -> dict:
    """Arm -> its runs on this environment."""
    here = [r for r in runs if r["env_id"] == env]
    return {name: [r for r in here if r["name"] == name] for name in dict.fromkeys(r["name"] for r in here)}


def number(x, form: str, spread: str = "") -> str:
    return f"{x:{form}}{spread}" if np.isfinite(x) else "–"


def bracket(limits, form: str) -> str:
    return f" [{limits[0]:{form}}, {limits[1]:{form}}]"


# --- Tables: lists of rows, the first one the header ---
MEANS = {"best": ("best evaluation", ".0f"), "used": ("E‖Δ‖²/δ", ".2f"), "alpha": ("α", ".3g"),
         "entropy": ("entropy, steered − frozen (nats)", ".2f"), "corr": ("q_w_corr", ".2f"),
         "minutes": ("minutes", ".0f")}  # fmt: skip
NOTES = """
**Returns** are means over episodes with sampled noise. *fresh*: episodes on seeds that training never evaluated, after
its last step; *last 3*: the last three evaluations, on the fixed evaluation seeds. Of a single run ± is the standard
deviation of its episodes; bold rows are over the finished seeds. *Best evaluation* is the highest one, picked
afterwards, so flattered. E‖Δ‖²/δ, entropy and q_w_corr: means over the last third of the steps; α: last value.

**Over seeds**: interquartile mean [95 % interval]. A quarter of the runs, rounded down, is cut at either end: nothing
of two or three, whose interquartile mean is their mean. The interval resamples the seeds of every environment by
themselves (stratified bootstrap, percentiles of 10,000 draws). It is about other training seeds, not about other
environments, decoders or settings. With two or three seeds it is the range from the lowest to the highest, which holds
the centre of a symmetric distribution in 50 % or 75 % of cases, not in 95 %. *frozen*: mean and 95 % interval over
episodes (1.96 standard errors).

**P**: probability that a run of the first returns more than a run of the other, ties half (Mann-Whitney). [1, 1] says
that the seeds at hand do not overlap, no more: of two equal methods with three seeds each, one in ten pairs does that.
*all*: P is averaged over the environments; return / frozen is the interquartile mean of the runs of all of them.
"""


def machine(r: dict) -> list:
    """Where a run was trained, in words; several where it was continued elsewhere."""
    torch = f"torch {r.get('versions', {}).get('torch', '?')} on {r.get('device', '?')}"
    words = [f"{s.get('gpu') or s.get('cpu') or 'processor not recorded'}, {torch}"
             + (f", {s['jobs']} run(s) at a time" if "jobs" in s else "") for s in r.get("starts") or [{}]]  # fmt: skip
    return list(dict.fromkeys(words))


def machines(runs: list) -> dict:
    """Machine in words -> its letter in the table."""
    return {text: chr(65 + i) for i, text in enumerate(dict.fromkeys(text for r in runs for text in machine(r)))}


def run_table(runs: list, envs: list) -> list:
    """A row for every run, and a bold one where several seeds of an arm have finished."""
    letters, titles = machines(runs), [title for title, _ in MEANS.values()]
    head = ["environment", "arm", "seeds", "steps", "frozen return", "final return", "episodes", titles[0], "success"]
    rows = [[*head, *titles[1:], "machine", "date"]]
    for env, arm, members in ((e, a, m) for e in envs for a, m in arms_of(runs, e).items()):
        done = [r for r in members if r["finished"]]
        for of in [[r] for r in members] + ([done] if len(done) > 1 else []):
            bold, fresh = "**" if len(of) > 1 else "", is_fresh(of)
            frozen, final = finals(of, fresh)
            played = episodes(of[0], fresh)[1]
            one = f" ± {played.std(ddof=1):.0f}" if len(played) > 1 else ""
            spread = bracket(interval(iqm, final), ".0f") if bold else one
            success = " → ".join(number(x, ".3f") for x in finals(of, fresh, "success").mean(1))
            kind = f"{len(played)} {'fresh' if fresh else 'last 3'}" if len(played) else "–"
            means = [number(np.mean([r["means"][k] for r in of]), form) for k, (_, form) in MEANS.items()]
            rows.append([bold + env + bold, bold + arm + bold, " ".join(str(r["seed"]) for r in of),
                         f"{min(r['steps'] for r in of):,}" + ("" if of[0]["finished"] else " (unfinished)"),
                         number(frozen.mean(), ".0f"), number(iqm(final), ".0f", spread), kind,
                         means[0], success, *means[1:],
                         "".join(sorted({letters[t] for r in of for t in machine(r)})),
                         max(str(r.get("date", "")) for r in of)])  # fmt: skip
    return rows


def comparison(runs: list, envs: list) -> list:
    """Frozen and steered policies side by side, over the finished seeds; [] where nothing has finished."""
    runs = [r for r in runs if r["finished"]]
    names = list(dict.fromkeys(r["name"] for r in runs))
    envs = [e for e in envs if arms_of(runs, e)]
    if not envs:
        return []
    ours = next((n for n in names if n.lower().replace("-", "") == "lpds"), names[0])
    rows = [["environment", "policy", "seeds", "episodes", "success", "return", "return / frozen", f"P({ours} > it)"]]
    final, ratio = {}, {}
    for env in envs:
        here = [r for r in runs if r["env_id"] == env]
        fresh, arms = is_fresh(here), arms_of(runs, env)  # the same kind of episodes for all that are compared
        for name, of in decoders(here).items():
            mean, half = frozen_level(of, fresh)
            n, spread = episodes(of[0], fresh)[0].size, bracket((mean - half, mean + half), ".0f")
            kind, success = f"{n} {'fresh' if fresh else 'at step 0'}", frozen_level(of, fresh, "success")[0]
            rows.append([env, name, "–", kind, f"{success:.3f}", f"{mean:.0f}{spread}", "1", "–"])
        for name, of in arms.items():
            frozen, final[name, env] = finals(of, fresh)
            ratio[name, env] = final[name, env] / np.where(frozen > 0, frozen, np.nan)
        for name, of in arms.items():
            kind = f"{episodes(of[0], fresh)[1].size} {'fresh' if fresh else 'last 3'}"
            rows.append([env, name, " ".join(str(r["seed"]) for r in of), kind,
                         over([finals(of, fresh, "success")[1]], ".3f"), over([final[name, env]], ".0f"),
                         over([ratio[name, env]], ".2f"), against(final, ours, name, [env])])  # fmt: skip
    for name in names if len(envs) > 1 else []:
        if all((name, env) in final for env in envs):
            rows.append(["**all**", f"**{name}**", *"––––", over([ratio[name, env] for env in envs], ".2f"),
                         against(final, ours, name, envs)])  # fmt: skip
    alone = all(row[-1] == "–" for row in rows[1:])  # no two arms with two seeds each: nothing to compare
    return [row[:-1] for row in rows] if alone else rows


def over(strata: list, form: str) -> str:
    """Interquartile mean and interval, of one run its number alone."""
    return number(iqm(*strata), form, bracket(interval(iqm, *strata), form) if min(map(len, strata)) > 1 else "")


def against(final: dict, ours: str, other: str, envs: list) -> str:
    """P(ours > other) and its interval, where both have two finished seeds in every environment."""
    strata = [final.get((name, env), []) for name in (ours, other) for env in envs]
    if ours == other or min(map(len, strata)) < 2:
        return "–"
    return number(improvement(*strata), ".2f", bracket(interval(improvement, *strata), ".2f"))


# --- Figures ---
KINDS = {  # curve, its axes, what to say about it
    "returns": ("return", "thousand environment steps", "return", "Return against environment steps"),
    "minutes": ("minutes", "minutes of training", "return", "Return against minutes of training"),
    "success": ("success", "thousand environment steps", "success", "Share of episodes that succeed in any step"),
    "training": ("training", "thousand environment steps", "success in training",
                 "Share of training episodes that succeed, exponential moving average over rows (0.8 kept)"),
    "entropy": ("entropy", "thousand environment steps", "entropy, steered − frozen (nats)",
                "Action entropy of the steered policy less that of the frozen one, at the same replay states"),
    "budget": ("used", "thousand environment steps", "E‖Δ‖² / δ", "Share of the budget δ that is used"),
    "sweep": ("", "δ", "final return", "Final return against δ"),
}  # fmt: skip
# Okabe and Ito's colours, the dark ones first; dashes and markers tell the lines apart where there is no colour
COLORS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9"]
DASHES, MARKERS = ["-", (0, (5, 1.5)), (0, (4, 1, 1, 1)), (0, (1, 1)), (0, (8, 1, 1, 1, 1, 1))], "osD^vXP*"
CAPTION = {"": "interquartile mean over seeds and its 95 % bootstrap interval; thin or hollow: single seeds",
           "return": "; grey: frozen decoder, 95 % interval of its mean"}  # fmt: skip
GREY = {"color": "0.35", "ls": (0, (3, 2))}


def style(i: int) -> dict:
    return {"color": COLORS[i % 7], "ls": DASHES[i % 5], "marker": MARKERS[i % 8]}


def curve(members: list, key: str):
    """x, interquartile mean, limits, as far as all finished runs have come (all runs while none has finished)."""
    curves = [r["curves"][key] for r in [r for r in members if r["finished"]] or members]
    curves = [c for c in curves if len(c[0])]
    x = min((x for x, _ in curves), key=lambda x: x[-1])
    if len(x) > 100:  # enough for the eye, and the files stay small
        x = np.linspace(x[0], x[-1], 100)
    y = np.stack([np.interp(x, *c) for c in curves], -1)  # (points, seeds)
    return x, iqm(y), interval(iqm, y, draws=2000) if len(curves) > 1 else None


def wrap(names: list) -> dict:
    """Name -> lines of its label, without the words that all of them begin with."""
    skip = os.path.commonprefix(names).rpartition(" ")[0] if len(names) > 1 else ""
    return {name: textwrap.fill(name.removeprefix(skip).strip(), 18, break_on_hyphens=False) for name in names}


def label_ends(axis, ends: list, inches: float):
    """A sample of every line and its name at the right, where the line ends; what would overlap moves apart."""
    axis.set_ylim(axis.get_ylim())
    height = lambda y: (axis.transData - axis.transAxes).transform((axis.get_xlim()[1], y))[1]  # noqa: E731
    ends = sorted(((height(y), name, look) for y, name, look in ends), key=lambda end: end[0])
    lines = np.array([name.count("\n") + 1 for _, name, _ in ends])
    rank = (np.cumsum(lines) - lines / 2) * 0.16 / inches
    at = np.minimum(np.maximum.accumulate([y for y, _, _ in ends] - rank), 1.05 - lines.sum() * 0.16 / inches) + rank
    for y, (_, name, look) in zip(at, ends, strict=True):
        place = {"transform": axis.transAxes, "clip_on": False}
        axis.plot([1.02, 1.07, 1.12], [y] * 3, **look, **place, lw=1.5, ms=4, markevery=[1])
        axis.text(1.14, y, name, transform=axis.transAxes, va="center", fontsize=9, linespacing=0.95)


def draw_frozen(axis, runs: list, fresh: bool, what: str = "return") -> list:
    ends = []
    for name, of in decoders(runs).items():
        mean, half = frozen_level(of, fresh, what)
        axis.axhline(mean, **GREY, lw=1)
        axis.axhspan(mean - half, mean + half, color="0.35", alpha=0.15, lw=0)
        ends.append((mean, textwrap.fill(name, 18), GREY))
    return ends


def draw_curves(axis, kind: str, env: str, runs: list, labels: dict) -> list:
    """Learning curves of one environment; (height, name, look) of the ends of its lines."""
    key, xlabel, ylabel, _ = KINDS[kind]
    here, names = [r for r in runs if r["env_id"] == env], list(labels)
    ends = draw_frozen(axis, here, False, ylabel) if ylabel in ("return", "success") else []
    if kind in ("entropy", "budget"):
        axis.axhline(kind == "budget", **GREY, lw=1)
        ends.append((kind == "budget", "δ" if kind == "budget" else "frozen", GREY))
    for name, members in arms_of(here, env).items():
        look, (x, y, limits) = style(names.index(name)), curve(members, key)
        for r in members if 1 < len(members) <= 5 else []:
            axis.plot(*r["curves"][key], color=look["color"], ls=look["ls"], lw=0.6, alpha=0.7)
        if limits is not None:
            axis.fill_between(x, *limits, color=look["color"], alpha=0.15, lw=0)
        every = max(len(x) // 8, 1)
        axis.plot(x, y, **look, lw=1.8, ms=4.5, markevery=(names.index(name) % every, every))
        ends.append((y[-1], labels[name], look))
    axis.set(xlabel=xlabel, xlim=(0, None))
    if kind == "budget":
        axis.set(yscale="log", ylim=(0.1, None))
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    return ends


def draw_sweep(axis, env: str, runs: list) -> list:
    """Final return against delta, a line for each reading of the norm; ends as above."""
    here, fresh = [r for r in runs if r["env_id"] == env], is_fresh([r for r in runs if r["env_id"] == env])
    ends = draw_frozen(axis, here, fresh)
    for i, norm in enumerate(sorted({r["args"]["delta_norm"] for r in here})):
        members = [r for r in here if r["args"]["delta_norm"] == norm]
        deltas = sorted({r["args"]["delta"] for r in members})
        scores = [finals([r for r in members if r["args"]["delta"] == d], fresh)[1] for d in deltas]
        y, look = np.array([iqm(s) for s in scores]), style(i)
        limits = np.array([interval(iqm, s) for s in scores]).T
        axis.errorbar(deltas, y, abs(limits - y), **look, lw=1.8, ms=5, capsize=3)
        for d, s in zip(deltas, scores, strict=True):
            axis.plot([d] * len(s), s, look["marker"], color=look["color"], ms=3, mfc="white", mew=0.7)
        ends.append((y[-1], f"norm: {norm}", look))
    axis.set(xlabel="δ", xscale="log")
    axis.set_xticks(ticks := sorted({r["args"]["delta"] for r in here}), [f"{t:g}" for t in ticks], rotation=45)
    axis.minorticks_off()
    return ends


def swept(runs: list, name: str) -> list:
    """Finished runs of a grid over delta, and included ones that differ from these in nothing else."""
    free = ("delta", "delta_norm", "seed", "run_dir", "resume", "exp_name", "device", "track", "no_progress")
    same = lambda r: (r["env_id"], *((k, str(v)) for k, v in sorted(r["args"].items()) if k not in free))  # noqa: E731
    grid = {same(r) for r in runs if r["finished"] and r["spec"] == name and " delta=" in r["arm"]}
    found = [r for r in runs if r["finished"] and same(r) in grid]
    return [r for r in found if len({s["args"]["delta"] for s in found if s["env_id"] == r["env_id"]}) > 1]


def make_figures(name: str, spec: dict, runs: list, folder: Path) -> dict:
    """Writes FOLDER/NAME_KIND.png and .svg of every kind that has data; kind -> .svg."""
    paths, labels = {}, wrap(list(dict.fromkeys(r["name"] for r in runs)))
    inches = max(1.9, 0.16 * (2 + sum(label.count("\n") + 1 for label in labels.values())))  # height of an axis
    for kind, (key, _, ylabel, _) in KINDS.items():
        shown = swept(runs, name) if kind == "sweep" else [r for r in runs if len(r["curves"][key][0])]
        envs = [env for env in spec["envs"] if env in {r["env_id"] for r in shown}]
        if not envs:
            continue
        rows, columns = -(-len(envs) // 3), min(len(envs), 3)
        size = max(3.2 * columns, 4.8), (inches + 0.75) * rows + 0.3
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for i, (axis, env) in enumerate(zip(axes, envs)):
            ends = draw_sweep(axis, env, shown) if kind == "sweep" else draw_curves(axis, kind, env, shown, labels)
            axis.set(title=env, ylabel="" if i % columns else ylabel)
            label_ends(axis, ends, inches)
        for axis in axes[len(envs) :]:
            axis.remove()
        caption = CAPTION[""] + CAPTION["return"] * ylabel.endswith(("return", "success"))
        figure.supxlabel(textwrap.fill(caption, int(15 * size[0])), fontsize=8, color="0.3")
        path = paths[kind] = folder / f"{name.replace('/', '_')}_{kind}.svg"
        figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        path.write_text(re.sub(r"(\.\d\d)\d+", r"\1", path.read_text()))  # a hundredth of a point is enough
    return paths


# --- Report ---
STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 1.5rem 0 } figcaption { font-size: .85rem }
img { max-width: 100%; background: white; border-radius: 6px; padding: .3rem } div { overflow-x: auto }
table { border-collapse: collapse; font-size: .72rem; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #8886; text-align: right; vertical-align: bottom }
:is(th, td):nth-child(-n + 2) { text-align: left } td { white-space: nowrap } p { font-size: .9rem; max-width: 62rem }
@media print { body { max-width: none; margin: 0 } table { font-size: .5rem } tr, figure { break-inside: avoid } }"""


def rich(text: str) -> str:
    """HTML of a line of ours, with **bold** and *emphasis*."""
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text)))


def to_html(rows: list) -> str:
    row = lambda cells, tag: f"<tr>{''.join(f'<{tag}>{rich(c)}</{tag}>' for c in cells)}</tr>"  # noqa: E731
    head, body = row(rows[0], "th"), "\n".join(row(cells, "td") for cells in rows[1:])
    return f"<div><table>\n<thead>{head}</thead>\n{body}\n</table></div>"


def to_markdown(rows: list) -> str:
    rows = [rows[0], ["---", "---", *["---:"] * (len(rows[0]) - 2)], *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section(spec: dict, runs: list, tables: list, paths: dict) -> str:
    """A spec's part of the report: what was run, figures as pictures inside the page, tables."""
    steps, dates = [r["steps"] for r in runs], sorted({str(r.get("date", "?")) for r in runs})
    ran = (f"{len(runs)} runs, {sum(bool(r['finished']) for r in runs)} of them finished; seeds "
           f"{' '.join(str(s) for s in sorted({r['seed'] for r in runs}))}; {min(steps):,} to {max(steps):,} steps; "
           f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}. Machine: {'; '.join(machines(runs))}.")  # fmt: skip
    out = [f"<h2>{html.escape(spec['title'])}</h2>", f"<p>{html.escape(ran)}</p>"]
    at = tables[0][0].index("return" if "return" in tables[0][0] else "final return")
    final = "; ".join(f"{row[0]} {row[1]} {row[at]}" for row in tables[0][1:] if "[" in row[at])
    for kind, path in paths.items():
        about = KINDS[kind][3]
        alt = f"{spec['title']}: {about}." + f" Final: {final}." * (kind == "returns")
        data = base64.b64encode(path.read_bytes()).decode()
        out.append(f'<figure><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
                   f"<figcaption>{about}</figcaption></figure>")  # fmt: skip
    return "\n".join(out + [to_html(rows) for rows in tables])


def main(names: Positional[tuple[str, ...]] = (), results: Path = HERE / "results", specs: Path = HERE / "specs",
         figures: Path = HERE / "figures", report: Path = HERE / "figures" / "report.html"):  # fmt: skip
    """See the module docstring.

    Args:
        names: specs, as below --specs without .yaml; none: all that have results
        results: where run.py put its condensed runs, and where the tables go
        specs: where the specs are
        figures: where the .png and .svg go
        report: the page to write
    """
    sections = []
    for name in names or sorted(str(f.relative_to(specs))[:-5] for f in specs.rglob("*.yaml")):
        spec, runs = load(results, specs, name)
        if not [r for r in runs if r["spec"] == name or not spec["arms"]]:  # included runs alone compare nothing
            print(f"{name}: nothing in {results / name}; train it with: python benchmark/run.py {name}")
            continue
        tables = [rows for rows in (comparison(runs, spec["envs"]), run_table(runs, spec["envs"])) if rows]
        letters = "; ".join(f"{letter}: {text}" for text, letter in machines(runs).items())
        head = f"<!-- written by: python benchmark/plot.py {name} -->"
        text = "\n\n".join([head, *map(to_markdown, tables), NOTES.strip(), f"Machine {letters}."])
        (results / f"{name}.md").write_text(text + "\n")
        figures.mkdir(parents=True, exist_ok=True)
        paths = make_figures(name, spec, runs, figures)
        sections.append(section(spec, runs, tables, paths))
        print(f"{name}: {len(runs)} run(s) in {results / name}.md and {figures}: {', '.join(paths)}")
    if not sections:
        fail(f"none of these specs has results in {results}; train one with benchmark/run.py first")
    notes = "".join(f"<p>{rich(' '.join(part.split()))}</p>\n" for part in NOTES.strip().split("\n\n"))
    page = ['<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>LP-DS: results</title>',
            '<meta name="viewport" content="width=device-width">', f"<style>{STYLE}</style></head>", "<body>",
            "<h1>LP-DS: results</h1>", *sections, "<h2>How to read this</h2>", f"{notes}</body></html>\n"]  # fmt: skip
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(page))
    print(f"{report} ({report.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
