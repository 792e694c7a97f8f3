"""benchmark/plot.py: statistics against hand counts, scipy and rliable; tables, figures and report of made-up runs.

Everything is written below pytest's tmp_path; the made-up runs have the layout of benchmark/run.py --collect.
"""

import base64
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import scipy.stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402

STEPS = [0, 50_000, 99_000, 110_000, 150_000]


@pytest.fixture
def bench(tmp_path):
    """Writes specs and runs; bench.plot(...) is the command line."""

    class Bench:
        results, specs, figures, report = (tmp_path / n for n in ("results", "specs", "figures", "page/report.html"))

        def spec(self, name, **keys):
            path = self.specs / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"title": f"Title of {name}"} | keys))  # JSON is YAML

        def run(
            self, spec, arm, seed, means, env="Hopper-v4", fresh=None, columns=None, steps=STEPS, minutes=2, **meta
        ):
            """`means`: the mean of every evaluation, played as two episodes 100 apart; `fresh`: (frozen, steered)."""
            label, folder = f"{env}__{re.sub('[^A-Za-z0-9.=-]+', '-', arm)}__{seed}", self.results / spec
            folder.mkdir(parents=True, exist_ok=True)
            returns = np.array(means)[:, None] + [-50.0, 50.0]
            columns = {"global_step": steps, "wall_seconds": [60 * minutes * s / max(steps[-1], 1) for s in steps],
                       "eval/episodic_return": means} | (columns or {})  # fmt: skip
            rows = [["" if v is None else f"{v:g}" for v in row] for row in zip(*columns.values(), strict=True)]
            rows = [[str(steps[i]), *row[1:]] for i, row in enumerate(rows)]
            (folder / f"{label}.csv").write_text("\n".join(map(",".join, [columns, *rows])) + "\n")
            final = {} if fresh is None else {
                f"final_{who}_{key}": np.float32(value) for who, scores in zip(("frozen", "steered"), fresh)
                for key, value in (("return", scores), ("success", np.array(scores) > 1000))}  # fmt: skip
            final |= {"success_share": np.float32(returns > 500)} if env.startswith("Adroit") else {}
            np.savez(folder / f"{label}.npz", **{"global_step": np.array(steps), "return": np.float32(returns),
                     "success": np.float32(returns > 500), "length": np.full(returns.shape, 9)}, **final)  # fmt: skip
            meta = {"label": label, "spec": spec, "arm": arm, "env_id": env, "seed": seed, "finished": True,
                    "steps": steps[-1], "minutes": minutes, "date": "2026-11-21", "device": "cpu",
                    "versions": {"torch": "2.13.0"}, "starts": [{"cpu": "Testron 3000", "jobs": 2}],
                    "args": {"perturb": "noise", "backbone": ""}} | meta  # fmt: skip
            (folder / f"{label}.json").write_text(json.dumps(meta))
            return folder / label

        def plot(self, *names):
            plot.main(names, self.results, self.specs, self.figures, self.report)

        def tables(self, name):
            """The tables of NAME.md, each as a list of rows of cells."""
            parts = [part for part in (self.results / f"{name}.md").read_text().split("\n\n") if part.startswith("| ")]
            tables = [[line.strip("| ").split(" | ") for line in part.splitlines()] for part in parts]
            assert all(len({len(row) for row in table}) == 1 for table in tables)
            return [table[:1] + table[2:] for table in tables]

    return Bench()


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
    # Every seed drawn three times has probability 1/27 > 2.5 %: the interval of two or three seeds is their range
    assert plot.interval(plot.iqm, np.array([30.0, 10.0, 11.0])).tolist() == [10, 30]
    assert plot.interval(plot.iqm, np.array([2.0, 1.0])).tolist() == [1, 2]
    # Environments differ, seeds do not: resampled by themselves there is nothing to vary
    assert plot.interval(plot.iqm, np.full(3, 1.0), np.full(3, 5.0)).tolist() == [3, 3]
    # Two of two in both environments: 1/16 each for both lowest and both highest
    assert plot.interval(plot.iqm, np.array([0.0, 2.0]), np.array([10.0, 14.0])).tolist() == [5, 8]
    # Curves: an interval at every point
    curves = np.array([[1.0, 2.0, 4.0], [7.0, 7.0, 7.0], [3.0, -3.0, 0.0]])
    assert plot.interval(plot.iqm, curves).T.tolist() == [[1, 4], [7, 7], [-3, 3]]


