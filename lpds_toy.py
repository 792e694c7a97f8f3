# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco>=3.2,<3.10", "numpy>=1.26", "tyro>=0.9",
#   "tqdm>=4.66", "matplotlib>=3.8", "wandb>=0.18"]
# ///
"""What delta does, in one picture: LP-DS (Lagrangian Perturbation Diffusion Steering) in two small worlds.

A frozen policy a = Phi(w; s) turns noise w into actions. It reaches each of four goals about equally often (MultiGoal),
or takes a robot's rod past six posts on one of 24 routes (Avoiding). Learned is a shift Delta of its noise that raises
Q^W, the value of noise, within a budget delta. A small delta keeps every goal; a large one returns more, on one goal:

    w = eps + Delta_theta(s),  eps ~ N(0, I)        max_theta  E[Q^W(s, w)]   such that   E||Delta_theta(s)||^2 <= delta

    python lpds_toy.py                                    # the whole figure: several deltas and DSRL, three seeds each
    python lpds_toy.py --delta 0.2                        # one run
    python lpds_toy.py --resume runs/FOLDER               # goes on with a run or a sweep

A run folder gets metrics.csv, eval.npz, checkpoint.pt, best.pt and curves.png, a sweep's folder figure.png over all of
its runs. LP-DS itself is perturbation_mlp, Agent, the three update functions, and the loop at the end. What reproduces
of the paper, and where this departs from it and from DSRL: docs/lpds_toy.md.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from entropy import knn_entropy


@dataclass
class Args:
    # LP-DS
    delta: float | None = None
    """budget of E||Delta||^2, noise having variance 1: 0.01 keeps all goals, 1 one or two; one run, not the sweep"""
    methods: tuple[Literal["lpds", "dsrl"], ...] = ("lpds", "dsrl")
    """what the sweep compares; dsrl is baselines/dsrl_toy.py"""
    deltas: tuple[float, ...] = (0.01, 0.05, 0.1, 0.35, 1.0)
    """budgets that the sweep compares"""
    seeds: int = 3
    """runs of each in the sweep, from --seed on"""
    delta_norm: Literal["sum", "mean"] = "sum"
    """||Delta||^2 as a sum over the d noise coordinates (equation 7) or as their mean (a d times larger budget)"""
    trust_region: Literal["average", "state"] = "average"
    """average: E||Delta||^2 <= delta over replayed states, by alpha; state: ||Delta(s)||^2 <= delta in every state"""
    dual: Literal["log", "linear"] = "log"
    """log: relative steps, which hold the constraint at any reward scale; linear: equation 10 as printed"""
    alpha_init: float = 1.0
    """first price of the constraint, in Q per unit of ||Delta||^2, far above the last one: Delta starts slowly"""
    alpha_lr: float = 1e-2
    """step of the dual update: alpha moves by this share where the budget is exceeded by 100 %"""
    lagrangian: bool = True
    """--no-lagrangian fixes alpha at 0 (ablation): nothing but the noise bound then limits Delta"""
    noise_bound: float | Literal["none"] = "none"
    """clip each coordinate of w to +-bound; not needed with the Lagrangian"""
    perturb: Literal["noise", "action"] = "noise"
    """noise: LP-DS; action: LP-DS-A (ablation), which adds Delta to the decoded action and maximises Q^A"""
    # --- shared: toy settings ---
    # World and budget, in primitive environment steps
    env_id: Literal["MultiGoal", "Avoiding"] = "MultiGoal"
    """four goals in the plane, or 24 routes around six posts (MuJoCo)"""
    start_std: float = 0.0
    """MultiGoal: spread of the start around the origin, where all is open; beside it the nearest goal is taken"""
    reward: Literal["sparse", "dppo"] = "sparse"
    """Avoiding: 1 once behind the line, which ends the episode, as a contact or 150 steps do; or DPPO's, 100 steps"""
    decoder: Literal["flow", "diffusion"] = "flow"
    """MultiGoal: kind of the decoder, cloned on first use and then kept in --run-dir"""
    backbone: str = ""
    """another decoder file, of pretrain_backbone.py"""
    total_timesteps: int = 20_000
    """length of the run, prior roll-outs included"""
    num_envs: int = 10
    """environments stepped together"""
    prior_steps: int = 2_000
    """steps of the frozen policy before any training"""
    warmup_steps: int = 3_000
    """steps after those in which only the critics learn, as Delta would follow what they make up at first"""
    seed: int = 1
    """seed of networks and noise; runs on a CPU repeat to the bit"""
    device: str = "cpu"
    """cpu is fastest here; or cuda, cuda:1"""
    # Critics and update ratio
    hidden_size: int = 64
    """width of the policy and of the critics"""
    num_layers: int = 2
    """hidden layers of each"""
    layer_norm: bool = False
    """LayerNorm and tanh, as in the other scripts, instead of ReLU: a sharper and less steady picture"""
    lr: float = 3e-4
    """Adam's learning rate, all networks"""
    batch_size: int = 128
    """action chunks per gradient step"""
    gamma: float = 0.99
    """discount per action chunk"""
    tau: float = 0.005
    """Polyak step of the target critic, once per gradient step"""
    utd: int = 2
    """updates of each network per vector step, that is for num_envs action chunks"""
    reward_scale: float | Literal["auto"] = "auto"
    """factor on rewards inside the critics; auto brings Q to order 1 to 10; reported returns are never scaled"""
    # Evaluation and run folder
    eval_every: int = 1_000
    """steps between evaluations, each with a row of metrics.csv and a checkpoint"""
    eval_episodes: int = 1_000
    """episodes of an evaluation, always with the same noise"""
    track: bool = False
    """log to Weights & Biases too; set WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE as usual"""
    no_progress: bool = False
    """no progress bar"""
    exp_name: str = Path(__file__).stem
    """part of the run folder's name"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """folder of a run or of a sweep to continue, exactly"""


# --- end shared: toy settings ---


# What a world fills in where the user set nothing. Avoiding: the mean, as a sum of 0.3 over d = 8 changes little
PRESETS = {"MultiGoal": {}, "Avoiding": dict(deltas=(0.01, 0.05, 0.3), total_timesteps=50_000, eval_every=5_000)}
PRESETS["Avoiding"] |= dict(delta_norm="mean", prior_steps=5_000, warmup_steps=5_000)
PRESETS["Avoiding"] |= dict(eval_episodes=200, hidden_size=128, layer_norm=True, utd=5)
LOWEST = dict.fromkeys("gamma tau prior_steps warmup_steps start_std seed alpha_init alpha_lr".split(), 0)
BACKBONES = Path(__file__).parent / "backbones"
SWEEP = Path(__file__).parent / "benchmark" / "toy.py"


# --- shared: toy command line ---
# What --resume accepts anew: budget and logging. Anything else would be another experiment under the same name.
FREE = ("total_timesteps", "eval_every", "track", "no_progress", "resume")


def parse_args(argv=None) -> Args:
    """Command line -> Args: flags win over the resumed run or the preset, and those over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    asked = [flag for flag in argv if flag not in ("-h", "--help")]  # help comes below, with the preset's values
    args = tyro.cli(Args, args=asked, description=__doc__)
    base = Args(**PRESETS[args.env_id])
    if args.resume:
        with blame(f"--resume {args.resume}: no run, its args.json cannot be read; give a folder under --run-dir"):
            stored = json.loads(Path(args.resume, "args.json").read_text())
            base = Args(**{key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()})
    args = tyro.cli(Args, args=argv, default=base, description=__doc__)
    for name, value in asdict(args).items():
        flag, was = f"--{name.replace('_', '-')} {value}", getattr(base, name)
        same = not args.resume or value == was or name in FREE and (name != "total_timesteps" or value > was)
        require(same, f"{flag}: {args.resume} has {was}; only {', '.join(FREE)} may change, the budget only upwards")
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                low = LOWEST.get(name, 1 if type(number) is int else 1e-99)
                high = 1 if name in ("gamma", "tau") else 1e99
                require(low <= number <= high, f"{flag}: must lie in [{low:g}, {high:g}]; --help says what is usual")
    quiet = args.prior_steps + args.warmup_steps
    late = f"--total-timesteps {args.total_timesteps}: steering starts only after {quiet} steps; give more"
    require(quiet < args.total_timesteps, f"{late}, or lower --prior-steps or --warmup-steps")
    return args


