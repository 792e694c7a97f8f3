"""Tiny decoders with random weights, for every test that needs a file for --backbone but nothing that it learned."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # as the scripts do: a sum that two threads share may differ in its last bit
SIZES = {"Hopper": (11, 3), "Walker2d": (17, 6), "HalfCheetah": (17, 6)}  # observation, action
SIZES |= {"AdroitHandPen": (45, 24), "AdroitHandHammer": (46, 26)}
SIZES |= {"AdroitHandDoor": (39, 28), "AdroitHandRelocate": (39, 30)}


def pytest_configure(config):
    """Whatever is skipped or expected to fail says why at the end, without -r."""
    config.option.reportchars += "".join(c for c in "sx" if c not in config.option.reportchars)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """tiny_backbone("Walker2d", kind="flow") -> path of a decoder file in our format, 16 units wide."""
    folder = tmp_path_factory.mktemp("backbones")

    def write(name="Hopper", kind="diffusion"):
        from lpds_continuous import Decoder

        path, (obs_dim, action_dim) = folder / f"{name}-{kind}.pt", SIZES[name]
        if not path.exists():
            config = dict(kind=kind, obs_dim=obs_dim, action_dim=action_dim, hidden=[16] * 3, cond_hidden=[])
            config |= dict(chunk=8 if name.startswith("Adroit") else 4)
            config |= dict(time_dim=8, activation="relu", train_steps=20, sample_steps=5)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = Decoder(config).state_dict()
            stats = {"obs_min": -2 * torch.ones(obs_dim), "obs_max": 2 * torch.ones(obs_dim)}
            stats |= {"action_min": -torch.ones(action_dim), "action_max": torch.ones(action_dim)}
            file = {"format": 1, "kind": kind, "config": config, "normalization": stats, "model": model, "card": {}}
            torch.save(file, path)
        return path

    return write
