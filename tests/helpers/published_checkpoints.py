"""The tiny random checkpoints of `reward_servers.tiny` as they are published, and the directories made of them."""

from __future__ import annotations

from reward_servers.tiny.converted import (
    BERT_LETTERS,
    BERT_WORDS,
    IMAGE_REWARD_SETTINGS,
    published_head,
    published_image_reward,
    write_aesthetic,
    write_bert_vocabulary,
    write_image_reward,
)

__all__ = [
    "BERT_LETTERS",
    "BERT_WORDS",
    "IMAGE_REWARD_SETTINGS",
    "published_head",
    "published_image_reward",
    "write_aesthetic",
    "write_bert_vocabulary",
    "write_image_reward",
]
