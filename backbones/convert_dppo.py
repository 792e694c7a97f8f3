"""Makes a decoder file of format 2 from a checkpoint of DPPO or DSRL, or from a file of format 1.

    python backbones/convert_dppo.py state_3000.pt normalization.npz walker.pt
    python backbones/convert_dppo.py can.pt stats.npz new.pt --activation mish --sample-steps 8
    python backbones/convert_dppo.py old.pt new.pt

Sizes are read off the shapes. What DPPO's file does not say are flags; their defaults are Gym's.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pretrain_backbone import Backbone, require  # noqa: E402


def dppo_weights(file: dict, path: str) -> dict:
    """The averaged weights, from which DPPO's fine-tuning and DSRL start too."""
    weights = file.get("ema") or file.get("model") or {}
    names = " ".join(weights)
    tuned = "is fine-tuned (actor_ft.*), its network.* is only the base; give one of pre-training"
    require("actor_ft." not in names, f"{path}: {tuned}")
    require("_orig_mod." not in names, f"{path}: is compiled (_orig_mod.*); save the network in it")
    residual = "network.mlp_mean.layers.1.l1.weight" in weights
    require(residual, f"{path}: has no network.mlp_mean.layers.1.l1, is no residual MLP of DPPO")
    return {name.removeprefix("network."): weight for name, weight in weights.items()}


def dppo_normalization(path: str, obs_dim: int, d: int) -> dict:
    """DPPO's normalization.npz, which has to fit a decoder of these sizes."""
    keys = ("obs_min", "obs_max", "action_min", "action_max")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stats = {key: torch.as_tensor(arrays[key]).flatten() for key in keys}
    except Exception as error:
        require(False, f"normalization {path}: give the .npz of the checkpoint ({error})")
    sizes = [stats[key].numel() for key in keys]
    fits = sizes[:2] == [obs_dim] * 2 and sizes[2] == sizes[3] and d % sizes[3] == 0
    require(fits, f"normalization {path}: {sizes} values do not fit {obs_dim} inputs, {d} outputs")
    spans = torch.cat([stats[f"{x}_max"] - stats[f"{x}_min"] for x in ("obs", "action")])
    ordered = ((spans >= 0) & spans.isfinite()).all()  # of nan neither is true
    require(ordered, f"normalization {path}: has a min above its max, or not finite; give its own")
    return stats


def rename(weights: dict, path: str) -> dict:
    """DPPO's names of the parameters -> ours; those of the time network begin with `time`."""
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("mlp_mean."))
    table = {"first": "mlp_mean.layers.0", "head": f"mlp_mean.layers.{last}"}
    table |= {f"time.{i}": f"time_embedding.{i}" for i in (1, 3)}
    for i in range(sum(name.startswith("cond_mlp.") for name in weights) // 2):
        table[f"cond.{2 * i}"] = f"cond_mlp.moduleList.{i}.linear_1"
    for i in range(1, last):
        table[f"blocks.{i - 1}.1"] = f"mlp_mean.layers.{i}.l1"
        table[f"blocks.{i - 1}.3"] = f"mlp_mean.layers.{i}.l2"
    table = {f"{a}.{end}": f"{b}.{end}" for a, b in table.items() for end in ("weight", "bias")}
    strange = sorted(set(table.values()) ^ set(weights))
    require(not strange, f"{path}: {strange[:3]} do not fit a residual MLP of DPPO")
    finite = all(weight.isfinite().all() for weight in weights.values())
    require(finite, f"{path}: holds weights that are not finite; give an earlier checkpoint")
    return {ours: weights[theirs] for ours, theirs in table.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="state_*.pt of DPPO or DSRL, or a decoder of format 1")
    parser.add_argument("normalization", nargs="?", help="its normalization.npz; not for format 1")
    parser.add_argument("target", help="decoder file to write")
    parser.add_argument("--activation", choices=["relu", "mish"], default="relu")
    parser.add_argument("--train-steps", type=int, default=20)
    parser.add_argument("--sample-steps", type=int, default=5)
    args = parser.parse_args()
    try:  # the file is untrusted: weights_only never runs what a pickle asks for
        old = dict(torch.load(args.source, map_location="cpu", weights_only=True))
    except Exception as error:
        require(False, f"{args.source}: no checkpoint ({type(error).__name__}); nothing was run")
    require(old.get("format") != 2, f"{args.source}: is of format 2 already")

    # What the file says, and what has to be assumed
    config = old.get("config", vars(args) | {"kind": "diffusion"})
    weights = old["model"] if "config" in old else dppo_weights(old, args.source)
    weights = rename(weights, args.source)
    time_network = {name[5:]: w for name, w in weights.items() if name.startswith("time.")}
    weights = {name: w for name, w in weights.items() if not name.startswith("time.")}
    cond = [len(w) for name, w in weights.items() if name.startswith("cond.") and w.ndim == 1]
    d, width = weights["head.weight"].shape
    inputs = weights["first.weight"].shape[1] - d - len(time_network["3.bias"])
    obs_dim = weights["cond.0.weight"].shape[1] if cond else inputs
    stats = old.get("normalization") or dppo_normalization(args.normalization, obs_dim, d)
    action_dim = len(stats["action_min"])
    told = "by the file" if "config" in old else "assumed"
    steps = f"{config['sample_steps']} of {config['train_steps']} steps"
    print(f"by shape: {obs_dim} observations, {d // action_dim} x {action_dim} actions")
    print(f"{told}: {config['kind']}, {config['activation']}, {steps}")

    file = {"format": 2, "kind": config["kind"], "activation": config["activation"]}
    file |= {"obs_dim": obs_dim, "action_dim": action_dim, "chunk": d // action_dim}
    n_blocks = sum(name.startswith("blocks.") for name in weights) // 4
    file |= {"width": width, "num_blocks": n_blocks, "cond_hidden": cond, "model": weights}
    file |= {"normalization": stats, "card": old.get("card", {"source": Path(args.source).name})}
    file["training"] = {"train_steps": config["train_steps"], "time_network": time_network}
    # Backbone refuses weights whose shapes do not fit together; a diffusion it samples by DDIM
    file |= Backbone(file).sample_by("euler", config["sample_steps"])
    temporary = Path(f"{args.target}.tmp")  # renamed when whole
    torch.save(file, temporary)
    temporary.replace(args.target)
