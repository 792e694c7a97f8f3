# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco>=3.2,<3.10", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.66", "matplotlib>=3.8", "wandb>=0.18"]
# ///
"""LP-DS (Lagrangian Perturbation Diffusion Steering) on Gym locomotion: Hopper, Walker2d, HalfCheetah.

A generative policy, the decoder a = Phi(w; s), was cloned from mediocre data and stays frozen. What is learned is where
in its noise space to look: a shift of the noise for each state, bought with a budget delta that keeps it near the prior.

    w = eps + Delta_theta(s),  eps ~ N(0, I)        max_theta  E[Q^W(s, w)]   such that   E||Delta_theta(s)||^2 <= delta

Q^A values action chunks (TD through the decoder), Q^W values noise (distilled from Q^A), alpha prices the constraint.

    python lpds_continuous.py --env-id Walker2d-v4 --delta 0.35
    python lpds_continuous.py --resume runs/Walker2d-v4__lpds_continuous__1__1700000000
    python enjoy.py runs/Walker2d-v4__lpds_continuous__1__1700000000 --video walk.mp4

Every run folder gets metrics.csv, eval.npz and, when it has finished, curves.png. Scores to expect, and how the file
departs from the paper and from DSRL: docs/lpds_continuous.md. To fork: copy this file and entropy.py.
"""

import difflib
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from entropy import knn_entropy


@dataclass
class Args:
    # LP-DS: what this script is about
    env_id: str = "Walker2d-v4"
    """Hopper, Walker2d or HalfCheetah, -v4 or -v5 (other MuJoCo environments: with --backbone)"""
    preset: Literal["default", "paper"] = "default"
    """default: learns within an hour on a small machine; paper: the printed configuration, meant for a GPU"""
    delta: float = 0.35
    """budget of E||Delta||^2; small keeps the frozen policy's variety, large specialises; 0.1 to 1 is usual"""
    delta_norm: Literal["sum", "mean"] = "mean"
    """||Delta||^2 summed over the d noise coordinates (equation 7 as printed) or averaged (a budget d times larger)"""
    dual: Literal["log", "linear"] = "log"
    """log: relative step on log alpha, holds the constraint at any reward scale; linear: equation 10 as printed"""
    alpha_init: float = 1.0
    """price of the constraint at the start, in units of Q per unit of ||Delta||^2"""
    alpha_lr: float = 1e-2
    """step of the dual update"""
    lagrangian: bool = True
    """--no-lagrangian fixes alpha at 0: the paper's ablation, Delta grows without limit"""
    noise_bound: float | Literal["none"] = "none"
    """clip every coordinate of w to +-bound; not needed with the Lagrangian, and 1.5 alone alters the prior"""
    perturb: Literal["noise", "action"] = "noise"
    """noise: LP-DS; action: LP-DS-A, Delta is added to the decoded action and maximises Q^A directly"""

    # Critics and update ratio
    hidden_size: int = 256
    """width of Delta and of both critics"""
    num_layers: int = 3
    """hidden layers of each, [Linear, LayerNorm, Tanh]"""
    lr: float = 3e-4
    """Adam's learning rate for all networks"""
    batch_size: int = 256
    """action chunks a gradient step"""
    gamma: float = 0.99
    """discount per action chunk (not per primitive step), as DSRL"""
    tau: float = 0.005
    """Polyak step of the target critic, after every gradient step"""
    train_freq: int = 2
    """vector steps (num_envs chunks each) between two train calls"""
    utd: int = 20
    """[Q^A, Delta and alpha] updates a train call"""
    distill_steps: int = 10
    """Q^W updates a train call, after the others"""
    reward_scale: float | Literal["auto"] = "auto"
    """factor on rewards inside the critics; auto: brings the prior roll-outs' return-to-go to about 5"""
    buffer_size: int = 1_000_000
    """action chunks kept in replay; memory is taken as it fills"""

    # Environment and budget, counted in primitive environment steps throughout
    backbone: str = ""
    """decoder file: ours or an unmodified DPPO / DSRL state_*.pt; empty: the committed one for this environment"""
    normalization: str = ""
    """normalization.npz that belongs to a DPPO / DSRL checkpoint; ours carry their own"""
    activation: Literal["relu", "mish"] = "relu"
    """of a DPPO / DSRL checkpoint, whose file does not say: relu on Gym, mish on robomimic"""
    denoising_steps: int = 20
    """training steps of a DPPO / DSRL checkpoint's schedule; 100 for DSRL's Square; ours carry their own"""
    ddim_steps: int = 5
    """DDIM steps a DPPO / DSRL checkpoint is decoded with; ours carry their own"""
    total_timesteps: int = 150_000
    """length of the run, prior roll-outs included"""
    num_envs: int = 4
    """environments stepped together"""
    prior_steps: int = 8_000
    """steps of the frozen policy before anything is trained"""
    warmup_steps: int = 8_000
    """further steps in which the critics learn and Delta stays 0: it must not follow critics that know nothing yet"""
    seed: int = 1
    """seed of networks, noise, environments; CPU runs repeat to the bit"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    cuda_graph: bool = True
    """on CUDA, capture the update functions once and replay them; --no-cuda-graph runs them eagerly"""

    # Evaluation and logging
    eval_every: int = 10_000
    """steps between evaluations (and checkpoints)"""
    eval_episodes: int = 20
    """episodes an evaluation, always on the same seeds"""
    log_every: int = 2_000
    """steps between rows of metrics.csv"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb; WANDB_MODE=offline works)"""
    wandb_project: str = "lp-ds"
    """its project"""
    wandb_entity: str | None = None
    """its team"""
    no_progress: bool = False
    """plain lines instead of a progress bar"""

    # Run folder
    exp_name: str = "lpds_continuous"
    """part of the run folder's name"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """run folder to continue exactly where its checkpoint left it"""


# What a preset fills in where the user gave no flag. `default` holds on every device; `paper` is LP-DS table 2 with the
# settings it inherits from DSRL's released configuration (cfg/gym/dsrl_*.yaml): raw rewards, equation 10, bootstrapping.
PAPER = dict(delta_norm="sum", dual="linear", reward_scale=1.0, prior_steps=32_016, warmup_steps=0,
             total_timesteps=1_000_000, eval_every=64_000, eval_episodes=200)  # fmt: skip
PRESETS = {
    "default": {
        "Hopper": dict(delta=0.5, hidden_size=128),
        "Walker2d": dict(delta=0.35),
        "HalfCheetah": dict(delta=0.35),
    },
    "paper": {
        "Hopper": PAPER | dict(delta=0.5, hidden_size=128),
        "Walker2d": PAPER | dict(delta=0.35, hidden_size=2048),
        "HalfCheetah": PAPER | dict(delta=0.35, hidden_size=1024),
    },
}
KNOWN_ENVS = [f"{family}-v{v}" for family in PRESETS["default"] for v in (4, 5)]
# May differ when a run is resumed; anything else would continue another experiment under the same name.
FREE_ON_RESUME = ("total_timesteps", "eval_every", "log_every", "track", "wandb_project", "wandb_entity", "no_progress", "run_dir", "resume")


# --- shared: errors ---
def fail(message: str):
    """Ends the program with one sentence on stderr and exit code 2, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- end shared: errors ---
