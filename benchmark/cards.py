"""Prints the decoders of a folder and the cards they carry as a markdown table: python benchmark/cards.py [FOLDER]

Everything is read from the files themselves; a value that a card does not have stays empty. The table in
docs/pretrain_backbone.md is the output for backbones/.
"""

import math
import sys
from pathlib import Path

import torch

COLUMNS = ("file", "kind", "width", "parameters", "data", "frozen return", "length", "success", "episodes",
           "held-out loss", "size")  # fmt: skip


def number(value, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def row(path: Path) -> tuple:
    file = torch.load(path, map_location="cpu", weights_only=True)
    card, config = file["card"], file["config"]
    score, spread = (number(card.get(key), 0) for key in ("frozen_return", "frozen_return_std"))
    return (
        path.name,
        file["kind"],
        f"{len(config['hidden'])} x {config['hidden'][0]}",
        f"{sum(weight.numel() for weight in file['model'].values()):,}",
        card.get("data", ""),
        f"{score} +- {spread}" if score else "",
        number(card.get("frozen_length"), 0),
        number(card.get("frozen_success"), 2),
        str(card.get("eval_episodes", "")),
        number(card.get("held_out_loss"), 4),
        f"{path.stat().st_size / 2**20:.1f} MiB",
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "backbones"
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        print(f"cards.py: error: {folder}: holds no *.pt; give a folder of decoders", file=sys.stderr)
        raise SystemExit(2)
    for cells in (COLUMNS, ("---",) * len(COLUMNS), *map(row, paths)):
        print(f"| {' | '.join(cells)} |")
