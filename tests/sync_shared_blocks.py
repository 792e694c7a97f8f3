"""Copies every shared block out of lpds_continuous.py into the files that have a block of the same name.

python tests/sync_shared_blocks.py          # rewrites what has drifted, prints what it did
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^# --- shared: (?P<name>[^\n]+?) ---\n(?P<body>.*?)^# --- end shared: (?P=name) ---\n", re.M | re.S
)


def scripts() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])


def blocks(text: str) -> dict[str, str]:
    """Name -> text of the shared blocks, in file order; a marker that is not closed by its own name is an error."""
    found = {match["name"]: match["body"] for match in BLOCK.finditer(text)}
    markers = re.findall(r"^# --- (?:end )?shared: .+ ---$", text, re.M)
    if len(markers) != 2 * len(found):
        raise ValueError(f"{len(markers)} markers, but {len(found)} closed blocks of different names")
    return found


if __name__ == "__main__":
    model = blocks((ROOT / "lpds_continuous.py").read_text())
    for path in scripts():
        text = path.read_text()
        for name in blocks(text).keys() & model.keys():
            if blocks(text)[name] != model[name]:
                start, end = f"# --- shared: {name} ---\n", f"# --- end shared: {name} ---\n"
                head, rest = text.split(start, 1)
                text = head + start + model[name] + end + rest.split(end, 1)[1]
                print(f"{path.name}: {name} updated")
        path.write_text(text)
