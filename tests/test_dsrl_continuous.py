"""baselines/dsrl_continuous.py: what DSRL does differently, against torch.distributions and by hand; its runs.

What it shares with lpds_continuous.py is the same text (test_shared_blocks.py) and tested there.
"""

import csv
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "baselines" / "dsrl_continuous.py"
sys.path.insert(0, str(ROOT))
import lpds_continuous as lpds  # noqa: E402

SPEC = importlib.util.spec_from_file_location("dsrl_continuous", SCRIPT)
dsrl = sys.modules["dsrl_continuous"] = importlib.util.module_from_spec(SPEC)  # dataclasses look it up there
SPEC.loader.exec_module(dsrl)
OBS, D, N = 5, 6, 64


def setup(started=True, **settings):
    """(agent, batch, args) of a small agent whose head, and so whose log sigma, varies from state to state."""
    torch.manual_seed(0)
    args = dsrl.Args(**dict(hidden_size=16, num_layers=2, batch_size=N, reward_scale=0.3) | settings)
    config = dict(kind="flow", obs_dim=OBS, action_dim=2, chunk=3, hidden=[16] * 3, cond_hidden=[], time_dim=8)
    decoder = dsrl.Decoder(config | dict(activation="relu", train_steps=20, sample_steps=5)).freeze()
    agent = dsrl.Agent(args, decoder)
    agent.actor[-1].weight.data *= 5
    agent.started.fill_(started)
    batch = {"obs": torch.randn(N, OBS), "action": torch.rand(N, D) * 2 - 1, "reward": torch.randn(N)}
    batch |= {"next_obs": torch.randn(N, OBS), "terminated": (torch.rand(N) < 0.4).float()}
    return agent, batch, args


def by_torch(agent, obs, noise):
    """w / b (N, D) and log pi (N,) by torch.distributions, in double precision."""
    mu, log_sigma = agent.actor(obs).detach().double().chunk(2, -1)
    gaussian = torch.distributions.Normal(mu, log_sigma.clamp(-20, 2).exp())
    u, tanh = gaussian.mean + gaussian.stddev * noise.double(), torch.distributions.TanhTransform()
    return tanh(u), (gaussian.log_prob(u) - tanh.log_abs_det_jacobian(u, tanh(u))).sum(-1)


# --- the noise policy ---
@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_noise_and_its_density_are_those_of_torch_distributions(bound):
    agent, batch, _ = setup(noise_bound=bound)
    noise = torch.randn(N, D)
    w, log_prob = agent.squash(batch["obs"], noise)
    x, log_density = by_torch(agent, batch["obs"], noise)
    assert torch.allclose(w.double(), bound * x, atol=1e-5)
    # No Jacobian for the bound: the density is that in [-1, 1]^d, in which the target entropy is counted
    assert torch.allclose(log_prob.double(), log_density, rtol=1e-4, atol=1e-3)


def test_the_density_of_one_coordinate_integrates_to_one():
    agent, batch, _ = setup()
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data.copy_(torch.tensor([0.4] + [0.0] * (D - 1) + [-0.3] * D))
    x = torch.linspace(-1, 1, 20_003)[1:-1].double()  # where the first coordinate of w / b is
    u, sigma = torch.atanh(x), math.exp(-0.3)
    noise = torch.zeros(len(x), D).double()
    noise[:, 0] = (u - 0.4) / sigma
    _, log_prob = agent.double().squash(batch["obs"][:1].double().expand(len(x), -1), noise)
    others = (D - 1) * (-0.5 * math.log(2 * math.pi) + 0.3)  # log density of the others, at w = 0
    assert torch.trapezoid((log_prob - others).exp(), x).item() == pytest.approx(1, abs=1e-3)


def test_no_noise_beyond_the_bound_however_far_the_policy_goes():
    agent, batch, args = setup(noise_bound=1.5)
    for scale in (1, 100, 1e6):
        agent.actor[-1].weight.data *= scale
        w, log_prob = agent.squash(batch["obs"], 10 * torch.randn(N, D))
        assert w.abs().max() <= 1.5 and log_prob.isfinite().all()
        assert agent.steer(batch["obs"], torch.randn(N, D)).abs().max() <= 1.5
    assert w.abs().max() > 1.49


def test_until_its_first_update_the_policy_is_the_frozen_one():
    agent, batch, args = setup(started=False)
    obs, noise = batch["obs"], 3 * torch.randn(N, D)
    assert torch.equal(agent.act(obs, noise), agent.decoder(obs, noise))
    dsrl.update_action_critic(agent, batch, args)
    assert not agent.started
    dsrl.update_actor(agent, batch, args)
    assert agent.started and torch.equal(agent.act(obs, noise), agent.decoder(obs, agent.squash(obs, noise)[0]))


