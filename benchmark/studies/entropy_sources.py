"""Where does the action entropy go, if steering only shifts the mean of the noise?

    python benchmark/studies/entropy_sources.py runs/benchmark/adroit/*/*__*/*__*   # measures
    python benchmark/studies/entropy_sources.py       # prints the table of what was measured

A flow without its last clip is a smooth map Phi of the noise. While it is invertible, H(Phi(w)) is
H(w) + E log |det dPhi/dw|, and every determinant is computed exactly. So the change of the estimate
that the scripts log (entropy/action less entropy/action_frozen) is the sum of

    noise      H(w) - H(eps): 0 for LP-DS before its bound, known for DSRL's squashed Gaussian
    decoder    change of E log |det dPhi/dw|: how much further apart Phi puts what is around w
    estimator  what the estimate, from 64 draws in d dimensions, says beyond these two
    bound      what clipping w to +-bound adds to the estimate (LP-DS)
    actions    what clipping actions to [-1, 1] adds to it, beyond what that does to frozen ones

What came out: docs/studies/entropy_sources.md.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import enjoy  # noqa: E402
from entropy import knn_entropy  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "entropy_sources.json"
PARTS = ("noise", "decoder", "estimator", "bound", "actions")


def integrate(decoder, obs, x):
    """Decoder.forward of the scripts but for its last line, which clips."""
    for i in range(decoder.steps):
        slope = decoder.velocity(i, x, obs)
        if decoder.solver == "heun":
            slope = (slope + decoder.velocity(i + 1, x + slope / decoder.steps, obs)) / 2
        x = x + slope / decoder.steps
    return x


def log_volume(decoder, obs, w):
    """log |det dPhi/dw| (B,) and its sign: d tangents through the decoder for each row."""
    row = torch.func.jacfwd(lambda obs, w: integrate(decoder, obs[None], w[None])[0], argnums=1)
    jacobian = torch.func.vmap(row, chunk_size=16)(obs, w)  # (B, d, d)
    sign, log = torch.linalg.slogdet(jacobian.double())
    return log, sign


def unbounded(agent, obs, eps):
    """w before LP-DS's bound (B, d), and terms (B,) whose mean is H(w) - H(eps)."""
    if hasattr(agent, "perturbation"):
        return eps + agent.perturbation(obs), torch.zeros(len(obs))
    w, log_prob = agent.squash(obs, eps)  # a density in [-1, 1]^d; the box of w is wider
    of_eps = 0.5 * (eps.square() + math.log(2 * math.pi)).sum(1)  # same draws: noise cancels
    return w, -log_prob - of_eps + w.shape[1] * math.log(agent.args.noise_bound)


def estimates(agent, obs, draws: int, generator) -> dict:
    """Change of the estimate at states obs (B, obs_dim) by what changes it, in nats (B,)."""
    many = obs.repeat_interleave(draws, 0)
    eps = torch.randn(len(many), agent.decoder.dim, generator=generator)
    noises = eps, unbounded(agent, many, eps)[0], agent.steer(many, eps)
    frozen, free, inside = (integrate(agent.decoder, many, noise) for noise in noises)

    def entropy(x):
        return torch.stack([knn_entropy(y[None])[0] for y in x.view(len(obs), draws, -1)])

    out = {"inside": entropy(free) - entropy(frozen), "bound": entropy(inside) - entropy(free)}
    out["total"] = entropy(inside.clamp(-1, 1)) - entropy(frozen.clamp(-1, 1))
    out["actions"] = out["total"] - out["inside"] - out["bound"]
    return out


@torch.no_grad()
def take_apart(agent, obs, draws: int = 64, exact: int = 4) -> dict:
    """Means over states obs (B, obs_dim) and their standard errors, in nats.

    random: the decoder's part for shifts as long as LP-DS's in random directions; total_4x: from
    four times as many draws; folded: share of determinants, `exact` a state, that are not positive.
    """
    generator = torch.Generator().manual_seed(0)
    few = obs.repeat_interleave(exact, 0)
    eps = torch.randn(len(few), agent.decoder.dim, generator=generator)
    w, noise = unbounded(agent, few, eps)
    here, sign_here = log_volume(agent.decoder, few, eps)
    there, sign_there = log_volume(agent.decoder, few, w)
    change = {"noise": noise, "decoder": there - here}
    if hasattr(agent, "perturbation"):
        random = torch.randn(len(few), agent.decoder.dim, generator=generator)
        random *= (w - eps).norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
        change["random"] = log_volume(agent.decoder, few, eps + random)[0] - here
    change = {name: x.view(len(obs), exact).mean(1) for name, x in change.items()}  # by state

    change |= estimates(agent, obs, draws, generator)
    change["estimator"] = change.pop("inside") - change["noise"] - change["decoder"]
    change["total_4x"] = estimates(agent, obs, 4 * draws, generator)["total"]
    out = {name: x.mean().item() for name, x in change.items()}
    out |= {f"{name}_se": x.std().item() / len(obs) ** 0.5 for name, x in change.items()}
    return out | {"folded": torch.cat([sign_here, sign_there]).le(0).double().mean().item()}


def load(run: Path):
    """The agent of a run's last checkpoint, and the observations of its replay."""
    args = enjoy.Args(str(run), device="cpu")
    state, file = enjoy.read(run / "checkpoint.pt"), enjoy.read(run / "backbone.pt")
    _, agent = enjoy.load_agent(args, enjoy.load_script(args, state["script"]), state, file)
    steers = hasattr(agent.decoder, "velocity") and getattr(agent, "started", True)
    enjoy.require(steers, f"{run}: not of an adroit_flow script, or stopped before it steered")
    return agent, state["replay"]["obs"]


def markdown(file: dict) -> str:
    """A row for every kind of run, its seeds side by side."""
    names = [*PARTS, "total", "total_4x", "random"]
    lines = [["run", *names], ["---", *["---:"] * len(names)]]
    for label in dict.fromkeys(r["run"] for r in file["runs"]):
        seeds = [r for r in file["runs"] if r["run"] == label]
        cells = [", ".join(f"{r[name]:.1f}" for r in seeds if name in r) for name in names]
        lines.append([" ".join(label.split("__")), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = (), states: int = 64, out: Path = RESULTS):
    """See above.

    Args:
        runs: folders of runs of lpds_adroit_flow.py and baselines/dsrl_adroit_flow.py
        states: of a run's replay, drawn at random
        out: where the numbers go
    """
    torch.set_num_threads(1)
    file = {"date": time.strftime("%Y-%m-%d"), "states": states, "runs": []}
    for run in runs:
        agent, obs = load(run)
        index = torch.randint(len(obs), (states,), generator=torch.Generator().manual_seed(0))
        name = run.resolve().parent.name.rpartition("__")[0] or run.name
        found = take_apart(agent, obs[index])
        file["runs"].append({"run": name, "seed": agent.args.seed} | found)
        out.write_text(json.dumps(file, indent=1) + "\n")
    print(markdown(json.loads(out.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
