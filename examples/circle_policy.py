"""A policy small enough to read: it draws a circle and learns its colour from a reward. The clients beside it train it.

Each prompt has one softmax over six colours. As in GRPO, a group of pictures is drawn for each prompt, and a picture's
advantage is its reward against its group. Needs numpy alone.
"""

import os

import numpy as np

PROMPTS = ("big red circle on white", "big blue circle on white", "big green circle on white")
COLOURS = np.array([(220, 40, 40), (40, 180, 60), (50, 80, 220), (235, 210, 50), (150, 60, 190), (240, 140, 40)])
SIDE, RADIUS, GROUP, RATE = 32, 11, 8, 1.0


def draw(colour):
    """A circle on white, uint8 [32, 32, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.where((x**2 + y**2 < RADIUS**2)[..., None], COLOURS[colour], 255).astype(np.uint8)


def train(reward, iterations=12, seed=0):
    """Train with `reward(images [B, 32, 32, 3], prompts) -> B scores`; return the mean reward of each iteration."""
    dice, logits, means = np.random.default_rng(seed), np.zeros((len(PROMPTS), len(COLOURS))), []
    for iteration in range(iterations):
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        colours = np.array([dice.choice(len(COLOURS), GROUP, p=share) for share in shares])
        images = np.stack([draw(colour) for colour in colours.ravel()])
        scores = np.reshape(reward(images, [prompt for prompt in PROMPTS for _ in range(GROUP)]), colours.shape)
        advantages = (scores - scores.mean(axis=1, keepdims=True)) / (scores.std(axis=1, keepdims=True) + 1e-4)
        for row, (drawn, advantage) in enumerate(zip(colours, advantages, strict=True)):
            gradients = np.eye(len(COLOURS))[drawn] - shares[row]  # d log(share of the drawn colour) / d logits
            logits[row] += RATE * (advantage[:, None] * gradients).mean(axis=0)
        means.append(scores.mean())
        print(f"iteration {iteration}: mean reward {means[-1]:.3f}", flush=True)
    return means


def token_headers():
    """The bearer token of the server, if it asks for one."""
    token = os.environ.get("REWARD_SERVER_TOKEN", "").strip()
    return {"authorization": f"Bearer {token}"} if token else {}
