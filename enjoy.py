# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.1", "gymnasium-robotics>=1.4,<1.4.3", "mujoco>=3.2,<3.10",
#   "numpy>=1.26", "tyro>=0.9", "tqdm>=4.66", "matplotlib>=3.8", "imageio[ffmpeg]>=2.31", "pillow>=10.1"]
# ///
"""Evaluates, films or exports a run of any script of this project, finished or still going on.

The script that made the run is loaded from its file and used as it is: its Args, make_env, load_decoder, Agent and
evaluate. So the numbers are those that the script itself would print, on episodes that training never evaluated on.

    python enjoy.py runs/Walker2d-v4__lpds_continuous__1__1700000000
    python enjoy.py runs/Walker2d-v4__lpds_continuous__1__1700000000 --video walk.mp4
    python enjoy.py runs/Walker2d-v4__lpds_continuous__1__1700000000 --export policy.pt --episodes 0

The exported program needs torch and nothing else, and takes float32 observations as the environment returns them:

    policy = torch.export.load("policy.pt").module()
    chunk = policy(obs, torch.randn(len(obs), d))  # (B, obs_dim), (B, d) -> (B, Ta, A), actions to execute in turn
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_FOLDER")]
    """run folder of a script: args.json, backbone.pt, checkpoint.pt, best.pt"""
    checkpoint: Literal["best", "last"] = "best"
    """best: best.pt, the highest evaluation of the run so far; last: checkpoint.pt, where it stopped or is now"""
    script: str = ""
    """script that made the run; empty: the one named in the checkpoint, beside enjoy.py or in baselines/"""
    episodes: int = 20
    """episodes of each policy; 0 evaluates nothing, for --export alone"""
    seed: int = 2_000_000
    """episode i starts from seed + i; training evaluates on 1,000,000 and up, so these episodes are new"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    json: str = ""
    """FILE.json: the numbers of the table, and every episode"""
    video: str = ""
    """FILE.mp4: the first episodes of the evaluation, frozen and steered side by side, every primitive step"""
    video_episodes: int = 1
    """how many of them, one after the other"""
    export: str = ""
    """FILE.pt: the steered policy and its normalisation as one program that needs nothing but torch"""


RUN_FILES = ("args.json", "backbone.pt", "checkpoint.pt", "best.pt", "metrics.csv", "eval.npz")
NO_GL = (
    "--video: cannot draw; on Debian install libegl1 libgl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
)


def fail(message: str):
    """Ends the program with one sentence on stderr and exit code 2, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(ok, message: str) -> None:
    if not ok:
        fail(message)


@contextlib.contextmanager
def blame(message: str):
    """Whatever goes wrong inside ends the program with `message` and the reason."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def parse_args() -> Args:
    args = tyro.cli(Args, description=__doc__)
    check(args.seed >= 0, f"--seed {args.seed}: must not be negative")
    check(args.episodes >= 0, f"--episodes {args.episodes}: must not be negative")
    idle = args.episodes == 0 and (args.video or args.json or not args.export)
    check(not idle, "--episodes 0: evaluates nothing, which only --export can do without; give at least 1")
    suffix = Path(args.export).suffix
    check(suffix in ("", ".pt", ".pt2"), f"--export {args.export}: must end in .pt or, as torch.export prefers, .pt2")
    if args.video:
        check(args.video.endswith(".mp4"), f"--video {args.video}: must end in .mp4, the only kind that is written")
        fits = 1 <= args.video_episodes <= args.episodes
        check(fits, f"--video-episodes {args.video_episodes}: must lie between 1 and --episodes, here {args.episodes}")
    outputs = {"json": args.json, "video": args.video, "export": args.export}
    for flag, path in ((f, Path(name)) for f, name in outputs.items() if name):  # now, not after minutes of evaluation
        check(path.parent.is_dir(), f"--{flag} {path}: the folder {path.parent} does not exist; make it first")
        own = path.name in RUN_FILES and path.parent.resolve() == Path(args.run).resolve()
        check(not (own or path.is_dir()), f"--{flag} {path}: is a folder or part of the run itself; give another name")
    return args


