# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco>=3.2,<3.10", "numpy>=1.26", "tyro>=0.9",
#   "tqdm>=4.66", "matplotlib>=3.8", "wandb>=0.18"]
# ///
"""LP-DS (Lagrangian Perturbation Diffusion Steering) on Gym locomotion: Hopper, Walker2d, HalfCheetah.

A generative policy a = Phi(w; s), cloned from mediocre data, stays frozen. Learned is a shift of its input noise for
every state, paid from a budget delta that keeps it close to the prior; Q^A values action chunks (TD through the
decoder), Q^W values noise (distilled from Q^A), and alpha prices the constraint:

    w = eps + Delta_theta(s),  eps ~ N(0, I)        max_theta  E[Q^W(s, w)]   such that   E||Delta_theta(s)||^2 <= delta

    python lpds_continuous.py --env-id Walker2d-v4 --delta 0.35
    python lpds_continuous.py --resume runs/RUN_FOLDER
    python enjoy.py runs/RUN_FOLDER --video walk.mp4

The run folder gets metrics.csv, eval.npz, checkpoint.pt, best.pt and curves.png. What to expect, and where this departs
from the paper and from DSRL: docs/lpds_continuous.md. To fork it, copy this file and entropy.py.
"""

import difflib
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
    env_id: str = "Walker2d-v4"
    """Hopper, Walker2d or HalfCheetah, -v4 or -v5; with --backbone any MuJoCo environment of Gymnasium"""
    preset: Literal["default", "paper"] = "default"
    """default learns within an hour on a small machine; paper is the printed configuration, meant for a GPU"""
    delta: float = 0.35
    """budget of E||Delta||^2: small keeps the frozen policy's variety, large specialises; usually 0.1 to 1"""
    delta_norm: Literal["sum", "mean"] = "mean"
    """||Delta||^2 as a sum over the d noise coordinates (equation 7) or as their mean (a d times larger budget)"""
    dual: Literal["log", "linear"] = "log"
    """log: relative steps, which hold the constraint at any reward scale; linear: equation 10 as printed"""
    alpha_init: float = 1.0
    """first price of the constraint, in Q per unit of ||Delta||^2"""
    alpha_lr: float = 1e-2
    """step of the dual update"""
    lagrangian: bool = True
    """--no-lagrangian fixes alpha at 0 (ablation): nothing but the noise bound then limits Delta"""
    noise_bound: float | Literal["none"] = "none"
    """clip each coordinate of w to +-bound; not needed with the Lagrangian, and 1.5 by itself alters the prior"""
    perturb: Literal["noise", "action"] = "noise"
    """noise: LP-DS; action: LP-DS-A (ablation), which adds Delta to the decoded action and maximises Q^A"""
    # --- shared: settings ---
    # Critics and update ratio
    hidden_size: int = 256
    """width of the policy and of the critics"""
    num_layers: int = 3
    """hidden layers of each"""
    lr: float = 3e-4
    """Adam's learning rate, all networks"""
    batch_size: int = 256
    """action chunks per gradient step"""
    gamma: float = 0.99
    """discount per action chunk (DSRL's convention), not per primitive step"""
    tau: float = 0.005
    """Polyak step of the target critic, once per gradient step"""
    train_freq: int = 2
    """vector steps (num_envs chunks each) between train calls"""
    utd: int = 20
    """updates of Q^A, policy and alpha per train call"""
    distill_steps: int = 10
    """updates of Q^W per train call"""
    reward_scale: float | Literal["auto"] = "auto"
    """factor on rewards inside the critics; auto brings Q to order 1 to 10; reported returns are never scaled"""
    # Environment and budget, in primitive environment steps
    backbone: str = ""
    """decoder file, ours or an unmodified DPPO / DSRL state_*.pt; empty: the one in backbones/ for this environment"""
    normalization: str = ""
    """normalization.npz of a DPPO / DSRL checkpoint; our decoders carry theirs"""
    activation: Literal["relu", "mish"] = "relu"
    """activation of a DPPO / DSRL checkpoint: relu on Gym, mish on robomimic; the file does not say"""
    total_timesteps: int = 100_000
    """length of the run, prior roll-outs included"""
    num_envs: int = 4
    """environments stepped together"""
    prior_steps: int = 8_000
    """steps of the unsteered policy before any training"""
    warmup_steps: int = 8_000
    """steps after those in which only the critics learn, as the policy would follow what they make up at first"""
    seed: int = 1
    """seed of networks, noise and environments; runs on a CPU repeat to the bit"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    # Evaluation and logging
    eval_every: int = 10_000
    """steps between evaluations, each followed by a checkpoint"""
    eval_episodes: int = 20
    """episodes of an evaluation, always on the same seeds"""
    log_every: int = 2_000
    """steps between rows of metrics.csv"""
    track: bool = False
    """log to Weights & Biases too; set WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE as usual"""
    no_progress: bool = False
    """no progress bar"""
    # Run folder
    exp_name: str = Path(__file__).stem
    """part of the run folder's name"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """run folder to continue from its checkpoint, exactly"""


