# /// script
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "gymnasium-robotics>=1.4,<1.4.3",
#   "mujoco<3.10", "tyro>=0.9", "matplotlib>=3.8", "imageio[ffmpeg]>=2.31", "pillow>=10.1"]
# ///
"""Plays a run of any script, finished or still going on: a table, curves, a film, one program.

It imports the script that made the run and uses its Args, make_env, Decoder, Agent and evaluate,
on episodes that neither the run's training nor its evaluation ever has.

    python enjoy.py runs/RUN_FOLDER --temperature 1 0.5 0
    python enjoy.py runs/RUN_FOLDER --curves curves.png --video walk.mp4
    python enjoy.py runs/RUN_FOLDER --export policy.pt2 --episodes 0

At temperature tau the steered policy plays w = tau * eps + Delta(s), the frozen one w = tau * eps:
1 is what was trained, 0 leaves one action per state (of DSRL, that of its mean noise). sq_norm is
E||Delta||^2 in the run's --delta-norm, kl the divergence of w from N(0, I), without a bound.

The exported program needs torch alone, takes raw observations and refuses what is not finite:

    policy = torch.export.load("policy.pt2").module()
    actions = policy(obs, tau * torch.randn(len(obs), d))  # (B, obs_dim) -> (B, chunk, action_dim)
"""

import contextlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

from entropy import knn_entropy

PANELS = {  # of --curves: title -> columns of metrics.csv
    "return": ("charts/episodic_return", "eval/episodic_return", "eval/frozen_return"),
    "success": ("eval/success", "eval/frozen_success"),
    "action entropy": ("entropy/action", "entropy/action_frozen"),
    "use of the budget": ("trust_region/sq_norm",),
}


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_FOLDER")]
    """run folder of a script"""
    checkpoint: Literal["last", "best"] = "last"
    """last: where the run stopped, or is now; best: its highest evaluation, partly luck"""
    script: str = ""
    """the script that made the run, if it is neither beside enjoy.py nor in baselines/"""
    temperature: tuple[float, ...] = (1.0, 0.0)
    """factors on the noise eps"""
    episodes: int = 20
    """episodes of each policy at each temperature, the same for all; 0 evaluates nothing"""
    seed: int = 1
    """seed of these episodes; whatever it is, training and its evaluation have others"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda or cuda:1"""
    json: str = ""
    """FILE.json for the numbers and every episode"""
    curves: str = ""
    """FILE.png for the course of the run: return, success, entropy, budget"""
    video: str = ""
    """FILE.mp4 for a film of the evaluation, frozen and steered side by side"""
    video_episodes: int = 1
    """how many of its first 20 episodes are filmed, at each temperature"""
    export: str = ""
    """FILE.pt2 for the steered policy, its normalisation included, as one program; not of pi0"""


def require(condition, message: str) -> None:
    """Ends the program with one sentence in place of a traceback, for mistakes easily made."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_args() -> Args:
    args = tyro.cli(Args, description=__doc__)
    files = {"json": ".json", "curves": ".png", "video": ".mp4", "export": ".pt2"}
    for name, ending in files.items():  # now, not after minutes of evaluation
        path = getattr(args, name)
        require(path.endswith(ending) or not path, f"--{name} {path}: must end in {ending}")
        require(Path(path).parent.is_dir(), f"--{name} {path}: make its folder first")
    require(args.episodes > 0 or not args.json + args.video, "--episodes 0: no --json, no --video")
    require(not args.curves or find_spec("matplotlib"), "--curves: first pip install matplotlib")
    found = not args.video or all(map(find_spec, ("imageio", "imageio_ffmpeg", "PIL")))
    require(found, '--video: first pip install "imageio[ffmpeg]" pillow')
    return args


def read(path: Path) -> dict:
    """A file of plain tensors. Run folders travel: no pickle's code is run (pi0's programs are)."""
    require(path.is_file(), f"{path}: no such file; give a run folder, usually below runs/")
    try:  # mmap: a checkpoint carries the whole replay, of which nothing is needed
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch's own message recommends to load it without protection
        require(False, f"{path}: damaged or not of plain tensors; nothing in it was run")


def load_script(args: Args, name: str):
    """Imports the script that made the run; what follows its `if __name__` does not run."""
    here, name = Path(__file__).parent, Path(name).name  # no folder: the checkpoint is not trusted
    places = [Path(args.script)] if args.script else [here / name, here / "baselines" / name]
    path = next((place for place in places if place.is_file()), None)
    require(path, f"--script {places[0]}: no such file; give the script that made {args.run}")
    sys.path.insert(0, str(path.parent))
    return import_module(path.stem)


def load_agent(args: Args, script, state: dict, file: dict):
    """The run's Args and agent: agent.act is the steered policy, agent.decoder the frozen one."""
    stored = json.loads(Path(args.run, "args.json").read_text())
    same = stored.keys() == script.Args.__dataclass_fields__.keys()
    require(same, f"--script {script.__file__}: of another version than {args.run}; give that one")
    run_args = script.Args(**stored | {"device": args.device})
    agent = script.Agent(run_args, script.Decoder(file))
    agent.load_state_dict(state["agent"])
    return run_args, agent.to(args.device).requires_grad_(False)


