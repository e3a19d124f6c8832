"""A reward server as a reward function of TRL's trainers: python examples/trl_reward.py URL

    python -m reward_servers --scorer hps --model zoo/weights/hps --port 8101

`GRPOTrainer` calls its reward functions with keywords: prompts, completions (pictures here), columns of the data set.
`DDPOTrainer` calls `reward_function(images, prompts, metadata)`, with images [B, 3, H, W] in [0, 1]. The token is
that of REWARD_SERVER_TOKEN.
"""

import sys

import numpy as np
from circle_policy import train
from PIL import Image

from reward_servers import remote_reward

with remote_reward(sys.argv[1], name="hps") as reward:
    print(f"GRPO, rewards/{reward.__name__}")
    train(
        lambda images, prompts: reward(
            prompts=prompts, completions=[Image.fromarray(image) for image in images], trainer_state=None
        )
    )
    print("DDPO")
    train(
        lambda images, prompts: reward.image_reward(
            np.transpose(images / 255, (0, 3, 1, 2)), tuple(prompts), tuple({} for _ in prompts)
        )[0]
    )