# --- end shared: toy command line ---
# --- shared: errors ---
def require(condition, message: str) -> None:
    """Unless condition holds, ends the program as argparse does: one sentence on stderr, exit code 2."""
    if not condition:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


@contextmanager
def blame(message: str):
    """Whatever fails inside ends the program with `message` and the reason, in one sentence."""
    try:
        yield
    except Exception as error:
        require(False, f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:160]})")


def read_tensors(path: Path, flag: str) -> dict:
    """A file of plain tensors. It is untrusted: weights_only never runs what a pickle asks for."""
    with blame(f"{flag} {path}: no file of plain tensors, nothing in it was run"):
        return dict(torch.load(path, map_location="cpu", weights_only=True))


# --- end shared: errors ---
# --- shared: worlds ---
class MultiGoalVector(gym.vector.VectorEnv):
    """LP-DS, appendix B: points in [-2, 2]^2 move by half of their action in [-1, 1]^2; four goals, 20 steps.

    The reward of a step is that of the state it starts from: 10 within 0.2 of a goal, less the distance to the nearest.
    All episodes end together; final_info has success, mode (index of the first goal reached, or -1) and path (21, 2).
    """

    GOALS = np.array([[-1, -1], [1, 1], [-1, 1], [1, -1]], np.float32)  # in the order of the panels of figure 10
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int = 1, start_std: float = 0.0):
        self.num_envs, self.start_std = num_envs, start_std
        self.single_observation_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros((self.num_envs, 2), np.float32)
        if self.start_std:
            self.position += self.start_std * self.np_random.standard_normal((self.num_envs, 2), np.float32)
        self.path, self.returns, self.mode = [self.position], np.zeros(self.num_envs), np.full(self.num_envs, -1)
        return self.position, {}

    def step(self, actions):
        distance = np.linalg.norm(self.position[:, None] - self.GOALS, axis=-1)  # (n, 4)
        reward = 10.0 * (distance.min(1) < 0.2) - distance.min(1)
        self.position = np.clip(self.position + 0.5 * np.clip(actions, -1, 1), -2, 2).astype(np.float32)
        self.path, self.returns = [*self.path, self.position], self.returns + reward
        distance = np.linalg.norm(self.position[:, None] - self.GOALS, axis=-1)
        self.mode = np.where((self.mode < 0) & (distance.min(1) < 0.2), distance.argmin(1), self.mode)
        ended = np.full(self.num_envs, len(self.path) > 20)
        info = {"steps": np.ones(self.num_envs, int), "success": self.mode >= 0}
        if ended.all():
            paths, lengths = np.stack(self.path, 1), np.full(self.num_envs, 20)
            info |= {"mode": self.mode, "path": paths, "episode": {"r": self.returns, "l": lengths}}
            info = {"final_info": info, "final_obs": self.position}
            self.reset()
        return self.position, reward, np.zeros(self.num_envs, bool), ended, info


class MultiGoal(gym.Env):
    """One MultiGoalVector environment, for gym.make."""

    def __init__(self, start_std: float = 0.0):
        self.vector = MultiGoalVector(1, start_std)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.vector.reset(seed=seed)[0][0], {}

    def step(self, action):
        obs, reward, _, ended, info = self.vector.step(np.asarray(action)[None])
        final = info.get("final_info", info)
        info = {key: value[0] for key, value in final.items() if key != "episode"}
        return info.get("path", obs)[-1], float(reward[0]), False, bool(ended[0]), info