def parse_args(argv=None) -> Args:
    """Command line -> Args. Order of precedence: flags, then the resumed run or the preset, then the defaults."""
    first = tyro.cli(Args, args=argv, description=__doc__)
    base = Args(**PRESETS[first.preset].get(first.env_id.rsplit("-v", 1)[0], {}))
    if first.resume:
        for name in ("args.json", "checkpoint.pt"):
            if not Path(first.resume, name).is_file():
                fail(f"--resume {first.resume}: has no {name}, so it is no run that can go on; give a folder under runs/")
        base = Args(**json.loads(Path(first.resume, "args.json").read_text()))
    args = tyro.cli(Args, args=argv, default=base, description=__doc__)
    for field in fields(Args) if first.resume else ():
        old, new = getattr(base, field.name), getattr(args, field.name)
        if old != new and field.name not in FREE_ON_RESUME:
            flag = field.name.replace("_", "-")
            fail(f"--{flag} {new}: the run in {first.resume} uses {old}, and only budget and logging flags may change; leave it out")
    for name in ("delta", "lr", "batch_size", "hidden_size", "num_layers", "num_envs", "train_freq", "utd", "buffer_size",
                 "eval_every", "eval_episodes", "log_every", "total_timesteps", "denoising_steps", "ddim_steps"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0; see --help for usual values")
    for name in ("alpha_init", "alpha_lr", "prior_steps", "warmup_steps", "distill_steps"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative; see --help for usual values")
    for name in ("gamma", "tau"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name} {getattr(args, name)}: must lie in [0, 1]")
    for name in ("noise_bound", "reward_scale"):
        if not isinstance(getattr(args, name), str) and not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number above 0, or the word in --help")
    if args.dual == "log" and args.alpha_init == 0:
        fail("--alpha-init 0: a relative step never leaves 0; use a positive value or --dual linear")
    if args.env_id not in gym.registry:
        close = difflib.get_close_matches(args.env_id, list(KNOWN_ENVS) + list(gym.registry), 1, 0.4)
        fail(f"--env-id {args.env_id}: unknown; known are {', '.join(KNOWN_ENVS)}" + (f"; did you mean {close[0]}?" if close else ""))
    return args


# --- shared: environment ---
class ActionChunk(gym.Wrapper):
    """Lets an environment be driven by normalised observations and flat action chunks, executed open loop.

    `normalization` holds obs_min, obs_max (obs_dim,), action_min, action_max (A,) of the data the decoder was trained
    on; formulas are DPPO's, observations are not clipped. A chunk stops where the episode ends, its reward is the plain
    sum over the primitive steps; info has steps (executed), success (so far in the episode) and, at its end, episode.
    """

    def __init__(self, env, chunk: int, normalization: dict):
        super().__init__(env)
        self.chunk, self.succeeded = chunk, False
        self.n = {k: np.asarray(v, np.float64) for k, v in normalization.items()}
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (chunk * env.action_space.shape[0],), np.float32)

    def normalize(self, obs):  # (obs_dim,) raw -> (obs_dim,) about [-1, 1]
        low, high = self.n["obs_min"], self.n["obs_max"]
        return (2 * ((obs - low) / (high - low + 1e-6) - 0.5)).astype(np.float32)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.succeeded = False
        return self.normalize(obs), info

    def step(self, action):  # (chunk * A,) in [-1, 1]
        low, high = self.n["action_min"], self.n["action_max"]
        total, steps = 0.0, 0
        for a in (np.asarray(action, np.float64).reshape(self.chunk, -1) + 1) / 2 * (high - low) + low:
            a = np.clip(a, self.env.action_space.low, self.env.action_space.high).astype(np.float32)
            obs, reward, terminated, truncated, info = self.env.step(a)
            total, steps = total + float(reward), steps + 1
            # Gym locomotion has no success flag: there, an episode that reaches its time limit without a fall counts
            self.succeeded |= bool(info.get("success", truncated and not terminated))
            # differs from DSRL: its wrapper goes on stepping (and adding rewards) after the episode has ended
            if terminated or truncated:
                break
        info = {"steps": steps, "success": self.succeeded} | {k: info[k] for k in ("episode",) if k in info}
        return self.normalize(obs), total, terminated, truncated, info


def make_env(env_id: str, chunk: int, normalization: dict, **kwargs):
    """One environment that takes flat action chunks in [-1, 1]; unknown ids raise gymnasium's own error."""
    return ActionChunk(gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **kwargs)), chunk, normalization)


