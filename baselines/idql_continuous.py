# /// script
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "mujoco<3.10", "tyro>=0.9", "wandb"]
# ///
"""IDQL (Hansen-Estruch et al. 2023) on Hopper, Walker2d and HalfCheetah, from a clone.

A fork of lpds_continuous.py in which nothing is steered: a copy pi_theta of the decoder clones the
replay, good and bad alike, and critics choose among S chunks that it proposes: in evaluation the
best by Q^A, in training any, those above V the more often. V is an upper expectile of Q^A over what
was played: learning asks Q^A about nothing that nobody has tried, only choosing does.

    V(s) = expectile of Q^A(s, a)   Q^A(s, a) = r + gamma V(s')   a = a_j, j = argmax_i Q^A(s, a_i)

    python baselines/idql_continuous.py --env-id Walker2d-v4
    python baselines/idql_continuous.py --resume runs/RUN_FOLDER
    python enjoy.py runs/RUN_FOLDER --temperature 1 0

Sources: arXiv 2304.10573; tuned online from a clone: DPPO (Ren et al. 2024, arXiv 2409.00588).
Results and departures: docs/baselines.md. It takes entropy.py and backbones/ from one folder up.
"""

import copy
import json
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))  # entropy.py lies one folder up
from entropy import knn_entropy  # noqa: E402

DEFAULTS = {  # what differs from Args; chosen on other seeds than those of reported results
    "Hopper": dict(backbone="hopper-v4-medium-diffusion.pt", hidden_size=128),
    "Walker2d": dict(backbone="walker2d-v4-medium-diffusion.pt"),
    "HalfCheetah": dict(backbone="halfcheetah-v4-medium-diffusion.pt"),
}


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
    samples: int = 20
    """S, chunks proposed at a time, of which one is played"""
    expectile: float = 0.8
    """which expectile of Q^A is V: 0.5 is the mean over the replay, near 1 its best; below 1"""
    hidden_size: int = 256
    """width of the three hidden layers of the critics; the actor has its decoder's"""
    lr: float = 1e-3
    """Adam's learning rate of the critics"""
    actor_lr: float = 1e-4
    """Adam's learning rate of the actor"""
    # differs from DPPO: sizes for a small machine and 100,000 steps, not 72 million. There 40
    # environments, batches of 1,000 and a tau of 0.001. Each chunk is used 128 times, in the mean,
    # as it is here for the actor; for V and Q^A 640 times
    batch_size: int = 256
    """action chunks per gradient step"""
    gamma: float = 0.99
    """discount per action chunk, none inside it (DSRL's convention); below 1"""
    tau: float = 0.005
    """Polyak step of the target critic, once per gradient step"""
    num_envs: int = 4
    """environments stepped together"""
    train_freq: int = 2
    """chunks that each environment executes between train calls"""
    utd: int = 20
    """updates of V and Q^A per train call, so per train_freq * num_envs chunks"""
    actor_steps: int = 4
    """updates of the actor per train call"""
    prior_steps: int = 8_000
    """steps of the frozen policy before any training"""
    warmup_steps: int = 8_000
    """further steps in which only the critics learn and choose nothing, but in evaluations"""
    reward_scale: float | Literal["auto"] = "auto"
    """factor on rewards inside the critics; auto: Q is 15 at the prior's mean |reward|, step (7)"""
    eval_every: int = 10_000
    """steps between evaluations, each with a checkpoint and a fresh start of the environments"""
    eval_episodes: int = 20
    """episodes of an evaluation, the same ones every time"""
    log_every: int = 10_000
    """steps between rows of metrics.csv; rarely, as the entropy of the best of S takes long"""


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
        zero = value == 0 and name in ("seed", "warmup_steps")
        good = type(value) not in (int, float) or value > 0 or zero
        require(good, f"{flag}: must be above 0")
        require(name not in ("gamma", "tau", "expectile") or value < 1, f"{flag}: must be below 1")
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


