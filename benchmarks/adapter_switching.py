"""Processor time of a trained pass with gradient checkpointing, by our adapter layers and by peft's. Prints JSON.

    python -m benchmarks.adapter_switching [--rounds 9] [--out FILE]

A transformer of SD3.5-M's 24 blocks and so small a width that almost all of the time is Python's. The pass is the
student's of stage 2, forward and backward: a frozen and a trainable adapter on 191 layers. Four ways take turns:

    ours             AdapterBank.checkpoint
    ours_plain       the same layers, torch's own checkpoint
    peft_switching   peft's layers; each recomputed block sets the active adapters through peft
    peft_plain       peft's layers, torch's own checkpoint
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint

from benchmarks.as_json import add_out, show
from common.backbones.adapters import AdapterBank
from common.backbones.diffusers_backbone import ATTENTION

BLOCKS, DUAL_BLOCKS = 24, 13
"""SD3.5-M's blocks, and how many of them have a second attention."""
HEADS, HEAD, CONTEXT = 2, 8, 16
RANK, ALPHA = 4, 8
STACK, TRAINED = ("cold_start", "aligned"), "aligned"

Pass = Callable[[], None]


def transformer() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=CONTEXT,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(DUAL_BLOCKS)),
    )


def trained_pass(model: Any, active: Callable[[], AbstractContextManager[object]]) -> Pass:
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 4, CONTEXT),
        "pooled_projections": torch.randn(1, CONTEXT),
    }

    def run() -> None:
        # torch's own checkpoint recomputes through the network that is active in the backward pass.
        with active():
            model(**inputs, return_dict=False)[0].square().mean().backward()

    return run


def ours(*, plain: bool) -> Pass:
    model = transformer()
    bank = AdapterBank({"student": model}, rank=RANK, alpha=ALPHA, targets=ATTENTION)
    for name in STACK:
        bank.add(name, seed=0, trainable=name == TRAINED)
    bank.define("student", STACK)
    model.enable_gradient_checkpointing(_plain_checkpoint if plain else bank.checkpoint)
    return trained_pass(model, lambda: bank.active("student"))


def peft_layers(*, plain: bool) -> Pass:
    model = transformer().requires_grad_(False)
    targets = [
        path
        for path, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and any(path.endswith(f".{target}") for target in ATTENTION)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name in STACK:
            settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="gaussian")
            inject_adapter_in_model(settings, model, adapter_name=name)
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]

    def activate(stack: tuple[str, ...]) -> None:
        for layer in layers:
            layer.enable_adapters(enabled=bool(stack))
            if stack:
                layer.set_adapter(list(stack))
        for layer in layers:
            for weights in (layer.lora_A, layer.lora_B):
                for name, linear in weights.items():
                    linear.requires_grad_(name == TRAINED)

    def switching(function: Callable[..., Any], *arguments: Any) -> Any:
        def through_same_network(*inputs: Any) -> Any:
            activate(STACK)
            try:
                return function(*inputs)
            finally:
                activate(STACK)

        return checkpoint(through_same_network, *arguments, use_reentrant=False)

    activate(STACK)
    model.enable_gradient_checkpointing(_plain_checkpoint if plain else switching)
    return trained_pass(model, nullcontext)


def _plain_checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)


def measured(passes: Mapping[str, Pass], rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time per pass; the ways take turns, after a warm-up."""
    times: dict[str, list[float]] = {way: [] for way in passes}
    for turn in range(rounds + 1):
        for way, run in passes.items():
            start = time.process_time()
            run()
            if turn:
                times[way].append((time.process_time() - start) * 1000)
    return {way: round(statistics.median(taken), 1) for way, taken in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_switching", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    add_out(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ms = measured(
        {
            "ours": ours(plain=False),
            "ours_plain": ours(plain=True),
            "peft_switching": peft_layers(plain=False),
            "peft_plain": peft_layers(plain=True),
        },
        arguments.rounds,
    )
    found = {
        "benchmark": "adapter_switching",
        "rounds": arguments.rounds,
        "ms_per_pass": ms,
        "peft_switching_over_ours": round(ms["peft_switching"] / ms["ours"], 2),
        "peft_plain_over_ours_plain": round(ms["peft_plain"] / ms["ours_plain"], 2),
        "ours_over_plain": round(ms["ours"] / ms["ours_plain"], 2),
    }
    show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
