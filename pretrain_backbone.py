# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco>=3.2,<3.10", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.66", "h5py>=3.10", "minari[hdf5]>=0.5.3"]
# ///
"""Behaviour cloning of the decoder Phi that LP-DS later keeps frozen.

    diffusion   min E||e - net(sqrt(abar_t) a + sqrt(1 - abar_t) e, t, s)||^2, then DDIM with eta 0
    flow        min E||(a - e) - net((1 - u) e + u a, u, s)||^2, then Euler's or Heun's method

a is a chunk of actions, s the observation at its start, e ~ N(0, I). Both use DPPO's residual MLP
in the min-max normalised coordinates of the data. The result is one file for --backbone of every
script; its card says where it comes from and how good it is. Docs: docs/pretrain_backbone.md

    python pretrain_backbone.py --env-id Hopper-v4 --data hopper_medium.npz --output hopper.pt
    python pretrain_backbone.py --resample hopper.pt --sample-steps 10 --output hopper10.pt
    python lpds_continuous.py --env-id Hopper-v4 --backbone hopper.pt
"""

import copy
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm, trange


@dataclass
class Args:
    output: str
    """decoder file to write, FILE.pt"""
    data: str = ""
    """episodes to clone: FILE.npz, FILE.hdf5 of D4RL or robomimic, or minari:DATASET_ID"""
    resample: str = ""
    """in place of --data: decoder file to sample by other --sample-steps or --solver, untrained"""
    source: str = ""
    """one sentence on what the data is and its licence, for the card"""
    obs_keys: str = "robot0_eef_pos,robot0_eef_quat,robot0_gripper_qpos,object"
    """observation arrays of a robomimic file to concatenate, in this order"""
    only: str = ""
    """clone only the episodes flagged by array NAME of a .npz, or by mask NAME of robomimic's"""
    env_id: str = ""
    """environment to play it in, Hopper-v4 or MODULE:ENV_ID; without, the card has no score"""
    eval_episodes: int = 100
    """episodes of the frozen evaluation; its mean goes to the card"""
    seed: int = 1
    """seed of the weights, batches and the split"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda or cuda:1"""

    # Decoder
    kind: Literal["diffusion", "flow"] = "diffusion"
    """diffusion: noise prediction; flow: velocity prediction"""
    chunk: int = 4
    """primitive actions decoded at once and executed open loop (Ta)"""
    hidden_size: int = 512
    """width of the residual MLP; to decode costs four times less with 256"""
    activation: Literal["relu", "mish"] = "relu"
    """relu is DPPO's on Gym, mish on robomimic"""
    train_steps: int = 20
    """denoising steps of the training schedule; for a flow only the unit of time"""
    sample_steps: int = 5
    """steps of the decoder; at most --train-steps for a diffusion"""
    solver: Literal["euler", "heun"] = "euler"
    """how a flow is integrated; heun is of second order and asks the network twice a step"""

    # Training
    iterations: int = 300_000
    """gradient steps; DPPO's 200 epochs over a million steps of data would be 1.5 million"""
    batch_size: int = 128
    """action chunks a gradient step"""
    lr: float = 1e-3
    """AdamW's learning rate at the start; falls as half a cosine to a tenth of it"""
    ema_decay: float = 0.995
    """decay of the averaged weights, which are what is saved; for a few thousand steps give 0.9"""
    held_out: float = 0.05
    """share of whole episodes kept out of training, on which the loss is reported"""


def require(condition, message: str) -> None:
    """Ends the program with one sentence in place of a traceback, for mistakes easily made."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuses what else would be found out after an hour of training, or never."""
    for name, value in asdict(args).items():
        if type(value) in (int, float) and name != "seed":
            fits = 0 <= value < 1 if name in ("ema_decay", "held_out") else value > 0
            require(fits, f"--{name.replace('_', '-')} {value}: is out of range, see --help")
    require(bool(args.data) != bool(args.resample), "--data: give it, or --resample FILE.pt")
    fits = not args.only or Path(args.data).suffix in (".npz", ".hdf5")
    require(fits, f"--only {args.only}: needs --data FILE.npz or FILE.hdf5")
    fits = args.output.endswith(".pt") and Path(args.output).resolve().parent.is_dir()
    require(fits, f"--output {args.output}: must be FILE.pt in a folder that exists")


