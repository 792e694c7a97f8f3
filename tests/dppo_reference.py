"""DPPO's arithmetic in numpy (float64), and checkpoints as DPPO writes them, of random weights."""

import numpy as np
import torch

OBS, ACT, CHUNK = 11, 3, 4  # Hopper
D = CHUNK * ACT

HOPPER = dict(hidden=512, blocks=1, time_dim=16)
SQUARE = dict(hidden=1024, blocks=1, time_dim=32, cond=(512, 64))
DEEP = dict(hidden=64, blocks=2, time_dim=16)
SMALL = dict(hidden=16, blocks=1, time_dim=8)

STATS = {
    "obs_min": np.linspace(-3, -0.5, OBS).astype(np.float32),
    "obs_max": np.linspace(0.5, 4, OBS).astype(np.float32),
    "action_min": np.full(ACT, -0.99, np.float32),
    "action_max": np.full(ACT, 0.98, np.float32),
}

# DPPO's DDIM grids for (training steps, sampled steps), latest first, and their alpha bar
PRINTED = {
    (20, 5): ([16, 12, 8, 4, 0], [0.05366, 0.26917, 0.57153, 0.84701, 0.99201]),
    (20, 8): (
        [14, 12, 10, 8, 6, 4, 2, 0],
        [0.14427, 0.26917, 0.41631, 0.57153, 0.71986, 0.84701, 0.94074, 0.99201],
    ),
    (100, 8): (
        [84, 72, 60, 48, 36, 24, 12, 0],
        [0.05366, 0.16685, 0.32612, 0.50943, 0.69145, 0.84701, 0.95461, 0.99937],
    ),
}


def schedule(steps):
    """(betas, alpha bar): Nichol and Dhariwal's cosine, written as DPPO's repository has it."""
    x = np.linspace(0, steps + 1, steps + 1)
    f = np.cos((x / (steps + 1) + 0.008) / (1 + 0.008) * np.pi / 2) ** 2
    f = f / f[0]
    betas = np.clip(1 - f[1:] / f[:-1], 0, 0.999).astype(np.float32)
    return betas, np.cumprod(1 - betas.astype(np.float64))


def mish(x):
    return x * np.tanh(np.logaddexp(0, x))


def relu(x):
    return np.maximum(x, 0)


def network(state, x, t, obs, act):
    """DPPO's DiffusionMLP: the predicted noise for x (B, d) at integer timestep t."""
    w = {k.removeprefix("network."): v.double().numpy() for k, v in state.items()}

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    time_dim = len(w["time_embedding.3.bias"])
    frequency = np.exp(-np.log(1e4) * np.arange(time_dim // 2) / (time_dim // 2 - 1))
    emb = np.concatenate([np.sin(t * frequency), np.cos(t * frequency)])
    emb = linear("time_embedding.3", mish(linear("time_embedding.1", emb)))
    if "cond_mlp.moduleList.0.linear_1.weight" in w:
        hidden = act(linear("cond_mlp.moduleList.0.linear_1", obs))
        obs = linear("cond_mlp.moduleList.1.linear_1", hidden)
    h = linear("mlp_mean.layers.0", np.concatenate([x, np.tile(emb, (len(x), 1)), obs], 1))
    last = max(int(k.split(".")[2]) for k in w if k.startswith("mlp_mean"))
    for i in range(1, last):
        block = f"mlp_mean.layers.{i}"
        h = h + linear(f"{block}.l2", act(linear(f"{block}.l1", act(h))))
    return linear(f"mlp_mean.layers.{last}", h)


def decode(state, obs, noise, train, sample, act):
    """DDIM, eta 0: clean action clamped to [-1, 1], noise recomputed, alpha bar 1 at the end."""
    _, abar = schedule(train)
    times = [i * (train // sample) for i in range(sample)][::-1]
    x = np.asarray(noise, np.float64)
    for i, t in enumerate(times):
        a, a_next = abar[t], abar[times[i + 1]] if i + 1 < sample else 1.0
        clean = (x - np.sqrt(1 - a) * network(state, x, t, obs, act)) / np.sqrt(a)
        clean = np.clip(clean, -1, 1)
        eps = (x - np.sqrt(a) * clean) / np.sqrt(1 - a)
        x = np.sqrt(a_next) * clean + np.sqrt(1 - a_next) * eps
    return x


def dppo_state(seed=0, hidden=512, blocks=1, time_dim=16, cond=(), obs_dim=OBS, d=D):
    """A state dict under DPPO's names, its head larger than torch's, so that the rest matters."""
    shapes = {"time_embedding.1": (2 * time_dim, time_dim)}
    shapes["time_embedding.3"] = (time_dim, 2 * time_dim)
    for i, (n, m) in enumerate(zip(cond, (obs_dim, *cond))):
        shapes[f"cond_mlp.moduleList.{i}.linear_1"] = (n, m)
    shapes["mlp_mean.layers.0"] = (hidden, d + time_dim + (cond[-1] if cond else obs_dim))
    for i in range(1, blocks + 1):
        shapes[f"mlp_mean.layers.{i}.l1"] = (hidden, hidden)
        shapes[f"mlp_mean.layers.{i}.l2"] = (hidden, hidden)
    shapes[f"mlp_mean.layers.{blocks + 1}"] = (d, hidden)

    generator, state = torch.Generator().manual_seed(seed), {}
    for name, (n, m) in shapes.items():
        scale = (3 if n == d else 1) / m**0.5
        state[f"network.{name}.weight"] = torch.randn(n, m, generator=generator) * scale
        state[f"network.{name}.bias"] = torch.randn(n, generator=generator) * scale
    return state


def inputs(n=64, seed=1):
    """Observations inside and noise, float32 as the networks take them."""
    generator = np.random.default_rng(seed)
    obs, noise = generator.uniform(-1, 1, (n, OBS)), generator.normal(size=(n, D))
    return torch.as_tensor(obs).float(), torch.as_tensor(noise).float()
