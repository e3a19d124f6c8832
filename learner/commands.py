"""The command `rtdmd`: its first word selects a subcommand, which gets the rest of the line.

Each subcommand is imported only when it is used, so a reward server needs none of the trainer's libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from common.console_stream import lasting_output

Main = Callable[[list[str]], int]

COMMANDS = {
    "train": ("learner.main:main", "train a run: cold start, alignment, report (also `python learner/main.py`)"),
    "forecast": ("learner.main:forecast", "print the placement, memory and seconds that a run will need"),
    "generate": ("learner.tools.generate:main", "draw images with a finished run"),
    "evaluate": ("learner.tools.evaluate:main", "score a finished run, or any diffusers pipeline, on a prompt file"),
    "export": ("learner.tools.export:main", "export the student as a LoRA, a pipeline or a file for ComfyUI"),
    "import": ("learner.tools.import_weights:main", "turn a LoRA, or released RTDMD adapters, into the start of a run"),
    "prompts": (
        "reward_servers.prompt_files:main",
        "make the prompt files that the run files of published models read",
    ),
    "control": ("learner.tools.control:main", "pause, continue, stop or scale a running run"),
    "track": ("learner.tools.track:main", "send a run to TensorBoard, Weights & Biases, trackio or MLflow"),
    "watch": ("learner.records.live_page:main", "show a run in the browser, while it trains or afterwards"),
    "compare": ("learner.records.compare:main", "write one page that compares runs"),
    "report": ("learner.records.report:main", "rewrite the report of a run"),
    "serve": ("reward_servers.main:main", "serve a reward over HTTP (also `python -m reward_servers`)"),
    "score": ("reward_servers.score_images:main", "score image files with a running reward server"),
    "convert": ("reward_servers.convert:main", "convert a published reward checkpoint to a model directory"),
}
"""Each name maps to the path of its `main(arguments) -> exit status` and to its description."""

COMPLETION = """\
_rtdmd() {{
    local words
    if ((COMP_CWORD == 1)); then
        words="{names} completion"
    else
        words=$(rtdmd "${{COMP_WORDS[1]}}" --help 2>/dev/null | grep -oE -- '--[a-zA-Z0-9_.-]+' | sort -u)
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    ((${{#COMPREPLY[@]}})) || compopt -o default
}}
complete -F _rtdmd rtdmd"""
"""Completion script for bash, and for zsh after `bashcompinit`."""


def main() -> int:
    """Return the command's exit status, or 2 when there is no such command."""
    with lasting_output():
        return _main()


def _main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "completion":
        print(COMPLETION.format(names=" ".join(COMMANDS)))
        return 0
    if name not in COMMANDS:
        print(f"error: rtdmd {name}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _loaded(COMMANDS[name][0])(rest)


def _loaded(path: str) -> Main:
    module, _, function = path.partition(":")
    command: Main = vars(import_module(module))[function]
    return command


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rtdmd COMMAND [OPTIONS]      rtdmd COMMAND --help explains a command",
            "",
            *lines,
            "",
            'Completion for bash and zsh: eval "$(rtdmd completion)"',
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
