"""benchmark/workers.py: it measures what it says on real hands, and the table it writes."""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import workers  # noqa: E402


def test_every_kind_of_step_is_timed(tiny_backbone):
    flags = ("--backbone", str(tiny_backbone("AdroitHandPen", "flow")), "--hidden-size", "16", "--utd", "1")
    found = workers.measure("AdroitHandPen-v1", 2, (*flags, "--distill-steps", "1", "--num-envs", "2"))
    assert list(found) == ["one process", "workers", "train call"]
    assert np.isfinite([*found.values()]).all() and min(found.values()) > 0


def test_table():
    file = {"repeats": 3, "num_envs": 4, "machine": "some machine", "date": "2026-11-21"}
    file["environments"] = {"AdroitHandPen-v1": {"one process": 0.008, "workers": 0.004, "train call": 0.396}}
    text = workers.markdown(file)
    assert "| AdroitHandPen-v1 | 8.0 ms | 4.0 ms | 396.0 ms | 1.010 |" in text and "num_envs 4. some machine" in text