def get_env_state(env) -> dict:
    """Everything the next step depends on: full physics (warm start included), time limit, statistics, generator."""
    mj, spec, counters = env.unwrapped, mujoco.mjtState.mjSTATE_INTEGRATION, {}
    physics = np.empty(mujoco.mj_stateSize(mj.model, spec))
    mujoco.mj_getState(mj.model, mj.data, physics, spec)
    while env is not mj:  # from the outermost wrapper inwards
        for name in ("succeeded", "_elapsed_steps", "episode_returns", "episode_lengths"):
            if name in vars(env):
                counters[name] = vars(env)[name].item() if isinstance(vars(env)[name], np.generic) else vars(env)[name]
        env = env.env
    generator = json.dumps(mj.np_random.bit_generator.state)
    return {"physics": torch.from_numpy(physics), "counters": counters, "generator": generator}


def set_env_state(env, state: dict) -> None:
    """Puts a freshly reset environment back to where `get_env_state` found it."""
    mj, spec, physics = env.unwrapped, mujoco.mjtState.mjSTATE_INTEGRATION, state["physics"].numpy()
    mujoco.mj_setState(mj.model, mj.data, physics, spec)
    mujoco.mj_forward(mj.model, mj.data)  # fills the body positions that some rewards read, but spoils the warm start
    mujoco.mj_setState(mj.model, mj.data, physics, spec)
    mj.np_random.bit_generator.state = json.loads(state["generator"])
    while env is not mj:
        for name in set(state["counters"]) & set(vars(env)):
            setattr(env, name, state["counters"][name])
        env = env.env


# --- end shared: environment ---
# --- shared: decoder ---
class Decoder(nn.Module):
    """Phi: obs (B, obs_dim), noise w (B, Ta*A) -> action chunk (B, Ta*A) in [-1, 1], all normalised. Deterministic.

    The network is DPPO's DiffusionMLP (input [x, time embedding, obs], one linear layer, pre-activation residual
    blocks, linear head). A flow decoder uses the same network as a velocity field. Call `freeze` once the weights are
    in: the time embeddings of the few sampling steps then become constants, which saves a third of the operations.
    """

    def __init__(self, config: dict):
        super().__init__()
        c = self.config = config
        self.dim, self.time_dim = c["chunk"] * c["action_dim"], c["time_dim"]  # d = Ta*A
        self.activation = {"relu": F.relu, "mish": F.mish}[c["activation"]]
        self.time_embedding = nn.Sequential(
            nn.Linear(c["time_dim"], 2 * c["time_dim"]), nn.Mish(), nn.Linear(2 * c["time_dim"], c["time_dim"])
        )
        sizes = [c["obs_dim"], *c["cond_hidden"]]  # DPPO's Square decoder encodes the observation first
        self.cond_layers = nn.ModuleList(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:]))
        h = c["hidden"][0]
        self.input = nn.Linear(self.dim + c["time_dim"] + sizes[-1], h)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"l1": nn.Linear(h, h), "l2": nn.Linear(h, h)}) for _ in range((len(c["hidden"]) - 1) // 2)
        )
        self.head = nn.Linear(h, self.dim)

    def embed_time(self, t):  # (B,) in units of training steps -> (B, time_dim)
        half = self.time_dim // 2
        frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
        angle = t[:, None].float() * frequency
        return self.time_embedding(torch.cat([angle.sin(), angle.cos()], -1))

    def network(self, x, time_emb, obs):  # -> predicted noise (diffusion) or velocity (flow), (B, Ta*A)
        for i, layer in enumerate(self.cond_layers):
            obs = layer(obs) if i + 1 == len(self.cond_layers) else self.activation(layer(obs))
        h = self.input(torch.cat([x, time_emb, obs], -1))
        for block in self.blocks:
            h = h + block["l2"](self.activation(block["l1"](self.activation(h))))
        return self.head(h)

    @staticmethod
    def alpha_bar(steps: int):
        """DPPO's cosine schedule, (steps,) float64; its grid runs over [0, steps + 1], which is kept on purpose."""
        grid = np.linspace(0, steps + 1, steps + 1) / (steps + 1)
        f = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.clip(1 - f[1:] / f[:-1], 0, 0.999).astype(np.float32).astype(np.float64)
        return np.cumprod(1 - betas)

    def freeze(self):
        """Fixes the weights and tabulates what each sampling step needs: its time embedding and schedule constants."""
        train, sample = self.config["train_steps"], self.config["sample_steps"]
        if self.config["kind"] == "diffusion":
            times = np.arange(sample)[::-1] * (train // sample)  # "leading" spacing: 16, 12, 8, 4, 0 for 20 / 5
            now = self.alpha_bar(train)[times]
            after = np.append(now[1:], 1.0)  # the last step lands on the clean action
            self.table = list(zip(now**0.5, (1 - now) ** 0.5, after**0.5, (1 - after) ** 0.5))
        else:
            times = np.arange(sample) * train / sample
        self.requires_grad_(False).eval()
        device = self.head.weight.device
        self.times = self.embed_time(torch.as_tensor(times.copy(), device=device))  # (S, time_dim)
        return self

    def forward(self, obs, noise):
        x = noise
        for i, time_emb in enumerate(self.times):
            prediction = self.network(x, time_emb.expand(len(x), -1), obs)
            if self.config["kind"] == "flow":
                x = x + prediction / self.config["sample_steps"]  # Euler
                continue
            a, b, a_next, b_next = self.table[i]
            clean = ((x - b * prediction) / a).clamp(-1, 1)  # DPPO clips the clean action and ...
            x = a_next * clean + b_next * (x - a * clean) / b  # ... recomputes the noise from what was clipped
        return x.clamp(-1, 1)


# --- end shared: decoder ---


def load_decoder(args):
    """(frozen Decoder on the CPU, normalization dict, card dict) from --backbone; refuses what does not fit --env-id.

    Takes our format (docs/pretrain_backbone.md) or an unmodified DPPO / DSRL checkpoint: averaged weights (`ema`) where
    present, sizes read off the shapes, DPPO's names mapped to ours.
    """
    committed = f"backbones/{args.env_id.rsplit('-v', 1)[0].lower()}-v4-medium-diffusion.pt"
    path = Path(args.backbone or Path(__file__).parent / committed)
    if args.resume:
        path = Path(args.resume, "backbone.pt")  # the copy that every run folder keeps
    if not path.is_file():
        fail(f"--backbone {path}: no such file; take a decoder from backbones/ of the LP-DS repository, make one with its "
             "pretrain_backbone.py, or give a DPPO / DSRL checkpoint state_*.pt with --normalization")  # fmt: skip
    try:  # weights_only: the file is data, it cannot run code
        file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"--backbone {path}: not a plain tensor file ({str(error).splitlines()[0][:120]}); nothing in it was executed; use one you trust that was saved as plain tensors")
    try:
        if "format" in file:
            config, weights, stats, card = file["config"], file["model"], file["normalization"], file["card"]
        else:
            config, weights, card = None, file["ema"] if "ema" in file else file["model"], {}
            stats = read_normalization(args.normalization, path)
        stats = {k: np.asarray(stats[k], np.float32) for k in ("obs_min", "obs_max", "action_min", "action_max")}
        if config is None:
            config, weights = from_dppo(weights, len(stats["action_min"]), args)
        decoder = Decoder(config)
        decoder.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        fail(f"--backbone {path}: neither our decoder format nor a DPPO / DSRL checkpoint ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    if not all(torch.isfinite(w).all() for w in weights.values()):
        fail(f"--backbone {path}: holds weights that are not finite; use another checkpoint")
    obs_dim, action_dim = config["obs_dim"], config["action_dim"]
    env = gym.make(args.env_id)
    found = (env.observation_space.shape, env.action_space.shape)
    env.close()
    if found != ((obs_dim,), (action_dim,)):
        fail(f"--backbone {path}: decodes {obs_dim} observations to {action_dim} actions, but {args.env_id} has {found[0]} and {found[1]}; use a decoder for this environment")
    where = args.normalization or path
    for side, size in (("obs", obs_dim), ("action", action_dim)):
        low, high = stats[f"{side}_min"], stats[f"{side}_max"]
        if low.shape != (size,) or high.shape != (size,) or not np.isfinite([low, high]).all() or (low > high).any():
            fail(f"--normalization {where}: {side}_min {low.shape} and {side}_max {high.shape} must be finite, ordered and of shape ({size},); use the file that belongs to this decoder")
    return decoder.freeze(), stats, card | {"checksum": hashlib.sha256(path.read_bytes()).hexdigest()[:12], "path": str(path)}


def read_normalization(path: str, backbone) -> dict:
    if not Path(path).is_file():
        fail(f"--normalization {path or '(empty)'}: no such file, and {backbone} is a DPPO / DSRL checkpoint, which does not carry it; give the normalization.npz that lies beside it")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in ("obs_min", "obs_max", "action_min", "action_max")}
    except (KeyError, ValueError, OSError) as error:
        fail(f"--normalization {path}: not DPPO's normalization.npz ({error}); it needs obs_min, obs_max, action_min, action_max")


