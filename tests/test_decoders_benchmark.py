"""benchmark/decoders.py: what it executes of a chunk, with how much noise, and the table it writes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import decoders  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*")


@pytest.fixture
def hopper(tiny_backbone, tmp_path):
    path = tmp_path / "hopper-v4-tiny.pt"
    path.write_bytes(tiny_backbone("Hopper", "flow").read_bytes())
    return path


def test_modes_execute_what_they_say(hopper, monkeypatch):
    """Seen from inside: actions handed to an environment, noise and sampling steps that the decoder gets."""
    seen = []

    def evaluate(policy, envs, seed, device):
        size = envs[0].action_space.shape[0]
        seen.append((size, policy(torch.zeros(2, 11), torch.full((2, size), 0.1))))
        return {"return": np.arange(2.0), "length": np.arange(2)}

    monkeypatch.setattr(decoders, "evaluate", evaluate)
    for mode in decoders.MODES.values():
        assert decoders.play(hopper, *mode, episodes=2)["return"] == 0.5
    sizes, actions = zip(*seen)
    assert sizes == (12, 3, 12, 12, 12) and all(a.shape == (2, n) for n, a in seen)
    same = dict(zip(decoders.MODES, actions))
    assert not torch.allclose(same["as used"], same["half the noise"])
    assert not torch.allclose(same["as used"], same["10 sampling steps"])
    decoder, _, _ = decoders.load_decoder(decoders.ScriptArgs(env_id="Hopper-v4", backbone=str(hopper)))
    assert torch.equal(same["no noise"], decoder(torch.zeros(2, 11), torch.zeros(2, 12)))
    assert torch.equal(same["as used"], decoder(torch.zeros(2, 11), torch.full((2, 12), 0.1)))


def test_episodes_are_real_and_repeat(hopper):
    first, again = (decoders.play(hopper, 0, 1.0, 0, episodes=3) for _ in range(2))
    assert first == again and first["length"] > 1


def test_the_table_shows_every_number():
    number = {"return": 12.3, "standard_error": 4.4, "length": 5.0}
    file = {"decoders": {"a": dict.fromkeys(decoders.MODES, number)}, "episodes": 7, "machine": "some machine"}
    text = decoders.markdown(file)
    assert "| a | 12 ± 4 |" in text and "7 episodes" in text and "some machine" in text
    assert text.count("|") == 3 * (len(decoders.MODES) + 2)
