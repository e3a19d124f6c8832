"""The judge's scores by transformers alone; run by the judge's own Python, which has the processor's dependencies.

python transformers_judge.py MODEL IMAGES.npy QUESTIONS.json  ->  [[ln P(yes), ln P(no)], ...] as JSON
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(model_path: str, images_path: str, questions_path: str) -> None:
    processor = AutoProcessor.from_pretrained(model_path)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).eval()
    answers = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    with open(questions_path, encoding="utf-8") as file:
        questions = json.load(file)
    found = []
    for image, question in zip(np.load(images_path), questions, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0, -1].log_softmax(-1)[answers].tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
