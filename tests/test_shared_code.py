"""Copies between scripts are by design, drift is not: what stands under one name, a function, a
method or the head of a class, is the same text everywhere, comments included, but for what is
listed here with its reason."""

import ast
import re
from functools import cache

import pytest
from conftest import ROOT

MODEL = "lpds_continuous.py"

# script -> what it is a fork of. A baseline of another family merges two: whatever the first has
# changed in the model is the first's, all the rest is the second's
FORKS = {
    "lpds_adroit_flow.py": [MODEL],
    "lpds_robomimic.py": [MODEL],
    "lpds_toy.py": [MODEL],
    "lpds_libero_pi0.py": [MODEL],
    "pretrain_backbone.py": [MODEL],
    "baselines/dsrl_continuous.py": [MODEL],
    "baselines/lpds_action_continuous.py": [MODEL],
    "baselines/dppo_continuous.py": [MODEL],
    "baselines/dql_continuous.py": ["baselines/lpds_action_continuous.py"],
    "baselines/idql_continuous.py": ["baselines/dql_continuous.py"],
    "baselines/dsrl_adroit_flow.py": ["baselines/dsrl_continuous.py", "lpds_adroit_flow.py"],
    "baselines/dsrl_robomimic.py": ["baselines/dsrl_continuous.py", "lpds_robomimic.py"],
    "baselines/dsrl_toy.py": ["baselines/dsrl_continuous.py", "lpds_toy.py"],
    "baselines/dppo_toy.py": ["baselines/dppo_continuous.py", "lpds_toy.py"],
}

# script -> name -> why it is another one there
FLAGS = "other flags and defaults"
DIFFERS = {
    "lpds_adroit_flow.py": {
        "Args": FLAGS,
        "ActionChunk.step": "success is what the task says, in any step",
        "Decoder": "an ODE",
        "Decoder.__init__": "with the solver of its file",
        "Decoder.forward": "by Euler's or Heun's method",
        "evaluate": "success is what the task says",
    },
    "lpds_robomimic.py": {
        "Args": FLAGS,
        "Decoder": "with a network for observations",
        "Decoder.__init__": "with a network for observations",
        "Decoder.forward": "with a network for observations",
        "evaluate": "one episode after the other, to save simulation; success is the task's",
    },
    "lpds_toy.py": {
        "Args": FLAGS,
        "probe": "of the budget; there is no entropy to estimate",
        "evaluate": "keeps modes and paths",
        "log": "has no tracker",
    },
    "lpds_libero_pi0.py": {
        "Args": FLAGS,
        "parse_args": "one task's defaults",
        "make_env": "a scene with cameras",
        "Decoder": "one of two VLAs",
        "Agent.__init__": "normalises what it sees; one Delta for all rows; the target is of Q^W",
        "Agent.steer": "no bound",
        "Agent.act": "noise is no action here",
        "Agent.update_action_critic": "TD by Q^W, no decoder",
        "Agent.update_latent_critic": "stored pairs in place of the decoder",
        "Agent.update_perturbation": "noise is no action here; no ablations",
        "Replay": "queries",
        "Replay.__init__": "with pairs of noise and action",
        "Replay.add": "other columns",
        "evaluate": "noise is no action here; a return is a success",
        "log": "has no tracker",
    },
    "pretrain_backbone.py": {"Args": FLAGS},
    "baselines/dsrl_continuous.py": {
        "Args": FLAGS,
        "parse_args": "a target entropy may be negative",
        "Agent.__init__": "the policy is a squashed Gaussian",
        "Agent.steer": "the policy is a squashed Gaussian",
        "Agent.update_action_critic": "entropy is worth something",
    },
    "baselines/lpds_action_continuous.py": {
        "Args": FLAGS,
        "Agent.__init__": "no latent critic",
        "Agent.act": "shifts the action",
        "Agent.update_perturbation": "shifts the action",
        "probe": "no latent critic",
    },
    "baselines/dppo_continuous.py": {
        "Args": FLAGS,
        "Decoder": "DDPM",
        "Decoder.__init__": "noise for each step",
        "Decoder.forward": "DDPM",
        "Agent": "another method",
        "Agent.__init__": "another method",
        "Agent.act": "the decoder itself learns",
        "probe": "no latent critic, and the divergence of a chain",
        "evaluate": "noise for each step",
    },
    "baselines/dql_continuous.py": {
        "Args": FLAGS,
        "parse_args": "eta may be 0",
        "Agent": "a copy of the decoder learns",
        "Agent.__init__": "a copy of the decoder learns",
        "Agent.act": "plays the copy",
        "Agent.update_action_critic": "the next action is a target actor's",
        "probe": "nothing is steered",
    },
    "baselines/idql_continuous.py": {
        "Args": FLAGS,
        "parse_args": "eta is not there, an expectile is",
        "Agent.__init__": "V in place of a target actor",
        "Agent.act": "plays the best of some proposals",
        "Agent.update_action_critic": "what comes after is worth V",
        "Agent.update_actor": "by behaviour cloning alone",
    },
    "baselines/dsrl_adroit_flow.py": {"Args": FLAGS},
    "baselines/dsrl_robomimic.py": {"Args": FLAGS},
    "baselines/dsrl_toy.py": {"Args": FLAGS},
    "baselines/dppo_toy.py": {"Args": FLAGS, "evaluate": "both noise for each step, and modes"},
}


