"""Score picture files with nothing but httpx: python score_images.py URL PROMPT IMAGE...

The server reads PNG and JPEG, so this needs no picture library. URL/openapi.json has the faster route for arrays.
"""

import base64
import os
import sys
from pathlib import Path

import httpx

url, prompt, *paths = sys.argv[1:]
token = os.environ.get("REWARD_SERVER_TOKEN", "none").strip()
if not (token.isascii() and token.isprintable()):
    sys.exit("REWARD_SERVER_TOKEN has characters that no HTTP header can carry: use printable ASCII alone")
headers = {"x-deadline-seconds": "30", "authorization": f"Bearer {token}"}
# Requests to this machine, and the token with them, do not go through a proxy of the environment.
local = (host := httpx.URL(url).host).startswith("127.") or host in ("localhost", "::1", "0.0.0.0")
try:
    client = httpx.Client(headers=headers, timeout=31, trust_env=not local)
except (ImportError, OSError, ValueError, httpx.InvalidURL):  # the message may quote a proxy's password
    sys.exit("HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY or SSL_CERT_FILE cannot be used: change or unset it")
with client:
    for path in paths:
        content = base64.b64encode(Path(path).read_bytes()).decode()
        answer = client.post(f"{url}/score", json={"image_base64": content, "prompt": prompt})
        if answer.is_error:
            sys.exit(f"{path}: status {answer.status_code} {answer.text}")
        print(answer.json()["score"])
