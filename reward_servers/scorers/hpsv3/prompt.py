"""Prompt texts of HPSv3: two texts that are part of the model, read from the package that its authors publish.

    pip download --no-deps hpsv3==1.0.0
    python -m reward_servers.scorers.hpsv3.prompt hpsv3-1.0.0-py3-none-any.whl DIR

writes DIR/prompt.json. Scores depend on every character of these texts, so they are extracted from the package and not
copied here. The package is neither installed nor run; only its string constants are read.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common.command import REFUSED, exit_status, user_path
from common.errors import ModelError

PROMPT_FILE = "prompt.json"
SOURCE_FILE = "hpsv3/dataset/data_collator_qwen.py"
INSTRUCTION_NAME, REQUEST_NAME = "INSTRUCTION", "prompt_with_special_token"
PLACEHOLDER = "{text_prompt}"
REWARD_TOKEN = "<|Reward|>"


@dataclass(frozen=True)
class HpsV3Prompt:
    """`instruction` contains {text_prompt} once; `request` follows it and contains the reward token once."""

    instruction: str
    request: str

    def __post_init__(self) -> None:
        for text, mark in ((self.instruction, PLACEHOLDER), (self.request, REWARD_TOKEN)):
            if not isinstance(text, str) or text.count(mark) != 1:
                raise ModelError(f"an HPSv3 prompt holds {mark} once, this text does not: {str(text)[:80]!r}")


def read_prompt(directory: Path) -> HpsV3Prompt:
    """The prompt of a model directory; ModelError when it is missing or invalid."""
    path = directory / PROMPT_FILE
    try:
        return HpsV3Prompt(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        remedy = "write it with python -m reward_servers.scorers.hpsv3.prompt"
        raise ModelError(f"{path} is missing: {remedy}") from error
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def extract_prompt(package: Path) -> HpsV3Prompt:
    """The prompt in a wheel of hpsv3; ModelError when the wheel does not contain it."""
    try:
        with zipfile.ZipFile(package) as archive:
            module = ast.parse(archive.read(SOURCE_FILE))
    except (OSError, KeyError, zipfile.BadZipFile, SyntaxError) as error:
        raise ModelError(f"{package} is not a wheel of hpsv3 with {SOURCE_FILE}: {error}") from error
    texts = {
        statement.targets[0].id: str(statement.value.value)
        for statement in module.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
    }
    try:
        return HpsV3Prompt(texts[INSTRUCTION_NAME], texts[REQUEST_NAME])
    except KeyError as error:
        raise ModelError(f"{SOURCE_FILE} in {package} has no text named {error}: use hpsv3 1.0.0") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the prompt of HPSv3 into a model directory.")
    parser.add_argument("package", type=user_path, help="hpsv3-1.0.0-py3-none-any.whl")
    parser.add_argument("directory", type=user_path, help="the model directory")

    def write() -> None:
        options = parser.parse_args(arguments)
        prompt = extract_prompt(options.package)
        (options.directory / PROMPT_FILE).write_text(json.dumps(asdict(prompt), indent=2), encoding="utf-8")

    return exit_status(write, prefix="reward_servers.scorers.hpsv3.prompt", failed=REFUSED)


if __name__ == "__main__":
    sys.exit(main())
