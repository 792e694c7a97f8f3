"""Scripted demonstrations of LIBERO-90's task 57, of mixed quality: three in five succeed.

    python backbones/libero57_demonstrator.py --output demonstrations.npz

Waypoints (above the cream cheese, at it, above the tray, in it) are approached with what people
have of speed, detours, pauses and tremor. Their errors at grasp and release are of two kinds: one
changes smoothly with the initial pose, the other is drawn anew for every episode; their size is
drawn too. The script knows where things are, its demonstrations show pictures instead. Needs
what lpds_libero_pi0.py needs; libero57_tiny_pi0.py clones the result.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lpds_libero_pi0 import CAMERAS, LiberoTask  # noqa: E402

DOWN = np.diag([1.0, -1.0, -1.0])  # the gripper's rotation when it points at the table
# Size of the errors in metres: of the smooth kind, of the drawn kind
GRASP_ERROR, DROP_ERROR = (0.022, 0.012), (0.050, 0.030)
WAVES = np.array([[90, 40], [35, -80], [120, 60], [50, 90], [20, 110]])  # of the smooth kind, per m


@dataclass
class Args:
    output: Path
    """FILE.npz to write, as libero57_tiny_pi0.py --data reads it"""
    episodes: int = 60
    """one from each of the benchmark's 50 initial states, then again from the first"""
    seed: int = 2
    """of the errors; an episode has a seed of its own, made of this and its number"""


def turn(angle: float):  # a rotation about the vertical axis
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


class Hand:
    """Moves towards a target, fast or slow, with an unsteadiness that fades slowly (AR(1))."""

    def __init__(self, obs: dict, rng):
        from robosuite.utils import transform_utils

        self.transform, self.rng, self.tremor = transform_utils, rng, np.zeros(6)
        self.integral, self.target = np.zeros(3), None
        self.see(obs)
        self.speed, self.gain = rng.uniform(0.6, 1.0), rng.uniform(1.0, 1.6)
        shake = rng.uniform(0.05, 0.16), rng.uniform(0.01, 0.05)
        self.shake = np.repeat(shake, 3)

    def see(self, obs: dict) -> None:
        self.obs, self.position = obs, obs["robot0_eef_pos"].copy()
        self.rotation = self.transform.quat2mat(obs["robot0_eef_quat"])
        self.yaw = np.arctan2(self.rotation[1, 0], self.rotation[0, 0])

    def act(self, target, yaw: float, grip: int, speed=1.0, steadiness=1.0):
        """One move (7,): position and rotation as fractions of 5 cm and 0.5 rad, gripper +-1."""
        error = target - self.position
        if self.target is None or np.linalg.norm(target - self.target) > 0.03:
            self.integral[:] = 0
            self.target = target.copy()
        if np.linalg.norm(error) < 0.05:
            self.integral = np.clip(self.integral + 0.12 * error, -0.02, 0.02)
        fastest = min(1.0, speed * self.speed)
        shift = self.gain * (error + self.integral) / 0.05
        shift *= min(1, fastest / np.abs(shift).max())

        angle = self.yaw + np.clip((yaw - self.yaw + np.pi) % (2 * np.pi) - np.pi, -0.6, 0.6)
        wanted = self.transform.mat2quat(turn(angle) @ DOWN @ self.rotation.T)
        spin = self.transform.quat2axisangle(wanted) * 0.8 / 0.5
        spin *= min(1, 0.6 * fastest / max(np.abs(spin).max(), 1e-12))
        fresh = np.sqrt(1 - 0.85**2) * self.rng.normal(0, 1, 6) * self.shake
        self.tremor = 0.85 * self.tremor + fresh
        moved = np.clip(np.r_[shift, spin] + steadiness * self.tremor, -1, 1)
        return np.r_[moved, grip]

    def go(self, target, yaw, grip, near=0.01, speed=1.0, steps=60, drop=9.0, steadiness=1.0):
        """Until it is near, at most so many steps; sinks no faster than `drop` metres a step."""
        for _ in range(steps):
            goal = target() if callable(target) else target
            if np.linalg.norm(goal - self.position) < near:
                return
            goal = np.r_[goal[:2], max(goal[2], self.position[2] - drop)]
            obs = yield self.act(goal, yaw, grip, speed, steadiness)
            self.see(obs)

    def hold(self, grip, steps, yaw, position=None):
        position = self.position.copy() if position is None else position
        for _ in range(steps):
            obs = yield self.act(position, yaw, grip, 1.0, 0.5)
            self.see(obs)


def plan(hand: Hand, rng, quality: float):
    """Yields moves, is sent observations; `quality` is the size of the errors."""
    cheese, tray = (hand.obs[f"{name}_1_pos"] for name in ("cream_cheese", "wooden_tray"))
    smooth = np.sin(WAVES @ cheese[:2] + np.array([0.3, 1.7, 4.0, 5.1, 2.2]))
    drawn = rng.normal(0, 1, 5)
    grasp = quality * (GRASP_ERROR[0] * smooth[:3] + GRASP_ERROR[1] * drawn[:3])
    drop = quality * (DROP_ERROR[0] * smooth[3:] + DROP_ERROR[1] * drawn[3:])
    for _ in range(3):
        yaw, height = rng.normal(0, 0.15), rng.normal(0, 0.003)
        # A few millimetres above its centre, else the fingers press on the table and jam
        offset = np.array([grasp[0] * 1.3, grasp[1], height + max(0, grasp[2])])
        yield from approach(hand, rng, yaw, offset)
        top = hand.obs["wooden_tray_1_pos"][2] + rng.uniform(0.14, 0.22)
        low = hand.target[2]
        yield from hand.go(np.r_[hand.position[:2], top], yaw, 1, near=0.03, steps=35)
        if hand.obs["cream_cheese_1_pos"][2] > low + 0.04:
            break
        if rng.random() > 0.35:
            return  # gives up
        grasp = grasp * rng.uniform(0.2, 0.9)
        yield from hand.go(hand.position + np.r_[0, 0, 0.03], yaw, -1, steps=8)
    else:
        return
    yield from release(hand, rng, yaw, drop, top)