def make_envs(make, n: int, filmed: int = 0):
    """n environments for the script's evaluate; the first ones can draw."""
    makers = [partial(make, render_mode="rgb_array")] * filmed + [make] * (n - filmed)
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def play(script, policy, tau: float, envs, args: Args) -> tuple:
    """The script's own evaluation, an episode in each environment at a time; also its states."""
    seen = []

    def tempered(obs, noise):
        seen.append(obs)
        return policy(obs, tau * noise)

    # Spread over 32 bits: --seed 1 and 2 share no episode, nor does the run's evaluation, seed 0
    groups = math.ceil(args.episodes / envs.num_envs)
    seeds = np.random.SeedSequence(args.seed).generate_state(groups).tolist()
    parts = [script.evaluate(tempered, envs, args.device, seed) for seed in seeds]
    result = {key: [x for part in parts for x in part[key]] for key in parts[0]}
    return {key: x[: args.episodes] for key, x in result.items()}, torch.cat(seen)


def measure(policies: dict, tau: float, agent, run_args, obs) -> dict:
    """Entropy and size of Delta in states obs (N, obs_dim) of these episodes, not of replay."""
    d = agent.decoder.dim
    states = obs[torch.linspace(0, len(obs) - 1, 64).long()].repeat_interleave(64, 0)
    noise = torch.randn(64 * 64, d, generator=torch.Generator().manual_seed(0)).to(obs.device)
    numbers = {}
    for name, policy in policies.items():
        entropy, ties = knn_entropy(policy(states, tau * noise).view(64, 64, -1))
        numbers[name] = {"entropy": float(entropy), "ties": float(ties)}

    if hasattr(agent, "perturbation"):  # LP-DS; other methods have no Delta
        sum_norm = float(agent.perturbation(obs).square().sum(1).mean())
        mean = getattr(run_args, "delta_norm", "mean") == "mean"  # pi0's has no other
        numbers["steered"]["sq_norm"] = sum_norm / d if mean else sum_norm
        if hasattr(agent, "steer") and tau > 0:  # it shifts noise, and not actions as LP-DS-A
            numbers["steered"]["kl"] = 0.5 * (sum_norm + d * (tau**2 - 1 - 2 * math.log(tau)))
    return numbers


def print_row(tau: float, name: str, numbers: dict) -> None:
    cells = [f"{tau:<4g} {name:<7}"]
    for key, digits in (("return", 1), ("success", 3), ("length", 1)):
        x = np.array(numbers[key])
        error = x.std() / math.sqrt(len(x) - 1) if len(x) > 1 else math.nan  # of the mean
        cells.append(f"{x.mean():.{digits}f} +- {error:.{digits}f}".rjust(16))
    for key in ("entropy", "ties", "sq_norm", "kl"):
        empty = key not in numbers or (key == "entropy" and numbers["ties"] == 1)
        cells.append(f"{'-':>8}" if empty else f"{numbers[key]:>8.3f}")
    print(" ".join(cells), flush=True)


