"""enjoy.py on tiny runs: its numbers against the script's own functions and against formulas, the
exported program in a process that knows nothing of this repository, the film frame by frame, and
what users get wrong or strangers put into a run folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, call, checkpoint, decoder_file, finish, metrics, refused

import enjoy
import lpds_continuous as lpds
from entropy import knn_entropy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Hopper-v4 is old
OBS, ACT, CHUNK = 11, 3, 4
TINY = dict(hidden_size=16, batch_size=32, utd=1, distill_steps=1, lr=0.003, num_envs=1)
TINY |= dict(prior_steps=200, warmup_steps=100, total_timesteps=600, log_every=100)
TINY |= dict(eval_every=300, eval_episodes=2)


def tiny(script: str) -> list:
    """Those of TINY that the script has."""
    fields = re.findall(r"^    (\w+): ", (ROOT / script).read_text(), re.MULTILINE)
    return [f"--{name.replace('_', '-')}={TINY[name]}" for name in TINY if name in fields]


def save(path: Path, **entries) -> None:
    torch.save(torch.load(path, weights_only=True) | entries, path)


def log_resets(name: str):
    """before(): every reset with seeds, of a vector of environments, becomes a line of a file."""
    original = gym.vector.SyncVectorEnv.reset

    def reset(self, *, seed=None, options=None):
        with open(name, "a") as file:
            print(json.dumps(seed), file=file)
        return original(self, seed=seed, options=options)

    gym.vector.SyncVectorEnv.reset = reset


def resets(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a run on Hopper, with a decoder of noise: it falls after a few steps."""
    folder = tmp_path_factory.mktemp("enjoy")
    file = decoder_file(OBS, ACT, CHUNK)
    # On one side wider than Hopper's [-1, 1], on the other narrower: a forgotten clip shows
    file["normalization"]["action_min"] = torch.tensor([-1.4, -0.9, -0.5])
    file["normalization"]["action_max"] = torch.tensor([0.8, 1.0, 1.6])
    file["normalization"]["obs_max"] = torch.linspace(0.5, 3, OBS)
    torch.save(file, folder / "tiny.pt")
    flags = ["--env-id", "Hopper-v4", "--backbone", "tiny.pt", *tiny("lpds_continuous.py")]
    finish(folder, "lpds_continuous.py", *flags, before=partial(log_resets, "train.txt"))
    return folder


@pytest.fixture(scope="session")
def run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def copy(run, tmp_path):
    """A run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def played(folder: Path, *flags, before=None, script="enjoy.py") -> tuple:
    """(numbers of --json, stdout)"""
    flags = [*flags, "--json", "n.json"]
    code, out, err = call(folder, script, *flags, before=before)
    assert code == 0, err
    return json.loads((folder / "n.json").read_text()), out


def load(run: Path, name="checkpoint.pt"):
    file = torch.load(run / "backbone.pt", weights_only=True)
    args = lpds.Args(**json.loads((run / "args.json").read_text()))
    agent = lpds.Agent(args, lpds.Decoder(file))
    agent.load_state_dict(checkpoint(run, name)["agent"])
    return agent, file


def evaluated(run: Path, name: str, tau: float, group: int) -> tuple:
    """(20 episodes by the script's own functions, observations that the policy was shown)"""
    agent, file = load(run)
    policy = {"frozen": agent.decoder, "steered": agent.act}[name]
    seen = []

    def tempered(obs, noise):
        seen.append(obs)
        return policy(obs, tau * noise)

    make = partial(lpds.make_env, "Hopper-v4", file)
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([make] * 20, autoreset_mode=same_step)
    seed = int(np.random.SeedSequence(1).generate_state(group + 1)[group])
    return lpds.evaluate(tempered, envs, "cpu", seed), torch.cat(seen)


# --- the table ---


def test_numbers_are_those_of_the_scripts_own_functions(run, tmp_path):
    numbers, out = played(tmp_path, run, "--episodes", 23, "--temperature", 1, 0.5)
    assert [numbers[key] for key in ("episodes", "seed", "temperatures")] == [23, 1, [1, 0.5]]
    last = checkpoint(run)["rows"][-1]["global_step"]
    assert numbers["global_step"] == last >= 600 and numbers["script"] == "lpds_continuous.py"

    rows = [(tau, name) for tau in (1, 0.5) for name in ("frozen", "steered")]
    returns = set()
    for (tau, name), line in zip(rows, out.splitlines()[-4:]):
        (a, _), (b, _) = (evaluated(run, name, tau, group) for group in (0, 1))
        found = numbers[name][f"{tau:g}"]
        for key in ("return", "length", "success"):
            assert found[key] == (a[key] + b[key])[:23], (tau, name, key)
        x = np.array(found["return"])
        cells = [f"{tau:g}", name, f"{x.mean():.1f}", "+-", f"{x.std(ddof=1) / 23**0.5:.1f}"]
        assert line.split()[:5] == cells
        assert line.split()[11:13] == [f"{found['entropy']:.3f}", f"{found['ties']:.3f}"]
        returns.add(x.sum())
    assert len(returns) == 4  # else rows could be swapped unseen


def test_entropy_delta_and_kl_are_those_of_the_visited_states(run, tmp_path):
    numbers, _ = played(tmp_path, run, "--temperature", 0.5)
    agent, _ = load(run)
    _, obs = evaluated(run, "steered", 0.5, 0)
    shift = agent.perturbation(obs).detach()
    found = numbers["steered"]["0.5"]
    assert found["sq_norm"] == pytest.approx(shift.square().mean().item(), rel=1e-4)
    w, prior = torch.distributions.Normal(shift, 0.5), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(w, prior).sum(1).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-4) and shift.square().mean() > 1e-4

    noise = 0.5 * torch.randn(64 * len(obs), CHUNK * ACT)  # all states, other draws
    for name, policy in (("frozen", agent.decoder), ("steered", agent.act)):
        actions = policy(obs.repeat_interleave(64, 0), noise).view(len(obs), 64, -1)
        entropy, ties = knn_entropy(actions)
        assert numbers[name]["0.5"]["entropy"] == pytest.approx(float(entropy), abs=0.5)
        assert numbers[name]["0.5"]["ties"] == pytest.approx(float(ties), abs=0.02)


