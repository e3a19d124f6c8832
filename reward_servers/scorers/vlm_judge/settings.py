"""Settings of a judge: `judge.yaml` (where vLLM is, how it is used) and the rubric in the same directory.

judge.yaml                                    rubric.yaml
    launch:                                       faithfulness: 'Does the image show "{prompt}"?'
      model: /models/Qwen2.5-VL-7B-Instruct       quality: Is the image free of visible flaws?
      arguments: [--max-model-len, "4096"]
    positive_answer: "Yes"
    negative_answer: "No"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from common.errors import ModelError
from common.project_files import PROJECT_ROOT
from common.urls import server_url_fault

SETTINGS_FILE = "judge.yaml"
PROMPT_FIELD = "{prompt}"
# Control tokens of every model family that vLLM serves as a judge start with "<": <|im_end|>, <|image_pad|>, </s>.
_TOKEN_START = re.compile(r"<(?=\S)")


class Section(BaseModel):
    """Strict: a misspelt key is an error, and YAML's yes is not text."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LaunchSettings(Section):
    """A vLLM server started by this process, reachable through a socket file that only this user can open."""

    model: Path = Field(Path("."), description="Model directory; relative to judge.yaml.")
    python: Path = Field(
        PROJECT_ROOT / ".venv-judge" / "bin" / "python",
        description="Python of the environment that has vLLM (`make judge-env` makes one); relative to judge.yaml.",
    )
    arguments: tuple[str, ...] = Field((), description="Further options of vLLM's API server.")
    environment: dict[str, str] = Field({}, description="Environment variables of vLLM.")
    ready_timeout_s: PositiveFloat = Field(900.0, description="Seconds vLLM may take to load.")


class JudgeSettings(Section):
    """`judge.yaml`: exactly one of `launch` and `url`."""

    launch: LaunchSettings | None = Field(None, description="Start vLLM ourselves.")
    url: str | None = Field(None, description="A vLLM server that runs already.")
    rubric: Path = Field(Path("rubric.yaml"), description="Name of each question -> its text; relative to judge.yaml.")
    positive_answer: str = Field("Yes", description='One token. Quote it: a bare yes is "true" in YAML.')
    negative_answer: str = Field("No", description="One token.")
    concurrency: PositiveInt = Field(8, description="Questions asked at the same time; vLLM batches them.")
    timeout_s: PositiveFloat = Field(60.0, description="Seconds all questions of one model call may take together.")

    @field_validator("url")
    @classmethod
    def _url_is_a_url(cls, url: str | None) -> str | None:
        fault = "" if url is None else server_url_fault(url)
        if fault:
            raise PydanticCustomError("url", "{fault}", {"fault": fault})
        return url

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if (self.launch is None) == (self.url is None):
            raise ValueError("name exactly one of launch (start vLLM) and url (of a vLLM server that runs)")
        return self

    @classmethod
    def read(cls, directory: Path) -> JudgeSettings:
        """Read `directory`/judge.yaml and make its paths absolute; ModelError names the file and its problems."""
        path = directory / SETTINGS_FILE
        content = _read_map(path)
        try:
            settings = cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ModelError(f"{path}: {problems}") from error
        changed: dict[str, Any] = {"rubric": (directory / settings.rubric.expanduser()).resolve()}
        if settings.launch is not None:
            model = (directory / settings.launch.model.expanduser()).resolve()
            # Not resolved: a virtual environment's python is a link, and the link's target would not use the
            # environment.
            python = (directory / settings.launch.python.expanduser()).absolute()
            changed["launch"] = settings.launch.model_copy(update={"model": model, "python": python})
        return settings.model_copy(update=changed)


def read_rubric(path: Path) -> dict[str, str]:
    """Name -> question; ModelError when the rubric is empty or no question mentions the prompt."""
    rubric = _read_map(path)
    if not all(isinstance(name, str) and isinstance(text, str) and text.strip() for name, text in rubric.items()):
        raise ModelError(f"{path}: a rubric maps the name of each question to its text")
    if not any(PROMPT_FIELD in text for text in rubric.values()):
        raise ModelError(f"{path}: no question mentions {PROMPT_FIELD}, so no score would depend on the prompt")
    return rubric


def ask_about(question: str, prompt: str) -> str:
    """The question with the prompt inserted."""
    return question.replace(PROMPT_FIELD, escape(prompt))


def escape(text: str) -> str:
    """Make text tokenize to plain words: one line, and no control token spelt out.

    A literal <|im_end|> would end the question and let the prompt answer it; with a space after "<" it is plain text.
    """
    return _TOKEN_START.sub("< ", " ".join(text.split()))


def _read_map(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path} is not a YAML map")
    return content
