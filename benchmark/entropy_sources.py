"""Where does the action entropy go, if steering only shifts the mean of the noise? Runs on flow decoders, taken apart.

A shift leaves the entropy of w as it is, so what the actions lose is lost behind it. A flow decoder without its last
clip is a smooth map Phi of the noise; while it is invertible, H(Phi(w)) = H(w) + E log |det dPhi/dw|, computed here
exactly. What the scripts log (`entropy/action` less `entropy/action_frozen`) is split in five:

    noise      H(w) - H(eps) before any bound: 0 for LP-DS
    decoder    change of E log |det dPhi/dw|: how much closer together Phi puts what enters around eps + Delta(s)
    estimator  what the k-nearest-neighbour estimate of these two, from 64 draws in d dimensions, adds to them
    bound      what clipping w to +-b_W adds (estimated)
    actions    what clipping actions to [-1, 1] adds (estimated)

python benchmark/entropy_sources.py runs/benchmark/adroit/*/*__*__*   # writes benchmark/results/entropy_sources.*
python benchmark/entropy_sources.py --table                           # the table alone, from the .json
"""

import json
import os
import platform
import sys
import time
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


def unclipped(decoder, obs, w):
    """FlowDecoder.forward without its last clip: obs (B, obs_dim), w (B, d) -> (B, d)."""
    x, n = w, len(decoder.times) - 1
    for i in range(n):
        slope = decoder.velocity(i, x, obs)
        if decoder.solver == "heun":
            slope = (slope + decoder.velocity(i + 1, x + slope / n, obs)) / 2
        x = x + slope / n
    return x


def log_volume(decoder, obs, w):
    """log |det d unclipped / dw| (B,), exactly: d tangents through the decoder for each row."""

    def one(obs, w):
        return unclipped(decoder, obs[None], w[None])[0]

    jacobian = torch.func.vmap(torch.func.jacfwd(one, argnums=1))
    parts = [jacobian(o, x).double() for o, x in zip(obs.split(16), w.split(16))]
    return torch.linalg.slogdet(torch.cat(parts)).logabsdet


def unbounded(agent, obs, eps):
    """w before any bound, and what H(w) is above H(eps), in nats (a mean over the rows)."""
    if hasattr(agent, "perturbation"):
        return eps + agent.perturbation(obs), 0.0
    w, log_prob = agent.squash(obs, eps)  # log density in the box [-1, 1]^d, of side 1 / b of w's
    d = w.shape[1]
    entropy = float(-log_prob.mean()) + d * torch.tensor(agent.args.noise_bound).log().item()
    return w, entropy - d / 2 * float(torch.log(torch.tensor(2 * torch.pi * torch.e)))


@torch.no_grad()
def take_apart(agent, obs, draws: int = 64, exact: int = 4, seed: int = 0) -> dict:
    """The five parts at states obs (B, obs_dim), in nats; determinants from `exact` draws a state, the same ones."""
    decoder, d, generator = agent.decoder, agent.decoder.dim, torch.Generator().manual_seed(seed)
    few = obs.repeat_interleave(exact, 0)
    eps = torch.randn(len(few), d, generator=generator)
    w, noise = unbounded(agent, few, eps)
    here = log_volume(decoder, few, eps)
    random = torch.randn(len(few), d, generator=generator)  # as far from eps as w, in directions that mean nothing
    random *= (w - eps).norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    change = {"decoder": log_volume(decoder, few, w) - here, "random": log_volume(decoder, few, eps + random) - here}
    out = {"noise": noise} | {name: value.mean().item() for name, value in change.items()}
    out["decoder_se"] = change["decoder"].view(len(obs), exact).mean(1).std().item() / len(obs) ** 0.5  # over states

    many = obs.repeat_interleave(draws, 0)
    eps = torch.randn(len(many), d, generator=generator)
    w = unbounded(agent, many, eps)[0]
    bounded = agent.steer(many, eps)
    entropy = lambda x: knn_entropy(x.view(len(obs), draws, d))[0].item()  # noqa: E731
    frozen, free, inside = (unclipped(decoder, many, x) for x in (eps, w, bounded))
    out["estimator"] = entropy(free) - entropy(frozen) - out["noise"] - out["decoder"]
    out["bound"] = entropy(inside) - entropy(free)
    before, after = entropy(inside) - entropy(frozen), entropy(inside.clamp(-1, 1)) - entropy(frozen.clamp(-1, 1))
    out |= {"actions": after - before, "total": after}
    out |= {
        f"clipped_{name}": (x.abs() > 1).double().mean().item() for name, x in (("frozen", frozen), ("steered", inside))
    }
    shift = w - eps if hasattr(agent, "perturbation") else w.view(len(obs), draws, d).mean(1)
    return out | {"rms_shift": shift.square().mean().sqrt().item(), "states": len(obs)}


def load(run: Path):
    """(script's name, args, agent, observations of the replay) of a run's last checkpoint."""
    state = lpds_adroit_flow.read_tensors(run / "checkpoint.pt", "RUN")
    lpds_adroit_flow.require(
        state["script"] in SCRIPTS, f"{run}: was made by {state['script']}; give one of {[*SCRIPTS]}"
    )
    script = SCRIPTS[state["script"]]
    args = script.Args(**state["args"] | {"resume": str(run), "device": "cpu"})
    decoder, *_ = script.load_decoder(args)
    agent = script.Agent(args, decoder)
    agent.load_state_dict(state["agent"])
    return state["script"], args, agent.requires_grad_(False), state["replay"]["obs"]


def markdown(file: dict) -> str:
    head = [
        "run",
        "seed",
        *PARTS,
        "sum, as logged",
        "random direction",
        "rms shift",
        "actions clipped, frozen",
        "steered",
    ]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for r in file["runs"]:
        numbers = [f"{r[key]:.2f}" for key in (*PARTS, "total", "random", "rms_shift")]
        rows.append(
            [
                r["run"],
                str(r["seed"]),
                *numbers,
                *(f"{100 * r[f'clipped_{key}']:.0f} %" for key in ("frozen", "steered")),
            ]
        )
    note = (f"Nats per action chunk, steered less frozen, at {file['states']} states of each run's replay. Random "
            "direction: `decoder` for shifts as long as the run's, but in random directions. Rms shift: per coordinate "
            f"of w; of DSRL, of its mean. {file['machine']}, {file['date']}.")  # fmt: skip
    lines = [
        "<!-- written by: python benchmark/entropy_sources.py -->",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join([*lines, "", note, ""])


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