def test_intervals_against_enumeration_and_scipy():
    five = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    every = scipy.stats.trim_mean(list(itertools.product(five, repeat=5)), 0.25, axis=1)
    np.testing.assert_allclose(plot.interval(plot.iqm, five), np.percentile(every, [2.5, 97.5]), atol=0.35)
    scores = np.random.default_rng(3).normal(100, 20, 12)
    oracle = scipy.stats.bootstrap((scores,), lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
                                   n_resamples=20_000, method="percentile", rng=0).confidence_interval  # fmt: skip
    np.testing.assert_allclose(plot.interval(plot.iqm, scores), oracle, atol=0.7)


def test_probability_of_improvement_by_hand():
    p = lambda x, y: float(plot.improvement(np.array(x, float), np.array(y, float)))  # noqa: E731
    assert p([3, 4], [1, 2]) == 1 and p([1, 2], [3, 4]) == 0 and p([1, 2], [1, 2]) == 0.5
    assert p([1, 3], [2]) == 0.5 and p([2, 2], [2, 2, 2]) == 0.5
    assert p([2, 5], [1, 2, 6]) == (1 + 0.5 + 0 + 1 + 1 + 0) / 6
    x, y = np.array([5.0, 1.0, 3.0, 3.0]), np.array([3.0, 0.0, 9.0])
    assert p(x, y) == scipy.stats.mannwhitneyu(x, y).statistic / 12
    # Averaged over environments, whatever the number of seeds in each: 1 and 1/2
    strata = [np.array(s, float) for s in ([3, 4], [1, 3], [1, 2], [2])]
    assert plot.improvement(*strata) == 0.75
    # P is 1 in the first environment of every resample, 0 or 1 for each seed of the second: 0.5 to 1 in the mean
    assert plot.interval(plot.improvement, *strata).tolist() == [0.5, 1]


def test_same_numbers_as_rliable():
    """rliable 1.2.0 on the same scores (pandas 2, 50,000 and 8,000 draws): point estimates and intervals."""
    x = np.array([[(7 * i * i + 3 * e) % 11 + 2.0 * e for e in range(3)] for i in range(6)]).T
    y = np.array([[(5 * i + 4 * e) % 9 + 2.0 * e for e in range(3)] for i in range(5)]).T
    assert plot.iqm(*x) == 7 and plot.improvement(*x, *y) == pytest.approx(0.64444444)
    np.testing.assert_allclose(plot.interval(plot.iqm, *x), [5.2, 8.7], atol=0.11)
    np.testing.assert_allclose(plot.interval(plot.improvement, *x, *y), [0.44444444, 0.82777778], atol=0.012)


# --- Tables ---
@pytest.fixture
def tables_only(monkeypatch):
    monkeypatch.setattr(plot, "make_figures", lambda *a: {})


COLUMNS = {"trust_region/violation": [None, -0.5, -0.25, 0.1, 0.3], "trust_region/alpha": [None, 1, 0.5, 0.25, 0.0123],
           "entropy/action": [None, 1, 1, 1.5, 1.75], "entropy/action_frozen": [None, 2, 2, 2, 2],
           "losses/q_w_corr": [None, 0.1, 0.2, 0.5, 0.75]}  # fmt: skip