def load_data(args: Args, limit: float) -> tuple:
    """Observations (N, obs_dim), actions (N, A), both float64, and lengths of the episodes."""
    try:
        episodes = read_episodes(args, limit)
        obs, actions = (np.concatenate(x).astype(np.float64) for x in zip(*episodes))
    except Exception as error:  # what a broken file raises has no common type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        require(False, f"--data {args.data}: cannot be read ({reason})")

    shapes = f"observations {obs.shape} and actions {actions.shape}"
    require(obs.ndim == actions.ndim == 2, f"--data {args.data}: has {shapes}, not (N, dim)")
    for i, (o, a) in enumerate(episodes):
        where = f"--data {args.data}: episode {i}"
        require(0 < len(o) == len(a), f"{where} has {len(o)} observations and {len(a)} actions")
        require(np.isfinite(o).all() and np.isfinite(a).all(), f"{where} has values not finite")
    lengths = np.array([len(a) for _, a in episodes])
    require(lengths.max() >= args.chunk, f"--chunk {args.chunk}: no episode has so many steps")
    return obs, actions, lengths


def read_episodes(args: Args, limit: float) -> list:
    path, suffix = args.data, Path(args.data).suffix
    if path.startswith("minari:"):
        return read_minari(path)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:  # never runs code from the file
            return read_flat(path, arrays, limit, args.only)

    require(suffix == ".hdf5", f"--data {path}: is no FILE.npz, FILE.hdf5 or minari:DATASET_ID")
    import h5py

    with h5py.File(path) as file:
        if "data" in file:
            return read_robomimic(path, file, args.obs_keys.split(","), args.only)
        return read_flat(path, file, limit, args.only)


def read_flat(path: str, arrays, limit: float, only: str) -> list:
    """Episodes of arrays that run through all of them, as in our .npz and D4RL's .hdf5."""
    keys = ("observations", "actions", "terminals", "timeouts")
    obs, actions, *flags = (np.asarray(arrays[key]) for key in keys)
    ends = np.stack([x.ravel() for x in flags]).any(0)
    n = len(ends)
    rows = f"{len(obs)} observations, {len(actions)} actions and {n} flags of ends"
    require(len(obs) == len(actions) == n, f"--data {path}: has {rows}, not as many of each")

    stops = np.union1d(np.flatnonzero(ends) + 1, n)  # after the last step of each episode
    if "lengths" in arrays:
        flagged, stops = stops, np.cumsum(arrays["lengths"])
        require([*stops[-1:]] == [n], f"--data {path}: lengths add up to {stops[-1:]}, not {n}")
        inside = np.setdiff1d(flagged, stops)
        require(not inside.size, f"--data {path}: lengths go on beyond flagged ends {inside[:3]}")
    else:
        require(ends.any(), f"--data {path}: no end of an episode is flagged; flag them all")
        longest = np.diff(stops, prepend=0).max()
        over = f"{longest} steps without a flagged end, over the environment's limit of {limit}"
        require(longest <= limit, f"--data {path}: {over}; flag all ends")
    episodes = [slice(start, stop) for start, stop in zip([0, *stops], stops)]
    if only:
        chosen = np.asarray(arrays[only])
        require(chosen.shape == (n,), f"--only {only}: has {chosen.shape} flags for {n} steps")
        episodes = [s for s in episodes if chosen[s].any()]
    return [(obs[s], actions[s]) for s in episodes]


def read_robomimic(path: str, file, obs_keys: list, only: str) -> list:
    """Demonstrations data/demo_7 of an open .hdf5: `actions`, and obs/KEY for each of the keys."""
    names = sorted(file["data"], key=lambda name: int(name.split("_")[-1]))
    masks = {name: set(chosen.asstr()) for name, chosen in file.get("mask", {}).items()}
    if only:
        names = [name for name in names if name in masks[only]]
    elif masks:
        print(f"{path}: all is cloned; --only NAME would take one mask of {', '.join(masks)}")

    episodes = []
    for demo in (file["data"][name] for name in names):
        missing = [key for key in obs_keys if key not in demo["obs"]]
        require(not missing, f"--obs-keys: no {missing} in {path}, but {', '.join(demo['obs'])}")
        obs = np.concatenate([demo["obs"][key][()] for key in obs_keys], -1)
        episodes.append((obs, demo["actions"][()]))
    return episodes


