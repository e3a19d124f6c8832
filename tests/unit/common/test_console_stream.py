"""Output never ends a command: encodings without a character, closed pipes, missing streams."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from common.console_stream import LastingStream

PROJECT_ROOT = Path(__file__).resolve().parents[3]

TALKATIVE = """
import sys
from pathlib import Path
from common.command import exit_status
def talk():
    for number in range(20_000):
        print(f"line {number}")
    Path(sys.argv[1]).write_text("done")
sys.exit(exit_status(talk))
"""


def shell(line: str, *words: str) -> subprocess.CompletedProcess[str]:
    """bash runs `line`; $0 is a Python that imports the project, $1 and so on are `words`."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    command = ["bash", "-o", "pipefail", "-c", line, sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "gb2312", "euc_jp", "shift_jis", "iso8859_2"])
def test_a_character_that_the_encoding_lacks_becomes_a_question_mark(encoding: str) -> None:
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding=encoding, errors="strict"), "standard output")
    print("a · b", file=stream, flush=True)
    assert raw.getvalue() == b"a ? b\n"


@pytest.mark.parametrize("closed", ["| head -n 1 >/dev/null", ">&-", "> /dev/full", "2>&-", "2>/dev/full"])
def test_a_command_goes_on_without_its_output(tmp_path: Path, closed: str) -> None:
    done = shell(f'"$0" -c "$1" "$2" {closed}', TALKATIVE, str(tmp_path / "done"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").read_text() == "done"


def test_a_lost_stream_is_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, caplog.at_level(logging.WARNING, "rtdmd"):
        stream = LastingStream(pipe, "standard output")
        for _ in range(3):
            print("line", file=stream, flush=True)
        assert not stream.isatty()
        os.write(writer, b"what a library writes to the descriptor goes nowhere")
    assert [record.getMessage() for record in caplog.records] == [
        "standard output is lost ([Errno 32] Broken pipe): the command goes on and shows no more"
    ]


RUN = """
import sys
from pathlib import Path
from common.command import exit_status
from learner.records.run_log import run_log
def run():
    print("before the log", flush=True)
    with run_log(Path(sys.argv[1]).parent):
        print("a line", flush=True)
        print("a line", file=sys.stderr, flush=True)
sys.exit(exit_status(run))
"""
AT_THE_START = "{} is lost (it was closed when the command started): the command goes on and shows no more"


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        ("<&- >&- 2>&-", [AT_THE_START.format("standard output"), AT_THE_START.format("standard error")]),
        ("2>&-", [AT_THE_START.format("standard error")]),
        (
            "> /dev/full",
            ["standard output is lost ([Errno 28] No space left on device): the command goes on and shows no "],
        ),
        ("<&-", []),
    ],
)
def test_a_run_log_says_what_was_lost_before_it_began(tmp_path: Path, closed: str, expected: list[str]) -> None:
    assert shell(f'"$0" -c "$1" "$2" {closed}', RUN, str(tmp_path / "run.log")).returncode == 0
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == len(expected)
    assert all(text in line for text, line in zip(expected, lines, strict=True))


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    """Parents such as node make a pipe non-blocking. Its reader may be slow for a moment."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(writer, b"x" * 4096)
    with open(reader, "rb") as found, open(writer, "w") as pipe, ThreadPoolExecutor(1) as threads:
        stream = LastingStream(pipe, "standard output")
        content = threads.submit(found.read, filled + 5)
        print("line", file=stream, flush=True)
        assert content.result(60)[filled:] == b"line\n"


def test_a_process_started_without_streams_prints_into_no_file(tmp_path: Path) -> None:
    script = """
import sys
from common.console_stream import lasting_output
with lasting_output(), open(sys.argv[1], "w") as file:
    import os
    os.write(1, b"printed"); os.write(2, b"printed")
    file.write("own")
"""
    done = shell('"$0" -c "$1" "$2" <&- >&- 2>&-', script, str(tmp_path / "file"))
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "own"