# --- end shared: settings ---


# What a preset fills in where the user set nothing. `paper`: deltas of table 2 of LP-DS; widths, raw rewards and prior
# roll-outs of DSRL's released configuration, which LP-DS inherits (A.1). `default` is ours, for every device.
HALF = dict(utd=10, distill_steps=5)  # of DSRL's updates: nearly the same return per step, in half the time
PAPER = dict(reward_scale=1.0, prior_steps=32_016, warmup_steps=0, total_timesteps=1_000_000)
PAPER |= dict(eval_every=64_000, eval_episodes=200)
PAPER |= dict(delta_norm="sum", dual="linear")  # what equations 7 and 10 say
# Walker2d: a sum, because the 24 times larger budget of the mean gains no more there, with deep dips on the way
OURS = {"Hopper": dict(delta=0.5, hidden_size=128), "Walker2d": dict(delta_norm="sum", **HALF), "HalfCheetah": HALF}
PRINTED = {"Hopper": dict(delta=0.5, hidden_size=128), "Walker2d": dict(hidden_size=2048)}
PRINTED |= {"HalfCheetah": dict(hidden_size=1024)}
LOWEST = dict.fromkeys("gamma tau prior_steps warmup_steps distill_steps seed".split(), 0)  # others: above 0
LOWEST |= dict(alpha_init=0, alpha_lr=0)
BACKBONES = Path(__file__).parent / "backbones"
KNOWN_ENVS = [f"{name}-v{version}" for name in PRINTED for version in (4, 5)]


# --- shared: command line ---
PRESETS = {"default": OURS, "paper": {name: PAPER | values for name, values in PRINTED.items()}}
# What --resume accepts anew: budget and logging. Anything else would be another experiment under the same name.
FREE = ("total_timesteps", "eval_every", "log_every", "track", "no_progress", "resume")