class Avoiding(gym.Env):
    """D3IL's Avoiding task in the plane: a rod passes six posts without touching any; 2 x 3 x 4 = 24 routes.

    obs (4,): desired xy, and measured xy before the last action was executed (D3IL's lag), in metres. action (2,): by
    how much the desired xy moves, in metres, in 35 ms. The arm is a polar one (turn, reach) whose PD control on a
    filtered target was fitted to motions of D3IL's Panda. reward "dppo", DPPO's: in each of 100 steps -0.1 after a
    contact, else -0.1 outside 0.2 < x < 0.8, else 1 behind y = 0.4. "sparse": 1 once y > 0.35, which ends the episode
    as a contact does, or 150 steps do. info: success (was behind y = 0.35 before any contact), collided, mode (the
    route, 0 to 23, of a success; else -1), path (151, 2) of the rod, repeating the last point.
    """

    POSTS = np.array([[0.5, -0.1, 0.03], [0.425, 0.08, 0.025], [0.575, 0.08, 0.025], [0.35, 0.26, 0.025],
                      [0.5, 0.26, 0.025], [0.65, 0.26, 0.025]])  # x, y, radius  # fmt: skip
    START, ROD, REACH = np.array([0.52492847, -0.27973673]), 0.01, 0.8114
    CONTROL = (("turn", 0.027, 22.509, 1.8696, 1.3105), ("reach", 0.0813, 1068.37, 62.834, 2.3215))  # tau, kp, kd, f
    LEVELS = ((-0.1, [0.5]), (0.08, [0.425, 0.575]), (0.26, [0.35, 0.5, 0.65]))  # y, and x of the posts there

    def __init__(self, reward: Literal["dppo", "sparse"] = "dppo"):
        self.reward, self.horizon = reward, {"dppo": 100, "sparse": 150}[reward]
        self.observation_space = gym.spaces.Box(-2.0, 2.0, (4,), np.float64)
        self.action_space = gym.spaces.Box(-0.02, 0.02, (2,), np.float64)  # people used at most 0.0154
        posts = "".join(f'<geom type="cylinder" pos="{x} {y} 0" size="{r} 0.1"/>' for x, y, r in self.POSTS)
        motors = ""  # together kp (g - q) + kd (f g' - q'), g' = (target - g) / tau: PD on a filtered g
        for direct in (False, True):
            for joint, tau, kp, kd, f in self.CONTROL:
                filtered = f'dyntype="filter" dynprm="{tau}" biastype="affine" biasprm="0 {-kp} {-kd}"'
                gain = kd * f / tau if direct else kp - kd * f / tau
                motors += f'<general joint="{joint}" gainprm="{gain}" {"" if direct else filtered}/>'
        self.model = mujoco.MjModel.from_xml_string(f"""
            <mujoco><option timestep="0.001" gravity="0 0 0" cone="elliptic" impratio="3"/><worldbody>{posts}
              <body><joint name="turn" type="hinge" axis="0 0 1" armature="0.1831"/>
                <inertial pos="0 0 0" mass="0.001" diaginertia="1e-6 1e-6 1e-6"/>
                <body><joint name="reach" type="slide" axis="1 0 0"/>
                  <inertial pos="0 0 0" mass="1" diaginertia="1e-5 1e-5 1e-5"/>
                  <geom type="cylinder" pos="0 0 0.15" size="{self.ROD} 0.15"/></body></body>
            </worldbody><actuator>{motors}</actuator></mujoco>""")
        self.data = mujoco.MjData(self.model)

    def polar(self, xy):  # (2,) -> (angle, reach), no further out than the arm gets
        x = min(xy[0], math.sqrt(max(self.REACH**2 - xy[1] ** 2, 0)))
        return [math.atan2(xy[1], x), math.hypot(x, xy[1])]

    @property
    def position(self):  # (2,) of the rod
        angle, reach = self.data.qpos
        return np.array([reach * math.cos(angle), reach * math.sin(angle)])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos = self.data.act = self.polar(self.START)
        self.desired, self.steps, self.collided, self.success = self.START.copy(), 0, False, False
        self.sides, self.path = [-1, -1, -1], np.tile(self.START, (151, 1))
        return np.concatenate([self.desired, self.START]), {}

    def step(self, action):
        self.desired, before = self.desired + np.asarray(action, np.float64), self.position
        self.data.ctrl = self.polar(self.desired) * 2
        mujoco.mj_step(self.model, self.data, 35)
        self.steps += 1
        self.path[self.steps :] = x, y = self.position
        for i, (level, posts) in enumerate(self.LEVELS):
            if self.sides[i] < 0 and (y >= level if i == 2 else abs(y - level) <= 0.03):
                self.sides[i] = int(np.searchsorted(posts, x))
        self.collided |= self.data.ncon > 0
        crossed = y > 0.35 and not self.collided and not self.success
        self.success |= crossed
        reward = -0.1 if self.collided or not 0.2 < x < 0.8 else float(y > 0.4)
        terminated = self.reward == "sparse" and bool(crossed or self.collided)
        info = {"success": self.success, "collided": self.collided, "mode": self.mode, "path": self.path.copy()}
        obs = np.concatenate([self.desired, before])
        return obs, float(crossed) if self.reward == "sparse" else reward, terminated, self.steps >= self.horizon, info

    @property
    def mode(self):  # route 0..23 of a success, else -1
        left, middle, right = self.sides
        return left * 12 + middle * 4 + right if self.success and min(self.sides) >= 0 else -1


gym.register("MultiGoal-v0", entry_point=MultiGoal, vector_entry_point=MultiGoalVector)
gym.register("Avoiding-v0", entry_point=Avoiding)


# --- end shared: worlds ---
# --- shared: environment ---
class ActionChunk(gym.Wrapper):
    """Takes flat action chunks in [-1, 1] and executes them open loop; returns normalised observations, as DPPO does.

    `normalization` holds obs_min, obs_max (obs_dim,), action_min, action_max (A,). Its reward is the sum over its
    steps. info: steps (executed), success (so far in the episode); at its end also what the environment tells and,
    where that has a success flag, success_end (in the last step) and success_share (of the steps of the episode).
    """

    def __init__(self, env, chunk: int, normalization: dict):
        super().__init__(env)
        self.chunk, self.successes = chunk, []  # step by step
        self.stats = {name: np.asarray(value, np.float64) for name, value in normalization.items()}
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (chunk * env.action_space.shape[0],), np.float32)

    def normalize(self, obs):  # (obs_dim,)
        low, high = self.stats["obs_min"], self.stats["obs_max"]
        return (2 * ((obs - low) / (high - low + 1e-6) - 0.5)).astype(np.float32)

    def reset(self, **kwargs):
        self.successes = []
        obs, info = self.env.reset(**kwargs)
        return self.normalize(obs), info

    def step(self, action):  # (chunk * A,)
        low, high, box = self.stats["action_min"], self.stats["action_max"], self.env.action_space
        total, steps = 0.0, 0
        for a in (np.asarray(action, np.float64).reshape(self.chunk, -1) + 1) / 2 * (high - low) + low:
            obs, reward, terminated, truncated, info = self.env.step(np.clip(a, box.low, box.high, dtype=np.float32))
            total, steps = total + reward, steps + 1
            # Locomotion has no success flag: there, an episode that reaches its time limit without a fall counts
            flag = info.get("success", info.get("is_success"))
            self.successes.append(bool(truncated and not terminated if flag is None else flag))
            if terminated or truncated:  # differs from DSRL: its wrapper steps on after the end and adds the rewards
                break
        if not (terminated or truncated):
            info = {}  # of a single step: it would say nothing about the chunk
        elif flag is not None:
            share = float(np.mean(self.successes))
            info = info | {"success_end": self.successes[-1], "success_share": share}
        info = info | {"steps": steps, "success": any(self.successes)}
        return self.normalize(obs), total, terminated, truncated, info


def make_env(env_id: str, chunk: int, normalization: dict, **kwargs):
    """One environment driven by action chunks; kwargs go to gym.make (render_mode, say)."""
    return ActionChunk(gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **kwargs)), chunk, normalization)


