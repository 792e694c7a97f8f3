"""How much can steering change at all? Random constant shifts of the noise, at the whole budget, without any learning.

w = eps + c for `--shifts` random directions c and their opposites, with ||c||^2 / d = delta: every one of them is a
policy that LP-DS may choose with --delta-norm mean. Their spread says how much there is to find, their mean what an
uninformed shift costs. Writes benchmark/results/shifts.json and .md.

python benchmark/shifts.py            # ten minutes on one core
python benchmark/shifts.py --table    # the table alone, from the .json
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lpds_continuous import evaluate, load_decoder, make_env, parse_args  # noqa: E402


def play(env_id: str, shifts: int, episodes: int, flags: tuple = ()) -> dict:
    """Mean return of `episodes` episodes, frozen and under each of 2 * shifts constant shifts of the noise."""
    args = parse_args(["--env-id", env_id, *flags])
    decoder, normalization, _ = load_decoder(args)
    envs = [make_env(env_id, decoder.config["chunk"], normalization) for _ in range(episodes)]
    direction = torch.randn(shifts, decoder.dim, generator=torch.Generator().manual_seed(0))
    direction *= (args.delta * decoder.dim) ** 0.5 / direction.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def score(c) -> float:
        return float(evaluate(lambda obs, noise: decoder(obs, noise + c), envs, 10_000, "cpu")["return"].mean())

    returns = [round(score(sign * c), 1) for c in direction for sign in (1, -1)]
    return {"delta": args.delta, "frozen": round(score(0 * direction[0]), 1), "returns": returns}


def markdown(file: dict) -> str:
    rows = [["environment", "delta (mean)", "frozen", "mean", "standard deviation", "worst", "best"]]
    rows += [["---"] + ["---:"] * 6]
    for env_id, r in file["environments"].items():
        x = np.array(r["returns"])
        numbers = (r["frozen"], x.mean(), x.std(ddof=1), x.min(), x.max())
        rows.append([env_id, f"{r['delta']}", *(f"{number:.0f}" for number in numbers)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"{2 * file['shifts']} shifts, mean return over {file['episodes']} episodes each (seeds from 10000). "
    return "\n".join(
        ["<!-- written by: python benchmark/shifts.py -->", "", *lines, "", note + file["machine"] + ".", ""]
    )


def main(
    shifts: int = 8, episodes: int = 40, table: bool = False, out: Path = ROOT / "benchmark" / "results" / "shifts.json"
):
    """Measures and writes; --table writes the table alone, from the numbers that are there."""
    if not table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        file = {"date": time.strftime("%Y-%m-%d"), "shifts": shifts, "episodes": episodes, "environments": {},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}  # fmt: skip
        for env_id in ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"):
            file["environments"][env_id] = play(env_id, shifts, episodes)
            print(env_id, file["environments"][env_id], flush=True)
        out.write_text(json.dumps(file, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
