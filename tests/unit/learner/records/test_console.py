"""One plain line per iteration where there is no terminal, a table where there is one."""

from __future__ import annotations

import io
import re

import pytest

from learner.records.console import Console

STAGES = {"cold_start": 5, "alignment": 400}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(stream: io.StringIO) -> list[str]:
    """What was written, without control sequences."""
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in stream.getvalue().splitlines()]


def test_without_a_terminal_each_iteration_is_one_line() -> None:
    stream = io.StringIO()
    record = {
        "reward/hps": 0.25,
        "reward/pickscore": 21.5,
        "loss/student_gradient_norm": 1.25e-5,
        "loss/dropped_groups": 2.0,
        "seconds/step": 2.5,
        "seconds/wait_rollouts": 1.5,
        "seconds/wait_update": 0.75,
        "speed/images per second": 25.6,
    }
    with Console(STAGES, title="shapes", stream=stream) as console:
        console.keep({"evaluation/gold": 0.625, "evaluation/hps": 0.5, "evaluation/diversity": 0.125})
        console.update(record, stage="alignment", iteration=7)
        console.message("checkpoint [bold]7[/bold] written")
    assert stream.getvalue().splitlines() == [
        "shapes  alignment 8/400  ETA 0:16:20  2.50 s (1.50 rollout, 0.750 update)  dropped 2  "
        "hps 0.2500  pickscore 21.50  gold 0.6250  diversity 0.1250  25.6 img/s",
        "checkpoint [bold]7[/bold] written",
    ]


@pytest.mark.parametrize("rewards", [1, 5, 40])
@pytest.mark.parametrize("title", ["shapes", "a_name_" * 30])
def test_a_line_has_the_figures_that_matter_and_no_more_than_fit(rewards: int, title: str) -> None:
    stream = io.StringIO()
    record = {f"reward/a_reward_with_a_name_{index}": 0.123456 for index in range(rewards)}
    record |= {f"loss/ratio_{index}": 1.0 for index in range(40)} | {"loss/dropped_groups": 0.0}
    record |= {"seconds/step": 12345.6, "seconds/wait_rollouts": 1e-7, "seconds/wait_update": float("nan")}
    with Console(STAGES, title=title, stream=stream) as console:
        for iteration in range(8):
            console.update(record, stage="alignment", iteration=iteration)
    for line in stream.getvalue().splitlines():
        assert len(line) <= 160
        assert line.isascii()
        assert "1.23e+04 s (1e-07 rollout, nan update)" in line
        assert "a_reward_with_a_name_0 0.1235" in line
        assert "ratio" not in line
        assert "dropped" not in line


def test_a_line_says_which_way_a_reward_goes() -> None:
    stream = io.StringIO()
    with Console(STAGES, title="shapes", stream=stream) as console:
        for iteration in range(6):
            record = {"reward/rising": float(iteration), "reward/falling": -float(iteration), "reward/flat": 1.0}
            console.update(record, stage="alignment", iteration=iteration)
    *_, last = stream.getvalue().splitlines()
    assert last.endswith("  rising 5.000 up  falling -5.000 down  flat 1.000")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name and value is whole on a line, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "100")
    stream = Terminal()
    record = {f"reward/reward_{index}": index + 0.125 for index in range(9)}
    record |= {"seconds/step": 1.25, "loss/dropped_groups": 3.0, "loss/other": 77.7}
    with Console(STAGES, title="shapes", stream=stream) as console:
        console.update(record, stage="alignment", iteration=1)
    lines = plain(stream)
    assert max(map(len, lines)) <= width
    for label, value in [
        *((f"reward_{index}", f"{index + 0.125:.4g}") for index in range(1, 9)),
        ("s/iteration", "1.25"),
    ]:
        assert any(re.search(rf"\b{label} +{value}", line) for line in lines), label
    assert any(re.search(r"dropped groups +3$", line) for line in lines)
    assert not any("77.7" in line for line in lines)


def test_the_table_sets_training_beside_the_newest_evaluation() -> None:
    stream = Terminal()
    with Console(STAGES, title="shapes", stream=stream) as console:
        console.update({"reward/hps": 9.5}, stage="cold_start", iteration=1)
        console.keep({"evaluation/gold": 0.125})
        console.keep({"evaluation/gold": 0.875, "evaluation/hps": 0.25})
        for iteration in range(6):
            console.update({"reward/hps": iteration / 10}, stage="alignment", iteration=iteration)
    text = "\n".join(plain(stream))
    table = text[text.rindex("alignment 6/400") :]
    assert re.search(r"^hps +0\.5000 ↑ +0\.2500", table, re.MULTILINE)
    assert re.search(r"^gold +0\.8750", table, re.MULTILINE)
    assert "0.125" not in table
    assert "9.5" not in table


def test_a_width_of_zero_is_an_unknown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """COLUMNS=0, as `stty size` has it on a serial console: nothing at all would be shown."""
    monkeypatch.setenv("COLUMNS", "0")
    stream = io.StringIO()
    with Console(STAGES, title="shapes", stream=stream) as console:
        console.message("checkpoint written")
    assert stream.getvalue() == "checkpoint written\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_quiet_console_shows_nothing(stream: io.StringIO) -> None:
    with Console(STAGES, title="shapes", stream=stream, quiet=True) as console:
        console.update({"reward/hps": 9.5}, stage="cold_start", iteration=1)
        console.message("checkpoint written")
    assert stream.getvalue() == ""


def test_an_error_inside_passes_and_frees_the_terminal() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Console(STAGES, title="shapes", stream=stream):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[?25h")
