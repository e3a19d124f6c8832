"""Make the prompt files that the run files of the published models read: `rtdmd prompts KIND FILE`.

    rtdmd prompts pickscore FILE               data/pickscore_train.txt    one prompt on each line
    rtdmd prompts geneval FILE                 data/geneval_train.jsonl    {"prompt": ..., "tag": ..., "include": [...]}
    rtdmd prompts geneval FILE --evaluation    data/evaluation.jsonl       the same, held out
    rtdmd prompts geneval2 FILE                data/geneval2.jsonl         {"prompt": ..., "vqa_list": ...}, a benchmark

FILE is yours: the authors' `dataset/pickscore` and `dataset/geneval` (the folder or a file in it), GenEval's
`evaluation_metadata.jsonl`, GenEval 2's `geneval2_data.jsonl`, or Pick-a-Pic as .txt, .jsonl or .parquet.
`hub:ORGANISATION/NAME/PATH` downloads one file of a dataset from the Hugging Face hub. The metadata of GenEval and
GenEval 2 is checked with the rules that score it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.command import exit_status, user_path
from common.errors import ConfigError, PromptError, RewardRejected
from common.hub_errors import not_given
from common.prompts import load_prompts
from common.rewards.api import Metadata
from common.types import Prompt
from common.visible_text import printable, trimmed
from common.whole_files import whole_files
from reward_servers.options import USAGE_ERROR
from reward_servers.scorers.geneval.rules import TAGS, parse_task
from reward_servers.scorers.vlm_judge.atoms import parse_atoms

PICKSCORE, GENEVAL, GENEVAL2 = KINDS = ("pickscore", "geneval", "geneval2")
DATA = Path("data")
TRAIN_FILES = {PICKSCORE: DATA / "pickscore_train.txt", GENEVAL: DATA / "geneval_train.jsonl"}
BENCHMARK_FILE = DATA / "geneval2.jsonl"
BENCHMARKS = {GENEVAL: "GenEval", GENEVAL2: "GenEval 2"}
EVALUATION_FILE = DATA / "evaluation.jsonl"
"""The files that deploy/runs/cold_start_*.yaml and rtdmd_*.yaml name."""
IN_FOLDER = {PICKSCORE: "train.txt", GENEVAL: "train_metadata.jsonl", GENEVAL2: "geneval2_data.jsonl"}
EVALUATION_IN_FOLDER = "test_metadata.jsonl"
"""Names of the files in the folders of RTDMD's authors."""
HUB = "hub:"
CAPTION = "caption"
"""Pick-a-Pic's column of prompts in parquet."""


def main(arguments: list[str] | None = None) -> int:
    """0 when the file was written, else 2 with one line on stderr."""
    options = _build_parser().parse_args(arguments)

    def write() -> None:
        for line in write_prompts(options):
            print(line, flush=True)

    return exit_status(write, prefix="rtdmd prompts", failed=USAGE_ERROR, place=options.out)


def write_prompts(options: argparse.Namespace) -> Iterator[str]:
    """Write the file of these options; yield lines that say what is in it.

    Raises:
        PromptError: the source is missing, has an empty line, or a prompt that cannot be used.
        ConfigError: the file to write is there already, or an option does not belong to this kind.
    """
    evaluation = options.evaluation
    if evaluation and options.kind != GENEVAL:
        raise ConfigError("--evaluation belongs to geneval: data/evaluation.jsonl needs GenEval's metadata")
    out: Path = options.out or (EVALUATION_FILE if evaluation else TRAIN_FILES.get(options.kind, BENCHMARK_FILE))
    endings = (".txt", ".jsonl") if options.kind == PICKSCORE else (".jsonl",)
    if out.suffix.lower() not in endings:
        raise ConfigError(f"--out {out}: {options.kind} is written as {' or '.join(endings)}")
    if out.exists():
        raise ConfigError(f"{out} is there already: remove it, or name another file with --out")
    source = _source(options.file, EVALUATION_IN_FOLDER if evaluation else IN_FOLDER[options.kind])
    _require_no_empty_line(source)
    prompts = _pickscore(source, options.column) if options.kind == PICKSCORE else _checked(source, options.kind)
    kept, repeated = (prompts, 0) if options.keep_duplicates else _distinct(prompts)
    held_out = {prompt.text for path in options.without for prompt in load_prompts(path)}
    left = [prompt for prompt in kept if prompt.text not in held_out]
    if not left:
        raise PromptError(f"{printable(source)}: every prompt of it is in the files of --without: nothing is left")
    _write(left, out)
    yield f"{printable(out)}: {len(left)} prompts of {len(prompts)} in {printable(source)}"
    if repeated:
        yield f"  {repeated} duplicates removed (--keep-duplicates keeps them)"
    if options.without:
        yield f"  {len(kept) - len(left)} removed that are in {', '.join(map(printable, options.without))}"
    if options.kind == GENEVAL:
        yield from _by_tag(prompts, left)
        yield from _overlap(left, TRAIN_FILES[GENEVAL].name if evaluation else EVALUATION_FILE.name, out.parent)


