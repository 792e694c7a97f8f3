"""lpds_adroit_flow.py: its ODE against closed forms, the hands and their success, its settings.

Functions that it shares with lpds_continuous.py (test_shared_code.py) are tested there;
test_resume.py has its killed runs.
"""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SIZES, call, checkpoint, decoder_file, finish, load, metrics, refused
from scipy.linalg import expm

SCRIPT = "lpds_adroit_flow.py"
adroit, model = load(SCRIPT), load("lpds_continuous.py")
HANDS = {"Pen": 0.35, "Hammer": 0.10, "Door": 0.35, "Relocate": 0.35}  # delta of table 2


# --- the ODE ---


def flow(steps: int, solver: str, velocity=None):
    """A decoder of d = 4; with a velocity(x, t) in place of its network, t from 0 to 1."""
    file = decoder_file(3, 2, chunk=2, kind="flow")
    rows = steps + (solver == "heun")
    generator = torch.Generator().manual_seed(0)
    file |= {"solver": solver, "time_emb": torch.randn(rows, 8, generator=generator)}
    decoder = adroit.Decoder(file).double()
    if velocity:
        decoder.velocity = lambda i, x, obs: velocity(x, i / steps)
    return decoder


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_a_linear_flow_is_solved_in_its_closed_form(solver, order):
    matrix = torch.tensor(np.random.default_rng(0).normal(0, 0.7, (4, 4)))
    w, exact, errors = torch.randn(6, 4).double() / 20, torch.tensor(expm(matrix.numpy())), []
    for n in (10, 20, 40):
        terms = [torch.matrix_power(matrix / n, k) / (1, 1, 2)[k] for k in range(order + 1)]
        found = flow(n, solver, lambda x, t: x @ matrix.T)(torch.zeros(6, 3), w)
        torch.testing.assert_close(found, w @ torch.matrix_power(sum(terms), n).T)
        errors.append((found - w @ exact.T).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("solver, reached", [("euler", 0.9 * 0.3), ("heun", 0.3)])
def test_time_runs_from_noise_to_action(solver, reached):
    decoder = flow(10, solver, lambda x, t: torch.full_like(x, 2 * 0.3 * t))
    found = decoder(torch.zeros(1, 3), torch.zeros(1, 4).double())
    torch.testing.assert_close(found, torch.full((1, 4), reached).double())


def test_eulers_method_is_that_of_the_other_scripts_and_the_action_lies_in_the_box():
    file = decoder_file(3, 2, chunk=2, kind="flow")
    obs, w = torch.randn(20, 3), 3 * torch.randn(20, 4)
    assert torch.equal(adroit.Decoder(file)(obs, w), model.Decoder(file)(obs, w))
    assert adroit.Decoder(file)(obs, 100 * w).abs().max() == 1


# --- the hands ---


def make(task: str):
    file = decoder_file(*SIZES[f"AdroitHand{task}"], chunk=8)
    return adroit.make_env(f"AdroitHand{task}Sparse-v1", file)


@pytest.mark.parametrize("task", HANDS)
def test_an_episode_is_25_chunks_and_ends_by_its_time_limit(task):
    env, plain = make(task), make(task).unwrapped
    env.reset(seed=4)
    plain.reset(seed=4)
    rng, total, succeeded = np.random.default_rng(0), 0.0, False
    for i in range(25):
        chunk = rng.uniform(-0.5, 0.5, env.action_space.shape).astype(np.float32)
        _, reward, terminated, truncated, info = env.step(chunk)
        steps = [plain.step(action) for action in chunk.reshape(8, -1)]
        succeeded = succeeded or any(step[4]["success"] for step in steps)
        total += sum(step[1] for step in steps)
        assert reward == pytest.approx(sum(step[1] for step in steps)) and env.steps == 8
        assert info["success"] == succeeded and not terminated and truncated == (i == 24)
    assert info["episode"]["l"] == 200 and info["episode"]["r"] == pytest.approx(total, abs=1e-3)


def test_a_success_in_the_middle_counts_and_not_in_the_next_episode(monkeypatch):
    makers = [lambda: make("Pen")] * 2
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    first, kind = envs.envs[0].unwrapped, type(envs.envs[0].unwrapped)
    step, count = kind.step, iter(range(10**6))

    def held(self, action):
        success = self is first and 42 <= next(count) < 45  # within the chunk of steps 40 to 47
        return (*step(self, action)[:4], {"success": success})

    monkeypatch.setattr(kind, "step", held)
    still = lambda obs, noise: torch.zeros_like(noise)  # noqa: E731
    assert adroit.evaluate(still, envs, "cpu")["success"] == [1, 0]
    assert adroit.evaluate(still, envs, "cpu")["success"] == [0, 0]


# --- settings and runs ---


def test_settings_are_those_of_tables_1_to_3_but_prior_steps_and_alike_for_both_methods():
    dsrl = load("baselines/dsrl_adroit_flow.py")
    for task, delta in HANDS.items():
        for reward in ("", "Sparse"):
            ours, theirs = (
                vars(script.Args(**script.DEFAULTS[f"AdroitHand{task}{reward}"]))
                for script in (adroit, dsrl)
            )
            printed = dict(hidden_size=256, utd=10, distill_steps=10, gamma=0.99, noise_bound=2.5)
            printed |= dict(delta=delta, backbone=f"adroit-{task.lower()}-flow.pt")
            assert ours.items() >= printed.items()
            own = {"delta", "delta_norm", "dual", "alpha_lr", "lagrangian"}
            assert ours.keys() - theirs.keys() == own
            assert theirs.keys() - ours.keys() == {"target_entropy"}
            both = ours.keys() & theirs.keys()
            assert {key for key in both if ours[key] != theirs[key]} == {"exp_name"}


TINY = """--hidden-size 16 --batch-size 32 --utd 2 --distill-steps 2 --num-envs 2 --eval-episodes 1
    --prior-steps 100 --warmup-steps 100 --eval-every 400 --log-every 100
    --total-timesteps 400""".split()


def test_an_ablation_runs_on_a_sparse_task_with_a_heun_decoder(tmp_path):
    file = decoder_file(*SIZES["AdroitHandPen"], chunk=8, kind="flow")
    file |= {"solver": "heun", "time_emb": torch.randn(4, 8)}
    torch.save(file, tmp_path / "heun.pt")
    flags = "--env-id AdroitHandPenSparse-v1 --backbone heun.pt --no-lagrangian --noise-bound inf"
    longer = ["--eval-every", 480, "--total-timesteps", 480]
    run = finish(tmp_path, SCRIPT, *flags.split(), *TINY, *longer)
    last = metrics(run)[-1]
    assert float(last["trust_region/alpha"]) == 0 and float(last["trust_region/sq_norm"]) > 0
    assert checkpoint(run)["script"] == SCRIPT
    replay = checkpoint(run)["replay"]  # of two environments, whose 25th chunks end an episode
    apart = (replay["next_obs"][:-2] != replay["obs"][2:]).any(1).nonzero().flatten().tolist()
    assert apart == [48, 49] and not replay["terminated"].any()


def without_the_hands() -> None:
    sys.modules["gymnasium_robotics"] = None  # to import it fails from now on


@pytest.mark.parametrize("script", [SCRIPT, "baselines/dsrl_adroit_flow.py"])
def test_without_gymnasium_robotics_it_says_what_to_install(script, tmp_path):
    code, _, error = call(tmp_path, script, before=without_the_hands)
    assert code and "requirements/adroit.txt" in error and "Traceback" not in error


def test_a_decoder_of_another_kind_or_hand_is_refused(tiny_backbone, tmp_path):
    flags = ["--env-id", "AdroitHandDoor-v1", *TINY, "--backbone"]
    diffusion = call(tmp_path, SCRIPT, *flags, tiny_backbone("AdroitHandDoor", "diffusion"))
    refused(diffusion, "--backbone", "no flow of format 2")
    pen = call(tmp_path, SCRIPT, *flags, tiny_backbone("AdroitHandPen", "flow"))
    refused(pen, "--backbone", "45 observations", "AdroitHandDoor-v1")
    for env_id in ("AdroitHandPen-v2", "Hopper-v4"):  # the package's own notice speaks of -v2
        other = ["--env-id", env_id, "--backbone", tiny_backbone("Hopper", "flow"), *TINY]
        refused(call(tmp_path, SCRIPT, *other), f"--env-id {env_id}", "-v1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_committed_decoder_succeeds_as_often_as_its_card_says():
    file = torch.load(ROOT / "backbones" / "adroit-pen-flow.pt", weights_only=True)
    makers = [lambda: adroit.make_env("AdroitHandPen-v1", file)] * 40
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    success = adroit.evaluate(adroit.Decoder(file), envs, "cpu", seed=5)["success"]
    said, episodes = file["card"]["frozen_success"], file["card"]["eval_episodes"]
    spread = (said * (1 - said) * (1 / 40 + 1 / episodes)) ** 0.5
    assert abs(np.mean(success) - said) < 3 * spread and 0.2 < said < 0.7
