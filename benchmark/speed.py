"""How fast lpds_continuous.py trains on a CPU: against the same maths written naively, and against its bare matmuls.

    python benchmark/speed.py --json benchmark/results/speed.json
    python benchmark/speed.py --table benchmark/results/speed.json

One train call (20 updates of Q^A and Delta, 10 of Q^W) is timed at the sizes of Walker2d. Only ratios inside one run mean
something: the variants take turns, `repeats` times, on one thread, and what is timed is the processor time of this
process, so that a busy machine disturbs little. Before anything is timed, both versions must lose the same losses.
"""

import copy
import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time as clock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).resolve().parents[1] / "lpds_continuous.py"
sys.path.insert(0, str(SCRIPT.parent))  # it imports entropy
SPEC = importlib.util.spec_from_file_location("lpds_continuous", SCRIPT)
lpds = sys.modules["lpds_continuous"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lpds)
ENV, CHUNK, TOLERANCE = "Walker2d-v4", 4, 1e-4


@dataclass
class Args:
    widths: list[int] = field(default_factory=lambda: [128, 256, 512])
    """hidden_size of critics and Delta"""
    decoder_width: int = 256
    """width of the decoder, which has random weights: they do not matter here"""
    batch_size: int = 256
    """action chunks per gradient step"""
    repeats: int = 9
    """turns that each variant takes"""
    json: str = ""
    """file for the results"""
    table: str = ""
    """print the table of this file and measure nothing"""
    script: str = ""
    """decoder file: also run the real script for some thousand steps at each width and report its charts/SPS"""


def fail(message: str):
    raise SystemExit(f"speed.py: error: {message}")


