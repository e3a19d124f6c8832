"""Scorers, and the table of the built-in ones.

This file holds names only. Each scorer imports its own libraries, and only a server started with its name imports it.
"""

BUILT_IN_SCORERS = {
    "aesthetic": "reward_servers.scorers.aesthetic:AestheticScorer",
    "clipscore": "reward_servers.scorers.clipscore:ClipScoreScorer",
    "geneval": "reward_servers.scorers.geneval.scorer:GenevalScorer",
    "geneval_parts": "reward_servers.scorers.geneval.scorer:GenevalPartsScorer",
    "geneval2": "reward_servers.scorers.vlm_judge.geneval2:Geneval2Scorer",
    "geneval2_parts": "reward_servers.scorers.vlm_judge.geneval2:Geneval2PartsScorer",
    "hps": "reward_servers.scorers.hps:HpsScorer",
    "hpsv3": "reward_servers.scorers.hpsv3.scorer:HpsV3Scorer",
    "image_reward": "reward_servers.scorers.image_reward:ImageRewardScorer",
    "ocr": "reward_servers.scorers.ocr:OcrScorer",
    "pickscore": "reward_servers.scorers.pickscore:PickScoreScorer",
    "unified_reward": "reward_servers.scorers.vlm_judge.unified_reward:UnifiedRewardScorer",
    "vlm_judge": "reward_servers.scorers.vlm_judge.scorer:VlmJudgeScorer",
}
"""Each name maps to the class path of its scorer."""
JUDGES = ("geneval2", "geneval2_parts", "unified_reward", "vlm_judge")
"""The scorers of a model behind vLLM."""
CLIENTS_OF_MODELS = tuple(BUILT_IN_SCORERS[name] for name in JUDGES)
"""These scorers run in the server's own process: they compute nothing, their model has a process of its own already."""
MOVED_SCORERS = {
    "reward_servers.scorers.geneval:GenevalScorer": BUILT_IN_SCORERS["geneval"],
    "reward_servers.scorers.geneval:GenevalPartsScorer": BUILT_IN_SCORERS["geneval_parts"],
    "reward_servers.scorers.hpsv3:HpsV3Scorer": BUILT_IN_SCORERS["hpsv3"],
    "reward_servers.scorers.vlm_judge:VlmJudgeScorer": BUILT_IN_SCORERS["vlm_judge"],
}
"""The first class path of each moved scorer maps to its present one.

Run files may name either. The first path stays the scorer's identity, because checkpoints and cached scores hold it.
"""
