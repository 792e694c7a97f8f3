"""baselines/dppo_toy.py is DPPO of dppo_continuous.py between the goals of lpds_toy.py:
test_shared_code.py has that, test_resume.py its killed runs. Here: that both halves work together.
"""

import numpy as np
import torch
from conftest import ROOT, call, checkpoint, finish, metrics, refused

SCRIPT = "baselines/dppo_toy.py"


def test_it_starts_with_all_goals_alike_and_comes_to_prefer_one(tmp_path):
    flags = "--total-timesteps 3_000 --eval-episodes 200".split()
    run = finish(tmp_path, SCRIPT, *flags)
    rows, agent = metrics(run), checkpoint(run)["agent"]
    shares = [float(row["eval/mode_max"]) for row in rows]
    returns = [float(row["eval/episodic_return"]) for row in rows]
    assert shares[0] < 0.35 and shares[-1] > shares[0] + 0.1, shares
    assert returns[-1] > returns[0] + 0.3, returns
    assert float(rows[0]["eval/modes"]) == 4 and float(rows[-1]["eval/success"]) > 0.9
    with np.load(run / "eval.npz") as file:
        assert file["path"].shape == (2, 100, 21, 2)
    assert (run / "paths.png").stat().st_size > 10_000
    frozen = torch.load(ROOT / "backbones/multigoal-diffusion.pt", weights_only=True)["model"]
    for name, tensor in frozen.items():
        assert torch.equal(agent[f"decoder.{name}"], tensor)
        assert not torch.equal(agent[f"actor.{name}"], tensor)


def test_a_flow_is_refused(tmp_path):
    flags = "--backbone", "multigoal-flow.pt"
    refused(call(tmp_path, SCRIPT, *flags), "--backbone", "no diffusion", "convert_dppo.py")
