"""GenEval as a reward: `scorer` serves two scores, `models` finds objects and colours, `rules` gives the verdict."""
