# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.2", "mujoco>=3.2,<3.10", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.66", "h5py>=3.10", "minari[hdf5]>=0.5.3"]
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

import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import trange


@dataclass
class Args:
    data: str
    """episodes to clone: FILE.npz (keys observations, actions, terminals, timeouts), a D4RL or robomimic FILE.hdf5,
    or minari:DATASET_ID, which the minari package downloads"""
    output: str
    """checkpoint to write, FILE.pt"""
    env_id: str = ""
    """environment of the frozen evaluation, for example Hopper-v4; empty: no evaluation, the card says so"""
    kind: str = "diffusion"
    """diffusion (noise prediction, DDIM at use) or flow (velocity prediction, Euler at use)"""
    chunk: int = 4
    """primitive actions decoded at once and executed open loop (T_a)"""
    hidden_size: int = 512
    """width of the residual MLP; decoding is most of the cost of LP-DS on a CPU, and 256 costs a quarter of 512"""
    num_layers: int = 3
    """hidden layers counted as DPPO does: 3 is one input layer and one residual block of two; odd"""
    time_dim: int = 16
    """size of the embedding of the denoising time; even"""
    activation: str = "relu"
    """relu (DPPO on Gym) or mish (DPPO on robomimic)"""
    train_steps: int = 20
    """denoising steps of the training schedule; a flow uses it as the scale of its time embedding"""
    sample_steps: int = 5
    """DDIM or Euler steps of the decoder"""
    obs_keys: str = "robot0_eef_pos,robot0_eef_quat,robot0_gripper_qpos,object"
    """observation arrays of a robomimic file to concatenate, in this order"""

    iterations: int = 300_000
    """gradient steps; DPPO trains Gym decoders for about this many batches of 128"""
    batch_size: int = 128
    """action chunks a gradient step"""
    lr: float = 1e-3
    """AdamW's learning rate at the start; falls as half a cosine to a tenth of it"""
    weight_decay: float = 1e-6
    """AdamW's weight decay"""
    ema_decay: float = 0.995
    """decay of the averaged weights, updated every 10 gradient steps; the averaged weights are what is saved"""
    held_out: float = 0.05
    """share of whole episodes kept out of training, on which the loss is reported"""
    log_every: int = 5_000
    """gradient steps between two rows of losses"""
    eval_episodes: int = 100
    """episodes of the frozen evaluation; its mean goes to the card"""
    source: str = ""
    """one sentence on what the data is and its licence, for the card"""
    seed: int = 1
    """seed of the weights, batches and the split"""
    device: str = "cpu"
    """cpu, cuda or cuda:1"""
    num_threads: int = 1
    """CPU threads of torch; at these sizes a second one rarely pays"""
    no_progress: bool = False
    """plain lines instead of a progress bar"""


