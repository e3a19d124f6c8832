"""Plain lines where there is no terminal, a table where there is one."""

from __future__ import annotations

import io
import re

import pytest

from learner.records.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_step_is_one_line() -> None:
    stream = io.StringIO()
    with Console(total=2, title="shapes", stream=stream) as console:
        console.update({"reward/hps": 0.25, "loss/teacher_distance": 1.25e-5}, stage="alignment", iteration=7)
        console.message("checkpoint [bold]7[/bold] written")
    first, message = stream.getvalue().splitlines()
    assert first.startswith("shapes  alignment 7  1/2  0:0")
    assert first.endswith("  reward/hps 0.25  teacher_distance 1.25e-05")
    assert message == "checkpoint [bold]7[/bold] written"


def test_a_line_has_the_figures_that_matter_and_no_more_than_fit() -> None:
    stream = io.StringIO()
    record = {f"loss/ratio_{index}": 1.0 for index in range(40)} | {f"seconds/part_{index}": 1.0 for index in range(40)}
    rewards = {f"reward/a_reward_with_a_name_{index}": 0.123456 for index in range(5)}
    with Console(total=2, title="shapes", stream=stream) as console:
        console.update(record | rewards | {"seconds/step": 2.5}, stage="alignment", iteration=8)
    (line,) = stream.getvalue().splitlines()
    assert line.partition("  seconds/step 2.5  reward/a_reward_with_a_name_0 0.1235  ")[1] != ""
    assert 120 < len(line) <= 160
    assert line.isascii()
    assert "ratio" not in line


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name and value is whole on a line, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "100")
    stream = Terminal()
    record = {f"loss/a_loss_of_{index}": index + 0.125 for index in range(9)}
    record |= {f"seconds/part_{index}": index + 0.25 for index in range(9)} | {"reward/hps": 0.75, "speed/images": 7.5}
    with Console(total=3, title="shapes", stream=stream) as console:
        console.update(record, stage="alignment", iteration=1)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    for name, value in record.items():
        assert any(re.search(rf"\b{name.partition('/')[2]} +{value:g}\b", line) for line in lines), name


def test_a_width_of_zero_is_an_unknown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """COLUMNS=0, as `stty size` has it on a serial console: nothing at all would be shown."""
    monkeypatch.setenv("COLUMNS", "0")
    stream = io.StringIO()
    with Console(total=2, title="shapes", stream=stream) as console:
        console.message("checkpoint written")
    assert stream.getvalue() == "checkpoint written\n"


def test_on_a_terminal_the_table_keeps_the_newest_value_of_every_metric(monkeypatch: object) -> None:
    stream = Terminal()
    with Console(total=3, title="shapes", stream=stream) as console:
        console.update({"loss/fake": 9.5}, stage="cold_start", iteration=1)
        console.keep({"evaluation/gold": 0.125})
        console.update({"reward/hps": 0.25}, stage="alignment", iteration=1)
        console.keep({"evaluation/gold": 0.875})
        console.update({"reward/hps": 0.5}, stage="alignment", iteration=2)
    table = stream.getvalue().rpartition("alignment 2")[2]
    assert "3/3" in table
    assert "0.875" in table
    assert "0.5" in table
    assert "9.5" not in table
    assert "0.125" not in table


def test_an_error_inside_passes_and_frees_the_terminal() -> None:
    stream = Terminal()
    try:
        with Console(total=1, title="shapes", stream=stream):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted
    assert stream.getvalue().endswith("\x1b[?25h")
