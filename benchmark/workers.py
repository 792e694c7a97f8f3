"""Does it pay to step the Adroit hands in worker processes? One vector step of lpds_adroit_flow.py (num_envs chunks of
eight actions), with all environments in the learner's process and with each in one of its own, beside the train call
that follows every vector step. Writes benchmark/results/workers.json and .md.

python benchmark/workers.py            # two minutes
python benchmark/workers.py --table    # the table alone, from the .json

By the clock on the wall, as the processor time of workers does not show here. The variants take turns, and the fastest
turn counts, which leaves out those with a reset.
"""

import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lpds_adroit_flow as adroit  # noqa: E402

VECTORS = {"one process": gym.vector.SyncVectorEnv, "workers": partial(gym.vector.AsyncVectorEnv, shared_memory=True)}


def train_call(agent, replay, args) -> None:
    for _ in range(args.utd):
        batch = replay.sample(args.batch_size)
        adroit.update_action_critic(agent, batch, args)
        adroit.update_perturbation(agent, batch, args)
    adroit.update_latent_critic(agent, replay.sample(args.batch_size * args.distill_steps), args)


def measure(env_id: str, repeats: int, flags: tuple = ()) -> dict:
    """Seconds: the fastest vector step of each kind, and the fastest train call."""
    args = adroit.parse_args(["--env-id", env_id, *flags])
    torch.manual_seed(args.seed)
    decoder, normalization, _ = adroit.load_decoder(args)
    agent, replay = adroit.Agent(args, decoder), adroit.Replay(1_000, decoder.config["obs_dim"], decoder.dim, "cpu")
    rows = {name: torch.rand(1_000, *column.shape[1:]) for name, column in replay.data.items()}
    replay.add(**rows | {"terminated": torch.zeros(1_000)})
    make = partial(adroit.make_env, env_id, decoder.config["chunk"], normalization)
    mode = gym.vector.AutoresetMode.SAME_STEP
    vectors = {name: kind([make] * args.num_envs, autoreset_mode=mode) for name, kind in VECTORS.items()}
    best = dict.fromkeys([*vectors, "train call"], float("inf"))
    for envs in vectors.values():
        envs.reset(seed=args.seed)
    for _ in range(repeats):
        action = decoder(torch.rand(args.num_envs, decoder.config["obs_dim"]), torch.randn(args.num_envs, decoder.dim))
        for name, envs in vectors.items():
            started = time.perf_counter()
            envs.step(action.numpy())
            best[name] = min(best[name], time.perf_counter() - started)
        started = time.perf_counter()
        train_call(agent, replay, args)
        best["train call"] = min(best["train call"], time.perf_counter() - started)
    for envs in vectors.values():
        envs.close()
    return best


def markdown(file: dict) -> str:
    rows = [
        ["environment", "one process", "workers", "train call", "speed-up by workers, step and train call together"]
    ]
    rows += [["---"] + ["---:"] * 4]
    for env_id, r in file["environments"].items():
        one, workers, train = (r[name] for name in (*VECTORS, "train call"))
        times = (f"{1000 * seconds:.1f} ms" for seconds in (one, workers, train))
        rows.append([env_id, *times, f"{(one + train) / (workers + train):.3f}"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"Fastest of {file['repeats']} turns, num_envs {file['num_envs']}. {file['machine']}, {file['date']}."
    return "\n".join(["<!-- written by: python benchmark/workers.py -->", "", *lines, "", note, ""])


def main(repeats: int = 30, table: bool = False, out: Path = ROOT / "benchmark" / "results" / "workers.json"):
    """Measures and writes; --table writes the table alone, from the numbers that are there."""
    if not table:
        torch.set_num_threads(1)
        file = {"date": time.strftime("%Y-%m-%d"), "repeats": repeats, "num_envs": adroit.parse_args([]).num_envs,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
                "environments": {}}  # fmt: skip
        for task in adroit.DELTAS:
            env_id = f"AdroitHand{task}-v1"
            file["environments"][env_id] = measure(env_id, repeats)
            print(env_id, file["environments"][env_id], flush=True)
        out.write_text(json.dumps(file, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
