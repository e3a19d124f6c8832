"""First model family of the shapes world: a `StableDiffusion3Pipeline` and its recipe."""
