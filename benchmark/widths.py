"""How often do the frozen hands succeed on noise that is narrower or wider than the prior, without any learning?

A cloned policy plays its data's noise, too; less noise into the decoder may by itself be worth more than steering. And
DSRL starts from another width than LP-DS: its squashed Gaussian b tanh(mu + sigma eps), before it has learned a thing
(mu about 0, sigma about 1), has a standard deviation of 0.63 b in every coordinate. So each committed decoder plays
the same episodes on s eps for several s, and on b tanh(eps). Writes benchmark/results/widths.json and .md.

python benchmark/widths.py            # a quarter of an hour on one core
python benchmark/widths.py --table    # the table alone, from the .json
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
from lpds_adroit_flow import evaluate, load_decoder, make_env, parse_args  # noqa: E402

TASKS = ("Pen", "Hammer", "Door", "Relocate")
WIDTHS = {  # eps (B, d) -> w (B, d)
    "0": lambda eps: 0.0 * eps,
    "0.25 eps": lambda eps: 0.25 * eps,
    "0.5 eps": lambda eps: 0.5 * eps,
    "0.75 eps": lambda eps: 0.75 * eps,
    "eps (frozen)": lambda eps: eps,
    "1.25 eps": lambda eps: 1.25 * eps,
    "tanh eps": lambda eps: eps.tanh(),
    "1.5 tanh eps": lambda eps: 1.5 * eps.tanh(),
    "2.5 tanh eps": lambda eps: 2.5 * eps.tanh(),
}


def describe(width) -> dict:
    """Standard deviation of a coordinate of w; its differential entropy less that of eps, E log |dw/deps|, in nats."""
    points, weights = np.polynomial.hermite_e.hermegauss(64)  # E f(eps) = sum of weights f(points) / sqrt(2 pi)
    eps = torch.tensor(points, requires_grad=True)
    w = width(eps)
    (slope,) = torch.autograd.grad(w.sum(), eps)
    mean = lambda x: float(x.detach().numpy() @ weights / np.sqrt(2 * np.pi))  # noqa: E731
    return {"std": mean(w.square()) ** 0.5, "entropy": mean(slope.log()) if slope.any() else -np.inf}


def play(task: str, width, episodes: int) -> dict:
    """Success (in any step) and return of the frozen decoder on w = width(eps)."""
    args = parse_args(["--env-id", f"AdroitHand{task}-v1"])
    decoder, normalization, _ = load_decoder(args)
    envs = [make_env(args.env_id, decoder.config["chunk"], normalization) for _ in range(episodes)]
    result = evaluate(lambda obs, noise: decoder(obs, width(noise)), envs, 10_000, "cpu")
    return {"success": float(result["success"].mean()), "return": round(float(result["return"].mean()), 1)}


def markdown(file: dict) -> str:
    rows = [["w", "std", "entropy", *TASKS], ["---"] + ["---:"] * (2 + len(TASKS))]
    for name, tasks in file["widths"].items():
        about = describe(WIDTHS[name])
        cells = [f"{tasks[task]['success']:.2f}, {tasks[task]['return']:.0f}" for task in TASKS]
        rows.append([name, f"{about['std']:.2f}", f"{about['entropy']:+.2f}", *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    error = 0.5 / file["episodes"] ** 0.5
    note = f"Success and return of the frozen decoders in {file['episodes']} episodes, seeds from 10000; standard "
    note += f"error of success up to {error:.2f}. Std and entropy (nats, less that of eps): of one coordinate of w. "
    note += f"{file['machine']}, {file['date']}."
    return "\n".join(["<!-- written by: python benchmark/widths.py -->", "", *lines, "", note, ""])


def main(episodes: int = 100, table: bool = False, out: Path = ROOT / "benchmark" / "results" / "widths.json"):
    """Measures and writes; --table writes the table alone, from the numbers that are there."""
    if not table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        file = {"date": time.strftime("%Y-%m-%d"), "episodes": episodes, "widths": {name: {} for name in WIDTHS},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}  # fmt: skip
        for task in TASKS:
            for name, width in WIDTHS.items():
                file["widths"][name][task] = play(task, width, episodes)
                print(task, name, file["widths"][name][task], flush=True)
        out.write_text(json.dumps(file, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
