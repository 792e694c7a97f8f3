"""benchmark/plot.py: statistics against hand counts, scipy and rliable; tables of made-up runs.

The made-up runs have the layout of benchmark/run.py, and lie below pytest's tmp_path.
"""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402

TAUS = (1, 0.5, 0)
DPPO = "baselines/dppo_continuous.py"
ENTROPY = {1: -3.0, 0.5: -8.0, 0: -80.0}  # of the frozen policy


class Bench:
    """Writes specs and runs; bench.plot(...) is the command line."""

    def __init__(self, folder):
        self.specs, self.results, self.figures = (folder / n for n in ("specs", "out", "figures"))

    def spec(self, name, arms=("LP-DS", "DSRL"), **keys):
        path = self.specs / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = {"title": f"Title of {name}", "script": "entropy.py", "envs": ["Hopper-v4"]} | keys
        keys = {"flags": "--total-timesteps 1000", "seeds": [1, 2, 3]} | keys
        keys = {"final_episodes": 4, "temperatures": list(TAUS)} | keys
        path.write_text(json.dumps(keys | {"arms": arms if arms == {} else dict.fromkeys(arms)}))

    def run(self, spec, arm, seed, fresh=None, env="Hopper-v4", steps=(0, 500, 1000), **more):
        """`fresh`: mean of the final episodes of the steered policy at tau 1; 10 more at 0.5, 20
        at 0. Frozen: 100 at tau 1, and so on. Evaluations while training: the mean is the step."""
        label = f"{env}__{arm}__{seed}"
        (self.results / spec).mkdir(parents=True, exist_ok=True)
        base = str(self.results / spec / label)
        given_up = more.pop("entropy", -2.0)
        returns = np.array(steps)[:, None] + [-50.0, 50.0]
        arrays = {"global_step": np.array(steps), "return": returns, "success": returns > 600}
        final = {} if fresh is None else {"episodes": 4, "seed": 1, "global_step": steps[-1]}
        for i, tau in enumerate(TAUS if final else ()):
            for who, mean in (("frozen", 100), ("steered", fresh)):
                x = mean + 10 * i + np.array([-2, -1, 1, 2])
                arrays[f"final_{who}_{tau:g}_return"] = x
                arrays[f"final_{who}_{tau:g}_success"] = x > 100
                entropy = ENTROPY[tau] + given_up * (who == "steered")
                final[f"{who}_{tau:g}"] = {"entropy": entropy, "ties": float(tau == 0)}
        np.savez(f"{base}.npz", **{key: np.float32(x) for key, x in arrays.items()})
        columns = {"global_step": steps, "wall_seconds": [6 * s for s in range(len(steps))]}
        columns |= {"trust_region/violation": ["", -0.5, -0.2][: len(steps)]}
        columns |= {"entropy/action": ["", -5, -6], "entropy/action_frozen": ["", -3, -3]}
        lines = [",".join(map(str, row)) for row in zip(*columns.values())]
        Path(f"{base}.csv").write_text("\n".join([",".join(columns), *lines, ""]))
        start = {"date": "2026-11-21 10:00", "cpu": "Testron 3000", "cores": 2, "torch": "2.13"}
        start |= {"mujoco": "3.8", "script_blob": "0123456789"}
        args = {"seed": seed, "backbone": "hopper.pt", "delta": 0.5} | more.pop("args", {})
        meta = {"label": label, "spec": spec, "arm": arm, "env_id": env, "seed": seed}
        meta |= {"args": args, "starts": [start]} | ({"final": final} if final else {}) | more
        Path(f"{base}.json").write_text(json.dumps(meta))
        return base

    def plot(self, *names):
        plot.main(names, self.results, self.figures)

    def tables(self, name):
        """The tables of NAME.md, each as a list of rows of cells."""
        parts = (self.results / f"{name}.md").read_text().split("\n\n")
        tables = [p.splitlines() for p in parts if p.startswith("| ")]
        tables = [[line[2:-2].split(" | ") for line in lines] for lines in tables]
        assert all(len({len(row) for row in table}) == 1 for table in tables)
        return [table[:1] + table[2:] for table in tables]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.bench, "SPECS", tmp_path / "specs")
    return Bench(tmp_path)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(plot, "make_figure", lambda *args: None)


