"""Where does the action entropy go, if steering only shifts the mean of the noise? Splits its change into five parts.

A shift leaves the entropy of w as it is, so what the actions lose is lost behind it. A flow decoder without its last
clip is a smooth map Phi of the noise; while it is invertible, H(Phi(w)) = H(w) + E log |det dPhi/dw|, and every
determinant is computed exactly. The change of the k-nearest-neighbour estimate that the scripts log (`entropy/action`
less `entropy/action_frozen`) is then the sum of

    noise      H(w) - H(eps): 0 for LP-DS before its bound; DSRL's squashed Gaussian, box included
    decoder    change of E log |det dPhi/dw|: how much further apart Phi puts what enters around the steered w
    estimator  what the estimate, from 64 draws in d dimensions, says beyond these two: its bias, and all sampling error
    bound      what clipping w to +-b_W adds to the estimate (LP-DS)
    actions    what clipping actions to [-1, 1] adds to the estimate, compared with what it does to the frozen ones

Clipping puts probability on the faces of a box, where the true entropy is -infinity: the last two are properties of the
estimate. The sum is estimated from four times as many draws, too. For flow decoders only, whose Phi keeps the dimension
and has no clip inside.

python benchmark/entropy_sources.py runs/benchmark/adroit/*__*/*__*__*   # writes benchmark/results/entropy_sources.*
python benchmark/entropy_sources.py --table                              # the table alone, from the .json
"""

import json
import math
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]
import dsrl_adroit_flow  # noqa: E402

import lpds_adroit_flow  # noqa: E402
from entropy import knn_entropy  # noqa: E402

SCRIPTS = {"lpds_adroit_flow.py": lpds_adroit_flow, "dsrl_adroit_flow.py": dsrl_adroit_flow}
PARTS = ("noise", "decoder", "estimator", "bound", "actions")


def log_volume(decoder, obs, w):
    """log |det dPhi/dw| (B,), and its sign: d tangents through the decoder for each row."""

    def one(obs, w):
        return decoder.integrate(obs[None], w[None])[0]

    jacobian = torch.func.vmap(torch.func.jacfwd(one, argnums=1))
    parts = [jacobian(o, x).double() for o, x in zip(obs.split(16), w.split(16))]
    sign, log = torch.linalg.slogdet(torch.cat(parts))
    return log, sign


def unbounded(agent, obs, eps):
    """w before LP-DS's bound (B, d), and (B,) terms in nats whose mean is H(w) - H(eps)."""
    if hasattr(agent, "perturbation"):
        return eps + agent.perturbation(obs), torch.zeros(len(obs))
    w, log_prob = agent.squash(obs, eps)  # the density is that in [-1, 1]^d; the box of w is b times as wide
    d = w.shape[1]
    of_eps = 0.5 * (eps.square() + math.log(2 * math.pi)).sum(1)  # the same draws: most of the noise cancels
    return w, -log_prob - of_eps + d * math.log(agent.args.noise_bound)


def estimates(agent, obs, draws: int, generator) -> dict:
    """Change of the k-nearest-neighbour estimate at states obs (B, obs_dim), by what changes it, in nats (B,)."""
    decoder, d = agent.decoder, agent.decoder.dim
    many = obs.repeat_interleave(draws, 0)
    eps = torch.randn(len(many), d, generator=generator)
    w = unbounded(agent, many, eps)[0]
    frozen, free, inside = (decoder.integrate(many, x) for x in (eps, w, agent.steer(many, eps)))

    def entropy(x):
        return torch.stack([knn_entropy(state[None])[0] for state in x.view(len(obs), draws, d)])

    out = {"inside": entropy(free) - entropy(frozen), "bound": entropy(inside) - entropy(free)}
    out["total"] = entropy(inside.clamp(-1, 1)) - entropy(frozen.clamp(-1, 1))
    out["actions"] = out["total"] - out["inside"] - out["bound"]
    shares = {"clipped_frozen": frozen, "clipped_steered": inside}
    return out | {name: (x.abs() > 1).view(len(obs), -1).double().mean(1) for name, x in shares.items()}