# --- end shared: environment ---
# --- shared: decoder ---
class Decoder(nn.Module):
    """Phi: normalised obs (B, obs_dim) and noise w (B, Ta*A) -> action chunk (B, Ta*A) in [-1, 1]; deterministic.

    DPPO's DiffusionMLP under DPPO's names: [x, time embedding, obs] through a linear layer, pre-activation residual
    blocks and a linear head. It predicts noise (diffusion: DDIM with eta 0) or velocity (flow: Euler steps).
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.dim = config, config["chunk"] * config["action_dim"]  # d = Ta*A
        self.activation = {"relu": torch.relu, "mish": nn.functional.mish}[config["activation"]]
        t, h, sizes = config["time_dim"], config["hidden"][0], [config["obs_dim"], *config["cond_hidden"]]
        self.time_embedding = nn.Sequential(nn.Identity(), nn.Linear(t, 2 * t), nn.Mish(), nn.Linear(2 * t, t))
        cond = [nn.ModuleDict({"linear_1": nn.Linear(m, n)}) for m, n in zip(sizes, sizes[1:])]  # usually none
        blocks = [{"l1": nn.Linear(h, h), "l2": nn.Linear(h, h)} for _ in range((len(config["hidden"]) - 1) // 2)]
        layers = [nn.Linear(self.dim + t + sizes[-1], h), *map(nn.ModuleDict, blocks), nn.Linear(h, self.dim)]
        self.cond_mlp, self.mlp_mean = nn.ModuleDict(), nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.cond_mlp["moduleList"] = nn.ModuleList(cond)

    def embed_time(self, t):  # (B,) in training steps -> (B, time_dim)
        half = self.config["time_dim"] // 2
        angle = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
        return self.time_embedding(torch.cat([angle.sin(), angle.cos()], -1).float())

    def network(self, x, time_emb, obs):  # -> noise or velocity (B, Ta*A)
        for i, layer in enumerate(self.cond_mlp["moduleList"]):
            obs = layer["linear_1"](self.activation(obs) if i else obs)
        first, *blocks, head = self.mlp_mean["layers"]
        h = first(torch.cat([x, time_emb, obs], -1))
        for block in blocks:
            h = h + block["l2"](self.activation(block["l1"](self.activation(h))))
        return head(h)

    @staticmethod
    def alpha_bar(steps: int):  # DPPO's cosine schedule (steps,); its grid ends at steps + 1, which is kept on purpose
        f = np.cos((np.linspace(0, steps + 1, steps + 1) / (steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 0, 0.999))

    def freeze(self):
        """Fixes the weights. Time embeddings and schedule become constants: no index tensors are left in the loop."""
        kind, train, sample = (self.config[key] for key in ("kind", "train_steps", "sample_steps"))
        times = np.arange(sample) * train / sample  # flow: from noise to action
        if kind == "diffusion":
            times = np.arange(sample)[::-1] * (train // sample)  # 16, 12, 8, 4, 0 for 20 / 5: DPPO's spacing
            now = self.alpha_bar(train)[times]
            after = np.append(now[1:], 1.0)  # the last step lands on the clean action
            self.schedule = np.stack([now**0.5, (1 - now) ** 0.5, after**0.5, (1 - after) ** 0.5], 1).tolist()
        first = next(self.requires_grad_(False).parameters())
        self.times = self.embed_time(torch.tensor(times.copy(), dtype=first.dtype, device=first.device))
        return self

    def forward(self, obs, noise):
        x = noise
        for i, time_emb in enumerate(self.times):
            prediction = self.network(x, time_emb.expand(x.shape[0], -1), obs)
            if self.config["kind"] == "flow":
                x = x + prediction / len(self.times)
            else:
                a, b, a_next, b_next = self.schedule[i]
                clean = ((x - b * prediction) / a).clamp(-1, 1)  # DPPO clips the clean action and then
                x = a_next * clean + b_next * (x - a * clean) / b  # takes the noise that goes with what was clipped
        return x.clamp(-1, 1)


# --- end shared: decoder ---
# --- shared: behaviour cloning ---
def bc_loss(decoder: Decoder, obs, chunks, abar):
    """Mean squared error of the noise (diffusion, DDPM) or of the velocity (flow, rectified flow)."""
    noise = torch.randn_like(chunks)
    if decoder.config["kind"] == "diffusion":
        t = torch.randint(len(abar), (len(obs),), device=obs.device)
        a = abar[t][:, None]
        x, target = a.sqrt() * chunks + (1 - a).sqrt() * noise, noise
    else:
        u = torch.rand(len(obs), 1, device=obs.device)  # 0 is noise, 1 is data
        x, target, t = (1 - u) * noise + u * chunks, chunks - noise, u[:, 0] * decoder.config["train_steps"]
    return nn.functional.mse_loss(decoder.network(x, decoder.embed_time(t), obs), target)


# --- end shared: behaviour cloning ---
# --- shared: toy decoder, networks ---
CLONE = dict(samples=1_000_000, noise=0.1, iterations=4_000, batch_size=2_048, lr=1e-3, seed=0)
CLONE |= dict(hidden=[64] * 3, time_dim=16, activation="relu", train_steps=20, sample_steps=5)  # all hashed in its name


def load_decoder(args: Args):
    """(frozen Decoder on the CPU, normalization, card): --backbone, or for MultiGoal cloned and kept in --run-dir."""
    name = f"multigoal-{args.decoder}-{hashlib.sha256(json.dumps(CLONE).encode()).hexdigest()[:8]}.pt"
    default = Path(args.run_dir, name) if args.env_id == "MultiGoal" else BACKBONES / "avoiding-scripted-diffusion.pt"
    path = Path(args.resume, "backbone.pt") if args.resume else Path(args.backbone or default)
    if path == default and args.env_id == "MultiGoal" and not path.is_file():
        clone(path, args.decoder)
    require(path.is_file(), f"--backbone {path}: no such file; LP-DS's backbones/ has one for Avoiding")
    file = read_tensors(path, "--backbone")
    with blame(f"--backbone {path}: not a decoder of pretrain_backbone.py"):
        config, stats = file["config"], {key: np.asarray(v, np.float64) for key, v in file["normalization"].items()}
        decoder = Decoder(config)
        decoder.load_state_dict(file["model"])
        env, found = gym.make(f"{args.env_id}-v0"), [config["obs_dim"], config["action_dim"]]
        sizes = [*env.observation_space.shape, *env.action_space.shape]
        shapes = [list(stats[key].shape) for key in ("obs_min", "obs_max", "action_min", "action_max")]
        finite = all(np.isfinite(value).all() for value in [*stats.values(), *map(np.asarray, file["model"].values())])
    require(sizes == found, f"--backbone {path}: has (obs, action) sizes {found}, {args.env_id} {sizes}; give another")
    fits = shapes == [sizes[:1]] * 2 + [sizes[1:]] * 2
    require(finite and fits, f"--backbone {path}: weights or normalization not finite or of wrong size; make it anew")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return decoder.freeze(), stats, dict(file.get("card", {})) | {"path": str(path), "checksum": checksum}


def clone(path: Path, kind: str) -> None:
    """Behaviour cloning of appendix B's noisy expert, which heads for the nearest goal."""
    torch.manual_seed(CLONE["seed"])
    config = {key: CLONE[key] for key in ("hidden", "time_dim", "activation", "train_steps", "sample_steps")}
    decoder = Decoder(config | dict(kind=kind, obs_dim=2, action_dim=2, chunk=1, cond_hidden=[]))
    obs, goals = torch.rand(CLONE["samples"], 2) * 4 - 2, torch.from_numpy(MultiGoalVector.GOALS)
    expert = (goals[torch.cdist(obs, goals).argmin(1)] - obs).clamp(-1, 1)
    action = (expert + CLONE["noise"] * torch.randn_like(obs)).clamp(-1, 1)
    optimizer = torch.optim.AdamW(decoder.parameters(), CLONE["lr"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLONE["iterations"])
    abar = torch.as_tensor(Decoder.alpha_bar(20)).float()
    for _ in tqdm(range(CLONE["iterations"]), "cloning the decoder", disable=not sys.stderr.isatty()):
        index = torch.randint(CLONE["samples"], (CLONE["batch_size"],))
        loss = bc_loss(decoder, obs[index], action[index], abar)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # The decoder's own coordinates are those of the world
    ones = torch.ones(2, dtype=torch.float64)
    stats = {"obs_min": -ones, "obs_max": ones, "action_min": -ones, "action_max": ones}
    card = {"env_id": "MultiGoal-v0", "data": "noisy expert of LP-DS, appendix B", "recipe": CLONE, "loss": loss.item()}
    file = {"format": 1, "kind": kind, "config": decoder.config, "model": decoder.state_dict(), "card": card}
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, partial(torch.save, file | {"normalization": stats}))


