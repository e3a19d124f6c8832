"""Tiny random models of GenEval, for `geneval` and `geneval_parts`: a detector and CLIP, in the published formats."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from reward_servers.scorers.geneval.rules import CLASSES
from reward_servers.tiny.clip import save_quietly, write_pickscore


def write_geneval(directory: Path) -> Path:
    """A model directory of two models, see `reward_servers.scorers.geneval`."""
    torch.manual_seed(2)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=dict(enumerate(CLASSES)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    save_quietly(model, directory / "detector")
    write_pickscore(directory / "clip")
    return directory
