"""Flow-GRPO's HTTP reward client, against a server with --accept-flow-grpo: python examples/flow_grpo_client.py URL

    python -m reward_servers --scorer hps --model zoo/weights/hps --accept-flow-grpo --port 8101

`remote_score` has the shape of flow_grpo/rewards.py (yifan123/flow_grpo): a factory of `fn(images, prompts, metadata)`
that sends pickles of JPEG files. In Flow-GRPO itself only the URL changes, and a token if the server has one. Send
prompts as a list: Flow-GRPO's unifiedreward_score_remote sends a numpy array, which no server should unpickle.
"""

import io
import pickle
import sys

import httpx
import numpy as np
from circle_policy import token_headers, train
from PIL import Image

BATCH_SIZE = 64


def remote_score(url):
    session = httpx.Client(headers=token_headers(), timeout=120)

    def fn(images, prompts, metadata):
        parts = int(np.ceil(len(images) / BATCH_SIZE))
        batches = zip(np.array_split(images, parts), np.array_split(prompts, parts), strict=True)
        scores = []
        for image_batch, prompt_batch in batches:
            files = []
            for image in image_batch:
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, format="JPEG")
                files.append(buffer.getvalue())
            data = {"images": files, "prompts": prompt_batch.tolist(), "metadata": metadata}
            response = session.post(url, content=pickle.dumps(data))
            if response.is_error:
                sys.exit(f"status {response.status_code} {response.text}")
            scores += pickle.loads(response.content)["scores"]
        return scores, {}

    return fn


if __name__ == "__main__":
    score = remote_score(sys.argv[1])
    train(lambda images, prompts: score(images, prompts, {})[0])