def mlp(n_in: int, n_out: int, args: Args):
    """num_layers x [Linear, ReLU], or with --layer-norm DSRL's [Linear, LayerNorm, Tanh], and a linear head."""
    sizes, layers = [n_in] + [args.hidden_size] * args.num_layers, []
    for m, n in zip(sizes, sizes[1:]):
        layers += [nn.Linear(m, n), nn.LayerNorm(n), nn.Tanh()] if args.layer_norm else [nn.Linear(m, n), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_out))


# --- end shared: toy decoder, networks ---
# --- shared: critics, replay ---
class TwinCritic(nn.ModuleList):
    """Two independent networks for Q^A(s, a) or Q^W(s, w): obs (B, obs_dim), x (B, d) -> (2, B)."""

    def forward(self, obs, x):
        x = torch.cat([obs, x], -1)
        return torch.stack([member(x).squeeze(-1) for member in self])


class Replay:
    """Every transition (chunk) of the run, on the learner's device: sampling asks the host for nothing."""

    def __init__(self, capacity: int, obs_dim: int, d: int, device):
        sizes = {"obs": [obs_dim], "action": [d], "reward": [], "next_obs": [obs_dim], "terminated": []}
        self.data = {name: torch.empty(capacity, *size, device=device) for name, size in sizes.items()}
        self.size, self.size_on_device = 0, torch.zeros((), device=device)

    def add(self, **rows):  # each (n, ...)
        n = len(rows["reward"])
        for name, row in rows.items():
            self.data[name][self.size : self.size + n] = torch.as_tensor(row)
        self.size += n
        self.size_on_device.fill_(self.size)

    def sample(self, n: int) -> dict:
        index = (torch.rand(n, device=self.size_on_device.device) * self.size_on_device).long()
        return {name: column[index] for name, column in self.data.items()}