def test_cells_of_the_run_table(bench, tables_only):
    bench.spec("cpu", arms={"LP-DS": None, "DSRL": None})
    for seed, shift in ((1, 0), (2, 100), (3, 800)):
        bench.run("cpu", "LP-DS", seed, [200, 900, 1100 + shift, 1500 + shift, 1300 + shift], columns=COLUMNS)
    bench.run("cpu", "DSRL", 1, [200, 300, 400], steps=STEPS[:3], finished=False, starts=[], date="2026-11-20")
    bench.run("cpu", "DSRL", 2, [200], steps=[0], finished=False, starts=[{"gpu": "Testron X"}])
    bench.run("cpu", "LP-DS", 4, [200, 900, 1, 2, 3], env="Walker2d-v4", columns=COLUMNS,
              fresh=([900, 1100], [1200, 1400]), args={"perturb": "action"}, minutes=7)  # fmt: skip
    bench.plot("cpu")
    _, runs = bench.tables("cpu")
    rows = {(*row[:2], row[2]): row[3:] for row in runs[1:]}
    # Last third of 150,000 steps: from 100,000 on. Standard deviation of 1050 1150 1450 1550 1250 1350: 187
    late, end = ["1.20", "0.0123", "-0.38", "0.62"], ["2", "A", "2026-11-21"]
    first = ["150,000", "200", "1300 ± 187", "6 last 3", "1500", "0.000 → 1.000"]
    assert rows["Hopper-v4", "LP-DS", "1"] == [*first, *late, *end]
    bold = ["150,000", "200", "1600 [1300, 2100]", "6 last 3", "1800", "0.000 → 1.000"]
    assert rows["**Hopper-v4**", "**LP-DS**", "1 2 3"] == [*bold, *late, *end]
    unfinished = ["99,000 (unfinished)", "200", "350 ± 82", "4 last 3", "400", "0.000 → 0.000", "–", "–", "–", "–"]
    assert rows["Hopper-v4", "DSRL", "1"] == [*unfinished, "2", "B", "2026-11-20"]
    assert rows["Hopper-v4", "DSRL", "2"][:6] == ["0 (unfinished)", "200", "–", "–", "–", "0.000 → –"]
    # Fresh episodes, where there are any; LP-DS-A has no use for its latent critic
    first = ["150,000", "1000", "1300 ± 141", "2 fresh", "900", "0.500 → 1.000"]
    assert rows["Walker2d-v4", "LP-DS", "4"] == [*first, *late[:3], "–", "7", *end[1:]]
    assert len(rows) == 7
    text = (bench.results / "cpu.md").read_text()
    assert text.startswith("<!-- written by: python benchmark/plot.py cpu -->")
    machines = ["A: Testron 3000, torch 2.13.0 on cpu, 2 run(s) at a time", "B: processor not recorded", "C: Testron X"]
    assert all(machine in text for machine in machines)
    assert "nothing\nof two or three, whose interquartile mean is their mean" in text


