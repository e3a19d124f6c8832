"""Names in weight files that are no weights."""

from __future__ import annotations

import pytest

from common.weight_names import is_recomputed, wrapper_prefix


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
