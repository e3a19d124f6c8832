"""Run by the `hpsv2` environment's own interpreter: `python hps_reference.py FOLDER` writes FOLDER/scores.json.

Scores are what the untouched package's `score()` returns. Only what it would download is put in its way: its model is
built from a small architecture, registered under the name it asks for, and its checkpoint is a local file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path

import torch
from PIL import Image


def let_torchvision_import() -> None:
    """A torchvision built for CUDA cannot load its operators under a CPU torch, and then fails to import.

    Declaring the operators that it expects to find is enough: nothing here calls them.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "torchvision is not installed"
    assert spec.origin is not None, "torchvision has no folder"
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def without_turtle() -> None:
    """The package imports a name from `turtle`, by mistake: that needs Tk, which servers lack."""
    turtle = types.ModuleType("turtle")
    vars(turtle)["forward"] = None
    sys.modules["turtle"] = turtle


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    let_torchvision_import()
    without_turtle()
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    # Replaces the package's own entry of that name.
    (folder / "ViT-H-14.json").write_text(json.dumps(job["architecture"]))
    open_clip.add_model_config(folder / "ViT-H-14.json")
    # The arguments are those of img_score.initialize_model, but for the weights it would download and then overwrite.
    model, _, preprocess = open_clip.create_model_and_transforms(
        "ViT-H-14",
        None,
        precision="amp",
        device=img_score.device,
        light_augmentation=True,
        aug_cfg={},
        output_dict=True,
    )
    img_score.model_dict |= {"model": model, "preprocess_val": preprocess}
    scores = {}
    for version, checkpoint in job["checkpoints"].items():
        scores[version] = [
            float(img_score.score(Image.open(folder / pair["image"]), pair["prompt"], cp=str(folder / checkpoint))[0])
            for pair in job["pairs"]
        ]
    (folder / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
