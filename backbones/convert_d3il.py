"""Makes data for pretrain_backbone.py of D3IL's Avoiding demonstrations, which are pickles.

    python backbones/convert_d3il.py d3il/avoiding/data avoiding.npz
    python pretrain_backbone.py --data avoiding.npz --env-id lpds_toy:Avoiding-v0 --output a.pt

The observation is the desired and the measured xy of the robot, the action the way to the next
desired xy. A pickle can run code when it is loaded, so nothing but arrays is let through.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pretrain_backbone import require  # noqa: E402


class ArraysOnly(pickle.Unpickler):
    """Loads pickles of plain values and numpy arrays. Whatever else one asks for is not run."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes the bytes of an array
            return lambda text, encoding: text.encode("latin1")
        array = name in ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
        if array and module.split(".")[0] == "numpy":
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, nothing was run")


if __name__ == "__main__":
    require(len(sys.argv) == 3, "give a folder of *.pkl and the .npz to write")
    folder, output = sys.argv[1:]
    observations, actions = [], []
    for path in sorted(Path(folder).glob("*.pkl")):
        try:
            with path.open("rb") as file:
                robot = ArraysOnly(file).load()["robot"]
            desired, measured = (np.asarray(robot[key])[:, :2] for key in ("des_c_pos", "c_pos"))
            observations.append(np.concatenate([desired, measured], 1)[:-1])
        except Exception as error:  # a pickle can fail in any way
            require(False, f"{path}: is no demonstration of D3IL ({error})")
        actions.append(np.diff(desired, axis=0))
    require(actions, f"{folder}: has no *.pkl; give the folder of D3IL's demonstrations")

    lengths = [len(x) for x in actions]
    ends = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    arrays = {"observations": np.concatenate(observations), "actions": np.concatenate(actions)}
    np.savez_compressed(output, **arrays, terminals=ends, timeouts=~ends & ends, lengths=lengths)
    print(f"wrote {output}: {len(lengths)} demonstrations, {sum(lengths)} steps")
