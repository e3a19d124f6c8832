"""The examples of other trainers' clients train a small policy against a real server; its reward rises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from common.project_files import PROJECT_ROOT
from tests.integration.test_reward_servers import TOKEN, running

EXAMPLES = PROJECT_ROOT / "examples"
HPS = ("--scorer", "hps", "--model", str(PROJECT_ROOT / "zoo/weights/hps"))
CLIENTS = {
    "flow_grpo_client.py": (),
    "verl_omni_client.py": (),
    "unirl_client.py": ("hps",),
    "trl_reward.py": (),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with running(folder, *HPS, "--accept-flow-grpo", REWARD_SERVER_TOKEN=TOKEN) as (base, _):
        yield base


def train(example: str, url: str, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / example), url, *words],
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "REWARD_SERVER_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("example", CLIENTS)
def test_a_policy_learns_from_the_server(example: str, url: str) -> None:
    done = train(example, url, *CLIENTS[example])
    assert done.returncode == 0, done.stderr
    means = [float(mean) for mean in re.findall(r"mean reward ([\d.]+)", done.stdout)]
    for begin in range(0, len(means), 12):
        run = means[begin : begin + 12]
        assert len(run) == 12
        # Nearly all circles are of the demanded colour then; at the start one in six.
        assert sum(run[-4:]) / 4 > 2 * run[0]
    assert len(means) == (24 if example == "trl_reward.py" else 12)


@pytest.mark.parametrize("example", CLIENTS)
def test_a_client_without_the_token_says_so(example: str, url: str) -> None:
    done = train(example, url, *CLIENTS[example], token="wrong, sixteen or more")
    assert done.returncode != 0
    assert "401" in done.stderr


def test_a_wrong_name_of_a_reward_is_found_before_training(url: str) -> None:
    done = train("unirl_client.py", url, "pickscore")
    assert "serves ['hps'], not pickscore" in done.stderr


def test_the_python_of_the_documents_runs(url: str) -> None:
    page = (PROJECT_ROOT / "docs/other_trainers.md").read_text(encoding="utf-8")
    client, reward = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    client = client.replace("attempts=3)", "attempts=3, token=os.environ['REWARD_SERVER_TOKEN'])")
    call = "(one,) = reward(prompts=['a red cat'], completions=[images_BHWC[0]])\nprint(abs(one - scores[0]) < 1e-5)\n"
    call += "reward.close()"  # one image alone may be rounded differently than in a batch
    code = f"import os\n{client}print(gradients_BCHW.shape)\n{reward}{call}".replace("http://127.0.0.1:8101", url)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "REWARD_SERVER_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "(2, 3, 64, 64)\nTrue\n", done.stderr


def test_the_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path
