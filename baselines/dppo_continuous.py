# /// script
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco<3.10", "tyro>=0.9", "wandb"]
# ///
"""DPPO (diffusion policy policy optimization) on Hopper, Walker2d and HalfCheetah.

A fork of lpds_continuous.py; environments, evaluation and run folder are the same. Here the decoder
itself learns, by PPO. DDPM turns noise x_0 into a chunk of actions x_20 in 20 steps, each a draw
from a Gaussian of known density. So each is a decision, which PPO makes more or less likely as the
chunk turns out better or worse than V(s). A copy of the decoder takes the last K' steps and learns:

    x_k+1 ~ N(mu_theta(x_k, k, s), sigma_k^2 I)   r_k = [p_theta(x_k+1 | x_k, s) / p_old(...)]^(1/d)
    max_theta E[min(r_k A_k, clip(r_k, 1 - eps_k, 1 + eps_k) A_k)]    A_k = gamma_denoise^(19-k) A

    python baselines/dppo_continuous.py --env-id Walker2d-v4
    python baselines/dppo_continuous.py --resume runs/RUN_FOLDER
    python enjoy.py runs/RUN_FOLDER --temperature 1 0

The temperature scales all noise of the chain. Source: Ren et al. 2024, arXiv 2409.00588.
Results and departures: docs/baselines.md. It takes entropy.py and backbones/ from one folder up.
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

sys.path.append(str(Path(__file__).resolve().parents[1]))  # entropy.py lies one folder up
from entropy import knn_entropy  # noqa: E402

DEFAULTS = {  # what differs from Args
    "Hopper": dict(backbone="hopper-v4-medium-diffusion.pt"),
    "Walker2d": dict(backbone="walker2d-v4-medium-diffusion.pt"),
    "HalfCheetah": dict(backbone="halfcheetah-v4-medium-diffusion.pt"),
}
STEPS = 20  # of denoising: all that the decoders were trained for, as DDPM needs them


@dataclass
class Args:
    env_id: str = "Walker2d-v4"
    """Hopper, Walker2d or HalfCheetah; with --backbone any other with Box spaces"""
    backbone: str = ""
    """decoder file, or the name of one in backbones/"""
    seed: int = 1
    """seed of networks, noise and environments; runs on the same CPU repeat to the bit"""
    total_timesteps: int = 100_000
    """length of the run; a step is one primitive action of one environment, here and below"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda or cuda:1"""
    track: bool = False
    """log to Weights & Biases too; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE work as usual"""
    exp_name: str = Path(__file__).stem
    """part of the run folder's name"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """run folder to continue at its last checkpoint, with its settings; exact on the same CPU"""
    tuned_steps: int = 10
    """K', how many of the 20 denoising steps learn: the last ones; the others stay frozen"""
    noise_floor: float = 0.1
    """least standard deviation of a step in training, so that the last ones explore, too"""
    clip: float = 0.01
    """eps of the last step: beyond 1 +- eps its ratio, a geometric mean over d, pays no more"""
    clip_first: float = 0.01
    """eps of the first step that learns; from there to the last it grows exponentially"""
    gamma_denoise: float = 0.99
    """factor on the advantage for each step before the last: noisier ones decide less"""
    hidden_size: int = 256
    """width of the three hidden layers of the critic"""
    lr: float = 1e-4
    """Adam's learning rate of the denoising steps"""
    critic_lr: float = 1e-3
    """Adam's learning rate of the critic"""
    gamma: float = 0.99
    """discount per action chunk, none inside it; below 1"""
    gae_lambda: float = 0.95
    """near 0: advantages rest on the critic; 1: on the rewards of the whole episode"""
    epochs: int = 5
    """how often an iteration of PPO goes through its roll-out"""
    # differs from DPPO: small iterations. There an iteration has 80,000 steps of 40 environments,
    # in batches of 50,000 pairs, and a run 72 million steps
    num_envs: int = 10
    """environments stepped together"""
    rollout_steps: int = 2_500
    """steps of an iteration of PPO, which then forgets them; an evaluation ends one early"""
    batch_size: int = 1_000
    """pairs of an action chunk and one of its denoising steps, per gradient step"""
    eval_every: int = 10_000
    """steps between evaluations, each with a checkpoint and a fresh start of the environments"""
    eval_episodes: int = 20
    """episodes of an evaluation, the same ones every time"""
    log_every: int = 5_000
    """steps between rows of metrics.csv"""


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


class Replay:  # every transition (chunk) of the run, on the learner's device
    def __init__(self, capacity: int, obs_dim: int, d: int, device):
        shapes = dict(obs=[obs_dim], action=[d], reward=[], next_obs=[obs_dim], terminated=[])
        self.data = {k: torch.empty(capacity, *shape, device=device) for k, shape in shapes.items()}
        self.size, self.device = 0, device

    def add(self, *columns) -> None:  # obs, action, reward, next_obs, terminated, each (n, ...)
        end = self.size + len(columns[0])
        for stored, column in zip(self.data.values(), columns):
            stored[self.size : end] = torch.as_tensor(column)
        self.size = end

    def sample(self, n: int, generator=None) -> dict:
        index = torch.randint(self.size, (n,), device=self.device, generator=generator)
        return {name: column[index] for name, column in self.data.items()}


