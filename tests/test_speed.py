"""benchmark/speed.py: same numbers from the naive version, a floor that is the algorithm's, every number in the table.

No timing is asserted, only that what would be compared is comparable.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("benchmark_speed", ROOT / "benchmark" / "speed.py")
speed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(speed)
TINY = dict(widths=(16,), decoder_width=16, batch_size=8, repeats=1)
PARTS = ("replay", "decode", "Q^A", "Delta", "Q^W")


def run(*flags):
    command = [sys.executable, str(ROOT / "benchmark" / "speed.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def algorithm_gflop(args, decoder_width: int) -> float:
    """What a train call has to multiply, from Algorithm 1 and not from the code; nothing backward that is unused."""

    def net(*sizes):
        return sum(n * m for n, m in zip(sizes, sizes[1:]))

    obs, d, trunk = 17, 24, [args.hidden_size] * args.num_layers
    decoder = 5 * net(d + 16 + obs, *[decoder_width] * 3, d)
    delta, first, critics = net(obs, *trunk, d), 2 * (obs + d) * trunk[0], 2 * net(obs + d, *trunk, 1)
    regress = 3 * critics - first  # forward, to the weights, to the input of all layers but the first
    steer = delta + 2 * critics + 3 * delta - obs * trunk[0]  # Delta at s', then at s and back through Q^W
    rows = args.utd * (decoder + critics + regress + steer) + args.distill_steps * (decoder + critics + regress)
    return 2e-9 * args.batch_size * rows


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    done = run(*"--widths 16 --decoder-width 16 --batch-size 8 --repeats 1 --json".split(), str(path))
    assert done.returncode == 0, done.stderr
    return path, json.loads(path.read_text()), done.stdout


def test_all_numbers_are_there(results):
    path, content, printed = results
    (row,) = content["rows"]
    expected = {"width", "vector step", "ours", *PARTS, "naive", "floor", "GFLOP", "naive / ours", "ours / floor"}
    assert expected | {"steps/s", "losses differ by", "turns"} <= set(row)
    assert all(math.isfinite(row[name]) and row[name] > 0 for name in expected | {"steps/s"})
    assert row["losses differ by"] <= speed.TOLERANCE
    assert row["naive / ours"] == row["naive"] / row["ours"] and row["ours / floor"] == row["ours"] / row["floor"]
    assert row["ours"] == pytest.approx(sum(row[name] for name in PARTS), rel=0.1)  # the parts are all of it
    assert content["machine"]["torch"] == torch.__version__
    table = run("--table", str(path)).stdout
    assert table == printed and all(name in table.splitlines()[0] for name in expected)
    assert str(ROOT) not in path.read_text() + printed


def test_the_script_multiplies_what_the_algorithm_asks_for(results):
    """Were it more, the floor would be too high and flatter the script; a smarter decoder may need a little less."""
    _, content, _ = results
    args = speed.lpds.Args(hidden_size=16, batch_size=8)
    assert 0.85 < content["rows"][0]["GFLOP"] / algorithm_gflop(args, 16) < 1.001


def test_naive_version_agrees_at_another_width_and_norm(monkeypatch):
    monkeypatch.setattr(speed, "vector_step", lambda *_: {"vector step": 1.0, "steps per vector step": 16.0})
    args = speed.lpds.Args
    monkeypatch.setattr(speed.lpds, "Args", lambda **kw: args(**kw, delta_norm="sum", alpha_init=0.1, lr=1e-2))
    assert speed.measure(24, speed.Args(**TINY))["losses differ by"] <= speed.TOLERANCE


@pytest.mark.parametrize("broken", ["sample", "decode", "step"])
def test_disagreement_stops_before_anything_is_timed(monkeypatch, broken):
    def wrong_decode(self, obs, x):
        return 0.9 * decode(self, obs, x)

    def wrong_sample(self, n):
        return {name: value.roll(1, 0) if name == "reward" else value for name, value in sample(self, n).items()}

    def wrong_step(self, net, loss):
        return step(self, net, 1.0 * loss) if net is not self.delta else loss.item()  # Delta stays

    decode, sample, step = speed.Naive.decode, speed.Naive.sample, speed.Naive.step
    monkeypatch.setattr(speed, "vector_step", lambda *_: {})
    monkeypatch.setattr(
        speed.Naive, broken, {"sample": wrong_sample, "decode": wrong_decode, "step": wrong_step}[broken]
    )
    with pytest.raises(SystemExit, match="differ by"):
        speed.measure(16, speed.Args(**TINY))


def test_matmuls_are_counted_with_their_sizes():
    x, w = torch.randn(8, 3), torch.randn(5, 3, requires_grad=True)
    with speed.Matmuls() as matmuls:
        torch.nn.functional.linear(x, w, torch.zeros(5)).sum().backward()  # its gradient is an expanded scalar
        torch.nn.functional.linear(x, w.detach())
    forward, to_weights = {(8, 3), (3, 5)}, {(5, 8), (8, 3)}
    counted = [{tuple(size) for size, stride in sizes} for sizes in matmuls.count.elements()]
    assert counted.count(forward) == 2 and counted.count(to_weights) == 1 and len(counted) == 3
    assert matmuls.floor() > 0