def from_dppo(state: dict, action_dim: int, args):
    """DPPO's DiffusionMLP state dict -> (our config, our weights). Activation and schedule are not in the file."""
    weights = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    last = max(int(k.split(".")[2]) for k in weights if k.startswith("mlp_mean.layers."))
    names = {"time_embedding.1": "time_embedding.0", "time_embedding.3": "time_embedding.2"}
    names |= {"mlp_mean.layers.0": "input", f"mlp_mean.layers.{last}": "head"}
    names |= {f"mlp_mean.layers.{i}.{l}": f"blocks.{i - 1}.{l}" for i in range(1, last) for l in ("l1", "l2")}
    names |= {f"cond_mlp.moduleList.{i}.linear_1": f"cond_layers.{i}" for i in range(9)}
    weights = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in weights.items()}
    d, time_dim = len(weights["head.bias"]), len(weights["time_embedding.2.bias"])
    cond = [len(weights[f"cond_layers.{i}.bias"]) for i in range(9) if f"cond_layers.{i}.bias" in weights]
    obs_dim = weights["cond_layers.0.weight"].shape[1] if cond else weights["input.weight"].shape[1] - d - time_dim
    hidden = [len(weights["input.bias"])] * (2 * last - 1)
    return {"kind": "diffusion", "obs_dim": obs_dim, "action_dim": action_dim, "chunk": d // action_dim, "hidden": hidden,
            "cond_hidden": cond, "time_dim": time_dim, "activation": args.activation,
            "train_steps": args.denoising_steps, "sample_steps": args.ddim_steps}, weights  # fmt: skip


def mlp(n_in: int, n_out: int, args):
    """[Linear, LayerNorm, Tanh] x num_layers and a linear head: DSRL's trunk for the actor and the critics."""
    sizes = [n_in] + [args.hidden_size] * args.num_layers
    trunk = [layer for m, n in zip(sizes, sizes[1:]) for layer in (nn.Linear(m, n), nn.LayerNorm(n), nn.Tanh())]
    return nn.Sequential(*trunk, nn.Linear(sizes[-1], n_out))


