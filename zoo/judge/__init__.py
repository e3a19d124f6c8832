"""Judge, a small vision-language model: `model`, its `questions`, and `training`, its recipe."""
