"""Real reward servers in processes of their own, asked over real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from common.errors import RewardError, RewardInvalid, RewardUnavailable
from common.project_files import PROJECT_ROOT
from common.rewards.api import GRADIENT_PATH, INFO_PATH, METRICS_PATH, READY_PATH, SCORE_PATH, ScoreRequest
from common.rewards.client import RewardClient, RewardEndpoint
from common.wire import pack
from learner.driver.local_servers import LocalServers, LocalServerSpec
from reward_servers.scorers.clip import ClipScorer
from reward_servers.scorers.hps import HpsScorer
from reward_servers.scorers.pickscore import PickScoreScorer
from tests.helpers.tiny_rewards import random_images, write_hps, write_pickscore
from tests.helpers.waiting import wait_until

DEADLINE = 60.0
TOKEN = "open sesame, 16 or more"
BRIGHTNESS = "tests.helpers.toy_scorers:BrightnessScorer"
MISCHIEF = "tests.helpers.toy_scorers:MischiefScorer"
PROMPTS = ["a red cat", "two dogs", "a red cat"]


def launch(
    *options: str,
    cwd: Path = PROJECT_ROOT,
    stdout: int | None = None,
    own_group: bool = False,
    **variables: str,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "reward_servers", *options],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)} | variables,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    )


@contextmanager
def running(folder: Path, *options: str, cwd: Path = PROJECT_ROOT, **variables: str) -> Iterator[tuple[str, int]]:
    """A server that is ready: its URL and process id. It must end cleanly on SIGTERM."""
    ready_file = folder / "ready.json"
    process = launch("--port", "0", "--ready-file", str(ready_file), *options, cwd=cwd, **variables)
    try:
        wait_until(lambda: ready_file.exists() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        ready = json.loads(ready_file.read_text())
        assert ready["pid"] == process.pid
        yield f"http://127.0.0.1:{ready['port']}", process.pid
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode in (0, -signal.SIGKILL), errors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipScorer]:
    """The tiny models in this process, by the directory their servers load."""
    folder = tmp_path_factory.mktemp("models")
    write_hps(folder / "hps")
    write_pickscore(folder / "pickscore")
    return {
        str(folder / "hps"): HpsScorer.load(folder / "hps", "cpu"),
        str(folder / "pickscore"): PickScoreScorer.load(folder / "pickscore", "cpu"),
    }


@pytest.fixture(scope="module")
def client(models: dict[str, ClipScorer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardClient]:
    specs = [LocalServerSpec(scorer.name, scorer.name, Path(directory)) for directory, scorer in models.items()]
    specs.append(LocalServerSpec("mischief", MISCHIEF, None, max_batch=4))
    with LocalServers(specs, tmp_path_factory.mktemp("logs")) as servers:
        endpoints = [RewardEndpoint(name, url) for name, url in servers.urls.items()]
        with RewardClient(endpoints, timeout_s=DEADLINE, attempts=2) as reward_client:
            yield reward_client
        servers.check()


def test_scores_over_http_are_the_scorers_own(client: RewardClient, models: dict[str, ClipScorer]) -> None:
    images = random_images(3, 40, 48)
    scores = client.score(images, PROMPTS)
    assert sorted(scores) == ["hps", "mischief", "pickscore"]
    for scorer in models.values():
        np.testing.assert_allclose(scores[scorer.name], scorer.score(images, PROMPTS, [{}] * 3), atol=1e-6)
        assert client.info(scorer.name).weights_hash == scorer.weights_hash
        assert client.info(scorer.name).differentiable
    np.testing.assert_allclose(scores["mischief"], images.mean(axis=(1, 2, 3)) / 255, atol=1e-6)


def test_gradients_over_http_are_in_process_autograd(client: RewardClient, models: dict[str, ClipScorer]) -> None:
    images = np.random.default_rng(5).random((3, 3, 40, 48), dtype=np.float32)
    for scorer in models.values():
        scores, gradients = client.gradient(scorer.name, images, PROMPTS)
        for index, prompt in enumerate(PROMPTS):
            pixels = torch.tensor(images[index : index + 1], requires_grad=True)
            score = scorer._scores_B(pixels, [prompt])
            score.sum().backward()
            assert abs(float(score.detach()) - scores[index]) <= 1e-5
            assert float((pixels.grad[0] - torch.tensor(gradients[index])).abs().max()) <= 1e-5
        assert np.abs(gradients).max() > 1e-4


@pytest.mark.parametrize("prompt", ["x" * 8_000, "<|endoftext|> <|startoftext|>", "\x00\u202e🙂", ""])
def test_strange_prompts_are_scored(client: RewardClient, prompt: str) -> None:
    scores = client.score(random_images(1), [prompt])
    assert all(np.isfinite(values).all() for values in scores.values())


@pytest.mark.parametrize(
    ("prompt", "kind", "cause"),
    [
        ("nan", RewardInvalid, "nan"),
        ("count", RewardInvalid, "count"),
        ("range", RewardInvalid, "range"),
        ("raise", RewardUnavailable, "scorer"),
    ],
)
def test_a_scorer_that_misbehaves_is_an_error_never_a_score(
    client: RewardClient, prompt: str, kind: type[RewardError], cause: str
) -> None:
    with pytest.raises(kind) as caught:
        client.score(random_images(2), [prompt] * 2, names=["mischief"])
    assert (caught.value.reward, caught.value.cause) == ("mischief", cause)
    assert np.isfinite(client.score(random_images(2), ["fine"] * 2, names=["mischief"])["mischief"]).all()


def test_one_failing_reward_fails_the_whole_question(client: RewardClient) -> None:
    with pytest.raises(RewardInvalid) as caught:
        client.score(random_images(1), ["nan"])
    assert caught.value.reward == "mischief"


def test_bad_requests_are_answered_with_their_cause(tmp_path: Path) -> None:
    images = random_images(2)
    no_prompts = pack({"images_BHWC": images, "prompts": [], "metadata": []})
    cases = [
        (SCORE_PATH, b"junk", 400, "wire"),
        (SCORE_PATH, b"", 400, "wire"),
        (SCORE_PATH, ScoreRequest(images, ["a", "b"]).to_bytes()[:-1], 400, "wire"),
        (SCORE_PATH, pack({"what": 1}), 422, "request"),
        (SCORE_PATH, no_prompts, 422, "request"),
        (SCORE_PATH, b"x" * (2**20 + 1), 413, "too_large"),
        (GRADIENT_PATH, b"", 404, "not_differentiable"),
    ]
    with running(tmp_path, "--scorer", MISCHIEF, "--max-body-mb", "1") as (url, _), httpx.Client(base_url=url) as http:
        for path, body, status, cause in cases:
            answer = http.post(path, content=body)
            assert (answer.status_code, answer.json()["error"]) == (status, cause)
            assert answer.json()["message"]
        chunked = http.post(SCORE_PATH, content=(b"x" * 2**16 for _ in range(17)))
        assert chunked.status_code == 413
        assert http.post(SCORE_PATH, content=ScoreRequest(images, ["a", "b"]).to_bytes()).status_code == 200
        metrics = http.get(METRICS_PATH).text
    assert 'reward_server_requests_total{code="400",path="/v1/score",scorer="mischief"} 3.0' in metrics
    assert 'reward_server_score_count{scorer="mischief"} 3.0' in metrics  # the start-up check and two images


def test_a_token_guards_what_costs_something(tmp_path: Path) -> None:
    options = ("--scorer", BRIGHTNESS, "--host", "0.0.0.0")
    with running(tmp_path, *options, REWARD_SERVER_TOKEN=TOKEN) as (url, _):
        assert httpx.get(url + READY_PATH).json()["ready"] is True
        assert httpx.get(url + INFO_PATH).status_code == 401
        assert httpx.post(url + SCORE_PATH, headers={"authorization": "Bearer wrong"}).status_code == 401
        with RewardClient([RewardEndpoint("b", url)], DEADLINE, 1, token=TOKEN) as client:
            _, gradients = client.gradient("b", np.full((1, 3, 4, 4), 0.5, np.float32), ["x"])
    np.testing.assert_allclose(gradients, 1 / 48)


class Waiting:
    """A request that keeps the model busy until `release`, sent from a thread of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self._until = folder / "until"
        metadata = [{"started": str(folder / "started"), "until": str(self._until)}]
        body = ScoreRequest(random_images(1), ["wait"], metadata).to_bytes()
        self.answers: list[httpx.Response] = []

        def ask() -> None:
            with suppress(httpx.TransportError):  # the server was stopped
                self.answers.append(httpx.post(url + SCORE_PATH, content=body, timeout=DEADLINE))

        self._thread = threading.Thread(target=ask)
        self._thread.start()
        wait_until((folder / "started").exists)

    def release(self) -> int:
        self._until.touch()
        self._thread.join(DEADLINE)
        return self.answers[0].status_code

    def abandon(self) -> None:
        """Wait for the end of a request whose server is gone."""
        self._thread.join(DEADLINE)
        assert self.answers == []


