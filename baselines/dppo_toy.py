# /// script
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "tyro>=0.9", "matplotlib"]
# ///
"""DPPO (diffusion policy policy optimization) between the four goals of lpds_toy.py.

A fork of dppo_continuous.py; read that first. The world is lpds_toy.py's, the decoder a diffusion,
cloned from the same data as its flow, since DDPM needs one. A copy of the decoder takes the last K'
steps and learns, by PPO; no budget holds it to the frozen policy:

    x_k+1 ~ N(mu_theta(x_k, k, s), sigma_k^2 I)   r_k = [p_theta(x_k+1 | x_k, s) / p_old(...)]^(1/d)
    max_theta E[min(r_k A_k, clip(r_k, 1 - eps_k, 1 + eps_k) A_k)]    A_k = gamma_denoise^(19-k) A

    python baselines/dppo_toy.py
    python baselines/dppo_toy.py --resume runs/RUN_FOLDER

Source: Ren et al. 2024, arXiv 2409.00588. Compared with LP-DS in docs/lpds_toy.md.
"""

import copy
import json
import math
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

DEFAULTS = {"MultiGoal": dict(backbone="multigoal-diffusion.pt")}
STEPS = 20  # of denoising: all that the decoders were trained for, as DDPM needs them


@dataclass
class Args:
    env_id: str = "MultiGoal"
    """four goals in the plane"""
    backbone: str = ""
    """decoder file, or the name of one in backbones/"""
    seed: int = 1
    """seed of networks, noise and environments; runs on the same CPU repeat to the bit"""
    total_timesteps: int = 10_000
    """length of the run; a step is one primitive action of one environment, here and below"""
    device: str = "cpu"
    """cpu, which is fastest here, or cuda"""
    exp_name: str = Path(__file__).stem
    """part of the run folder's name"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """run folder to continue at its last checkpoint, with its settings; exact on the same CPU"""
    # clip and lr were chosen on another seed: dppo_continuous.py's change little in 10,000 steps
    tuned_steps: int = 10
    """K', how many of the 20 denoising steps learn: the last ones; the others stay frozen"""
    noise_floor: float = 0.1
    """least standard deviation of a step in training, so that the last ones explore, too"""
    clip: float = 0.1
    """eps of the last step: beyond 1 +- eps its ratio, a geometric mean over d, pays no more"""
    clip_first: float = 0.1
    """eps of the first step that learns; from there to the last it grows exponentially"""
    gamma_denoise: float = 0.99
    """factor on the advantage for each step before the last: noisier ones decide less"""
    hidden_size: int = 64
    """width of the three hidden layers of the critic"""
    lr: float = 3e-4
    """Adam's learning rate of the denoising steps"""
    critic_lr: float = 1e-3
    """Adam's learning rate of the critic"""
    gamma: float = 0.99
    """discount per action chunk, none inside it; below 1"""
    gae_lambda: float = 0.95
    """near 0: advantages rest on the critic; 1: on the rewards of the whole episode"""
    epochs: int = 5
    """how often an iteration of PPO goes through its roll-out"""
    # differs from DPPO: sizes for a small world
    num_envs: int = 10
    """environments stepped together"""
    rollout_steps: int = 1_000
    """steps of an iteration of PPO, which then forgets them; an evaluation ends one early"""
    batch_size: int = 1_000
    """pairs of an action chunk and one of its denoising steps, per gradient step"""
    eval_every: int = 1_000
    """steps between evaluations, each with a row, a checkpoint and a fresh start of the worlds"""
    eval_episodes: int = 1_000
    """episodes of an evaluation, the same ones every time"""


