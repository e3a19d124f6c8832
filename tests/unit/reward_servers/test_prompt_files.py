"""`rtdmd prompts`: what it writes is what the run files name, and what they and GenEval's rules read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.prompts import load_prompts
from reward_servers.prompt_files import EVALUATION_FILE, TRAIN_FILES, main
from reward_servers.scorers.geneval.rules import parse_task

PROJECT_ROOT = Path(__file__).resolve().parents[3]
COW = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
CLOCKS = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
}
LEFT = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a cup left of a dog",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    return capsys.readouterr().err.strip()


def test_the_defaults_are_what_the_run_files_name() -> None:
    named: dict[str, set[str]] = {"train": set(), "evaluation": set()}
    for pattern in ("cold_start_*.yaml", "rtdmd_*.yaml"):
        for path in (PROJECT_ROOT / "deploy/runs").glob(pattern):
            prompts = yaml.safe_load(path.read_text())["prompts"]
            for key, values in named.items():
                values.add(prompts[key])
    assert named["train"] == {str(path) for path in TRAIN_FILES.values()}
    assert named["evaluation"] == {str(EVALUATION_FILE)}


def test_pickscore_is_written_without_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset/pickscore").mkdir(parents=True)
    (tmp_path / "dataset/pickscore/train.txt").write_text("a cat \nun dîner\na cat\n", encoding="utf-8")
    assert main(["pickscore", "dataset/pickscore"]) == 0
    assert Path("data/pickscore_train.txt").read_text(encoding="utf-8") == "a cat\nun dîner\n"
    printed = capsys.readouterr().out
    assert "data/pickscore_train.txt: 2 prompts of 3 in dataset/pickscore/train.txt" in printed
    assert "1 duplicates removed" in printed
    assert "is there already" in refused(capsys, "pickscore", "dataset/pickscore")
    assert main(["pickscore", "dataset/pickscore", "--keep-duplicates", "--out", "all.txt"]) == 0
    assert len(load_prompts(Path("all.txt"))) == 3


def test_the_captions_of_pick_a_pic_are_read_from_parquet_alone(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"jpg_0": [b"\xff", b"\xfe"], "caption": ["a cat\nin the rain", "a dog"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert main(["pickscore", "train.parquet"]) == 0
    assert Path("data/pickscore_train.txt").read_text() == "a cat in the rain\na dog\n"


def test_a_column_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a cat"], "rank": [1]}), tmp_path / "train.parquet")
    message = refused(capsys, "pickscore", "train.parquet")
    assert message.endswith('train.parquet has no column "caption"; its columns are text, rank')
    assert main(["pickscore", "train.parquet", "--column", "text"]) == 0
    jsonl(tmp_path / "train.jsonl", [{"caption": "a cat", "likes": float(3)}])
    assert 'line 1 has no "prompt" text' in refused(capsys, "pickscore", "train.jsonl", "--out", "b.txt")
    assert main(["pickscore", "train.jsonl", "--column", "caption", "--out", "b.txt"]) == 0
    assert Path("b.txt").read_text() == "a cat\n"


def test_geneval_keeps_the_metadata_that_its_rules_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "geneval").mkdir()
    jsonl(tmp_path / "geneval/train_metadata.jsonl", [COW, CLOCKS, COW, LEFT])
    jsonl(tmp_path / "geneval/test_metadata.jsonl", [LEFT])
    assert main(["geneval", "geneval"]) == 0
    prompts = load_prompts(Path("data/geneval_train.jsonl"))
    assert [prompt.text for prompt in prompts] == [COW["prompt"], CLOCKS["prompt"], LEFT["prompt"]]
    assert [parse_task(prompt.metadata).tag for prompt in prompts] == ["single_object", "counting", "position"]
    assert prompts[2].metadata == {key: value for key, value in LEFT.items() if key != "prompt"}
    assert "single_object: 1, 33.3% (in the source 50.0%)" in capsys.readouterr().out

    assert main(["geneval", "geneval", "--evaluation"]) == 0
    assert "1 of its prompts are also in data/geneval_train.jsonl" in capsys.readouterr().out
    Path("data/geneval_train.jsonl").unlink()
    assert main(["geneval", "geneval", "--without", "data/evaluation.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "1 removed that are in data/evaluation.jsonl" in printed
    assert "0 of its prompts are also in data/evaluation.jsonl" in printed


def test_a_table_written_as_jsonl_is_geneval_without_its_nulls(tmp_path: Path) -> None:
    bench = {"class": "bench", "count": 1}
    filled = {"prompt": "a bench", "tag": "single_object", "include": [bench | {"color": None, "position": None}]}
    jsonl(tmp_path / "filled.jsonl", [filled | {"exclude": None}])
    assert main(["geneval", "filled.jsonl"]) == 0
    written = json.loads(Path("data/geneval_train.jsonl").read_text())
    assert written == {"prompt": "a bench", "tag": "single_object", "include": [bench]}


def test_one_text_with_two_tasks_is_no_duplicate(tmp_path: Path) -> None:
    jsonl(tmp_path / "two.jsonl", [COW, COW | {"include": [{"class": "cow", "count": 2}]}])
    assert main(["geneval", "two.jsonl"]) == 0
    assert len(load_prompts(Path("data/geneval_train.jsonl"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pickscore", ""], "FILE is empty: name a prompt file"),
        (["pickscore", "missing.txt"], r"missing\.txt: no such prompt file"),
        (["pickscore", "empty_line.txt"], r"empty_line\.txt: line 2 is empty: remove it"),
        (["pickscore", "good.txt", "--evaluation"], "--evaluation belongs to geneval"),
        (["pickscore", "good.txt", "--column", "text"], r"a \.txt file has no columns"),
        (["pickscore", "good.txt", "--out", "x.parquet"], r"pickscore is written as \.txt or \.jsonl"),
        (["pickscore", "good.txt", "--without", "good.txt"], "nothing is left"),
        (["pickscore", "json.jsonl"], r"cannot hold every prompt: line 1 is JSON.*; or write \.jsonl with --out"),
        (["geneval", "good.txt"], r"prompt 1 \(\"a cat\"\): .*metadata\['tag'\] is None.*GenEval cannot score it"),
        (["geneval", "good.txt", "--out", "x.txt"], r"geneval is written as \.jsonl"),
        (["geneval", "hub:OWNER/NAME"], "name one file of a dataset: hub:ORGANISATION/NAME/PATH"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.txt").write_text("a cat\n")
    (tmp_path / "empty_line.txt").write_text("a cat\n \na dog\n")
    jsonl(tmp_path / "json.jsonl", [{"prompt": '{"a": "cat"}'}])
    assert re.search(message, refused(capsys, *words))
    assert not list(tmp_path.glob("data/*"))


def test_a_file_of_the_hub_is_downloaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, path: str, *, repo_type: str) -> str:
        asked.append((name, path, repo_type))
        return str(jsonl(tmp_path / "file.jsonl", [COW]))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert main(["geneval", "hub:OWNER/NAME/data/train.jsonl"]) == 0
    assert asked == [("OWNER/NAME", "data/train.jsonl", "dataset")]


def test_geneval2_is_written_with_its_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dogs = {"prompt": "two dogs", "atom_count": 2, "vqa_list": [["How many dogs are in the image?", "two"]]}
    assert main(["geneval2", str(jsonl(tmp_path / "geneval2_data.jsonl", [dogs]))]) == 0
    assert capsys.readouterr().out == f"data/geneval2.jsonl: 1 prompts of 1 in {tmp_path}/geneval2_data.jsonl\n"
    (prompt,) = load_prompts(tmp_path / "data/geneval2.jsonl")
    assert (prompt.text, prompt.metadata["vqa_list"]) == ("two dogs", dogs["vqa_list"])


def test_prompts_of_geneval_are_none_of_geneval2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "geneval2", str(jsonl(tmp_path / "a.jsonl", [COW])))
    assert 'prompt 1 ("a photo of a cow"): ' in error
    assert error.endswith("as the lines of geneval2_data.jsonl have: GenEval 2 cannot score it")
