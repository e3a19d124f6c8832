"""Preference models: `models` has their sizes and files, `pairs` what they compare, `training` their recipe."""
