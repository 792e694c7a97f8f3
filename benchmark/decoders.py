"""What limits the committed decoders: their noise, or that a chunk cannot react to it?

Every locomotion decoder of backbones/ plays the same episodes with its chunk executed open loop, as it is used;
replanned after every single action; with half the noise; with none; and with 10 sampling steps. Writes
benchmark/results/decoders.json and .md.

python benchmark/decoders.py                 # a quarter of an hour on one core
python benchmark/decoders.py --table         # the table alone, from the .json
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
from lpds_continuous import Args as ScriptArgs  # noqa: E402
from lpds_continuous import evaluate, load_decoder, make_env  # noqa: E402

ENV = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
MODES = {  # actions executed of a chunk (0: all), factor on the noise, sampling steps (0: the decoder's own)
    "as used": (0, 1.0, 0),
    "replanned every step": (1, 1.0, 0),
    "half the noise": (0, 0.5, 0),
    "no noise": (0, 0.0, 0),
    "10 sampling steps": (0, 1.0, 10),
}


def play(path: Path, executed: int, factor: float, steps: int, episodes: int) -> dict:
    """Episodes of the decoder alone; the first `executed` actions of each chunk are used, the noise times `factor`."""
    env_id = ENV[path.name.split("-")[0]]
    decoder, normalization, _ = load_decoder(ScriptArgs(env_id=env_id, backbone=str(path)))
    decoder.config["sample_steps"] = steps or decoder.config["sample_steps"]
    decoder.freeze()
    executed = executed or decoder.config["chunk"]
    d, keep = decoder.dim, executed * decoder.config["action_dim"]
    envs = [make_env(env_id, executed, normalization) for _ in range(episodes)]

    @torch.no_grad()
    def policy(obs, noise):  # evaluate() draws as much noise as the environment takes actions; a chunk may need more
        noise = torch.cat([noise, torch.randn(len(noise), d - noise.shape[1])], 1)
        return decoder(obs, factor * noise)[:, :keep]

    torch.manual_seed(0)
    result = evaluate(policy, envs, 10_000, "cpu")
    mean, spread = result["return"].mean(), result["return"].std(ddof=1)
    return {"return": round(float(mean), 1), "standard_error": round(float(spread / episodes**0.5), 1),
            "length": round(float(np.mean(result["length"])), 1)}  # fmt: skip


def markdown(file: dict) -> str:
    rows = [["decoder", *MODES], ["---"] + ["---:"] * len(MODES)]
    for name, modes in file["decoders"].items():
        rows.append([name, *(f"{m['return']:.0f} ± {m['standard_error']:.0f}" for m in modes.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"Mean return over {file['episodes']} episodes (seeds from 10000) ± standard error. {file['machine']}."
    return "\n".join(["<!-- written by: python benchmark/decoders.py -->", "", *lines, "", note, ""])


def main(episodes: int = 40, table: bool = False, out: Path = ROOT / "benchmark" / "results" / "decoders.json"):
    """Measures and writes; --table writes the table alone, from the numbers that are there."""
    if not table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        file = {"date": time.strftime("%Y-%m-%d"), "episodes": episodes, "decoders": {},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}  # fmt: skip
        for path in sorted((ROOT / "backbones").glob("*-v4-*.pt")):
            file["decoders"][path.stem] = {name: play(path, *mode, episodes) for name, mode in MODES.items()}
            print(path.stem, file["decoders"][path.stem], flush=True)
        out.write_text(json.dumps(file, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
