"""verl-omni's HTTP scorer client, against a server with --accept-flow-grpo: python examples/verl_omni_client.py URL

    python -m reward_servers --scorer hps --model zoo/weights/hps --accept-flow-grpo --port 8101

`compute_score` has the shape of verl_omni/utils/reward_score/http_scorer_client.py (verl-project/verl-omni): a picture
[C, H, W] and its prompt, all of a batch at once with `asyncio.gather`. The server makes batches of them again. In
verl-omni itself set `reward.reward_functions.NAME.server_url=URL`.
"""

import asyncio
import io
import pickle
import sys

import httpx
from circle_policy import token_headers, train
from PIL import Image


async def compute_score(session, solution_image, ground_truth, server_url):
    buffer = io.BytesIO()
    Image.fromarray(solution_image.transpose(1, 2, 0)).save(buffer, format="JPEG")
    payload = pickle.dumps({"images": [buffer.getvalue()], "prompts": [ground_truth], "metadata": {}})
    response = await session.post(server_url, content=payload)
    if response.is_error:
        raise RuntimeError(f"status {response.status_code} {response.text}")
    return {"score": float(pickle.loads(response.content)["scores"][0])}


async def compute_batch(images, prompts, url):
    async with httpx.AsyncClient(headers=token_headers(), timeout=120) as session:
        pairs = zip(images.transpose(0, 3, 1, 2), prompts, strict=True)
        answers = await asyncio.gather(*(compute_score(session, *pair, url) for pair in pairs))
    return [answer["score"] for answer in answers]


if __name__ == "__main__":
    train(lambda images, prompts: asyncio.run(compute_batch(images, prompts, sys.argv[1])))
