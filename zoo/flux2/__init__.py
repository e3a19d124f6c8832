"""Second model family of the shapes world: a `Flux2KleinPipeline`, teacher and 4-step start, and its recipe."""