def test_without_delta_both_play_the_same_and_temperature_0_is_one_action(copy, tmp_path):
    agent = checkpoint(copy)["agent"]
    head = [key for key in agent if key.startswith("perturbation")][-2:]
    save(copy / "checkpoint.pt", agent=agent | {key: 0 * agent[key] for key in head})
    numbers, out = played(tmp_path, copy, "--episodes", 3)  # temperatures 1 and 0
    assert numbers["temperatures"] == [1, 0]
    for tau in ("1", "0"):  # so starts and noise are the same
        assert numbers["steered"][tau].items() >= numbers["frozen"][tau].items()
    assert numbers["frozen"]["0"]["ties"] == 1 and "kl" not in numbers["steered"]["0"]
    assert re.search(r"^0 +steered .* - +1\.000 +0\.000 +-$", out, re.MULTILINE)  # no entropy


def test_more_episodes_begin_with_the_same_and_best_is_another(copy, tmp_path):
    few, _ = played(tmp_path, copy, "--episodes", 20, "--temperature", 1)
    many, _ = played(tmp_path, copy, "--episodes", 21, "--temperature", 1)
    assert many["steered"]["1"]["return"][:20] == few["steered"]["1"]["return"]
    state = checkpoint(copy)
    state["rows"] = state["rows"][:1]
    state["agent"] = {k: -3 * v if "perturbation" in k else v for k, v in state["agent"].items()}
    torch.save(state, copy / "best.pt")
    best, _ = played(tmp_path, copy, "--temperature", 1, "--checkpoint", "best")
    assert best["global_step"] == 0 and best["frozen"] == few["frozen"] | best["frozen"]
    assert best["steered"]["1"]["return"] != few["steered"]["1"]["return"]


def test_no_episode_is_one_of_training_or_of_its_evaluation(folder, run, tmp_path):
    trained = {seed for seeds in resets(folder / "train.txt") for seed in seeds}
    assert len(trained) >= 4
    starts = []
    for seed in (0, 1, 2):
        flags = (run, "--seed", seed, "--episodes", 40, "--temperature", 1)
        played(tmp_path, *flags, before=partial(log_resets, f"{seed}.txt"))
        first, second, *again = resets(tmp_path / f"{seed}.txt")
        assert again == [first, second]  # frozen and steered start alike
        starts += first + second
    assert len({*starts}) == 3 * 40 and not trained & {*starts}


