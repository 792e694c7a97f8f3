"""How fast lpds_continuous.py trains on a CPU: against the same maths written naively, and against its bare matmuls.

    python benchmark/speed.py --json benchmark/results/speed.json
    python benchmark/speed.py --table benchmark/results/speed.json

One train call (20 updates of Q^A and Delta, 10 of Q^W) at the sizes of Walker2d. Only ratios inside one run mean much:
the variants take turns on one thread, by the processor time of this process, which a busy machine disturbs less.
"""

import copy
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time as clock

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).resolve().parents[1] / "lpds_continuous.py"
sys.path.insert(0, str(SCRIPT.parent))
import lpds_continuous as lpds  # noqa: E402

ENV, OBS, ACTION, CHUNK, TOLERANCE = "Walker2d-v4", 17, 6, 4, 1e-4


@dataclass
class Args:
    widths: tuple[int, ...] = (128, 256, 512)  # hidden_size of critics and Delta
    decoder_width: int = 256  # width of the decoder; its weights are random
    batch_size: int = 256  # action chunks per gradient step
    repeats: int = 9  # turns of each variant, of which the fastest counts
    json: str = ""  # file for the results
    table: str = ""  # print the results in this file as markdown and measure nothing
    script: str = ""  # decoder file: also run the real script for 4,000 steps at each width and report its charts/SPS