# --- shared: errors ---
def fail(message: str):
    """Ends the program with one sentence on stderr and exit code 2, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- end shared: errors ---
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


def split_episodes(ends):  # (N,) bool, True on the last step of each episode -> list of slices
    stops = np.flatnonzero(ends) + 1
    stops = stops if len(stops) and stops[-1] == len(ends) else np.append(stops, len(ends))
    return [slice(a, b) for a, b in zip(np.append(0, stops[:-1]), stops)]


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        missing = {"observations", "actions", "terminals", "timeouts"} - set(file.files)
        if missing:
            fail(f"--data {path}: has no {', '.join(sorted(missing))}; expected observations, actions, terminals, timeouts")
        obs, actions = file["observations"], file["actions"]
        ends = file["terminals"].astype(bool).reshape(-1) | file["timeouts"].astype(bool).reshape(-1)
        lengths = file["lengths"] if "lengths" in file.files else None
    if not len(obs) == len(actions) == len(ends):
        fail(f"--data {path}: {len(obs)} observations, {len(actions)} actions, {len(ends)} end flags; expected equal counts")
    if lengths is None:
        return [(obs[s], actions[s]) for s in split_episodes(ends)]
    if lengths.sum() != len(obs):
        fail(f"--data {path}: lengths add up to {lengths.sum()}, but there are {len(obs)} steps; rewrite the file")
    stops = np.cumsum(lengths)
    return [(obs[a:b], actions[a:b]) for a, b in zip(stops - lengths, stops)]


def read_hdf5(path, obs_keys):
    try:
        import h5py
    except ImportError:
        fail(f"--data {path}: reading .hdf5 needs h5py; pip install h5py")
    with h5py.File(path, "r") as file:
        if "data" in file:  # robomimic: data/demo_7/{actions, obs/KEY}
            demos = sorted(file["data"], key=lambda name: int(name.split("_")[-1]))
            for key in obs_keys:
                if key not in file["data"][demos[0]]["obs"]:
                    have = ", ".join(file["data"][demos[0]]["obs"])
                    fail(f"--obs-keys {key}: not in {path}, which has {have}")
            return [
                (np.concatenate([file["data"][d]["obs"][k][:] for k in obs_keys], -1), file["data"][d]["actions"][:])
                for d in demos
            ]
        missing = {"observations", "actions", "terminals"} - set(file)
        if missing:
            fail(f"--data {path}: has no {', '.join(sorted(missing))}; expected a D4RL or robomimic file")
        ends = file["terminals"][:].astype(bool)
        if "timeouts" in file:
            ends |= file["timeouts"][:].astype(bool)
        obs, actions = file["observations"][:], file["actions"][:]
    return [(obs[s], actions[s]) for s in split_episodes(ends)]


def read_minari(name):
    try:
        import minari
    except ImportError:
        fail(f"--data minari:{name}: needs the minari package; pip install 'minari[hdf5]'")
    try:
        dataset = minari.load_dataset(name, download=True)
    except Exception as error:  # network, unknown id, broken file: minari raises many kinds
        fail(f"--data minari:{name}: minari could not load it ({type(error).__name__}: {error}); check the id and the network")
    # Minari keeps the observation after the last action as well
    return [(episode.observations[: len(episode.actions)], episode.actions) for episode in dataset.iterate_episodes()]


def load_episodes(args):
    """List of (obs (T, obs_dim), actions (T, A)) float32; ends the program where the data cannot be cloned."""
    if args.data.startswith("minari:"):
        episodes = read_minari(args.data[len("minari:") :])
    elif not Path(args.data).is_file():
        fail(f"--data {args.data}: no such file; give an .npz, an .hdf5 or minari:DATASET_ID")
    elif args.data.endswith(".npz"):
        try:
            episodes = read_npz(args.data)
        except (ValueError, OSError, KeyError) as error:
            fail(f"--data {args.data}: cannot be read as an .npz without pickles ({error}); write plain arrays")
    elif args.data.endswith((".hdf5", ".h5")):
        episodes = read_hdf5(args.data, args.obs_keys.split(","))
    else:
        fail(f"--data {args.data}: unknown kind of file; give an .npz, an .hdf5 or minari:DATASET_ID")
    for i, (obs, actions) in enumerate(episodes):
        if obs.ndim != 2 or actions.ndim != 2 or obs.dtype.kind not in "fiu" or actions.dtype.kind not in "fiu":
            fail(f"--data {args.data}: episode {i} has observations {obs.shape} and actions {actions.shape}; expected two numeric (T, dim) arrays")
        if len(actions) == 0:
            fail(f"--data {args.data}: episode {i} has zero length; remove it")
        if not (np.isfinite(obs).all() and np.isfinite(actions).all()):
            fail(f"--data {args.data}: episode {i} holds values that are not finite; repair or remove it")
    if not any(len(actions) >= args.chunk for _, actions in episodes):
        fail(f"--chunk {args.chunk}: no episode of {args.data} is that long; use a smaller chunk")
    return [(obs.astype(np.float32), actions.astype(np.float32)) for obs, actions in episodes]


def windows(episodes, chunk, stats):
    """Normalised (obs (N, obs_dim), action chunks (N, chunk*A)): every start with a full window inside its episode."""
    obs_low, obs_span = stats["obs_min"], stats["obs_max"] - stats["obs_min"] + 1e-6
    act_low, act_span = stats["action_min"], stats["action_max"] - stats["action_min"] + 1e-6
    all_obs, all_chunks = [], []
    for obs, actions in episodes:
        n = len(actions) - chunk + 1
        if n > 0:
            index = np.arange(n)[:, None] + np.arange(chunk)
            all_obs.append(2 * ((obs[:n] - obs_low) / obs_span - 0.5))
            all_chunks.append((2 * (actions[index] - act_low) / act_span - 1).reshape(n, -1))
    return torch.as_tensor(np.concatenate(all_obs)).float(), torch.as_tensor(np.concatenate(all_chunks)).float()


def bc_loss(decoder, obs, chunks, abar):
    """Mean squared error of the noise (diffusion, DDPM) or of the velocity (flow, rectified flow)."""
    noise = torch.randn_like(chunks)
    if decoder.config["kind"] == "diffusion":
        t = torch.randint(len(abar), (len(obs),), device=obs.device)
        a = abar[t][:, None]
        x, target = a.sqrt() * chunks + (1 - a).sqrt() * noise, noise
    else:
        u = torch.rand(len(obs), 1, device=obs.device)
        x, target, t = (1 - u) * noise + u * chunks, chunks - noise, u[:, 0] * decoder.config["train_steps"]
    return F.mse_loss(decoder.network(x, decoder.embed_time(t), obs), target)


def validate(args):
    for flag, value, accepted in (("--kind", args.kind, ("diffusion", "flow")), ("--activation", args.activation, ("relu", "mish"))):
        if value not in accepted:
            fail(f"{flag} {value}: expected one of {', '.join(accepted)}")
    for name in ("chunk", "hidden_size", "train_steps", "sample_steps", "iterations", "batch_size", "log_every"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.num_layers < 1 or args.num_layers % 2 == 0:
        fail(f"--num-layers {args.num_layers}: expected an odd number; 3 is one input layer and one residual block")
    if args.time_dim < 4 or args.time_dim % 2:
        fail(f"--time-dim {args.time_dim}: expected an even number of at least 4")
    if args.kind == "diffusion" and args.sample_steps > args.train_steps:
        fail(f"--sample-steps {args.sample_steps}: expected at most --train-steps {args.train_steps}")
    if not 0 <= args.held_out < 1:
        fail(f"--held-out {args.held_out}: expected a share in [0, 1)")
    if not Path(args.output).resolve().parent.is_dir():
        fail(f"--output {args.output}: the folder does not exist; create it first")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    validate(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    device = torch.device(args.device)

    # (1) Data: whole episodes are held out, statistics are taken over all of them (as DPPO does)
    episodes = load_episodes(args)
    stats = {
        "obs_min": np.min([o.min(0) for o, _ in episodes], 0), "obs_max": np.max([o.max(0) for o, _ in episodes], 0),
        "action_min": np.min([a.min(0) for _, a in episodes], 0), "action_max": np.max([a.max(0) for _, a in episodes], 0),
    }  # fmt: skip
    order = np.random.default_rng(args.seed).permutation(len(episodes))
    n_held = int(args.held_out * len(episodes))
    obs, chunks = (x.to(device) for x in windows([episodes[i] for i in order[n_held:]], args.chunk, stats))
    held = [x.to(device) for x in windows([episodes[i] for i in order[:n_held]], args.chunk, stats)] if n_held else None

    # (2) Network, its running average, optimiser
    config = {
        "kind": args.kind, "obs_dim": obs.shape[1], "action_dim": chunks.shape[1] // args.chunk, "chunk": args.chunk,
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
        f"{len(obs):,} chunks from {len(episodes) - n_held} episodes, {n_held} episodes held out"
    )

    # (3) Behaviour cloning
    started, running = time.time(), torch.zeros((), device=device)
    progress = trange(1, args.iterations + 1, disable=args.no_progress or not sys.stderr.isatty(), dynamic_ncols=True)
    losses = []
    for iteration in progress:
        index = torch.randint(len(obs), (args.batch_size,), device=device)
        loss = bc_loss(decoder, obs[index], chunks[index], abar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        running += loss.detach()
        if iteration % 10 == 0:  # DPPO's cadence; before a fiftieth of the training the average is the network itself
            decay = args.ema_decay if iteration > args.iterations // 50 else 0.0
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(decoder.parameters()), 1 - decay)
        if iteration % args.log_every == 0 or iteration == args.iterations:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)  # the same noise at every row, so that the column shows the trend only
                held_loss = bc_loss(ema, *held, abar).item() if held else float("nan")
            row = {
                "iteration": iteration, "loss": round(running.item() / ((iteration - 1) % args.log_every + 1), 5),
                "held_out": round(held_loss, 5),
            }  # fmt: skip
            losses.append(row)
            running.zero_()
            if not math.isfinite(row["loss"]):
                fail(f"--lr {args.lr}: the loss became {row['loss']} at iteration {iteration}; use a smaller learning rate")
            progress.set_postfix(loss=row["loss"], held_out=row["held_out"])
            if progress.disable:
                print(f"iteration {iteration:>7}  loss {row['loss']:.4f}  held out {held_loss:.4f}  {time.time() - started:.0f} s", flush=True)

    # (4) How good is it when it is frozen? Sampled noise, fixed seeds: what every script prints as its baseline
    ema.freeze()
    card = {
        "env_id": args.env_id, "data": Path(args.data).name, "source": args.source,
        "recipe": {k: v for k, v in asdict(args).items() if k not in ("data", "output", "source", "device", "no_progress")},
        "loss": losses[-1]["loss"], "held_out_loss": losses[-1]["held_out"], "losses": losses,
        "train_seconds": round(time.time() - started),
    }  # fmt: skip
    if args.env_id:
        envs = [make_env(args.env_id, args.chunk, stats) for _ in range(args.eval_episodes)]
        expected = (envs[0].observation_space.shape[0], envs[0].action_space.shape[0])
        if expected != (config["obs_dim"], decoder.dim):
            fail(f"--env-id {args.env_id}: has {expected[0]} observations and chunks of {expected[1]}, the data {config['obs_dim']} and {decoder.dim}; not evaluated or saved")
        result = evaluate(ema, envs, 10_000, device)
        card |= {
            "frozen_return": float(result["return"].mean()), "frozen_return_std": float(result["return"].std()),
            "frozen_success": float(result["success"].mean()), "frozen_length": float(result["length"].mean()),
            "eval_episodes": args.eval_episodes, "eval_seed": 10_000,
        }  # fmt: skip
        print(f"frozen: return {card['frozen_return']:.0f} +- {card['frozen_return_std']:.0f}, success {card['frozen_success']:.2f}, length {card['frozen_length']:.0f} over {args.eval_episodes} episodes of {args.env_id}")

    # (5) Save: written beside the target and renamed, so that a crash never leaves half a file
    checkpoint = {
        "format": 1, "kind": args.kind, "config": config, "card": card, "model": ema.state_dict(),
        "normalization": {k: torch.as_tensor(v) for k, v in stats.items()},
    }  # fmt: skip
    torch.save(checkpoint, args.output + ".tmp")
    os.replace(args.output + ".tmp", args.output)
    print(f"wrote {args.output}; use it: python lpds_continuous.py --env-id {args.env_id or 'ENV_ID'} --backbone {args.output}")
