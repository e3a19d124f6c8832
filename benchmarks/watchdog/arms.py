"""The runs: some that are made to hack, and clean ones. Each is an arm of a claim, evaluated often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.claims.arms import CLAIMS, Options


@dataclass(frozen=True)
class WatchedRun:
    """A run of the service whose start and settings are those of a claim's arm.

    Attributes:
        options: further options; they win.
        hacks: whether it is made to hack its rewards.
    """

    claim: str
    arm: str
    hacks: bool
    options: Options = field(default_factory=dict)

    @property
    def config(self) -> str:
        return CLAIMS[self.claim].config

    @property
    def all_options(self) -> Options:
        claim = CLAIMS[self.claim]
        return {**claim.common, **claim.arms[self.arm].options, **OFTEN, **self.options}

    @property
    def start(self) -> str:
        """The arm whose cold start this run begins from."""
        start = CLAIMS[self.claim].arms[self.arm].start
        assert start is not None
        return start

    @property
    def trained(self) -> tuple[str, ...]:
        """Rewards that the run trains on; the others are held out."""
        return CLAIMS_TRAINED[self.claim]


OFTEN: Options = {"evaluation.every": 3, "evaluation.prompts": 256, "evaluation.final_prompts": 2}
"""Ten times as many evaluations as the claims' runs have, of all tuning prompts; the final table is not needed."""
LIKES_GRIDS: Options = {
    "rewards.detector.scorer": "benchmarks.watchdog.grid_scorer:GridScorer",
    "rewards.detector.model": "null",
    "rewards.detector.differentiable": True,
}
"""A reward that likes grids, in the place of the detector."""
WATCHED: Mapping[str, WatchedRun] = {
    "nft": WatchedRun("E", "nft", hacks=True),
    "back_propagation": WatchedRun("C", "back_propagation", hacks=True),
    "grid_reward": WatchedRun("C", "all", hacks=True, options=LIKES_GRIDS),
    "subgrpo": WatchedRun("E", "subgrpo", hacks=False),
    "all": WatchedRun("C", "all", hacks=False),
}
"""DiffusionNFT on OCR with too weak an anchor; back-propagation alone, without an anchor; and a hackable reward with
the settings that are clean otherwise.
"""
CLAIMS_TRAINED: Mapping[str, tuple[str, ...]] = {
    "B": ("detector",),
    "C": ("detector", "hps"),
    "D": ("detector", "hps"),
    "E": ("ocr",),
}
"""Rewards that the claims' runs train on."""
CLAIMS_HACKED = (("C", "back_propagation"), ("E", "nft"), ("E", "surrogate_reward_002"))
"""Arms of the claims whose gold collapses, as the claims' own sections of docs/results.md say."""
