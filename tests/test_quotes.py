"""README and docs/baselines.md quote what benchmark/results holds now, rounded."""

import re

import pytest
from conftest import ROOT

QUOTED = {  # first cell of README's row -> results, environment, score, the LP-DS that is meant
    "robosuite's Lift": ("robomimic/main", "Lift", "success", "LP-DS"),
    "Adroit's Pen": ("adroit/main", "AdroitHandPen-v1", "success", "LP-DS"),
    "Adroit's Door": ("adroit/main", "AdroitHandDoor-v1", "success", "LP-DS"),
    "Adroit's Hammer": ("adroit/main", "AdroitHandHammer-v1", "success", "LP-DS"),
    "miniature pi0": ("libero/main", "libero_90-57", "success", "LP-DS"),
    "Hopper-v4": ("continuous/main", "Hopper-v4", "return", "LP-DS"),
    "Walker2d-v4": ("continuous/main", "Walker2d-v4", "return", "LP-DS"),
    "HalfCheetah-v4": ("continuous/main", "HalfCheetah-v4", "return", "LP-DS"),
}
ENTROPY = "entropy, steered − frozen"


def tables(page: str) -> list:
    lines = (ROOT / page).read_text().splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]


def results(spec: str) -> dict:
    """(environment, policy) -> column -> what the first table says; others have other widths."""
    header, _, *rows = tables(f"benchmark/results/{spec}.md")
    return {tuple(row[:2]): dict(zip(header, row)) for row in rows if len(row) == len(header)}


def row_of(page: str, name: str) -> list:
    (row,) = [row for row in tables(page) if row[0].split(",")[0] == name]
    return row


def same(cell: str, found: dict, *columns) -> None:
    """Numbers of a cell, "0.48 / 0.88", are those of these columns, to the digits they have."""
    for quoted, column in zip(cell.removesuffix(" nats").split(" / "), columns, strict=True):
        told = found[column].split()[0]  # an interval may follow
        value = float(told)
        if column == ENTROPY:  # quoted as what was given up
            value, quoted = max(0.0, -value), quoted.replace("none", "0")
        rounded = 0.5 * 10.0 ** -len(quoted.partition(".")[2])
        assert abs(float(quoted) - value) <= rounded + 1e-9, (quoted, column, found)


@pytest.mark.parametrize("name", QUOTED)
def test_readme_quotes_the_results(name):
    spec, env_id, score, steered = QUOTED[name]
    found = results(spec)
    _, *cells = row_of("README.md", name)
    for cell, policy in zip(cells, ("frozen", steered, "DSRL")):
        taus = [f"{score}, tau {tau}" for tau in (1, 0)]
        if cell in ("not run", "-"):
            assert (env_id, policy) not in found
        else:
            same(cell, found[env_id, policy], *taus[: 1 + cell.count(" / ")])
    for cell, policy in zip(cells[3].split(" / ") if score == "return" else [], (steered, "DSRL")):
        same(cell, found[env_id, policy], ENTROPY)


def test_readme_quotes_the_other_methods_on_hopper():
    found = results("baselines")
    start = found["Hopper-v4", frozen("Hopper")["frozen diffusion by DDPM"]]
    quoted = re.search(r"DPPO starts at (\d+ / \d+)", (ROOT / "README.md").read_text())[1]
    same(quoted, start, "return, tau 1", "return, tau 0")
    (methods,) = [row[1:] for row in tables("README.md") if row[1:2] == ["DPPO"]]
    for name, column in (("nats", [ENTROPY]), ("return", ["return, tau 1", "return, tau 0"])):
        for method, cell in zip(methods, row_of("README.md", name)[1:], strict=True):
            same(cell, found["Hopper-v4", method], *column)
    ((label, *minutes),) = [x for x in tables("README.md") if x[0].startswith("minutes")]
    minutes.append(re.search(r"LP-DS: (\d+)", label)[1])
    for method, cell in zip([*methods, "LP-DS"], minutes, strict=True):
        same(cell, found["Hopper-v4", method], "minutes")


def frozen(env: str) -> dict:
    """The page's names of frozen policies -> those of the table."""
    name = f"frozen {env.lower()}-v4-medium-"
    diffusion = {
        "frozen diffusion": f"{name}diffusion",
        "frozen diffusion by DDPM": f"{name}diffusion, DDPM",
    }
    steered = "diffusion" if env == "Hopper" else "flow"
    return {"frozen (flow but on Hopper)": name + steered} | diffusion


def test_the_page_of_baselines_quotes_the_results():
    found = results("baselines") | results("continuous/main")
    (header,) = [row for row in tables("docs/baselines.md") if row[1:2] == ["Hopper"]]
    rows = [row for row in tables("docs/baselines.md") if len(row) == 4 and "/" in row[2]]
    assert len(rows) == 10
    for name, *cells in rows:
        for env, cell in zip(header[1:], cells, strict=True):
            known = {policy: told for (env_id, policy), told in found.items() if env in env_id}
            policy = frozen(env).get(name, name)
            if cell == "-":  # not run
                assert policy not in known
                continue
            told = known[policy]
            returned, *nats = cell.split(", ")
            same(returned, told, "return, tau 1", "return, tau 0")
            for entropy in nats:
                same(entropy, told, ENTROPY)
