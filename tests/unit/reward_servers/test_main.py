"""Errors of a server that cannot start, and the address that it registers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, ModelError
from reward_servers import main, score_images
from reward_servers.loading import ScorerSettings, load, remedy, scorer_class
from reward_servers.main import open_for_requests, server_info
from reward_servers.models import loaded_models
from reward_servers.options import ServerSettings, build_parser, check
from reward_servers.scorers import BUILT_IN_SCORERS, MOVED_SCORERS
from reward_servers.scorers.base import ScorerLimits
from reward_servers.scoring import Served
from tests.helpers.toy_scorers import BrightnessScorer

IDENTITIES = {
    "aesthetic": "reward_servers.scorers.aesthetic:AestheticScorer",
    "clipscore": "reward_servers.scorers.clipscore:ClipScoreScorer",
    "geneval": "reward_servers.scorers.geneval:GenevalScorer",
    "geneval_parts": "reward_servers.scorers.geneval:GenevalPartsScorer",
    "geneval2": "reward_servers.scorers.vlm_judge.geneval2:Geneval2Scorer",
    "geneval2_parts": "reward_servers.scorers.vlm_judge.geneval2:Geneval2PartsScorer",
    "hps": "reward_servers.scorers.hps:HpsScorer",
    "hpsv3": "reward_servers.scorers.hpsv3:HpsV3Scorer",
    "image_reward": "reward_servers.scorers.image_reward:ImageRewardScorer",
    "ocr": "reward_servers.scorers.ocr:OcrScorer",
    "pickscore": "reward_servers.scorers.pickscore:PickScoreScorer",
    "unified_reward": "reward_servers.scorers.vlm_judge.unified_reward:UnifiedRewardScorer",
    "vlm_judge": "reward_servers.scorers.vlm_judge:VlmJudgeScorer",
}
"""The class path that checkpoints hold for each built-in scorer, wherever its class is now."""


def settings(*arguments: str) -> ServerSettings:
    return check(build_parser().parse_args(list(arguments)))


@pytest.mark.parametrize(("name", "extra"), [("ocr", "ocr"), ("geneval", "geneval"), ("geneval_parts", "geneval")])
def test_a_scorer_that_is_not_installed_says_how_to_install_it(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError("No module named 'rapidocr'")

    monkeypatch.setattr("reward_servers.loading.import_own", missing)
    with pytest.raises(ConfigError) as caught:
        scorer_class(name)
    assert str(caught.value) == f"--scorer {name}: No module named 'rapidocr'; pip install -e '.[{extra}]'"


def test_what_a_library_misses_when_a_model_is_built_is_one_line() -> None:
    class Unbuildable(BrightnessScorer):
        @classmethod
        def load(cls, model_dir: Path | None, device: str) -> Self:
            raise ImportError("\nMask2Former requires the scipy library\nbut it was not found" + " at all" * 200)

    with pytest.raises(ConfigError) as caught:
        load(Unbuildable, ScorerSettings("geneval", None, None), "cpu")
    assert str(caught.value).startswith("--scorer geneval: Mask2Former requires the scipy library but it was not")
    assert str(caught.value).endswith("; pip install -e '.[geneval]'")
    assert len(str(caught.value)) < 400


def test_every_built_in_scorer_has_its_extra() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {name.removesuffix("_parts") for name in BUILT_IN_SCORERS} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", BUILT_IN_SCORERS)
def test_a_built_in_scorer_is_found_and_identified_by_the_class_path_that_checkpoints_hold(name: str) -> None:
    pytest.importorskip("transformers")
    kind = scorer_class(name)
    assert scorer_class(IDENTITIES[name]) is kind
    unloaded = kind.__new__(kind)
    unloaded.score_range = (0.0, 1.0)  # Some scorers know it only when they are loaded.
    assert server_info("a", unloaded, reproducible=False).implementation == IDENTITIES[name]


def test_only_a_moved_scorer_is_identified_by_another_class_path_than_its_own() -> None:
    moved = {MOVED_SCORERS[IDENTITIES[name]]: name for name in BUILT_IN_SCORERS if IDENTITIES[name] in MOVED_SCORERS}
    assert moved == {path: name for name, path in BUILT_IN_SCORERS.items() if path != IDENTITIES[name]}
    assert len(moved) == len(MOVED_SCORERS)


def test_a_subclass_of_a_moved_scorer_is_another_reward() -> None:
    pytest.importorskip("transformers")
    kind = type("Stricter", (scorer_class("geneval"),), {"__module__": "mine.rewards"})
    assert server_info("a", kind.__new__(kind), reproducible=False).implementation == "mine.rewards:Stricter"


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (("--host", "::1"), "http://[::1]:8000"),
        (("--host", "127.0.0.1"), "http://127.0.0.1:8000"),
        (("--advertise-url", "http://gpu-3:80/"), "http://gpu-3:80"),
    ],
)
def test_a_server_is_listed_under_an_address_that_is_one(
    arguments: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: dict[str, str] = {}

    @asynccontextmanager
    async def registered(redis_url: str | None, urls: Mapping[str, str], token: str | None) -> AsyncIterator[None]:
        listed.update(urls)
        yield

    monkeypatch.setattr(main, "registered", registered)
    info = server_info("b", BrightnessScorer(), reproducible=False)
    served: Any = Served("/b", info, None, None, 0.5, ScorerLimits())

    async def run() -> None:
        async with open_for_requests(settings("--scorer", "hps", *arguments), 8000, [served]):
            pass

    asyncio.run(run())
    assert listed == {"b": f"{url}/b"}


def test_an_image_that_is_a_bomb_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert score_images.main(["--url", "http://127.0.0.1:1", str(path), "--prompt", "a"]) == 2
    errors = capsys.readouterr().err
    assert (len(errors.splitlines()), "bomb.png: an image is too large" in errors) == (1, True)


def test_a_token_is_not_given_to_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(path)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "sesame")
    proxied: list[bool] = []
    post = httpx.Client.post

    def noted(client: httpx.Client, url: str, **options: Any) -> httpx.Response:
        proxied.append(client.trust_env)
        return post(client, url, **options)

    monkeypatch.setattr(httpx.Client, "post", noted)
    assert score_images.main(["--url", "http://127.0.0.1:1", str(path), "--prompt", "a"]) == 2
    assert proxied == [False]


def test_a_checkpoint_file_for_a_model_directory_is_told_how_to_convert_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "HPS_v2.1_compressed.pt"
    checkpoint.write_bytes(b"weights")
    scorer = "tests.helpers.toy_scorers:BrightnessScorer"
    settings = check(build_parser().parse_args(["--scorer", scorer, "--model", str(checkpoint)]))
    with (
        pytest.raises(ModelError, match=r"compressed\.pt is not a directory, but a file: .* reward_servers\.convert"),
        loaded_models(settings),
    ):
        pass
    settings = check(build_parser().parse_args(["--scorer", scorer, "--model", str(tmp_path / "none")]))
    with pytest.raises(ModelError, match=r"none is not a directory$"), loaded_models(settings):
        pass


def test_a_name_of_the_hub_is_told_from_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`hf download xswu/HPSv2 --local-dir DIR`" in remedy(Path("xswu/HPSv2"))
    (tmp_path / "models").mkdir()
    assert remedy(Path("models/hps")) == remedy(Path("/xswu/HPSv2")) == remedy(Path("hps")) == ""