def definitions(text: str) -> dict:
    """name -> text: of functions, of methods (Class.method), of a class ahead of its methods."""
    found, lines = {}, text.splitlines()

    def first_line(node):
        return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])

    def source(first, last):
        return "\n".join(lines[first - 1 : last]).rstrip()

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = source(first_line(node), node.end_lineno)
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            last = first_line(methods[0]) - 1 if methods else node.end_lineno
            found[node.name] = source(first_line(node), last)
            for n in methods:
                found[f"{node.name}.{n.name}"] = source(first_line(n), n.end_lineno)
    return found


@cache
def read(script: str) -> dict:
    return definitions((ROOT / script).read_text())


def differing(script: dict, forked_from: list) -> set:
    """Names whose text is not that of the files it was forked from."""
    model, names = read(MODEL), set()
    for name, text in script.items():
        versions = [original[name] for original in map(read, forked_from) if name in original]
        changed = [version for version in versions if version != model.get(name)]
        if any(text != version for version in changed or versions):
            names.add(name)
    return names


@pytest.mark.parametrize("script", FORKS)
def test_copies_are_the_same_text_but_for_what_is_listed(script):
    found, listed = differing(read(script), FORKS[script]), DIFFERS[script].keys()
    assert not found - listed, "has drifted: copy it again, or list why it differs"
    assert not listed - found, "differs no more: take it off the list"


def test_rewards_are_scaled_alike_in_every_main_program():
    lines = r' +if args\.reward_scale == "auto" and .*\n.*\n.*\n.*\n'
    texts = [(ROOT / script).read_text() for script in [MODEL, *FORKS]]
    found = [re.search(lines, text)[0] for text in texts if "reward_scale.fill_" in text]
    assert len(found) == 11 and set(found) == {found[0]} and "fill_" in found[0]


def test_every_script_is_compared():
    scripts = [*ROOT.glob("lpds_*.py"), *ROOT.glob("baselines/*.py")]
    names = {str(path.relative_to(ROOT)) for path in scripts} - {MODEL}
    assert names <= FORKS.keys() == DIFFERS.keys()


MUTATIONS = {
    "a formula": ("0.5 * (q - target)", "(q - target)", {"Agent.update_action_critic"}),
    "a comment": ("# differs from DSRL: its wrapper", "# its wrapper", {"ActionChunk.step"}),
    "a head": ("class Replay:  # every", "class Replay:  # each", {"Replay"}),
    "a decorator": ("@torch.no_grad()\ndef probe", "def probe", {"probe"}),
}


@pytest.mark.parametrize("old, new, names", MUTATIONS.values(), ids=MUTATIONS)
def test_a_changed_copy_is_seen(old, new, names):
    text = (ROOT / MODEL).read_text()
    assert text.count(old) == 1
    assert differing(definitions(text), [MODEL]) == set()
    assert differing(definitions(text.replace(old, new)), [MODEL]) == names
