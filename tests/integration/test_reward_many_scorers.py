"""Several scorers in one real process, and what others use to ask them: the client, the command, the example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from common.project_files import PROJECT_ROOT
from common.rewards.api import METRICS_PATH, READY_PATH
from common.rewards.client import RewardClient, RewardEndpoint
from tests.integration.test_reward_servers import BRIGHTNESS, DEADLINE, MISCHIEF, launch, running

PIXELS = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 51, 255)])
EXPECTED = [0.0, 0.2, 1.0]
SECOND = ("--scorer", MISCHIEF, "--name", "second")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("server"), "--scorer", BRIGHTNESS, *SECOND) as (base, _):
        yield base


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{index}.png") for index in range(len(PIXELS))]
    for path, image in zip(paths, PIXELS, strict=True):
        Image.fromarray(image).save(path)
    return paths


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def test_the_client_needs_to_know_nothing_of_it(url: str) -> None:
    endpoints = [RewardEndpoint(name, f"{url}/{name}") for name in ("brightness", "second")]
    with RewardClient(endpoints, DEADLINE, 1) as client:
        for scores in client.score(PIXELS, ["a"] * 3).values():
            np.testing.assert_allclose(scores, EXPECTED, atol=1e-6)
        assert client.info("brightness").differentiable
        assert client.info("second").scorer == "second"
        _, gradients = client.gradient("brightness", np.full((1, 3, 4, 4), 0.5, np.float32), ["x"])
    np.testing.assert_allclose(gradients, 1 / 48)
    assert sorted(httpx.get(url + READY_PATH).json()["probe_scores"]) == ["brightness", "second"]
    metrics = httpx.get(url + METRICS_PATH).text
    assert 'reward_server_score_count{scorer="second"} 4.0' in metrics
    assert "process_resident_memory_bytes" in metrics


def test_the_command_prints_one_score_a_file(url: str, files: list[str]) -> None:
    done = command("-m", "reward_servers.score_images", "--url", f"{url}/second", *files, "--prompt", "a")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{score:.6f}  {path}" for score, path in zip(EXPECTED, files, strict=True)]


def test_the_command_sends_metadata(url: str, files: list[str], tmp_path: Path) -> None:
    seen = [tmp_path / name for name in ("first", "second", "third")]
    metadata = [item for path in seen for item in ("--metadata", json.dumps({"started": str(path), "until": files[0]}))]
    done = command("-m", "reward_servers.score_images", "--url", f"{url}/second", *files, "--prompt", "wait", *metadata)
    assert done.stderr == ""
    assert [path.exists() for path in seen] == [True] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "http://127.0.0.1:1", "--prompt", "a"), "does not answer"),
        (("--url", "{url}", "--prompt", "a"), "answered 404"),
        (("--url", "{url}/second", "--prompt", "a", "--prompt", "b"), "2 --prompt for 3 images"),
        (
            ("--url", "{url}/second", "--prompt", "a", "--metadata", "{}", "--metadata", "{}"),
            "2 --metadata for 3 images",
        ),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    url: str, files: list[str], options: tuple[str, ...], message: str
) -> None:
    done = command("-m", "reward_servers.score_images", *files, *(option.replace("{url}", url) for option in options))
    assert (done.returncode, message in done.stderr, len(done.stderr.splitlines())) == (2, True, 1)


def test_the_example_needs_none_of_our_code(url: str, files: list[str], tmp_path: Path) -> None:
    example = PROJECT_ROOT / "examples/score_images.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 30
    # Any size, 16 bits too: the server reads the file. Neither the request nor the token goes to a proxy.
    deep, proxy = tmp_path / "deep.png", {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
    Image.fromarray(np.full((4, 6), 51 * 257, np.uint16)).save(deep)
    done = command("-W", "error", str(example), f"{url}/brightness", "a", *files, str(deep), **proxy)
    assert done.stderr == ""
    np.testing.assert_allclose([float(line) for line in done.stdout.splitlines()], [*EXPECTED, 0.2], atol=1e-6)
    deep.write_bytes(b"GIF89a")
    refused = command(str(example), f"{url}/brightness", "a", str(deep))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "an image is no PNG/JPEG" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scorer", BRIGHTNESS, "--scorer", BRIGHTNESS), "two scorers are named brightness"),
        (("--name", "x", "--scorer", BRIGHTNESS, *SECOND), "--name x is before the first of 2"),
        (("--scorer", BRIGHTNESS, "--name", "v1", *SECOND), "--name v1: letters"),
    ],
)
def test_an_ambiguous_command_line_starts_nothing(options: tuple[str, ...], message: str) -> None:
    _, errors = (process := launch("--port", "0", *options)).communicate(timeout=DEADLINE)
    assert (process.returncode, message in errors, len(errors.splitlines())) == (2, True, 1), errors
