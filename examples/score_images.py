"""Score images with nothing but httpx, msgpack, numpy and Pillow: python score_images.py URL PROMPT IMAGE...

An array travels as msgpack extension 1: [dtype, shape, raw buffer]. Images of one request have one size.
"""

import os
import sys

import httpx
import msgpack
import numpy as np
from PIL import Image


def encode(array):
    return msgpack.ExtType(1, msgpack.packb([array.dtype.name, array.shape, array.tobytes()]))


def decode(_, content):
    dtype, shape, buffer = msgpack.unpackb(content)
    return np.frombuffer(buffer, dtype).reshape(shape)


url, prompt, *paths = sys.argv[1:]
images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
body = msgpack.packb({"images_BHWC": images, "prompts": [prompt] * len(paths), "metadata": []}, default=encode)
headers = {"x-deadline-seconds": "30", "authorization": f"Bearer {os.environ.get('REWARD_SERVER_TOKEN', 'none')}"}
# A server on this machine must never be asked through the proxies of the environment: they would get the token.
local = httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
answer = httpx.post(f"{url}/v1/score", content=body, headers=headers, timeout=31, trust_env=not local)
print(msgpack.unpackb(answer.raise_for_status().content, ext_hook=decode)["scores_B"])