def test_a_full_queue_answers_429_and_a_vanished_client_is_forgotten(tmp_path: Path) -> None:
    body = ScoreRequest(random_images(2), ["x", "y"]).to_bytes()

    def queued(url: str, images: int) -> bool:
        return f'reward_server_queue_images{{scorer="mischief"}} {images}.0' in httpx.get(url + METRICS_PATH).text

    with running(tmp_path, "--scorer", MISCHIEF, "--queue-items", "3") as (url, _):
        waiting = Waiting(url, tmp_path)
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as impatient:
            head = f"POST {SCORE_PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            impatient.sendall(head.encode() + body)
            wait_until(lambda: queued(url, 2))
            refused = httpx.post(url + SCORE_PATH, content=body)
            assert (refused.status_code, refused.json()["error"]) == (429, "overloaded")
            assert float(refused.headers["retry-after"]) > 0
        gone = 'reward_server_requests_total{code="499"'
        wait_until(lambda: gone in httpx.get(url + METRICS_PATH).text)
        assert waiting.release() == 200
        assert httpx.post(url + SCORE_PATH, content=body).status_code == 200
        calls = httpx.get(url + METRICS_PATH).text
    assert (
        'reward_server_batch_images_count{scorer="mischief"} 3.0' in calls
    )  # start-up check, waiting, last; not the vanished


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        (("--call-s", "60"), "its process is ended after 60 s"),
        (("--in-process",), "restart the server if it is stuck"),
    ],
)
def test_a_model_that_is_stuck_is_told_by_readyz_and_does_not_keep_the_server(
    options: tuple[str, ...], way_out: str, tmp_path: Path
) -> None:
    """`running` asks for a clean end: the call still runs then, and whom it was made for was answered."""
    with running(tmp_path, "--scorer", MISCHIEF, "--deadline-s", "0.3", *options) as (url, _):
        waiting = Waiting(url, tmp_path)
        wait_until(lambda: bool(waiting.answers))
        assert waiting.answers[0].json()["error"] == "deadline"
        wait_until(lambda: httpx.get(url + READY_PATH).status_code == 503)
        assert way_out in httpx.get(url + READY_PATH).json()["message"]
    assert waiting.release() == 504


