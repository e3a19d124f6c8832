"""Print the scores of image files: `rtdmd score --url URL IMAGE... --prompt TEXT`.

Each line has the score and the path of one file. All files are checked before the first is scored. They may differ in
size: each is its own request. `--metadata` is for
scorers that need more than a prompt, such as GenEval's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TypeVar

import httpx

from common import strict_json
from common.command import exit_status, some_time, user_path
from common.errors import RewardInvalid, RewardRejected, RewardUnavailable, WireError
from common.rewards.api import ANY_REWARD, MEDIA_TYPE, SCORE_PATH, ByteArray, ScoreRequest, ScoreResponse
from common.rewards.bearer import REWARD_TOKEN, reward_token
from common.rewards.http import REMEDY_OF_CAUSE, error_body, remedy_of_status, shown_answer
from common.rewards.proxies import (
    UNREACHED,
    UNUSABLE_ENVIRONMENT,
    trusts_environment,
    unreachable,
    unusable_environment,
)
from common.urls import host_of
from common.visible_text import printable
from reward_servers.options import USAGE_ERROR, server_url
from reward_servers.picture_files import MAX_OWN_PIXELS, OWN_FORMATS, open_picture, pixels_HWC

Each = TypeVar("Each")
MAX_OWN_BYTES = 2**29


def main(arguments: list[str] | None = None) -> int:
    """0 when every image was scored, else 2 with one line on stderr."""
    return exit_status(
        lambda: _print_scores(_build_parser().parse_args(arguments)), prefix="rtdmd score", failed=USAGE_ERROR
    )


def _print_scores(options: argparse.Namespace) -> None:
    prompts = _one_each("--prompt", options.prompt, len(options.images))
    metadata = _one_each("--metadata", options.metadata or [{}], len(options.images))
    token = reward_token([host_of(options.url)])
    headers = {"content-type": MEDIA_TYPE} | ({"authorization": f"Bearer {token}"} if token else {})
    contents = [_checked(path) for path in options.images]
    with _client(options.url, headers, options.timeout_s) as http:
        for path, content, prompt, about in zip(options.images, contents, prompts, metadata, strict=True):
            print(f"{score(http, options.url, path, prompt, about, content):.6f}  {printable(path)}")


def _client(url: str, headers: dict[str, str], timeout_s: float) -> httpx.Client:
    try:
        return httpx.Client(headers=headers, timeout=timeout_s, trust_env=trusts_environment(url))
    except UNUSABLE_ENVIRONMENT as error:
        raise RewardUnavailable(ANY_REWARD, "refused", f"{url}: {unusable_environment(error)}") from error


def _checked(path: Path) -> bytes | None:
    """RewardRejected for a bad file. Return the content of one that can be read only once, such as a pipe."""
    content = _content(path)
    _pixels_HWC(path, content)
    return None if path.is_file() else content


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_OWN_BYTES + 1)
    except OSError as error:
        raise RewardRejected(ANY_REWARD, "request", f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_OWN_BYTES:
        message = f"{path}: more than {MAX_OWN_BYTES} bytes: no picture is so large"
        raise RewardRejected(ANY_REWARD, "too_large", message)
    return content


def _pixels_HWC(path: Path, content: bytes) -> ByteArray:
    try:
        return pixels_HWC(open_picture(content, OWN_FORMATS, MAX_OWN_PIXELS))
    except RewardRejected as error:
        raise RewardRejected(ANY_REWARD, error.cause, f"{path}: {error}") from error


def score(
    http: httpx.Client, url: str, path: Path, prompt: str, metadata: dict[str, Any], content: bytes | None = None
) -> float:
    """One image's score; RewardRejected for a bad file or request, RewardUnavailable without a response.

    `content` is that of the file, if it was read before.
    """
    images_BHWC = _pixels_HWC(path, _content(path) if content is None else content)[None]
    address = url + SCORE_PATH
    try:
        answer = http.post(address, content=ScoreRequest(images_BHWC, [prompt], [metadata]).to_bytes())
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "is a reward server there, and is it ready?"
        if isinstance(error, UNREACHED):
            remedy = unreachable(url, remedy)
        message = f"{address} does not answer ({error}): {remedy}"
        raise RewardUnavailable(ANY_REWARD, "refused", message) from error
    if answer.status_code != httpx.codes.OK:
        cause, told = error_body(answer.content)
        told += REMEDY_OF_CAUSE.get(cause, "") if cause else remedy_of_status(answer.status_code, answer.headers)
        raise RewardRejected(ANY_REWARD, "answer", f"{path}: {address} answered {answer.status_code}: {told}")
    try:
        return float(ScoreResponse.from_bytes(answer.content).scores_B[0])
    except (WireError, RewardInvalid) as error:
        told = f"{path}: {address} answered {shown_answer(answer.content)!r}, which is no score ({error})"
        raise RewardInvalid(ANY_REWARD, "answer", f"{told}: give the --url of a reward server") from error


def _one_each(option: str, given: list[Each], count: int) -> list[Each]:
    if len(given) not in (1, count):
        message = f"{len(given)} {option} for {count} images: one for all, or one each in their order"
        raise RewardRejected(ANY_REWARD, "request", message)
    return given * count if len(given) == 1 else given


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtdmd score",
        description=f"Print the scores of image files. The bearer token is read from {REWARD_TOKEN}.",
    )
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE")
    parser.add_argument(
        "--url",
        type=server_url,
        required=True,
        help="base URL of a scorer: http://HOST:PORT, or with several http://HOST:PORT/NAME",
    )
    parser.add_argument(
        "--prompt", required=True, action="append", help="the prompt of all images; or repeat it, once per image"
    )
    parser.add_argument(
        "--metadata",
        type=_json_object,
        action="append",
        metavar="JSON",
        help="a JSON object for all images; or repeat it, once per image",
    )
    parser.add_argument("--timeout-s", type=some_time, default=60.0, help="timeout per image in seconds (default 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
