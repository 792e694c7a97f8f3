"""Scripted demonstrations of the Avoiding task: all 24 routes, none with a contact.

    python backbones/avoiding_demonstrator.py --output avoiding.npz
    python pretrain_backbone.py --data avoiding.npz --env-id lpds_toy:Avoiding-v0 --output avoiding.pt

A route is a gate (x) at each of the three rows of posts. A smooth curve through start and gates is pursued with a
gamepad's habits: idle at first, unsteady, with a dead zone, never backwards. The numbers (where gates lie and how they
scatter, speed, dead zone, idle time) were chosen so that the demonstrations have the statistics of the human ones of
D3IL (Jia et al. 2024, 96 of 77 +- 12 steps), which may not be passed on; pretrain_backbone.py reads those as well.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from scipy.interpolate import PchipInterpolator

sys.path.append(str(Path(__file__).resolve().parents[1]))
import lpds_toy  # noqa: E402, F401 (registers Avoiding-v0)

SPEED = 0.0125  # metres per step of a fully pushed stick
# Per row of posts: y, and for each gap (mean x, its spread, lowest and highest x), metres
ROWS = (
    (-0.10, ((0.432, 0.019, 0.375, 0.452), (0.585, 0.019, 0.552, 0.640))),
    (0.08, ((0.354, 0.018, 0.290, 0.378), (0.501, 0.015, 0.472, 0.528), (0.654, 0.027, 0.622, 0.720))),
    (0.26, ((0.292, 0.015, 0.250, 0.303), (0.427, 0.015, 0.397, 0.452), (0.566, 0.015, 0.548, 0.603),
            (0.714, 0.015, 0.697, 0.750))),
)  # fmt: skip


@dataclass
class Args:
    output: Path
    """FILE.npz to write, as pretrain_backbone.py --data reads it"""
    per_mode: int = 4
    """demonstrations of each of the 24 routes; D3IL has 4"""
    seed: int = 1
    """of gates and unsteadiness"""


def curve(route, rng) -> PchipInterpolator:
    """x(y) in metres through the start and a point of each gap of `route` (3,), where it runs straight for 7 cm."""
    x, y = [lpds_toy.Avoiding.START[0]], [lpds_toy.Avoiding.START[1]]
    for (level, gaps), gap in zip(ROWS, route, strict=True):
        mean, spread, low, high = gaps[gap]
        x += [np.clip(rng.normal(mean, spread), low, high)] * 2
        y += [level - 0.035, level + 0.035]
    return PchipInterpolator([*y, 0.52], [*x, x[-1]])


def attempt(env, route, rng):
    """(obs (T, 4), actions (T, 2), info at the end) of one try at `route`."""
    path, ahead, stop, idle = (
        curve(route, rng),
        rng.uniform(0.02, 0.035),
        rng.uniform(0.42, 0.47),
        rng.geometric(1 / 5.6),
    )
    obs, _ = env.reset()
    drift, seen, taken = np.zeros(2), [], []
    while obs[1] < stop and len(taken) < 150:
        y = min(obs[1] + ahead, 0.52)
        push = np.array([path(y), y]) - obs[:2]
        drift += -0.15 * drift + 0.08 * rng.standard_normal(2)
        push = push / np.abs(push).max() + drift
        push *= min(1, 1.2 / np.linalg.norm(push))
        push[1] = max(push[1], 0)
        push[np.abs(push) < 0.4] = 0
        action = SPEED * push * (len(taken) >= idle - 1)
        seen, taken = [*seen, obs], [*taken, action]
        obs, *_, info = env.step(action)
    return np.array(seen), np.array(taken), info


def demonstrate(route, rng, env=None):
    """(obs (T, 4), actions (T, 2), tries) of a success on `route` (left to right gap in each row)."""
    env = env or gym.make("Avoiding-v0").unwrapped
    for tries in itertools.count(1):
        obs, actions, info = attempt(env, route, rng)
        if info["mode"] == route[0] * 12 + route[1] * 4 + route[2] and not info["collided"]:
            return obs, actions, tries


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.output.suffix != ".npz" or not args.output.resolve().parent.is_dir() or args.per_mode < 1:
        print(f"avoiding_demonstrator.py: error: --output {args.output}, --per-mode {args.per_mode}: "
              "give FILE.npz in an existing folder, and at least 1", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    rng, env, demos = np.random.default_rng(args.seed), gym.make("Avoiding-v0").unwrapped, []
    for route in itertools.product(range(2), range(3), range(4)):
        demos += [demonstrate(route, rng, env) for _ in range(args.per_mode)]
    lengths = np.array([len(actions) for _, actions, _ in demos])
    ends = np.zeros(lengths.sum(), bool)
    ends[np.cumsum(lengths) - 1] = True
    obs, actions = (np.concatenate([demo[i] for demo in demos]) for i in (0, 1))
    temporary = args.output.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, observations=obs, actions=actions, terminals=ends, timeouts=~ends & False)
    temporary.replace(args.output)
    share = len(demos) / sum(tries for *_, tries in demos)
    print(f"{len(demos)} demonstrations of {lengths.mean():.1f} +- {lengths.std():.1f} steps, {share:.2f} of the tries")