# --- end shared: critics, replay ---
class RadialSquash(nn.Module):
    """Delta (B, d) -> Delta of the same direction and of a norm below `radius`, nearly unchanged while it is small."""

    def __init__(self, radius: float):
        super().__init__()
        self.radius = radius

    def forward(self, shift):
        norm = (shift.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        return shift * (self.radius / norm * (norm / self.radius).tanh())


def perturbation_mlp(obs_dim: int, d: int, args: Args):
    """Delta_theta: obs (B, obs_dim) -> (B, d), at first 0: the first policy is the frozen one (but for a bound)."""
    network = mlp(obs_dim, d, args)
    for zero in network[-1].parameters():
        nn.init.zeros_(zero)
    # Beyond the paper: an average lets Delta save where it matters little and spend many times delta at the start
    budget = args.delta * (d if args.delta_norm == "mean" else 1)
    return network.append(RadialSquash(budget**0.5)) if args.trust_region == "state" else network


# --- shared: agent and its updates ---
class Agent(nn.Module):
    """The frozen decoder and everything that is learned around it: policy of the noise, critics, alpha."""

    def __init__(self, args: Args, decoder: Decoder):
        super().__init__()
        obs_dim, d, device = decoder.config["obs_dim"], decoder.dim, decoder.times.device
        self.args, self.decoder, self.distills = args, decoder, args.perturb == "noise"  # distills: uses Q^W
        self.noise_bound = math.inf if args.noise_bound == "none" else args.noise_bound
        self.perturbation = perturbation_mlp(obs_dim, d, args).to(device)  # Delta_theta
        stuck = args.lagrangian and args.dual == "log" and args.alpha_init == 0
        require(not stuck, "--alpha-init 0: relative steps never leave 0; give a positive value or --dual linear")
        self.register_buffer("alpha", torch.tensor(args.alpha_init if args.lagrangian else 0.0, device=device))

        twin = lambda: TwinCritic(mlp(obs_dim + d, 1, args) for _ in range(2)).to(device)  # noqa: E731
        self.q_a, self.q_a_target, self.q_w = twin(), twin(), twin()
        self.q_a_target.load_state_dict(self.q_a.state_dict())
        self.q_a_target.requires_grad_(False)
        scale = 1.0 if args.reward_scale == "auto" else args.reward_scale
        self.register_buffer("reward_scale", torch.tensor(scale, device=device))
        adam = partial(torch.optim.Adam, lr=args.lr, fused=True, capturable=device.type == "cuda")
        self.optimizers = {name: adam(getattr(self, name).parameters()) for name in ("q_a", "q_w", "perturbation")}

    def steer(self, obs, noise):  # eps (B, d) -> w = eps + Delta(s) (B, d)
        return (noise + self.perturbation(obs)).clamp(-self.noise_bound, self.noise_bound)

    @torch.no_grad()
    def act(self, obs, noise):
        """The steered policy (equation 4): obs (B, obs_dim), eps (B, d) -> action chunk (B, d)."""
        if self.distills:
            return self.decoder(obs, self.steer(obs, noise))
        return (self.decoder(obs, noise) + self.perturbation(obs)).clamp(-1, 1)

    def status(self, row: dict) -> str:  # a row of metrics.csv -> a few words for the progress bar
        return f"E||Delta||^2/delta {row.get('trust_region/violation', -1) + 1:.2f}, alpha {self.alpha:.3g}"

    def step(self, name: str, loss):
        """One Adam step of the network `name` alone, whatever else the loss went through."""
        parameters = list(getattr(self, name).parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        self.optimizers[name].step()


def update_action_critic(agent: Agent, batch: dict, args: Args) -> dict:
    """Q^A by TD through the decoder (Algorithm 1, lines 8-11), then its target by Polyak averaging (line 20)."""
    with torch.no_grad():
        # The next action is the steered policy's, so what is learned is the value of steering
        next_action = agent.act(batch["next_obs"], torch.randn_like(batch["action"]))
        next_value = agent.q_a_target(batch["next_obs"], next_action).min(0).values  # the more pessimistic twin, (B,)
        target = agent.reward_scale * batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_value
    q = agent.q_a(batch["obs"], batch["action"])  # (2, B)
    loss = 0.5 * (q - target).square().mean(1).sum()
    agent.step("q_a", loss)
    online = [parameter.detach() for parameter in agent.q_a.parameters()]
    torch._foreach_lerp_(list(agent.q_a_target.parameters()), online, args.tau)
    return {"losses/q_a": loss.detach(), "losses/q_a_value": q.detach().mean()}


def update_perturbation(agent: Agent, batch: dict, args: Args) -> dict:
    """Primal step on theta, dual step on alpha (Algorithm 1, lines 16-19; equations 8 and 10)."""
    obs, noise = batch["obs"], torch.randn_like(batch["action"])
    shift = agent.perturbation(obs)  # (B, d)
    if args.perturb == "noise":
        w = (noise + shift).clamp(-agent.noise_bound, agent.noise_bound)
        value = agent.q_w(obs, w).min(0).values  # (B,)
    else:  # LP-DS-A: no latent critic, the gradient comes from Q^A
        value = agent.q_a(obs, (agent.decoder(obs, noise) + shift).clamp(-1, 1)).min(0).values
    sum_norm = shift.square().sum(1).mean()
    sq_norm = sum_norm if args.delta_norm == "sum" else sum_norm / shift.shape[1]
    loss = agent.alpha * (sq_norm - args.delta) - value.mean()
    agent.step("perturbation", loss)

    violation = sq_norm.detach() / args.delta - 1
    if args.lagrangian and args.dual == "log":
        # differs from the paper: equation 10 moves alpha by alpha_lr * (sq_norm - delta), which is far too slow or too
        # fast depending on rewards and delta; a relative step holds the constraint at every scale
        agent.alpha.mul_((args.alpha_lr * violation.clamp(-1, 5)).exp())
    elif args.lagrangian:
        agent.alpha.add_(args.alpha_lr * (sq_norm.detach() - args.delta)).clamp_(min=0)
    info = {"losses/perturbation": loss, "trust_region/alpha": agent.alpha.clone(), "trust_region/sq_norm": sq_norm}
    info |= {"trust_region/violation": violation, "trust_region/delta": torch.tensor(args.delta)}
    if args.perturb == "noise":
        info["trust_region/kl"] = 0.5 * sum_norm  # nats; exact without a bound
        info["trust_region/saturated"] = ((noise + shift).abs() > agent.noise_bound).float().mean()
    return {key: value.detach() for key, value in info.items()}


# --- end shared: agent and its updates ---
# --- shared: distillation ---
def update_latent_critic(agent: Agent, batch: dict, args: Args) -> dict:
    """Q^W by distillation of Q^A over the unshifted prior (LP-DS, lines 12-15): distill_steps steps on slices of batch.

    Decoder and Q^A rest meanwhile, so all slices are decoded and valued at once: same numbers, larger matrices.
    """
    noise = torch.randn_like(batch["action"])
    with torch.no_grad():
        target = agent.q_a(batch["obs"], agent.decoder(batch["obs"], noise))  # (2, B): member to member, online
    n = args.batch_size
    for obs, w, y in zip(batch["obs"].split(n), noise.split(n), target.split(n, dim=1)):
        loss = 0.5 * (agent.q_w(obs, w) - y).square().mean(1).sum()
        agent.step("q_w", loss)
    return {"losses/q_w": loss.detach(), "losses/q_w_value": target.mean()}


@torch.no_grad()
def probe(agent: Agent, obs, seed: int, n: int = 64) -> dict:
    """What steering does at states obs (B, obs_dim), over n draws of noise each: action entropy, quality of Q^W."""
    d, obs = agent.decoder.dim, obs.repeat_interleave(n, 0)
    noise = torch.randn(len(obs), d, device=obs.device, generator=torch.Generator(obs.device).manual_seed(seed))
    frozen, steered = agent.decoder(obs, noise), agent.act(obs, noise)
    entropy, ties = knn_entropy(steered.view(-1, n, d))
    entropy_frozen, _ = knn_entropy(frozen.view(-1, n, d))
    info = {"entropy/action": entropy, "entropy/action_frozen": entropy_frozen, "entropy/ties": ties}
    if agent.distills:
        q_w = agent.q_w(obs, agent.steer(obs, noise)).mean(0).view(-1, n)
        q_a = agent.q_a(obs, steered).mean(0).view(-1, n)
        q_w, q_a = (q - q.mean(1, keepdim=True) for q in (q_w, q_a))  # only differences within a state can steer
        info["losses/q_w_corr"] = ((q_w * q_a).sum(1) / (q_w.norm(dim=1) * q_a.norm(dim=1) + 1e-8)).mean()
    return info


# --- end shared: distillation ---
# --- shared: toy evaluation ---
def env_kwargs(args: Args) -> dict:
    """What gym.make gets besides the name, here and in enjoy.py."""
    return {"start_std": args.start_std} if args.env_id == "MultiGoal" else {"reward": args.reward}


def make_envs(n: int, args: Args, decoder: Decoder, normalization: dict):
    """n environments as one; MultiGoal's step is one of numpy's for all of them."""
    if args.env_id == "MultiGoal":
        return gym.make_vec("MultiGoal-v0", n, "vector_entry_point", **env_kwargs(args))
    make = partial(make_env, f"{args.env_id}-v0", decoder.config["chunk"], normalization, **env_kwargs(args))
    return gym.vector.SyncVectorEnv([make] * n, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def evaluate(policy, envs, seed: int, device) -> dict:
    """One episode in each environment, noise sampled; arrays (n,) of return, success, length, mode; path (n, T, 2).

    Each environment meets the same start and noise whatever the policy and however long the others live.
    """
    if isinstance(envs, list):  # enjoy.py makes them one by one
        same_step = gym.vector.AutoresetMode.SAME_STEP
        envs = gym.vector.SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=same_step)
    generator, n = torch.Generator().manual_seed(seed), envs.num_envs
    obs, _ = envs.reset(seed=seed)
    result, alive = {"return": np.zeros(n), "length": np.zeros(n, int)}, np.ones(n, bool)
    while alive.any():
        noise = torch.randn(n, *envs.single_action_space.shape, generator=generator)
        action = policy(torch.as_tensor(obs, device=device), noise.to(device)).cpu().numpy()
        obs, reward, terminated, truncated, infos = envs.step(action)
        final = infos.get("final_info", {})
        result["return"] += alive * reward
        result["length"] += alive * (infos.get("steps", 0) + final.get("steps", 0))
        ended = alive & (terminated | truncated)
        for key in ("success", "mode", "path") if ended.any() else ():
            result.setdefault(key, np.zeros_like(final[key]))[ended] = final[key][ended]
        alive &= ~ended
    return result


def modes(result: dict, args: Args) -> dict:
    """How the successful episodes are spread over goals or routes."""
    n = {"MultiGoal": 4, "Avoiding": 24}[args.env_id]
    share = np.bincount(result["mode"][result["mode"] >= 0], minlength=n) / max((result["mode"] >= 0).sum(), 1)
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0])) / np.log(n)  # 0: one, 1: all alike
    return {"eval/modes": (share > 0).sum(), "eval/mode_max": share.max(), "eval/mode_entropy": entropy}


