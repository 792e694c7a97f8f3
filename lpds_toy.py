# /// script
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "mujoco<3.10", "tyro>=0.9", "matplotlib"]
# ///
"""What delta does, in one picture: LP-DS (Lagrangian Perturbation Diffusion Steering) in the plane.

A frozen policy a = Phi(w; s) reaches each of four goals about equally often (MultiGoal), or takes a
rod past six posts on one of 24 routes (Avoiding). Learned is a shift of its input noise, within a
budget delta. A small one keeps all ways; a large one returns more, on few of them. eps ~ N(0, I):

    w = eps + Delta_theta(s)     max_theta E[Q^W(s, w)]   such that   E||Delta_theta(s)||^2 <= delta

    python lpds_toy.py --delta 0.1
    python lpds_toy.py --env-id Avoiding --delta 0.3
    python lpds_toy.py --resume runs/RUN_FOLDER

A fork of lpds_continuous.py; read that first. Figures, metrics, departures: docs/lpds_toy.md.
"""

import json
import math
import signal
import sys
import time
import zipfile
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

# Differs from Args; Avoiding's delta is of the mean: the paper's, of a sum over d = 8, do little
AVOIDING = dict(backbone="avoiding-scripted-diffusion.pt", total_timesteps=50_000, utd=5)
AVOIDING |= dict(prior_steps=5_000, warmup_steps=5_000, hidden_size=128, delta_norm="mean")
AVOIDING |= dict(eval_every=5_000, eval_episodes=200)
DEFAULTS = {"MultiGoal": dict(backbone="multigoal-flow.pt"), "Avoiding": AVOIDING}


@dataclass
class Args:
    env_id: str = "MultiGoal"
    """MultiGoal, four goals in the plane, or Avoiding, 24 routes past six posts (MuJoCo)"""
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
    delta: float = 0.1
    """budget of E||Delta||^2: 0.01 keeps all goals, 1 keeps one or two"""
    delta_norm: Literal["sum", "mean"] = "sum"
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
    """clips each coordinate of w to +-bound; not needed with the Lagrangian"""
    hidden_size: int = 64
    """width of the three hidden layers of policy and critics"""
    lr: float = 3e-4
    """Adam's learning rate, all networks"""
    batch_size: int = 256
    """action chunks per gradient step"""
    gamma: float = 0.99
    """discount per action chunk, none inside it (DSRL's convention); below 1"""
    tau: float = 0.005
    """Polyak step of the target critic, once per gradient step"""
    num_envs: int = 10
    """environments stepped together"""
    utd: int = 2
    """updates of each network per vector step, that is for num_envs action chunks"""
    prior_steps: int = 1_000
    """steps of the unsteered policy before any training"""
    warmup_steps: int = 1_000
    """further steps in which only the critics learn, so that Delta never climbs untrained ones"""
    reward_scale: float | Literal["auto"] = "auto"
    """factor on rewards inside the critics; auto: Q is 15 at the prior's mean |reward|, step (7)"""
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


class Avoiding(gym.Env):
    """D3IL's Avoiding task: a rod has to pass three rows of posts and touch none; 24 routes do.

    obs (4,): the desired xy, and where the rod was before the last action, D3IL's lag; action (2,):
    by how much the desired xy moves in 35 ms; all in metres. Crossing y = 0.35 is worth 1 and ends
    the episode, as a touch does. The arm turns and reaches, and is fitted to that of D3IL's Panda.
    """

    ROWS = [(-0.1, 0.03, [0.5]), (0.08, 0.025, [0.425, 0.575]), (0.26, 0.025, [0.35, 0.5, 0.65])]
    CIRCLES = [(x, y, radius) for y, radius, row in ROWS for x in row]
    START = np.array([0.52492847, -0.27973673])
    MOTORS = [("turn", 0.027, 22.509, 1.8696, 1.3105), ("reach", 0.0813, 1068.37, 62.834, 2.3215)]
    observation_space = gym.spaces.Box(-2.0, 2.0, (4,), np.float64)
    action_space = gym.spaces.Box(-0.02, 0.02, (2,))  # people used at most 0.0154

    def __init__(self):
        post = '<geom type="cylinder" pos="{} {} 0" size="{} 0.1"/>'
        posts = "".join(post.format(*circle) for circle in self.CIRCLES)
        motors = ""  # force kp (g - q) + kd (f g' - q'), g is ctrl filtered: tau g' = ctrl - g
        for joint, tau, kp, kd, f in self.MOTORS:
            slow = f'dyntype="filter" dynprm="{tau}" biastype="affine" biasprm="0 {-kp} {-kd}"'
            motors += f'<general joint="{joint}" gainprm="{kp - kd * f / tau}" {slow}/>'
            motors += f'<general joint="{joint}" gainprm="{kd * f / tau}"/>'
        self.model = mujoco.MjModel.from_xml_string(f"""<mujoco>
            <option timestep="0.001" gravity="0 0 0" cone="elliptic" impratio="3"/>
            <worldbody>{posts}
              <body><joint name="turn" axis="0 0 1" armature="0.1831"/>
                <inertial pos="0 0 0" mass="0.001" diaginertia="1e-6 1e-6 1e-6"/>
                <body><joint name="reach" type="slide" axis="1 0 0"/>
                  <inertial pos="0 0 0" mass="1" diaginertia="1e-5 1e-5 1e-5"/>
                  <geom type="cylinder" pos="0 0 0.15" size="0.01 0.15"/></body></body>
            </worldbody><actuator>{motors}</actuator></mujoco>""")
        self.data = mujoco.MjData(self.model)

    def polar(self, xy):  # (2,) -> turn and reach, no further out than the arm gets
        x = min(xy[0], math.sqrt(max(0.8114**2 - xy[1] ** 2, 0)))
        return np.array([math.atan2(xy[1], x), math.hypot(x, xy[1])])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos = self.data.act = self.polar(self.START)
        self.time, self.desired = 0, self.START
        self.path = np.tile(self.START, (151, 1))
        return np.tile(self.START, 2), {}

    def step(self, action):
        self.desired = self.desired + action
        self.data.ctrl = self.polar(self.desired).repeat(2)
        mujoco.mj_step(self.model, self.data, 35)
        turn, reach = self.data.qpos
        self.time += 1
        self.path[self.time :] = reach * math.cos(turn), reach * math.sin(turn)
        touched = self.data.ncon > 0
        crossed = bool(self.path[self.time, 1] > 0.35) and not touched
        mode = self.route() if crossed else -1
        info = {"success": crossed, "mode": mode, "path": self.path.copy()}
        obs = np.concatenate([self.desired, self.path[self.time - 1]])
        return obs, float(crossed), crossed or touched, False, info

    def route(self) -> int:  # by the gap of each row through which the rod went first
        gaps = []
        for y, _, row in self.ROWS:
            x = self.path[(self.path[:, 1] >= y).argmax(), 0]
            gaps.append(np.searchsorted(row, x))
        return int(np.ravel_multi_index(gaps, (2, 3, 4)))