class TwinCritic(nn.Module):
    """Two independent values of (obs, x), where x is an action chunk for Q^A and noise for Q^W: -> (2, B)."""

    def __init__(self, obs_dim: int, dim: int, args):
        super().__init__()
        self.members = nn.ModuleList(mlp(obs_dim + dim, 1, args) for _ in range(2))

    def forward(self, obs, x):
        x = torch.cat([obs, x], -1)
        return torch.stack([member(x).squeeze(-1) for member in self.members])


class Agent(nn.Module):
    """Everything a checkpoint must hold: frozen decoder, Delta, critics, alpha, optimisers."""

    def __init__(self, args: Args, decoder: Decoder):
        super().__init__()
        obs_dim, d = decoder.config["obs_dim"], decoder.dim
        self.args, self.decoder = args, decoder
        self.perturbation = mlp(obs_dim, d, args)  # Delta_theta
        nn.init.zeros_(self.perturbation[-1].weight)  # Delta = 0: training starts from exactly the frozen policy
        nn.init.zeros_(self.perturbation[-1].bias)
        self.q_a, self.q_a_target, self.q_w = (TwinCritic(obs_dim, d, args) for _ in range(3))
        self.q_a_target.load_state_dict(self.q_a.state_dict())
        self.q_a_target.requires_grad_(False)
        self.register_buffer("alpha", torch.tensor(args.alpha_init if args.lagrangian else 0.0))
        self.register_buffer("reward_scale", torch.tensor(1.0 if args.reward_scale == "auto" else args.reward_scale))
        device = next(decoder.parameters()).device
        self.to(device)
        adam = dict(lr=args.lr, fused=True, capturable=device.type == "cuda")
        self.optimizers = {n: torch.optim.Adam(getattr(self, n).parameters(), **adam) for n in ("perturbation", "q_a", "q_w")}

    def bound(self, noise):
        return noise if self.args.noise_bound == "none" else noise.clamp(-self.args.noise_bound, self.args.noise_bound)

    def act(self, obs, noise, shift=None):
        """The steered policy: obs (B, obs_dim), eps (B, d) -> action chunk (B, Ta*A). Equation 4, or its LP-DS-A twin."""
        shift = self.perturbation(obs) if shift is None else shift
        if self.args.perturb == "action":
            return (self.decoder(obs, noise) + shift).clamp(-1, 1)
        return self.decoder(obs, self.bound(noise + shift))

    def step(self, name: str, loss):
        """One Adam step of network `name` on `loss`, which leaves the gradients of the other networks alone."""
        parameters = list(getattr(self, name).parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = g
        self.optimizers[name].step()


class Replay:
    """Ring of transitions (chunks) on the learner's device; sampling needs no word from the host."""

    def __init__(self, capacity: int, obs_dim: int, d: int, device):
        shapes = {"obs": (obs_dim,), "action": (d,), "reward": (), "next_obs": (obs_dim,), "terminated": ()}
        self.data = {k: torch.empty(capacity, *s, device=device) for k, s in shapes.items()}
        self.capacity, self.added, self.size = capacity, 0, torch.zeros((), device=device)

    def add(self, **rows):  # each (n, ...), on the host
        index = (torch.arange(len(rows["reward"])) + self.added) % self.capacity
        for name, value in rows.items():
            self.data[name][index] = torch.as_tensor(value, dtype=torch.float32, device=self.size.device)
        self.added += len(index)
        self.size.fill_(min(self.added, self.capacity))

    def sample(self, n: int) -> dict:
        index = (torch.rand(n, device=self.size.device) * self.size).long()
        return {name: value[index] for name, value in self.data.items()}


def update_action_critic(agent: Agent, batch: dict, args: Args) -> dict:
    """Q^A by TD through the decoder (Algorithm 1, lines 8-11) and its target by Polyak averaging (line 20)."""
    with torch.no_grad():
        # The value of the next state is that of the steered policy, so Delta moves the target as well
        next_action = agent.act(batch["next_obs"], torch.randn_like(batch["action"]))
        next_value = agent.q_a_target(batch["next_obs"], next_action).min(0).values  # pessimistic twin, (B,)
        target = agent.reward_scale * batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_value
    q = agent.q_a(batch["obs"], batch["action"])  # (2, B)
    loss = 0.5 * (q - target).square().mean(1).sum()
    agent.step("q_a", loss)
    torch._foreach_lerp_(list(agent.q_a_target.parameters()), [p.detach() for p in agent.q_a.parameters()], args.tau)
    return {"losses/q_a": loss.detach(), "losses/q_a_value": q.detach().mean()}


def update_latent_critic(agent: Agent, batch: dict, args: Args) -> dict:
    """Q^W by distillation of Q^A on the unshifted prior (lines 12-15): `distill_steps` steps, one slice of `batch` each.

    Phi and Q^A do not move meanwhile, so all slices are decoded and valued in one go: the same numbers, larger matrices.
    """
    noise = torch.randn_like(batch["action"])
    with torch.no_grad():
        target = agent.q_a(batch["obs"], agent.decoder(batch["obs"], noise))  # (2, n * B), member to member, online
    loss = torch.zeros((), device=noise.device)
    for i in range(args.distill_steps):
        part = slice(i * args.batch_size, (i + 1) * args.batch_size)
        q = agent.q_w(batch["obs"][part], noise[part])
        loss = 0.5 * (q - target[:, part]).square().mean(1).sum()
        agent.step("q_w", loss)
    return {"losses/q_w": loss.detach(), "losses/q_w_value": target.mean()}


def update_perturbation(agent: Agent, batch: dict, args: Args) -> dict:
    """Primal step on theta, dual step on alpha (lines 16-19, equations 8 and 10)."""
    obs, noise = batch["obs"], torch.randn_like(batch["action"])
    shift = agent.perturbation(obs)  # (B, d)
    if args.perturb == "noise":
        value = agent.q_w(obs, agent.bound(noise + shift)).min(0).values
    else:  # LP-DS-A has no latent critic
        value = agent.q_a(obs, agent.act(obs, noise, shift)).min(0).values
    sum_norm = shift.square().sum(-1).mean()
    sq_norm = sum_norm if args.delta_norm == "sum" else sum_norm / shift.shape[-1]
    loss = -(value.mean() - agent.alpha * (sq_norm - args.delta))
    agent.step("perturbation", loss)
    violation = sq_norm.detach() / args.delta - 1
    if args.lagrangian and args.dual == "log":
        # differs from the paper: equation 10 moves alpha by at most alpha_lr * delta a step while the constraint is
        # slack, so it overshoots or never starts, depending on the rewards; a relative step has no such scale
        agent.alpha.mul_(torch.exp(args.alpha_lr * violation.clamp(-1, 5)))
    elif args.lagrangian:
        agent.alpha.add_(args.alpha_lr * (sq_norm.detach() - args.delta)).clamp_(min=0)  # equation 10
    saturated = 0.0 if args.noise_bound == "none" else ((noise + shift).abs() > args.noise_bound).float().mean()
    return {"losses/perturbation": loss.detach(), "trust_region/alpha": agent.alpha.clone(), "trust_region/sq_norm": sq_norm.detach(),
            "trust_region/violation": violation, "trust_region/kl": 0.5 * sum_norm.detach(), "trust_region/saturated": saturated}  # fmt: skip


def gradient_step(agent: Agent, replay: Replay, args: Args, steer: bool) -> dict:
    batch = replay.sample(args.batch_size)
    info = update_action_critic(agent, batch, args)
    return info | (update_perturbation(agent, batch, args) if steer else {})


def distill(agent: Agent, replay: Replay, args: Args) -> dict:
    return update_latent_critic(agent, replay.sample(args.batch_size * args.distill_steps), args)


@torch.no_grad()
def probe(agent: Agent, obs, seed: int, n: int = 64) -> dict:
    """What the steering does at states `obs` (B, obs_dim), over n draws of noise each; nothing here is trained on."""
    generator = torch.Generator(obs.device).manual_seed(seed)
    obs = obs.repeat_interleave(n, 0)
    noise = torch.randn(len(obs), agent.decoder.dim, device=obs.device, generator=generator)
    frozen, steered = agent.decoder(obs, noise), agent.act(obs, noise)
    w = agent.bound(noise + agent.perturbation(obs))
    q_w, q_a = (q.mean(0).view(-1, n) for q in (agent.q_w(obs, w), agent.q_a(obs, steered)))
    q_w, q_a = q_w - q_w.mean(1, keepdim=True), q_a - q_a.mean(1, keepdim=True)  # only differences within a state steer
    corr = ((q_w * q_a).sum(1) / (q_w.norm(dim=1) * q_a.norm(dim=1) + 1e-8)).mean()
    entropy, ties = knn_entropy(steered.view(-1, n, agent.decoder.dim))
    entropy_frozen, _ = knn_entropy(frozen.view(-1, n, agent.decoder.dim))
    return {"losses/q_w_corr": corr, "entropy/action": entropy, "entropy/action_frozen": entropy_frozen, "entropy/ties": ties}


def reward_scale(replay: Replay, num_envs: int, gamma: float) -> float:
    """5 / mean |discounted return-to-go| of the prior roll-outs: brings Q to order 1 to 10, where Adam at 3e-4 can follow.

    differs from DSRL: it trains on raw rewards; there Q^W lags Q^A by a third of Q and its slope is noise for long.
    """
    n = replay.added // num_envs
    reward, end = (replay.data[k][: n * num_envs].view(n, num_envs) for k in ("reward", "terminated"))
    to_go, total = torch.zeros(num_envs, device=reward.device), 0.0
    for i in reversed(range(n)):
        to_go = reward[i] + gamma * (1 - end[i]) * to_go
        total += to_go.abs().mean().item() / n
    return 5 / max(total, 1e-6)


# --- shared: evaluation ---
@torch.no_grad()
def evaluate(policy, envs: list, seed: int, device) -> dict:
    """One episode in each of `envs`, sampled noise; returns arrays (len(envs),): return, success, length.

    Episode i always starts from seed + i and receives the same noise draws, whatever the policy and however long the
    others live, so two policies, checkpoints or methods meet the same luck.
    """
    generator = torch.Generator().manual_seed(seed)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    result = {"return": np.zeros(len(envs)), "success": np.zeros(len(envs), bool), "length": np.zeros(len(envs), int)}
    alive = np.arange(len(envs))
    while len(alive):
        noise = torch.randn(len(envs), envs[0].action_space.shape[0], generator=generator)[alive]
        action = policy(torch.as_tensor(obs[alive], device=device), noise.to(device)).cpu().numpy()
        for i, a in zip(list(alive), action):
            obs[i], reward, terminated, truncated, info = envs[i].step(a)
            result["return"][i] += reward
            result["length"][i] += info["steps"]
            result["success"][i] = info["success"]
            if terminated or truncated:
                alive = alive[alive != i]
    return result


# --- end shared: evaluation ---
# --- shared: run folder ---
def save(path: Path, write) -> None:
    """Calls write(temporary path) and renames it to `path`: a crash, a full disk or kill -9 leaves the old file whole."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"--run-dir: cannot write {path} ({error}); what was saved before is whole: free some space, then --resume {path.parent}")


def write_csv(path: Path, rows: list) -> None:
    """metrics.csv from all rows; columns are the union of their keys, absent values stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns)] + [",".join(f"{row[c]:.9g}" if c in row else "" for c in columns) for row in rows]
    save(path, lambda p: p.write_text("\n".join(lines) + "\n"))