def require(condition, message: str) -> None:
    """Ends the program with one sentence in place of a traceback, for mistakes easily made."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_args() -> Args:
    """Flags > resumed run > DEFAULTS > Args; parsed twice: --env-id and --resume set defaults."""
    args = tyro.cli(Args, args=[flag for flag in sys.argv[1:] if flag not in ("-h", "--help")])
    base = Args(env_id=args.env_id, **DEFAULTS.get(args.env_id.split("-v")[0], {}))
    if args.resume:
        run = Path(args.resume)
        files = ("args.json", "backbone.pt", "checkpoint.pt")
        require(all((run / x).is_file() for x in files), f"--resume {run}: lacks one of {files}")
        stored = json.loads((run / "args.json").read_text())
        require(stored.keys() == asdict(args).keys(), f"--resume {run}: is of another script")
        base = Args(**stored)
    args = tyro.cli(Args, default=base, description=f"{__doc__}\nDefaults for {base.env_id}:")

    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        longer = name == "total_timesteps" and value >= base.total_timesteps
        free = not args.resume or name == "resume" or longer
        require(free or value == getattr(base, name), f"{flag}: a resumed run keeps its settings")
        zero = value == 0 and name in ("seed", "alpha_lr", "warmup_steps")
        good = type(value) not in (int, float) or value > 0 or zero
        require(good, f"{flag}: must be above 0")
        require(name not in ("gamma", "tau") or value < 1, f"{flag}: must be below 1")
    require(args.backbone, f"--env-id {args.env_id}: give a --backbone, see pretrain_backbone.py")
    return args


class MultiGoal(gym.Env):
    """LP-DS, appendix B: a point moves by half its action, for 20 steps; obs (2,) is where it is.

    All start exactly at the origin, equally far from four goals. The reward of a step is that of
    where it starts: 10 within 0.2 of a goal, less the distance to the nearest.
    """

    GOALS = np.array([[-1, -1], [1, 1], [-1, 1], [1, -1]])  # in the order of figure 10
    CIRCLES = [(x, y, 0.2) for x, y in GOALS]
    observation_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.mode = 0, -1
        self.path = np.zeros((21, 2))
        return self.path[0], {}

    def step(self, action):
        position = self.path[self.time]
        distance = np.linalg.norm(position - self.GOALS, axis=1)  # (4,)
        inside = distance.min() < 0.2
        if inside and self.mode < 0:
            self.mode = int(distance.argmin())  # the first goal counts
        self.time += 1
        self.path[self.time :] = np.clip(position + 0.5 * action, -2, 2)  # the rest: to draw
        info = {"success": self.mode >= 0, "mode": self.mode, "path": self.path.copy()}
        return self.path[self.time], 10.0 * inside - distance.min(), False, False, info


gym.register("MultiGoal-v0", MultiGoal, max_episode_steps=20)


class ActionChunk(gym.Wrapper):
    """Executes a flat chunk of actions open loop, as one transition with their summed reward."""

    def step(self, chunk):  # (d,), d = actions per chunk * size of an action
        total = 0.0
        self.steps = 0  # how many actions of the chunk were executed
        for action in chunk.reshape(-1, *self.env.action_space.shape):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            self.steps += 1
            if terminated or truncated:
                break  # differs from DSRL: its wrapper steps on and adds up the rewards

        where = f"{self.unwrapped.spec.id}, step {self.get_wrapper_attr('episode_lengths')}"
        require(np.isfinite([total, *obs]).all(), f"--env-id {where}: not finite, or --lr too high")
        return obs, total, terminated, truncated, info


def make_env(env_id: str, file: dict, **kwargs):
    """Environment in the units of a decoder `file`: observations normalised, chunks in [-1, 1]."""
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **kwargs))
    keys = ("obs_min", "obs_max", "action_min", "action_max")
    obs_min, obs_max, low, high = (file["normalization"][key].double().numpy() for key in keys)
    fits = env.observation_space.shape == obs_min.shape and env.action_space.shape == low.shape
    require(fits, f"--backbone: {len(obs_min)} observations, {len(low)} actions; not {env_id}'s")

    # Gymnasium applies the outermost action wrapper first: [-1, 1] -> range of the data -> clipped
    env = gym.wrappers.ClipAction(env)
    env = gym.wrappers.TransformAction(env, lambda a: (a + 1) / 2 * (high - low) + low, None)

    def normalize(obs):
        return (2 * ((obs - obs_min) / (obs_max - obs_min + 1e-6) - 0.5)).astype(np.float32)

    space = gym.spaces.Box(-np.inf, np.inf, obs_min.shape)
    env = ActionChunk(gym.wrappers.TransformObservation(env, normalize, space))
    env.action_space = gym.spaces.Box(-1.0, 1.0, (file["chunk"] * len(low),))
    return env


def all_steps(file: dict) -> dict:
    """A decoder's file with the constants of every training step, in place of DDIM's few."""
    steps = file["training"]["train_steps"]
    require(steps == STEPS, f"--backbone: has {steps} --train-steps; pretrain one with {STEPS}")

    # DPPO's cosine schedule, from pure noise to data: x = a * clean action + b * noise
    grid = np.linspace(0, 1, steps + 1)
    f = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    now = np.cumprod(1 - np.clip(1 - f[1:] / f[:-1], 0, 0.999))[::-1]  # a^2 of each step
    after = np.append(now[1:], 1.0)
    levels = np.sqrt(np.stack([now, 1 - now, after, 1 - after], 1))  # a, b, a_next, b_next

    time_dim = file["time_emb"].shape[1]
    layers = nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim)
    network = nn.Sequential(nn.Identity(), *layers).requires_grad_(False)  # keys 1 and 3
    network.load_state_dict(file["training"]["time_network"])
    frequency = torch.exp(torch.arange(time_dim // 2) * (-math.log(1e4) / (time_dim // 2 - 1)))
    angle = torch.arange(steps - 1.0, -1, -1)[:, None] * frequency
    time_emb = network(torch.cat([angle.sin(), angle.cos()], 1))
    return file | {"levels": levels.tolist(), "time_emb": time_emb}


class Decoder(nn.Module):
    """Phi: normalised obs (B, obs_dim), noise (B, dim) -> action chunk (B, d) in [-1, 1]; frozen.

    DPPO's residual MLP, sampled by DDPM: d numbers of the noise start the chain, each step adds d.
    """

    def __init__(self, file: dict):
        super().__init__()
        self.obs_dim, self.d = file["obs_dim"], file["chunk"] * file["action_dim"]
        self.dim = (1 + STEPS) * self.d
        activation = {"relu": nn.ReLU, "mish": nn.Mish}[file["activation"]]
        width, time_dim = file["width"], file["time_emb"].shape[1]
        self.first = nn.Linear(self.d + time_dim + self.obs_dim, width)
        self.blocks = nn.ModuleList()
        for _ in range(file["num_blocks"]):
            layers = activation(), nn.Linear(width, width), activation(), nn.Linear(width, width)
            self.blocks.append(nn.Sequential(*layers))
        self.head = nn.Linear(width, self.d)
        self.load_state_dict(file["model"])
        self.requires_grad_(False)
        self.register_buffer("time_emb", file["time_emb"])  # (K, time_dim), K sampling steps
        self.register_buffer("levels", torch.tensor(file["levels"]))  # (K, 4)

    def step(self, obs, x, k):
        """Mean (B, d) and deviation of the next x's Gaussian; k, int or (B,): 0 is pure noise."""
        h = self.first(torch.cat([x, self.time_emb[k].expand(len(x), -1), obs], -1))
        for block in self.blocks:
            h = h + block(h)
        a, b, a_next, b_next = self.levels[k].unsqueeze(-1).unbind(-2)  # each (1,) or (B, 1)
        clean = ((x - b * self.head(h)) / a).clamp(-1, 1)  # clipped as in DPPO
        kept = a / a_next * (b_next / b).square()  # of the noise in x, as in DDIM with eta 1
        std = b_next / b * (1 - (a / a_next).square()).sqrt()  # drawn anew; none in the last step
        return a_next * clean + kept * (x - a * clean), std

    def forward(self, obs, noise):
        x, *draws = noise.unflatten(1, (1 + STEPS, self.d)).unbind(1)
        for k, eps in enumerate(draws):
            mean, std = self.step(obs, x, k)
            x = mean + std * eps
        return x