class Decoder(nn.Module):
    """Phi: normalised obs (B, obs_dim), noise w (B, d) -> action chunk (B, d) in [-1, 1]; frozen.

    DPPO's (arXiv 2409.00588) residual MLP, run once per sampling step; the K steps are in its file.
    """

    def __init__(self, file: dict):
        super().__init__()
        self.obs_dim, self.dim = file["obs_dim"], file["chunk"] * file["action_dim"]
        self.kind, self.levels = file["kind"], file["levels"]  # levels: of noise, diffusion only
        activation = {"relu": nn.ReLU, "mish": nn.Mish}[file["activation"]]
        width, time_dim = file["width"], file["time_emb"].shape[1]
        self.first = nn.Linear(self.dim + time_dim + self.obs_dim, width)
        self.blocks = nn.ModuleList()
        for _ in range(file["num_blocks"]):
            layers = activation(), nn.Linear(width, width), activation(), nn.Linear(width, width)
            self.blocks.append(nn.Sequential(*layers))
        self.head = nn.Linear(width, self.dim)
        self.load_state_dict(file["model"])
        self.requires_grad_(False)
        self.register_buffer("time_emb", file["time_emb"])  # (K, time_dim), K sampling steps

    def forward(self, obs, noise):
        x = noise
        for i, time_emb in enumerate(self.time_emb):
            h = self.first(torch.cat([x, time_emb.expand(len(x), -1), obs], -1))
            for block in self.blocks:
                h = h + block(h)
            prediction = self.head(h)  # of the velocity (flow) or of the noise in x (diffusion)

            if self.kind == "flow":
                x = x + prediction / len(self.time_emb)  # Euler's method
            else:
                a, b, a_next, b_next = self.levels[i]  # x = a * clean action + b * noise
                clean = ((x - b * prediction) / a).clamp(-1, 1)  # clipped as in DPPO
                x = a_next * clean + b_next * (x - a * clean) / b  # DDIM, eta 0: no fresh noise
        return x.clamp(-1, 1)


def mlp(n_in: int, n_out: int, width: int):
    """[Linear, LayerNorm, Tanh] x 3 and a linear head, as DSRL's actor and critics."""
    layers = []
    for n in (n_in, width, width):
        layers += [nn.Linear(n, width), nn.LayerNorm(width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, n_out))


class TwinCritic(nn.ModuleList):  # two independent networks for Q^A(s, a) or Q^W(s, w)
    def forward(self, obs, x):  # (B, obs_dim), (B, d) -> (2, B)
        return torch.stack([q(torch.cat([obs, x], -1)).squeeze(-1) for q in self])


def denoising_loss(actor: Decoder, obs, action):
    """Behaviour cloning of actions (B, d), as in pre-training: find the noise that was mixed in."""
    # differs from DPPO: levels of noise are those that the sampler visits, not all 20
    i = torch.randint(len(actor.time_emb), (len(obs),), device=obs.device)
    a, b, _, _ = torch.tensor(actor.levels).to(obs)[i].T.unsqueeze(2)  # each (B, 1)
    noise = torch.randn_like(action)
    h = actor.first(torch.cat([a * action + b * noise, actor.time_emb[i], obs], -1))
    for block in actor.blocks:
        h = h + block(h)
    return (actor.head(h) - noise).square().mean()