class Naive:
    """The train call as published code has it, with the random numbers of the script so that losses compare."""

    def __init__(self, agent, replay, args):
        self.args, self.decoder, self.alpha, self.scale = args, agent.decoder, agent.alpha.item(), agent.reward_scale
        self.delta = copy.deepcopy(agent.perturbation)
        twins = agent.q_a, agent.q_a_target, agent.q_w
        self.q_a, self.q_a_target, self.q_w = ([copy.deepcopy(member) for member in twin] for twin in twins)
        adam = partial(torch.optim.Adam, lr=args.lr, foreach=False, fused=False)
        self.optimizers = {net: adam(net.parameters()) for net in (*self.q_a, *self.q_w, self.delta)}
        self.replay = {name: column[: replay.size].numpy().copy() for name, column in replay.data.items()}
        train, sample = self.decoder.config["train_steps"], self.decoder.config["sample_steps"]
        self.timesteps = torch.arange(sample).flip(0) * (train // sample)
        alphas = torch.as_tensor(self.decoder.alpha_bar(train), dtype=torch.float32)[self.timesteps]
        self.tables = alphas, torch.cat([alphas[1:], torch.ones(1)]), (1 - alphas).sqrt()

    @torch.no_grad()
    def decode(self, obs, x):
        for i, timestep in enumerate(self.timesteps):
            t, index = (torch.full((len(x),), number) for number in (timestep.item(), i))  # make_timesteps
            noise = self.decoder.network(x, self.decoder.embed_time(t), obs)
            assert not len(torch.where(index >= len(self.timesteps))[0])  # rows for a fine-tuned network: none
            alpha, alpha_prev, sqrt_one_minus = (table.gather(-1, index).reshape(-1, 1) for table in self.tables)
            clean = ((x - sqrt_one_minus * noise) / alpha**0.5).clamp(-1, 1)
            noise = (x - alpha**0.5 * clean) / sqrt_one_minus
            sigma = 0.0 * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).clamp(min=0) ** 0.5  # eta = 0
            x = alpha_prev**0.5 * clean + (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * noise
        return x.clamp(-1, 1)

    def sample(self, n: int):
        index = (torch.rand(n) * len(self.replay["reward"])).long().numpy()
        return {name: torch.as_tensor(column[index]) for name, column in self.replay.items()}

    @staticmethod
    def values(nets, obs, x) -> list:
        return [net(torch.cat([obs, x], -1)).squeeze(-1) for net in nets]

    def step(self, net, loss) -> float:
        self.optimizers[net].zero_grad()
        loss.backward()
        self.optimizers[net].step()
        return loss.item()

    def regress(self, nets, obs, x, targets) -> float:
        losses = [0.5 * F.mse_loss(value, target) for value, target in zip(self.values(nets, obs, x), targets)]
        return sum(self.step(net, loss) for net, loss in zip(nets, losses))

    def train_call(self) -> list:
        args, losses = self.args, []
        for _ in range(args.utd):
            batch = self.sample(args.batch_size)
            obs, next_obs, action = batch["obs"], batch["next_obs"], batch["action"]
            with torch.no_grad():
                next_action = self.decode(next_obs, torch.randn_like(action) + self.delta(next_obs))
                next_value = torch.min(*self.values(self.q_a_target, next_obs, next_action))
                target = self.scale * batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_value
            losses += [self.regress(self.q_a, obs, action, [target, target])]
            for net, slow in zip(self.q_a, self.q_a_target):
                for parameter, average in zip(net.parameters(), slow.parameters()):
                    average.data.copy_(args.tau * parameter.data + (1 - args.tau) * average.data)
            noise, delta = torch.randn_like(action), self.delta(obs)
            sq_norm = delta.square().sum(1).mean() / (1 if args.delta_norm == "sum" else delta.shape[1])
            value = torch.min(*self.values(self.q_w, obs, noise + delta)).mean()
            losses += [self.step(self.delta, self.alpha * (sq_norm - args.delta) - value)]  # gradients of Q^W too
            self.alpha *= math.exp(args.alpha_lr * min(max(sq_norm.item() / args.delta - 1, -1), 5))
            losses += [self.alpha]
        batch = self.sample(args.batch_size * args.distill_steps)
        both = batch["obs"], torch.randn_like(batch["action"])
        for obs, noise in zip(*(x.split(args.batch_size) for x in both)):
            with torch.no_grad():
                targets = self.values(self.q_a, obs, self.decode(obs, noise))
            loss = self.regress(self.q_w, obs, noise, targets)
        return [*losses, loss]


def timed(function, *inputs):
    before = clock()
    result = function(*inputs)
    return result, 1e3 * (clock() - before)


class Ours:
    """The train call of the script's main loop on the script's own functions, with a stopwatch on each."""

    def __init__(self, agent, replay, args):
        self.agent, self.replay, self.args, self.parts, started = agent, replay, args, Counter(), []
        agent.decoder.register_forward_pre_hook(lambda *_: started.append(clock()))
        agent.decoder.register_forward_hook(lambda *_: self.parts.update(decode=1e3 * (clock() - started.pop())))

    def part(self, name: str, function, *inputs):
        decode = self.parts["decode"]
        result, ms = timed(function, *inputs)
        self.parts[name] += ms - (self.parts["decode"] - decode)  # decoding is a part of its own
        return result

    def train_call(self) -> list:
        agent, args, losses = self.agent, self.args, []
        self.parts.clear()
        for _ in range(args.utd):
            batch = self.part("replay", self.replay.sample, args.batch_size)
            info = self.part("Q^A", lpds.update_action_critic, agent, batch, args)
            info |= self.part("Delta", lpds.update_perturbation, agent, batch, args)
            losses += [info[name] for name in ("losses/q_a", "losses/perturbation", "trust_region/alpha")]
        batch = self.part("replay", self.replay.sample, args.batch_size * args.distill_steps)
        return [*losses, self.part("Q^W", lpds.update_latent_critic, agent, batch, args)["losses/q_w"]]


class Matmuls(TorchDispatchMode):
    """Counts the matrix products that run inside, by the sizes and strides of their factors."""

    def __enter__(self):
        self.count, self.factors = Counter(), {}
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            sizes = tuple((x.shape, x.stride()) for x in args[-2:])
            self.count[sizes], self.factors[sizes] = self.count[sizes] + 1, [x.detach().clone() for x in args[-2:]]
        return op(*args, **(kwargs or {}))

    def floor(self) -> float:
        """Milliseconds of all of them, each repeated alone, in operands that stay where they are."""

        def alone(left, right):
            out, loops = torch.matmul(left, right), 1 + 50_000_000 // max(left.numel() * right.shape[-1], 50_000)
            return timed(lambda: [torch.matmul(left, right, out=out) for _ in range(loops)])[1] / loops

        return sum(self.count[sizes] * alone(*factors) for sizes, factors in self.factors.items())


def vector_step(agent, turns: int) -> dict:
    """The rest of the loop: acting and stepping the environments once, resets included, without steering."""
    ends = {"obs_min": -10, "obs_max": 10, "action_min": -1, "action_max": 1}
    stats = {end: np.full(OBS if "obs" in end else ACTION, value) for end, value in ends.items()}
    makes, mode = [partial(lpds.make_env, ENV, CHUNK, stats)] * agent.args.num_envs, gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv(makes, autoreset_mode=mode)
    obs, steps, before = envs.reset(seed=0)[0], 0, clock()
    for _ in range(turns):
        noise = torch.randn(len(obs), agent.decoder.dim)
        obs, _, _, _, infos = envs.step(agent.act(torch.as_tensor(obs), noise).numpy())
        steps += int(np.sum(infos.get("steps", 0)) + np.sum(infos.get("final_info", {}).get("steps", 0)))
    return {"vector step": 1e3 * (clock() - before) / turns, "steps per vector step": steps / turns}


def run_script(backbone: str, width: int) -> float:
    """charts/SPS of the real script, on the clock on the wall: the last 2,000 of 4,000 steps."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--env-id {ENV} --hidden-size {width} --device cpu --total-timesteps 4000 --prior-steps 1000"
        flags += f" --warmup-steps 0 --eval-episodes 1 --no-progress --run-dir {folder} --backbone"
        subprocess.run([sys.executable, SCRIPT, *flags.split(), backbone], check=True, stdout=subprocess.DEVNULL)
        header, *_, last = (line.split(",") for line in next(Path(folder).glob("*/metrics.csv")).open())
        return float(last[header.index("charts/SPS")])


def measure(width: int, a: Args) -> dict:
    """A row of the table; times in milliseconds."""
    torch.manual_seed(0)
    config = dict(kind="diffusion", obs_dim=OBS, action_dim=ACTION, chunk=CHUNK, cond_hidden=[], time_dim=16)
    config |= dict(hidden=[a.decoder_width] * 3, activation="relu", train_steps=20, sample_steps=5)
    args, decoder, size = lpds.Args(hidden_size=width, batch_size=a.batch_size), lpds.Decoder(config).freeze(), 20_000
    agent, replay = lpds.Agent(args, decoder), lpds.Replay(size, OBS, decoder.dim, torch.device("cpu"))
    rows = dict(obs=torch.randn(size, OBS), next_obs=torch.randn(size, OBS), reward=torch.rand(size))
    replay.add(**rows, action=torch.rand(size, decoder.dim) * 2 - 1, terminated=(torch.rand(size) < 0.05).float())
    row = {"width": width} | vector_step(agent, 10 * a.repeats)
    naive, ours, losses = Naive(agent, replay, args), Ours(agent, replay, args), []
    for version in (ours, naive):  # same state, same noise: same losses, or these are two algorithms
        torch.manual_seed(1)
        losses.append(torch.tensor([float(loss) for loss in version.train_call()]))
    row["losses differ by"] = gap = ((losses[0] - losses[1]).abs() / losses[1].abs().clamp(min=1)).max().item()
    if not gap <= TOLERANCE:
        sys.exit(f"speed.py: error: width {width}: the losses of the two versions differ by {gap:.2g}; nothing timed")
    with FlopCounterMode(display=False) as counter, Matmuls() as matmuls:
        ours.train_call()
    turns = []
    for _ in range(a.repeats):
        turn = {"ours": timed(ours.train_call)[1], **ours.parts}
        turns.append(turn | {"naive": timed(naive.train_call)[1], "floor": matmuls.floor()})
    row |= min(turns, key=lambda turn: turn["ours"])  # the parts belong to this call
    row |= {name: min(turn[name] for turn in turns) for name in ("naive", "floor")} | {
        "GFLOP": counter.get_total_flops() / 1e9
    }
    row |= {"naive / ours": row["naive"] / row["ours"], "ours / floor": row["ours"] / row["floor"]}
    n = args.train_freq
    row["steps/s"] = 1e3 * n * row["steps per vector step"] / (n * row["vector step"] + row["ours"])
    return row | ({"script steps/s": run_script(a.script, width)} if a.script else {}) | {"turns": turns}


def table(results: dict) -> str:
    hidden = "turns", "losses differ by", "steps per vector step"
    names = [name for name in results["rows"][0] if name not in hidden]
    lines = [names, ["---"] * len(names), *([f"{row[name]:.4g}" for name in names] for row in results["rows"])]
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nMilliseconds of processor time. {machine}."


if __name__ == "__main__":
    a = tyro.cli(Args, description=__doc__)
    if a.table:
        sys.exit(print(table(json.loads(Path(a.table).read_text()))))
    torch.set_num_threads(1)  # as the script does
    info, load = Path("/proc/cpuinfo"), lambda: f"{os.getloadavg()[0]:.1f}"
    cpu = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "") or [platform.machine()]
    machine = {"CPU": cpu[0], "cores": os.cpu_count(), "torch": torch.__version__, "load at start": load()}
    machine |= {"script": hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12], "decoder width": a.decoder_width}
    results = {"machine": machine, "rows": [measure(width, a) for width in a.widths]}
    machine |= {"load at end": load(), "repeats": a.repeats}
    print(table(results))
    if a.json:
        Path(a.json).write_text(json.dumps(results, indent=1) + "\n")
