# /// script
# dependencies = ["torch>=2.6", "gymnasium-robotics>=1.4,<1.4.3", "mujoco<3.10", "tyro", "wandb"]
# ///
"""LP-DS on Adroit, a hand of 24 joints: pen, hammer, door, relocate; with a flow-matching decoder.

Frozen: a policy a = Phi(w; s) that turns noise w into eight actions at once by following a learned
velocity, dx/dt = v(x, t; s), from x(0) = w to x(1) = a. Learned: a shift Delta of eps ~ N(0, I).

    w = eps + Delta_theta(s)     max_theta E[Q^W(s, w)]   such that   E||Delta_theta(s)||^2 <= delta

A fork of lpds_continuous.py; read that first. New: tasks, success, decoder; w clipped at +-2.5.

    python lpds_adroit_flow.py --env-id AdroitHandPen-v1
    python lpds_adroit_flow.py --resume runs/RUN_FOLDER
    python enjoy.py runs/RUN_FOLDER --temperature 1 0.5 0

Results, metrics and departures: docs/lpds_adroit_flow.md. To fork, copy this file and entropy.py.
"""

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

from entropy import knn_entropy

try:
    import gymnasium_robotics
except ImportError:
    sys.exit("error: gymnasium-robotics is missing: pip install -r requirements/adroit.txt")
gym.register_envs(gymnasium_robotics)

# What differs from Args; from the paper: noise_bound (table 3), utd (1), delta (2; there a sum)
ADROIT = dict(noise_bound=2.5, num_envs=16, train_freq=1, utd=10, total_timesteps=160_000)
ADROIT |= dict(prior_steps=16_000, warmup_steps=16_000, eval_every=16_000, eval_episodes=50)
DEFAULTS = {}
for task, delta in dict(Pen=0.35, Hammer=0.10, Door=0.35, Relocate=0.35).items():
    values = ADROIT | dict(backbone=f"adroit-{task.lower()}-flow.pt", delta=delta)
    DEFAULTS |= {f"AdroitHand{task}": values, f"AdroitHand{task}Sparse": values}


@dataclass
class Args:
    env_id: str = "AdroitHandPen-v1"
    """AdroitHandPen-v1 or AdroitHandPenSparse-v1, likewise Hammer, Door and Relocate"""
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
    delta: float = 0.35
    """budget of E||Delta||^2: small keeps the decoder's variety, large gives it up; try 0.1 to 1"""
    delta_norm: Literal["sum", "mean"] = "mean"
    """||Delta||^2: sum over the d coordinates of the noise (equation 7), or mean: d times looser"""
    lagrangian: bool = True
    """--no-lagrangian fixes alpha at 0 (ablation): only --noise-bound then limits w"""
    dual: Literal["log", "linear"] = "log"
    """log: relative steps of alpha, for any scale of rewards; linear: equation 10 as printed"""
    alpha_init: float = 1.0
    """first price of the constraint, in Q per unit of ||Delta||^2"""
    alpha_lr: float = 1e-2
    """learning rate of the dual update"""
    noise_bound: float = float("inf")
    """clips each coordinate of w to +-bound (the paper's is 2.5); inf: only delta limits w"""
    hidden_size: int = 256
    """width of the three hidden layers of policy and critics"""
    lr: float = 3e-4
    """Adam's learning rate, all networks"""
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
    """updates of Q^A, Delta and alpha per train call, so per train_freq * num_envs chunks"""
    distill_steps: int = 10
    """updates of Q^W per train call"""
    prior_steps: int = 8_000
    """steps of the unsteered policy before any training"""
    warmup_steps: int = 8_000
    """further steps in which only the critics learn, so that Delta never climbs untrained ones"""
    reward_scale: float | Literal["auto"] = "auto"
    """factor on rewards inside the critics; auto: Q is 15 at the prior's mean |reward|, step (7)"""
    eval_every: int = 10_000
    """steps between evaluations, each with a checkpoint and a fresh start of the environments"""
    eval_episodes: int = 20
    """episodes of an evaluation, the same ones every time"""
    log_every: int = 2_000
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

    def reset(self, **kwargs):
        self.success = False
        return self.env.reset(**kwargs)

    def step(self, chunk):  # (d,), d = actions per chunk * size of an action
        total = 0.0
        self.steps = 0  # how many actions of the chunk were executed
        for action in chunk.reshape(-1, *self.env.action_space.shape):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            self.steps += 1
            self.success |= bool(info["success"])  # in any step of the episode
            if terminated or truncated:
                break  # differs from DSRL: its wrapper steps on and adds up the rewards

        where = f"{self.unwrapped.spec.id}, step {self.get_wrapper_attr('episode_lengths')}"
        require(np.isfinite([total, *obs]).all(), f"--env-id {where}: not finite, or --lr too high")
        return obs, total, terminated, truncated, info | {"success": self.success}


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