gym.register("MultiGoal-v0", MultiGoal, max_episode_steps=20)
gym.register("Avoiding-v0", Avoiding, max_episode_steps=150)


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
def probe(agent: Agent, replay: Replay) -> dict:
    """||Delta||^2 over all states so far (its mean is constrained), and at the first, the start."""
    spent = agent.perturbation(replay.data["obs"][: replay.size]).square()
    spent = spent.sum(1) if agent.args.delta_norm == "sum" else spent.mean(1)
    return {"trust_region/replay_sq_norm": spent.mean(), "trust_region/start_sq_norm": spent[0]}


def evaluate(policy, envs, device, seed: int = 0) -> dict:
    """The first episode of each environment; its start and noise depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, success, mode = np.full((4, envs.num_envs), np.nan)
    paths = [None] * envs.num_envs
    seeds = np.random.SeedSequence([seed, 0, 1])  # of 3 words, training's in step (3) of 2
    obs, _ = envs.reset(seed=seeds.generate_state(envs.num_envs).tolist())
    while np.isnan(lengths).any():
        noise = torch.randn(envs.action_space.shape, generator=generator).to(device)
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
    path = path if path.is_file() else Path(__file__).parent / "backbones" / args.backbone
    require(zipfile.is_zipfile(path), f"--backbone {path}: no decoder; see pretrain_backbone.py")
    file = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    known = file.get("format") == 2 and file["solver"] in ("ddim", "euler")
    require(known, f"--backbone {path}: no DDIM or Euler of format 2; convert_dppo.py may help")
    every = args.num_envs * file["chunk"]  # steps between train calls, at most
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
    rows, evals, paths = [{"global_step": 0, "wall_seconds": 0.0}], [], []
    if args.resume:
        state = torch.load(run / "checkpoint.pt", map_location=args.device, weights_only=True)
        require(state["script"] == Path(__file__).name, f"--resume {run}: is of {state['script']}")
        agent.load_state_dict(state["agent"])
        agent.optimizer.load_state_dict(state["optimizer"])
        replay.add(*state["replay"].values())
        rows, evals, paths = state["rows"], state["evals"], state["paths"]
    save(run / "backbone.pt", partial(torch.save, file))
    save(run / "args.json", partial(Path.write_text, data=json.dumps(asdict(args), indent=1)))

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
        state = {"script": Path(__file__).name, "rows": rows, "evals": evals, "paths": paths}
        state |= {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}
        state["replay"] = {k: column[: replay.size].clone() for k, column in replay.data.items()}
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
        print(f"step {global_step:>7}: {score}, {spread}, alpha {agent.alpha:.3g}", flush=True)
        if global_step >= args.total_timesteps:
            break

        # (3) Truncate all episodes and seed afresh, so that a resume needs no simulator state
        words = np.random.SeedSequence([args.seed, global_step]).generate_state(1 + args.num_envs)
        torch.manual_seed(int(words[0]))
        obs, _ = envs.reset(seed=words[1:].tolist())
        ended, info = [], {}
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

            # (8) Train in DSRL's order: utd x [Q^A, Delta, alpha], then utd x Q^W
            if global_step >= args.prior_steps:
                for _ in range(args.utd):
                    batch = replay.sample(args.batch_size)
                    info |= agent.update_action_critic(batch)
                    if global_step >= first_step:  # prior_steps + warmup_steps
                        info |= agent.update_perturbation(batch)
                batch = replay.sample(args.batch_size * args.utd)
                info |= agent.update_latent_critic(batch)

            # (9) Log the latest losses; only here are they read back from the device
            if global_step >= until:
                row = {"global_step": global_step, "wall_seconds": time.time() - started}
                row["charts/SPS"] = global_step / row["wall_seconds"]
                if ended:
                    row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(ended, 0)
                row |= info | probe(agent, replay)
                rows.append({key: float(value) for key, value in row.items()})
                log(run, rows)

    panels = {"frozen": (paths[0], evals[0]["mode"]), "steered": (paths[1], evals[-1]["mode"])}
    draw(run / "paths.png", eval_envs.envs[0].unwrapped, panels)
