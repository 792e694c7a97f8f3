"""Demonstrations for MultiGoal: the noisy expert of LP-DS's appendix B.

    python backbones/multigoal_demonstrator.py --output multigoal.npz
    python pretrain_backbone.py --data multigoal.npz --env-id lpds_toy:MultiGoal-v0 --output FILE.pt

It heads for the nearest goal from states anywhere in the plane, each an episode of a single step.
How backbones/multigoal-flow.pt was made of it: docs/lpds_toy.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lpds_toy import MultiGoal  # noqa: E402


@dataclass
class Args:
    output: Path
    """FILE.npz to write, as pretrain_backbone.py --data reads it"""
    samples: int = 1_000_000
    """states, each with one action"""
    noise: float = 0.1
    """standard deviation of what is added to the expert's action"""
    seed: int = 1
    """of states and noise"""


def demonstrate(n: int, noise: float, rng) -> tuple:
    """n states, uniform in [-2, 2]^2, and their actions in [-1, 1]^2, both (n, 2)."""
    obs = rng.uniform(-2, 2, (n, 2))
    distance = np.linalg.norm(obs[:, None] - MultiGoal.GOALS, axis=-1)  # (n, 4)
    expert = np.clip(MultiGoal.GOALS[distance.argmin(1)] - obs, -1, 1)
    return obs, np.clip(expert + noise * rng.standard_normal((n, 2)), -1, 1)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    obs, actions = demonstrate(args.samples, args.noise, np.random.default_rng(args.seed))
    ends = np.ones(args.samples, bool)
    arrays = {"observations": obs, "actions": actions, "terminals": ends, "timeouts": ~ends}
    np.savez_compressed(args.output, **arrays)
    print(f"{args.samples} states and actions in {args.output}")