def test_comparison_of_frozen_and_steered_policies(bench, tables_only):
    bench.spec("cpu", envs=["Walker2d-v4", "Hopper-v4"], arms={"DSRL": None, "LP-DS": None, "DSRL raw": None})
    for seed, ours, theirs in ((1, 400, 200), (2, 600, 400), (3, 800, 300)):
        for arm, steered in (("LP-DS", ours), ("DSRL", theirs)):
            bench.run("cpu", arm, seed, [100, steered, steered], steps=STEPS[:3])
            fresh = ([150, 250], [steered / 2, steered / 2 + 200])  # frozen 200, steered + 100
            bench.run("cpu", arm, seed, [100, 7, 7], steps=STEPS[:3], env="Walker2d-v4", fresh=fresh)
    bench.run("cpu", "LP-DS", 4, [100, 9999], steps=STEPS[:2], finished=False)  # does not count
    bench.run("cpu", "DSRL raw", 1, [100, 50, 50], steps=STEPS[:3])  # one seed: no interval, no probability
    bench.plot("cpu")
    head, *rows = bench.tables("cpu")[0]
    assert head[-1] == "P(LP-DS > it)"
    # Of nine pairs ours wins eight and ties one; its interval from all 27 x 27 resamples
    every = [[plot.improvement(np.array(x), np.array(y)) for x in itertools.product([4, 6, 8], repeat=3)]
             for y in itertools.product([2, 4, 3], repeat=3)]  # fmt: skip
    low, high = np.percentile(every, [2.5, 97.5])
    none = "0.000 [0.000, 0.000]"
    wins, half = f"0.94 [{low:.2f}, {high:.2f}]", 1.96 * np.std([150, 250], ddof=1) / 2**0.5
    assert rows == [
        ["Walker2d-v4", "frozen", "–", "2 fresh", "0.000", f"200 [{200 - half:.0f}, {200 + half:.0f}]", "1", "–"],
        ["Walker2d-v4", "DSRL", "1 2 3", "2 fresh", none, "250 [200, 300]", "1.25 [1.00, 1.50]", wins],
        ["Walker2d-v4", "LP-DS", "1 2 3", "2 fresh", none, "400 [300, 500]", "2.00 [1.50, 2.50]", "–"],
        ["Hopper-v4", "frozen", "–", "2 at step 0", "0.000", f"100 [{100 - half:.0f}, {100 + half:.0f}]", "1", "–"],
        ["Hopper-v4", "DSRL", "1 2 3", "4 last 3", none, "300 [200, 400]", "3.00 [2.00, 4.00]", wins],
        ["Hopper-v4", "LP-DS", "1 2 3", "4 last 3", "0.667 [0.000, 1.000]", "600 [400, 800]", "6.00 [4.00, 8.00]", "–"],
        ["Hopper-v4", "DSRL raw", "1", "4 last 3", "0.000", "50", "0.50", "–"],
        ["**all**", "**DSRL**", "–", "–", "–", "–", rows[7][6], rows[7][7]],
        ["**all**", "**LP-DS**", "–", "–", "–", "–", rows[8][6], "–"],
    ]
    # Six ratios, one cut at either end: 1, 1.25, 1.5, 2, 3, 4 and 1.5, 2, 2.5, 4, 6, 8
    assert rows[7][6].startswith(f"{(1.25 + 1.5 + 2 + 3) / 4:.2f} [") and rows[7][7].startswith("0.94 [")
    assert rows[8][6].startswith(f"{(2 + 2.5 + 4 + 6) / 4:.2f} [")
    assert low < float(re.findall(r"\[(.*),", rows[7][7])[0]) < 0.94  # narrower than in one environment


def test_one_run_without_fresh_episodes_makes_all_of_its_environment_use_the_last_evaluations(bench, tables_only):
    bench.spec("cpu", arms={"LP-DS": None, "DSRL": None})
    bench.run("cpu", "LP-DS", 1, [100, 500, 500], steps=STEPS[:3], fresh=([0, 0], [900, 900]))
    bench.run("cpu", "DSRL", 1, [100, 400, 400], steps=STEPS[:3])
    bench.plot("cpu")
    compared, runs = bench.tables("cpu")
    assert [[row[3], row[5]] for row in compared[2:]] == [["4 last 3", "500"], ["4 last 3", "400"]]
    assert runs[1][5:7] == ["900 ± 0", "2 fresh"]