# --- Statistics ---
def test_interquartile_mean_of_known_numbers():
    assert plot.iqm(np.array([5.0])) == 5 and plot.iqm(np.array([1.0, 4.0])) == 2.5
    assert plot.iqm(np.array([9.0, 0.0, 3.0])) == 4  # a quarter of three is nothing: the mean
    assert plot.iqm(np.array([1000.0, 2.0, 4.0, -1000.0])) == 3
    assert plot.iqm(np.array([1000.0, 1.0]), np.array([-7.0, 3.0])) == 2  # strata are pooled
    rng = np.random.default_rng(0)
    for n in range(1, 14):
        scores = rng.normal(size=(5, n))
        np.testing.assert_allclose(plot.iqm(scores), scipy.stats.trim_mean(scores, 0.25, axis=-1))


def test_intervals_that_are_known_exactly():
    assert plot.interval(plot.iqm, np.full(4, 7.0)).tolist() == [7, 7]
    # Every seed drawn three times has probability 1/27 > 2.5 %: of two or three it is their range
    assert plot.interval(plot.iqm, np.array([30.0, 10.0, 11.0])).tolist() == [10, 30]
    assert plot.interval(plot.iqm, np.array([2.0, 1.0])).tolist() == [1, 2]
    # Environments differ, seeds do not: resampled by themselves there is nothing to vary
    assert plot.interval(plot.iqm, np.full(3, 1.0), np.full(3, 5.0)).tolist() == [3, 3]
    # Two of two in both environments: 1/16 each for both lowest and both highest
    strata = np.array([0.0, 2.0]), np.array([10.0, 14.0])
    assert plot.interval(plot.iqm, *strata).tolist() == [5, 8]
    # Curves: an interval at every point
    curves = np.array([[1.0, 2.0, 4.0], [7.0, 7.0, 7.0], [3.0, -3.0, 0.0]])
    assert plot.interval(plot.iqm, curves).T.tolist() == [[1, 4], [7, 7], [-3, 3]]


def test_intervals_against_enumeration_and_scipy():
    five = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    every = scipy.stats.trim_mean(list(itertools.product(five, repeat=5)), 0.25, axis=1)
    known = np.percentile(every, [2.5, 97.5])
    np.testing.assert_allclose(plot.interval(plot.iqm, five), known, atol=0.35)
    scores = np.random.default_rng(3).normal(100, 20, 12)
    how = dict(n_resamples=20_000, method="percentile", rng=0)

    def trimmed(x, axis):
        return scipy.stats.trim_mean(x, 0.25, axis=axis)

    known = scipy.stats.bootstrap((scores,), trimmed, **how).confidence_interval
    np.testing.assert_allclose(plot.interval(plot.iqm, scores), known, atol=0.7)


def test_episodes_that_several_runs_played_count_once():
    here = np.array([1.0, 2.0, 4.0, 5.0])
    there = here + [0.2, 0, 0, 0]  # the same starts and noises on another kind of CPU
    mean = (here + there) / 2
    half = 1.96 * scipy.stats.sem(mean)
    assert plot.level([here, there]) == pytest.approx((mean.mean(), *(mean.mean() + [-half, half])))
    more = np.array([3.0, 3.0])  # a run that played others
    assert plot.level([here, more, here])[0] == pytest.approx(3)


def test_probability_of_improvement_by_hand():
    def p(x, y):
        return float(plot.improvement(np.array(x, float), np.array(y, float)))

    assert p([3, 4], [1, 2]) == 1 and p([1, 2], [3, 4]) == 0 and p([1, 2], [1, 2]) == 0.5
    assert p([1, 3], [2]) == 0.5 and p([2, 2], [2, 2, 2]) == 0.5
    assert p([2, 5], [1, 2, 6]) == (1 + 0.5 + 0 + 1 + 1 + 0) / 6
    x, y = np.array([5.0, 1.0, 3.0, 3.0]), np.array([3.0, 0.0, 9.0])
    assert p(x, y) == scipy.stats.mannwhitneyu(x, y).statistic / 12
    # Averaged over environments, whatever the number of seeds in each: 1 and 1/2
    strata = [np.array(s, float) for s in ([3, 4], [1, 3], [1, 2], [2])]
    assert plot.improvement(*strata) == 0.75
    # P is 1 in the first environment of every resample, 0 or 1 for each seed of the second
    assert plot.interval(plot.improvement, *strata).tolist() == [0.5, 1]


