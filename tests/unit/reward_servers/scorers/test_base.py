"""A scorer of a user's own that was written for former names."""

from __future__ import annotations

import pytest

from common.errors import ModelError
from tests.helpers.toy_scorers import BrightnessScorer


def test_a_former_name_of_an_attribute_is_refused_with_the_present_one() -> None:
    with pytest.raises(ModelError, match=r"Mine sets probe_prompt: the name is now check_prompt"):
        type("Mine", (BrightnessScorer,), {"probe_prompt": "a dog"})


def test_the_present_name_is_what_the_start_up_check_asks() -> None:
    mine = type("Mine", (BrightnessScorer,), {"check_prompt": "a dog"})
    assert mine.load(None, "cpu").check_request().prompts == ["a dog"]