def read_minari(path: str) -> list:
    import minari

    dataset = minari.load_dataset(path.removeprefix("minari:"), download=True)
    box = isinstance(dataset.observation_space, gym.spaces.Box)
    require(box, f"--data {path}: its observations are no plain arrays (Box), so no decoder's")
    # Minari keeps the observation after the last action as well
    return [(e.observations[: len(e.actions)], e.actions) for e in dataset.iterate_episodes()]


def statistics(obs, actions) -> dict:
    """Range of every coordinate of the data, as DPPO; one that is constant gets span 1."""
    stats = {}
    for name, x in (("obs", obs), ("action", actions)):
        low, high = x.min(0), x.max(0)
        constant = high - low <= 1e-6  # divided by that, it would be huge when it moves in play
        if constant.any():
            index = np.flatnonzero(constant).tolist()
            print(f"constant in the data, so span 1 is taken: {name} coordinates {index}")
        stats[f"{name}_min"] = torch.as_tensor(low - 0.5 * constant)
        stats[f"{name}_max"] = torch.as_tensor(high + 0.5 * constant)
    return stats


def normalize(x, stats: dict, name: str):  # float32 would make 400,000 of 400,000.01
    low, high = stats[f"{name}_min"].double(), stats[f"{name}_max"].double()
    return (2 * ((torch.as_tensor(x) - low) / (high - low + 1e-6) - 0.5)).float()


