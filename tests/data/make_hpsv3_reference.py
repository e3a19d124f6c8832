"""Score the tiny HPSv3 with the published class, run on the transformers it pins; writes hpsv3_reference.json.

Not run by the tests, which read its result: it needs packages that do not go together with this project's.

    pip download --no-deps hpsv3==1.0.0
    pip install --no-deps --target OLD transformers==4.45.2 tokenizers==0.20.3 huggingface_hub==0.25.2
    python -c "from tests.tiny_vision import write_hpsv3; from pathlib import Path; write_hpsv3(Path('TINY'))"
    PYTHONPATH=OLD python tests/data/make_hpsv3_reference.py hpsv3-1.0.0-py3-none-any.whl TINY

The class is compiled alone, out of the wheel: its module imports the whole training stack. Its processor is built from
the parts of transformers 4.45.2, with the chat template of Qwen2-VL.
"""

from __future__ import annotations

import ast
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

PIXELS = 256 * 28 * 28
PROMPTS = ["a red cat", "naïve café — 東京, and a dog", "x"]
SIZES = [(64, 64), (40, 100), (300, 211)]
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


def published_class(package: Path) -> type:
    with zipfile.ZipFile(package) as archive:
        module = ast.parse(archive.read("hpsv3/model/qwen2vl_trainer.py"))
    wanted = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Qwen2VLRewardModelBT"]
    names = {"torch": torch, "nn": torch.nn, "Qwen2VLForConditionalGeneration": Qwen2VLForConditionalGeneration}
    exec("from typing import *", names)
    exec(compile(ast.Module(wanted, []), str(package), "exec"), names)
    return names["Qwen2VLRewardModelBT"]


def score(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, image: Image.Image, text: str) -> float:
    height, width = smart_resize(image.height, image.width, 28, PIXELS, PIXELS)
    pixels = Qwen2VLImageProcessor()(image.resize((width, height), Image.BICUBIC), return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // 4
    conversation = CONVERSATION.format(image="<|image_pad|>" * count, text=text)
    ids = tokenizer(conversation, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return float(model(return_dict=True, **ids, **pixels)["logits"][0, 0])


def main(package: Path, directory: Path) -> None:
    prompt = json.loads((directory / "prompt.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig.from_pretrained(directory, vocab_size=len(tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    special = tokenizer.convert_tokens_to_ids(["<|Reward|>"])
    model = published_class(package)(
        config, output_dim=2, reward_token="special", special_token_ids=special, rm_head_type="ranknet"
    )
    model.load_state_dict(load_file(directory / "HPSv3.safetensors"), strict=True)
    model.eval()
    entries = []
    for (height, width), text in zip(SIZES, PROMPTS, strict=True):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        whole = prompt["instruction"].format(text_prompt=text) + prompt["request"]
        value = score(model, tokenizer, Image.fromarray(pixels), whole)
        assert math.isfinite(value)
        entries.append({"height": height, "width": width, "prompt": text, "score": value})
    target = Path(__file__).with_name("hpsv3_reference.json")
    target.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