class Agent(nn.Module):
    """The frozen decoder, the copy of it that learns, its critics, and the updates of both."""

    def __init__(self, args: Args, decoder: Decoder):
        super().__init__()
        self.args, self.decoder = args, decoder
        obs_dim, d, width = decoder.obs_dim, decoder.dim, args.hidden_size
        # differs from DPPO: the few steps of DDIM in its file, so that it starts as LP-DS does
        self.actor = copy.deepcopy(decoder).requires_grad_(True)
        self.register_buffer("shifts", torch.rand(args.samples, 1, d))  # see propose
        # differs from DPPO: critics of all methods have DSRL's layers; there plain ones with Mish
        self.q_a = TwinCritic(mlp(obs_dim + d, 1, width) for _ in range(2))
        self.q_a_target = TwinCritic(mlp(obs_dim + d, 1, width) for _ in range(2))
        self.q_a_target.load_state_dict(self.q_a.state_dict())
        self.v = mlp(obs_dim, 1, width)
        scale = 1.0 if args.reward_scale == "auto" else args.reward_scale
        self.register_buffer("reward_scale", torch.tensor(scale))
        groups = [{"params": [*self.q_a.parameters(), *self.v.parameters()]}]
        groups += [{"params": self.actor.parameters(), "lr": args.actor_lr}]
        self.optimizer = torch.optim.Adam(groups, lr=args.lr, fused=True)

    def weight(self, q, v):  # of a value in V's regression, and of an action in exploring
        return torch.where(q > v, self.args.expectile, 1 - self.args.expectile)

    def propose(self, obs, noise):
        """(B, obs_dim), (B, d) -> S chunks of each state (S, B, d), and their values (S, B)."""
        # differs from DPPO: one eps becomes S draws, each N(0, I) but not independent, so that act
        # needs nothing but eps, as in all scripts: fixed shifts of its quantiles, which wrap around
        quantile = (torch.special.ndtr(noise) + self.shifts) % 1  # (S, B, d)
        noise = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
        obs = obs.expand(len(noise), -1, -1).flatten(0, 1)
        action = self.actor(obs, noise.flatten(0, 1))
        value = self.q_a_target(obs, action).min(0).values
        return action.view(noise.shape), value.view(noise.shape[:2])

    @torch.no_grad()
    def act(self, obs, noise):  # the learned policy: eps (B, d) -> action chunk (B, d)
        action, value = self.propose(obs, noise)
        return action[value.argmax(0), torch.arange(len(obs))]

    @torch.no_grad()
    def explore(self, obs, noise):  # as act, but each proposal may be played, the better more often
        action, value = self.propose(obs, noise)
        # differs from DPPO: weights of the paper, which are V's; its code has others, 0.7 and 0.3
        weight = self.weight(value, self.v(obs).squeeze(1))  # (S, B)
        choice = torch.multinomial(weight.T, 1).squeeze(1)
        return action[choice, torch.arange(len(obs))]

    def descend(self, network, loss) -> None:  # a step of this network alone
        self.optimizer.zero_grad()  # the others' gradients stay None, and Adam skips those
        loss.backward(inputs=list(network.parameters()))
        self.optimizer.step()

    @torch.no_grad()
    def follow(self, target, network) -> None:
        """A step of Polyak averaging: the target follows slowly."""
        for slow, fast in zip(target.parameters(), network.parameters()):
            slow.lerp_(fast, self.args.tau)

    def update_value(self, batch: dict) -> dict:
        """V from Q^A by a lopsided regression: what lies above counts more, so V lies high."""
        obs = batch["obs"]
        with torch.no_grad():
            q = self.q_a_target(obs, batch["action"]).min(0).values  # (B,)
        v = self.v(obs).squeeze(1)
        loss = (self.weight(q, v) * (q - v).square()).mean()
        self.descend(self.v, loss)
        return {"losses/v": loss.detach(), "losses/v_value": v.detach().mean()}

    def update_action_critic(self, batch: dict) -> dict:
        """Q^A by TD: what comes after is worth V, so that no next action is made up."""
        with torch.no_grad():
            discount = self.args.gamma * (1 - batch["terminated"])
            next_value = self.v(batch["next_obs"]).squeeze(1)  # (B,)
            target = self.reward_scale * batch["reward"] + discount * next_value
        q = self.q_a(batch["obs"], batch["action"])  # (2, B)
        loss = 0.5 * (q - target).square().mean(1).sum()
        self.descend(self.q_a, loss)
        self.follow(self.q_a_target, self.q_a)
        return {"losses/q_a": loss.detach(), "losses/q_a_value": q.detach().mean()}

    def update_actor(self, batch: dict) -> dict:
        """BC of all that was played, unweighted: it gets better as what is chosen gets better."""
        loss = denoising_loss(self.actor, batch["obs"], batch["action"])
        self.descend(self.actor, loss)
        return {"losses/actor": loss.detach()}


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
    action, frozen = agent.act(obs, noise), agent.decoder(obs, noise)
    info = {}
    info["entropy/action"], info["entropy/ties"] = knn_entropy(action.view(states, n, -1))
    info["entropy/action_frozen"], _ = knn_entropy(frozen.view(states, n, -1))
    return info


