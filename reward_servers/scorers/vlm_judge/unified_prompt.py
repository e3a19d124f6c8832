"""The prompt of UnifiedReward: a text that is part of the model, read from a script that its authors publish.

    python -m reward_servers.scorers.vlm_judge.unified_prompt SCRIPT DIR

writes DIR/prompt.json. SCRIPT is a file of github.com/CodeGoat24/UnifiedReward, in `inference_qwen/`:

    UnifiedReward-2.0-inference/point_score_ACS_image_generation.py    three scores: alignment, coherence, style
    image_generation/qwen_point_score_image_generation.py              one score, after a list of the prompt's elements

Scores depend on every character of the text, so it is extracted and not copied here. The script is not run; only its
formatted strings are read.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path

from common.command import REFUSED, exit_status, user_path
from common.errors import ModelError
from reward_servers.scorers.vlm_judge.settings import PROMPT_FIELD

PROMPT_FILE = "prompt.json"
VARIABLE = "prompt"
"""The variable of the script that holds the caption."""
FORMATS = (("Alignment Score (1-5)", "Coherence Score (1-5)", "Style Score (1-5)"), ("Final Score",))
"""The labels of the scores in each published format of a reply. A prompt spells those of its format."""


def labels_of(text: str) -> tuple[str, ...]:
    """The scores that a prompt asks for; ModelError when its format is unknown, or it has no place for the caption."""
    found = next((labels for labels in FORMATS if all(f"{label}:" in text for label in labels)), None)
    if found is None or text.count(PROMPT_FIELD) != 1:
        known = " or ".join(", ".join(labels) for labels in FORMATS)
        raise ModelError(
            f"a prompt of UnifiedReward has {PROMPT_FIELD} once and asks for {known}: {text[:80]!r} does not"
        )
    return found


def read_unified_prompt(directory: Path) -> str:
    """The prompt of a model directory; ModelError when it is missing or invalid."""
    path = directory / PROMPT_FILE
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
    except FileNotFoundError as error:
        remedy = "write it with python -m reward_servers.scorers.vlm_judge.unified_prompt"
        raise ModelError(f"{path} is missing: {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}") from error
    if not isinstance(text, str):
        raise ModelError(f"{path}: `text` is not a text")
    labels_of(text)
    return text


def extract_unified_prompt(script: Path) -> str:
    """The prompt in a published script; ModelError when it holds none, or several."""
    try:
        module = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ModelError(f"{script} is not a Python file that can be read: {error}") from error
    texts = {_text(node) for node in ast.walk(module) if isinstance(node, ast.JoinedStr)}
    prompts = [text for text in texts if text.count(PROMPT_FIELD) == 1 and any(f[0] in text for f in FORMATS)]
    if len(prompts) != 1:
        raise ModelError(
            f"{script} holds {len(prompts)} prompts with scores of an image: name a script for point scores of image "
            "generation, of github.com/CodeGoat24/UnifiedReward"
        )
    labels_of(prompts[0])
    return prompts[0]


def _text(node: ast.JoinedStr) -> str:
    """A formatted string with a field for the caption; other fields become nothing."""
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) and part.value.id == VARIABLE:
            parts.append(PROMPT_FIELD)
    return "".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the prompt of UnifiedReward into a model directory.")
    parser.add_argument("script", type=user_path, help="point_score_ACS_image_generation.py, or another point score")
    parser.add_argument("directory", type=user_path, help="the directory of judge.yaml")

    def write() -> None:
        options = parser.parse_args(arguments)
        text = extract_unified_prompt(options.script)
        (options.directory / PROMPT_FILE).write_text(json.dumps({"text": text}, indent=2), encoding="utf-8")

    return exit_status(write, prefix="reward_servers.scorers.vlm_judge.unified_prompt", failed=REFUSED)


if __name__ == "__main__":
    sys.exit(main())