def plot_curves(path: Path, rows: list, title: str) -> None:
    """curves.png: return against the frozen policy's, the constraint and its price, entropy, quality of Q^W."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("eval/episodic_return", "eval/frozen_return"), ("trust_region/violation", "trust_region/alpha"),
              ("entropy/action", "entropy/action_frozen"), ("losses/q_w_corr",)]  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.5), layout="constrained")
    for axis, keys in zip(axes, panels):
        for key, style in zip(keys, ("-", "--")):
            points = [(row["global_step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points) if points else ([], []), style, label=key)
        axis.set_xlabel("environment steps")
        axis.legend(fontsize=8)
    figure.suptitle(title)
    save(path, lambda p: figure.savefig(p, format="png"))


# --- end shared: run folder ---


def capture(function, agent: Agent):
    """CUDA graph of a function without arguments: one launch replays it. The three warm-up calls are undone."""
    tensors = lambda: [*agent.state_dict().values()] + [  # noqa: E731
        t for o in agent.optimizers.values() for s in o.state.values() for t in s.values()]  # fmt: skip
    before, stream, random_state = [t.clone() for t in tensors()], torch.cuda.Stream(), torch.cuda.get_rng_state()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    after = tensors()  # optimisers that had no state before this get theirs zeroed, which is where Adam starts
    for t, saved in zip(after, before + [None] * (len(after) - len(before))):
        t.copy_(saved) if saved is not None else t.zero_()
    torch.cuda.set_rng_state(random_state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return lambda: (graph.replay(), result)[1]


def load_checkpoint(path: Path, agent: Agent, replay: Replay) -> dict:
    """Fills agent, optimisers, replay and torch's generators in place; returns the whole checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
        for name, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        rows = len(state["replay"]["reward"])
        for name, value in state["replay"].items():
            replay.data[name][:rows] = value.to(replay.size.device)
        replay.added = state["added"]
        replay.size.fill_(rows)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        return state
    except Exception as error:
        fail(f"--resume {path.parent}: its checkpoint.pt cannot be read ({' '.join(str(error).split())[:200]}); start a new run")


