"""backbones/convert_dppo.py: checkpoints of DPPO against its arithmetic in numpy, and refusals."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import dppo_reference as dppo
import numpy as np
import pytest
import torch
from dppo_reference import DEEP, HOPPER, SMALL, SQUARE, STATS, dppo_state, inputs

from lpds_continuous import Decoder
from pretrain_backbone import Backbone

SCRIPT = Path(__file__).resolve().parents[1] / "backbones" / "convert_dppo.py"

# The shapes that DPPO's networks have, as dumped from its own code
TABLE = {
    "hopper": (HOPPER, 553_020, {"mlp_mean.layers.0": (512, 39), "mlp_mean.layers.2": (12, 512)}),
    "can": (
        HOPPER | dict(obs_dim=23, d=28),
        575_564,
        {"mlp_mean.layers.0": (512, 67), "time_embedding.1": (32, 16)},
    ),
    "square": (
        SQUARE | dict(obs_dim=23, d=28),
        2_305_212,
        {
            "mlp_mean.layers.0": (1024, 124),
            "cond_mlp.moduleList.0.linear_1": (512, 23),
            "cond_mlp.moduleList.1.linear_1": (64, 512),
            "mlp_mean.layers.1.l1": (1024, 1024),
            "time_embedding.1": (64, 32),
        },
    ),
}


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Writes a checkpoint and its normalization.npz and converts it: (exit code, text, file)."""

    def run(content, stats=STATS, flags="", normalization=None):
        source, npz, target = (tmp_path / name for name in ("state.pt", "stats.npz", "new.pt"))
        if content is not None:
            torch.save(content, source)
        if stats is not None:
            np.savez(npz, **stats)
        middle = [npz if normalization is None else normalization] if stats is not None else []
        argv = [SCRIPT, source, *middle, target, *flags.split()]
        monkeypatch.setattr(sys, "argv", [str(x) for x in argv])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert not Path(f"{target}.tmp").exists()
        file = torch.load(target, weights_only=True) if target.exists() else None
        return code, captured.out + captured.err, file

    return run


def refused(result, *words):
    code, text, file = result
    assert code == 2 and file is None
    error = text.splitlines()[-1]
    assert error.startswith("error: ") and text.count("error") == 1, text
    assert all(word in error for word in words), text


@pytest.mark.parametrize("name", TABLE)
def test_the_written_state_dicts_have_dppos_shapes(name):
    sizes, parameters, shapes = TABLE[name]
    state = dppo_state(**sizes)
    assert sum(v.numel() for v in state.values()) == parameters
    for key, shape in shapes.items():
        assert state[f"network.{key}.weight"].shape == shape


@pytest.mark.parametrize("train, sample", dppo.PRINTED)
@pytest.mark.parametrize("sizes, activation", [(HOPPER, "relu"), (SQUARE, "mish"), (DEEP, "mish")])
def test_decodes_as_dppo_does(convert, sizes, activation, train, sample):
    state = dppo_state(**sizes)
    flags = f"--activation {activation} --train-steps {train} --sample-steps {sample}"
    code, text, file = convert({"epoch": 1, "model": state, "ema": state}, flags=flags)
    assert code == 0 and f"assumed: diffusion, {activation}, {sample} of {train} steps" in text
    backbone = Backbone(file).requires_grad_(False)
    backbone.sample_by("euler", sample)
    obs, noise = inputs()
    found = backbone(obs, noise)
    act = dict(relu=dppo.relu, mish=dppo.mish)[activation]
    truth = dppo.decode(state, obs.numpy(), noise.numpy(), train, sample, act)
    np.testing.assert_allclose(found, truth, atol=1e-5)
    assert found.std() > 0.3 and (found.abs() < 0.999).float().mean() > 0.2
    if not sizes.get("cond"):  # the scripts' own class, from what the file holds alone
        assert torch.equal(Decoder(file)(obs, noise), found)


def test_sizes_are_read_off_the_shapes(convert):
    _, text, file = convert({"ema": dppo_state(**SQUARE)}, flags="--activation mish")
    sizes = dict(obs_dim=11, action_dim=3, chunk=4, width=1024, num_blocks=1, cond_hidden=[512, 64])
    assert sizes.items() <= file.items() and file["time_emb"].shape == (5, 32)
    assert "11 observations, 4 x 3 actions" in text
    assert convert({"ema": dppo_state(**DEEP)})[2]["num_blocks"] == 2
    for key, value in STATS.items():
        np.testing.assert_array_equal(file["normalization"][key], value)
        assert file["normalization"][key].dtype == torch.float32


def test_ema_is_preferred_and_a_file_with_only_model_works(convert):
    ema, model = dppo_state(1, **SMALL), dppo_state(2, **SMALL)
    weights = [
        convert(content)[2]["model"]["head.weight"]
        for content in ({"model": model, "ema": ema}, {"ema": ema}, {"itr": 1, "model": model})
    ]
    assert torch.equal(weights[0], ema["network.mlp_mean.layers.2.weight"])
    assert torch.equal(weights[1], weights[0])
    assert torch.equal(weights[2], model["network.mlp_mean.layers.2.weight"])


def format_1(kind="diffusion", sizes=SMALL, **changes):
    """A decoder file as it was before: DPPO's names and a configuration."""
    state = dppo_state(**sizes)
    config = dict(kind=kind, obs_dim=11, action_dim=3, chunk=4, hidden=[16] * 3, cond_hidden=[])
    config |= dict(time_dim=8, activation="mish", train_steps=40, sample_steps=4) | changes
    model = {name.removeprefix("network."): w for name, w in state.items()}
    stats = {name: torch.tensor(x) for name, x in STATS.items()}
    file = {"format": 1, "kind": kind, "config": config, "model": model, "normalization": stats}
    return file | {"card": {"env_id": "Hopper-v4", "frozen_return": 1.5}}, state


