"""Prints backbones/README.md, which shows the cards of the decoder files.

python backbones/cards.py > backbones/README.md
"""

from pathlib import Path

import torch

TEXT = """# Decoders

What the scripts steer: small policies, cloned from mediocre data by `pretrain_backbone.py` and
frozen since. [docs/pretrain_backbone.md](../docs/pretrain_backbone.md) describes such a file and
how to make one of your data or, by `convert_dppo.py`, of a checkpoint of DPPO or DSRL.

The numbers are from the card in each file. Return (mean and standard deviation), success and
length (in primitive steps) are those of episodes of the frozen decoder, its noise sampled. This
page is printed by `python backbones/cards.py > backbones/README.md`.
"""
COLUMNS = (
    "file",
    "environment",
    "decoder",
    "return",
    "success",
    "length",
    "episodes",
    "held-out loss",
)


def row(path: Path, file: dict) -> str:
    """A row of the table; what a card does not say stays empty."""
    card = file["card"]
    if "trunk" in file:
        decoder = f"pi0 in miniature, {file['steps']} steps, chunk {file['chunk']}"
    else:
        steps = len(file["time_emb"]) - (file["solver"] == "heun")
        decoder = f"{file['kind']}, width {file['width']}, {steps} steps, chunk {file['chunk']}"
    score = ""
    if "frozen_return" in card:
        score = f"{card['frozen_return']:.0f} ± {card['frozen_return_std']:.0f}"
    cells = [f"`{path.name}`", card.get("env_id", "").split(":")[-1], decoder, score]
    for key, form in ("frozen_success", ".2f"), ("frozen_length", ".0f"), ("eval_episodes", "d"):
        cells.append(format(card[key], form) if key in card else "")
    cells.append(format(card["held_out_loss"], ".3f") if "held_out_loss" in card else "")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    paths = sorted(Path(__file__).parent.glob("*.pt"))
    files = {path: torch.load(path, map_location="cpu", weights_only=True) for path in paths}
    print(TEXT)
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
    for path, file in files.items():
        print(row(path, file))

    print("\nWhat they were cloned from:\n")
    sources = {}
    for path, file in files.items():
        sources.setdefault(file["card"].get("source", ""), []).append(f"`{path.name}`")
    for source, names in sources.items():
        print(f"- {', '.join(names)}: {source}")