def write(flag: str, path: Path, writer) -> None:
    """Calls writer(temporary path) and renames it to `path`: whatever happens, there is a whole file or none."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # same folder, same ending
    try:
        with blame(f"--{flag} {path}: cannot be written; give a place where there is room"):
            writer(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}")


def load_checkpoint(args: Args) -> tuple[Path, dict]:
    """The file and its content; weights_only, because run folders travel and a checkpoint must not run code."""
    run = Path(args.run)
    check(run.is_dir(), f"{run}: no such folder; give a run folder, usually runs/ENV__SCRIPT__SEED__TIME")
    path = run / {"best": "best.pt", "last": "checkpoint.pt"}[args.checkpoint]
    if not path.is_file() and (run / "checkpoint.pt").is_file():
        path = run / "checkpoint.pt"
        print(f"note: {run} has no best.pt yet, the first evaluation makes it; checkpoint.pt is used", file=sys.stderr)
    has = ", ".join(name for name in RUN_FILES if (run / name).is_file()) or "nothing else of a run"
    check(path.is_file(), f"{run}: holds {has}, but no {path.name}; give the folder of a run, or another --checkpoint")
    try:  # mmap: checkpoint.pt carries the whole replay, of which nothing is needed
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's own message recommends to load it without protection
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        found = f"wants to call {found[1]}" if found else type(error).__name__
        fail(f"{path}: no file of plain tensors ({found}); nothing in it was executed; use another run or --checkpoint")
    for key, kind in {"agent": dict, "args": dict, "script": str}.items():
        good = isinstance(state, dict) and isinstance(state.get(key), kind)
        check(good, f"{path}: has no {key}, so it is no checkpoint of this project; use another run")
    return path, state


def load_script(args: Args, name: str):
    """Imports the script that made the run from its file; its `if __name__ == "__main__"` part does not run."""
    here, name = Path(__file__).resolve().parent, Path(name).name  # only a name: the checkpoint is not trusted
    places = [Path(args.script)] if args.script else [here / name, here / "baselines" / name]
    path = next((p for p in places if p.is_file() and p.suffix == ".py"), None)
    tried = " or ".join(map(str, places))
    check(path, f"--script: the run was made by {name}, and there is no file {tried}; give the path of that script")
    sys.path[:0] = [str(path.resolve().parent), str(here)]  # for `entropy`: a script copied elsewhere brings its own
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    with blame(f"--script {path}: cannot be imported; install what its first lines list, or give the run's script"):
        spec.loader.exec_module(script)
    for need in ("Args", "make_env", "load_decoder", "Agent", "evaluate"):
        check(hasattr(script, need), f"--script {path}: defines no {need}, so it made no run; give {name}")
    return script


def load_policy(args: Args, script, path: Path, state: dict, device):
    """(the run's Args, agent, normalisation): agent.act is the steered policy, agent.decoder the frozen one."""
    with blame(f"{path}: does not fit {script.__file__}; give the version that made the run as --script"):
        changes = {"resume": args.run} | ({"device": str(device)} if "device" in state["args"] else {})
        run_args = replace(script.Args(**state["args"]), **changes)
        decoder, normalization, _ = script.load_decoder(run_args)  # with `resume`: the copy in the run folder
        agent = script.Agent(run_args, decoder.to(device).freeze())
        agent.load_state_dict(state["agent"])
    return run_args, agent.requires_grad_(False).eval(), normalization


def record(env) -> list:
    """Lets `env` keep (compressed frame, its shape, return so far) of every primitive step of its last episode.

    The innermost environment is what steps once per primitive action, whatever a script has wrapped around it.
    """
    base, film = env.unwrapped, []
    reset, step = base.reset, base.step
    with contextlib.suppress(AttributeError, KeyError):  # Gymnasium's camera stands still, a walker soon leaves it
        base.mujoco_renderer.camera_id = base.model.camera("track").id

    def shoot(total: float):
        with blame(NO_GL):  # which may be anything from an ImportError to an AttributeError
            frame = np.ascontiguousarray(base.render(), np.uint8)
            film.append((zlib.compress(frame, 1), frame.shape, total))  # 1,000 frames as they are would be 700 MB

    def filmed_reset(**kwargs):
        result = reset(**kwargs)
        film.clear()
        shoot(0.0)
        return result

    def filmed_step(action):
        result = step(action)
        shoot(film[-1][2] + float(result[1]))
        return result

    base.reset, base.step = filmed_reset, filmed_step
    return film


def make_film(path: Path, films: dict, fps: float) -> None:
    """films: name -> one recording per episode. Side by side; where one episode has ended, its last frame stays."""
    import imageio.v2 as imageio
    from PIL import Image, ImageDraw

    def picture(name, film, t):
        data, shape, total = film[min(t, len(film) - 1)]
        image = Image.fromarray(np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape))
        text = f"{name}  return {total:.1f}{'  (ended)' if t >= len(film) else ''}"
        style = {"font_size": max(10, shape[0] // 24), "stroke_width": 2, "stroke_fill": "black"}
        ImageDraw.Draw(image).text((10, 8), text, "white", **style)
        return np.asarray(image)

    with imageio.get_writer(path, format="FFMPEG", fps=fps, quality=8, macro_block_size=2) as out:
        for frozen, steered in zip(films["frozen"], films["steered"], strict=True):
            for t in range(max(len(frozen), len(steered))):
                out.append_data(np.hstack([picture("frozen", frozen, t), picture("steered", steered, t)]))


@torch.no_grad()
def measure(agent, run_args, obs, seed: int) -> dict:
    """What the steering does at the states `obs` (N, obs_dim) that the steered policy visited, for both policies.

    Entropy as the scripts log it, 64 draws at each of 64 states, here evenly spaced among those visited: best.pt has no
    replay, and these are the states behind the returns. The constraint was held on replay, so its ratio differs from 1.
    """
    from entropy import knn_entropy  # here, so that it is the one the script uses

    states = obs[torch.linspace(0, len(obs) - 1, min(64, len(obs))).round().long().to(obs.device)]
    probes, d, numbers = states.repeat_interleave(64, 0), agent.decoder.dim, {}
    noise = torch.randn(len(probes), d, generator=torch.Generator().manual_seed(seed)).to(obs.device)
    for name, policy in (("frozen", agent.decoder), ("steered", agent.act)):
        entropy, ties = knn_entropy(policy(probes, noise).view(len(states), 64, -1))
        numbers[name] = {"entropy": float(entropy), "ties": float(ties), "sq_norm": None, "ratio": None, "kl": None}
        if hasattr(agent, "perturbation") and hasattr(run_args, "delta"):  # else another method: None, printed as "-"
            sum_norm = float(agent.perturbation(obs).square().sum(-1).mean()) if name == "steered" else 0.0
            sq_norm = sum_norm / d if getattr(run_args, "delta_norm", "sum") == "mean" else sum_norm
            numbers[name] |= {"sq_norm": sq_norm, "ratio": sq_norm / run_args.delta}
            if getattr(run_args, "perturb", "noise") == "noise":  # of N(Delta, I) from N(0, I), exact without a bound
                numbers[name]["kl"] = 0.5 * sum_norm
    return numbers


def print_table(numbers: dict, run_args) -> None:
    labels = {
        "return": "return", "length": "length (primitive steps)", "success": "success",
        "entropy": "action entropy (nats)", "ties": "tie fraction", "kl": "KL to the prior (nats)",
        "sq_norm": f"E||Delta||^2 ({getattr(run_args, 'delta_norm', 'sum')} over d)",
        "ratio": f"E||Delta||^2 / delta ({getattr(run_args, 'delta', '-')})",
    }  # fmt: skip
    print(f"{'':<28}{'frozen':>24}{'steered':>24}")
    for key, label in labels.items():
        cells = []
        for x in (numbers["frozen"][key], numbers["steered"][key]):
            episodes = isinstance(x, list)
            cells += [f"{np.mean(x):.2f} +- {np.std(x):.2f}" if episodes else "-" if x is None else f"{x:.4f}"]
        print(f"{label:<28}{cells[0]:>24}{cells[1]:>24}")


class Policy(torch.nn.Module):
    """Raw observations and noise in, actions in environment units out: a script's wrapper and its agent in one."""

    def __init__(self, agent, normalization: dict, box):
        super().__init__()
        self.act, self.shape = agent.act, (agent.decoder.config["chunk"], *box.shape)
        bounds = normalization | {"low": box.low, "high": box.high}
        self.n = {k: torch.as_tensor(np.asarray(v, np.float64)) for k, v in bounds.items()}

    def forward(self, obs, eps):  # float32 (B, obs_dim), (B, d) -> float32 (B, Ta, A)
        low, high = self.n["obs_min"], self.n["obs_max"]
        action = self.act((2 * ((obs.double() - low) / (high - low + 1e-6) - 0.5)).float(), eps)
        low, high = self.n["action_min"], self.n["action_max"]
        action = (action.double().unflatten(-1, self.shape) + 1) / 2 * (high - low) + low
        return action.clamp(self.n["low"], self.n["high"]).float()


def script_actions(agent, env, obs, eps) -> np.ndarray:
    """The same out of the script's own parts: its wrapper drives an environment that only takes notes."""
    base, taken = env.unwrapped, []
    start, _ = base.reset(seed=0)
    base.reset = lambda **kwargs: (start.copy(), {})
    base.step = lambda action: (taken.append(action), (start.copy(), 0.0, False, False, {}))[1]
    for chunk in agent.act(torch.as_tensor(np.stack([env.normalize(o) for o in obs.numpy()])), eps).numpy():
        env.reset()
        env.step(chunk)
    return np.stack(taken).reshape(len(obs), -1, len(taken[0]))


@torch.no_grad()
def export(path: Path, script, agent, normalization: dict, env, metadata: dict) -> None:
    """Writes the program after comparing it with the script's own policy on random inputs, for two batch sizes.

    By torch.export, because TorchScript is deprecated and its tracer would fix the batch size.
    """
    obs_dim, d, file, difference = metadata["obs_dim"], metadata["d"], io.BytesIO(), 0.0
    with blame(f"--export {path}: what {script.__file__} does is not one program of flat observations; leave it out"):
        policy, batch = Policy(agent, normalization, env.unwrapped.action_space), {0: torch.export.Dim("batch", min=1)}
        example = (torch.zeros(2, obs_dim), torch.zeros(2, d))  # two rows: one row would count as a constant
        program = torch.export.export(policy, example, dynamic_shapes=(batch, batch), strict=False)
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
        loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
        low, high = (torch.as_tensor(normalization[k]).float() for k in ("obs_min", "obs_max"))
        for n in (1, 7):
            generator = torch.Generator().manual_seed(n)
            share = 1.5 * torch.rand(n, obs_dim, generator=generator) - 0.25  # also outside the range of the data
            obs = low + (high - low) * share
            eps = torch.randn(n, d, generator=generator)
            gap = np.abs(loaded(obs, eps).numpy() - script_actions(agent, env, obs, eps)).max()
            difference = max(difference, float(gap))
    print(f"exported program against {script.__file__}: largest difference {difference:.2g} in batches of 1 and 7")
    check(difference < 1e-4, f"--export {path}: not written, as the program does not do what the script does")
    write("export", path, lambda p: p.write_bytes(file.getvalue()))


def prepare_video() -> None:
    """Before anything imports MuJoCo: it reads MUJOCO_GL then, and asks for a window where it is not set."""
    with blame('--video: needs imageio and ffmpeg; pip install "imageio[ffmpeg]"'):
        import imageio_ffmpeg  # noqa: F401
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen, which is what servers have
    with blame(NO_GL), contextlib.suppress(ModuleNotFoundError):  # a script without MuJoCo draws by itself
        import mujoco  # noqa: F401


if __name__ == "__main__":
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # as an exception, so that temporary files go
        signal.signal(number, lambda n, frame: sys.exit(128 + n))
    if args.video:
        prepare_video()

    # The run, with the eyes of its own script
    path, state = load_checkpoint(args)
    script = load_script(args, state["script"])
    best_device = "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"--device {args.device}: cannot be used here; give auto, cpu, cuda or cuda:1"):
        device = torch.zeros(1, device=best_device if args.device == "auto" else args.device).device
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    run_args, agent, normalization = load_policy(args, script, path, state, device)
    config, loop = agent.decoder.config, state.get("loop")
    step = loop.get("global_step") if isinstance(loop, dict) else None
    about = {"env_id": run_args.env_id, "script": state["script"], "checkpoint": str(path), "global_step": step}
    print(f"{run_args.env_id}, {path} at step {step}, made by {state['script']}, on {device}")
    if step == 0:
        print("note: no evaluation has beaten step 0, where Delta is 0; see --checkpoint last", file=sys.stderr)

    def make(**kwargs):
        kwargs |= script.env_kwargs(run_args) if hasattr(script, "env_kwargs") else {}  # lpds_toy.py: reward, start
        return script.make_env(run_args.env_id, config["chunk"], normalization, **kwargs)

    # Both policies play the same episodes: same starts, same noise draws. The first ones are filmed as they happen.
    if args.episodes:
        filmed, films, results, seen = args.video_episodes if args.video else 0, {}, {}, []
        with blame(NO_GL if filmed else f"{path}: {run_args.env_id} cannot be made; install what it needs"):
            envs = [make(**{"render_mode": "rgb_array"} if i < filmed else {}) for i in range(args.episodes)]
        recordings = [record(env) for env in envs[:filmed]]
        for name, policy in (("frozen", agent.decoder), ("steered", lambda o, w: (seen.append(o), agent.act(o, w))[1])):
            results[name] = script.evaluate(policy, envs, args.seed, device)
            films[name] = [list(film) for film in recordings]
        fps = envs[0].unwrapped.metadata.get("render_fps", 30)
        for env in envs:
            env.close()
        numbers = measure(agent, run_args, torch.cat(seen), args.seed)
        numbers = {name: {k: v.tolist() for k, v in results[name].items()} | numbers[name] for name in results}
        print(f"{args.episodes} episodes from seed {args.seed:,}, none of them in training's evaluation; mean +- std")
        print_table(numbers, run_args)
        print("entropy, ties, Delta and KL: over the states that the steered policy visited in these episodes")
        if args.json:
            text = json.dumps(about | {"episodes": args.episodes, "seed": args.seed} | numbers, indent=1)
            write("json", Path(args.json), lambda p: p.write_text(text + "\n"))
        if args.video:
            write("video", Path(args.video), lambda p: make_film(p, films, fps))

    if args.export:
        _, agent, _ = load_policy(args, script, path, state, torch.device("cpu"))
        about |= {k: config[k] for k in ("obs_dim", "action_dim", "chunk")} | {"d": agent.decoder.dim}
        about |= {"dtype": "float32", "torch": str(torch.__version__), "args": state["args"]}
        export(Path(args.export), script, agent, normalization, make(), about)
