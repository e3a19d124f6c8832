"""Names of weight files, and names in them that are no weights."""

from __future__ import annotations

import pytest

from common.weight_names import (
    adapter_weight,
    common_variant,
    is_recomputed,
    quantised_weight,
    variant_of,
    wrapper_prefix,
)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", ""),
        ("model-00001-of-00002.safetensors", ""),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.bf16.safetensors", "bf16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
    ],
)
def test_the_variant_of_a_name(name: str, variant: str) -> None:
    assert variant_of(name) == variant


@pytest.mark.parametrize(
    ("parts", "variant"),
    [
        ([{""}, {"", "fp16"}, set()], ""),
        ([{""}, {"fp16"}], "fp16"),
        ([{"bf16", "fp16"}, {"fp16"}], "fp16"),
        ([{"bf16", "fp16"}, {"", "fp16"}], "bf16"),
        ([{"bf16"}, {"fp16"}], ""),
    ],
)
def test_one_variant_serves_every_part_without_a_plain_copy(parts: list[set[str]], variant: str) -> None:
    assert common_variant(parts) == variant


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ([], ""),
        (["module.a", "b"], ""),
        (["module.a", "module.b"], "module."),
        (["module.a", "module.b", "n_averaged"], "module."),
        (["_orig_mod.module.a", "_orig_mod.module.b", "_orig_mod.module.module.c"], "_orig_mod.module."),
    ],
)
def test_a_wrappers_prefix_is_one_that_all_weights_have(names: list[str], prefix: str) -> None:
    assert wrapper_prefix(names) == prefix


def test_a_quantised_weight_is_named_with_its_type() -> None:
    usual = {"a": "F64", "b": "F32", "c": "F16", "d": "BF16", "e": "I64", "f": "I32", "g": "BOOL"}
    assert quantised_weight(usual) is None
    for kind in ("F8_E4M3", "F8_E5M2", "I8", "U8", "F4"):
        assert quantised_weight(usual | {"h": kind, "i": "U8"}) == f"h is {kind}"


@pytest.mark.parametrize(
    ("name", "buffers", "expected"),
    [
        ("position_ids", (), True),
        ("model.encoder.layers.0.attention.self.relative_position_index", (), True),
        ("layers.0.position_ids.weight", (), False),
        ("layers.0.mask", (), False),
        ("layers.0.mask", ("mask",), True),
    ],
)
def test_bookkeeping_is_known_by_its_name_or_from_the_model(
    name: str, buffers: tuple[str, ...], expected: bool
) -> None:
    assert is_recomputed(name, buffers) == expected


@pytest.mark.parametrize(
    ("name", "of_adapter"),
    [
        ("blocks.0.attn.to_q.base_layer.weight", True),
        ("blocks.0.attn.to_q.lora_A.default.weight", True),
        ("blocks.0.attn.to_q.lora_magnitude_vector.default.weight", True),
        ("q_proj.lora_linear_layer.up.weight", True),
        ("attn1.processor.to_q_lora.down.weight", True),
        ("lora_unet_blocks_0_attn_to_q.lora_down.weight", True),
        ("blocks.0.attn.to_q.weight", False),
        ("blocks.0.adaln_lora.1.weight", False),
        ("layers.base_layers.0.weight", False),
    ],
)
def test_names_of_an_unmerged_lora_are_known(name: str, of_adapter: bool) -> None:
    assert adapter_weight(["proj_out.weight", name]) == (name if of_adapter else None)
