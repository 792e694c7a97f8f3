"""Makes the tiny pi0 of lpds_libero_pi0.py: lerobot's own class, cloned, exported as two programs.

Needs Python 3.12 and lerobot[pi] 0.6.1; what comes out needs torch alone.

    python backbones/libero57_demonstrator.py --output demonstrations.npz      (Python 3.11, LIBERO)
    python backbones/libero57_tiny_pi0.py --data demonstrations.npz --output tiny.pt  (Python 3.12)
    python lpds_libero_pi0.py --policy tiny.pt                                 (Python 3.11, LIBERO)
"""

import copy
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import tyro
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0 as pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from transformers import DynamicCache

IMAGE, CHUNK, EXECUTE, WORDS, WIDTH, VOCABULARY = 64, 16, 8, 4, 64, 64
CAMERAS = "observation.images.image", "observation.images.image2"


@dataclass
class Args:
    data: Path
    """FILE.npz of libero57_demonstrator.py"""
    output: Path
    """FILE.pt to write, as lpds_libero_pi0.py --policy reads it"""
    steps: int = 4_000
    """gradient steps; 4,000 take seven minutes of one core"""
    batch_size: int = 32
    """frames per gradient step"""
    lr: float = 1e-3
    """AdamW's highest learning rate, at step 100; a cosine lowers it to 1e-5"""
    seed: int = 0
    """of weights and batches"""


def miniature():
    """Meanwhile lerobot builds a small vision tower, language model and action expert."""
    vision = dict(model_type="siglip_vision_model", hidden_size=WIDTH, num_hidden_layers=2)
    vision |= dict(num_attention_heads=4, patch_size=16, image_size=IMAGE, projection_dim=WIDTH)
    vision |= dict(intermediate_size=4 * WIDTH, vision_use_head=False)
    real = pi0.CONFIG_MAPPING
    configs = {
        "paligemma": lambda: real["paligemma"](vision_config=vision),
        "gemma": lambda **sizes: real["gemma"](**sizes | {"vocab_size": VOCABULARY}),
    }

    class TinyPaliGemma(pi0.PaliGemmaForConditionalGenerationWithPiGemma):
        def __init__(self, config):  # the policy has set sizes of the full model
            config.vision_config.intermediate_size = 4 * WIDTH
            config.vision_config.projection_dim = config.projection_dim = WIDTH
            config.text_config.vocab_size = config._vocab_size = VOCABULARY
            config.image_token_index = VOCABULARY - 1
            super().__init__(config)

    def sizes(variant):  # width, depth, width of the MLP, heads, heads of keys, their width
        return pi0.GemmaConfig(WIDTH, 3, 4 * WIDTH, 8, 1, 16)

    names = "CONFIG_MAPPING", "PaliGemmaForConditionalGenerationWithPiGemma", "get_gemma_config"
    return patch.multiple(pi0, **dict(zip(names, (configs, TinyPaliGemma, sizes))))


def tiny_pi0() -> pi0.PI0Policy:
    """The real PI0Policy, of 0.6 M weights."""
    inputs = {name: PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE)) for name in CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
    config = PI0Config(
        chunk_size=CHUNK,
        n_action_steps=EXECUTE,
        image_resolution=(IMAGE, IMAGE),
        tokenizer_max_length=WORDS,
        num_inference_steps=10,
        device="cpu",
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )
    with miniature():
        policy = pi0.PI0Policy(config)
    for model in policy.model.paligemma_with_expert.children():
        getattr(model, "language_model", model.model).config._attn_implementation = "eager"
    return policy


def batch_of(images, state) -> dict:
    """What lerobot's pre-processor gives the policy; the one task's words are tokens 1 to 4."""
    words = torch.arange(1, WORDS + 1).expand(state.shape[0], -1)
    batch = {"observation.state": state, "observation.language.tokens": words}
    batch["observation.language.attention_mask"] = torch.ones_like(words, dtype=torch.bool)
    return batch | dict(zip(CAMERAS, images))


def read(path: Path) -> tuple:
    """Images (2, N, 3, 64, 64) uint8, states (N, 8), chunks (N, 16, 7), normalised, and how."""
    data = np.load(path)
    state, action, frames = data["state"], data["action"], data["frame_step"]
    ends = data["length"].cumsum()
    chunks = np.zeros((len(frames), CHUNK, 7), np.float32)
    for chunk, start in zip(chunks, frames):  # start: a step of the joined episodes
        taken = action[start : min(start + CHUNK, ends[ends > start][0])]
        chunk[: len(taken)] = taken
        chunk[len(taken) :, 6] = taken[-1, 6]  # after its end the arm rests, the gripper holds
    stats = {}
    for name, x in (("state", state), ("action", action)):
        stats[f"{name}_mean"] = torch.from_numpy(x.mean(0))
        stats[f"{name}_std"] = torch.from_numpy(x.std(0) + 1e-6)
    images = np.stack([data["agentview"], data["wrist"]]).transpose(0, 1, 4, 2, 3)
    states = (torch.from_numpy(state[frames]) - stats["state_mean"]) / stats["state_std"]
    chunks = (torch.from_numpy(chunks) - stats["action_mean"]) / stats["action_std"]
    return torch.from_numpy(np.ascontiguousarray(images)), states, chunks, stats


