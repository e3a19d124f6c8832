"""All mutants: what would ruin training without raising an error, each with the unit test that notices."""

from __future__ import annotations

from tests.mutants.formulas import FLOW, OBJECTIVES
from tests.mutants.models import BACKBONES, SAMPLER
from tests.mutants.training import MATCHING, NETWORKS, TRAINERS

MUTANTS = (*MATCHING, *TRAINERS, *NETWORKS, *FLOW, *OBJECTIVES, *SAMPLER, *BACKBONES)