def mlp(n_in: int, n_out: int, width: int):
    """[Linear, LayerNorm, Tanh] x 3 and a linear head, as DSRL's actor and critics."""
    layers = []
    for n in (n_in, width, width):
        layers += [nn.Linear(n, width), nn.LayerNorm(width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, n_out))


class Agent(nn.Module):
    """The frozen decoder, the copy of it that learns, a critic V(s), and an iteration of PPO."""

    def __init__(self, args: Args, decoder: Decoder):
        super().__init__()
        self.args, self.decoder = args, decoder
        # differs from DPPO: time embeddings do not learn, and the critic is the other scripts'
        self.actor = copy.deepcopy(decoder).requires_grad_(True)
        self.critic = mlp(decoder.obs_dim, 1, args.hidden_size)
        self.register_buffer("returns", torch.zeros(3, dtype=torch.float64))  # count, sum, squares
        self.optimizer = torch.optim.Adam(self.actor.parameters(), args.lr, fused=True)
        self.optimizer.add_param_group({"params": self.critic.parameters(), "lr": args.critic_lr})

    @torch.no_grad()
    def denoise(self, obs, noise, floor: float):
        """All x from where the copy takes over to the action chunk: (B, K' + 1, d)."""
        first = STEPS - self.args.tuned_steps
        x, *draws = noise.unflatten(1, (1 + STEPS, self.decoder.d)).unbind(1)
        chain = [x]
        for k, eps in enumerate(draws):
            network = self.decoder if k < first else self.actor
            mean, std = network.step(obs, chain[-1], k)
            chain.append(mean + std.clamp(min=floor) * eps)
        return torch.stack(chain[first:], 1)

    def act(self, obs, noise):  # the policy, without what only explores: (B, dim) -> (B, d)
        return self.denoise(obs, noise, floor=0.0)[:, -1]

    def log_prob(self, batch: dict):
        """Log density (B,) of x_next, drawn in step k from x: the mean of its d coordinates."""
        mean, std = self.actor.step(batch["obs"], batch["x"], batch["k"])
        gaussian = torch.distributions.Normal(mean, std.clamp(min=self.args.noise_floor))
        return gaussian.log_prob(batch["x_next"]).mean(1)  # no sum, so that clip fits any d

    def descend(self, network, loss) -> None:  # a step of this network alone
        self.optimizer.zero_grad()  # the others' gradients stay None, and Adam skips those
        loss.backward(inputs=list(network.parameters()))
        self.optimizer.step()

    @torch.no_grad()
    def estimate(self, obs, reward, next_obs, terminated, done, discounted) -> tuple:
        """Columns (T, N, ...) of a roll-out -> advantages by GAE, targets of V; both (T, N)."""
        # Rewards in units of the deviation of `discounted` so far in the run, cut at 10 as in DPPO
        self.returns += torch.stack([discounted.double().pow(power).sum() for power in range(3)])
        mean, square = self.returns[1:] / self.returns[0]
        reward = (reward / (square - mean.square() + 1e-8).sqrt().float()).clamp(-10, 10)

        # differs from DPPO: only `terminated` ends the bootstrap, no time limit does
        value, next_value = self.critic(obs).squeeze(-1), self.critic(next_obs).squeeze(-1)
        error = reward + self.args.gamma * (1 - terminated) * next_value - value

        # GAE: the errors after a chunk count, too, each later one less, up to the episode's end
        advantage, ahead = torch.zeros_like(error), torch.zeros_like(error[0])
        decay = self.args.gamma * self.args.gae_lambda * (1 - done)
        for t in reversed(range(len(error))):
            ahead = error[t] + decay[t] * ahead
            advantage[t] = ahead
        return advantage, advantage + value

    def learn(self, rollout: list) -> dict:
        """An iteration of PPO on all pairs of an action chunk and one of its K' denoising steps."""
        n = self.args.tuned_steps
        chain, obs, *rest = (torch.stack(column) for column in zip(*rollout))  # (T, N, ...)
        advantage, target = self.estimate(obs, *rest)

        # A row for each pair. Both estimates are the chunk's, the same for its K' steps
        columns = {"obs": obs, "advantage": advantage, "target": target}
        pairs = {key: x.flatten(0, 1).repeat_interleave(n, 0) for key, x in columns.items()}
        chain = chain.flatten(0, 1)  # (T * N, K' + 1, d)
        pairs["x"], pairs["x_next"] = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)
        pairs["k"] = torch.arange(STEPS - n, STEPS, device=chain.device).repeat(len(chain))
        with torch.no_grad():
            pairs["log_prob"] = self.log_prob(pairs)  # of the policy that acted

        infos = []
        for _ in range(self.args.epochs):
            order = torch.randperm(n * len(chain), device=chain.device)
            for index in order.split(self.args.batch_size):
                batch = {key: column[index] for key, column in pairs.items()}
                infos.append(self.update_actor(batch) | self.update_critic(batch))
        return {key: torch.stack([info[key] for info in infos]).mean() for key in infos[0]}

    def clip_range(self, k):
        """eps_k (B,): clip_first in the first step that learns, clip in the last."""
        done = (k - STEPS + self.args.tuned_steps) / (self.args.tuned_steps - 1)  # 0 to 1
        share = torch.expm1(3 * done) / math.expm1(3)
        return self.args.clip_first + (self.args.clip - self.args.clip_first) * share

    def update_actor(self, batch: dict) -> dict:
        """PPO's clipped objective, of denoising steps in place of actions."""
        advantage = batch["advantage"] - batch["advantage"].mean()
        advantage = advantage / (advantage.std(correction=0) + 1e-8)
        advantage = advantage * self.args.gamma_denoise ** (STEPS - 1 - batch["k"])
        # differs from DPPO: no clamps, neither of noise (3) nor of densities (-5 to 2)
        log_ratio = self.log_prob(batch) - batch["log_prob"]
        ratio = log_ratio.exp()
        eps = self.clip_range(batch["k"])
        clipped = ratio.clamp(1 - eps, 1 + eps)
        loss = -torch.min(ratio * advantage, clipped * advantage).mean()
        self.descend(self.actor, loss)
        info = {"losses/policy": loss, "losses/approx_kl": (ratio - 1 - log_ratio).mean()}
        info["losses/clipfrac"] = (ratio != clipped).float().mean()
        return {key: value.detach() for key, value in info.items()}

    def update_critic(self, batch: dict) -> dict:
        """V of the state, not of x: so all denoising steps of a chunk have one advantage."""
        value = self.critic(batch["obs"]).squeeze(-1)
        loss = 0.5 * (value - batch["target"]).square().mean()
        self.descend(self.critic, loss)
        return {"losses/value": loss.detach(), "losses/v_value": value.detach().mean()}


