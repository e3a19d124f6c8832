"""The order of a run: what an iteration samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from common.types import Prompt, PromptSets
from learner.run import Service
from tests.helpers.trained_run import tiny_config


def named(name: str) -> list[Prompt]:
    return [Prompt(index, f"{name} {index}") for index in range(40)]


def test_a_plan_is_drawn_from_the_prompts_of_alignment(tmp_path: Path) -> None:
    service = SimpleNamespace(
        config=tiny_config(tmp_path, tmp_path),
        sigmas=(1.0, 0.9, 0.75, 0.5, 0.0),
        prompts=PromptSets(named("first"), named("second"), named("third")),
    )
    plan, prompts = Service._plan(service, 3)  # type: ignore[arg-type]
    assert (plan.iteration, plan.num_steps, len(plan.selected)) == (3, 4, 2)
    assert len({prompt.text for prompt in prompts}) == service.config.alignment.prompts_per_iteration
    assert all(prompt.text.startswith("second ") for prompt in prompts)
    assert Service._plan(service, 3)[1] == prompts  # type: ignore[arg-type]
    assert Service._plan(service, 4)[1] != prompts  # type: ignore[arg-type]
