"""`hps` against the `score()` of the untouched `hpsv2` 1.2.0 package, which runs in an environment of its own.

The weights are random and the model small (the published ones cannot be had offline), of the published classes, context
and vocabulary. They take the way of the published ones: a `.pt` file, `python -m reward_servers.convert`, the server's
scorer. The first run makes the environment, in some minutes.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.rewards.api import ByteArray
from reward_servers.scorers.hps import HpsScorer
from tests.helpers.tiny_rewards import hps_state, random_images
from tests.slow.hps_environment import hps_python, merges_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

REPOSITORY = Path(__file__).parents[2]
SECONDS = 1200
TOLERANCE = 1e-6
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 56, "layers": 3, "width": 96, "head_width": 48, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
CHECKPOINTS = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
# Height and width: the model's own, smaller, larger, odd, flat, tall, margins of 1 and 3.
SIZES = [
    (56, 56),
    (64, 64),
    (37, 91),
    (200, 100),
    (1, 1),
    (57, 56),
    (56, 59),
    (333, 500),
    (512, 512),
    (20, 311),
    (31, 30),
]
PROMPTS = [
    "",
    "a photo of a cat",
    "A cat, sitting on a mat!  Two   spaces\tand\na new line",
    "naïve café — 東京 'quotes' “curly”",
    "AT&amp;T &amp;amp;lt; &lt;b&gt; &#39;",
    "Ã©tÃ© doesnâ€™t",
    "x " * 200,
    "supercalifragilistic" * 30,
    "a <|endoftext|> b <|startoftext|>",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 한국어",
    "İstanbul ǅ ﬁne ½ ² ﷺ ＡＢＣ",
    "👩‍👩‍👧 🏳️‍🌈 ✨ 🇯🇵",
    "e\u0301 vs \u00e9, zero\u200bwidth, soft\u00adhyphen, nbsp\u00a0here, \ufeffmark",
    "3.14 1,000 100% $5 #1 @home 1st 2nd",
    "they'll we've I'm it's don't",
    "\x00\x07control\x1b[31m",
]


@dataclass(frozen=True)
class Pair:
    image_HWC: ByteArray
    prompt: str


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Each prompt and as many drawn at random from all of Unicode's first planes, over the sizes in turn."""
    random = np.random.default_rng(0)
    drawn = []
    for _ in PROMPTS:
        codes = [
            *random.integers(0x20, 0x3000, 12),
            *random.integers(0x4E00, 0xA000, 3),
            *random.integers(0x1F300, 0x1FA00, 3),
        ]
        drawn.append(" ".join("".join(map(chr, codes[i : i + 3])) for i in range(0, len(codes), 3)))
    return [
        Pair(random_images(1, *SIZES[number % len(SIZES)], seed=number)[0], prompt)
        for number, prompt in enumerate(PROMPTS + drawn)
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]) -> Path:
    """A folder with the checkpoints and pictures both sides read."""
    folder = tmp_path_factory.mktemp("hps")
    for seed, name in enumerate(CHECKPOINTS.values()):
        torch.save({"epoch": 1, "state_dict": hps_state(seed, ARCHITECTURE)}, folder / name)
    described = []
    for number, pair in enumerate(pairs):
        Image.fromarray(pair.image_HWC).save(folder / f"{number}.png")
        described.append({"image": f"{number}.png", "prompt": pair.prompt})
    content = {"architecture": ARCHITECTURE, "checkpoints": CHECKPOINTS, "pairs": described}
    (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def published_scores(job: Path) -> dict[str, list[float]]:
    """Scores of the published package, by version."""
    script = Path(__file__).with_name("hps_reference.py")
    subprocess.run([hps_python(), script, job], check=True, timeout=SECONDS)
    scores: dict[str, list[float]] = json.loads((job / "scores.json").read_text())
    return scores


def write_clip_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer in transformers' format, out of the merges that came with the package."""
    folder.mkdir()
    merges = gzip.decompress(merges_path().read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(published_scores: dict[str, list[float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_tokenizer(tmp_path_factory.mktemp("clip") / "tokenizer")


@pytest.mark.parametrize("version", CHECKPOINTS)
def test_hps_is_the_packages_own_score(
    version: str,
    job: Path,
    pairs: list[Pair],
    published_scores: dict[str, list[float]],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    command = f"hps {job / CHECKPOINTS[version]} --version {version} --tokenizer {tokenizer}"
    command += f" --architecture {tmp_path / 'architecture.json'} --out {tmp_path / 'model'}"
    subprocess.run(
        [sys.executable, "-m", "reward_servers.convert", *command.split()], check=True, cwd=REPOSITORY, timeout=SECONDS
    )
    scorer = HpsScorer.load(tmp_path / "model", "cpu")
    assert scorer.version == version
    ours = [float(scorer.score(pair.image_HWC[None], [pair.prompt], [{}])[0]) for pair in pairs]
    theirs = published_scores[version]
    assert np.ptp(theirs) > 0.1
    apart = {
        repr(pair.prompt): (ours[i], theirs[i]) for i, pair in enumerate(pairs) if abs(ours[i] - theirs[i]) > TOLERANCE
    }
    assert apart == {}
