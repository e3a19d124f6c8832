"""Checks before a run starts that its rewards can score its prompts."""

from __future__ import annotations

from common.config.run import Config
from common.rewards.access import RewardAccess
from common.rewards.prompt_check import require_scorable, varied
from common.types import PromptSets


def check_prompts(config: Config, access: RewardAccess, prompts: PromptSets) -> None:
    """Send every reward some prompts of each file that it will score: trained rewards score both files.

    Raises:
        PromptError: a reward refuses a prompt.
        RewardError: no server of a reward answers, or one is not a reward server or differs from the others.
    """
    train, evaluation = varied(prompts.alignment), varied(prompts.evaluation)
    with access.client() as client:
        for reward in config.rewards:
            client.verify(reward.name)
            if reward.trained:
                require_scorable(client, reward.name, config.prompts.train, train)
            require_scorable(client, reward.name, config.prompts.evaluation, evaluation)