class Naive:
    """The same train call as published code has it: DPPO's sampler, twin modules in loops, plain Adam, host replay.

    It draws random numbers in the script's order, so that its numbers can be compared. What it leaves undone (noise of
    standard deviation 0, DPPO's fine-tuned copy of the network) would only make it slower.
    """

    def __init__(self, agent, replay, args):
        self.args, self.decoder = args, agent.decoder
        self.alpha, self.reward_scale = float(agent.alpha), float(agent.reward_scale)
        self.delta = copy.deepcopy(agent.perturbation)
        twins = agent.q_a, agent.q_a_target, agent.q_w
        self.q_a, self.q_a_target, self.q_w = ([copy.deepcopy(member) for member in twin] for twin in twins)
        adam = lambda net: torch.optim.Adam(net.parameters(), lr=args.lr, foreach=False, fused=False)  # noqa: E731
        self.optimizers = {net: adam(net) for net in (*self.q_a, *self.q_w, self.delta)}
        self.replay = {name: column[: replay.size].numpy().copy() for name, column in replay.data.items()}
        train, sample = self.decoder.config["train_steps"], self.decoder.config["sample_steps"]
        self.timesteps = torch.arange(sample).flip(0) * (train // sample)
        self.alphas = torch.as_tensor(self.decoder.alpha_bar(train), dtype=torch.float32)[self.timesteps]
        self.alphas_prev = torch.cat([self.alphas[1:], torch.ones(1)])
        self.sqrt_one_minus_alphas = (1 - self.alphas).sqrt()

    @staticmethod
    def extract(table, index, shape):
        return table.gather(-1, index).reshape(len(index), *[1] * (len(shape) - 1))

    def network(self, x, t, obs):
        half = self.decoder.config["time_dim"] // 2
        angle = t[:, None].float() * torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
        emb = self.decoder.time_embedding(torch.cat([angle.sin(), angle.cos()], -1))
        first, *blocks, head = self.decoder.mlp_mean["layers"]
        h = first(torch.cat([x, emb, obs], -1))
        for block in blocks:
            h = h + block["l2"](F.relu(block["l1"](F.relu(h))))
        return head(h)

    @torch.no_grad()
    def decode(self, obs, x):
        for i, timestep in enumerate(self.timesteps):
            t = torch.full((len(x),), timestep.item(), dtype=torch.long)  # make_timesteps
            index = torch.full((len(x),), i, dtype=torch.long)
            noise = self.network(x, t, obs)
            if len(torch.where(index >= len(self.timesteps))[0]):  # rows for the fine-tuned network: none in an actor
                fail("unreachable")
            alpha, alpha_prev = (self.extract(table, index, x.shape) for table in (self.alphas, self.alphas_prev))
            sqrt_one_minus_alpha = self.extract(self.sqrt_one_minus_alphas, index, x.shape)
            clean = ((x - sqrt_one_minus_alpha * noise) / alpha**0.5).clamp(-1, 1)
            noise = (x - alpha**0.5 * clean) / sqrt_one_minus_alpha
            sigma = 0.0 * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).clamp(min=0) ** 0.5
            x = alpha_prev**0.5 * clean + (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * noise
        return x.clamp(-1, 1)

    def sample(self, n: int):
        index = (torch.rand(n) * len(self.replay["reward"])).long().numpy()
        return {name: torch.as_tensor(column[index]) for name, column in self.replay.items()}

    def regress(self, nets, obs, x, targets) -> float:
        total = 0.0
        for net, target in zip(nets, targets):
            loss = 0.5 * F.mse_loss(net(torch.cat([obs, x], -1)).squeeze(-1), target)
            self.optimizers[net].zero_grad()
            loss.backward()
            self.optimizers[net].step()
            total += loss.item()
        return total

    def train_call(self) -> list:
        args, losses = self.args, []
        for _ in range(args.utd):
            batch = self.sample(args.batch_size)
            obs, next_obs, action = batch["obs"], batch["next_obs"], batch["action"]
            with torch.no_grad():
                next_action = self.decode(next_obs, torch.randn_like(action) + self.delta(next_obs))
                values = [net(torch.cat([next_obs, next_action], -1)).squeeze(-1) for net in self.q_a_target]
                next_value = (1 - batch["terminated"]) * torch.min(*values)
                target = self.reward_scale * batch["reward"] + args.gamma * next_value
            losses.append(self.regress(self.q_a, obs, action, [target, target]))
            for net, slow in zip(self.q_a, self.q_a_target):
                for parameter, slow_parameter in zip(net.parameters(), slow.parameters()):
                    slow_parameter.data.copy_(args.tau * parameter.data + (1 - args.tau) * slow_parameter.data)
            noise = torch.randn_like(action)
            delta = self.delta(obs)
            values = [net(torch.cat([obs, noise + delta], -1)).squeeze(-1) for net in self.q_w]
            sq_norm = delta.square().sum(1).mean() / (1 if args.delta_norm == "sum" else delta.shape[1])
            loss = self.alpha * (sq_norm - args.delta) - torch.min(*values).mean()
            self.optimizers[self.delta].zero_grad()
            loss.backward()  # also fills gradients of Q^W that nobody reads
            self.optimizers[self.delta].step()
            self.alpha *= math.exp(args.alpha_lr * min(max(sq_norm.item() / args.delta - 1, -1), 5))
            losses += [loss.item(), self.alpha]
        everything = self.sample(args.batch_size * args.distill_steps)
        draws = torch.randn_like(everything["action"]).split(args.batch_size)
        for obs, noise in zip(everything["obs"].split(args.batch_size), draws):
            action = self.decode(obs, noise)
            with torch.no_grad():
                targets = [net(torch.cat([obs, action], -1)).squeeze(-1) for net in self.q_a]
            loss = self.regress(self.q_w, obs, noise, targets)
        return [*losses, loss]


class Ours:
    """The train call of the script's main loop on its own functions, with a stopwatch on each."""

    def __init__(self, agent, replay, args):
        self.agent, self.replay, self.args, self.parts, started = agent, replay, args, Counter(), []
        agent.decoder.register_forward_pre_hook(lambda *_: started.append(clock()))
        agent.decoder.register_forward_hook(lambda *_: self.parts.update(decode=clock() - started.pop()))

    def timed(self, name: str, function, *inputs):
        before, decode = clock(), self.parts["decode"]
        result = function(*inputs)
        self.parts[name] += clock() - before - (self.parts["decode"] - decode)  # what it decodes counts as decode
        return result

    def train_call(self) -> list:
        agent, args, infos = self.agent, self.args, []
        for _ in range(args.utd):
            batch = self.timed("replay", self.replay.sample, args.batch_size)
            infos.append(self.timed("q_a", lpds.update_action_critic, agent, batch, args))
            infos[-1] |= self.timed("perturbation", lpds.update_perturbation, agent, batch, args)
        batch = self.timed("replay", self.replay.sample, args.batch_size * args.distill_steps)
        last = self.timed("q_w", lpds.update_latent_critic, agent, batch, args)
        names = "losses/q_a", "losses/perturbation", "trust_region/alpha"
        return [*(info[name] for info in infos for name in names), last["losses/q_w"]]


def matmuls(args, config: dict) -> Counter:
    """{(kind, B, n, m): how often} of every layer n -> m that a train call takes forward (y), backward to its weights
    (w) and to its input (x); written down from Algorithm 1, not from the code."""
    d, h, obs, count = config["chunk"] * config["action_dim"], config["hidden"][0], config["obs_dim"], Counter()
    inner = [(h, h)] * (len(config["hidden"]) - 1)
    decoder = [(d + config["time_dim"] + obs, h), *inner, (h, d)] * config["sample_steps"]
    net = lambda *sizes: list(zip(sizes, sizes[1:]))  # noqa: E731
    critics = net(obs + d, *[args.hidden_size] * args.num_layers, 1) * 2
    delta = net(obs, *[args.hidden_size] * args.num_layers, d)

    def add(kinds: str, layers, batch: int, times: int, first=True):
        for kind in kinds:
            for n, m in layers:
                if kind != "x" or first or (n, m) not in (critics[0], delta[0]):
                    count[kind, batch, n, m] += times

    add("y", [*delta, *decoder, *critics, *critics], args.batch_size, args.utd)  # the TD target, Q^A
    add("wx", critics, args.batch_size, args.utd, first=False)
    add("y", [*delta, *critics], args.batch_size, args.utd)  # Delta: through Q^W to its input
    add("x", critics, args.batch_size, args.utd)
    add("wx", delta, args.batch_size, args.utd, first=False)
    add("y", [*decoder, *critics], args.batch_size * args.distill_steps, 1)  # Q^W: all targets at once
    add("ywx", critics, args.batch_size, args.distill_steps, first=False)
    return count


class Floor:
    """The time of every matmul of the train call, alone, in operands that stay where they are."""

    def __init__(self, count: Counter):
        self.jobs, self.gflop = [], sum(2e-9 * b * n * m * times for (_, b, n, m), times in count.items())
        for (kind, b, n, m), times in count.items():
            x, w, y = torch.randn(b, n), torch.randn(m, n), torch.randn(b, m)
            left, right, out = {"y": (x, w.t(), y), "w": (y.t(), x, w), "x": (y, w, x)}[kind]
            self.jobs.append((times, max(1, int(1e8 / (b * n * m))), left, right, torch.empty_like(out)))

    def run(self) -> float:
        total = 0.0
        for times, loops, left, right, out in self.jobs:
            torch.mm(left, right, out=out)
            before = clock()
            for _ in range(loops):
                torch.mm(left, right, out=out)
            total += times * (clock() - before) / loops
        return total


def make_decoder(width: int):
    config = dict(kind="diffusion", obs_dim=17, action_dim=6, chunk=CHUNK, cond_hidden=[], hidden=[width] * 3)
    return lpds.Decoder(config | dict(time_dim=16, activation="relu", train_steps=20, sample_steps=5)).freeze()


def measure(width: int, a: Args) -> dict:
    """One row of the table: milliseconds of processor time, the least of the repeats; ratios of those."""
    torch.manual_seed(0)
    args, decoder = lpds.Args(hidden_size=width, batch_size=a.batch_size), make_decoder(a.decoder_width)
    agent, size = lpds.Agent(args, decoder), 20_000
    replay = lpds.Replay(size, 17, decoder.dim, torch.device("cpu"))
    rows = dict(obs=torch.randn(size, 17), next_obs=torch.randn(size, 17), reward=torch.rand(size))
    replay.add(**rows, action=torch.rand(size, decoder.dim) * 2 - 1, terminated=(torch.rand(size) < 0.05).float())
    naive, ours, floor = Naive(agent, replay, args), Ours(agent, replay, args), Floor(matmuls(args, decoder.config))

    losses = []
    for version in (ours, naive):  # the first call of both: same state, same noise, hence the same losses
        torch.manual_seed(1)
        losses.append(torch.tensor([float(loss) for loss in version.train_call()]))
    gap = ((losses[0] - losses[1]).abs() / losses[1].abs().clamp(min=1)).max().item()
    if not gap <= TOLERANCE:
        fail(f"width {width}: the losses of the two versions differ by {gap:.2g}; nothing was timed")
    with FlopCounterMode(display=False) as counter:
        ours.train_call()
    counted = counter.get_total_flops() / 1e9
    if not abs(counted / floor.gflop - 1) <= 0.05:
        fail(f"width {width}: {counted:.3f} GFLOP counted, {floor.gflop:.3f} expected of Algorithm 1")

    times, parts = {"ours": [], "naive": [], "floor": []}, []
    for _ in range(a.repeats):
        for name, version in (("ours", ours), ("naive", naive)):
            ours.parts.clear()
            before = clock()
            version.train_call()
            times[name].append(1e3 * (clock() - before))
            if name == "ours":
                parts.append({name: 1e3 * seconds for name, seconds in ours.parts.items()})
        times["floor"].append(1e3 * floor.run())
    least = {name: min(values) for name, values in times.items()}
    row = {"width": width, "loss_gap": gap, "gflop": floor.gflop, "gflop_counted": counted, "all_ms": times}
    row |= {f"{name}_ms": value for name, value in least.items()} | {"parts_ms": parts[np.argmin(times["ours"])]}
    row |= {"naive_over_ours": least["naive"] / least["ours"], "ours_over_floor": least["ours"] / least["floor"]}
    paired = {"ours_over_floor": ("ours", "floor"), "naive_over_ours": ("naive", "ours")}
    return row | {f"{k}_median": float(np.median(np.divide(times[x], times[y]))) for k, (x, y) in paired.items()}
