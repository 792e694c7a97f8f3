"""Training at a lower temperature: lpds_continuous.py with three of its lines changed, once more.

    python benchmark/studies/temperature.py 0.5 --env-id Walker2d-v4 --seed 77
    python enjoy.py runs/RUN_FOLDER --temperature 1 0.5 0

Acting (once Delta acts), the TD target and the actor's loss have tau * eps, as if deployment at tau
were trained for; Q^W is distilled on the full prior as always. The run folder is an ordinary one.

What came out: docs/studies/walker2d.md.
"""

import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "lpds_continuous.py"
CHANGES = [
    ('(batch["next_obs"], torch.randn', '(batch["next_obs"], TAU * torch.randn'),
    ("        shift =", "        noise = TAU * noise\n        shift ="),
    (
        "   action = agent",
        "   noise *= TAU if global_step >= first_step else 1\n            action = agent",
    ),
]


def changed(source: str) -> str:
    for old, new in CHANGES:
        assert source.count(old) == 1, f"{SCRIPT.name} has changed: {old!r}"
        source = source.replace(old, new)
    return source


if __name__ == "__main__":
    tau = float(sys.argv.pop(1))
    code = compile(changed(SCRIPT.read_text()), SCRIPT, "exec")
    sys.path.insert(0, str(SCRIPT.parent))
    exec(code, {"__name__": "__main__", "__file__": str(SCRIPT), "TAU": tau})
