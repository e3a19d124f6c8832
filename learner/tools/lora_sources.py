"""Finds the LoRA file that a directory, a file or a name on the Hugging Face hub means."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from common.errors import ModelError
from common.hub_errors import not_given
from common.weight_names import ADAPTER_CONFIG
from learner.training.lora_file import LORA_FILE

PEFT_FILE, AVERAGED = "adapter_model.safetensors", "generator_ema.pt"
KNOWN = (PEFT_FILE, f"transformer/{PEFT_FILE}", LORA_FILE, AVERAGED)
"""Files of a directory, the first of which is taken. In a checkpoint of RTDMD's authors `transformer/` has the averaged
generator in safetensors, and `generator_ema.pt` the same in torch's own format.
"""
OF_HUB = (PEFT_FILE, ADAPTER_CONFIG, LORA_FILE, AVERAGED)
"""Downloaded of a hub name, from whatever folder; any other file must be named itself."""

SETTINGS = (ADAPTER_CONFIG, f"transformer/{ADAPTER_CONFIG}")
"""Where peft's settings lie, seen from a LoRA's file."""


def find_lora(source: str) -> Path:
    """The file that `source` means: a file, a directory, or ORGANISATION/NAME[/FOLDER or /FILE] on the hub.

    Raises:
        ModelError: there is none, the hub does not give it, or there are several and none is the obvious one.
    """
    if not source:  # a variable that is not set; `Path` would take the current directory
        raise ModelError("the name of a LoRA is empty: name a directory, a file, or ORGANISATION/NAME of the hub")
    path = Path(source).expanduser()
    if not path.exists():
        path = _of_hub(source)
    if path.is_file():
        return path
    known = [path / name for name in KNOWN if (path / name).is_file()]
    others = sorted(found for found in path.glob("*.safetensors") if found.is_file())
    if known or len(others) == 1:
        return (known or others)[0]
    inside = others or sorted(found for name in (PEFT_FILE, LORA_FILE, AVERAGED) for found in path.rglob(name))
    if inside:
        raise ModelError(
            f"{source} has several LoRA files: name those to import, in the order of training: "
            + ", ".join(f"{source.rstrip('/')}/{found.relative_to(path)}" for found in inside[:6])
        )
    raise ModelError(f"{source} has no LoRA in it: expected one of {', '.join(KNOWN)}, or one other .safetensors file")


def _of_hub(source: str) -> Path:
    """Download what a hub name means; return the directory or the file."""
    organisation, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    if not organisation or not name or organisation in (".", "..", "~"):
        raise ModelError(f"there is no {source}: name a directory, a file, or ORGANISATION/NAME of the hub")
    folder = f"{inside.rstrip('/')}/" if inside else ""
    if Path(inside).suffix:  # a file, and what states its scale
        wanted = [inside, *(str(Path(inside).parent / place) for place in SETTINGS)]
    else:
        wanted = [pattern for name in OF_HUB for pattern in _patterns(folder, name)]
    try:
        directory = Path(snapshot_download(f"{organisation}/{name}", allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a different class for each kind of failed download
        raise ModelError(f"there is no {source} here, and {not_given(error)}") from error
    if not (directory / inside).exists():
        raise ModelError(f"{organisation}/{name} on the hub has no {inside}: check the name")
    return directory / inside


def _patterns(folder: str, name: str) -> tuple[str, str]:
    return f"{folder}{name}", f"{folder}*/{name}"