class Backbone(nn.Module):
    """The scripts' Decoder and its time network: trained at all times, then used at a few."""

    def __init__(self, file: dict):
        super().__init__()
        self.kind = file["kind"]
        self.train_steps = steps = file["training"]["train_steps"]
        self.dim = file["chunk"] * file["action_dim"]
        width = file["width"]
        activation = {"relu": nn.ReLU, "mish": nn.Mish}[file["activation"]]

        # Nichol and Dhariwal's cosine schedule, as DPPO
        f = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        self.alpha_bar = np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 0, 0.999))  # (steps,)

        trained = file["training"].get("time_network", {})  # empty before training
        time_dim = len(trained["3.bias"]) if trained else 16
        layers = nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim)
        self.time_network = nn.Sequential(nn.Identity(), *layers)  # under DPPO's names
        inputs = [file["obs_dim"], *file["cond_hidden"]]  # an MLP of obs in some files of DPPO
        cond = [x for m, n in zip(inputs, inputs[1:]) for x in (nn.Linear(m, n), activation())]
        self.cond = nn.Sequential(*cond[:-1])
        self.blocks = nn.ModuleList()
        for _ in range(file["num_blocks"]):
            layers = activation(), nn.Linear(width, width), activation(), nn.Linear(width, width)
            self.blocks.append(nn.Sequential(*layers))
        self.first = nn.Linear(self.dim + time_dim + inputs[-1], width)
        self.head = nn.Linear(width, self.dim)
        if "model" in file:
            trained = {f"time_network.{name}": weight for name, weight in trained.items()}
            self.load_state_dict(file["model"] | trained)

    def embed_time(self, t):  # (B,) in training steps -> (B, time_dim)
        half = self.time_network[1].in_features // 2
        index = torch.arange(half, device=t.device)
        angle = t[:, None] * torch.exp(index * (-np.log(10_000) / (half - 1)))
        return self.time_network(torch.cat([angle.sin(), angle.cos()], -1))

    def network(self, x, time_emb, obs):  # -> noise (diffusion) or velocity (flow), (B, d)
        h = self.first(torch.cat([x, time_emb.expand(len(x), -1), self.cond(obs)], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)

    def loss(self, obs, chunks):
        """Mean squared error of the noise (DDPM) or of the velocity (rectified flow)."""
        noise = torch.randn_like(chunks)
        if self.kind == "diffusion":
            t = torch.randint(self.train_steps, (len(obs),), device=obs.device)
            a = torch.as_tensor(self.alpha_bar, device=obs.device).float()[t, None]
            x = a.sqrt() * chunks + (1 - a).sqrt() * noise
            target = noise
        else:
            u = torch.rand(len(obs), 1, device=obs.device)  # 0 is noise, 1 is data
            x = (1 - u) * noise + u * chunks
            target = chunks - noise
            t = u[:, 0] * self.train_steps
        return nn.functional.mse_loss(self.network(x, self.embed_time(t), obs), target)

    def sample_by(self, solver: str, steps: int) -> dict:
        """Fixes the steps of decoding. Returns the constants of the file: no schedule is left."""
        most = self.train_steps if self.kind == "diffusion" else np.inf
        require(0 < steps <= most, f"--sample-steps {steps}: must be above 0 and at most {most}")
        self.solver = solver if self.kind == "flow" else "ddim"
        self.steps, self.levels = steps, []
        if self.solver == "ddim":
            times = np.arange(steps - 1, -1, -1) * (self.train_steps // steps)  # 16, 12, 8, 4, 0
            now = self.alpha_bar[times]
            after = np.append(now[1:], 1.0)  # the last step lands on the clean action
            self.levels = np.sqrt(np.stack([now, 1 - now, after, 1 - after], 1)).tolist()
        else:  # Heun asks at the end of its last step, too
            times = np.arange(steps + (self.solver == "heun")) * self.train_steps / steps
        self.time_emb = self.embed_time(torch.tensor(times, dtype=torch.float32)).detach()
        return {"solver": self.solver, "levels": self.levels, "time_emb": self.time_emb}

    def forward(self, obs, noise):  # (B, obs_dim), (B, d) -> action chunk (B, d) in [-1, 1]
        x = noise
        for i in range(self.steps):
            prediction = self.network(x, self.time_emb[i], obs)
            if self.solver == "ddim":
                a, b, a_next, b_next = self.levels[i]
                clean = ((x - b * prediction) / a).clamp(-1, 1)  # DPPO clips the clean action and
                x = a_next * clean + b_next * (x - a * clean) / b  # takes the noise that fits it
            elif self.solver == "euler":
                x = x + prediction / self.steps
            else:  # Heun: the mean velocity of both ends of Euler's step
                ahead = self.network(x + prediction / self.steps, self.time_emb[i + 1], obs)
                x = x + (prediction + ahead) / (2 * self.steps)
        return x.clamp(-1, 1)


@torch.no_grad()
def play(decoder: Backbone, file: dict, env, seed: int) -> tuple:
    """Return, length and success of one episode of the frozen decoder, its noise sampled."""
    stats = file["normalization"]
    low, high = stats["action_min"].double(), stats["action_max"].double()
    generator = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    success, ended = False, False
    while not ended:
        noise = torch.randn(1, decoder.dim, generator=generator)
        chunk = decoder(normalize(obs[None], stats, "obs"), noise).view(file["chunk"], -1)
        for action in (chunk + 1) / 2 * (high - low) + low:
            obs, _, terminated, truncated, info = env.step(action.numpy())
            survived = truncated and not terminated  # success, where the environment flags none
            success = success or bool(info.get("success", survived))
            if ended := terminated or truncated:
                break
    return info["episode"]["r"], info["episode"]["l"], success


def finish(args: Args, file: dict, decoder: Backbone, env) -> None:
    """Fixes how the decoder is sampled, scores it (an old score goes) and writes its file."""
    file |= decoder.sample_by(args.solver, args.sample_steps)
    card = {key: x for key, x in file["card"].items() if not key.startswith(("frozen_", "eval_"))}
    recipe = {"sample_steps": decoder.steps, "solver": decoder.solver}
    card["recipe"] = card.get("recipe", {}) | recipe
    card |= {"env_id": args.env_id, "resampled": Path(args.resample).name}
    if env:
        played = [play(decoder, file, env, 10_000 + i) for i in range(args.eval_episodes)]
        returns, lengths, success = np.array(played, np.float64).T
        card |= {"frozen_return": float(returns.mean()), "frozen_return_std": float(returns.std())}
        card |= {"frozen_length": float(lengths.mean()), "frozen_success": float(success.mean())}
        card |= {"eval_episodes": args.eval_episodes, "eval_seed": 10_000}
        score = f"return {returns.mean():.0f} +- {returns.std():.0f}, success {success.mean():.2f}"
        print(f"frozen: {score}, {args.eval_episodes} episodes")

    temporary = Path(f"{args.output}.tmp")
    torch.save(file | {"card": card}, temporary)
    temporary.replace(args.output)  # so that a crash never leaves half a file
    script = "lpds_adroit_flow" if decoder.solver == "heun" else "lpds_continuous"
    script, env_id = args.env_id.split(":") if "lpds_" in args.env_id else (script, args.env_id)
    run = f"python {script}.py --env-id {env_id or 'ENV_ID'} --backbone {args.output}"
    print(f"wrote {args.output}; steer it with: {run}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: a second thread rarely pays
    gym.logger.min_level = gym.logger.ERROR  # no warnings about versions of environments

    # (1) The environment: that it is missing must not be found out after the training
    env, limit = None, np.inf
    if args.env_id:
        env = gym.make(args.env_id)
        limit = env.spec.max_episode_steps or np.inf

    # (2) What is known of the decoder: all, or the sizes and ranges of the data
    if args.resample:
        file = torch.load(args.resample, map_location="cpu", weights_only=True)
        require(file.get("format") == 2, f"--resample {args.resample}: is no decoder of format 2")
    else:
        obs, actions, lengths = load_data(args, limit)
        file = {"format": 2, "kind": args.kind, "activation": args.activation, "chunk": args.chunk}
        file |= {"obs_dim": obs.shape[1], "action_dim": actions.shape[1]}
        file |= {"width": args.hidden_size, "num_blocks": 1, "cond_hidden": []}
        file["training"] = {"train_steps": args.train_steps}
        file["normalization"] = statistics(obs, actions)
    if env:
        found = (*env.observation_space.shape, *env.action_space.shape)
        sizes = f"has {found} observation and action coordinates, not those of the data"
        require(found == (file["obs_dim"], file["action_dim"]), f"--env-id {args.env_id}: {sizes}")
        env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.ClipAction(env))
    network = Backbone(file)
    network.sample_by(args.solver, args.sample_steps)  # refuses a wrong --sample-steps in time
    if args.resample:
        finish(args, file, network, env)
        raise SystemExit

    # (3) Samples: every step with a full chunk to come, of shuffled episodes, the held-out first
    stops = lengths.cumsum()
    order = np.random.default_rng(args.seed).permutation(np.flatnonzero(lengths >= args.chunk))
    starts = [np.arange(stops[i] - lengths[i], stops[i] - args.chunk + 1) for i in order]
    n_held = int(args.held_out * len(starts))
    split = sum(len(x) for x in starts[:n_held])  # so many samples are held out
    starts = np.concatenate(starts)
    obs = normalize(obs, file["normalization"], "obs")[starts].to(args.device)
    actions = normalize(actions, file["normalization"], "action")
    chunks = actions[starts[:, None] + np.arange(args.chunk)].flatten(1).to(args.device)
    print(f"{len(obs)} chunks of {len(order)} episodes; held out are {split} of {n_held}")

    # (4) Behaviour cloning
    started = time.time()
    network.to(args.device)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations, args.lr / 10)
    losses, rows = [], []
    for iteration in trange(1, args.iterations + 1, disable=None):
        index = torch.randint(split, len(obs), (args.batch_size,), device=args.device)
        loss = network.loss(obs[index], chunks[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())  # read back only when a row is due

        # The average moves at DPPO's cadence; before a fiftieth of the training it is the network
        last = iteration == args.iterations
        if iteration % 10 == 0 or last:
            decay = args.ema_decay if iteration > max(args.iterations // 50, 10) else 0.0
            with torch.no_grad():
                for slow, fast in zip(ema.parameters(), network.parameters()):
                    slow.lerp_(fast, 1 - decay)

        if iteration % max(args.iterations // 20, 1) == 0 or last:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)  # the same noise in every row: differences are the training's
                held_out = ema.loss(obs[:split], chunks[:split]).item()  # nan for none
            mean = torch.stack(losses).mean().item()
            require(np.isfinite(mean), f"--lr {args.lr}: the loss is not finite any more")
            rows.append({"iteration": iteration, "loss": mean, "held_out": held_out})
            tqdm.write(f"{iteration:>8}  loss {mean:.4f}  held out {held_out:.4f}")
            losses.clear()

    # (5) The file: averaged weights, the time network apart, and a card
    weights = ema.cpu().state_dict()
    file["model"] = {name: w for name, w in weights.items() if "time_network" not in name}
    file["training"]["time_network"] = dict(ema.time_network.state_dict())
    apart = ("data", "output", "source", "device", "resample")
    file["card"] = {
        "data": args.data if args.data.startswith("minari:") else Path(args.data).name,
        "source": args.source,
        "recipe": {name: x for name, x in asdict(args).items() if name not in apart},
        "loss": rows[-1]["loss"],
        "held_out_loss": rows[-1]["held_out"],
        "losses": rows,
        "train_seconds": round(time.time() - started),
    }
    finish(args, file, ema, env)
