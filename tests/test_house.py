"""The limits of this house: how long files and functions are, what they import, what the repository
may hold. They do not follow the files: what does not fit is taken out."""

import ast
import re
import shlex
import subprocess
import sys
import types
import typing

import pytest
import tyro
from conftest import ROOT, load
from packaging.requirements import Requirement

LINES = {
    "lpds_continuous.py": 520,
    "lpds_adroit_flow.py": 530,
    "lpds_robomimic.py": 560,
    "lpds_toy.py": 620,
    "lpds_libero_pi0.py": 620,
    "pretrain_backbone.py": 450,
    "enjoy.py": 380,
    "backbones/convert_dppo.py": 110,
    "benchmark/run.py": 400,
    "benchmark/plot.py": 450,
}
OF_BASELINES = {"dppo": 560, "idql": 560, "dql": 560}  # of the others: 20 more than their script
HUNKS = {("lpds_continuous.py", "lpds_adroit_flow.py"): 20}  # of a script and its baseline: 25
COLUMNS, FUNCTION, FLAGS, DATA = 100, 40, 32, 20_000_000
WORDS = {"README.md": 900, "docs/": 1_500}

SCRIPTS = sorted([*ROOT.glob("lpds_*.py"), *ROOT.glob("baselines/*.py")])
PROGRAMS = [*SCRIPTS, *(ROOT / name for name in LINES if ROOT / name not in SCRIPTS)]
PROGRAMS = [path for path in PROGRAMS if path.exists()]
OURS = {path.stem for folder in (".", "backbones", "baselines", "benchmark", "tests")
        for path in (ROOT / folder).glob("*.py")}  # fmt: skip


def name_of(path):
    return str(path.relative_to(ROOT))


