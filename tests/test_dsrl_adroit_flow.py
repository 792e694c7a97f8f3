"""baselines/dsrl_adroit_flow.py is DSRL of dsrl_continuous.py on the hands of lpds_adroit_flow.py:
test_shared_code.py has that, test_resume.py its killed runs. Here: that both halves work together.
"""

from conftest import checkpoint, finish, metrics

SCRIPT = "baselines/dsrl_adroit_flow.py"
TINY = """--hidden-size 16 --batch-size 32 --utd 2 --distill-steps 2 --num-envs 2 --eval-episodes 1
    --prior-steps 100 --warmup-steps 100 --eval-every 400 --log-every 100 --lr 0.01
    --total-timesteps 400""".split()


def test_it_starts_as_the_frozen_policy_and_then_moves(tiny_backbone, tmp_path):
    decoder = tiny_backbone("AdroitHandPen", "flow")
    run = finish(tmp_path, SCRIPT, "--env-id", "AdroitHandPen-v1", "--backbone", decoder, *TINY)
    rows, state = metrics(run), checkpoint(run)
    assert rows[1]["entropy/action"] == rows[1]["entropy/action_frozen"]
    assert rows[-1]["entropy/action"] != rows[-1]["entropy/action_frozen"]
    assert state["agent"]["started"] and float(rows[-1]["trust_region/kl"]) > 0
    assert {row["eval/success"] for row in rows} <= {"", "0.0", "1.0"}
    assert state["replay"]["action"].shape[1] == 8 * 24
