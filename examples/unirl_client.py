"""UniRL's remote reward client, against any reward server: python examples/unirl_client.py URL NAME

    python -m reward_servers --scorer hps --model zoo/weights/hps --port 8101

`RemoteReward` has the shape of unirl/reward/remote.py (Tencent-Hunyuan/UniRL): it asks /health for the reward's name,
sends requests with identities to /score, and reads a map of named numbers for each picture. In UniRL itself set
`base_url` to URL and `required_rewards` to (NAME,).
"""

import base64
import io
import sys
import uuid

import httpx
from circle_policy import token_headers, train
from PIL import Image


class RemoteReward:
    def __init__(self, base_url, name):
        self.session = httpx.Client(base_url=base_url, headers=token_headers(), timeout=300)
        self.name = name
        served = self.session.get("/health").raise_for_status().json()["rewards"]
        if name not in served:
            sys.exit(f"{base_url} serves {sorted(served)}, not {name}")

    def compute_rewards(self, images, prompts):
        requests = []
        for image, prompt in zip(images, prompts, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=95)
            turn = {"text": prompt, "image_b64": base64.b64encode(buffer.getvalue()).decode("ascii")}
            identity = {"request_id": str(uuid.uuid4()), "sample_id": None, "group_id": prompt, "scorer_version": None}
            requests.append({"history": [turn], "required_rewards": [self.name], "metadata": None} | identity)
        response = self.session.post("/score", json={"protocol_version": "1", "requests": requests})
        if response.is_error:
            sys.exit(f"status {response.status_code} {response.text}")
        answer = response.json()
        for sent, returned in zip(requests, answer["identities"], strict=True):
            assert returned["request_id"] == sent["request_id"], "the identity of a picture was changed"
        return [next(iter(result[self.name].values())) for result in answer["results"]]


if __name__ == "__main__":
    train(RemoteReward(*sys.argv[1:3]).compute_rewards)
