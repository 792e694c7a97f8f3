"""What a train call of lpds_continuous.py costs on a CPU, as a multiple of what it cannot avoid.

    python benchmark/speed.py            # measures; a minute of processor time
    python benchmark/speed.py --table    # prints the table of what was measured

Timed are, in turns: the script's own updates (ours), the same maths as published code has it
(naive), and every matrix product of it alone (floor). Twenty updates of Q^A and Delta, ten of Q^W,
on the decoder of Hopper. How to read the table, and what came out: docs/studies/speed.md.
"""

import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from time import process_time as clock
from timeit import timeit

import torch
import tyro
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lpds_continuous as lpds  # noqa: E402
from pretrain_backbone import Backbone  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "speed.json"


class Naive(lpds.Agent):
    """The same updates as published code has them, on the same random numbers."""

    def __init__(self, agent, file: dict, replay):
        super().__init__(agent.args, agent.decoder)
        self.load_state_dict(agent.state_dict())
        self.optimizers = {}
        for network in (self.q_a, self.q_w, self.perturbation):
            self.optimizers[network] = torch.optim.Adam(network.parameters(), self.args.lr)
        self.replay = {name: x[: replay.size].numpy() for name, x in replay.data.items()}

        self.backbone = Backbone(file).requires_grad_(False)
        self.tables = torch.tensor(file["levels"]).T  # (4, steps)

    @torch.no_grad()
    def decode(self, obs, x):
        """DPPO's: embeds its times again and again, looks coefficients up by index tensors."""
        steps = self.tables.shape[1]
        for i in range(steps):
            index = torch.full((len(x),), i)
            t = (steps - 1 - index) * (self.backbone.train_steps // steps)
            noise = self.backbone.network(x, self.backbone.embed_time(t), obs)
            a, b, a_next, b_next = (table.gather(0, index)[:, None] for table in self.tables)
            clean = ((x - b * noise) / a).clamp(-1, 1)
            x = a_next * clean + b_next * (x - a * clean) / b
        return x.clamp(-1, 1)

    def sample(self, n: int) -> dict:
        index = torch.randint(len(self.replay["reward"]), (n,)).numpy()
        return {name: torch.as_tensor(x[index]) for name, x in self.replay.items()}

    def step(self, network, loss) -> float:
        self.optimizers[network].zero_grad()
        loss.backward()
        self.optimizers[network].step()
        return loss.item()

    def regress(self, critic, obs, x, targets) -> float:
        losses = [mse_loss(value, target) for value, target in zip(critic(obs, x), targets)]
        return self.step(critic, 0.5 * sum(losses))

    def update_action_critic(self, batch: dict) -> dict:
        obs, next_obs, action = batch["obs"], batch["next_obs"], batch["action"]
        with torch.no_grad():
            noise = torch.randn_like(action)
            next_action = self.decode(next_obs, noise + self.perturbation(next_obs))
            next_value = torch.min(*self.q_a_target(next_obs, next_action))
            discount = self.args.gamma * (1 - batch["terminated"])
            target = self.reward_scale * batch["reward"] + discount * next_value
        loss = self.regress(self.q_a, obs, action, [target, target])
        for new, mean in zip(self.q_a.parameters(), self.q_a_target.parameters()):
            mean.data.copy_(self.args.tau * new.data + (1 - self.args.tau) * mean.data)
        return {"losses/q_a": loss}

    def update_perturbation(self, batch: dict) -> dict:
        args, obs = self.args, batch["obs"]
        noise, shift = torch.randn_like(batch["action"]), self.perturbation(obs)
        value = torch.min(*self.q_w(obs, noise + shift)).mean()
        sq_norm = shift.square().mean()
        loss = self.step(self.perturbation, self.alpha * (sq_norm - args.delta) - value)
        violation = sq_norm.item() / args.delta - 1
        self.alpha.mul_(math.exp(args.alpha_lr * min(max(violation, -1), 5)))
        return {"losses/perturbation": loss, "trust_region/alpha": self.alpha.item()}

    def update_latent_critic(self, batch: dict) -> dict:
        n, noises = self.args.batch_size, torch.randn_like(batch["action"])
        for obs, noise in zip(batch["obs"].split(n), noises.split(n)):
            with torch.no_grad():
                targets = self.q_a(obs, self.decode(obs, noise))
            loss = self.regress(self.q_w, obs, noise, targets)
        return {"losses/q_w": loss}


def train_call(learner, sample, args) -> list:
    """Step (8) of the script's loop, by its Agent or by Naive."""
    infos = []
    for _ in range(args.utd):
        batch = sample(args.batch_size)
        infos += [learner.update_action_critic(batch), learner.update_perturbation(batch)]
    return [*infos, learner.update_latent_critic(sample(args.batch_size * args.distill_steps))]


class Matmuls(TorchDispatchMode):
    """Counts the matrix products that run inside, by sizes and strides of their factors."""

    def __init__(self):
        super().__init__()
        self.count, self.factors = Counter(), {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            sizes = tuple((x.shape, x.stride()) for x in args[-2:])
            self.count[sizes] += 1
            self.factors[sizes] = [x.detach().clone() for x in args[-2:]]
        return op(*args, **(kwargs or {}))

    def floor(self) -> float:
        """Milliseconds of all of them, each repeated alone, in memory that stays where it is."""
        total = 0.0
        for sizes, (left, right) in self.factors.items():
            out = left @ right
            loops = 1 + 50_000_000 // max(left.numel() * right.shape[-1], 50_000)
            product = partial(torch.matmul, left, right, out=out)
            total += self.count[sizes] * 1e3 * timeit(product, number=loops, timer=clock) / loops
        return total


def difference(calls) -> float:
    """Of the losses of both versions, from one state with the same random numbers."""
    found = []
    for call in calls:
        torch.manual_seed(1)
        found.append(call())
    pairs = [(float(a[key]), b[key]) for a, b in zip(*found) for key in b]
    return max(abs(a - b) / max(abs(b), 1) for a, b in pairs)


def measure(width: int, batch_size: int = 256, repeats: int = 9) -> dict:
    """A row of the table, and the turns that it is the median of; times in milliseconds."""
    torch.manual_seed(0)
    file = torch.load(ROOT / "backbones/hopper-v4-medium-diffusion.pt", weights_only=True)
    args = lpds.Args(hidden_size=width, batch_size=batch_size)
    agent = lpds.Agent(args, lpds.Decoder(file))
    obs_dim, d, n = agent.decoder.obs_dim, agent.decoder.dim, 20_000
    replay = lpds.Replay(n, obs_dim, d, "cpu")
    obs, next_obs, action = torch.randn(n, obs_dim), torch.randn(n, obs_dim), torch.randn(n, d)
    replay.add(obs, action.clamp(-1, 1), torch.rand(n), next_obs, torch.rand(n) < 0.05)
    naive = Naive(agent, file, replay)
    calls = {"ours": partial(train_call, agent, replay.sample, args)}
    calls["naive"] = partial(train_call, naive, naive.sample, args)
    gap = difference(calls.values())
    lpds.require(gap < 1e-3, f"width {width}: losses differ by {gap:.2g}, nothing is timed")

    with Matmuls() as matmuls:
        calls["ours"]()
    turns = []
    for _ in range(repeats):
        turn = {name: 1e3 * timeit(calls[name], number=1, timer=clock) for name in calls}
        turn["floor"] = matmuls.floor()
        turn["naive / ours"] = turn["naive"] / turn["ours"]
        turns.append(turn | {"ours / floor": turn["ours"] / turn["floor"]})
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return {"width": width} | medians | {"turns": turns}


def markdown(results: dict) -> str:
    names = [name for name in results["rows"][0] if name != "turns"]
    lines = [names, ["---:"] * len(names)]
    digits = [2 if "/" in name else 0 for name in names]
    lines += [[f"{row[k]:.{n}f}" for k, n in zip(names, digits)] for row in results["rows"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(table: bool = False):
    torch.set_num_threads(1)  # as the script does
    if not table:
        file = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        file |= {"cores": os.cpu_count(), "load at start": os.getloadavg()[0]}
        file["rows"] = [measure(width) for width in (128, 256, 512)]
        RESULTS.write_text(json.dumps(file, indent=1) + "\n")
    print(markdown(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
