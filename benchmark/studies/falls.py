"""What do the critics know of a coming fall? On a run of lpds_continuous.py that falls, Walker2d.

    python benchmark/studies/falls.py runs/RUN_FOLDER    # measures; some minutes on one core

Before falls: Q^A and Q^W in the last chunks before a fall, against those of the same episodes well
before one; `auc` is the share of such pairs in which the chunk before the fall has the lower value.
Between noises: at one state, many noises are played, each for one chunk and then on by the steered
policy. How well do the critics' values rank what came out (rank correlation, mean over states)?

What came out: docs/studies/walker2d.md.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from enjoy import make_envs  # noqa: E402
from lpds_continuous import Agent, Args, Decoder, evaluate, make_env  # noqa: E402


def values(agent, obs, noise):
    """Q^A and Q^W of steered noise, the minimum of their twins, and its actions."""
    w = agent.steer(obs, noise)
    action = agent.decoder(obs, w)
    q_a, q_w = agent.q_a(obs, action).min(0).values, agent.q_w(obs, w).min(0).values
    return q_a.numpy(), q_w.numpy(), action


def record(agent, make, episodes: int) -> tuple:
    """Fresh episodes of the steered policy: what the critics say, and the simulator's states."""
    envs, q_a, q_w, states = make_envs(make, episodes), [], [], []

    def policy(obs, noise):
        of_a, of_w, action = values(agent, obs, noise)
        data = [env.unwrapped.data for env in envs.envs]
        states.append([(obs[i], d.qpos.copy(), d.qvel.copy()) for i, d in enumerate(data)])
        q_a.append(of_a)
        q_w.append(of_w)
        return action

    result = evaluate(policy, envs, "cpu", seed=12345)
    return np.array(q_a), np.array(q_w), states, result


def before_falls(q, last, fell, distances) -> dict:
    """Mean of q (chunks, episodes) at `distances` before falls, and how well it tells them."""
    calm = np.concatenate([q[max(end - 100, 0) : end - 40, i] for i, end in enumerate(last)])
    table = {"calm": float(calm.mean()), "calm_std": float(calm.std())}
    for k in distances:
        near = np.array([q[last[i] - k, i] for i in np.flatnonzero(fell) if last[i] >= k])
        auc = (near[:, None] < calm).mean()
        table[str(k)] = {"mean": float(near.mean()), "auc": float(auc), "falls": len(near)}
    return table


def rank_correlation(x, y) -> float:
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def between_noises(agent, make, state, noises: int, repeats: int, horizon: int, seed: int) -> dict:
    """Plays `noises` from one state, each `repeats` times, and ranks what came out."""
    obs, qpos, qvel = state
    n = noises * repeats
    envs = make_envs(make, n)
    envs.reset(seed=0)
    for env in envs.envs:
        env.unwrapped.set_state(qpos, qvel)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(noises, agent.decoder.dim, generator=generator)
    q_a, q_w, action = values(agent, obs.expand(noises, -1), draws)

    total, alive = np.zeros(n), np.ones(n, bool)
    action = action.repeat_interleave(repeats, 0)  # noise 0 first, as often as it is repeated
    for t in range(horizon):
        obs, reward, terminated, _, _ = envs.step(action.numpy())
        total += agent.args.gamma**t * reward * alive
        alive &= ~terminated
        fresh = torch.randn(repeats, agent.decoder.dim, generator=generator)
        action = agent.act(torch.as_tensor(obs), fresh.repeat(noises, 1))  # common to all noises
    envs.close()
    out = total.reshape(noises, repeats)
    halves = out[:, ::2].mean(1), out[:, 1::2].mean(1)
    mean = out.mean(1)
    return {
        "q_a": rank_correlation(q_a, mean),
        "q_w": rank_correlation(q_w, mean),
        "halves": rank_correlation(*halves),  # a perfect critic gets more than this
        "fell": float(1 - alive.mean()),
    }


@torch.no_grad()
def main(
    run: tyro.conf.Positional[Path],
    episodes: int = 60,
    states: int = 15,
    out: Path = ROOT / "benchmark" / "results" / "falls.json",
):
    """See above.

    Args:
        run: run folder
        episodes: of the steered policy, from fresh starts
        states: at each distance before falls, from which noises are played
        out: where the numbers go, beside those of other runs
    """
    torch.set_num_threads(1)  # small matrices, as in the scripts
    args = Args(**json.loads((run / "args.json").read_text()) | {"device": "cpu"})
    file = torch.load(run / "backbone.pt", weights_only=True)
    state = torch.load(run / "checkpoint.pt", weights_only=True, mmap=True)
    agent = Agent(args, Decoder(file))
    agent.load_state_dict(state["agent"])
    make = partial(make_env, args.env_id, file)

    q_a, q_w, seen, result = record(agent, make, episodes)
    last = np.ceil(np.array(result["length"]) / file["chunk"]).astype(int) - 1
    fell = np.array(result["success"]) == 0
    numbers = {"global_step": int(state["rows"][-1]["global_step"]), "episodes": episodes}
    numbers |= {"return": float(np.mean(result["return"])), "falls": int(fell.sum())}
    distances = (1, 2, 4, 8, 16, 32)
    numbers["q_a"] = before_falls(q_a, last, fell, distances)
    numbers["q_w"] = before_falls(q_w, last, fell, distances)
    print(json.dumps(numbers, indent=1))
    for k in (4, 8, 16, 40):
        where = [i for i in np.flatnonzero(fell) if last[i] >= k][:states]
        found = [
            between_noises(agent, make, seen[last[i] - k][i], 16, 8, 60, int(i)) for i in where
        ]
        mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        numbers[f"noises, {k} chunks before"] = mean | {"states": len(found)}
        print(k, numbers[f"noises, {k} chunks before"], flush=True)
    runs = json.loads(out.read_text()) if out.exists() else {}
    runs[f"{args.env_id}, delta {args.delta} ({args.delta_norm}), seed {args.seed}"] = numbers
    out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