# --- its updates ---
def drawn(seed):
    """The noise that an update draws first after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = torch.randn(N, D)
    torch.manual_seed(seed)
    return noise


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("variant", ["na", "sac"])
def test_the_td_target_holds_the_entropy_and_for_sac_the_noise(variant, started):
    agent, batch, args = setup(started, variant=variant, alpha_init=0.7, gamma=0.9)
    noise = drawn(3)
    obs, q = batch["next_obs"], agent.q_a(batch["obs"], batch["action"]).detach()
    x, log_prob = by_torch(agent, obs, noise)
    w = 1.5 * x.float() if started else noise
    value = agent.q_a_target(obs, agent.decoder(obs, w) if variant == "na" else w).min(0).values
    value = value - 0.3 * 0.7 * log_prob.float() * started  # alpha scales with the rewards
    target = 0.3 * batch["reward"] + 0.9 * (1 - batch["terminated"]) * value
    info = dsrl.update_action_critic(agent, batch, args)
    assert info["losses/q_a"].item() == pytest.approx(0.5 * (q - target).square().mean(1).sum().item(), rel=1e-4)


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_the_loss_of_the_actor_is_that_of_sac_on_its_critic_of_noise(variant):
    agent, batch, args = setup(variant=variant, alpha_init=0.7)
    noise = drawn(4)
    x, log_prob = by_torch(agent, batch["obs"], noise)
    w = 1.5 * x
    critic = agent.q_w if variant == "na" else agent.q_a
    q = critic(batch["obs"], w.float()).min(0).values.detach()
    prior = torch.distributions.Normal(0, 1).log_prob(w).sum(-1)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    info = dsrl.update_actor(agent, batch, args)
    assert info["losses/actor"].item() == pytest.approx((0.3 * 0.7 * log_prob - q).mean().item(), rel=1e-4)
    assert info["losses/log_prob"].item() == pytest.approx(log_prob.mean().item(), rel=1e-4)
    # KL(pi, N(0, I)) by the same sample; the density of w itself is that of w / b over b^d
    kl = log_prob - D * math.log(1.5) - prior
    assert info["trust_region/kl"].item() == pytest.approx(kl.mean().item(), rel=1e-4)
    now = agent.state_dict()
    assert {n.split(".")[0] for n in now if not torch.equal(now[n], before[n])} == {"actor", "temperature"}


@pytest.mark.parametrize("surplus", [-2.0, 2.0])
def test_the_temperature_follows_minus_the_gap_to_the_target_entropy(surplus):
    agent, batch, args = setup(alpha_init=0.7)
    entropy = -agent.squash(batch["obs"], drawn(4))[1].mean().item()
    args.target_entropy = entropy - surplus
    agent.optimizers["temperature"] = torch.optim.SGD(agent.temperature.parameters(), lr=0.1)
    drawn(4)
    dsrl.update_actor(agent, batch, args)
    # d/dlog_alpha of -log_alpha (log pi + target): too much entropy makes it cheaper
    assert agent.alpha.item() == pytest.approx(0.3 * 0.7 * math.exp(-0.1 * surplus), rel=1e-4)


def test_the_temperature_holds_a_reachable_entropy():
    agent, batch, args = setup(target_entropy=2.0, lr=3e-3, reward_scale=1.0)

    class Peak(torch.nn.Module):  # worth most at w = 0.3, so that entropy has a price
        def forward(self, obs, w):
            return -4 * (w - 0.3).square().sum(-1).expand(2, -1)

    agent.q_w = Peak()
    entropies = []
    for _ in range(1500):
        entropies.append(-dsrl.update_actor(agent, batch, args)["losses/log_prob"].item())
    assert np.mean(entropies[-200:]) == pytest.approx(2.0, abs=0.25)
    assert 0.05 < agent.alpha.item() < 20


# --- the fork ---
def test_the_diff_is_short_enough_to_be_a_lesson():
    ours, theirs = (path.read_text().splitlines() for path in (ROOT / "lpds_continuous.py", SCRIPT))
    hunks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    assert sum(op[0] != "equal" for op in hunks) <= 25  # `diff` itself counts 24


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v5"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_both_methods_have_they_have_alike(env_id, preset):
    flags = ["--env-id", env_id, "--preset", preset]
    ours, theirs = vars(lpds.parse_args(flags)), vars(dsrl.parse_args(flags))
    own = {"delta", "delta_norm", "dual", "alpha_lr", "lagrangian", "perturb"}
    assert set(ours) - set(theirs) == own and set(theirs) - set(ours) == {"variant", "target_entropy"}
    assert {k for k in set(ours) & set(theirs) if ours[k] != theirs[k]} == {"noise_bound", "exp_name"}
    assert theirs["noise_bound"] == (2.5 if "Walker" in env_id else 1.5) and theirs["target_entropy"] == 0


def test_every_setting_has_a_docstring():
    text = SCRIPT.read_text()
    for field in dataclasses.fields(dsrl.Args):
        assert f"    {field.name}: " in text and text.split(f"    {field.name}: ")[1].split("\n")[1].startswith(
            '    """'
        )


