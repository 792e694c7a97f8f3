"""benchmark/speed.py: no time is asserted, only that what would be compared is comparable."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import speed  # noqa: E402


def scaled_actions(decode):
    return lambda self, obs, x: 0.9 * decode(self, obs, x)


def endless_episodes(sample):
    return lambda self, n: sample(self, n) | {"terminated": torch.zeros(n)}


def delta_stays(step):
    return lambda self, net, loss: (
        loss.item() if net is self.perturbation else step(self, net, loss)
    )


def one_slice(update):
    return lambda self, batch: update(
        self, {k: x[: self.args.batch_size] for k, x in batch.items()}
    )


MISTAKES = {"decode": scaled_actions, "sample": endless_episodes, "step": delta_stays}
MISTAKES |= {"update_latent_critic": one_slice}


def test_a_row_has_medians_and_ratios_of_its_turns():
    row = speed.measure(16, batch_size=8, repeats=3)
    assert len(row["turns"]) == 3
    for name in ("ours", "naive", "floor", "naive / ours", "ours / floor"):
        assert row[name] == sorted(turn[name] for turn in row["turns"])[1] > 0
    for turn in row["turns"]:
        assert turn["naive / ours"] == turn["naive"] / turn["ours"]
        assert turn["ours / floor"] == turn["ours"] / turn["floor"]
    line = speed.markdown({"rows": [row]}).splitlines()[2]
    assert line.startswith(f"| 16 | {row['ours']:.0f} | {row['naive']:.0f} |")


@pytest.mark.parametrize("part", MISTAKES)
def test_where_losses_differ_nothing_is_timed(monkeypatch, capsys, part):
    monkeypatch.setattr(speed.Naive, part, MISTAKES[part](getattr(speed.Naive, part)))
    monkeypatch.setattr(speed.Matmuls, "floor", lambda self: pytest.fail("was timed"))
    with pytest.raises(SystemExit):
        speed.measure(16, batch_size=64, repeats=1)
    assert "losses differ by" in capsys.readouterr().err


def test_the_floor_is_what_algorithm_1_multiplies(monkeypatch):
    """Counted from the algorithm and not from the code; a larger floor would flatter the script."""
    found = []

    def count(self):
        for sizes, n in self.count.items():
            (rows, inner), (_, columns) = (shape for shape, _ in sizes)
            found.append(n * rows * inner * columns)
        return 1.0

    monkeypatch.setattr(speed.Matmuls, "floor", count)
    speed.measure(16, batch_size=8, repeats=1)

    def net(*sizes):
        return sum(n * m for n, m in zip(sizes, sizes[1:]))

    obs, d, trunk = 11, 12, [16] * 3
    decoder = 5 * net(d + 16 + obs, 256, 256, 256, d)
    delta, critics = net(obs, *trunk, d), 2 * net(obs + d, *trunk, 1)
    regress = 3 * critics - 2 * (obs + d) * trunk[0]  # forward, to weights, to inputs but the first
    steer = delta + 2 * critics + 3 * delta - obs * trunk[0]  # at s', then at s back through Q^W
    a_step, a_distillation = decoder + critics + regress + steer, decoder + critics + regress
    known = 8 * (20 * a_step + 10 * a_distillation)
    assert 0.95 < sum(found) / known <= 1


def test_products_are_counted_with_their_sizes():
    x, w = torch.randn(8, 3), torch.randn(5, 3, requires_grad=True)
    with speed.Matmuls() as matmuls:
        torch.nn.functional.linear(x, w, torch.zeros(5)).square().sum().backward()
        torch.nn.functional.linear(x, w.detach())
    counted = {tuple(tuple(shape) for shape, _ in sizes): n for sizes, n in matmuls.count.items()}
    assert counted == {((8, 3), (3, 5)): 2, ((5, 8), (8, 3)): 1} and matmuls.floor() > 0


def test_the_page_has_the_table_of_the_committed_numbers():
    results = json.loads((ROOT / "benchmark" / "results" / "speed.json").read_text())
    assert speed.markdown(results) in (ROOT / "docs" / "studies" / "speed.md").read_text()