def evaluate_all(args: Args, script, envs, cameras: list, agent, run_args) -> dict:
    """Frozen and steered at each temperature: prints the table as it comes, returns its numbers."""
    print(f"{args.episodes} episodes of seed {args.seed}; mean +- standard error, entropy in nats")
    wide, narrow = ("return", "success", "length"), ("entropy", "ties", "sq_norm", "kl")
    print("tau  policy ", *(f"{key:>16}" for key in wide), *(f"{key:>8}" for key in narrow))
    policies = {"frozen": agent.decoder, "steered": agent.act}
    numbers = {name: {} for name in policies}
    for tau in args.temperature:
        key = f"{tau:g}"
        for name, policy in policies.items():
            for camera in cameras:
                camera.start(f"{name}, temperature {tau:g}, return")
            numbers[name][key], visited = play(script, policy, tau, envs, args)
        measured = measure(policies, tau, agent, run_args, visited)  # by steered, the last
        for name in policies:
            numbers[name][key] |= measured[name]
            print_row(tau, name, numbers[name][key])
    return numbers


def draw_curves(run: Path, run_args, target: str) -> None:
    """Columns of metrics.csv under their own names; dashed is what to compare them with."""
    from matplotlib.figure import Figure

    path = run / "metrics.csv"
    require(path.is_file(), f"--curves: {run} has no evaluation yet; wait for the first one")
    rows = np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)
    figure = Figure((14, 3.5), layout="constrained")
    panels = [panel for panel in PANELS.items() if set(panel[1]) & set(rows.dtype.names)]
    for axis, (title, keys) in zip(figure.subplots(1, len(panels)), panels):
        for key in [key for key in keys if key in rows.dtype.names]:
            known = rows[np.isfinite(rows[key])]
            axis.plot(known["global_step"], known[key], "k--" if "frozen" in key else "", label=key)
        if "trust_region/sq_norm" in keys and hasattr(run_args, "delta"):
            axis.axhline(run_args.delta, linestyle="--", color="k", label="delta")
        axis.set(title=title, xlabel="environment steps")
        axis.legend(*axis.get_legend_handles_labels(), fontsize="small")
    figure.savefig(target, dpi=150)


def watch(env, note) -> None:
    """Calls note(obs, action, reward) after each reset and primitive step of the bare env."""
    base = env.unwrapped
    reset, step = base.reset, base.step

    def watched_reset(**kwargs):
        obs, info = reset(**kwargs)
        note(obs, None, 0.0)
        return obs, info

    def watched_step(action):
        obs, reward, *rest = step(action)
        note(obs, action, reward)
        return obs, reward, *rest

    base.reset, base.step = watched_reset, watched_step


class Camera:
    """Films the first episode after each start(label): a list of packed frames for each."""

    def __init__(self, env):
        self.env, self.films = env.unwrapped, []
        with contextlib.suppress(AttributeError, KeyError):  # MuJoCo's default soon loses a walker
            self.env.mujoco_renderer.camera_id = self.env.model.camera("track").id
        watch(env, self.shoot)

    def start(self, label: str) -> None:
        self.label, self.resets = label, 0
        self.films.append([])

    def shoot(self, obs, action, reward) -> None:
        from PIL import Image, ImageDraw

        if action is None:  # a reset, whose reward is 0
            self.resets, self.total = self.resets + 1, 0.0
        self.total += reward
        if self.resets == 1:
            image = Image.fromarray(self.env.render())
            look = dict(font_size=20, stroke_width=2, stroke_fill="black")
            ImageDraw.Draw(image).text((10, 8), f"{self.label} {self.total:.0f}", "white", **look)
            packed = io.BytesIO()  # 1,000 frames as they are would be 700 MB
            image.save(packed, "PNG", compress_level=1)
            self.films[-1].append(packed)


def check_camera(make) -> None:
    try:
        env = make(render_mode="rgb_array")
        env.reset(seed=0)
        assert np.shape(env.render())[2:] == (3,), "render() returns no picture"
        env.close()
    except Exception as error:  # of any kind, from an ImportError to OpenGL's own
        hint = "for MuJoCo on Debian, apt-get install libegl1 libgl1 and set MUJOCO_GL=egl"
        require(False, f"--video: nothing can be drawn here ({error!r}); {hint}")


def write_film(args: Args, cameras: list, fps: float) -> None:
    """Frozen and steered side by side; where an episode has ended, its last frame stays."""
    import imageio.v2 as imageio
    from PIL import Image

    with imageio.get_writer(args.video, fps=fps, quality=8, macro_block_size=2) as out:
        for i in range(len(args.temperature)):
            for camera in cameras:
                pair = camera.films[2 * i : 2 * i + 2]  # in the order they were played
                for t in range(max(map(len, pair))):
                    frames = [Image.open(film[min(t, len(film) - 1)]) for film in pair]
                    out.append_data(np.hstack(frames))


