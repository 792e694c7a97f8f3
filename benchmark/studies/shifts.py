"""How much can steering change at all? Random constant shifts of the noise, nothing learned.

    python benchmark/studies/shifts.py            # measures; ten minutes on one core
    python benchmark/studies/shifts.py --table    # prints the table of what was measured

w = eps + c for random directions c and their opposites, as long as the budget allows: with
||c||^2 / d = delta, every one is a policy that LP-DS may choose under --delta-norm mean. Their
spread says how much there is to find, their mean what an uninformed shift costs.

What came out: docs/studies/shifts.md.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from enjoy import make_envs  # noqa: E402
from lpds_continuous import DEFAULTS, Decoder, evaluate, make_env  # noqa: E402

DELTAS = {"Hopper-v4": 0.5, "Walker2d-v4": 0.35, "HalfCheetah-v4": 0.35}


def play(env_id: str, backbone: Path, delta: float, shifts: int, episodes: int) -> dict:
    """Mean return of the frozen policy, and of each of 2 * `shifts` constant shifts."""
    file = torch.load(backbone, weights_only=True)
    decoder = Decoder(file)
    envs = make_envs(partial(make_env, env_id, file), episodes)
    direction = torch.randn(shifts, decoder.dim, generator=torch.Generator().manual_seed(0))
    direction *= (delta * decoder.dim) ** 0.5 / direction.norm(dim=1, keepdim=True)

    def score(c) -> float:  # over the same starts and noise for every c
        result = evaluate(lambda obs, noise: decoder(obs, noise + c), envs, "cpu", seed=1)
        return round(float(np.mean(result["return"])), 1)

    returns = [score(sign * c) for c in direction for sign in (1, -1)]
    return {"delta": delta, "frozen": score(0 * direction[0]), "returns": returns}


def markdown(file: dict) -> str:
    names = ["environment", "delta", "frozen", "mean", "standard deviation", "worst", "best"]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1)]
    for env_id, r in file["environments"].items():
        x = np.array(r["returns"])
        numbers = r["frozen"], x.mean(), x.std(ddof=1), x.min(), x.max()
        lines.append([env_id, f"{r['delta']}", *(f"{number:.0f}" for number in numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    table: bool = False,
    shifts: int = 8,
    episodes: int = 40,
    out: Path = ROOT / "benchmark" / "results" / "shifts.json",
):
    """See above.

    Args:
        table: measure nothing
        shifts: random directions, each with its opposite
        episodes: of each policy, from the same starts
        out: where the numbers go
    """
    torch.set_num_threads(1)  # small matrices, as in the scripts
    if not table:
        file = {"date": time.strftime("%Y-%m-%d"), "shifts": shifts, "episodes": episodes}
        file["environments"] = {}
        for env_id, delta in DELTAS.items():
            backbone = ROOT / "backbones" / DEFAULTS[env_id.split("-v")[0]]["backbone"]
            file["environments"][env_id] = play(env_id, backbone, delta, shifts, episodes)
            out.write_text(json.dumps(file, indent=1) + "\n")
    print(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