def evaluate(policy, envs, device, seed: int = 0) -> dict:
    """The first episode of each environment; its start and noise depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, success, mode = np.full((4, envs.num_envs), np.nan)
    paths = [None] * envs.num_envs
    seeds = np.random.SeedSequence([seed, 0, 1])  # of 3 words, training's in step (3) of 2
    obs, _ = envs.reset(seed=seeds.generate_state(envs.num_envs).tolist())
    while np.isnan(lengths).any():
        shape = envs.num_envs, (1 + STEPS) * envs.single_action_space.shape[0]
        noise = torch.randn(shape, generator=generator).to(device)
        action = policy(torch.as_tensor(obs, device=device), noise).cpu().numpy()
        obs, _, terminated, truncated, infos = envs.step(action)
        for i in np.flatnonzero((terminated | truncated) & np.isnan(lengths)):
            final = infos["final_info"]
            returns[i], lengths[i] = (final["episode"][key][i] for key in ("r", "l"))
            success[i], mode[i], paths[i] = (final[key][i] for key in ("success", "mode", "path"))
    result = {"return": returns.tolist(), "length": lengths.tolist(), "success": success.tolist()}
    return result | {"mode": mode.tolist(), "path": np.array(paths[:100]).tolist()}


def save(path: Path, write) -> None:
    """Writes beside `path`, then renames: killed at any moment, what `path` held stays whole."""
    temporary = path.with_name("tmp-" + path.name)
    write(temporary)
    temporary.replace(path)


def log(run: Path, rows: list) -> None:  # metrics.csv
    columns = dict.fromkeys(key for row in rows for key in row)  # what a row lacks stays empty
    lines = [",".join(str(row.get(key, "")) for key in columns) for row in rows]
    text = "\n".join([",".join(columns), *lines, ""])
    save(run / "metrics.csv", partial(Path.write_text, data=text))


def draw(file: Path, world, panels: dict) -> None:
    """title -> (paths, modes): episodes in the colour of their goal or route; failures are grey."""
    from matplotlib import figure, patches

    picture = figure.Figure((3 * len(panels), 3.3), layout="constrained")
    axes = picture.subplots(1, len(panels), sharex=True, sharey=True)
    for axis, (title, (paths, modes)) in zip(axes, panels.items()):
        axis.set(title=title, aspect="equal")
        for path, mode in zip(paths, modes):
            color = f"C{mode:.0f}" if mode >= 0 else "0.7"
            axis.plot(*np.transpose(path), color=color, linewidth=0.5)
        for x, y, radius in world.CIRCLES:
            axis.add_patch(patches.Circle((x, y), radius, fill=False, zorder=3))
    save(file, partial(picture.savefig, format="png"))


if __name__ == "__main__":
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: a second thread rarely pays
    gym.logger.min_level = gym.logger.ERROR  # no warnings about versions of environments

    # Decoder, environments, networks
    path = Path(args.resume, "backbone.pt") if args.resume else Path(args.backbone)
    path = path if path.is_file() else Path(__file__).parents[1] / "backbones" / args.backbone
    require(zipfile.is_zipfile(path), f"--backbone {path}: no decoder; see pretrain_backbone.py")
    file = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    known = file.get("format") == 2 and file["kind"] == "diffusion"
    require(known, f"--backbone {path}: no diffusion of format 2; convert_dppo.py may help")
    tuned = f"--tuned-steps {args.tuned_steps}"
    require(2 <= args.tuned_steps <= STEPS, f"{tuned}: give 2 to {STEPS}")
    file = all_steps(file)
    decoder = Decoder(file).to(args.device)
    to_device = partial(torch.as_tensor, device=args.device, dtype=torch.float32)
    make = partial(make_env, args.env_id, file)
    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([make] * args.num_envs, autoreset_mode=mode)
    eval_envs = gym.vector.SyncVectorEnv([make] * args.eval_episodes, autoreset_mode=mode)
    agent = Agent(args, decoder).to(args.device)

    # Run folder: the one to resume, or a new one; it keeps its decoder, so that it can be moved
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"  # unique
    run = Path(args.resume or Path(args.run_dir, name))
    run.mkdir(parents=True, exist_ok=bool(args.resume))
    rows, evals, paths = [{"global_step": 0, "wall_seconds": 0.0}], [], []
    if args.resume:
        state = torch.load(run / "checkpoint.pt", map_location=args.device, weights_only=True)
        require(state["script"] == Path(__file__).name, f"--resume {run}: is of {state['script']}")
        agent.load_state_dict(state["agent"])
        agent.optimizer.load_state_dict(state["optimizer"])
        rows, evals, paths = state["rows"], state["evals"], state["paths"]
    save(run / "backbone.pt", partial(torch.save, file))
    save(run / "args.json", partial(Path.write_text, data=json.dumps(asdict(args), indent=1)))

    def stop(*_):
        sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume '{run}'")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    print(f"{run}: tunes {path.name}, {args.tuned_steps} of {STEPS} steps", flush=True)
    global_step = int(rows[-1]["global_step"])
    started = time.time() - rows[-1]["wall_seconds"]
    while True:  # one round: save, evaluate, then play and train for eval_every steps
        # (1) Save all that the rest of the run depends on: --resume goes on from here
        finite = all(parameter.isfinite().all() for parameter in agent.parameters())
        require(finite, f"--lr {args.lr}, --critic-lr: not finite; {run} keeps the last that were")
        state = {"script": Path(__file__).name, "rows": rows, "evals": evals, "paths": paths}
        state |= {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}
        save(run / "checkpoint.pt", partial(torch.save, state))

        # (2) Evaluate into the last row; step 0 is the frozen decoder, which all is compared with
        result = evaluate(agent.act if global_step else decoder, eval_envs, args.device)
        paths = [*paths[:1], result.pop("path")]  # only the frozen policy's and the latest are kept
        evals.append({"global_step": global_step} | result)
        arrays = {key: np.array([e[key] for e in evals]) for key in evals[0]}
        save(run / "eval.npz", partial(np.savez, **arrays, path=np.array(paths, np.float32)))
        returns, success = arrays["return"].mean(1).tolist(), arrays["success"].mean(1).tolist()
        rows[-1] |= {"eval/episodic_return": returns[-1], "eval/success": success[-1]}
        rows[-1] |= {"eval/frozen_return": returns[0], "eval/frozen_success": success[0]}
        modes = [mode for mode in result["mode"] if mode >= 0]  # of the episodes that got there
        counts = np.unique(modes, return_counts=True)[1]
        largest = float(counts.max(initial=0) / max(len(modes), 1))
        rows[-1] |= {"eval/modes": len(counts), "eval/mode_max": largest}
        log(run, rows)
        if returns[-1] == max(returns):
            save(run / "best.pt", partial(torch.save, state))
        score = f"return {returns[-1]:.4g} (frozen {returns[0]:.4g}), success {success[-1]:.2f}"
        spread = f"{rows[-1]['eval/modes']} modes, the largest {largest:.2f}"
        print(f"step {global_step:>7}: {score}, {spread}", flush=True)
        if global_step >= args.total_timesteps:
            break

        # (3) Truncate all episodes and seed afresh, so that a resume needs no simulator state
        words = np.random.SeedSequence([args.seed, global_step]).generate_state(1 + args.num_envs)
        torch.manual_seed(int(words[0]))
        obs, _ = envs.reset(seed=words[1:].tolist())
        ended, info, rollout = [], {}, []
        discounted = np.zeros(args.num_envs)  # return of each episode so far, older rewards less
        until = min((global_step // args.eval_every + 1) * args.eval_every, args.total_timesteps)
        while global_step < until:
            # (4) Act: the chain of denoised x, of which the last is the action chunk
            noise = torch.randn(args.num_envs, decoder.dim, device=args.device)
            chain = agent.denoise(to_device(obs), noise, args.noise_floor)  # (N, K' + 1, d)
            action = chain[:, -1].clamp(-1, 1).cpu().numpy()  # densities are of what is not cut

            # (5) Step: each environment executes its chunk; one that ends is reset at once
            next_obs, reward, terminated, truncated, infos = envs.step(action)
            real_next_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):
                real_next_obs[i] = infos["final_obs"][i]
                ended.append([infos["final_info"]["episode"][key][i] for key in ("r", "l")])
            before = global_step
            global_step += sum(envs.get_attr("steps"))  # actions executed: fewer where one ended

            # (6) Store all that PPO needs until it learns
            discounted = args.gamma * discounted + reward
            done = terminated | truncated
            columns = obs, reward, real_next_obs, terminated, done, discounted
            rollout.append([chain, *map(to_device, columns)])
            discounted = discounted * ~done
            obs = next_obs

            # (7) Learn from the roll-out, once it is long enough or the round ends, and forget it
            due = global_step // args.rollout_steps > before // args.rollout_steps
            if due or global_step >= until:
                info = agent.learn(rollout)
                rollout = []

            # (8) Log the latest losses; only here are they read back from the device
            if global_step >= until:
                row = {"global_step": global_step, "wall_seconds": time.time() - started}
                row["charts/SPS"] = global_step / row["wall_seconds"]
                if ended:
                    row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(ended, 0)
                row |= info
                rows.append({key: float(value) for key, value in row.items()})
                log(run, rows)

    panels = {"frozen": (paths[0], evals[0]["mode"]), "tuned": (paths[1], evals[-1]["mode"])}
    draw(run / "paths.png", eval_envs.envs[0].unwrapped, panels)