SCRIPTS = {
    "lpds_adroit_flow.py": "AdroitHandPen-v1",
    "lpds_toy.py": "MultiGoal-v0",
    "baselines/dsrl_continuous.py": "Hopper-v4",
    "baselines/dppo_continuous.py": "Hopper-v4",
    "baselines/dsrl_adroit_flow.py": "AdroitHandPen-v1",
    "baselines/dsrl_toy.py": "MultiGoal-v0",
    "baselines/dppo_toy.py": "MultiGoal-v0",
    "baselines/lpds_action_continuous.py": "Hopper-v4",
    "baselines/dql_continuous.py": "Hopper-v4",
    "baselines/idql_continuous.py": "Hopper-v4",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_plays_every_script(script, tiny_backbone, tmp_path):
    env_id, name = SCRIPTS[script], SCRIPTS[script].split("-v")[0]
    kind = "diffusion" if name == "Hopper" or "dppo" in script else "flow"
    flags = ["--env-id", env_id, "--backbone", tiny_backbone(name, kind), *tiny(script)]
    run = finish(tmp_path, script, *flags)
    numbers, _ = played(tmp_path, run, "--episodes", 2, "--curves", "c.png")
    steered = numbers["steered"]["1"]
    assert numbers["script"] == Path(script).name and np.isfinite(steered["return"]).all()
    assert ("sq_norm" in steered) == ("lpds" in script)
    assert ("kl" in steered) == ("lpds" in script and "action" not in script)
    assert (tmp_path / "c.png").is_file()


# --- the curves ---


def test_curves_show_every_column_and_the_frozen_level(run, copy, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: drawn.append(f) or savefig(f, *a, **k)
    )
    enjoy.draw_curves(run, load(run)[0].args, str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").stat().st_size > 10_000
    lines = {line.get_label(): line for axis in drawn[0].axes for line in axis.lines}
    rows, evals = metrics(run), np.load(run / "eval.npz")
    for key in [key for keys in enjoy.PANELS.values() for key in keys]:
        points = [(float(row["global_step"]), float(row[key])) for row in rows if row[key]]
        np.testing.assert_allclose(np.transpose(lines[key].get_data()), points)
        assert (lines[key].get_linestyle() == "--") == ("frozen" in key) and points
    assert {*lines["eval/frozen_return"].get_ydata()} == {evals["return"][0].mean()}
    assert {*lines["delta"].get_ydata()} == {0.5}  # Hopper's

    path = copy / "metrics.csv"  # a method without a budget has no panel for it
    path.write_text(path.read_text().replace("trust_region/sq_norm", "losses/other", 1))
    enjoy.draw_curves(copy, load(run)[0].args, str(tmp_path / "c.png"))
    titles = [axis.get_title() for axis in drawn[1].axes]
    assert titles == list(enjoy.PANELS)[:3] and titles[-1] == "action entropy"


# --- the exported program ---

FRESH = """
import sys, torch
policy = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([policy(obs, noise) for obs, noise in inputs], sys.argv[3])
assert not {"gymnasium", "mujoco", "entropy", "lpds_continuous", "tyro"} & set(sys.modules)
for obs, noise in inputs:
    for bad in (float("nan"), float("inf")):
        for broken in (obs.clone(), noise.clone()):
            broken[-1, 1] = bad
            try:
                policy(broken, noise) if broken.shape == obs.shape else policy(obs, broken)
            except RuntimeError as error:
                assert "not finite" in str(error)
            else:
                raise SystemExit("an action was made of what is not finite")
"""


@pytest.mark.slow
def test_program_does_what_the_script_does_and_needs_torch_alone(run, tmp_path):
    code, out, err = call(tmp_path, "enjoy.py", run, "--episodes", 0, "--export", "p.pt2")
    assert (code, err) == (0, "") and "frozen" not in out  # nothing is evaluated, nothing warned of
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for n in (1, 5):
        obs = 3 * torch.randn(n, OBS, generator=generator, dtype=torch.float64)
        inputs.append((obs, 2 * torch.randn(n, CHUNK * ACT, generator=generator)))
    torch.save(inputs, tmp_path / "in.pt")
    files = [tmp_path / name for name in ("p.pt2", "in.pt", "out.pt")]
    command = [sys.executable, "-I", "-c", FRESH, *files]
    fresh = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert fresh.returncode == 0, fresh.stderr

    agent, file = load(run)
    stats = {key: value.double().numpy() for key, value in file["normalization"].items()}
    outputs = torch.load(tmp_path / "out.pt", weights_only=True)
    for (obs, noise), found in zip(inputs, outputs):
        share = (obs.numpy() - stats["obs_min"]) / (stats["obs_max"] - stats["obs_min"] + 1e-6)
        action = agent.act(torch.as_tensor(2 * share - 1).float(), noise).numpy()
        action = (action.reshape(len(obs), CHUNK, ACT) + 1) / 2
        action = action * (stats["action_max"] - stats["action_min"]) + stats["action_min"]
        np.testing.assert_allclose(found.numpy(), action.clip(-1, 1), atol=1e-5)
        assert (abs(action) > 1).any()  # the clip took part


def test_program_that_differs_from_the_script_is_not_written(run, tmp_path):
    source = (ROOT / "lpds_continuous.py").read_text()
    changed = source.replace("* (high - low) + low, None", "* (high - low) + 0.9 * low, None")
    assert changed != source
    (tmp_path / "fork.py").write_text(changed)
    flags = ("--episodes", 0, "--script", "fork.py", "--export", "p.pt2")
    refused(call(tmp_path, "enjoy.py", run, *flags), "--export", "fork.py")
    assert not (tmp_path / "p.pt2").exists()


# --- the film ---

PAINTED = """

class Painted(gym.Env):  # lasts until the sum of the actions passes a limit; a picture tells time
    observation_space = gym.spaces.Box(-9, 9, (11,))
    action_space = gym.spaces.Box(-1, 1, (3,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.level = 0, self.np_random.random()
        return np.full(11, self.level, np.float32), {}

    def step(self, action):
        self.t += 1
        self.level += abs(float(action[0]))
        return np.full(11, self.level, np.float32), 1.0, self.level > 5, False, {}

    def render(self):
        assert self.render_mode
        return np.full((64, 96, 3), min(5 * self.t, 250), np.uint8)


gym.register("Painted-v0", Painted, max_episode_steps=50)
"""


@pytest.fixture
def painted(copy, tmp_path):
    """A run in an environment that paints, and its script."""
    pytest.importorskip(
        "imageio_ffmpeg", reason='no imageio[ffmpeg]: pip install "imageio[ffmpeg]"'
    )
    source = (ROOT / "lpds_continuous.py").read_text()
    (tmp_path / "fork.py").write_text(
        source.replace("\n\nif __name__ ==", PAINTED + "\n\nif __name__ ==")
    )
    args = json.loads((copy / "args.json").read_text()) | {"env_id": "Painted-v0"}
    (copy / "args.json").write_text(json.dumps(args))
    return copy, "--script", "fork.py"


def test_film_shows_every_step_of_both_policies_at_each_temperature(painted, tmp_path):
    import imageio.v3 as imageio

    flags = (*painted, "--episodes", 21)
    video = ("--video", "f.mp4", "--video-episodes", 2)
    plain, _ = played(tmp_path, *flags)
    numbers, _ = played(tmp_path, *flags, *video)
    assert numbers == plain  # filming changes nothing
    frames = imageio.imread(tmp_path / "f.mp4").astype(int)
    expected = []
    for tau in ("1", "0"):
        for pair in zip(*(numbers[name][tau]["length"][:2] for name in ("frozen", "steered"))):
            times = np.arange(max(pair) + 1)  # from the reset on; the shorter one waits
            expected += [np.minimum(times[:, None], pair)]
    expected = np.minimum(5 * np.concatenate(expected), 250)
    assert frames.shape == (len(expected), 64, 192, 3) and (expected[:, 0] != expected[:, 1]).any()
    found = np.stack([frames[:, 50:, x : x + 96].mean((1, 2, 3)) for x in (0, 96)], 1)
    assert abs(found - expected).max() < 4  # ffmpeg's loss
    assert frames[:, 8:34].std((1, 2, 3)).min() > 10  # the label


@pytest.mark.slow
def test_film_of_mujoco(run, tmp_path):
    pytest.importorskip(
        "imageio_ffmpeg", reason='no imageio[ffmpeg]: pip install "imageio[ffmpeg]"'
    )
    environment = os.environ | {"MUJOCO_GL": "egl"}
    check = [sys.executable, "-c", "import mujoco; mujoco.GLContext(64, 64).make_current()"]
    able = subprocess.run(check, env=environment, capture_output=True, text=True)
    if able.returncode:
        pytest.skip("no EGL here: " + able.stderr.strip().splitlines()[-1])
    source = (ROOT / "lpds_continuous.py").read_text()
    short = source.replace("gym.make(env_id,", "gym.make(env_id, max_episode_steps=3,")
    (tmp_path / "fork.py").write_text(short)
    flags = ["--script", "fork.py", "--episodes", "1", "--temperature", "1", "--video", "f.mp4"]
    command = [sys.executable, ROOT / "enjoy.py", run, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    import imageio.v3 as imageio

    frames = imageio.imread(tmp_path / "f.mp4")
    assert frames.shape == (4, 480, 960, 3) and frames.std() > 20


def break_drawing():
    def render(self):
        raise RuntimeError("no\nscreen")

    gym.envs.mujoco.MujocoEnv.render = render


def test_where_nothing_can_be_drawn_one_sentence(run, tmp_path):
    pytest.importorskip(
        "imageio_ffmpeg", reason='no imageio[ffmpeg]: pip install "imageio[ffmpeg]"'
    )
    result = call(tmp_path, "enjoy.py", run, "--video", "f.mp4", before=break_drawing)
    refused(result, "--video", "screen", "MUJOCO_GL=egl")


def test_camera_follows_a_walker():
    """Gymnasium's own stands where the episode starts; a walker leaves the picture."""
    env = gym.make("Hopper-v4", render_mode="rgb_array")
    enjoy.Camera(env)
    model, renderer = env.unwrapped.model, env.unwrapped.mujoco_renderer
    assert model.camera(renderer.camera_id).name == "track"


# --- strangers' files and mistakes ---


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
@pytest.mark.parametrize("how", ["malicious", "garbage", "missing"])
def test_nothing_in_a_file_is_run(name, how, copy, tmp_path):
    content = checkpoint(copy, name)
    (copy / name).unlink()
    if how == "malicious":
        torch.save(content | {"rows": Malicious(tmp_path / "executed")}, copy / name)
    if how == "garbage":
        (copy / name).write_bytes(b"no tensors" * 99)
    result = call(tmp_path, "enjoy.py", copy, "--episodes", 1)
    refused(result, name)
    assert "weights_only" not in result[2] and not (tmp_path / "executed").exists()


def test_a_checkpoint_does_not_choose_what_is_imported(copy, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    save(copy / "checkpoint.pt", script=str(tmp_path / "evil.py"))
    refused(call(tmp_path, "enjoy.py", copy), "--script", "evil.py")
    assert not (tmp_path / "executed").exists()


def test_run_of_another_version_of_the_script(copy, tmp_path):
    args = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps(args | {"colour": "red"}))
    refused(call(tmp_path, "enjoy.py", copy), "lpds_continuous.py", "version")


def test_curves_before_the_first_evaluation(copy, tmp_path):
    (copy / "metrics.csv").unlink()
    flags = ("--episodes", 0, "--curves", "c.png")
    refused(call(tmp_path, "enjoy.py", copy, *flags), "--curves", "no evaluation")


WRONG = {
    "nowhere": "nowhere/checkpoint.pt",
    "RUN --script none.py": "--script none.py",
    "RUN --video f.gif": ".mp4",
    "RUN --export p.pt": ".pt2",
    "RUN --curves c.txt": ".png",
    "RUN --json none/n.json": "--json none/n.json",
    "RUN --json n.json --episodes 0": "--episodes 0",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_argument(line, run, tmp_path):
    flags = line.replace("RUN", str(run)).split()
    refused(call(tmp_path, "enjoy.py", *flags), WRONG[line])


@pytest.mark.parametrize("module, flag", [("matplotlib", "curves"), ("PIL", "video")])
def test_missing_package_one_sentence(module, flag, run, tmp_path, monkeypatch, capsys):
    file = {"curves": "c.png", "video": "f.mp4"}[flag]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["enjoy.py", str(run), f"--{flag}", str(tmp_path / file)])
    with pytest.raises(SystemExit) as stop:
        enjoy.parse_args()
    refused((stop.value.code, "", capsys.readouterr().err), f"--{flag}", "pip install")