def test_same_numbers_as_rliable():
    """rliable 1.2.0 on the same scores (pandas 2, 50,000 and 8,000 draws)."""
    x = np.array([[(7 * i * i + 3 * e) % 11 + 2.0 * e for e in range(3)] for i in range(6)]).T
    y = np.array([[(5 * i + 4 * e) % 9 + 2.0 * e for e in range(3)] for i in range(5)]).T
    assert plot.iqm(*x) == 7 and plot.improvement(*x, *y) == pytest.approx(0.64444444)
    np.testing.assert_allclose(plot.interval(plot.iqm, *x), [5.2, 8.7], atol=0.11)
    found = plot.interval(plot.improvement, *x, *y)
    np.testing.assert_allclose(found, [0.44444444, 0.82777778], atol=0.012)


# --- Tables ---
def test_the_table_compares_frozen_and_steered_policies_at_both_temperatures(bench, no_figures):
    bench.spec("main", envs=["Hopper-v4", "Walker2d-v4"])
    for env, arm, seed in itertools.product(["Hopper-v4", "Walker2d-v4"], ["LP-DS", "DSRL"], "123"):
        fresh = {"LP-DS": [200, 400, 600], "DSRL": [100, 200, 300]}[arm][int(seed) - 1]
        gains = {"entropy": -float(seed)} if arm == "LP-DS" else {"entropy": 1.0}
        bench.run("main", arm, int(seed), fresh, env, **gains)
    bench.plot("main")
    compared, chances, runs = bench.tables("main")
    half = 1.96 * np.std([98, 99, 101, 102], ddof=1) / 2
    frozen = [f"{x:.0f} [{x - half:.0f}, {x + half:.0f}]" for x in (100, 120)]
    share = "0.500 [0.000, 1.000]", "1.000 [1.000, 1.000]"  # 0.57 either way, but for the ends
    sure, half = "1.000 [1.000, 1.000]", "0.833 [0.500, 1.000]"
    rest = ["0.80 [0.80, 0.80]", "0", "1,000", "A"]  # of the rows from step 667 on
    assert compared[1:4] == compared[4:] or compared[1][1:] == compared[4][1:]
    assert [row[1:] for row in compared[1:4]] == [
        ["frozen", "–", frozen[0], share[0], frozen[1], share[1], "0", "–", "–", "–", "–"],
        ["LP-DS", "3 of 3", "400 [200, 600]", sure, "420 [220, 620]", sure, "-2.00 [-3.00, -1.00]"]
        + rest,
        ["DSRL", "3 of 3", "200 [100, 300]", half, "220 [120, 320]", sure, "1.00 [1.00, 1.00]"]
        + rest,
    ]
    # Of nine pairs ours wins seven and ties one; the interval from all 27 x 27 resamples
    every = [
        [plot.improvement(np.array(x), np.array(y)) for x in itertools.product([2, 4, 6], repeat=3)]
        for y in itertools.product([1, 2, 3], repeat=3)
    ]
    low, high = np.percentile(every, [2.5, 97.5])
    known = np.mean(plot.improvement(np.array([2, 4, 6]), np.array([1, 2, 3])))
    assert chances[0] == ["P(LP-DS > it), return", "tau", "Hopper-v4", "Walker2d-v4", "all"]
    assert [row[:2] for row in chances[1:]] == [["DSRL", "1"], ["DSRL", "0"]]
    for row in chances[1:]:
        assert row[2] == row[3] == f"{known:.2f} [{low:.2f}, {high:.2f}]"
        narrower = float(re.findall(r"\[(.*),", row[4])[0])
        assert row[4].startswith(f"{known:.2f} [") and low < narrower < known
    assert len(runs) == 1 + 12 and runs[1][:5] == ["Hopper-v4", "LP-DS", "1", "1,000", "4 fresh"]
    assert runs[1][5] == f"200 ± {np.std([-2, -1, 1, 2], ddof=1):.0f}" and runs[1][-1] == ""


