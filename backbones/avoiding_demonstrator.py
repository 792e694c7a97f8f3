"""Scripted demonstrations of the Avoiding task: all 24 routes, none with a touch.

    python backbones/avoiding_demonstrator.py --output avoiding.npz
    python pretrain_backbone.py --data avoiding.npz --env-id lpds_toy:Avoiding-v0 --output FILE.pt

A route is a gate (x) at each of the three rows of posts. A smooth curve through start and gates is
pursued with a gamepad's habits: idle at first, unsteady, with a dead zone, never backwards. Where
gates lie and how they scatter, speed, dead zone and idle time were chosen so that the
demonstrations have the statistics of the human ones of D3IL (Jia et al. 2024, 96 of 77 +- 12
steps), which may not be passed on. How backbones/avoiding-scripted-diffusion.pt was made of them:
docs/lpds_toy.md.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.interpolate import PchipInterpolator

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lpds_toy import Avoiding  # noqa: E402

SPEED = 0.0125  # metres per step of a fully pushed stick
# Mean x of the gates in each gap of a row, its spread, the lowest and the highest; in metres
GATES = [
    [(0.432, 0.019, 0.375, 0.452), (0.585, 0.019, 0.552, 0.640)],
    [(0.354, 0.018, 0.290, 0.378), (0.501, 0.015, 0.472, 0.528), (0.654, 0.027, 0.622, 0.720)],
    [(0.292, 0.015, 0.250, 0.303), (0.427, 0.015, 0.397, 0.452)],
]
GATES[2] += [(0.566, 0.015, 0.548, 0.603), (0.714, 0.015, 0.697, 0.750)]


@dataclass
class Args:
    output: Path
    """FILE.npz to write, as pretrain_backbone.py --data reads it"""
    per_mode: int = 4
    """demonstrations of each of the 24 routes; D3IL has 4"""
    seed: int = 1
    """of gates and unsteadiness"""


def curve(route, rng) -> PchipInterpolator:
    """x(y) in metres through the start and the gate of each row, straight for 7 cm there."""
    x, y = [Avoiding.START[0]], [Avoiding.START[1]]
    for (level, _, _), gates, gap in zip(Avoiding.ROWS, GATES, route):
        mean, spread, low, high = gates[gap]
        x += [np.clip(rng.normal(mean, spread), low, high)] * 2
        y += [level - 0.035, level + 0.035]
    return PchipInterpolator([*y, 0.52], [*x, x[-1]])


def attempt(env: Avoiding, route, rng) -> tuple:
    """One try: obs (T, 4), actions (T, 2), and whether it took `route` without a touch."""
    path = curve(route, rng)
    ahead = rng.uniform(0.02, 0.035)
    stop = rng.uniform(0.42, 0.47)
    idle = rng.geometric(1 / 5.6)
    obs, _ = env.reset()
    drift, touched = np.zeros(2), False
    seen, taken = [], []
    while obs[1] < stop and len(taken) < 150:  # on beyond the line, where an episode would end
        y = min(obs[1] + ahead, 0.52)
        push = np.array([path(y), y]) - obs[:2]
        drift += -0.15 * drift + 0.08 * rng.standard_normal(2)
        push = push / np.abs(push).max() + drift
        push *= min(1, 1.2 / np.linalg.norm(push))
        push[1] = max(push[1], 0)
        push[np.abs(push) < 0.4] = 0
        seen.append(obs)
        taken.append(SPEED * push * (len(taken) >= idle - 1))
        obs, *_ = env.step(taken[-1])
        touched |= env.data.ncon > 0
    arrived = env.path[env.time, 1] > 0.35
    good = arrived and not touched and env.route() == np.ravel_multi_index(route, (2, 3, 4))
    return np.array(seen), np.array(taken), good


def demonstrate(route, rng) -> tuple:
    """obs (T, 4) and actions (T, 2) of a success on `route`: the gap of each row from the left."""
    env = Avoiding()
    while True:
        obs, actions, good = attempt(env, route, rng)
        if good:
            return obs, actions


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    rng, demos = np.random.default_rng(args.seed), []
    for route in itertools.product(range(2), range(3), range(4)):
        demos += [demonstrate(route, rng) for _ in range(args.per_mode)]
    obs, actions = (np.concatenate(parts) for parts in zip(*demos))
    lengths = np.array([len(taken) for _, taken in demos])
    ends = np.zeros(len(obs), bool)
    ends[lengths.cumsum() - 1] = True
    arrays = {"observations": obs, "actions": actions, "terminals": ends, "timeouts": ends & False}
    np.savez_compressed(args.output, **arrays)
    print(f"{len(demos)} demonstrations of {lengths.mean():.1f} +- {lengths.std():.1f} steps")