@torch.no_grad()
def take_apart(agent, obs, draws: int = 64, exact: int = 4, seed: int = 0) -> dict:
    """The five parts at states obs (B, obs_dim), in nats, and their standard errors over states, NAME_se.

    Determinants come from `exact` draws of eps per state, the same for frozen and steered. `random`: `decoder` for
    shifts of the run's length in random directions (LP-DS); `folded`: share of determinants that are not positive;
    `total`: the sum; `total_4x`: the sum, estimated from four times as many draws.
    """
    decoder, d, generator = agent.decoder, agent.decoder.dim, torch.Generator().manual_seed(seed)
    few = obs.repeat_interleave(exact, 0)
    eps = torch.randn(len(few), d, generator=generator)
    w, noise = unbounded(agent, few, eps)
    shifts = {"decoder": w - eps}
    if hasattr(agent, "perturbation"):
        random = torch.randn(len(few), d, generator=generator)
        shifts["random"] = random * (w - eps).norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    here, sign = log_volume(decoder, few, eps)
    moved = {name: log_volume(decoder, few, eps + shift) for name, shift in shifts.items()}
    change = {"noise": noise} | {name: after - here for name, (after, _) in moved.items()}
    change = {name: value.view(len(obs), exact).mean(1) for name, value in change.items()}  # by state
    change |= estimates(agent, obs, draws, generator)
    change["estimator"] = change.pop("inside") - change["noise"] - change["decoder"]
    change["total_4x"] = estimates(agent, obs, 4 * draws, generator)["total"]
    out = {name: value.mean().item() for name, value in change.items()}
    out |= {f"{name}_se": change[name].std().item() / len(obs) ** 0.5 for name in (*PARTS, "total", "total_4x")}
    out["folded"] = torch.stack([sign, moved["decoder"][1]]).le(0).double().mean().item()
    if hasattr(agent, "perturbation"):
        out["rms_shift"] = agent.perturbation(obs).square().mean().sqrt().item()
    return out | {"states": len(obs)}


def load(run: Path):
    """(script's name, args, agent, observations of the replay) of a run's last checkpoint."""
    state, require = lpds_adroit_flow.read_tensors(run / "checkpoint.pt", "RUNS"), lpds_adroit_flow.require
    require(state.get("script") in SCRIPTS, f"{run}: was not made by one of {', '.join(SCRIPTS)}; give a run that was")
    script = SCRIPTS[state["script"]]
    args = script.Args(**state["args"] | {"resume": str(run), "device": "cpu"})
    decoder, *_ = script.load_decoder(args)
    agent = script.Agent(args, decoder)
    agent.load_state_dict(state["agent"])
    steers = getattr(args, "perturb", "noise") == "noise" and getattr(agent, "started", True)
    require(steers, f"{run}: does not steer noise (--perturb action, or stopped during warm-up); give another run")
    return state["script"], args, agent.requires_grad_(False), state["replay"]["obs"]


def markdown(file: dict) -> str:
    cells = {"run": lambda r: r["run"], "seed": lambda r: str(r["seed"])}
    columns = {part: part for part in PARTS} | {"sum": "total", "sum, 4x": "total_4x"}
    both = lambda r, key: f"{r[key]:.1f} ± {r[key + '_se']:.1f}" if r[f"{key}_se"] else f"{r[key]:.1f}"  # noqa: E731
    cells |= {title: partial(both, key=key) for title, key in columns.items()}
    cells |= {
        "random direction": lambda r: f"{r['random']:.1f}" if "random" in r else "-",
        "rms shift": lambda r: f"{r['rms_shift']:.2f}" if "rms_shift" in r else "-",
        "actions clipped": lambda r: f"{r['clipped_frozen']:.0%} → {r['clipped_steered']:.0%}",
        "folded": lambda r: f"{r['folded']:.1%}",
    }
    rows = [[*cells], ["---"] + ["---:"] * (len(cells) - 1)]
    rows += [[cell(r) for cell in cells.values()] for r in file["runs"]]
    note = (f"Nats per action chunk, steered less frozen, at {file['states']} states of each run's replay; ±: standard "
            "error over states. Sum, 4x: estimated from four times as many draws. "
            "Random direction: `decoder` for shifts as long as the run's, in directions drawn anew. "
            "Rms shift: per coordinate of w. Folded: share of determinants that are not positive. "
            f"{file['machine']}, {file['date']}.")  # fmt: skip
    lines = ["<!-- written by: python benchmark/entropy_sources.py -->", ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), "", note, ""])


def main(
    runs: Positional[tuple[Path, ...]] = (),
    states: int = 64,
    table: bool = False,
    out: Path = ROOT / "benchmark" / "results" / "entropy_sources.json",
):
    """Takes the entropy of runs apart.

    Args:
        runs: run folders of lpds_adroit_flow.py or dsrl_adroit_flow.py
        states: of the replay, drawn at random
        table: write the table alone, from the numbers that are there
        out: where the numbers go
    """
    lpds_adroit_flow.require(table or runs, "RUNS: none given; name run folders, or take --table")
    if not table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        file = {"date": time.strftime("%Y-%m-%d"), "states": states, "runs": [],
                "machine": f"{platform.machine()}, torch {torch.__version__}"}  # fmt: skip
        for run in runs:
            script, args, agent, obs = load(run)
            index = torch.randint(len(obs), (states,), generator=torch.Generator().manual_seed(0))
            name = run.parent.name.rpartition("__")[0] if "benchmark" in run.parts else f"{args.env_id} {script}"
            file["runs"].append({"run": name, "seed": args.seed} | take_apart(agent, obs[index]))
            print(file["runs"][-1], flush=True)
            out.write_text(json.dumps(file, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