def parse_args(argv=None) -> Args:
    """Command line -> Args: flags win over the resumed run or the preset, and those over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    asked = [flag for flag in argv if flag not in ("-h", "--help")]  # help comes below, with the preset's values
    args = tyro.cli(Args, args=asked, description=__doc__)
    name = args.env_id.rsplit("-v", 1)[0]
    unknown = f"--preset {args.preset}: has no settings for {args.env_id}; leave it out"
    require(args.preset == "default" or name in PRESETS[args.preset], unknown)
    base = Args(**PRESETS[args.preset].get(name, {}))
    if args.resume:
        with blame(f"--resume {args.resume}: no run, its args.json cannot be read; give a folder under --run-dir"):
            base = Args(**json.loads(Path(args.resume, "args.json").read_text()))
    args = tyro.cli(Args, args=argv, default=base, description=__doc__)
    for name, value in asdict(args).items():
        flag, was = f"--{name.replace('_', '-')} {value}", getattr(base, name)
        same = not args.resume or value == was or name in FREE and (name != "total_timesteps" or value > was)
        require(same, f"{flag}: {args.resume} has {was}; only {', '.join(FREE)} may change, the budget only upwards")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = LOWEST.get(name, 1 if type(value) is int else 1e-99), 1 if name in ("gamma", "tau") else 1e99
            require(low <= value <= high, f"{flag}: must lie in [{low:g}, {high:g}]; --help says what is usual")
    quiet = args.prior_steps + args.warmup_steps
    late = f"--total-timesteps {args.total_timesteps}: steering starts only after {quiet} steps; give more"
    require(quiet < args.total_timesteps, f"{late}, or lower --prior-steps or --warmup-steps")
    close = difflib.get_close_matches(args.env_id, [*KNOWN_ENVS, *gym.registry], 1, 0)[0]
    known = f"unknown, did you mean {close}? This script knows {', '.join(KNOWN_ENVS)}"
    require(args.env_id in gym.registry, f"--env-id {args.env_id}: {known}")
    return args


# --- end shared: command line ---
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
# --- shared: environment state ---
def env_state(env, state: dict | None = None) -> dict:
    """All that the next step depends on: physics and warm start, counters, generator; puts `state` back if given."""
    mj, spec = env.unwrapped, mujoco.mjtState.mjSTATE_INTEGRATION
    counters = ("successes", "_elapsed_steps", "episode_returns", "episode_lengths")
    # Some environments draw a task at reset by moving parts of the model
    moved = {name: getattr(mj.model, name) for name in ("body_pos", "body_quat", "site_pos")}
    if state:
        for name, array in moved.items():
            array[:] = state[name].numpy()
        vars(mj).update(state["numbers"])
        for _ in range(2):  # forward fills in the body positions that rewards read, but spoils the warm start
            mujoco.mj_forward(mj.model, mj.data)
            mujoco.mj_setState(mj.model, mj.data, state["physics"].numpy(), spec)
        mj.np_random.bit_generator.state = json.loads(state["generator"])
        for name in counters:
            env.set_wrapper_attr(name, state[name])
    physics = np.empty(mujoco.mj_stateSize(mj.model, spec))
    mujoco.mj_getState(mj.model, mj.data, physics, spec)
    now = {name: np.asarray(env.get_wrapper_attr(name)).tolist() for name in counters}
    now |= {name: torch.from_numpy(array.copy()) for name, array in moved.items()}
    now |= {"numbers": {name: float(value) for name, value in vars(mj).items() if isinstance(value, float)}}
    return {"physics": torch.from_numpy(physics), "generator": json.dumps(mj.np_random.bit_generator.state), **now}


# --- end shared: environment state ---
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
def load_decoder(args: Args):
    """(frozen Decoder on the CPU, normalization, card): the run's own, that of --backbone, or the committed one."""
    name = args.env_id.rsplit("-v", 1)[0].lower()
    kind = "diffusion" if name == "hopper" else "flow"  # whichever clones its data better; docs/pretrain_backbone.md
    committed = BACKBONES / f"{name}-v4-medium-{kind}.pt"
    return read_decoder(Path(args.resume, "backbone.pt") if args.resume else Path(args.backbone or committed), args)


# --- shared: decoder file ---
def read_decoder(path: Path, args: Args):
    """A file of ours or DPPO's -> (frozen Decoder on the CPU, normalization, card); refuses what does not fit."""
    advice = "LP-DS's backbones/ has decoders, its pretrain_backbone.py makes them"
    require(path.is_file(), f"--backbone {path}: no such file; {advice}")
    file, where = read_tensors(path, "--backbone"), f"--normalization {args.normalization or path}"
    plain = args.resume or "format" not in file or (args.normalization, args.activation) == ("", "relu")
    require(plain, f"--backbone {path}: has its own normalization and activation; leave out those flags")
    with blame(f"{where}: {path} needs the normalization.npz that belongs to it"):
        stats = file["normalization"] if "format" in file else np.load(args.normalization, allow_pickle=False)
        keys = [f"{x}_{end}" for x in ("obs", "action") for end in ("min", "max")]
        stats = {key: np.asarray(stats[key]).astype(np.float64, casting="same_kind") for key in keys}
    with blame(f"--backbone {path}: neither our decoder format nor DPPO's; {advice}"):
        file = file if "format" in file else from_dppo(file, len(stats["action_min"]), args)
        config, weights, card = file["config"], file["model"], dict(file.get("card", {}))
        most = {"diffusion": config["train_steps"], "flow": 1000}[config["kind"]]
        if config["sample_steps"] not in range(1, most + 1):
            raise ValueError(f"sample_steps {config['sample_steps']}, not in 1 to {most}")
        decoder = Decoder(config)
        decoder.load_state_dict(weights)
        decoder.freeze()
    require(all(w.isfinite().all() for w in weights.values()), f"--backbone {path}: weights not finite; give another")
    with blame(f"--env-id {args.env_id}: Gymnasium cannot make it"):  # -v2 and -v3 are registered, but have moved out
        env = gym.make(args.env_id)
    env.close()
    for x, shape in (("obs", env.observation_space.shape), ("action", env.action_space.shape)):
        size, low, high = config[f"{x}_dim"], stats[f"{x}_min"], stats[f"{x}_max"]
        fits = f"{size} {x} coordinates, {args.env_id} has {shape}; give one that fits"
        require((size,) == shape, f"--backbone {path}: {fits}")
        valid = low.shape == high.shape == shape and np.isfinite([low, high]).all() and (low <= high).all()
        require(valid, f"{where}: {x}_min and {x}_max must be finite, ordered and of shape {shape}")
    return decoder, stats, card | {"path": str(path), "checksum": hashlib.sha256(path.read_bytes()).hexdigest()[:12]}


