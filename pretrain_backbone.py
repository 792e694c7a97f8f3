# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco>=3.2,<3.10", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.66",
#   "h5py>=3.10", "minari[hdf5]>=0.5.3",
# ]
# ///
"""Behaviour cloning of the decoder Phi that LP-DS later keeps frozen.

A diffusion decoder learns to predict the noise that was mixed into an action chunk (DDPM, DPPO's cosine schedule);
a flow decoder learns the velocity of the straight path from noise to the chunk (rectified flow):

    diffusion   min E || e  - net(sqrt(abar_t) a + sqrt(1 - abar_t) e, t, s) ||^2      decoded by DDIM, eta 0
    flow        min E || (a - e) - net((1 - t) e + t a, t, s) ||^2                     decoded by Euler steps

Both use the same residual MLP, so that they can be compared. Everything is in the min-max normalised coordinates
of the data set. The result is one file that `--backbone` of every script takes, with a card that says where it comes
from and how good it is when it is frozen.

    python pretrain_backbone.py --env-id Hopper-v4 --data hopper_medium_v4.npz --output hopper.pt
    python pretrain_backbone.py --env-id Walker2d-v5 --data minari:mujoco/walker2d/medium-v0 --kind flow --output w.pt
    python lpds_continuous.py --env-id Hopper-v4 --backbone hopper.pt

Docs: docs/pretrain_backbone.md
"""

import difflib
import math
import os
import pickle
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import trange