def approach(hand: Hand, rng, yaw: float, offset):
    """To above the cheese, by one of three ways, down, and closes the gripper."""

    def goal():
        return hand.obs["cream_cheese_1_pos"] + offset

    above = goal() + np.r_[0, 0, 0.10 + rng.uniform(-0.03, 0.04)]
    way = rng.choice(3, p=[0.4, 0.3, 0.3])
    if way:
        ahead = above - hand.position
        aside = np.array([-ahead[1], ahead[0], 0]) / (np.linalg.norm(ahead[:2]) + 1e-6)
        middle = hand.position + rng.uniform(0.35, 0.65) * ahead
        middle += (1 if way == 1 else -1) * rng.uniform(0.03, 0.07) * aside
        middle[2] = max(middle[2], 0.55)
        yield from hand.go(middle, yaw, -1, near=0.035, steps=30)
    yield from hand.go(above, yaw, -1, near=0.02)
    if rng.random() < 0.25:
        yield from hand.hold(-1, rng.integers(2, 8), yaw)
    there = goal().copy()
    slow = dict(near=0.008, speed=0.8, steps=40, drop=0.04, steadiness=0.6)
    yield from hand.go(there, yaw, -1, **slow)
    yield from hand.hold(1, rng.integers(5, 11), yaw, there)


def release(hand: Hand, rng, yaw: float, error, top: float):
    """To above the tray, down, opens the gripper, and up."""

    def over(height):
        held = (hand.position - hand.obs["cream_cheese_1_pos"])[:2] * 0.8
        off = np.array([0.008, -0.005]) + np.array([1.3 * error[0], error[1]])
        return np.r_[hand.obs["wooden_tray_1_pos"][:2] + off + held, height]

    if rng.random() < 0.5:
        aside = np.r_[rng.choice([-1, 1]) * rng.uniform(0.02, 0.07), 0, rng.uniform(0, 0.04)]
        yield from hand.go((hand.position + over(top)) / 2 + aside, yaw, 1, near=0.05, steps=40)
    yield from hand.go(over(top), yaw, 1, near=0.02, steps=70)
    low = hand.obs["wooden_tray_1_pos"][2] + rng.uniform(0.06, 0.10)
    yield from hand.go(over(low), yaw, 1, near=0.02, steps=25)
    yield from hand.hold(-1, 6, yaw)
    yield from hand.go(hand.position + np.r_[0, 0, 0.12], yaw, -1, steps=16)


def demonstrate(task: LiberoTask, start: int, seed: int) -> dict:
    """One episode; pictures (2, T/2, 64, 64, 3) of every second step."""
    rng = np.random.default_rng(seed)
    quality = rng.choice([0.3, 1.0, 1.5], p=[0.3, 0.45, 0.25])
    task.scene.reset()
    obs = task.scene.set_init_state(task.starts[start])
    for _ in range(10):
        obs, *_ = task.scene.step([0, 0, 0, 0, 0, 0, -1])
    hand = Hand(obs, rng)
    moves = plan(hand, rng, quality)
    move, over = next(moves), None
    states, actions, pictures, success = [], [], [], None
    tail = rng.integers(6, 13)
    while len(actions) < 300:
        t = len(actions)
        if t % 2 == 0:
            pictures.append([task.picture(camera, 64)[:, ::-1] for camera in CAMERAS])
        states.append(task.state(obs))
        actions.append(move)
        obs, reward, *_ = task.scene.step(move)
        success = t if success is None and reward > 0 else success
        if success is not None and t - success >= tail:
            break
        try:
            move = moves.send(obs)
        except StopIteration:  # it rests where it is for ten steps
            over = over or (t, hand.position.copy(), hand.yaw, move[6])
            if t - over[0] >= 10:
                break
            hand.see(obs)
            move = hand.act(*over[1:])
    episode = {"state": states, "action": actions, "success": [success is not None]}
    return episode | {"agentview": [a for a, _ in pictures], "wrist": [b for _, b in pictures]}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    task = LiberoTask("libero_90-57")
    episodes = []
    for i in range(args.episodes):
        episodes.append(demonstrate(task, i % 50, args.seed * 100_000 + i))
        success = np.mean([episode["success"] for episode in episodes])
        print(f"{i + 1} demonstrations, {success:.0%} succeed", flush=True)
    arrays = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    lengths = np.array([len(episode["action"]) for episode in episodes])
    starts = np.r_[0, lengths.cumsum()[:-1]]
    arrays["frame_step"] = np.concatenate([s + np.arange(0, n, 2) for s, n in zip(starts, lengths)])
    for key in ("state", "action"):
        arrays[key] = arrays[key].astype(np.float32)
    np.savez_compressed(args.output, length=lengths, **arrays)
