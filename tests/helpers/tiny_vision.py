"""The tiny random models of `reward_servers.tiny` that see more than CLIP does: GenEval and HPSv3."""

from __future__ import annotations

from pathlib import Path

from reward_servers.tiny.hpsv3 import HPSV3_PROMPT, HPSV3_SPECIAL, HPSV3_TOKENS, hpsv3_state, write_hpsv3

__all__ = ["HPSV3_PROMPT", "HPSV3_SPECIAL", "HPSV3_TOKENS", "hpsv3_state", "write_geneval", "write_hpsv3"]


def write_geneval(directory: Path) -> Path:
    # Imported here: a test of another scorer needs none of it.
    from reward_servers.tiny import geneval

    return geneval.write_geneval(directory)