@dataclass
class Args:
    # Data, result and frozen evaluation
    data: str
    """episodes to clone: FILE.npz (keys observations, actions, terminals, timeouts), a D4RL or robomimic FILE.hdf5,
    a folder of D3IL's Avoiding demonstrations (*.pkl), or minari:DATASET_ID, which the minari package downloads"""
    output: str
    """checkpoint to write, FILE.pt"""
    source: str = ""
    """one sentence on what the data is and its licence, for the card"""
    obs_keys: str = "robot0_eef_pos,robot0_eef_quat,robot0_gripper_qpos,object"
    """observation arrays of a robomimic file to concatenate, in this order"""
    only_successful: bool = False
    """clone only episodes that succeed at some step, by the array `success` of a FILE.npz"""
    env_id: str = ""
    """environment of the frozen evaluation, for example Hopper-v4, or MODULE:ENV_ID where a package registers it;
    empty: no evaluation, and the card has no score"""
    eval_episodes: int = 100
    """episodes of the frozen evaluation; its mean goes to the card"""

    # Decoder
    kind: Literal["diffusion", "flow"] = "diffusion"
    """diffusion: noise prediction, DDIM at use; flow: velocity prediction, Euler at use"""
    chunk: int = 4
    """primitive actions decoded at once and executed open loop (T_a)"""
    hidden_size: int = 512
    """width of the residual MLP; decoding is most of the cost of LP-DS on a CPU, and 256 costs a quarter of 512"""
    num_layers: int = 3
    """hidden layers counted as DPPO does: 3 is one input layer and one residual block of two; odd"""
    time_dim: int = 16
    """size of the embedding of the denoising time; even, at least 4"""
    activation: Literal["relu", "mish"] = "relu"
    """relu is DPPO's on Gym, mish on robomimic"""
    train_steps: int = 20
    """denoising steps of the training schedule; a flow uses it as the scale of its time embedding"""
    sample_steps: int = 5
    """DDIM or Euler steps of the decoder, at most --train-steps for DDIM"""

    # Training
    iterations: int = 300_000
    """gradient steps; DPPO's 200 epochs over a million steps of data would be 1.5 million"""
    batch_size: int = 128
    """action chunks a gradient step"""
    lr: float = 1e-3
    """AdamW's learning rate at the start; falls as half a cosine to a tenth of it"""
    weight_decay: float = 1e-6
    """AdamW's weight decay"""
    ema_decay: float = 0.995
    """decay of the averaged weights, updated every 10 gradient steps; the averaged weights are what is saved, so give
    runs of a few thousand steps less, for example 0.9"""
    held_out: float = 0.05
    """share of whole episodes kept out of training, on which the loss is reported"""
    log_every: int = 5_000
    """gradient steps between two rows of losses"""
    seed: int = 1
    """seed of the weights, batches and the split"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    num_threads: int = 1
    """CPU threads of torch; at these sizes a second one rarely pays"""
    no_progress: bool = False
    """plain lines instead of a progress bar"""


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


def check_args(args: Args) -> None:
    """Refuses what is known to be wrong before any work is done; types and choices tyro has checked."""
    at_least_1 = ("eval_episodes", "chunk", "hidden_size", "train_steps", "sample_steps", "iterations", "batch_size",
                  "log_every", "num_threads")  # fmt: skip
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in at_least_1] + [
        ("num_layers", args.num_layers > 0 and args.num_layers % 2 == 1, "an odd number; 3 is the input and one block"),
        ("time_dim", args.time_dim >= 4 and args.time_dim % 2 == 0, "an even number of at least 4"),
        ("sample_steps", args.kind == "flow" or args.sample_steps <= args.train_steps, "at most --train-steps"),
        ("lr", 0 < args.lr < math.inf, "a number above 0"),
        ("weight_decay", 0 <= args.weight_decay < math.inf, "a number of at least 0"),
        ("ema_decay", 0 <= args.ema_decay < 1, "a number in [0, 1)"),
        ("held_out", 0 <= args.held_out < 1, "a share in [0, 1)"),
        ("seed", args.seed >= 0, "at least 0"),
        ("only_successful", not args.only_successful or args.data.endswith(".npz"), "--data FILE.npz with it"),
    ]
    for name, accepted, expected in rules:
        require(accepted, f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")
    output = Path(args.output)
    writable = os.access(output.resolve().parent, os.W_OK) and not output.is_dir()
    require(writable, f"--output {output}: a folder, or in none that can be written; give FILE.pt in an existing one")
    same = output.resolve() == Path(args.data).resolve()
    require(not same, f"--output {output}: is the data itself, which would be lost; give another name")
    try:
        torch.zeros(1, device="cpu" if args.device == "auto" else args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        require(False, f"--device {args.device}: torch cannot use it ({first_line(error)}); use auto, cpu or cuda")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def split_episodes(ends):  # (N,) bool, True on the last step of each episode -> list of slices
    stops = np.flatnonzero(ends) + 1
    stops = stops if len(stops) and stops[-1] == len(ends) else np.append(stops, len(ends))
    return [slice(a, b) for a, b in zip(np.append(0, stops[:-1]), stops, strict=True)]


def read_flat(path: str, arrays, only_successful: bool = False) -> list:
    """Episodes from arrays that run through all of them (our .npz, D4RL's .hdf5): `lengths` or the end flags cut."""
    keys = ("observations", "actions", "terminals", "timeouts")
    missing = [key for key in keys if key not in arrays]
    require(not missing, f"--data {path}: has no {' and no '.join(missing)}; expected {', '.join(keys)}")
    obs, actions, terminals, timeouts = (arrays[key][()] for key in keys)
    counts = [len(array) for array in (obs, actions, terminals, timeouts)]
    require(len(set(counts)) == 1, f"--data {path}: {', '.join(keys)} have {counts} rows; expected as many of each")
    ends = terminals.astype(bool).reshape(-1) | timeouts.astype(bool).reshape(-1)
    flags = f"terminals are {terminals.shape}, timeouts {timeouts.shape}"
    require(len(ends) == len(obs), f"--data {path}: {flags}; expected one flag a step")
    slices = split_episodes(ends)
    if "lengths" in arrays:
        lengths = arrays["lengths"][()].reshape(-1).astype(np.int64)
        whole = lengths.sum() == len(obs) and (lengths >= 0).all()
        require(whole, f"--data {path}: lengths add up to {lengths.sum()}, but there are {len(obs)} steps; rewrite it")
        stops = np.cumsum(lengths)
        slices = [slice(a, b) for a, b in zip(stops - lengths, stops, strict=True)]
    if only_successful:
        success = arrays["success"][()].reshape(-1) if "success" in arrays else []
        flags = f"{path} has {len(success)} flags `success` for {len(obs)} steps"
        require(len(success) == len(obs), f"--only-successful: {flags}; leave it out, or add them")
        slices = [s for s in slices if success[s].any()]
        require(slices, f"--only-successful: no episode of {path} succeeds; leave it out")
    return [(obs[s], actions[s]) for s in slices]


def read_npz(path: str, only_successful: bool) -> list:
    with np.load(path, allow_pickle=False) as file:  # a file from others is data, it cannot run code
        return read_flat(path, file, only_successful)


def read_hdf5(path: str, obs_keys: list) -> list:
    try:
        import h5py
    except ImportError:
        require(False, f"--data {path}: reading .hdf5 needs h5py; pip install h5py")
    with h5py.File(path, "r") as file:
        if "data" not in file:
            return read_flat(path, file)
        demos = sorted(file["data"], key=lambda name: int(name.split("_")[-1]))  # robomimic: data/demo_7/obs/KEY
        episodes = []
        for demo in (file["data"][name] for name in demos):
            missing, where = sorted(set(obs_keys) - set(demo["obs"])), f"{demo.name} of {path}"
            has = ", ".join(demo["obs"])
            require(not missing, f"--obs-keys {', '.join(missing)}: not in {where}, which has {has}")
            episodes.append((np.concatenate([demo["obs"][key][()] for key in obs_keys], -1), demo["actions"][()]))
    return episodes


def read_minari(path: str, env_id: str) -> list:
    name = path.removeprefix("minari:")
    try:
        import minari
    except ImportError:
        require(False, f"--data {path}: needs the minari package; pip install 'minari[hdf5]'")
    try:
        dataset = minari.load_dataset(name, download=True)
    except Exception as error:  # network, unknown id, broken file: minari raises many kinds
        require(False, f"--data {path}: minari could not load it ({first_line(error)}); check the id and the network")
    for space in (dataset.observation_space, dataset.action_space):
        box, kind = isinstance(space, gym.spaces.Box), type(space).__name__
        require(box, f"--data {path}: has a {kind} space; only Box observations and actions can be cloned")
    recorded = dataset.env_spec.id if dataset.env_spec else ""  # none: the data was not recorded from an environment
    known, asked = (name.rpartition(":")[2].rsplit("-v", 1)[0] for name in (recorded, env_id))  # less its version
    if known and asked and known != asked:
        what = f"was recorded in {recorded}, not in {env_id}"
        print(f"warning: --data {path}: {what}; are observations and actions the same there?", file=sys.stderr)
    # Minari keeps the observation after the last action as well
    return [(episode.observations[: len(episode.actions)], episode.actions) for episode in dataset.iterate_episodes()]


class ArraysOnly(pickle.Unpickler):
    """Loads pickles of plain Python values and numpy arrays. Whatever else a pickle asks for is refused, not run."""

    CORE = np.zeros(1).__reduce__()[0].__module__.rpartition(".")[0]  # numpy.core until numpy 2, then numpy._core
    SAFE = {"numpy": ("ndarray", "dtype"), "multiarray": ("_reconstruct", "scalar"), "numeric": ("_frombuffer",)}

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes the bytes of an array
            return lambda text, encoding: text.encode("latin1")
        package, _, last = module.rpartition(".")
        if name in self.SAFE.get(last, ()) and package in ("", "numpy.core", "numpy._core"):
            return super().find_class(f"{self.CORE}.{last}" if package else module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array; nothing was run")


def read_d3il(path: str) -> list:
    """D3IL's Avoiding: obs (desired xy, measured xy), action = by how much the desired xy moves until the next row."""
    episodes = []
    for file in sorted(Path(path).glob("*.pkl")):
        with file.open("rb") as opened:
            robot = ArraysOnly(opened).load()["robot"]
        desired, measured = (np.asarray(robot[key], np.float64)[:, :2] for key in ("des_c_pos", "c_pos"))
        episodes.append((np.concatenate([desired, measured], 1)[:-1], np.diff(desired, axis=0)))
    require(episodes, f"--data {path}: a folder without *.pkl; give that of D3IL's Avoiding demonstrations, or a file")
    return episodes


def load_episodes(args: Args) -> list:
    """[(obs (T, obs_dim), actions (T, A)), ...] float32 from --data; ends the program where it cannot be cloned."""
    path, suffix = args.data, Path(args.data).suffix
    kinds = "give an .npz, an .hdf5, a folder of D3IL's or minari:DATASET_ID"
    try:
        if path.startswith("minari:"):
            episodes = read_minari(path, args.env_id)
        elif Path(path).is_dir():
            episodes = read_d3il(path)
        else:
            require(Path(path).is_file(), f"--data {path}: no such file; {kinds}")
            require(suffix in (".npz", ".hdf5", ".h5"), f"--data {path}: unknown kind of file; {kinds}")
            npz = suffix == ".npz"
            episodes = read_npz(path, args.only_successful) if npz else read_hdf5(path, args.obs_keys.split(","))
    except Exception as error:  # what a broken file makes numpy, zipfile and h5py raise has no common type
        require(False, f"--data {path}: cannot be read ({first_line(error)}); give plain numeric arrays, no pickles")
    for i, (obs, actions) in enumerate(episodes):
        where, shapes = f"--data {path}: episode {i}", f"observations {obs.shape} and actions {actions.shape}"
        arrays = obs.ndim == actions.ndim == 2 and obs.dtype.kind in "fiu" and actions.dtype.kind in "fiu"
        require(arrays, f"{where} has {shapes} of {obs.dtype} and {actions.dtype}; expected numeric (T, dim) arrays")
        require(len(obs) == len(actions), f"{where} has {shapes}; expected as many of each")
        require(len(actions) > 0, f"{where} has zero length; remove it")
        found, first = (obs.shape[1], actions.shape[1]), tuple(x.shape[1] for x in episodes[0])
        require(found == first, f"{where} has {found} observation and action dimensions, episode 0 has {first}")
        with np.errstate(over="ignore"):
            episodes[i] = obs.astype(np.float32), actions.astype(np.float32)
        finite = all(np.isfinite(x).all() for x in episodes[i])
        require(finite, f"{where} holds values that are not finite (in float32); repair or remove it")
    longest = max((len(actions) for _, actions in episodes), default=0)
    require(longest >= args.chunk, f"--chunk {args.chunk}: the longest episode of {path} has {longest} steps; use less")
    return episodes


def check_env(env_id: str, stats: dict) -> None:
    """An environment that does not exist or does not fit the data must not be found out after an hour of training."""
    low, high, action_dim = stats["obs_min"], stats["obs_max"], len(stats["action_min"])
    known, close = env_id in gym.registry or ":" in env_id, difflib.get_close_matches(env_id, [*gym.registry], 1, 0)
    hint = f"did you mean {close[0]}? MODULE:ENV_ID is for what another package registers"
    require(known, f"--env-id {env_id}: unknown; {hint}")
    try:
        env = gym.make(env_id)
    except Exception as error:  # a missing package, a retired version: gymnasium raises many kinds
        require(False, f"--env-id {env_id}: gymnasium cannot make it ({first_line(error)})")
    found = (env.observation_space.shape, env.action_space.shape)
    has = f"has observations {found[0]} and actions {found[1]}, but the data {low.shape} and ({action_dim},)"
    fits = found == (low.shape, (action_dim,))
    require(fits, f"--env-id {env_id}: {has}; give the environment the data comes from, or none")
    # The same sizes do not say that the coordinates are in the same order. Data that lacks the starts is rare but fine
    start, slack = np.stack([env.reset(seed=i)[0] for i in range(20)]), 0.1 * (high - low) + 1e-6
    away = np.flatnonzero(((start < low - slack) | (start > high + slack)).mean(0) > 0.5).tolist()
    if away:
        what = f"its episodes begin where the data never is, in observation coordinates {away}"
        print(f"warning: --env-id {env_id}: {what}; are the data's in the same order and units?", file=sys.stderr)
    env.close()


def statistics(episodes: list) -> dict:
    """Smallest and largest value of every dimension, over all episodes, held out or not (as DPPO does)."""
    return {
        "obs_min": np.min([obs.min(0) for obs, _ in episodes], 0),
        "obs_max": np.max([obs.max(0) for obs, _ in episodes], 0),
        "action_min": np.min([actions.min(0) for _, actions in episodes], 0),
        "action_max": np.max([actions.max(0) for _, actions in episodes], 0),
    }


def windows(episodes: list, chunk: int, stats: dict):
    """Normalised (obs (N, obs_dim), action chunks (N, chunk*A)): every start with a full window inside its episode."""
    obs_low, obs_span = stats["obs_min"], stats["obs_max"] - stats["obs_min"] + 1e-6
    act_low, act_span = stats["action_min"], stats["action_max"] - stats["action_min"] + 1e-6
    all_obs, all_chunks = [], []
    for obs, actions in episodes:
        n = max(len(actions) - chunk + 1, 0)
        index = np.arange(n)[:, None] + np.arange(chunk)
        all_obs.append(2 * ((obs[:n] - obs_low) / obs_span - 0.5))
        all_chunks.append((2 * (actions[index] - act_low) / act_span - 1).reshape(n, chunk * actions.shape[1]))
    return torch.as_tensor(np.concatenate(all_obs)).float(), torch.as_tensor(np.concatenate(all_chunks)).float()


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


def stopped(number, frame):
    print("stopped; nothing was written", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopped)

    # (1) Data: whole episodes are held out; those shorter than a chunk have no window and are no part of the split
    episodes = load_episodes(args)
    obs_dim, action_dim = (x.shape[1] for x in episodes[0])
    stats = statistics(episodes)
    if args.env_id:
        check_env(args.env_id, stats)
    usable = [episode for episode in episodes if len(episode[1]) >= args.chunk]
    order, n_held = np.random.default_rng(args.seed).permutation(len(usable)), int(args.held_out * len(usable))
    obs, chunks = (x.to(device) for x in windows([usable[i] for i in order[n_held:]], args.chunk, stats))
    held = [x.to(device) for x in windows([usable[i] for i in order[:n_held]], args.chunk, stats)] if n_held else None

    # (2) Network, its running average, optimiser
    config = {
        "kind": args.kind, "obs_dim": obs_dim, "action_dim": action_dim, "chunk": args.chunk,
        "hidden": [args.hidden_size] * args.num_layers, "cond_hidden": [], "time_dim": args.time_dim,
        "activation": args.activation, "train_steps": args.train_steps, "sample_steps": args.sample_steps,
    }  # fmt: skip
    decoder, ema = Decoder(config).to(device), Decoder(config).to(device).requires_grad_(False)
    ema.load_state_dict(decoder.state_dict())
    optimizer = torch.optim.AdamW(decoder.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations, args.lr / 10)
    abar = torch.as_tensor(Decoder.alpha_bar(args.train_steps), device=device).float()
    print(
        f"{args.kind} decoder, {sum(p.numel() for p in decoder.parameters()):,} parameters, on {device}: "
        f"{len(obs):,} chunks from {len(usable) - n_held} episodes, {n_held} episodes held out, "
        f"{len(episodes) - len(usable)} shorter than a chunk",
        flush=True,
    )

    # (3) Behaviour cloning
    started, running, losses = time.time(), torch.zeros((), device=device), []
    progress = trange(1, args.iterations + 1, disable=args.no_progress or not sys.stderr.isatty(), dynamic_ncols=True)
    for iteration in progress:
        index = torch.randint(len(obs), (args.batch_size,), device=device)
        loss = bc_loss(decoder, obs[index], chunks[index], abar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        running += loss.detach()

        # The average moves at DPPO's cadence; before a fiftieth of the training it is the network itself
        last = iteration == args.iterations
        if iteration % 10 == 0 or last:
            decay = args.ema_decay if iteration > max(args.iterations // 50, 10) else 0.0
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(decoder.parameters()), 1 - decay)

        # Losses stay on the device until here
        if iteration % args.log_every == 0 or last:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)  # the same noise at every row, so that the column shows the trend only
                held_loss = bc_loss(ema, *held, abar).item() if held else math.nan
            mean_loss = running.item() / ((iteration - 1) % args.log_every + 1)
            running.zero_()
            finite = math.isfinite(mean_loss) and (math.isfinite(held_loss) or not held)
            require(finite, f"--lr {args.lr}: the loss is no longer finite at iteration {iteration}; use a smaller one")
            losses.append({"iteration": iteration, "loss": round(mean_loss, 5), "held_out": round(held_loss, 5)})
            progress.set_postfix(loss=f"{mean_loss:.4f}", held_out=f"{held_loss:.4f}")
            if progress.disable:
                seconds = time.time() - started
                print(f"{iteration:>8}  loss {mean_loss:.4f}  held out {held_loss:.4f}  {seconds:.0f} s", flush=True)

    # (4) How good is it when it is frozen? Sampled noise, fixed seeds: what every script prints as its baseline
    ema.freeze()
    not_recipe = ("data", "output", "source", "device", "no_progress")
    card = {
        "env_id": args.env_id, "data": args.data if args.data.startswith("minari:") else Path(args.data).name,
        "source": args.source, "recipe": {k: v for k, v in asdict(args).items() if k not in not_recipe},
        "loss": losses[-1]["loss"], "held_out_loss": losses[-1]["held_out"], "losses": losses,
        "train_seconds": round(time.time() - started),
    }  # fmt: skip
    if args.env_id:
        envs = [make_env(args.env_id, args.chunk, stats) for _ in range(args.eval_episodes)]
        result = evaluate(ema, envs, 10_000, device)
        card |= {
            "frozen_return": float(result["return"].mean()), "frozen_return_std": float(result["return"].std()),
            "frozen_success": float(result["success"].mean()), "frozen_length": float(result["length"].mean()),
            "eval_episodes": args.eval_episodes, "eval_seed": 10_000,
        }  # fmt: skip
        # Where there are several ways to succeed, how many of them it takes
        routes = {getattr(env.unwrapped, "mode", -1) for env in envs} - {-1}
        card |= {"frozen_modes": len(routes)} if routes else {}
        print(
            f"frozen: return {card['frozen_return']:.0f} +- {card['frozen_return_std']:.0f}, success "
            f"{card['frozen_success']:.2f}, length {card['frozen_length']:.0f}, {args.eval_episodes} episodes"
        )

    # (5) Save: written beside the target and renamed, so that a crash never leaves half a file
    checkpoint = {
        "format": 1, "kind": args.kind, "config": config, "card": card,
        "model": {k: v.cpu() for k, v in ema.state_dict().items()},
        "normalization": {k: torch.as_tensor(v) for k, v in stats.items()},
    }  # fmt: skip
    temporary = Path(args.output + ".tmp")
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, args.output)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        full = f"cannot be written ({first_line(error)}); free some space or use another folder"
        require(False, f"--output {args.output}: {full}")
    env = f"--env-id {args.env_id.rsplit(':')[-1]} " if args.env_id else ""
    print(f"wrote {args.output}; steer it by the script for its environment with {env}--backbone {args.output}")
