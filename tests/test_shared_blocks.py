"""Copies between scripts are by design, drift is not: blocks of one name are byte-identical everywhere."""

import ast

import pytest
from sync_shared_blocks import ROOT, blocks, model_blocks, scripts, with_diffs

# In lines. Above the budgets of 650, 700 and 450, knowingly: every contract that a script keeps has lines in it (exact
# resume, one-sentence errors, files of others, presets, a loadable agent: some 170), and the blocks have their markers.
LIMIT = {"lpds_continuous.py": 825, "dsrl_continuous.py": 815, "lpds_toy.py": 976, "dsrl_toy.py": 935}
LIMIT |= {"lpds_adroit_flow.py": 881, "dsrl_adroit_flow.py": 869}


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_blocks_are_those_of_the_model_script(path):
    model = model_blocks()
    for name, body in blocks(path.read_text()).items():
        assert body == model[name], f"{path.name}: '{name}' has drifted; run python tests/sync_shared_blocks.py"


def test_the_pages_show_the_diffs_as_they_are():
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert sum(page.count("```diff") for page in pages) == len(list((ROOT / "baselines").glob("*.py")))
    assert [with_diffs(page) for page in pages] == pages, "run python tests/sync_shared_blocks.py"


def test_blocks_are_found_and_open_ones_refused():
    names = {"settings", "command line", "errors", "environment", "environment state", "decoder", "decoder file"}
    names |= {"networks", "critics, replay", "agent and its updates", "distillation", "evaluation", "files"}
    names |= {"run folder", "learn", "end", "perturbation"}
    assert set(blocks((ROOT / "lpds_continuous.py").read_text())) == names
    with pytest.raises(ValueError):
        blocks("# --- shared: a ---\nx = 1\n# --- end shared: b ---\n")


@pytest.mark.parametrize(
    "path", [p for p in scripts() if p.name.startswith("lpds_") or p.parent.name == "baselines"], ids=lambda p: p.name
)
def test_a_script_stays_one_short_readable_file(path):
    text = path.read_text()
    assert text.count("\n") <= LIMIT.get(path.name, 700)
    local = {p.stem for p in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]} - {"entropy"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, f"{node.name} is too long to read at once"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & local, "scripts share entropy.py and nothing else"
