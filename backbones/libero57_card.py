"""Plays a tiny pi0 of libero57_tiny_pi0.py, and writes into its file how often it succeeds.

    python backbones/libero57_card.py backbones/libero57-tiny-pi0.pt --episodes 100

Episodes are those of lpds_libero_pi0.py's evaluations, from its held-out initial states.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lpds_libero_pi0 import evaluate, make_env  # noqa: E402


@dataclass
class Args:
    file: Annotated[Path, tyro.conf.Positional]
    """FILE.pt"""
    episodes: int = 100
    """how many"""
    temperature: float = 1.0
    """factor on the noise; other than 1 it is printed alone"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    file = torch.load(args.file, weights_only=True)
    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([lambda: make_env(file["env_id"], file)], autoreset_mode=mode)
    decoder, results = envs.envs[0].decoder, []
    for seed in range(args.episodes):
        policy = lambda obs, noise: decoder(obs, args.temperature * noise)  # noqa: E731
        results.append(evaluate(policy, envs, "cpu", seed))
        success = np.mean([result["success"] for result in results])
        length = np.mean([result["length"] for result in results])
        print(f"{seed + 1} episodes: success {success:.2f}, length {length:.0f}", flush=True)
    if args.temperature == 1:
        file["card"] |= dict(frozen_success=float(success), eval_episodes=args.episodes)
        file["card"]["frozen_length"] = float(length)
        torch.save(file, args.file)