def clone(policy, images, states, chunks, args: Args) -> None:
    """Flow matching, as lerobot's own loss has it; the policy ends with averaged weights."""
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    average = [parameter.detach().clone() for parameter in policy.parameters()]
    rng, smooth = np.random.default_rng(args.seed), math.nan
    policy.train()
    for step in range(args.steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100) * cosine + 1e-5
        index = rng.integers(len(states), size=args.batch_size)
        seen = images[:, index].float() / 255
        for camera in range(2):
            if rng.random() < 0.3:  # shifted by a pixel, that positions are not learned by heart
                seen[camera] = seen[camera].roll(tuple(rng.integers(-1, 2, 2)), (2, 3))

        loss, _ = policy.forward(batch_of(seen, states[index]) | {"action": chunks[index]})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average, policy.parameters()):
                slow.lerp_(fast, 1 - keep)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 200 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {smooth:.3f}", flush=True)
    with torch.no_grad():
        for parameter, slow in zip(policy.parameters(), average):
            parameter.copy_(slow)
    policy.eval().requires_grad_(False)


class Prefix(nn.Module):
    """Camera images (B, 64, 64, 3) uint8, state (B, 8) -> features (B, F), cache (B, C)."""

    def __init__(self, policy, stats: dict):
        super().__init__()
        self.policy = policy
        self.register_buffer("mean", stats["state_mean"])
        self.register_buffer("std", stats["state_std"])

    def forward(self, agentview, wrist, state):
        images = [image.permute(0, 3, 1, 2).float() / 255 for image in (agentview, wrist)]
        state = (state - self.mean) / self.std
        batch = batch_of(images, state)
        model, seen = self.policy.model, self.policy._preprocess_images(batch)
        tokens = [batch[f"observation.language.{name}"] for name in ("tokens", "attention_mask")]
        embedded, present, attention = model.embed_prefix(*seen, *tokens)
        mask = pi0.prepare_attention_masks_4d(pi0.make_att_2d_masks(present, attention))
        (hidden, _), cache = model.paligemma_with_expert.forward(
            attention_mask=mask,
            position_ids=present.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        pooled = hidden[:, :-WORDS].unflatten(1, (2, -1)).mean(2)  # of each camera's tokens
        layers = torch.stack([torch.stack(layer[:2], 1) for layer in cache], 1)
        return pooled.flatten(1), torch.cat([layers.flatten(1), state], 1)


class Velocity(nn.Module):
    """One step of the sampler: cache (B, C), x (B, 16, 32), time (B,) from 1 to 0 -> dx/dt."""

    def __init__(self, policy):
        super().__init__()
        self.model = policy.model

    def forward(self, cache, x, time):
        state = nn.functional.pad(cache[:, -8:], (0, 24))
        layers = cache[:, :-8].unflatten(1, (3, 2, 1, -1, 16))  # keys and values of three layers
        kept = DynamicCache(tuple((layers[:, i, 0], layers[:, i, 1], None) for i in range(3)))
        present = torch.ones_like(layers[:, 0, 0, 0, :, 0], dtype=torch.bool)
        return self.model.denoise_step(
            state=state, prefix_pad_masks=present, past_key_values=kept, x_t=x, timestep=time
        )


def program(module, example: tuple) -> torch.Tensor:
    """The exported program's file, as compressed bytes; any number of rows."""
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(module, example, dynamic_shapes=({0: rows},) * len(example))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return torch.frombuffer(bytearray(zlib.compress(buffer.getvalue(), 9)), dtype=torch.uint8)


def pack(policy, stats: dict) -> dict:
    """The content of the decoder file."""
    prefix, velocity = Prefix(copy.deepcopy(policy), stats), Velocity(copy.deepcopy(policy))
    prefix.policy.model.paligemma_with_expert.gemma_expert = None  # each is exported with its half
    velocity.model.paligemma_with_expert.paligemma = None
    images = [torch.randint(256, (3, IMAGE, IMAGE, 3), dtype=torch.uint8) for _ in CAMERAS]
    example = (*images, torch.randn(3, 8))
    with torch.no_grad():
        features, cache = prefix(*example)
        programs = {
            "trunk": program(prefix, example),
            "velocity": program(velocity, (cache, torch.randn(3, CHUNK, 32), torch.ones(3))),
        }
    sizes = dict(image=IMAGE, chunk=CHUNK, execute=EXECUTE, steps=10, time_limit=240)
    sizes |= dict(features=features.shape[1], cache=cache.shape[1])
    source = "scripted demonstrations by backbones/libero57_demonstrator.py (own work, MIT)"
    card = {"source": source, "env_id": "libero_90-57"}
    actions = {key: stats[key] for key in ("action_mean", "action_std")}
    return {"env_id": "libero_90-57", **sizes, **actions, **programs, "card": card}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    policy = tiny_pi0()
    *data, stats = read(args.data)
    size = sum(parameter.numel() for parameter in policy.parameters())
    print(f"{size:,} parameters, {len(data[1]):,} frames", flush=True)
    clone(policy, *data, args)
    policy.save_pretrained(args.output.with_suffix(""))  # for the test that compares
    torch.save(pack(policy, stats), args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
