"""All mutants: what would ruin training without raising an error, each with the unit test that notices."""

from __future__ import annotations

from tests.mutants.formulas import FLOW, OBJECTIVES
from tests.mutants.models import BACKBONES, SAMPLER
from tests.mutants.rivals import RIVALS
from tests.mutants.trainers import ALIGNMENT, COLD_START
from tests.mutants.training import MATCHING, NETWORKS

MUTANTS = (*MATCHING, *COLD_START, *ALIGNMENT, *RIVALS, *NETWORKS, *FLOW, *OBJECTIVES, *SAMPLER, *BACKBONES)
