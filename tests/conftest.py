"""Tiny decoders with random weights, and runs of the scripts in processes of their own.

To import torch takes seconds. So a server process does it once, and every run is forked from it:
a process that can be killed, with streams and folder of its own, a tenth of a second after it was
asked for.
"""

import csv
import gc
import importlib.util
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
torch.set_num_threads(
    1
)  # as the scripts do: a sum that two threads share may differ in its last bit

SIZES = {
    "MultiGoal": (2, 2),
    "Lift": (19, 7),
    "PickPlaceCan": (23, 7),
    "NutAssemblySquare": (23, 7),
    "Pendulum": (3, 1),
    "Hopper": (11, 3),
    "Walker2d": (17, 6),
    "HalfCheetah": (17, 6),
}
SIZES |= {"AdroitHandPen": (45, 24), "AdroitHandHammer": (46, 26)}
SIZES |= {"AdroitHandDoor": (39, 28), "AdroitHandRelocate": (39, 30)}  # observation, action


def load(script: str):
    """The module of a script, wherever it lies."""
    name = f"script_{Path(script).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        try:
            spec.loader.exec_module(module)
        except SystemExit as missing:  # the script names what to install
            del sys.modules[name]
            pytest.skip(str(missing))
    return sys.modules[name]


# --- decoders ---


def decoder_file(
    obs_dim: int, action_dim: int, chunk=4, kind="diffusion", seed=0, width=16
) -> dict:
    """What a decoder file holds, for any sizes."""
    generator = torch.Generator().manual_seed(seed)
    d, time_dim, steps = chunk * action_dim, 8, 5

    def linear(name, n_in, n_out):  # in PyTorch's range
        weight, bias = (torch.rand(n_out, n, generator=generator) * 2 - 1 for n in (n_in, 1))
        return {f"{name}.weight": weight / n_in**0.5, f"{name}.bias": bias[:, 0] / n_in**0.5}

    model = linear("first", d + time_dim + obs_dim, width)
    model |= linear("blocks.0.1", width, width) | linear("blocks.0.3", width, width)
    model |= linear("head", width, d)
    signal = np.array([0.05, 0.3, 0.6, 0.85, 0.99, 1.0])  # abar
    levels = np.stack([signal[:-1] ** 0.5, (1 - signal[:-1]) ** 0.5], 1)
    levels = np.concatenate([levels, np.stack([signal[1:] ** 0.5, (1 - signal[1:]) ** 0.5], 1)], 1)
    time_network = linear("1", time_dim, 2 * time_dim) | linear("3", 2 * time_dim, time_dim)
    ranges = {"obs": torch.ones(obs_dim) * 2, "action": torch.ones(action_dim)}
    return {
        "format": 2,
        "kind": kind,
        "solver": "ddim" if kind == "diffusion" else "euler",
        **dict(obs_dim=obs_dim, action_dim=action_dim, chunk=chunk, width=width, num_blocks=1),
        "cond_hidden": [],
        "activation": "relu",
        "time_emb": torch.randn(steps, time_dim, generator=generator),
        "levels": levels.tolist() if kind == "diffusion" else [],
        "model": model,
        "normalization": {
            f"{name}_{end}": sign * range_
            for name, range_ in ranges.items()
            for end, sign in (("min", -1), ("max", 1))
        },
        "card": {},
        "training": {"train_steps": 20, "time_network": time_network},
    }


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """tiny_backbone("Walker2d", kind="flow") -> path of a decoder file, 16 units wide."""
    folder = tmp_path_factory.mktemp("backbones")

    def write(name="Hopper", kind="diffusion"):
        path = folder / f"{name}-{kind}.pt"
        if not path.exists():
            chunk = 8 if name.startswith("Adroit") else 4
            torch.save(decoder_file(*SIZES[name], chunk=chunk, kind=kind), path)
        return path

    return write


@pytest.fixture(scope="session")
def bandit(tmp_path_factory):
    """A diffusion of two modes, at -0.6 and 0.6 of the first of two actions: path of its file."""
    pb = load("pretrain_backbone.py")
    torch.manual_seed(0)
    file = decoder_file(1, 2, chunk=1, width=32)
    del file["model"], file["time_emb"]
    network = pb.Backbone(file)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(1_500):
        action = 0.1 * torch.randn(256, 2)
        action[:, 0] += 0.6 * (2 * torch.randint(2, (256,)) - 1)
        loss = network.loss(2 * torch.rand(256, 1) - 1, action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    file |= network.sample_by("ddim", 5)
    file["model"] = {k: w for k, w in network.state_dict().items() if "time_network" not in k}
    path = tmp_path_factory.mktemp("bandit") / "bandit.pt"
    torch.save(file, path)
    return path


# --- runs ---

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["conftest", "torch._dynamo", "gymnasium_robotics", "mujoco", "tyro"])


def execute(script: Path, flags: list, folder: Path, before) -> None:
    """In the forked process: `python script *flags` in `folder`; before() runs ahead of it, and
    what that returns, after it."""
    gc.freeze()  # the server's objects are looked through no more; robosuite asks at every reset
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [str(script), *flags]
    after = before() if before else None
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        if after:
            after()


class Process:
    """A run of a script, killed and forgotten where a test leaves it."""

    def __init__(self, folder: Path, script: str, *flags, before=None):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).write_text("")
        self.folder, flags = folder, [str(flag) for flag in flags]
        self.process = forks.Process(
            target=execute, args=(ROOT / script, flags, folder, before), daemon=True
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, timeout=600) -> tuple:
        """(exit code, stdout, stderr); the code is -9 after SIGKILL."""
        self.process.join(timeout)
        assert not self.running, f"still running after {timeout} s"
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return self.process.exitcode, out, err


def call(folder: Path, script: str, *flags, before=None) -> tuple:
    return Process(folder, script, *flags, before=before).wait()


def finish(folder: Path, script: str, *flags, before=None) -> Path:
    """A run that succeeds: its run folder."""
    code, out, err = call(folder, script, *flags, before=before)
    assert code == 0, err
    return only_run(folder)


def refused(result: tuple, *parts) -> None:
    """It ended with exit code 2 and one line on stderr that says all of `parts`."""
    code, out, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert [part for part in parts if str(part) not in err] == [], err


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


# --- what a run leaves ---


def metrics(run: Path) -> list:
    """Rows of metrics.csv, without what a clock says."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


CLOCK = ("wall_seconds", "charts/SPS")


def checkpoint(run: Path, name="checkpoint.pt") -> dict:
    return torch.load(run / name, weights_only=True)


def differences(a, b, where="") -> list:
    """Where two nested structures differ in one bit or more, but for clocks."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if key not in CLOCK]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.numpy(), b.numpy()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    else:
        same = type(a) is type(b) and (a == b or a != a and b != b)
    return [] if same else [where]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    with np.load(a / "eval.npz") as x, np.load(b / "eval.npz") as y:
        assert differences(dict(x), dict(y)) == []
    for name in ("checkpoint.pt", "best.pt"):
        x, y = checkpoint(a, name), checkpoint(b, name)
        kept = {"rows", "evals", "agent", "optimizer", "replay"}
        assert kept - x.keys() == ({"replay"} if x["script"] == "dppo_toy.py" else set())
        assert differences(x, y, name) == []