def evaluate(policy, envs, device, seed: int = 0) -> dict:
    """The first episode of each environment; its start and noise depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, success = np.full((3, envs.num_envs), np.nan)
    seeds = np.random.SeedSequence([seed, 0, 1])  # of 3 words, training's in step (3) of 2
    obs, _ = envs.reset(seed=seeds.generate_state(envs.num_envs).tolist())
    while np.isnan(lengths).any():
        noise = torch.randn(envs.action_space.shape, generator=generator).to(device)
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
    known = file.get("format") == 2 and file["solver"] == "ddim"
    require(known, f"--backbone {path}: no diffusion of format 2; convert_dppo.py may help")
    every = args.num_envs * file["chunk"] * args.train_freq  # steps between train calls, at most
    require(args.eval_every >= every, f"--eval-every {args.eval_every}: --num-envs needs {every}")
    first_step = args.prior_steps + args.warmup_steps  # of the actor's learning
    need = first_step + every
    require(args.total_timesteps >= need, f"--total-timesteps {args.total_timesteps}: give {need}")
    decoder = Decoder(file).to(args.device)
    make = partial(make_env, args.env_id, file)
    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([make] * args.num_envs, autoreset_mode=mode)
    eval_envs = gym.vector.SyncVectorEnv([make] * args.eval_episodes, autoreset_mode=mode)
    agent = Agent(args, decoder).to(args.device)
    replay = Replay(args.total_timesteps + args.num_envs, decoder.obs_dim, decoder.dim, args.device)

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
    print(f"{run}: tunes a copy of {path.name} from step {first_step} on", flush=True)
    global_step = int(rows[-1]["global_step"])
    started = time.time() - rows[-1]["wall_seconds"]
    while True:  # one round: save, evaluate, then act and train for eval_every steps
        # (1) Save all that the rest of the run depends on: --resume goes on from here
        finite = all(parameter.isfinite().all() for parameter in agent.parameters())
        require(finite, f"--lr {args.lr}, --actor-lr: not finite; {run} keeps the last that were")
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
        ended, info, vector_step = [], {}, 0
        until = min((global_step // args.eval_every + 1) * args.eval_every, args.total_timesteps)
        while global_step < until:
            # (4) Act: eps ~ N(0, I) -> S chunks -> the one played; Phi's until the critics are warm
            noise = torch.randn(args.num_envs, decoder.dim, device=args.device)
            policy = agent.explore if global_step >= first_step else decoder
            action = policy(torch.as_tensor(obs, device=args.device), noise).cpu().numpy()

            # (5) Step: each environment executes its chunk; one that ends is reset at once
            next_obs, reward, terminated, truncated, infos = envs.step(action)
            real_next_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):
                real_next_obs[i] = infos["final_obs"][i]
                ended.append([infos["final_info"]["episode"][key][i] for key in ("r", "l")])
            before = global_step
            vector_step += 1
            global_step += sum(envs.get_attr("steps"))  # actions executed: fewer where one ended

            # (6) Store. differs from DPPO: only `terminated` ends the bootstrap, no time limit does
            replay.add(obs, action, reward, real_next_obs, terminated)
            obs = next_obs

            # (7) Once, scale rewards: the mean |reward| of the prior steps, for ever, is Q = 15.
            #     differs from DPPO: rewards are scaled by 0.01 there, whatever they are
            if args.reward_scale == "auto" and before < args.prior_steps <= global_step:
                mean = replay.data["reward"][: replay.size].abs().mean()
                require(mean > 0, "--reward-scale auto: no reward in prior steps; give a number")
                agent.reward_scale.fill_(15 * (1 - args.gamma) / mean)

            # (8) Train: utd x [V, Q^A], then actor_steps x actor
            if global_step >= args.prior_steps and vector_step % args.train_freq == 0:
                for _ in range(args.utd):
                    batch = replay.sample(args.batch_size)
                    info |= agent.update_value(batch)
                    info |= agent.update_action_critic(batch)
                if global_step >= first_step:
                    for _ in range(args.actor_steps):
                        info |= agent.update_actor(replay.sample(args.batch_size))

            # (9) Log the latest losses; only here are they read back from the device
            if global_step // args.log_every > before // args.log_every or global_step >= until:
                row = {"global_step": global_step, "wall_seconds": time.time() - started}
                row["charts/SPS"] = global_step / row["wall_seconds"]
                if ended:
                    row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(ended, 0)
                row |= info | probe(agent, replay, global_step)
                rows.append({key: float(value) for key, value in row.items()})
                log(run, rows, args.track)
                ended, info = [], {}
