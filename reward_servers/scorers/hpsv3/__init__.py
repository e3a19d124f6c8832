"""HPSv3 as a reward: `scorer` runs the model, `prompt` extracts its texts from the published package."""