def test_a_diffusion_of_format_1(convert):
    old, state = format_1()
    code, text, file = convert(old, stats=None)
    assert code == 0 and "by the file: diffusion, mish, 4 of 40 steps" in text
    assert file["card"] == old["card"] and file["solver"] == "ddim"
    obs, noise = inputs()
    truth = dppo.decode(state, obs.numpy(), noise.numpy(), 40, 4, dppo.mish)
    np.testing.assert_allclose(Decoder(file)(obs, noise), truth, atol=1e-5)


def test_a_flow_of_format_1(convert):
    old, state = format_1("flow", activation="relu")
    file = convert(old, stats=None)[2]
    assert (file["kind"], file["solver"], file["levels"]) == ("flow", "euler", [])
    obs, noise = inputs()
    x = noise.numpy().astype(float)
    for i in range(4):  # time is counted in training steps
        x = x + dppo.network(state, x, 40 * i / 4, obs.numpy(), dppo.relu) / 4
    np.testing.assert_allclose(Decoder(file)(obs, noise), np.clip(x, -1, 1), atol=1e-5)


def renamed(state, old, new):
    return {name.replace(old, new): w for name, w in state.items()}


def test_fine_tuned_checkpoints_are_refused_whole(convert):
    base = dppo_state(1, **SMALL)
    tuned = renamed(base, "network.", "actor_ft.") | renamed(base, "network.", "actor.")
    refused(convert({"itr": 5, "model": base | tuned}), "state.pt", "fine-tuned", "actor_ft.*")
    refused(convert({"itr": 5, "model": tuned}), "state.pt", "fine-tuned")


def test_weights_that_are_no_residual_mlp(convert):
    state = dppo_state(**SMALL)
    compiled = renamed(state, "network.", "_orig_mod.network.")
    refused(convert({"ema": compiled}), "compiled", "_orig_mod")
    inside = renamed(state, "network.", "network._orig_mod.")
    refused(convert({"ema": inside}), "compiled", "_orig_mod")
    plain = renamed(renamed(state, ".layers.", ".moduleList."), ".l1.", ".linear_1.")
    refused(convert({"ema": plain}), "residual")
    normed = state | {"network.mlp_mean.layers.1.norm1.weight": torch.ones(16)}
    refused(convert({"ema": normed}), "mlp_mean.layers.1.norm1.weight")
    for content in ({}, {"epoch": 3, "ema": None}, {"model": {"actor.0.weight": torch.ones(2, 2)}}):
        refused(convert(content), "state.pt", "residual")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(convert, value):
    state = dppo_state(**SMALL)
    state["network.mlp_mean.layers.1.l1.bias"][3] = value
    refused(convert({"ema": state}), "state.pt", "not finite")
    old, _ = format_1()
    old["model"]["mlp_mean.layers.1.l1.bias"][3] = value
    refused(convert(old, stats=None), "state.pt", "not finite")


BAD_STATS = {
    "missing key": {"obs_min": None},
    "of another environment": {"obs_min": np.zeros(17), "obs_max": np.ones(17)},
    "short": {"obs_min": np.zeros(10)},
    "five actions": {"action_min": -np.ones(5), "action_max": np.ones(5)},
    "nan": {"obs_max": np.full(11, np.nan)},
    "swapped": {"action_min": STATS["action_max"], "action_max": STATS["action_min"]},
    "text": {"obs_min": np.array(["a"] * 11)},
}


@pytest.mark.parametrize("what", BAD_STATS)
def test_a_wrong_normalization_is_what_is_blamed(convert, what):
    stats = {key: x for key, x in (STATS | BAD_STATS[what]).items() if x is not None}
    refused(convert({"ema": dppo_state(**SMALL)}, stats), "error: normalization ", "stats.npz")


def test_a_missing_normalization(convert, tmp_path):
    content = {"ema": dppo_state(**SMALL)}
    refused(convert(content, stats=None), "error: normalization ")
    refused(convert(content, normalization=tmp_path / "none.npz"), "normalization", "none.npz")


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_a_file_asks_for_is_not_run(convert, tmp_path):
    proof = tmp_path / "proof"
    refused(convert({"model": Evil(proof), "ema": {}}), "state.pt", "nothing was run")
    stats = STATS | {"obs_min": np.array([Evil(proof)], object)}
    refused(convert({"ema": dppo_state(**SMALL)}, stats), "normalization")
    assert not proof.exists()
    torch.load(tmp_path / "state.pt", weights_only=True)
    np.load(tmp_path / "stats.npz", allow_pickle=True)["obs_min"]
    assert proof.exists()  # so it would have been


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), 7])
def test_files_that_are_no_checkpoint(convert, content, tmp_path):
    refused(convert(content), "state.pt")
    (tmp_path / "state.pt").write_bytes(b"text")
    refused(convert(None), "state.pt", "no checkpoint")


def test_as_a_program_it_refuses_its_own_output(convert, tmp_path):
    assert convert({"ema": dppo_state(**SMALL)})[0] == 0
    command = [sys.executable, SCRIPT, tmp_path / "new.pt", tmp_path / "again.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "format 2 already" in done.stderr
    assert not (tmp_path / "again.pt").exists()


def test_more_steps_than_there_are(convert):
    for steps in ("--sample-steps 21", "--sample-steps 0"):
        refused(convert({"ema": dppo_state(**SMALL)}, flags=steps), steps, "above 0", "20")