def test_a_sweep_that_is_going_on_is_told_as_far_as_it_is(bench, capsys):
    bench.spec("main", arms=["LP-DS", "DSRL", "later"], seeds=[1, 2, 3, 4, 5])
    bench.run("main", "LP-DS", 1, 300)
    bench.run("main", "LP-DS", 4, 500)
    bench.run("main", "LP-DS", 5, steps=(0, 500))
    bench.run("main", "DSRL", 1)  # trained, but not evaluated yet
    bench.plot("main")
    out = capsys.readouterr().out
    assert "main/Hopper-v4__LP-DS__5: not averaged, it is at step 500 of 1,000" in out
    assert "main/Hopper-v4__DSRL__1: not averaged, it has no final evaluation" in out
    compared, runs = bench.tables("main")
    assert [row[1:4] for row in compared[2:]] == [["LP-DS", "2 of 5", "400 [300, 500]"]]
    assert [(row[1], row[2], row[4], row[-1]) for row in runs[1:]] == [
        ("LP-DS", "1", "4 fresh", ""),
        ("LP-DS", "4", "4 fresh", ""),
        ("LP-DS", "5", "2 last 3", "is at step 500 of 1,000"),
        ("DSRL", "1", "4 last 3", "has no final evaluation"),
    ]
    assert runs[4][5].startswith("750 ±") and runs[4][6] == "0.500"  # 450, 550, 950, 1050
    assert [path.name for path in sorted(bench.figures.iterdir())] == [
        "main_entropy.png",
        "main_front.png",
        "main_return.png",
    ]


def test_other_lengths_seeds_that_are_there_twice_and_other_settings_are_left_out(bench, capsys):
    bench.spec("main", arms=["LP-DS"], seeds=[1, 2, 3, 4, 5, 6])
    bench.run("main", "LP-DS", 1, 100)
    bench.run("main", "LP-DS", 2, 900, steps=(0, 1000, 2000))
    bench.run("main", "LP-DS", 3, 900, args={"seed": 1})
    bench.run("main", "LP-DS", 4, 300)
    bench.run("main", "LP-DS", 5, 900, args={"delta": 0.1})
    bench.run("main", "LP-DS", 6, 500, steps=(0, 500, 1008), args={"device": "cuda"})  # is good
    bench.plot("main")
    out = capsys.readouterr().out
    for seed, why in {
        2: "has 2,000 steps, not 1,000",
        3: "has seed 1 like Hopper-v4__LP-DS__1",
        5: "differs from Hopper-v4__LP-DS__1 in delta",
    }.items():
        assert f"main/Hopper-v4__LP-DS__{seed}: not averaged, it {why}" in out
    compared, runs = bench.tables("main")
    assert compared[2][1:4] == ["LP-DS", "3 of 6", "300 [100, 500]"]
    assert len(runs) == 1 + 6 and [bool(row[-1]) for row in runs[1:]] == [0, 1, 1, 0, 1, 0]
    _, good = plot.load("main", bench.results)
    x, y, limits = plot.curve([r for r in good if not r["left_out"]], "return")
    assert x[-1] == 1 and y[-1] == pytest.approx((1000 + 1000 + 500 + 508 * 500 / 508) / 3)


def test_included_runs_stand_in_front_on_the_environments_of_the_spec(bench):
    envs = ["Hopper-v4", "Walker2d-v4"]
    bench.spec("base/main", arms=["LP-DS"], envs=envs)
    bench.spec("more", arms=["flow"], include=["base/main"])
    for env in envs:
        bench.run("base/main", "LP-DS", 1, 100, env)
    bench.plot("more")
    assert not (bench.results / "more.md").exists()  # included runs alone compare nothing
    bench.run("more", "flow", 1, 100, args={"backbone": "flow.pt"})
    bench.plot("more")
    compared, runs = bench.tables("more")
    assert [row[1] for row in compared[1:]] == ["frozen hopper", "frozen flow", "LP-DS", "flow"]
    assert [row[:2] for row in runs[1:]] == [["Hopper-v4", "LP-DS"], ["Hopper-v4", "flow"]]


def test_a_vla_is_named_by_its_policy(bench, no_figures):
    bench.spec("vla", arms=["LP-DS"], seeds=[1])
    bench.run("vla", "LP-DS", 1, 100, args={"backbone": None, "policy": "tiny"})
    bench.plot("vla")
    assert [row[1] for row in bench.tables("vla")[0][1:]] == ["frozen", "LP-DS"]


def test_a_decoder_that_another_method_samples_is_another_frozen_policy(bench, no_figures):
    bench.spec("main", arms=["LP-DS"], seeds=[1])
    bench.spec("ddim", arms=["IDQL"], seeds=[1], script=DPPO.replace("dppo", "idql"))
    bench.spec("more", arms=["DPPO"], seeds=[1], script=DPPO, include=["main", "ddim"])
    for spec, arm in (("main", "LP-DS"), ("ddim", "IDQL"), ("more", "DPPO")):
        bench.run(spec, arm, 1, 100)
    bench.plot("more")
    names = [row[1] for row in bench.tables("more")[0][1:]]
    assert names == ["frozen hopper", "frozen hopper, DDPM", "LP-DS", "IDQL", "DPPO"]