# --- What is read ---
def damage(bench):
    """Eight damaged runs beside a good one; label -> what must be said about it."""
    bench.spec("cpu", arms={"LP-DS": None})
    make = lambda seed, **more: bench.run("cpu", "LP-DS", seed, [1, 2, 3], steps=STEPS[:3], **more)  # noqa: E731
    make(1)
    (path := make(2)).with_name(path.name + ".csv").unlink()
    (path := make(3)).with_name(path.name + ".json").unlink()
    path = (path := make(4)).with_name(path.name + ".npz")
    path.write_bytes(path.read_bytes()[:200])
    path = (path := make(5)).with_name(path.name + ".csv")
    path.write_text(path.read_text()[:-2])  # the last number lacks its last digit
    path = (path := make(6)).with_name(path.name + ".csv")
    path.write_text(path.read_text().replace("99000,", ""))
    make(7, label="Hopper-v4__LP-DS__1")
    make(8, fresh=([1, 2, 3], [1, 2]))
    path = (path := make(9)).with_name(path.name + ".json")
    path.write_text(path.read_text().replace("99000", "98000"))
    (path := make(10)).with_name(path.name + ".json").write_text("{")
    (path := make(11)).with_name(path.name + ".csv").write_text("")
    return {2: "FileNotFoundError", 3: "FileNotFoundError", 4: "BadZipFile", 5: "the last one is cut off",
            6: "ValueError", 7: "the .json is of Hopper-v4__LP-DS__1", 8: "fresh episodes are incomplete",
            9: "the .json says step 98000, the .csv 99000", 10: "JSONDecodeError", 11: "no row"}  # fmt: skip


def test_damaged_runs_are_reported_in_one_line_each_and_left_out(bench, tables_only, capsys):
    said = damage(bench)
    bench.plot("cpu")
    out = capsys.readouterr().out.splitlines()
    for seed, text in said.items():
        (line,) = [line for line in out if f"cpu/Hopper-v4__LP-DS__{seed}:" in line]
        assert line.startswith(f"cpu/Hopper-v4__LP-DS__{seed}: left out (") and text in line and len(line) < 200
    assert len(out) == len(said) + 2  # and one for the spec, one for the report
    assert [row[2] for row in bench.tables("cpu")[1][1:]] == ["1"]


