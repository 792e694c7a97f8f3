"""benchmark/shifts.py: shifts of the promised length, in opposite pairs, and the table it writes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import shifts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*")


def test_shifts_have_the_length_of_the_budget_and_come_in_pairs(tiny_backbone, monkeypatch):
    seen, obs, noise = [], torch.zeros(1, 11), torch.randn(1, 12)

    class Echo:  # a decoder that returns its noise
        dim, config = 12, {"chunk": 4}
        __call__ = staticmethod(lambda obs, noise: noise)

    _, normalization, card = shifts.load_decoder(
        shifts.parse_args(["--env-id", "Hopper-v4", "--backbone", str(tiny_backbone())])
    )
    monkeypatch.setattr(shifts, "load_decoder", lambda args: (Echo(), normalization, card))
    monkeypatch.setattr(
        shifts,
        "evaluate",
        lambda policy, envs, seed, device: seen.append(policy(obs, noise)) or {"return": np.array([1.0])},
    )
    result = shifts.play("Hopper-v4", 3, 1, ("--delta", "0.2"))
    moved = [(w - noise)[0] for w in seen]
    assert result == {"delta": 0.2, "frozen": 1.0, "returns": [1.0] * 6}
    for there, back in zip(moved[0:6:2], moved[1:6:2]):
        assert torch.allclose(there, -back, atol=1e-6) and there.square().mean() == pytest.approx(0.2, rel=1e-4)
    assert moved[6].abs().max() == 0  # the frozen policy


def test_real_episodes_and_table(tiny_backbone):
    result = shifts.play("Hopper-v4", 1, 2, ("--backbone", str(tiny_backbone("Hopper", "flow"))))
    assert len(result["returns"]) == 2 and all(np.isfinite([result["frozen"], *result["returns"]]))
    file = {"environments": {"Hopper-v4": {"delta": 0.5, "frozen": 10.0, "returns": [1.0, 3.0]}}}
    text = shifts.markdown(file | {"shifts": 1, "episodes": 2, "machine": "some machine"})
    assert "| Hopper-v4 | 0.5 | 10 | 2 | 1 | 1 | 3 |" in text and "2 shifts" in text
