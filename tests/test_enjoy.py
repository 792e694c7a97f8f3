"""enjoy.py on a real, tiny run: its numbers against the script's own functions, the exported program in a process that
knows nothing of this repository, the film frame by frame, and what users can get wrong.

Most cases run enjoy.py in this process (runpy, as __main__): the same code without three seconds of imports each.
"""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpds_continuous as script

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
OBS, ACT, CHUNK = 11, 3, 4
CONFIG = {
    "kind": "diffusion", "obs_dim": OBS, "action_dim": ACT, "chunk": CHUNK, "hidden": [32, 32, 32], "cond_hidden": [],
    "time_dim": 16, "activation": "relu", "train_steps": 20, "sample_steps": 5,
}  # fmt: skip
SETTINGS = (
    "--total-timesteps 1200 --prior-steps 400 --warmup-steps 0 --hidden-size 32 --batch-size 32 --utd 2 "
    "--distill-steps 2 --eval-every 600 --eval-episodes 2 --log-every 300 --lr 0.003 --no-progress"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run of lpds_continuous.py on Hopper, 1,200 steps, with an untrained decoder.

    So short a run may never beat its frozen decoder, and best.pt would hold Delta = 0: it gets one that shows.
    """
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    decoder = script.Decoder(CONFIG)
    generator = np.random.default_rng(0)
    normalization = {
        "obs_min": torch.as_tensor(-1 - generator.random(OBS), dtype=torch.float32),
        "obs_max": torch.as_tensor(1 + 3 * generator.random(OBS), dtype=torch.float32),
        # wider than Hopper's box on one side and narrower on the other: forgetting the clip or a bound shows
        "action_min": torch.tensor([-1.4, -0.9, -0.5]),
        "action_max": torch.tensor([0.8, 1.0, 1.6]),
    }
    card = {"env_id": "Hopper-v4", "frozen_return": 0.0}
    file = {"format": 1, "kind": "diffusion", "config": CONFIG, "normalization": normalization, "card": card}
    torch.save(file | {"model": decoder.state_dict()}, folder / "tiny.pt")
    command = [sys.executable, ROOT / "lpds_continuous.py", "--env-id", "Hopper-v4", "--backbone", folder / "tiny.pt"]
    command += ["--run-dir", folder, *SETTINGS.split()]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (run,) = folder.glob("Hopper-v4__*")
    best = torch.load(run / "best.pt", weights_only=True)
    agent, loop = best["agent"], best["loop"] | {"global_step": 600}
    head = max(name for name in agent if name.startswith("perturbation") and name.endswith("weight"))
    agent[head] = 0.2 * torch.randn(agent[head].shape, generator=torch.Generator().manual_seed(1))
    change(run / "best.pt", agent=agent, loop=loop)
    return run


@pytest.fixture
def copy(run_folder, tmp_path):
    """A run folder that a test may damage."""
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def enjoy(capsys, monkeypatch):
    """enjoy(*arguments) -> (exit code, stdout, stderr), with interpreter state as it was."""

    def call(*arguments):
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        threads, before = torch.get_num_threads(), set(sys.modules)
        monkeypatch.setattr(sys, "argv", ["enjoy.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", sys.path.copy())
        code = 0
        try:
            runpy.run_path(str(ROOT / "enjoy.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
            torch.set_num_threads(threads)
            for name in set(sys.modules) - before:
                if name.startswith("run_"):
                    del sys.modules[name]
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def subprocess_enjoy(*arguments, at=ROOT, **environment):
    command = [sys.executable, at / "enjoy.py", *map(str, arguments)]
    return subprocess.run(command, env=ENV | environment, capture_output=True, text=True, timeout=100, cwd="/")


def change(path, **entries):
    torch.save(torch.load(path, weights_only=True) | entries, path)


def load(run):
    """(agent, make, normalization) from the run folder through the script's own functions."""
    state = torch.load(run / "best.pt", weights_only=True)
    args = replace(script.Args(**state["args"]), resume=str(run))
    decoder, normalization, _ = script.load_decoder(args)
    agent = script.Agent(args, decoder.freeze())
    agent.load_state_dict(state["agent"])
    return agent, lambda: script.make_env("Hopper-v4", CHUNK, normalization), normalization


def table(text):
    """Label -> (frozen, steered) numbers in a printed row."""
    rows = {}
    for line in text.splitlines():
        cells = re.split(r"\s{3,}", line.strip())
        if len(cells) == 3:
            rows[cells[0]] = [[float(x) for x in cell.split(" +- ")] for cell in cells[1:]]
    return rows


# The table


def test_table_is_what_the_scripts_own_functions_give(run_folder, enjoy, tmp_path):
    code, out, err = enjoy(run_folder, "--episodes", 3, "--json", tmp_path / "n.json")
    assert code == 0, err
    numbers = json.loads((tmp_path / "n.json").read_text())
    agent, make, _ = load(run_folder)
    envs, seen = [make() for _ in range(3)], []

    def steered(obs, noise):
        seen.append(obs)
        return agent.act(obs, noise)

    frozen = script.evaluate(agent.decoder, envs, 2_000_000, "cpu")
    steered = script.evaluate(steered, envs, 2_000_000, "cpu")
    for column, expected in (("frozen", frozen), ("steered", steered)):
        for key in ("return", "length", "success"):
            assert numbers[column][key] == expected[key].tolist()
    assert numbers["frozen"]["return"] != numbers["steered"]["return"]  # else the columns could be swapped unseen

    with torch.no_grad():
        shift = agent.perturbation(torch.cat(seen)).double()
    sq_norm = shift.square().mean().item()  # --delta-norm mean
    assert numbers["steered"]["sq_norm"] == pytest.approx(sq_norm, rel=1e-5) and sq_norm > 1e-3
    assert numbers["steered"]["ratio"] == pytest.approx(sq_norm / 0.5, rel=1e-5)  # Hopper's delta
    assert numbers["steered"]["kl"] == pytest.approx(shift.square().sum(1).mean().item() / 2, rel=1e-5)
    assert [numbers["frozen"][k] for k in ("sq_norm", "ratio", "kl")] == [0, 0, 0]
    assert numbers["frozen"]["entropy"] != numbers["steered"]["entropy"]

    rows = table(out)
    assert rows["return"][0] == pytest.approx([frozen["return"].mean(), frozen["return"].std()], abs=0.006)
    assert rows["return"][1] == pytest.approx([steered["return"].mean(), steered["return"].std()], abs=0.006)
    assert rows["E||Delta||^2 / delta (0.5)"][1] == pytest.approx([sq_norm / 0.5], abs=6e-5)
    assert len(rows) == 8 and all(np.isfinite(sum(cells, [])).all() for cells in rows.values())


def test_entropy_is_over_visited_states(run_folder, enjoy, tmp_path):
    """From the definition: 64 draws at each of 64 visited states. Other draws: equal within the estimator's noise."""
    enjoy(run_folder, "--episodes", 3, "--json", tmp_path / "n.json")
    numbers = json.loads((tmp_path / "n.json").read_text())
    agent, make, _ = load(run_folder)
    seen = []
    script.evaluate(lambda o, w: (seen.append(o), agent.act(o, w))[1], [make() for _ in range(3)], 2_000_000, "cpu")
    obs = torch.cat(seen).repeat_interleave(64, 0)
    noise = torch.randn(len(obs), CHUNK * ACT, generator=torch.Generator().manual_seed(5))
    for name, policy in (("frozen", agent.decoder), ("steered", agent.act)):
        with torch.no_grad():
            entropy, ties = script.knn_entropy(policy(obs, noise).view(-1, 64, CHUNK * ACT))
        assert numbers[name]["entropy"] == pytest.approx(entropy.item(), abs=0.5)
        assert numbers[name]["ties"] == pytest.approx(ties.item(), abs=0.02)


def test_last_checkpoint_and_fallback(copy, enjoy):
    code, last, err = enjoy(copy, "--episodes", 1, "--checkpoint", "last")
    assert code == 0, err
    assert "checkpoint.pt at step" in last
    assert "step 12" in last and "note" not in err
    (copy / "best.pt").unlink()
    code, out, err = enjoy(copy, "--episodes", 1)
    assert code == 0 and out == last
    assert "no best.pt" in err


def test_best_at_step_0_is_explained(copy, enjoy):
    loop = torch.load(copy / "best.pt", weights_only=True)["loop"]
    change(copy / "best.pt", loop=loop | {"global_step": 0})
    code, out, err = enjoy(copy, "--episodes", 1)
    assert code == 0 and "at step 0" in out and "Delta is 0" in err


def test_action_perturbation_has_no_kl(copy, enjoy, tmp_path):
    """LP-DS-A shifts actions: the table says "-" where the noise formula would be wrong; the program follows."""
    args = torch.load(copy / "best.pt", weights_only=True)["args"]
    change(copy / "best.pt", args=args | {"perturb": "action", "delta_norm": "sum"})
    outputs = ("--json", tmp_path / "n.json", "--export", tmp_path / "p.pt2")
    code, out, err = enjoy(copy, "--episodes", 2, *outputs)
    assert code == 0, err
    assert re.search(r"KL to the prior \(nats\) +- +-\n", out)
    steered = json.loads((tmp_path / "n.json").read_text())["steered"]
    assert steered["kl"] is None and steered["ratio"] == pytest.approx(steered["sq_norm"] / 0.5)
    assert float(re.search(r"largest difference ([-+.e\d]+) ", out)[1]) < 1e-5


def test_fork_in_baselines(copy, enjoy, tmp_path):
    """A copied enjoy.py finds the script in baselines/ beside it, from another working folder."""
    for name in ("enjoy.py", "entropy.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "baselines").mkdir()
    change(copy / "best.pt", script="fork.py")
    code, _, err = enjoy(copy, "--episodes", 1)
    assert code == 2 and "fork.py" in err
    shutil.copy(ROOT / "lpds_continuous.py", tmp_path / "baselines" / "fork.py")
    done = subprocess_enjoy(copy, "--episodes", 1, at=tmp_path)
    assert done.returncode == 0 and "made by fork.py" in done.stdout, done.stderr


# The exported program

FRESH = """
import sys, json, torch
extra = {"metadata.json": ""}
policy = torch.export.load(sys.argv[1], extra_files=extra).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([policy(obs, eps) for obs, eps in inputs], sys.argv[3])
assert not {"gymnasium", "mujoco", "entropy", "lpds_continuous", "tyro"} & set(sys.modules)
print(extra["metadata.json"])
"""


class Notes(gym.Env):
    """Hopper's spaces, no physics: keeps the actions that reach it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (ACT,), np.float32)

    def __init__(self):
        self.actions = []

    def step(self, action):
        self.actions.append(action)
        return np.zeros(OBS), 0.0, False, False, {}


@pytest.mark.parametrize("suffix", ["policy.pt2", "policy.pt"])
def test_export_runs_without_this_repository(run_folder, enjoy, tmp_path, suffix):
    code, out, err = enjoy(run_folder, "--episodes", 0, "--export", tmp_path / suffix)
    assert code == 0, err
    assert "steered" not in out  # --episodes 0 evaluates nothing
    generator, inputs = torch.Generator().manual_seed(3), []
    for n in (1, 5):
        inputs.append((3 * torch.randn(n, OBS, generator=generator), torch.randn(n, CHUNK * ACT, generator=generator)))
    torch.save(inputs, tmp_path / "in.pt")
    files = [tmp_path / name for name in (suffix, "in.pt", "out.pt")]
    fresh = subprocess.run([sys.executable, "-I", "-c", FRESH, *files], capture_output=True, text=True, cwd="/")
    assert fresh.returncode == 0, fresh.stderr  # torch only warns of a name without .pt2
    metadata = json.loads(fresh.stdout)
    assert (metadata["obs_dim"], metadata["d"], metadata["env_id"]) == (OBS, CHUNK * ACT, "Hopper-v4")
    assert metadata["chunk"] == CHUNK and metadata["dtype"] == "float32"

    agent, _, normalization = load(run_folder)
    clipped = 0
    for (obs, eps), chunk in zip(inputs, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
        assert chunk.shape == (len(obs), CHUNK, ACT) and chunk.dtype == torch.float32
        wrapper = script.ActionChunk(Notes(), CHUNK, normalization)
        with torch.no_grad():
            actions = agent.act(torch.as_tensor(np.stack([wrapper.normalize(o) for o in obs.numpy()])), eps)
        for action in actions.numpy():
            wrapper.step(action)
        expected = np.stack(wrapper.env.actions).reshape(len(obs), CHUNK, ACT)
        np.testing.assert_allclose(chunk.numpy(), expected, atol=1e-5)
        clipped += (np.abs(expected) == 1).sum()
    assert clipped  # the action box took part


def test_program_that_differs_is_not_written(copy, enjoy, tmp_path):
    """A script whose wrapper does something enjoy.py does not know of."""
    source = (ROOT / "lpds_continuous.py").read_text()
    fork = tmp_path / "fork.py"
    assert source.count("(np.asarray(action, np.float64).reshape") == 1
    fork.write_text(
        source.replace("(np.asarray(action, np.float64).reshape", "(np.asarray(0.9 * action, np.float64).reshape")
    )
    code, _, err = enjoy(copy, "--episodes", 0, "--script", fork, "--export", tmp_path / "p.pt2")
    assert code == 2 and "--export" in err
    assert not list(tmp_path.glob("*p.pt2"))


# The film


@pytest.fixture(scope="session")
def egl():
    pytest.importorskip("imageio_ffmpeg", reason='no imageio[ffmpeg]: pip install "imageio[ffmpeg]"')
    test = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    done = subprocess.run([sys.executable, "-c", test], env=ENV | {"MUJOCO_GL": "egl"}, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no EGL here: " + done.stderr.strip().splitlines()[-1])


def test_film_shows_every_primitive_step(run_folder, egl, enjoy, tmp_path):
    import imageio.v3 as imageio

    options = ("--episodes", 2, "--video-episodes", 2)
    done = subprocess_enjoy(run_folder, *options, "--video", tmp_path / "f.mp4", "--json", tmp_path / "film.json")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    enjoy(run_folder, "--episodes", 2, "--json", tmp_path / "plain.json")
    numbers = json.loads((tmp_path / "film.json").read_text())
    assert numbers == json.loads((tmp_path / "plain.json").read_text())  # filming changes nothing
    frames = imageio.imread(tmp_path / "f.mp4")
    lengths = list(zip(numbers["frozen"]["length"], numbers["steered"]["length"], strict=True))
    assert frames.shape == (sum(max(pair) + 1 for pair in lengths), 480, 960, 3)  # + 1: where the episode starts
    assert frames.std() > 20  # there is something to see
    assert (frames[-1, :40] > 220).all(-1).sum() > 50  # the label
    differs = np.abs(frames[:, 60:, :480].astype(int) - frames[:, 60:, 480:]).max(-1) > 60
    assert differs[0].mean() < 3e-4 < 1e-3 < differs[max(lengths[0])].mean()  # the same start, and another end
    assert {p.name for p in tmp_path.iterdir()} == {"f.mp4", "film.json", "plain.json"}


def test_camera_follows():
    """Gymnasium's own stands where the episode starts; a walker leaves the picture after 150 steps."""
    record = runpy.run_path(str(ROOT / "enjoy.py"), run_name="enjoy")["record"]
    env = gym.make("Hopper-v4", render_mode="rgb_array")
    record(env)
    model, renderer = env.unwrapped.model, env.unwrapped.mujoco_renderer
    assert model.camera(renderer.camera_id).name == "track"


def test_without_opengl_one_sentence(run_folder, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    done = subprocess_enjoy(run_folder, "--episodes", 1, "--video", tmp_path / "f.mp4", MUJOCO_GL="nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "libegl1" in done.stderr and "MUJOCO_GL" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_drawing_that_fails_later_one_sentence(copy, enjoy, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    broken = "from gymnasium.envs.mujoco import MujocoEnv\nMujocoEnv.render = lambda self: None.glGetError()\n"
    from gymnasium.envs.mujoco import MujocoEnv

    monkeypatch.setattr(MujocoEnv, "render", MujocoEnv.render)  # put back afterwards
    source = (ROOT / "lpds_continuous.py").read_text()
    (tmp_path / "fork.py").write_text(source.replace("@dataclass\nclass Args", broken + "@dataclass\nclass Args", 1))
    code, _, err = enjoy(copy, "--episodes", 1, "--script", tmp_path / "fork.py", "--video", tmp_path / "f.mp4")
    assert code == 2 and "libegl1" in err and "glGetError" in err and len(err.splitlines()) == 1


def test_without_imageio_one_sentence(run_folder, enjoy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    code, _, err = enjoy(run_folder, "--episodes", 1, "--video", tmp_path / "f.mp4")
    assert code == 2 and 'pip install "imageio[ffmpeg]"' in err


# What users can get wrong: exit code 2, one sentence that names the flag or file


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def damage(run, how, tmp_path):
    best = run / "best.pt"
    content = torch.load(best, weights_only=True)
    if how == "no checkpoint":
        best.unlink()
        (run / "checkpoint.pt").unlink()
    elif how == "garbage":
        best.write_bytes(b"this is no checkpoint" * 99)
    elif how == "truncated":
        best.write_bytes(best.read_bytes()[:5000])
    elif how == "empty":
        best.write_bytes(b"")
    elif how == "list":
        torch.save([1, 2], best)
    elif how == "no agent":
        torch.save({k: v for k, v in content.items() if k != "agent"}, best)
    elif how == "unknown field":
        change(best, args=content["args"] | {"colour": "red"})
    elif how == "other size":
        change(best, args=content["args"] | {"hidden_size": 16})
    elif how == "wrong type":
        change(best, args=content["args"] | {"hidden_size": "wide"})
    elif how == "malicious":
        torch.save(content | {"loop": Malicious(tmp_path / "executed")}, best)
    elif how == "script outside":  # a checkpoint must not choose what is imported
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
        change(best, script=str(tmp_path / "evil.py"))
    elif how == "backbone":
        (run / "backbone.pt").write_bytes(b"this is no decoder")


DAMAGES = (
    "no checkpoint", "garbage", "truncated", "empty", "list", "no agent", "unknown field", "other size", "wrong type",
    "malicious", "script outside", "backbone",
)  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_run(how, copy, enjoy, tmp_path):
    damage(copy, how, tmp_path)
    code, out, err = enjoy(copy, "--episodes", 1)
    named = {"backbone": "backbone.pt", "script outside": "evil.py", "no checkpoint": "run: "}.get(how, "best.pt")
    assert code == 2 and named in err and not out
    assert len(err.splitlines()) == 1 and "weights_only" not in err
    assert not (tmp_path / "executed").exists()


WRONG = {
    "{tmp}/nowhere": "nowhere",
    "{tmp}": "best.pt",
    "{run} --script {tmp}/none.py": "--script",
    "{run} --script {root}/entropy.py": "entropy.py: defines no Args",
    "{run} --script {root}/README.txt": "--script",
    "{run} --device toaster": "--device toaster",
    "{run} --episodes -1": "--episodes -1",
    "{run} --seed -1": "--seed -1",
    "{run} --episodes 0": "--episodes 0",
    "{run} --episodes 0 --export {tmp}/p.pt2 --json {tmp}/n.json": "--episodes 0",
    "{run} --video {tmp}/f.gif": "--video",
    "{run} --video {tmp}/f.mp4 --episodes 2 --video-episodes 3": "--video-episodes 3",
    "{run} --video {tmp}/none/f.mp4": "--video",
    "{run} --export {tmp}/none/p.pt2": "--export",
    "{run} --export {tmp}/p.onnx": "must end in .pt",
    "{run} --json {tmp}/none/n.json": "--json",
    "{run} --json {tmp}": "--json",
    "{run} --json {run}/args.json": "part of the run",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_argument(line, run_folder, enjoy, tmp_path):
    before = (run_folder / "args.json").read_bytes()
    code, out, err = enjoy(*line.format(tmp=tmp_path, run=run_folder, root=ROOT).split())
    assert code == 2 and WRONG[line] in err and not out
    assert err.startswith("enjoy.py: error: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir()) and (run_folder / "args.json").read_bytes() == before


def test_script_that_cannot_be_imported(run_folder, enjoy, tmp_path):
    (tmp_path / "needs.py").write_text("import a_package_nobody_has\n")
    code, _, err = enjoy(run_folder, "--script", tmp_path / "needs.py")
    assert code == 2 and "a_package_nobody_has" in err and len(err.splitlines()) == 1


def test_a_process_says_the_same(tmp_path):
    done = subprocess_enjoy(tmp_path / "nowhere")
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_write_leaves_whole_files_or_none(tmp_path, capsys):
    write = runpy.run_path(str(ROOT / "enjoy.py"), run_name="enjoy")["write"]
    path = tmp_path / "p.pt2"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit) as stop:
        write("export", path, full_disk)
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with path.open() as reader:
        write("export", path, lambda p: p.write_text("new"))
        assert reader.read() == "old"  # renamed, not overwritten: who reads meanwhile sees one whole file
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