def test_damaged_runs_are_named_in_one_line_each_and_hide_no_other(bench, no_figures, capsys):
    bench.spec("main", arms=["LP-DS"], seeds=[1, 2, 3, 4, 5, 6])
    bases = [bench.run("main", "LP-DS", seed, 100) for seed in (1, 2, 3, 4, 5, 6)]
    Path(f"{bases[1]}.csv").unlink()
    Path(f"{bases[2]}.npz").write_bytes(Path(f"{bases[2]}.npz").read_bytes()[:200])
    Path(f"{bases[3]}.csv").write_text(Path(f"{bases[3]}.csv").read_text().replace("500,", ""))
    Path(f"{bases[4]}.json").write_text("{")
    Path(f"{bases[5]}.json").write_text(Path(f"{bases[0]}.json").read_text())
    bench.plot("main")
    out = capsys.readouterr().out.splitlines()
    for seed in (2, 3, 4, 5, 6):
        assert sum(f"main/Hopper-v4__LP-DS__{seed}: not read (" in line for line in out) == 1
    assert "its .json is of Hopper-v4__LP-DS__1" in out[4] and len(out) == 6
    assert [row[2] for row in bench.tables("main")[1][1:]] == ["1"]


# --- Figures ---
def test_curves_are_interquartile_means_as_far_as_all_runs_have_come(bench):
    bench.spec("main", arms=["LP-DS"])
    for seed, last in ((1, 1000), (2, 1016), (3, 1008)):
        bench.run("main", "LP-DS", seed, 100, steps=(0, 500 + seed, last))
    _, runs = plot.load("main", bench.results)
    x, y, (low, high) = plot.curve(runs, "return")
    assert x.tolist() == [0, 0.501, 1] and np.allclose(y, [0, 501, 1000])
    assert np.allclose(plot.curve(runs, "entropy")[1], [-2, -3], atol=0.03)
    runs[1]["curves"]["return"][1][:] += [0, 30, 60]
    x, y, (low, high) = plot.curve(runs, "return")
    assert np.allclose(low, [0, 501, 1000]) and y[1] > 510 and high[2] > 1055


def test_the_front_goes_through_all_temperatures_and_ends_where_no_entropy_is_left(bench):
    bench.spec("main", arms=["LP-DS"], seeds=[1, 2])
    bench.run("main", "LP-DS", 1, 200, entropy=-1.0)
    bench.run("main", "LP-DS", 2, 400, entropy=-3.0)
    _, runs = plot.load("main", bench.results)
    x, y, limits = plot.front(runs, "steered", "return")
    assert x.tolist() == [-2, -7, -np.inf] and y.tolist() == [300, 310, 320]
    assert limits.tolist() == [[200, 210, 220], [400, 410, 420]]
    x, y, limits = plot.front(runs, "frozen", "return")
    assert x.tolist() == [0, -5, -np.inf] and y.tolist() == [100, 110, 120]
    axis = plot.Figure().subplots()
    plot.draw_front(axis, runs, "return", {"LP-DS": plot.look(0)})
    drawn = {box.get_label(): box.lines[0].get_xdata() for box in axis.containers}
    assert drawn["LP-DS"][:2].tolist() == [-2, -7] and drawn["LP-DS"][2] < -7
    assert drawn["frozen"][2] == drawn["LP-DS"][2]


def test_lines_of_eight_arms_differ_without_colour():
    looks = [plot.look(i) for i in range(8)]
    assert len({(str(look["ls"]), look["marker"]) for look in looks}) == 8


def test_pages_and_figures_are_the_same_every_time(bench):
    bench.spec("adroit/main", score="success", envs=[f"Hand{i}" for i in range(4)])
    for i, arm, seed in itertools.product(range(4), ("LP-DS", "DSRL"), (1, 2)):
        bench.run("adroit/main", arm, seed, 100 * seed, f"Hand{i}")
    bench.spec("empty")
    bench.plot()
    files = [*bench.figures.iterdir(), *bench.results.rglob("*.md")]
    before = {path: path.read_bytes() for path in files}
    kinds = ("success", "entropy", "front")
    assert {path.name for path in before} == {f"adroit_main_{kind}.png" for kind in kinds} | {
        "main.md"
    }
    bench.plot("adroit/main")
    assert {path: path.read_bytes() for path in files} == before
    assert "# Title of adroit/main" in (bench.results / "adroit/main.md").read_text()
