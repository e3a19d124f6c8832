"""vLLM server started by this process: started, watched, and ended with it.

It listens on a socket file in a folder that only this user can enter, and on no port: vLLM leaves several of its routes
open even with an API key, so no other user may reach it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.errors import ModelError
from common.short_folder import short_folder
from reward_servers.scorers.vlm_judge.settings import LaunchSettings

SERVED_MODEL = "judge"
GUARDIAN = Path(__file__).with_name("guardian.py")
LOG_LINES_QUOTED = 12
LOG_BYTES_READ = 2**14
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1
WITHHELD_VARIABLES = ("REWARD_SERVER_TOKEN", "JUDGE_API_KEY", "REDIS_USERNAME", "REDIS_PASSWORD", "PYTHONPATH")
"""vLLM does not get these: the server's secrets, and a search path on which our packages would hide its own."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
# Placed after the user's own arguments, so that ours win.
ARGUMENTS = (
    *("--served-model-name", SERVED_MODEL),
    *("--load-format", "safetensors"),
    # The model's own sampling defaults would act on the log-probabilities.
    *("--generation-config", "vllm"),
    *("--limit-mm-per-prompt", '{"image": 1, "video": 0}'),
    *("--seed", "0"),
    # A cached prefix is summed in another order: the last bits would depend on earlier requests.
    "--no-enable-prefix-caching",
    "--disable-uvicorn-access-log",
)


class VllmProcess:
    """Starts vLLM at once; `wait` blocks until it listens. `stop` ends it, and so does the end of this process.

    Attributes:
        socket_file: the socket on which it will listen.
    """

    def __init__(self, launch: LaunchSettings, device: str) -> None:
        """ModelError when the Python or the model directory does not exist."""
        if not launch.python.is_file():
            message = f"launch.python {launch.python} is missing: run `make judge-env`, or name a Python that has vLLM"
            raise ModelError(message)
        if not (launch.model / "config.json").is_file():
            raise ModelError(f"launch.model {launch.model} is no model directory: it has no config.json")
        self._model = launch.model
        short = short_folder(len("/judge_01234567/vllm.sock"), "TMPDIR", {})
        self._folder = Path(tempfile.mkdtemp(prefix="judge_", dir=short))
        self._log = self._folder / "vllm.log"
        self.socket_file = self._folder / "vllm.sock"
        server = [str(launch.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.model)]
        command = [*server, *launch.arguments, *ARGUMENTS, "--uds", str(self.socket_file)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(GUARDIAN), str(self._folder), *command],
                cwd=self._folder,
                env=_environment(launch, device),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: a signal to our process group must not end vLLM before our last request is answered.
                start_new_session=True,
            )
        # If vLLM dies, the guardian keeps the folder for its log.
        atexit.register(self.stop)

    def wait(self, timeout_s: float) -> None:
        """Wait until it listens; ModelError when it died, or does not listen within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while not _listens(self.socket_file):
            died = self.died()
            if died is not None:
                raise ModelError(died)
            if time.monotonic() > deadline:
                raise ModelError(
                    f"the vLLM server of {self._model} was not ready within {timeout_s:g} s: raise "
                    f"launch.ready_timeout_s? The end of its log:\n{self.log_tail()}"
                )
            time.sleep(POLL_SECONDS)

    def died(self, within_s: float = 0.0) -> str | None:
        """A message with the end of the log; None when vLLM is still alive after `within_s` seconds."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        return (
            f"the vLLM server of {self._model} ended with exit status {self._process.returncode}; "
            f"the end of its log:\n{self.log_tail()}"
        )

    def log_tail(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - LOG_BYTES_READ))
                lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES_QUOTED:]
        except FileNotFoundError:
            lines = ["(removed)"]
        return "\n".join(f"    {line}" for line in lines)

    def stop(self) -> None:
        """End vLLM and remove its folder. The end of this process does the same."""
        atexit.unregister(self.stop)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(STOP_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _environment(launch: LaunchSettings, device: str) -> dict[str, str]:
    """Our environment without the withheld variables; with "cuda:1" vLLM sees only that device."""
    kept = {name: value for name, value in os.environ.items() if name not in WITHHELD_VARIABLES}
    _, _, index = device.partition(":")
    visible = {"CUDA_VISIBLE_DEVICES": index} if index else {}
    return kept | ENVIRONMENT | visible | launch.environment
