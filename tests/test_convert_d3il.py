"""backbones/convert_d3il.py: positions and moves of made-up demonstrations, and hostile pickles."""

import os
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "backbones" / "convert_d3il.py"


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Converts the files in the folder `d3il`: (exit code, text, arrays)."""
    (tmp_path / "d3il").mkdir()

    def run():
        output = tmp_path / "a.npz"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "d3il"), str(output)])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert output.exists() == (code == 0)
        return code, captured.out + captured.err, dict(np.load(output)) if not code else {}

    return run


def write(folder, lengths=(9, 12, 7)):
    """Files as D3IL stores them, in the protocols that are about."""
    rng, robots = np.random.default_rng(0), []
    for i, n in enumerate(lengths):
        robot = {key: rng.standard_normal((n, 3)) for key in ("des_c_pos", "c_pos", "j_pos")}
        data = pickle.dumps({"robot": robot}, protocol=(2, 4, 5)[i % 3])
        (folder / f"env_{i:03}.pkl").write_bytes(data)
        robots.append(robot)
    return robots


def test_positions_are_paired_with_the_next_move(convert, tmp_path):
    robots = write(tmp_path / "d3il")
    code, text, arrays = convert()
    assert code == 0 and "3 demonstrations, 25 steps" in text
    desired = np.concatenate([robot["des_c_pos"][:-1, :2] for robot in robots])
    following = np.concatenate([robot["des_c_pos"][1:, :2] for robot in robots])
    measured = np.concatenate([robot["c_pos"][:-1, :2] for robot in robots])
    obs, actions = arrays["observations"], arrays["actions"]
    np.testing.assert_array_equal(obs, np.concatenate([desired, measured], 1))
    np.testing.assert_allclose(obs[:, :2] + actions, following, atol=1e-12)
    assert arrays["lengths"].tolist() == [8, 11, 6]
    assert np.flatnonzero(arrays["terminals"]).tolist() == [7, 18, 24]
    assert not arrays["timeouts"].any() and arrays["timeouts"].shape == (25,)


class Evil:
    """Unpickling this calls a function on a path: it makes a folder or a file, say."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        function, *arguments = self.call
        return function, tuple(arguments)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [(os.mkdir,), (np.save, 0)])
def test_what_a_pickle_asks_for_is_not_run(convert, tmp_path, call, protocol):
    write(tmp_path / "d3il")
    function, *more = call
    evil = Evil(function, str(tmp_path / "proof.npy"), *more)
    evil = pickle.dumps({"robot": evil}, protocol=protocol)
    (tmp_path / "d3il" / "env_999.pkl").write_bytes(evil)
    code, text, _ = convert()
    assert code == 2 and "env_999.pkl" in text and "nothing was run" in text
    assert text.count("\n") == 1 and not (tmp_path / "proof.npy").exists()


def test_folders_without_demonstrations(convert, tmp_path):
    code, text, _ = convert()
    assert code == 2 and "no *.pkl" in text
    for robot in ({}, {"des_c_pos": np.zeros((5, 3))}, {"des_c_pos": 1, "c_pos": 2}):
        (tmp_path / "d3il" / "env_0.pkl").write_bytes(pickle.dumps({"robot": robot}))
        code, text, _ = convert()
        assert code == 2 and "env_0.pkl" in text and text.count("\n") == 1