def from_dppo(file: dict, action_dim: int, args: Args) -> dict:
    """DPPO's checkpoint in our format. Sizes are read off the shapes; activation and schedule are not in it."""
    weights = file["ema"] if "ema" in file else file["model"]
    weights = {key.removeprefix("network."): w for key, w in weights.items() if key.startswith("network.")}
    size = {key.removesuffix(".bias"): len(w) for key, w in weights.items() if key.endswith("bias")}
    cond = [n for key, n in size.items() if key.startswith("cond_mlp")]
    last = max(int(key.split(".")[2]) for key in size if key.startswith("mlp_mean.layers"))
    d, time_dim, width = (size[key] for key in (f"mlp_mean.layers.{last}", "time_embedding.3", "mlp_mean.layers.0"))
    inputs = weights["cond_mlp.moduleList.0.linear_1.weight" if cond else "mlp_mean.layers.0.weight"].shape[1]
    config = dict(kind="diffusion", obs_dim=inputs if cond else inputs - d - time_dim, action_dim=action_dim)
    config |= dict(chunk=d // action_dim, cond_hidden=cond, hidden=[width] * (2 * last - 1), time_dim=time_dim)
    config |= dict(activation=args.activation, train_steps=20, sample_steps=5)  # steps: DPPO and DSRL on Gym
    return {"config": config, "model": weights, "card": {}}


# --- end shared: decoder file ---
# --- shared: networks ---
def mlp(n_in: int, n_out: int, args: Args):
    """[Linear, LayerNorm, Tanh] x num_layers and a linear head, as DSRL's actor and critics."""
    sizes = [n_in] + [args.hidden_size] * args.num_layers
    trunk = [layer for m, n in zip(sizes, sizes[1:]) for layer in (nn.Linear(m, n), nn.LayerNorm(n), nn.Tanh())]
    return nn.Sequential(*trunk, nn.Linear(sizes[-1], n_out))


# --- end shared: networks ---
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
# --- shared: perturbation ---
def perturbation_mlp(obs_dim: int, d: int, args: Args):
    """Delta_theta: obs (B, obs_dim) -> (B, d), at first 0: the first policy is the frozen one (but for a bound)."""
    network = mlp(obs_dim, d, args)
    for zero in network[-1].parameters():
        nn.init.zeros_(zero)
    return network


# --- end shared: perturbation ---
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
# --- shared: evaluation ---
def evaluate(policy, envs: list, seed: int, device) -> dict:
    """One episode in each of `envs`, noise sampled; arrays (len(envs),) of return, success and length.

    Episode i starts from seed + i and meets the same noise whatever the policy and however long the others live.
    """
    generator, n = torch.Generator().manual_seed(seed), len(envs)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    result = {"return": np.zeros(n), "success": np.zeros(n, bool), "length": np.zeros(n, int)}
    alive = np.arange(n)
    while len(alive):
        noise = torch.randn(n, *envs[0].action_space.shape, generator=generator)[alive]
        action = policy(torch.as_tensor(obs[alive], device=device), noise.to(device)).cpu().numpy()
        for i, a in zip(list(alive), action):
            obs[i], reward, terminated, truncated, info = envs[i].step(a)
            result["return"][i] += reward
            result["length"][i] += info["steps"]
            for key in (key for key in info if key.startswith("success")):
                result.setdefault(key, np.zeros(n))[i] = info[key]
            if terminated or truncated:
                alive = alive[alive != i]
    return result


# --- end shared: evaluation ---
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
# --- shared: run folder ---
if __name__ == "__main__":
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small matrices: a second thread rarely pays
    with blame(f"--device {args.device}: not usable; give auto, cpu or cuda"):
        device = torch.device({"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(args.device, args.device))
        torch.zeros(1, device=device)

    # Decoder, environments, networks
    decoder, normalization, card = load_decoder(args)
    decoder = decoder.to(device).freeze()
    make = partial(make_env, args.env_id, decoder.config["chunk"], normalization)
    envs = gym.vector.SyncVectorEnv([make] * args.num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    eval_envs = [make() for _ in range(args.eval_episodes)]
    obs, _ = envs.reset(seed=args.seed)
    agent = Agent(args, decoder)
    replay = Replay(args.total_timesteps + args.num_envs, decoder.config["obs_dim"], decoder.dim, device)

    # Run folder: a new one, with a copy of the decoder so that it can be moved, or the one to resume
    loop = {"global_step": 0, "vector_steps": 0, "gradient_steps": 0, "wall_seconds": 0.0, "rows": [], "evals": []}
    loop |= {"episodes": [], "info": {}}  # since the last row of metrics.csv
    run, before = Path(args.run_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"), -1
    if args.resume:
        run, loop = Path(args.resume), load_checkpoint(Path(args.resume), agent, replay)
        obs, before = loop["obs"].numpy(), loop["global_step"]
        for env, state in zip(envs.envs, loop["envs"]):
            env_state(env, state)
    else:
        with blame(f"--run-dir {args.run_dir}: {run.name} cannot be made there"):
            run.mkdir(parents=True)
        copied = {"format": 1, "kind": decoder.config["kind"], "config": decoder.config, "model": decoder.state_dict()}
        copied |= {"card": card, "normalization": {key: torch.as_tensor(value) for key, value in normalization.items()}}
        save(run / "backbone.pt", partial(torch.save, copied))
    save(run / "args.json", lambda file: file.write_text(json.dumps(asdict(args) | {"resume": ""}, indent=1)))
    tracker = None
    if args.track:
        try:
            import wandb

            tracker = wandb.init(name=run.name, id=run.name, resume="allow", config=asdict(args), dir=run)
        except Exception as error:
            print(f"warning: --track: wandb does not start ({error}); training goes on without it", file=sys.stderr)

    size, c = sum(p.numel() for p in decoder.parameters()), decoder.config
    print(f"{args.exp_name} on {args.env_id}, {device}, in {run}\nsettings: {asdict(args)}")
    print(f"decoder: {c['kind']}, {size:,} frozen parameters, Ta {c['chunk']}, d {decoder.dim}, {card['path']}, sha256 "
          f"{card['checksum']}, frozen by its card: return {card.get('frozen_return', math.nan):.0f}, success "
          f"{card.get('frozen_success', math.nan):.2f}")  # fmt: skip
    bar = tqdm(initial=loop["global_step"], total=args.total_timesteps, unit="step", disable=args.no_progress or None)
    stop = []  # signals received: they let the current step finish
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    started, mark = time.time() - loop["wall_seconds"], (before, time.time())
    while True:
        # (0) Log, evaluate, save; at step 0 the frozen decoder, which everything is compared with. Only here are losses
        #     read back from the device.
        step, finished = loop["global_step"], loop["global_step"] >= args.total_timesteps
        evaluating = step > before and (finished or step // args.eval_every > before // args.eval_every)
        if evaluating or step > before and step // args.log_every > before // args.log_every:
            row = {"global_step": step, "gradient_steps": loop["gradient_steps"], **loop["info"]}
            if step:
                names = ("charts/episodic_return", "charts/episodic_length", "charts/success")
                if loop["episodes"]:
                    row |= dict(zip(names, np.mean(loop["episodes"], 0)))
                row["charts/SPS"] = (step - mark[0]) / (time.time() - mark[1])
                index = torch.randint(replay.size, (64,), generator=torch.Generator().manual_seed(step)).to(device)
                row |= probe(agent, replay.data["obs"][index], step)
            if evaluating:
                result = evaluate(agent.act if step else decoder, eval_envs, 1_000_000, device)
                loop["evals"].append({"global_step": step} | {k: torch.as_tensor(v) for k, v in result.items()})
                first = loop["evals"][0]
                row["eval/episodic_return"] = result["return"].mean()
                row |= {f"eval/{key}": result[key].mean() for key in result if key.startswith("success")}
                row |= {f"eval/frozen_{key}": first[key].double().mean() for key in ("return", "success")}
            loop["wall_seconds"] = time.time() - started
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
            if evaluating:
                arrays = {key: np.stack([e[key] for e in loop["evals"]]) for key in first}
                save(run / "eval.npz", lambda file: np.savez(file.open("wb"), **arrays))  # noqa: B023
                loop.update(obs=torch.as_tensor(obs), envs=[env_state(env) for env in envs.envs])
                save_checkpoint(run, agent, replay, loop, args)
                if row["eval/episodic_return"] >= arrays["return"].mean(1).max():
                    save(run / "best.pt", partial(shutil.copy, run / "checkpoint.pt"))
                returns = f"return {row['eval/episodic_return']:.0f} (frozen {row['eval/frozen_return']:.0f}), success "
                returns += f"{row['eval/success']:.2f} ({row['eval/frozen_success']:.2f})"
                bar.write(f"step {step:>7}  {returns}, {agent.status(row)}, {row.get('charts/SPS', 0):.0f} steps/s")
            bar.set_postfix_str(f"return {loop['evals'][-1]['return'].mean():.0f}, {agent.status(row)}", refresh=False)
            mark = step, time.time()
        if finished or stop:
            break

        # (1) Act: eps ~ N(0, I) -> w, the unshifted noise until the critics are warm -> a = Phi(w; s)
        noise = torch.randn(args.num_envs, decoder.dim, device=device)
        action = agent.act(torch.as_tensor(obs, device=device), noise).cpu().numpy()

        # (2) Step: each environment executes its chunk open loop; one that ends is reset in the same call
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        final, real_next_obs, before = infos.get("final_info", {}), next_obs.copy(), step
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]
            ended = final["episode"]["r"][i], final["episode"]["l"][i], final["success"][i]
            loop["episodes"].append([float(value) for value in ended])
        loop["global_step"] += int(np.sum(infos.get("steps", 0)) + np.sum(final.get("steps", 0)))
        loop["vector_steps"] += 1
        bar.update(loop["global_step"] - bar.n)

        # --- end shared: run folder ---
        # --- shared: learn ---
        # (3) Store. differs from DSRL: a time limit is not the end of the world, only `terminated` stops the bootstrap
        replay.add(obs=obs, action=action, reward=reward, next_obs=real_next_obs, terminated=terminated)
        obs, trained = next_obs, loop["global_step"] - args.prior_steps

        # (4) Train: utd x [Q^A, policy, alpha], then distill_steps x Q^W, in DSRL's order
        prior_ends = step < max(args.prior_steps, 1) <= loop["global_step"]  # in this very step
        if prior_ends and args.reward_scale == "auto":
            # differs from DSRL: on raw rewards Q is in the hundreds, and Q^W, which Adam moves by 3e-4 a step, lags so
            # far behind that its slope is noise. With `auto`, earning the mean reward for ever is worth 15.
            agent.reward_scale.fill_(15 * (1 - args.gamma) / replay.data["reward"][: replay.size].abs().mean())
            known = "--reward-scale auto: no reward yet, or --gamma is 1; raise --prior-steps or give a number"
            require(0 < agent.reward_scale < math.inf, known)
            bar.write(f"rewards count {agent.reward_scale:.3g} times inside the critics")
        if trained >= 0 and loop["vector_steps"] % args.train_freq == 0:
            started_call = time.time()
            for _ in range(args.utd):
                batch = replay.sample(args.batch_size)
                loop["info"] |= update_action_critic(agent, batch, args)
                if trained >= args.warmup_steps:
                    # --- end shared: learn ---
                    loop["info"] |= update_perturbation(agent, batch, args)
            # --- shared: end ---
            if agent.distills and args.distill_steps:
                loop["info"] |= update_latent_critic(agent, replay.sample(args.batch_size * args.distill_steps), args)
            loop["gradient_steps"] += args.utd
            if loop["gradient_steps"] == 20 * args.utd:
                calls = (args.total_timesteps - step) / (args.train_freq * args.num_envs * decoder.config["chunk"])
                bar.write(f"at least {calls * (time.time() - started_call) / 60:.0f} minutes to go")

    bar.close()
    if stop:
        loop.update(obs=torch.as_tensor(obs), envs=[env_state(env) for env in envs.envs])
        save_checkpoint(run, agent, replay, loop, args)
        again = shlex.join([sys.argv[0], "--resume", str(run)])
        print(f"stopped at step {step} and saved; go on with: python {again}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    plot_curves(run / "curves.png", loop["rows"])
    print(f"finished: {run / 'curves.png'}; play it with: python enjoy.py {shlex.quote(str(run))}")
# --- end shared: end ---
