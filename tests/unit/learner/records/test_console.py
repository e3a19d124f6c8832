"""Plain lines where there is no terminal, a table where there is one."""

from __future__ import annotations

import io

from learner.records.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_step_is_one_line() -> None:
    stream = io.StringIO()
    with Console(total=2, title="shapes", stream=stream) as console:
        console.update({"reward/hps": 0.25, "loss/policy": -1.25e-5}, stage="alignment", iteration=7)
        console.message("checkpoint [bold]7[/bold] written")
        console.update({f"metric_{index}": 1.0 for index in range(40)}, stage="alignment", iteration=8)
    first, message, second = stream.getvalue().splitlines()
    assert first.startswith("shapes · alignment 7 · 1/2 · 0:0")
    assert first.endswith("reward/hps=0.25  loss/policy=-1.25e-05")
    assert message == "checkpoint [bold]7[/bold] written"
    assert second.endswith("metric_39=1")


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