class Policy(torch.nn.Module):
    """Raw observations and noise in, actions out: the script's make_env and Agent.act in one."""

    def __init__(self, agent, file: dict, box):
        super().__init__()
        self.agent = agent
        self.shape = (file["chunk"], *box.shape)
        for key, value in (file["normalization"] | {"low": box.low, "high": box.high}).items():
            self.register_buffer(key, torch.as_tensor(value).double())

    def forward(self, obs, noise):  # (B, obs_dim), (B, d) -> (B, chunk, action_dim)
        finite = torch.cat([obs, noise], -1).isfinite().all()
        torch._assert_async(finite, "observation or noise is not finite")  # stays in the program
        share = (obs.double() - self.obs_min) / (self.obs_max - self.obs_min + 1e-6)
        action = self.agent.act((2 * (share - 0.5)).float(), noise)
        share = (action.double().unflatten(-1, self.shape) + 1) / 2
        action = share * (self.action_max - self.action_min) + self.action_min
        return action.clamp(self.low, self.high).float()


def export(args: Args, script, make, agent, file: dict, about: dict) -> None:
    """Writes the steered policy as one program, if it plays an episode as the script does."""
    envs = make_envs(make, 1)
    base = envs.envs[0].unwrapped
    policy = Policy(agent.cpu(), file, base.action_space)
    obs, _ = base.reset(seed=0)
    example = torch.as_tensor(obs).expand(2, -1), torch.zeros(2, agent.decoder.dim)
    batch = {0: torch.export.Dim("batch", min=1)}  # two rows above: one would count as a constant
    program = torch.export.export(policy, example, dynamic_shapes=(batch, batch), strict=True)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"run.json": json.dumps(about)})

    # Against the actions that reach the simulator in an episode of the script's own evaluation
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    notes, planned = [], []
    watch(envs.envs[0], lambda *note: notes.append(note))

    def steered(obs, noise):
        raw, *_ = notes[-1]
        planned.append(loaded(torch.as_tensor(raw)[None], noise)[0])
        return agent.act(obs, noise)

    script.evaluate(steered, envs, "cpu", args.seed)
    taken = np.stack([action for _, action, _ in notes if action is not None])
    difference = np.abs(torch.cat(planned)[: len(taken)].numpy() - taken).max()
    require(difference < 1e-4, f"--export: not what {script.__file__} does; nothing is written")
    Path(args.export).write_bytes(buffer.getvalue())
    print(f"{args.export}: does what {about['script']} does, to {difference:.0e}")


if __name__ == "__main__":
    args = parse_args()
    torch.set_num_threads(1)  # small matrices, as in the scripts
    gym.logger.min_level = gym.logger.ERROR  # no warnings about versions of environments
    if args.video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen; read on import

    run = Path(args.run)
    path = run / {"last": "checkpoint.pt", "best": "best.pt"}[args.checkpoint]
    state, file = read(path), read(run / "backbone.pt")
    script = load_script(args, state["script"])
    run_args, agent = load_agent(args, script, state, file)
    require(not args.export or "normalization" in file, "--export: not for pi0, which is programs")
    make = partial(script.make_env, run_args.env_id, file)
    about = {"env_id": run_args.env_id, "script": state["script"]}
    about["global_step"] = int(state["rows"][-1]["global_step"])
    print(f"{path}, step {about['global_step']}: {run_args.env_id}, {state['script']}", flush=True)

    if args.video:
        check_camera(make)
    if args.curves:
        draw_curves(run, run_args, args.curves)
    if args.episodes > 0:
        n = min(args.episodes, getattr(script, "AT_ONCE", 20))  # fixed: 200 begin with the same 20
        filmed = min(args.video_episodes, n) if args.video else 0
        envs = make_envs(make, n, filmed)
        cameras = [Camera(env) for env in envs.envs[:filmed]]
        numbers = evaluate_all(args, script, envs, cameras, agent, run_args)
        envs.close()
        about |= {"episodes": args.episodes, "seed": args.seed, "temperatures": args.temperature}
        if args.json:
            Path(args.json).write_text(json.dumps(about | numbers, indent=1) + "\n")
        if args.video:
            write_film(args, cameras, envs.metadata.get("render_fps", 30))
    if args.export:
        export(args, script, make, agent, file, about)