def test_errors_are_one_sentence_with_exit_code_2(bench, capsys):
    bench.spec("cpu", arms={"LP-DS": None})
    bench.spec("loop", include=["loop"])
    (bench.specs / "broken.yaml").write_text("title: [")
    for names, text in ((["gpu"], "no spec 'gpu' in"), (["loop"], "includes itself"), (["broken"], "is not a spec"),
                        (["cpu"], "none of these specs has results in"), ([], "is not a spec")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            bench.plot(*names)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("plot.py: error: ") and text in line
    assert not bench.figures.exists() and not bench.report.exists()


def test_included_runs_stand_in_front_on_the_environments_of_the_spec(bench):
    bench.spec("base/seeds", arms={"LP-DS": None, "flow": None})
    bench.spec("more", include=["base/seeds"], arms={"flow": None}, envs=["Hopper-v4"])
    for env in ("Hopper-v4", "Walker2d-v4"):
        bench.run("base/seeds", "LP-DS", 1, [1, 2, 3], steps=STEPS[:3], env=env)
    bench.run("base/seeds", "flow", 1, [1, 2, 3], steps=STEPS[:3])
    bench.run("more", "flow", 1, [1, 2, 3], steps=STEPS[:3])
    bench.plot("more")
    rows = bench.tables("more")[1][1:]
    assert {r["env_id"] for r in plot.load(bench.results, bench.specs, "more")[1]} == {"Hopper-v4"}
    assert [row[:2] for row in rows] == [["Hopper-v4", n] for n in ("LP-DS", "flow (base/seeds)", "flow")]
    assert {f.name for f in bench.figures.iterdir()} == {
        f"more_{kind}.{suffix}" for kind in ("returns", "minutes") for suffix in ("png", "svg")
    }
    assert [r["label"] for r in plot.load(bench.results, bench.specs, "base/seeds")[1]] == [
        "Hopper-v4__LP-DS__1", "Walker2d-v4__LP-DS__1", "Hopper-v4__flow__1"]  # fmt: skip


# --- Figures ---
def test_curves_are_interquartile_means_with_the_range_of_three_seeds(bench):
    bench.spec("cpu", arms={"LP-DS": None})
    for seed, minutes in ((1, 10), (2, 20), (3, 40)):
        bench.run("cpu", "LP-DS", seed, [0, 100 * seed, 300 * seed], steps=[0, 50_000, 100_000], minutes=minutes)
    bench.run("cpu", "LP-DS", 4, [0, 9], steps=[0, 40_000], finished=False)
    _, runs = plot.load(bench.results, bench.specs, "cpu")
    x, y, (low, high) = plot.curve(runs, "return")
    assert x.tolist() == [0, 50, 100] and y.tolist() == [0, 200, 600]
    assert low.tolist() == [0, 100, 300] and high.tolist() == [0, 300, 900]
    # Against minutes: as far as the fastest went; then seed 1 is at its end, seed 2 half way, seed 3 at a quarter
    x, y, (low, high) = plot.curve(runs, "minutes")
    assert x.tolist() == [0, 5, 10] and y.tolist() == [0, (100 + 100 + 75) / 3, (300 + 200 + 150) / 3]
    assert low.tolist() == [0, 75, 150] and high.tolist() == [0, 100, 300]
    # With none finished, all are drawn, as far as all have come
    x, y, _ = plot.curve([r | {"finished": False} for r in runs], "return")
    assert x.tolist() == [0, 40] and y.tolist() == [0, (80 + 160) / 2]


def test_success_is_drawn_where_the_environment_tells_it(bench, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "draw_curves", lambda axis, *args: drawn.append(args[:2]) or [(0, "x", plot.GREY)])
    bench.spec("cpu", arms={"LP-DS": None})
    bench.run("cpu", "LP-DS", 1, [200, 600, 900], steps=STEPS[:3])
    played = {"charts/success": [None, 0.25, 0.75]}  # none before the first step
    more = dict(steps=STEPS[:3], env="AdroitHandPen-v1", columns=played)
    where = bench.run("cpu", "LP-DS", 1, [200, 520, 900], **more)
    bench.plot("cpu")
    for kind in ("success", "training"):
        assert [env for drew, env in drawn if drew == kind] == ["AdroitHandPen-v1"]
        assert (bench.figures / f"cpu_{kind}.png").is_file()
    curves = plot.read(where.parent, where.name)["curves"]
    assert [values.tolist() for values in curves["success"]] == [[0, 50, 99], [0, 0.5, 1]]
    assert np.allclose(curves["training"], [[50, 99], [0.25, 0.35]])


def test_moving_average_is_a_first_order_filter():
    y = np.random.default_rng(0).random(50)
    known, _ = scipy.signal.lfilter([0.2], [1, -0.8], y, zi=[0.8 * y[0]])
    assert np.allclose(plot.moving_average(y), known)


def test_lines_of_eight_arms_differ_without_colour_and_labels_do_not_overlap():
    looks = [plot.style(i) for i in range(8)]
    assert len({str(look["ls"]) for look in looks}) == 5
    assert len({(str(look["ls"]), look["marker"]) for look in looks}) == len({str(look) for look in looks}) == 8
    axis = plot.matplotlib.figure.Figure().subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    names = ["a", "b\nb", "c", "d", "e\ne"]
    plot.label_ends(axis, [(0.9, name, look) for name, look in zip(names, looks)], inches=2)
    at = sorted((text.get_position()[1], 0.08 * (1 + text.get_text().count("\n"))) for text in axis.texts)
    assert len(at) == 5 and at[-1][0] + at[-1][1] / 2 <= 1.05 + 1e-9
    for (low, below), (high, above) in itertools.pairwise(at):
        assert high - low >= (below + above) / 2 - 1e-9
    assert plot.wrap(["LP-DS delta=0.1", "LP-DS delta=0.5"]) == {f"LP-DS delta={d}": f"delta={d}" for d in (0.1, 0.5)}
    assert plot.wrap(["LP-DS", "DSRL raw rewards only"]) == {
        "LP-DS": "LP-DS",
        "DSRL raw rewards only": "DSRL raw rewards\nonly",
    }


def test_sweep_takes_the_grid_and_what_differs_in_delta_alone(bench, monkeypatch):
    args = {"perturb": "noise", "backbone": "", "utd": 20}
    bench.spec("seeds", arms={"LP-DS": None, "utd": None})
    bench.spec("sweep", include=["seeds"], arms={"LP-DS": {"grid": {"delta": [0.1, 1.0], "delta-norm": ["sum"]}}})
    more = dict(steps=STEPS[:3], columns={k: v[:3] for k, v in COLUMNS.items()})
    for delta, value in ((0.1, 10), (1.0, 90)):
        for seed in (1, 2):
            bench.run("sweep", f"LP-DS delta={delta} delta-norm=sum", seed, [1, value + seed, value + seed], **more,
                      args=args | {"delta": delta, "delta_norm": "sum", "seed": seed})  # fmt: skip
    bench.run("seeds", "LP-DS", 1, [1, 50, 50], **more, args=args | {"delta": 0.5, "delta_norm": "mean", "seed": 1})
    bench.run("seeds", "utd", 1, [1, 7, 7], **more, args=args | {"delta": 0.5, "delta_norm": "mean", "utd": 10})
    shown, errorbar = [], plot.matplotlib.axes.Axes.errorbar

    def spy(axis, x, y, limits, **look):
        shown.append((x, list(y), limits.tolist()))
        return errorbar(axis, x, y, limits, **look)

    monkeypatch.setattr(plot.matplotlib.axes.Axes, "errorbar", spy)
    bench.plot("sweep")
    assert shown == [([0.5], [50], [[0], [0]]), ([0.1, 1.0], [11.5, 91.5], [[0.5, 0.5], [0.5, 0.5]])]
    assert {f.stem for f in bench.figures.iterdir()} == {
        f"sweep_{kind}" for kind in plot.KINDS if kind not in ("success", "training")
    }
    assert plot.swept(plot.load(bench.results, bench.specs, "seeds")[1], "seeds") == []


# --- Report ---
class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in ("img", "meta") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_holds_everything_itself_and_is_the_same_every_time(bench):
    bench.spec("cpu", arms={"LP-DS": None, "DSRL": None}, title="Frozen & steered <all>")
    bench.spec("later", arms={"LP-DS": None})
    for arm, seed in itertools.product(("LP-DS", "DSRL <raw>"), (1, 2)):
        columns = COLUMNS if arm == "LP-DS" else None
        bench.run("cpu", arm, seed, [100, 200, 300, 400, 500 + 30 * seed], columns=columns)
    bench.plot()
    files = {f: f.read_bytes() for f in [*bench.figures.iterdir(), bench.report, bench.results / "cpu.md"]}
    text = bench.report.read_text()
    page = Page(text)
    assert not page.open and "Frozen &amp; steered &lt;all&gt;" in text and "<all>" not in text and "<raw>" not in text
    linked = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset", "data")
    ]
    assert len(linked) == 4 and all(link.startswith("data:image/svg+xml;base64,") for link in linked)
    assert not re.search(r"url\(|@import|https?:", text) and "script" not in {tag for tag, _ in page.tags}
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    svgs = [base64.b64decode(p["src"].removeprefix("data:image/svg+xml;base64,")) for p in pictures]
    assert svgs == [
        (bench.figures / f"cpu_{kind}.svg").read_bytes() for kind in ("returns", "minutes", "entropy", "budget")
    ]
    assert all(b"<svg" in svg and not re.search(rb'href="(?!#)', svg) for svg in svgs)
    assert "Hopper-v4 LP-DS 415 [410, 420]" in pictures[0]["alt"] and len({p["alt"] for p in pictures}) == 4
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", text)
    assert cells.count("<b>LP-DS</b>") == 1 and "E‖Δ‖²/δ" in cells and "**" not in text and "Title of later" not in text
    assert "4 runs, 4 of them finished; seeds 1 2; 150,000 to 150,000 steps; 2026-11-21. Machine: Testron 3000" in text
    assert len(text) < 400_000 and (bench.figures / "cpu_returns.png").read_bytes()[:4] == b"\x89PNG"
    bench.plot()
    assert all(f.read_bytes() == content for f, content in files.items())
