"""Copies every shared block out of the first of MODELS that has it into the files that have a block of the same name.

python tests/sync_shared_blocks.py          # rewrites what has drifted, prints what it did

It also writes the differences between the scripts and their baselines into docs/.
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("lpds_continuous.py", "lpds_toy.py", "lpds_adroit_flow.py", "baselines/dsrl_continuous.py")
BLOCK = re.compile(
    r"^ *# --- shared: (?P<name>[^\n]+?) ---\n(?P<body>.*?)^ *# --- end shared: (?P=name) ---\n", re.M | re.S
)


def scripts() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])


def blocks(text: str) -> dict[str, str]:
    """Name -> text of the shared blocks, in file order; a marker that is not closed by its own name is an error."""
    found = {match["name"]: match["body"] for match in BLOCK.finditer(text)}
    markers = re.findall(r"^ *# --- (?:end )?shared: .+ ---$", text, re.M)
    if len(markers) != 2 * len(found):
        raise ValueError(f"{len(markers)} markers, but {len(found)} closed blocks of different names")
    return found


def model_blocks() -> dict[str, str]:
    """Name -> text of every shared block, as all files should have it."""
    found = {}
    for model in MODELS:
        found = blocks((ROOT / model).read_text()) | found
    return found


def with_diffs(page: str) -> str:
    """`page` with the diff of each baseline after its mark `<!-- diff of NAME ... -->`, up to the end of that block."""

    def block(match):
        b = ROOT / "baselines" / match["name"]
        a = ROOT / b.name.replace("dsrl", "lpds")
        texts = (path.read_text().splitlines() for path in (a, b))
        lines = difflib.unified_diff(*texts, a.name, f"baselines/{b.name}", n=0, lineterm="")
        return match["mark"] + "\n```diff\n" + "\n".join(lines) + "\n```\n<!-- end of diff -->\n"

    mark = r"(?P<mark><!-- diff of (?P<name>\S+\.py)[^\n]*-->)\n.*?<!-- end of diff -->\n"
    return re.sub(mark, block, page, flags=re.S)


if __name__ == "__main__":
    model = model_blocks()
    for path in scripts():
        text = path.read_text()
        for name in blocks(text).keys() & model.keys():
            old = next(match for match in BLOCK.finditer(text) if match["name"] == name)
            if old["body"] != model[name]:
                text = text[: old.start("body")] + model[name] + text[old.end("body") :]
                print(f"{path.name}: {name} updated")
        path.write_text(text)
    for page in sorted((ROOT / "docs").glob("*.md")):
        page.write_text(with_diffs(page.read_text()))
