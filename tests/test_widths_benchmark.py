"""benchmark/widths.py: what its widths are, what it plays on them, and the table it writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import widths  # noqa: E402


def test_a_scaled_prior_is_as_wide_as_its_factor():
    for name, factor in (("0.25 eps", 0.25), ("eps (frozen)", 1), ("1.25 eps", 1.25)):
        about = widths.describe(widths.WIDTHS[name])
        assert about["std"] == pytest.approx(factor) and about["entropy"] == pytest.approx(np.log(factor))
    assert widths.describe(widths.WIDTHS["0"]) == {"std": 0, "entropy": -np.inf}


@pytest.mark.parametrize("name, bound", [("tanh eps", 1), ("1.5 tanh eps", 1.5), ("2.5 tanh eps", 2.5)])
def test_a_squashed_gaussian_is_as_wide_as_scipy_says(name, bound):
    about = widths.describe(widths.WIDTHS[name])
    variance = quad(lambda x: norm.pdf(x) * (bound * np.tanh(x)) ** 2, -9, 9)[0]
    entropy = quad(lambda x: norm.pdf(x) * (np.log(bound) + np.log1p(-(np.tanh(x) ** 2))), -9, 9)[0]
    assert about["std"] == pytest.approx(variance**0.5, rel=1e-4)
    assert about["entropy"] == pytest.approx(entropy, abs=1e-3)
    assert about["std"] == pytest.approx(0.63 * bound, abs=0.01 * bound)


def test_it_plays_the_decoder_on_that_noise(monkeypatch):
    seen = []

    def evaluate(policy, envs, seed, device):
        eps = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
        seen.append((policy(torch.zeros(5, 45), eps), eps, seed))
        return {"success": np.array([True, False]), "return": np.array([1.0, 2.0])}

    monkeypatch.setattr(widths, "evaluate", evaluate)
    found = [widths.play("Pen", widths.WIDTHS[name], 2) for name in ("0.5 eps", "2.5 tanh eps")]
    assert found == 2 * [{"success": 0.5, "return": 1.5}]
    decoder, _, _ = widths.load_decoder(widths.parse_args(["--env-id", "AdroitHandPen-v1"]))
    for (action, eps, seed), w in zip(seen, (lambda eps: eps / 2, lambda eps: 2.5 * torch.tanh(eps))):
        assert torch.equal(action, decoder(torch.zeros(5, 45), w(eps))) and seed == 10_000


def test_it_measures_and_the_table_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(widths, "TASKS", ("Pen",))
    monkeypatch.setattr(widths, "WIDTHS", {name: widths.WIDTHS[name] for name in ("eps (frozen)", "1.5 tanh eps")})
    out = tmp_path / "widths.json"
    widths.main(episodes=2, out=out)
    file, text = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    first = file["widths"]["eps (frozen)"]["Pen"]
    assert (
        f"| eps (frozen) | 1.00 | +0.00 | {first['success']:.2f}, {first['return']:.0f} |" in text
        and "| 1.5 tanh eps | 0.94 |" in text
    )
    out.with_suffix(".md").unlink()
    widths.main(table=True, out=out)
    assert out.with_suffix(".md").read_text() == text