if __name__ == "__main__":
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # at these sizes a second thread costs more than it gives
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)

    # Decoder and environments
    decoder, normalization, card = load_decoder(args)
    decoder, chunk, d = decoder.to(device).freeze(), decoder.config["chunk"], decoder.dim
    make = partial(make_env, args.env_id, chunk, normalization)
    envs = gym.vector.SyncVectorEnv([make] * args.num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    eval_envs = [make() for _ in range(args.eval_episodes)]
    obs, _ = envs.reset(seed=args.seed)

    # Networks, replay, counters: new, or as the checkpoint left them
    agent = Agent(args, decoder)
    replay = Replay(args.buffer_size, obs.shape[1], d, device)
    count = {"global_step": 0, "vector_steps": 0, "gradient_steps": 0, "wall_seconds": 0.0}
    rows, evals, episodes, info = [], [], [], {}  # metrics.csv, eval.npz, episodes and losses since the last row
    run = Path(args.resume or f"{args.run_dir}/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    if args.resume:
        state = load_checkpoint(run / "checkpoint.pt", agent, replay)
        for env, env_state in zip(envs.envs, state["envs"]):
            set_env_state(env, env_state)
        obs, count, rows, evals, episodes, info = (state[k] for k in ("obs", "count", "rows", "evals", "episodes", "info"))
        obs = obs.numpy()
    else:
        run.mkdir(parents=True)
        save(run / "args.json", lambda p: p.write_text(json.dumps(asdict(args), indent=1)))
        plain = {"format": 1, "kind": decoder.config["kind"], "config": decoder.config, "card": card, "model": decoder.state_dict(),
                 "normalization": {k: torch.as_tensor(v) for k, v in normalization.items()}}  # fmt: skip
        save(run / "backbone.pt", lambda p: torch.save(plain, p))  # the run can be moved, resumed and played without the original

    def checkpoint(name="checkpoint.pt"):
        state = {
            "agent": agent.state_dict(), "optimizers": {n: o.state_dict() for n, o in agent.optimizers.items()},
            "replay": {k: v[: min(replay.added, replay.capacity)].clone() for k, v in replay.data.items()}, "added": replay.added,
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            "envs": [get_env_state(env) for env in envs.envs], "obs": torch.as_tensor(obs), "count": count, "rows": rows,
            "evals": evals, "episodes": episodes, "info": info, "args": asdict(args), "script": Path(__file__).name,
            "versions": {"torch": torch.__version__, "gymnasium": gym.__version__, "mujoco": mujoco.__version__},
        }  # fmt: skip
        save(run / name, lambda p: torch.save(state, p))

    def evaluation(policy) -> dict:
        result = evaluate(policy, eval_envs, 1_000_000, device)
        evals.append({"global_step": count["global_step"]} | {k: torch.as_tensor(v) for k, v in result.items()})
        stacked = {k: np.stack([np.asarray(e[k]) for e in evals]) for k in evals[0]}
        save(run / "eval.npz", lambda p: np.savez_compressed(p.open("wb"), **stacked))
        return {"eval/episodic_return": result["return"].mean(), "eval/success": result["success"].mean(),
                "eval/frozen_return": stacked["return"][0].mean(), "eval/frozen_success": stacked["success"][0].mean()}  # fmt: skip

    def report(row: dict):
        row = {"global_step": count["global_step"], "wall_seconds": time.time() - started, "gradient_steps": count["gradient_steps"]} | row
        rows.append({k: float(v) for k, v in row.items()})
        bad = [k for k, v in rows[-1].items() if not math.isfinite(v) and k.startswith(("losses/", "trust_region/"))]
        if bad:
            fail(f"--lr {args.lr}: {bad[0]} became {rows[-1][bad[0]]} at step {count['global_step']}; the last good checkpoint stays in {run}; start again with a smaller --lr or --delta")
        write_csv(run / "metrics.csv", rows)
        if tracker:
            tracker.log(rows[-1], step=count["global_step"])

    # Tracker: optional, and never a reason to stop
    tracker, started = None, time.time() - count["wall_seconds"]
    if args.track:
        try:
            import wandb

            tracker = wandb.init(project=args.wandb_project, entity=args.wandb_entity, name=run.name, id=run.name, resume="allow",
                                 config=asdict(args), dir=str(run))  # fmt: skip
        except Exception as error:
            print(f"warning: --track: wandb does not start ({error}); training goes on without it", file=sys.stderr)

    print(f"LP-DS on {args.env_id}, {device}. Run folder: {run}")
    print(f"decoder: {decoder.config['kind']}, {sum(p.numel() for p in decoder.parameters()):,} frozen parameters, Ta {chunk}, d {d}, "
          f"{card['path']} ({card['checksum']})")  # fmt: skip
    print("settings: " + ", ".join(f"{k}={v}" for k, v in asdict(args).items() if v != ""))
    if not evals:  # Delta = 0 is where everything starts, and what everything is compared with
        report(evaluation(decoder))
        checkpoint()
    frozen = float(evals[0]["return"].mean())
    print(f"frozen return {frozen:.0f} over {args.eval_episodes} episodes (card: {card.get('frozen_return', float('nan')):.0f})")

    learners = {"critic": lambda: gradient_step(agent, replay, args, False), "all": lambda: gradient_step(agent, replay, args, True),
                "distill": lambda: distill(agent, replay, args)}  # fmt: skip
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: stop.append(n))
    plain = args.no_progress or not sys.stderr.isatty()
    bar = tqdm(total=args.total_timesteps, initial=count["global_step"], disable=plain, dynamic_ncols=True, unit="step")
    mark = (count["global_step"], time.time())
    while count["global_step"] < args.total_timesteps and not stop:
        before = count["global_step"]
        crossed = lambda every: count["global_step"] // every > before // every  # noqa: E731

        # (1) Act: eps ~ N(0, I), w = eps + Delta(s), a = Phi(w; s). Delta is 0 during the prior roll-outs.
        with torch.no_grad():
            action = agent.act(torch.as_tensor(obs, device=device), torch.randn(args.num_envs, d, device=device))

        # (2) Step: each environment executes its chunk open loop
        next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
        final, real_next_obs = infos.get("final_info", {}), next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]  # next_obs already belongs to the following episode
            episodes.append([float(final["episode"]["r"][i]), float(final["episode"]["l"][i]), float(final["success"][i])])
        count["global_step"] += int(np.sum(infos.get("steps", 0)) + np.sum(final.get("steps", 0)))
        count["vector_steps"] += 1

        # (3) Store. A time limit is no end of the world: only `terminated` stops the bootstrap.
        # differs from DSRL: it stores time limits as terminal, which caps the value of a gait that never falls
        replay.add(obs=obs, action=action, reward=reward, next_obs=real_next_obs, terminated=terminated)
        obs = next_obs

        # (4) Train: utd x [Q^A, then Delta and alpha], then distill_steps x Q^W
        if before < args.prior_steps <= count["global_step"] and args.reward_scale == "auto":
            agent.reward_scale.fill_(reward_scale(replay, args.num_envs, args.gamma))
        if count["global_step"] >= args.prior_steps and count["vector_steps"] % args.train_freq == 0:
            steer = count["global_step"] >= args.prior_steps + args.warmup_steps
            for _ in range(args.utd):
                info = learners["all" if steer else "critic"]()
            if args.perturb == "noise" and args.distill_steps:
                info = info | learners["distill"]()
            count["gradient_steps"] += args.utd

        # (5) Log. Losses stay on the device until here.
        finished = count["global_step"] >= args.total_timesteps
        evaluate_now = crossed(args.eval_every) or finished
        if crossed(args.log_every) or evaluate_now:
            row = {k: float(v) for k, v in info.items()} | {"trust_region/delta": args.delta}
            row["charts/SPS"] = (count["global_step"] - mark[0]) / (time.time() - mark[1])
            if episodes:
                row |= dict(zip(("charts/episodic_return", "charts/episodic_length", "charts/success"), np.mean(episodes, 0)))
            if count["gradient_steps"]:
                row |= probe(agent, replay.sample(64)["obs"], count["global_step"])
            episodes = []

            # (6) Evaluate on the fixed seeds, save
            if evaluate_now:
                row |= evaluation(agent.act)
            report(row)
            mark = (count["global_step"], time.time())
            if evaluate_now:
                if row["eval/episodic_return"] >= max(float(e["return"].mean()) for e in evals):
                    best = {"agent": agent.state_dict(), "args": asdict(args), "count": count, "script": Path(__file__).name}
                    save(run / "best.pt", partial(torch.save, best))
                checkpoint()
                bar.clear()
                print(f"step {count['global_step']:>7}  return {row['eval/episodic_return']:6.0f} (frozen {frozen:.0f})  success "
                      f"{row['eval/success']:.2f}  E||Delta||^2/delta {row.get('trust_region/violation', -1) + 1:.2f}  alpha "
                      f"{float(agent.alpha):.3g}  q_w_corr {float(row.get('losses/q_w_corr', 0)):.2f}  {row['charts/SPS']:.0f} steps/s", flush=True)  # fmt: skip
        bar.update(count["global_step"] - before)

    bar.close()
    if stop:
        checkpoint()
        print(f"stopped at step {count['global_step']} and saved; continue with: python {sys.argv[0]} --resume {run}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    plot_curves(run / "curves.png", rows, f"{args.env_id}, delta {args.delta} ({args.delta_norm})")
    print(f"finished: return {rows[-1]['eval/episodic_return']:.0f}, frozen {frozen:.0f}; curves in {run / 'curves.png'}")