def _source(file: str, name_in_folder: str) -> Path:
    """The local file that FILE means; one of the hub is downloaded."""
    if not file:  # a variable that is not set; `Path` would take the current directory
        raise PromptError("FILE is empty: name a prompt file")
    if not file.startswith(HUB):
        path = user_path(file)
        return path / name_in_folder if path.is_dir() else path
    organisation, _, rest = file.removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    if not (organisation and name and inside):
        raise PromptError(f"{file}: name one file of a dataset: {HUB}ORGANISATION/NAME/PATH")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{organisation}/{name}", inside, repo_type="dataset"))
    except Exception as error:  # the hub's client raises a different class for each kind of failed download
        raise PromptError(f"{file}: {not_given(error)}") from error


def _require_no_empty_line(path: Path) -> None:
    """PromptError at the first empty line: a prompt may be missing there, or cut in two."""
    if path.suffix.lower() not in (".txt", ".jsonl") or not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not trimmed(line):
                raise PromptError(f"{printable(path)}: line {number} is empty: remove it, or write the prompt there")


def _pickscore(path: Path, column: str | None) -> list[Prompt]:
    """Texts alone; a prompt of several lines becomes one line."""
    if path.suffix.lower() == ".txt":
        if column is not None:
            raise ConfigError(f"--column {column}: a .txt file has no columns")
        return load_prompts(path)
    default = CAPTION if path.suffix.lower() == ".parquet" else "prompt"
    return [Prompt(prompt.index, " ".join(prompt.text.split()), {}) for prompt in load_prompts(path, column or default)]


def _checked(path: Path, kind: str) -> list[Prompt]:
    """Prompts with metadata that the benchmark's rules accept."""
    prompts = load_prompts(path)
    parse: Callable[[Metadata], object] = parse_task if kind == GENEVAL else parse_atoms
    for prompt in prompts:
        try:
            parse(prompt.metadata)
        except RewardRejected as error:
            raise PromptError(
                f'{printable(path)}: prompt {prompt.index + 1} ("{prompt.text[:60]}"): {error}: {BENCHMARKS[kind]} '
                "cannot score it"
            ) from error
    return prompts


def _distinct(prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """The first of each text and metadata, and the number of the others."""
    first = {(prompt.text, json.dumps(prompt.metadata, sort_keys=True)): prompt for prompt in reversed(prompts)}
    kept = sorted(first.values(), key=lambda prompt: prompt.index)
    return kept, len(prompts) - len(kept)


def _write(prompts: Sequence[Prompt], out: Path) -> None:
    """Write the file and read it as a run will, before it gets its name."""
    plain = out.suffix.lower() == ".txt"
    records = [{"prompt": prompt.text, **prompt.metadata} for prompt in prompts]
    lines = [str(record["prompt"]) if plain else json.dumps(record, ensure_ascii=False) for record in records]
    with whole_files(out.parent) as folder:
        (folder / out.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            read = [prompt.text for prompt in load_prompts(folder / out.name)]
        except PromptError as error:
            reason = str(error).partition(f"{out.name}: ")[2]
            raise PromptError(f"{out} cannot hold every prompt: {reason}; or write .jsonl with --out") from error
        if read != [prompt.text for prompt in prompts]:
            raise PromptError(f"{out} cannot hold every prompt as one line: write .jsonl with --out")


def _by_tag(before: Sequence[Prompt], after: Sequence[Prompt]) -> Iterator[str]:
    """Prompts per tag: how often a run draws each kind of task."""
    counts = [Counter(str(prompt.metadata["tag"]) for prompt in prompts) for prompts in (before, after)]
    for tag in TAGS:
        if counts[0][tag]:
            share, source = counts[1][tag] / len(after), counts[0][tag] / len(before)
            yield f"  {tag}: {counts[1][tag]}, {share:.1%} (in the source {source:.1%})"


def _overlap(prompts: Sequence[Prompt], other: str, folder: Path) -> Iterator[str]:
    """Say whether the other prompt file of the same folder shares prompts: evaluations must not be trained on."""
    path = folder / other
    if path.is_file():
        shared = {prompt.text for prompt in prompts} & {prompt.text for prompt in load_prompts(path)}
        note = f": make the training file with --without {EVALUATION_FILE}" if shared else ""
        yield f"  {len(shared)} of its prompts are also in {printable(path)}{note}"


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtdmd prompts",
        description="Make the prompt files that deploy/runs/cold_start_*.yaml and rtdmd_*.yaml read.",
    )
    parser.add_argument(
        "kind", choices=KINDS, help="pickscore: prompts of stage 1. geneval: of stage 2. geneval2: a benchmark"
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help=f".txt, .jsonl or .parquet, a folder of the authors, or {HUB}ORGANISATION/NAME/PATH",
    )
    parser.add_argument(
        "--evaluation", action="store_true", help=f"geneval: write {EVALUATION_FILE}, the held-out prompts"
    )
    parser.add_argument("--column", metavar="NAME", help=f"pickscore: key or column of the text (.parquet: {CAPTION})")
    parser.add_argument(
        "--without",
        type=user_path,
        action="append",
        default=[],
        metavar="FILE",
        help="leave out the prompts of this file",
    )
    parser.add_argument("--keep-duplicates", action="store_true", help="keep prompts that are there several times")
    parser.add_argument(
        "--out", type=user_path, metavar="FILE", help="file to write (default: what the run files name)"
    )
    return parser