class Decoder(nn.Module):  # dx/dt = v(x, t; obs) in equal steps of Euler or Heun, v DPPO's MLP
    """Phi: normalised obs (B, obs_dim), noise w (B, d) -> actions (B, d) in [-1, 1]; frozen."""

    def __init__(self, file: dict):
        super().__init__()
        self.obs_dim, self.dim = file["obs_dim"], file["chunk"] * file["action_dim"]
        self.solver = file["solver"]
        self.steps = len(file["time_emb"]) - (self.solver == "heun")  # Heun also asks at t = 1
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
        self.register_buffer("time_emb", file["time_emb"])  # (times, time_dim): 0, 1/steps, ...

    def velocity(self, i: int, x, obs):  # at t = i / steps: x (B, d) -> dx/dt (B, d)
        h = self.first(torch.cat([x, self.time_emb[i].expand(len(x), -1), obs], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)

    def forward(self, obs, noise):
        x = noise
        for i in range(self.steps):
            slope = self.velocity(i, x, obs)
            if self.solver == "heun":  # the mean of the slopes here and where Euler's step leads
                slope = (slope + self.velocity(i + 1, x + slope / self.steps, obs)) / 2
            x = x + slope / self.steps
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


class Agent(nn.Module):
    """The frozen decoder, all that is learned around it, and the updates of Algorithm 1."""

    def __init__(self, args: Args, decoder: Decoder):
        super().__init__()
        self.args, self.decoder = args, decoder
        obs_dim, d, width = decoder.obs_dim, decoder.dim, args.hidden_size
        self.perturbation = mlp(obs_dim, d, width)  # Delta_theta
        for parameter in self.perturbation[-1].parameters():
            nn.init.zeros_(parameter)  # the first policy is the frozen one
        self.q_a = TwinCritic(mlp(obs_dim + d, 1, width) for _ in range(2))
        self.q_a_target = TwinCritic(mlp(obs_dim + d, 1, width) for _ in range(2))
        self.q_a_target.load_state_dict(self.q_a.state_dict())
        self.q_w = TwinCritic(mlp(obs_dim + d, 1, width) for _ in range(2))
        self.register_buffer("alpha", torch.tensor(args.alpha_init if args.lagrangian else 0.0))
        scale = 1.0 if args.reward_scale == "auto" else args.reward_scale
        self.register_buffer("reward_scale", torch.tensor(scale))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.lr, fused=True)  # see descend

    def steer(self, obs, noise):  # eps (B, d) -> w (B, d), equation 4
        return (noise + self.perturbation(obs)).clamp(-self.args.noise_bound, self.args.noise_bound)

    @torch.no_grad()
    def act(self, obs, noise):  # the steered policy: eps (B, d) -> action chunk (B, d)
        return self.decoder(obs, self.steer(obs, noise))

    def descend(self, network, loss) -> None:  # a step of this network alone
        self.optimizer.zero_grad()  # the others' gradients stay None, and Adam skips those
        loss.backward(inputs=list(network.parameters()))
        self.optimizer.step()

    def update_action_critic(self, batch: dict) -> dict:
        """Q^A by TD, then its target by Polyak averaging (Algorithm 1, lines 8-11 and 20)."""
        with torch.no_grad():
            # SAC's target without the entropy bonus, for the steered policy's next chunk
            next_action = self.act(batch["next_obs"], torch.randn_like(batch["action"]))
            next_value = self.q_a_target(batch["next_obs"], next_action).min(0).values  # (B,)
            discount = self.args.gamma * (1 - batch["terminated"])
            target = self.reward_scale * batch["reward"] + discount * next_value
        q = self.q_a(batch["obs"], batch["action"])  # (2, B)
        loss = 0.5 * (q - target).square().mean(1).sum()
        self.descend(self.q_a, loss)
        with torch.no_grad():
            for slow, fast in zip(self.q_a_target.parameters(), self.q_a.parameters()):
                slow.lerp_(fast, self.args.tau)
        return {"losses/q_a": loss.detach(), "losses/q_a_value": q.detach().mean()}

    def update_latent_critic(self, batch: dict) -> dict:
        """Q^W from Q^A(s, Phi(w; s)) at w ~ N(0, I) (Algorithm 1, lines 12-15), by slices."""
        n = self.args.batch_size  # of a slice; the batch of step (8) holds several
        noise = torch.randn_like(batch["action"])
        with torch.no_grad():  # neither network changes here: one pass serves all slices
            target = self.q_a(batch["obs"], self.decoder(batch["obs"], noise))  # (2, B)
        for obs, w, y in zip(batch["obs"].split(n), noise.split(n), target.split(n, dim=1)):
            loss = 0.5 * (self.q_w(obs, w) - y).square().mean(1).sum()  # each twin copies its own
            self.descend(self.q_w, loss)
        return {"losses/q_w": loss.detach(), "losses/q_w_value": target.mean()}  # value: of Q^A

    def update_perturbation(self, batch: dict) -> dict:
        """Primal step on theta, dual step on alpha (Algorithm 1, lines 16-19; eqs. 8 and 10)."""
        # Primal, like SAC's actor loss: raise Q^W(s, w), pay alpha for ||Delta||^2; Phi is not run
        noise = torch.randn_like(batch["action"])
        shift = self.perturbation(batch["obs"])  # (B, d)
        w = (noise + shift).clamp(-self.args.noise_bound, self.args.noise_bound)  # as steer() does
        value = self.q_w(batch["obs"], w).min(0).values  # (B,)
        sum_norm = shift.square().sum(1).mean()  # E||Delta||^2 as equation 7 prints it
        sq_norm = sum_norm if self.args.delta_norm == "sum" else sum_norm / shift.shape[1]
        loss = self.alpha * (sq_norm - self.args.delta) - value.mean()
        self.descend(self.perturbation, loss)

        # Dual: alpha rises while sq_norm exceeds delta. differs from the paper: equation 10 adds
        # a step whose right size depends on the scale of Q; "log" multiplies alpha instead
        violation = sq_norm.detach() / self.args.delta - 1  # relative, at least -1; 5 caps outliers
        if self.args.lagrangian and self.args.dual == "log":
            self.alpha.mul_((self.args.alpha_lr * violation.clamp(max=5)).exp()).clamp_(min=1e-6)
        elif self.args.lagrangian:
            self.alpha.add_(self.args.alpha_lr * self.args.delta * violation).clamp_(min=0)
        info = {"trust_region/sq_norm": sq_norm, "trust_region/violation": violation}
        info["trust_region/alpha"] = self.alpha.clone()
        info["trust_region/kl"] = 0.5 * sum_norm  # KL(N(Delta, I) || N(0, I)), ignoring noise_bound
        info["losses/perturbation"] = loss
        return {key: value.detach() for key, value in info.items()}


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
    """What steering does at states of the replay, over n draws of noise at each."""
    generator = torch.Generator(replay.device).manual_seed(seed)  # leaves the run's noise alone
    obs = replay.sample(states, generator)["obs"].repeat_interleave(n, 0)
    noise = torch.randn(len(obs), agent.decoder.dim, device=replay.device, generator=generator)
    steered, frozen = agent.act(obs, noise), agent.decoder(obs, noise)
    info = {}
    info["entropy/action"], info["entropy/ties"] = knn_entropy(steered.view(states, n, -1))
    info["entropy/action_frozen"], _ = knn_entropy(frozen.view(states, n, -1))

    # Does Q^W follow Q^A over the noises of a state? Pearson's correlation; the actor climbs Q^W
    q_w = agent.q_w(obs, agent.steer(obs, noise)).mean(0).view(states, n)
    q_a = agent.q_a(obs, steered).mean(0).view(states, n)
    q_w, q_a = q_w - q_w.mean(1, keepdim=True), q_a - q_a.mean(1, keepdim=True)
    return info | {"losses/q_w_corr": torch.cosine_similarity(q_w, q_a).mean()}


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
            success[i] = infos["final_info"]["success"][i]
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
    hand = args.env_id.startswith("AdroitHand") and args.env_id in gym.registry
    require(hand, f"--env-id {args.env_id}: no AdroitHand task of gymnasium-robotics 1.4 (-v1)")
    path = Path(args.resume, "backbone.pt") if args.resume else Path(args.backbone)
    path = path if path.is_file() else Path(__file__).parent / "backbones" / args.backbone
    require(zipfile.is_zipfile(path), f"--backbone {path}: no decoder; see pretrain_backbone.py")
    file = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    known = file.get("format") == 2 and file["solver"] in ("euler", "heun")
    require(known, f"--backbone {path}: no flow of format 2; pretrain_backbone.py makes them")
    every = args.num_envs * file["chunk"] * args.train_freq  # steps between train calls, at most
    require(args.eval_every >= every, f"--eval-every {args.eval_every}: --num-envs needs {every}")
    first_step = args.prior_steps + args.warmup_steps  # of steering
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
    print(f"{run}: steers {path.name}, d = {decoder.dim}, from step {first_step} on", flush=True)
    global_step = int(rows[-1]["global_step"])
    started = time.time() - rows[-1]["wall_seconds"]
    while True:  # one round: save, evaluate, then steer and train for eval_every steps
        # (1) Save all that the rest of the run depends on: --resume goes on from here
        finite = all(parameter.isfinite().all() for parameter in agent.parameters())
        require(finite, f"--lr {args.lr}: weights not finite; {run} keeps the last that were")
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
        print(f"step {global_step:>7}: {score}, alpha {agent.alpha:.3g}", flush=True)
        if global_step >= args.total_timesteps:
            break

        # (3) Truncate all episodes and seed afresh, so that a resume needs no simulator state
        words = np.random.SeedSequence([args.seed, global_step]).generate_state(1 + args.num_envs)
        torch.manual_seed(int(words[0]))
        obs, _ = envs.reset(seed=words[1:].tolist())
        ended, info, vector_step = [], {}, 0
        until = min((global_step // args.eval_every + 1) * args.eval_every, args.total_timesteps)
        while global_step < until:
            # (4) Act: eps ~ N(0, I) -> w -> a = Phi(w; s); Delta is 0 until the critics are warm
            noise = torch.randn(args.num_envs, decoder.dim, device=args.device)
            action = agent.act(torch.as_tensor(obs, device=args.device), noise).cpu().numpy()

            # (5) Step: each environment executes its chunk; one that ends is reset at once
            next_obs, reward, terminated, truncated, infos = envs.step(action)
            real_next_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):
                real_next_obs[i] = infos["final_obs"][i]
                ended.append([infos["final_info"]["episode"][key][i] for key in ("r", "l")])
            before = global_step
            vector_step += 1
            global_step += sum(envs.get_attr("steps"))  # actions executed: fewer where one ended

            # (6) Store. differs from DSRL: only `terminated` ends the bootstrap, no time limit does
            replay.add(obs, action, reward, real_next_obs, terminated)
            obs = next_obs

            # (7) Once, scale rewards: the mean |reward| of the prior steps, for ever, is Q = 15.
            #     differs from DSRL: on raw rewards Q is in the hundreds, and Q^W lags behind
            if args.reward_scale == "auto" and before < args.prior_steps <= global_step:
                mean = replay.data["reward"][: replay.size].abs().mean()
                require(mean > 0, "--reward-scale auto: no reward in prior steps; give a number")
                agent.reward_scale.fill_(15 * (1 - args.gamma) / mean)

            # (8) Train in DSRL's order: utd x [Q^A, Delta, alpha], then distill_steps x Q^W
            if global_step >= args.prior_steps and vector_step % args.train_freq == 0:
                for _ in range(args.utd):
                    batch = replay.sample(args.batch_size)
                    info |= agent.update_action_critic(batch)
                    if global_step >= first_step:  # prior_steps + warmup_steps
                        info |= agent.update_perturbation(batch)
                batch = replay.sample(args.batch_size * args.distill_steps)
                info |= agent.update_latent_critic(batch)

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