def tracked():
    """Files of the repository, those too that are to be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]


def text_files():
    endings = {".py", ".md", ".txt", ".toml", ".ini", ".yaml", ".cff", ""}
    return [path for path in tracked() if path.suffix in endings]


def lines_of(path):
    return len(path.read_text().splitlines())


def family(path):
    """lpds_continuous.py for baselines/dsrl_continuous.py and lpds_action_continuous.py."""
    found = [script for script in LINES if script.startswith("lpds_")]
    return next(name for name in found if path.stem.endswith(name[len("lpds") : -len(".py")]))


# --- how long ---


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_a_file_keeps_its_budget_of_lines(path):
    method = path.stem.split("_")[0]
    if path.parent.name == "baselines":
        budget = OF_BASELINES.get(method) or LINES[family(path)] + 20
    else:
        budget = LINES[name_of(path)]
    assert lines_of(path) <= budget


def test_no_line_is_longer_than_the_page():
    files = [path for path in tracked() if path.suffix == ".py"]
    longest = {name_of(path): max(map(len, path.read_text().splitlines())) for path in files}
    assert longest and {name: n for name, n in longest.items() if n > COLUMNS} == {}


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_a_function_fits_on_a_screen_and_nothing_is_fenced_in(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION, node.name
    marks = r"^\s*# ?-{2,}" if path in SCRIPTS else r"# ?-+ ?(end )?shared"
    assert not re.search(marks, text, re.M), "a comment that is a mark, not a sentence"


PAIRS = {}
for path in SCRIPTS:
    if path.stem.startswith("dsrl_"):
        PAIRS[family(path), name_of(path)] = 25


@pytest.mark.parametrize("one, other", PAIRS | HUNKS)
def test_the_difference_of_two_scripts_can_be_read(one, other):
    command = ["git", "diff", "--no-index", "--unified=0", one, other]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^@@", diff, re.M)) <= (PAIRS | HUNKS)[one, other]


def test_pages_are_short():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        limit = WORDS["README.md"] if path.name == "README.md" else WORDS["docs/"]
        assert len(path.read_text().split()) <= limit, name_of(path)


# --- flags ---


def fits(value, kind):
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    boolean = isinstance(value, bool) and kind is not bool  # which Python takes for a number
    return isinstance(value, typing.get_origin(kind) or kind) and not boolean


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_flags_are_few_documented_and_of_their_type(path):
    bodies = [n.body for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "Args"]
    if not bodies:
        pytest.skip("has no Args")
    fields = [i for i, node in enumerate(bodies[0]) if isinstance(node, ast.AnnAssign)]
    assert len(fields) <= FLAGS
    for i in fields:
        after = bodies[0][i + 1] if i + 1 < len(bodies[0]) else None
        text = after.value.value if isinstance(after, ast.Expr) else ""
        assert len(text.split()) >= 3, f"{bodies[0][i].target.id} says too little about itself"

    args = load(name_of(path)).Args
    for name, kind in typing.get_type_hints(args).items():
        default = args.__dataclass_fields__[name].default
        required = args.__dataclass_fields__[name].init and not hasattr(args, name)
        assert required or fits(default, kind), name


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_defaults_of_environments_are_flags_with_values_of_their_type(path):
    module = load(name_of(path))
    if path.name == "lpds_libero_pi0.py":
        pytest.skip("has the defaults of one task alone")
    hints = typing.get_type_hints(module.Args)
    assert module.DEFAULTS
    for values in module.DEFAULTS.values():
        wrong = {name for name, value in values.items() if not fits(value, hints[name])}
        assert not wrong
        assert (ROOT / "backbones" / values.get("backbone", "")).exists()


# --- what pages say about them ---

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *SCRIPTS]
COMMAND = re.compile(
    r"python ((?:baselines/)?(?:lpds|dsrl|dppo|idql|dql)_\w+\.py)((?:\\\n|[^\n`|#])*)"
)
OTHERS = re.compile(r"python ((?:pretrain_backbone|enjoy)\.py)((?:\\\n|[^\n`|#])*)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_parse(page, monkeypatch):
    for script, flags in COMMAND.findall(page.read_text()):
        flags = flags.replace("\\\n", " ")
        if "--resume" not in flags:
            monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
            assert load(script).parse_args()
    for script, flags in OTHERS.findall(page.read_text()):
        assert tyro.cli(load(script).Args, args=shlex.split(flags.replace("\\\n", " ")))


def departures(paths):
    """The first two words of all `differs from X: ...`."""
    text = " ".join(" ".join(path.read_text().replace("`", "").split()) for path in paths)
    return set(re.findall(r"differs from (?:DSRL|DPPO|the paper): (?:# )?(\S+ \w+)", text))


def test_departures_from_others_are_marked_where_they_are_and_listed_in_a_page():
    assert departures(SCRIPTS) == departures(ROOT.glob("docs/*.md"))


# --- what they stand on ---


def header(path):
    """Requirements of PEP 723."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    source = re.sub(r"^# ?", "", block[1], flags=re.M)
    requirements = ast.literal_eval(re.search(r"dependencies = (\[.*\])", source, re.S)[1])
    return [Requirement(requirement) for requirement in requirements]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_stands_on_its_packages_and_on_entropy(path):
    packages = {requirement.name.replace("-", "_") for requirement in header(path)}
    brought = {"numpy", "gymnasium"}  # by torch and gymnasium-robotics
    brought |= {"libero", "lerobot", "safetensors", "transformers"}  # by lpds_libero_pi0.py's user
    known = sys.stdlib_module_names | packages | brought | {"entropy"}
    assert set(imports(path)) <= known


def test_pretraining_stands_alone():
    assert not {*imports(ROOT / "pretrain_backbone.py")} & OURS


def listed(path):
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


TESTED = {r.name: str(r.specifier)[2:] for r in listed(ROOT / "constraints.txt")}


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "pretrain_backbone.py"], ids=name_of)
def test_headers_allow_the_versions_that_were_tested(path):
    for requirement in header(path):
        assert requirement.name in TESTED, requirement
        assert requirement.specifier.contains(TESTED[requirement.name]), requirement


def test_requirements_allow_the_versions_that_were_tested():
    files = [ROOT / "requirements.txt", *ROOT.glob("requirements/*.txt")]
    for requirement in [requirement for path in files for requirement in listed(path)]:
        if requirement.name in TESTED:
            assert requirement.specifier.contains(TESTED[requirement.name]), requirement


# --- what the repository may hold ---

PRIVATE = {
    "a path of a machine": r"/(work|root|home|tmp|mnt|scratch)/",
    "a host of packages": r"index-url|pypi\.org|pythonhosted|artifactory|localhost|127\.0\.0\.1",
    "something left to do": r"\b(TODO|FIXME|XXX)\b",
}


@pytest.mark.parametrize("pattern", PRIVATE.values(), ids=PRIVATE)
def test_files_speak_of_the_project_alone(pattern):
    for path in text_files():
        if path.name != "test_house.py":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not re.search(pattern, line), f"{name_of(path)}:{number}: {line.strip()}"


def test_the_repository_is_small():
    data = [path for path in tracked() if path.suffix not in (".py", ".md")]
    assert data and sum(path.stat().st_size for path in data) < DATA