@torch.no_grad()
def probe(agent: Agent, replay: Replay, seed: int, states: int = 64, n: int = 64) -> dict:
    """What the policy does at states of the replay, over n draws of noise at each."""
    generator = torch.Generator(replay.device).manual_seed(seed)  # leaves the run's noise alone
    obs = replay.sample(states, generator)["obs"].repeat_interleave(n, 0)
    noise = torch.randn(len(obs), agent.decoder.dim, device=replay.device, generator=generator)
    chain, frozen = agent.denoise(obs, noise, floor=0.0), agent.decoder(obs, noise)
    info = {}
    info["entropy/action"], info["entropy/ties"] = knn_entropy(chain[:, -1].view(states, n, -1))
    info["entropy/action_frozen"], _ = knn_entropy(frozen.view(states, n, -1))

    # KL of the exploring chain from the frozen one, in nats; that of its actions is no larger
    obs, noise = obs[::n], noise[::n]  # one chain a state will do
    chain = agent.denoise(obs, noise, agent.args.noise_floor)
    kl = 0.0
    for x, k in zip(chain.unbind(1), range(STEPS - agent.args.tuned_steps, STEPS)):
        mean, std = agent.actor.step(obs, x, k)
        shift = mean - agent.decoder.step(obs, x, k)[0]
        kl += 0.5 * (shift / std.clamp(min=agent.args.noise_floor)).square().sum(1).mean()
    return info | {"trust_region/kl": kl}


def evaluate(policy, envs, device, seed: int = 0) -> dict:
    """The first episode of each environment; its start and noise depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, success = np.full((3, envs.num_envs), np.nan)
    seeds = np.random.SeedSequence([seed, 0, 1])  # of 3 words, training's in step (3) of 2
    obs, _ = envs.reset(seed=seeds.generate_state(envs.num_envs).tolist())
    while np.isnan(lengths).any():
        shape = envs.num_envs, (1 + STEPS) * envs.single_action_space.shape[0]
        noise = torch.randn(shape, generator=generator).to(device)
        action = policy(torch.as_tensor(obs, device=device), noise).cpu().numpy()
        obs, _, terminated, truncated, infos = envs.step(action)
        for i in np.flatnonzero((terminated | truncated) & np.isnan(lengths)):
            returns[i], lengths[i] = (infos["final_info"]["episode"][key][i] for key in ("r", "l"))
            success[i] = not terminated[i]  # it reached the time limit without a fall
    return {"return": returns.tolist(), "length": lengths.tolist(), "success": success.tolist()}


def save(path: Path, write) -> None:
    """Writes beside `path`, then renames: killed at any moment, what `path` held stays whole."""
    temporary = path.with_name("tmp-" + path.name)
    write(temporary)
    temporary.replace(path)


def log(run: Path, rows: list, track: bool) -> None:  # metrics.csv, and to Weights & Biases
    columns = dict.fromkeys(key for row in rows for key in row)  # what a row lacks stays empty
    lines = [",".join(str(row.get(key, "")) for key in columns) for row in rows]
    text = "\n".join([",".join(columns), *lines, ""])
    save(run / "metrics.csv", partial(Path.write_text, data=text))
    if track:  # imported below, only then
        wandb.log(rows[-1], step=int(rows[-1]["global_step"]))


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
    replay = Replay(args.total_timesteps + args.num_envs, decoder.obs_dim, decoder.d, args.device)

    # Run folder: the one to resume, or a new one; it keeps its decoder, so that it can be moved
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"  # unique
    run = Path(args.resume or Path(args.run_dir, name))
    run.mkdir(parents=True, exist_ok=bool(args.resume))
    rows, evals = [{"global_step": 0, "wall_seconds": 0.0}], []
    if args.resume:
        state = torch.load(run / "checkpoint.pt", map_location=args.device, weights_only=True)
        require(state["script"] == Path(__file__).name, f"--resume {run}: is of {state['script']}")
        agent.load_state_dict(state["agent"])
        agent.optimizer.load_state_dict(state["optimizer"])
        replay.add(*state["replay"].values())
        rows, evals = state["rows"], state["evals"]
    save(run / "backbone.pt", partial(torch.save, file))
    save(run / "args.json", partial(Path.write_text, data=json.dumps(asdict(args), indent=1)))
    if args.track:
        import wandb

        wandb.init(name=run.name, id=run.name, resume="allow", config=asdict(args), dir=run)

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
        state = {"script": Path(__file__).name, "rows": rows, "evals": evals}
        state |= {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}
        state["replay"] = {k: column[: replay.size].clone() for k, column in replay.data.items()}
        save(run / "checkpoint.pt", partial(torch.save, state))

        # (2) Evaluate into the last row; step 0 is the frozen decoder, which all is compared with
        result = evaluate(agent.act if global_step else decoder, eval_envs, args.device)
        evals.append({"global_step": global_step} | result)
        arrays = {key: np.array([e[key] for e in evals]) for key in evals[0]}
        save(run / "eval.npz", partial(np.savez, **arrays))
        returns, success = arrays["return"].mean(1).tolist(), arrays["success"].mean(1).tolist()
        rows[-1] |= {"eval/episodic_return": returns[-1], "eval/success": success[-1]}
        rows[-1] |= {"eval/frozen_return": returns[0], "eval/frozen_success": success[0]}
        log(run, rows, args.track)
        if returns[-1] == max(returns):
            save(run / "best.pt", partial(torch.save, state))
        score = f"return {returns[-1]:.0f} (frozen {returns[0]:.0f}), success {success[-1]:.2f}"
        print(f"step {global_step:>7}: {score}", flush=True)
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

            # (6) Store: all that PPO needs, and in the replay the states of the run, to probe them
            replay.add(obs, action, reward, real_next_obs, terminated)
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
            if global_step // args.log_every > before // args.log_every or global_step >= until:
                row = {"global_step": global_step, "wall_seconds": time.time() - started}
                row["charts/SPS"] = global_step / row["wall_seconds"]
                if ended:
                    row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(ended, 0)
                row |= info | probe(agent, replay, global_step)
                rows.append({key: float(value) for key, value in row.items()})
                log(run, rows, args.track)
                ended, info = [], {}