# --- end shared: toy evaluation ---
# --- shared: files ---
def save(path: Path, write) -> None:
    """write(temporary file), then rename: a crash, kill -9 or a full disk leaves what was there before whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        require(False, f"--run-dir: cannot write {path} ({error}); earlier files are whole: free space, then --resume")


def write_csv(path: Path, rows: list) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))  # what a row lacks stays empty
    lines = [",".join(f"{row[key]:.9g}" if key in row else "" for key in columns) for row in rows]
    save(path, lambda file: file.write_text("\n".join([",".join(columns), *lines]) + "\n"))


def plot_curves(path: Path, rows: list) -> None:
    wanted = "eval/episodic_return eval/success trust_region/violation /alpha entropy/action losses/q_w_corr".split()
    keys = [key for end in wanted for key in rows[-1] if key.endswith(end) and any(row.get(key) for row in rows)]
    figure = Figure((3.6 * len(keys), 3.5), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        axis.plot(*zip(*[(row["global_step"], row[key]) for row in rows if key in row]))
        axis.set_title(key)
    save(path, lambda file: figure.savefig(file, format="png"))


def save_checkpoint(run: Path, agent, replay, loop: dict, args) -> None:
    """Everything that the next step depends on, in one file of plain tensors."""
    good = all(bool(p.isfinite().all()) for p in agent.parameters())
    require(good, f"--lr {args.lr}: weights not finite; {run} keeps its last good checkpoint")
    state = {"agent": agent.state_dict(), "optimizers": {k: o.state_dict() for k, o in agent.optimizers.items()}}
    state["replay"] = {name: column[: replay.size].clone() for name, column in replay.data.items()}
    cuda, versions = agent.alpha.is_cuda, {p.__name__: str(p.__version__) for p in (torch, gym, np, mujoco)}
    state |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state(agent.alpha.device) if cuda else None}
    state |= {"loop": loop, "args": asdict(args), "script": Path(sys.argv[0]).name, "versions": versions}
    save(run / "checkpoint.pt", partial(torch.save, state))


def load_checkpoint(run: Path, agent, replay) -> dict:
    """Fills agent, optimisers, replay and torch's generators in place; returns the loop's own state."""
    state = read_tensors(run / "checkpoint.pt", "--resume")
    with blame(f"--resume {run / 'checkpoint.pt'}: not a checkpoint of this run"):
        agent.load_state_dict(state["agent"])
        for name, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        replay.add(**state["replay"])
        torch.set_rng_state(state["rng"])
        if agent.alpha.is_cuda:
            torch.cuda.set_rng_state(state["cuda_rng"], agent.alpha.device)
        return state["loop"]


# --- end shared: files ---
if __name__ == "__main__":
    args = parse_args()
    if args.delta is None:  # many runs of this file, as many at once as there are cores, and one figure of all
        require(SWEEP.is_file(), f"--delta: missing, and the sweep needs {SWEEP}; give one of about 0.01 to 1")
        os.execv(sys.executable, [sys.executable, str(SWEEP), *sys.argv[1:]])  # in place, so that Ctrl-C reaches it
    one = f"--seeds {args.seeds}: with --delta there is one run; the sweep takes --deltas {args.delta}"
    require(args.seeds == Args.seeds or args.resume, one)
    args.lagrangian &= args.trust_region == "average"  # a budget in every state leaves nothing to price
    # --- shared: toy loop ---
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small matrices: a second thread rarely pays
    with blame(f"--device {args.device}: not usable; give cpu or cuda"):
        device = torch.zeros(1, device=args.device).device

    # Decoder, environments, networks
    decoder, normalization, card = load_decoder(args)
    torch.manual_seed(args.seed)  # cloning has its own
    decoder = decoder.to(device).freeze()
    envs, eval_envs = (make_envs(n, args, decoder, normalization) for n in (args.num_envs, args.eval_episodes))
    agent = Agent(args, decoder)
    over = 150 * args.num_envs  # the last round may go on for an episode each
    replay = Replay(args.total_timesteps + over, decoder.config["obs_dim"], decoder.dim, device)

    # Run folder: a new one, with a copy of the decoder so that it can be moved, or the one to resume
    loop = {"global_step": 0, "gradient_steps": 0, "rounds": 0, "wall_seconds": 0.0, "rows": [], "evals": []}
    loop |= {"paths": [], "episodes": [], "info": {}}  # the last two since the last row of metrics.csv
    run, before = Path(args.run_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"), -1
    if args.resume:
        run, loop = Path(args.resume), load_checkpoint(Path(args.resume), agent, replay)
        before = loop["global_step"]
    else:
        with blame(f"--run-dir {args.run_dir}: {run.name} cannot be made there"):
            run.mkdir(parents=True)
        save(run / "backbone.pt", partial(shutil.copy, card["path"]))
    save(run / "args.json", lambda file: file.write_text(json.dumps(asdict(args) | {"resume": ""}, indent=1)))
    tracker = None
    if args.track:
        try:
            import wandb

            tracker = wandb.init(name=run.name, id=run.name, resume="allow", config=asdict(args), dir=run)
        except Exception as error:
            print(f"warning: --track: wandb does not start ({error}); training goes on without it", file=sys.stderr)
    print(f"{args.exp_name} on {args.env_id}, {device}, in {run}\nsettings: {asdict(args)}")
    print(f"decoder: {decoder.config['kind']}, d {decoder.dim}, {card['path']}, sha256 {card['checksum']}", flush=True)
    stop = []
    bar = tqdm(initial=loop["global_step"], total=args.total_timesteps, unit="step", disable=args.no_progress or None)
    for number in (signal.SIGINT, signal.SIGTERM):  # a signal lets the current round of episodes finish
        signal.signal(number, lambda number, frame: stop.append(number))
    started, mark = time.time() - loop["wall_seconds"], (before, time.time())
    while True:
        # (0) Between rounds of episodes: log, evaluate, save; at step 0 the frozen decoder. All environments are about
        #     to start an episode, so that a checkpoint needs no state of theirs.
        step, finished = loop["global_step"], loop["global_step"] >= args.total_timesteps
        loop["wall_seconds"] = time.time() - started
        if step > before and (finished or step // args.eval_every > before // args.eval_every):
            result = evaluate(agent.act if step else decoder, eval_envs, 1_000_000, device)
            path = torch.as_tensor(result.pop("path")[:100])
            loop["paths"] = [loop["paths"][0] if loop["paths"] else path, path]  # of the frozen policy, of the latest
            loop["evals"].append({"global_step": step} | {key: torch.as_tensor(v) for key, v in result.items()})
            first = loop["evals"][0]
            row = {"global_step": step, "gradient_steps": loop["gradient_steps"], **loop["info"], **modes(result, args)}
            row |= {"eval/episodic_return": result["return"].mean(), "eval/success": result["success"].mean()}
            row |= {f"eval/frozen_{key}": first[key].double().mean() for key in ("return", "success")}
            if step:
                names = ("charts/episodic_return", "charts/episodic_length", "charts/success")
                row |= dict(zip(names, np.mean(loop["episodes"], 0)))
                row["charts/SPS"] = (step - mark[0]) / (time.time() - mark[1])
                index = torch.randint(replay.size, (64,), generator=torch.Generator().manual_seed(step)).to(device)
                row |= probe(agent, replay.data["obs"][index], step)
                # A batch has too few states for the expectation: a few starts, where most is spent, decide its mean
                seen = replay.data["obs"][: replay.size]
                spent = agent.steer(seen, torch.zeros(len(seen), decoder.dim, device=device)).detach().square().sum(1)
                row |= {"trust_region/start_sq_norm": spent[0], "trust_region/replay_sq_norm": spent.mean()}
            row = {key: float(value) for key, value in row.items()} | {"wall_seconds": loop["wall_seconds"]}
            bad = [key for key, value in row.items() if not math.isfinite(value)]
            require(not bad, f"--lr {args.lr}: {bad} not finite at step {step}; {run} keeps its last good checkpoint")
            loop["rows"].append(row)
            loop["episodes"] = []
            write_csv(run / "metrics.csv", loop["rows"])
            if tracker:
                try:
                    tracker.log(row, step=step)
                except Exception as error:
                    tracker = print(f"warning: --track: wandb fails ({error}); training goes on", file=sys.stderr)
            arrays = {key: np.stack([e[key] for e in loop["evals"]]) for key in first}
            arrays["path"] = np.stack(loop["paths"])
            save(run / "eval.npz", lambda file: np.savez_compressed(file.open("wb"), **arrays))  # noqa: B023
            save_checkpoint(run, agent, replay, loop, args)
            if row["eval/episodic_return"] >= arrays["return"].mean(1).max():
                save(run / "best.pt", partial(shutil.copy, run / "checkpoint.pt"))
            returns = f"return {row['eval/episodic_return']:.1f} (frozen {row['eval/frozen_return']:.1f})"
            spread = f"{row['eval/modes']:.0f} modes, the largest {row['eval/mode_max']:.2f}"
            speed = f"{row.get('charts/SPS', 0):.0f} steps/s"
            bar.write(f"step {step:>6}  {returns}, {spread}, {agent.status(row)}, {speed}")
            mark = step, time.time()
        if finished or stop:
            break

        # One round: every environment plays an episode
        obs, _ = envs.reset(seed=(args.seed * 1_000_000 + loop["rounds"] * args.num_envs) % 2**31)
        alive, before = np.ones(args.num_envs, bool), step
        while alive.any():
            # (1) Act: eps ~ N(0, I), w = eps + Delta(s), a = Phi(w; s)
            noise = torch.randn(args.num_envs, decoder.dim, device=device)
            action = agent.act(torch.as_tensor(obs, device=device), noise).cpu().numpy()

            # (2) Step. Whoever is ready before the others idles along
            next_obs, reward, terminated, truncated, infos = envs.step(action)
            final, real_next_obs, now = infos.get("final_info", {}), next_obs.copy(), alive.copy()
            for i in np.flatnonzero(terminated | truncated):
                real_next_obs[i] = infos["final_obs"][i]
                ended = final["episode"]["r"][i], final["episode"]["l"][i], final["success"][i]
                loop["episodes"] += [[float(value) for value in ended]] if alive[i] else []
                alive[i] = False
            loop["global_step"] += int(np.sum(now * (infos.get("steps", 0) + final.get("steps", 0))))

            # (3) Store. differs from DSRL: only terminated stops the bootstrap, a time limit does not
            columns = dict(obs=obs, action=action, reward=reward, next_obs=real_next_obs, terminated=terminated)
            replay.add(**{name: torch.as_tensor(column[now]) for name, column in columns.items()})
            obs, trained = next_obs, loop["global_step"] - args.prior_steps

            # (4) Train: utd x [Q^A, policy, alpha], then utd x Q^W, in DSRL's order
            if trained < 0:
                continue
            if not loop["gradient_steps"] and args.reward_scale == "auto":
                # differs from DSRL: brings Q to order 1 to 10, where Q^W follows; the mean reward for ever is worth 15
                agent.reward_scale.fill_(15 * (1 - args.gamma) / replay.data["reward"][: replay.size].abs().mean())
                known = "--reward-scale auto: no reward yet, or --gamma is 1; raise --prior-steps or give a number"
                require(0 < agent.reward_scale < math.inf, known)
            for _ in range(args.utd):
                batch = replay.sample(args.batch_size)
                loop["info"] |= update_action_critic(agent, batch, args)
                if trained >= args.warmup_steps:
                    # --- end shared: toy loop ---
                    loop["info"] |= update_perturbation(agent, batch, args)
            # --- shared: toy end ---
            if agent.distills:
                loop["info"] |= update_latent_critic(agent, replay.sample(args.batch_size * args.utd), args)
            loop["gradient_steps"] += args.utd
        loop["rounds"] += 1
        bar.update(loop["global_step"] - bar.n)

    bar.close()
    if stop:
        save_checkpoint(run, agent, replay, loop, args)
        again = shlex.join([sys.argv[0], "--resume", str(run)])
        print(f"stopped at step {step} and saved; go on with: python {again}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    plot_curves(run / "curves.png", loop["rows"])
    print(f"finished: {run / 'curves.png'}")
# --- end shared: toy end ---