def test_sigterm_drains(tmp_path: Path) -> None:
    with running(tmp_path, "--scorer", MISCHIEF) as (url, process_id):
        waiting = Waiting(url, tmp_path)
        os.kill(process_id, signal.SIGTERM)

        def refuses() -> bool:
            try:
                httpx.get(url + READY_PATH)
            except httpx.TransportError:
                return True
            return False

        wait_until(refuses)
        assert waiting.release() == 200


def test_a_server_killed_in_the_middle_is_an_error(tmp_path: Path) -> None:
    server = running(tmp_path, "--scorer", BRIGHTNESS)
    with server as (url, process_id), RewardClient([RewardEndpoint("b", url)], DEADLINE, 2) as client:
        assert client.score(random_images(1), ["x"])["b"].shape == (1,)
        os.kill(process_id, signal.SIGKILL)
        with pytest.raises(RewardUnavailable) as caught:
            client.score(random_images(1), ["x"])
    assert caught.value.cause in ("refused", "disconnected")


def test_a_scorer_of_ones_own_is_found_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "import numpy as np\n"
        "from reward_servers.scorers.base import Scorer\n"
        "class TorchFree(Scorer):\n"
        "    name = 'torch_free'\n"
        "    score_range = (0.0, float('inf'))\n"
        "    @classmethod\n"
        "    def load(cls, model_dir, device):\n"
        "        return cls()\n"
        "    def score(self, images, prompts, metadata):\n"
        "        return np.full(len(prompts), sum(name in sys.modules for name in ('torch', 'ray')))\n"
    )
    server = running(tmp_path, "--scorer", "mine:TorchFree", "--name", "mine", cwd=tmp_path)
    with server as (url, _), RewardClient([RewardEndpoint("mine", url)], DEADLINE, 1) as client:
        assert client.score(random_images(2), ["a", "b"])["mine"].tolist() == [0.0, 0.0]
        assert client.info("mine").scorer == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scorer", "nonsense"), "nor an import path package.module:Class"),
        (("--scorer", "no.such.module:Class"), "No module named"),
        (("--scorer", "reward_servers.app:RewardService"), "no subclass of Scorer named RewardService"),
        pytest.param(("--scorer", "hps"), "pass --model DIR", marks=pytest.mark.slow),
        pytest.param(("--scorer", "hps", "--model", "/no/such/dir"), "is not a directory", marks=pytest.mark.slow),
        (("--scorer", "hps", "--model", "docs"), "config.json is missing"),
        (("--scorer", BRIGHTNESS, "--host", "0.0.0.0"), "set REWARD_SERVER_TOKEN"),
        (("--scorer", BRIGHTNESS, "--port", "70000"), "--port 70000: not a port: give 1 to 65535, or 0"),
        (("--scorer", BRIGHTNESS, "--redis-url", "foo"), "--redis-url foo: not a URL of Redis"),
        (("--scorer", "tests.helpers.toy_scorers:UncheckableScorer"), "failed its start-up check (nan)"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(options: tuple[str, ...], message: str) -> None:
    _, errors = (process := launch("--port", "0", *options)).communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_server_says_what_it_loads_and_where_it_listens() -> None:
    process = launch("--scorer", BRIGHTNESS, "--port", "0", stdout=subprocess.PIPE)
    assert process.stdout is not None
    loading, ready = process.stdout.readline(), process.stdout.readline()
    address = ready.removeprefix("brightness is ready at ").strip()
    answer = httpx.get(address + READY_PATH, timeout=DEADLINE)
    process.terminate()
    process.communicate(timeout=DEADLINE)
    assert (loading, answer.status_code) == (f"loading {BRIGHTNESS}\n", 200)


def test_a_taken_port_says_so_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        _, errors = (process := launch("--scorer", BRIGHTNESS, "--port", port)).communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert errors.startswith(f"reward_servers: cannot listen on 127.0.0.1 port {port}: ")
    assert len(errors.splitlines()) == 1
