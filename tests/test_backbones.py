"""The committed decoders: what they decode, that their files are plain, and their page of cards."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lpds_continuous import Decoder
from pretrain_backbone import Backbone

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "backbones").glob("*.pt"))
FILES = [path for path in FILES if "pi0" not in path.name]  # test_lpds_libero_pi0.py has that one
STORED = np.load(ROOT / "tests" / "data" / "decoder_outputs.npz")
KEYS = {"format", "kind", "solver", "obs_dim", "action_dim", "chunk", "width", "num_blocks"}
KEYS |= {"cond_hidden", "activation", "time_emb", "levels", "model", "normalization"}
KEYS |= {"card", "training"}


def load(path):
    return torch.load(path, weights_only=True)


def leaves(x):
    if isinstance(x, dict):
        assert all(type(key) is str for key in x)
        return [leaf for value in x.values() for leaf in leaves(value)]
    if type(x) is list:
        return [leaf for value in x for leaf in leaves(value)]
    return [x]


def test_outputs_are_stored_for_the_decoders():
    stored = {name.removesuffix("/1") for name in STORED} - {"obs", "noise"}
    assert len(stored) == 12 and stored <= {path.stem for path in FILES}


@pytest.mark.parametrize(
    "name", sorted({key.removesuffix("/1") for key in STORED} - {"obs", "noise"})
)
def test_outputs_are_those_that_were_stored(name):
    """Equal to the bit where they were stored; another CPU may sum in another order.

    Half of the observations are inside the range of the data, half far outside.
    """
    file = load(ROOT / "backbones" / f"{name}.pt")
    decoder = Decoder(file)
    obs = torch.as_tensor(STORED["obs"])[:, : decoder.obs_dim].contiguous()
    noise = torch.as_tensor(STORED["noise"])[:, : decoder.dim].contiguous()
    for n, key in ((len(obs), name), (1, f"{name}/1")):
        found = decoder(obs[:n], noise[:n])
        torch.testing.assert_close(found, torch.as_tensor(STORED[key]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_plain_whole_and_can_be_sampled_anew(path):
    file = load(path)
    assert set(file) == KEYS and file["format"] == 2
    plain = (int, float, str, bool, torch.Tensor)
    assert all(type(leaf) in plain for leaf in leaves(file))
    tensors = [leaf for leaf in leaves(file) if isinstance(leaf, torch.Tensor)]
    assert all(x.isfinite().all() and not x.requires_grad for x in tensors)
    assert not any("/tmp" in leaf or "/home" in leaf for leaf in leaves(file) if type(leaf) is str)

    # What is stored for its steps is what its schedule and time network give
    backbone, steps = Backbone(file), len(file["time_emb"]) - (file["solver"] == "heun")
    again = backbone.sample_by(file["solver"], steps)
    torch.testing.assert_close(again["time_emb"], file["time_emb"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(again["levels"], file["levels"], rtol=1e-12)


def test_the_page_of_cards_is_current():
    done = subprocess.run(
        [sys.executable, ROOT / "backbones" / "cards.py"], capture_output=True, text=True
    )
    page = (ROOT / "backbones" / "README.md").read_text()
    advice = "run: python backbones/cards.py > backbones/README.md"
    assert done.returncode == 0 and done.stdout == page, advice
    for path in FILES:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{path.name}`"))
        card = load(path)["card"]
        assert f" {card['frozen_return']:.0f} ± {card['frozen_return_std']:.0f} " in row
        assert f" {card['eval_episodes']} " in row and card["source"] in page