def test_departures_are_listed_in_its_page_and_commands_parse():
    page, script = (" ".join(path.read_text().split()) for path in (ROOT / "docs" / "baselines.md", SCRIPT))
    table = page.partition("## The released code of DSRL")[2]
    listed = re.findall(r"`(differs from DSRL: [^`]*)`", table)
    marked = re.findall(r"(differs from DSRL: .{30})", script)
    assert len(marked) == 5 and all(any(mark.startswith(tag[: len(mark)]) for tag in listed) for mark in marked)
    assert all(tag in script for tag in listed) and len(listed) == len(marked)
    commands = re.findall(
        r"^python baselines/dsrl_continuous.py(.*)$", (ROOT / "docs" / "baselines.md").read_text(), re.M
    )
    assert len(commands) >= 3 and [dsrl.parse_args(shlex.split(command)).env_id for command in commands]


# --- whole runs ---
TINY = "--hidden-size 16 --batch-size 32 --utd 3 --distill-steps 2 --num-envs 2 --eval-episodes 2 --no-progress " \
       "--prior-steps 200 --warmup-steps 100 --eval-every 500 --log-every 100 --total-timesteps 1200"  # fmt: skip


def run(*flags, before="", **kwargs):
    flags = [str(flag) for flag in flags]
    start = (
        f"import runpy, sys\nsys.argv[0] = {str(SCRIPT)!r}\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    kwargs = dict(capture_output=True, text=True, timeout=300) | kwargs
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", start, *flags] if before else [sys.executable, SCRIPT, *flags],
                          env=env, **kwargs)  # fmt: skip


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [
            {k: v for k, v in row.items() if k not in ("wall_seconds", "charts/SPS")} for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_it_runs_stops_and_resumes_exactly(variant, tiny_backbone, tmp_path):
    flags = ["--env-id", "Hopper-v4", "--backbone", tiny_backbone(), "--variant", variant, *TINY.split()]
    done = run(*flags, "--run-dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    (whole,) = (tmp_path / "whole").iterdir()
    assert whole.name.startswith("Hopper-v4__dsrl_continuous__1__")

    stop = """
import os, signal, gymnasium
step, calls = gymnasium.vector.SyncVectorEnv.step, []
def kill(envs, actions):
    calls.append(0)
    if len(calls) == 77:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(envs, actions)
gymnasium.vector.SyncVectorEnv.step = kill
"""
    stopped = run(*flags, "--run-dir", tmp_path / "parts", before=stop)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    (parts,) = (tmp_path / "parts").iterdir()
    assert int(rows(parts)[-1]["global_step"]) < 1200
    assert run("--resume", parts).returncode == 0
    assert rows(parts) == rows(whole)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    assert all(torch.equal(a["agent"][key], b["agent"][key]) for key in a["agent"])
    assert all(torch.equal(a["replay"][key], b["replay"][key]) for key in a["replay"])

    last = rows(whole)[-1]
    assert {"losses/actor", "losses/log_prob", "losses/alpha", "losses/q_a", "trust_region/kl"} <= set(last)
    assert ("losses/q_w" in last) == (variant == "na") == ("losses/q_w_corr" in last)
    stored = a["replay"]["action"].abs()
    assert a["replay"]["action"].shape[1] == 12
    # na stores action chunks; sac the noise that chose them: the prior's at first, then inside the box
    assert (stored.max() <= 1) == (variant == "na")
    trained = stored[len(stored) // 2 :]
    assert trained.max() <= (1 if variant == "na" else 1.5)


def test_bad_input_gets_one_sentence(tmp_path):
    for flag, value in (("--noise-bound", "0"), ("--alpha-init", "-1")):
        done = run("--env-id", "Hopper-v4", flag, value, "--run-dir", tmp_path)
        assert done.returncode == 2 and f"dsrl_continuous.py: error: {flag} {float(value)}" in done.stderr
    assert list(tmp_path.iterdir()) == []
