"""Stands in for vLLM's API server: a real HTTP server that speaks the part of its API that the judge uses.

To the first kind of question it says yes with the mean brightness of the picture it was sent as probability, to one
about quality with 0.25; a command word in a question makes it misbehave. Started as a program it takes vLLM's options
and listens on `--uds`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOKENS = {"yes": [7], "no": [8], "nothing": []}
WORDS = ("Yes", "yes", "one", "two", "three", "ten", "One", "Two", "Three", "1", "2", "3")
"""Further words of one token. Words have one also after a space; digits and the space before them stand alone."""
QUALITY = 0.25


class Handler(BaseHTTPRequestHandler):
    # HTTP/1.0: no connection outlives its answer, so a server that is shut down is gone for its clients as well.
    server: FakeServer | FakeSocketServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/v1/models":
            self._send(200, {"data": [{"id": "fake-judge"}]})
        elif self.path == "/version" and self.server.version:
            self._send(200, {"version": self.server.version})
        else:
            self._send_bytes(404, b"<html>\n<h1>404 Not Found</h1>\n</html>")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self._send(200, {"tokens": self.server.tokens.get(body["prompt"], tokens_of(body["prompt"]))})
        else:
            self._judge(body)

    def _judge(self, body: dict[str, Any]) -> None:
        image, text = body["messages"][0]["content"]
        url, question = image["image_url"]["url"], text["text"]
        self.server.requests.append(body)
        if "logprob_token_ids" not in body:
            self._reply(question)
            return
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))
        probability = QUALITY if "clean" in question else float(pixels.mean()) / 255
        values = [math.log(probability), math.log(1 - probability)]
        if "nan" in question:
            values[1] = math.nan
        if "impossible" in question:
            values = [-9999.0, -9999.0]
        if "slow" in question:
            self.server.release.wait(30)
        if "die" in question:
            print("out of memory, says the fake", file=sys.stderr, flush=True)
            os._exit(3)
        if "busy" in question:
            self._send(503, {"error": "engine is loading"})
        elif "refuse" in question:
            self._send(400, {"error": "prompt too long"})
        elif "junk" in question:
            self._send_bytes(200, b"<html>")
        elif self.server.probabilities:
            self._first_tokens(body["logprob_token_ids"])
        else:
            listed = [
                {"token": f"token_id:{token}", "logprob": value}
                for token, value in zip(body["logprob_token_ids"], values, strict=True)
            ]
            kept = listed[:1] if "missing" in question else listed
            self._send(200, {"choices": [{"logprobs": {"content": [{"top_logprobs": kept}]}}]})

    def _reply(self, question: str) -> None:
        """Reply with the text after the last "reply:" of a question; cut short after the word "endless"."""
        said = question.rpartition("reply:")[2].strip("]").replace("|", chr(10))
        ending = "length" if "endless" in question else "stop"
        self._send(200, {"choices": [{"message": {"content": said}, "finish_reason": ending}]})

    def _first_tokens(self, tokens: list[int]) -> None:
        listed = [
            {"token": f"token_id:{token}", "logprob": math.log(self.server.probabilities.get(token, 0.0) or 1e-300)}
            for token in tokens
        ]
        self._send(200, {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]})

    def _send(self, status: int, body: object) -> None:
        self._send_bytes(status, json.dumps(body).encode())

    def _send_bytes(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def tokens_of(text: str) -> list[int]:
    """A known word has one token; any other text one for each character."""
    known = [*WORDS, *(f" {word}" for word in WORDS if not word.isdigit())]
    if text in TOKENS:
        return TOKENS[text]
    return [100 + known.index(text)] if text in known else [ord(letter) for letter in text]


class FakeServer(ThreadingHTTPServer):
    """On a loopback port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.version = "0.32.0"
        self.tokens: dict[str, list[int]] = {}
        self.probabilities: dict[int, float] = {}
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeSocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """On a socket file."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(path, Handler)
        self.version = "0.32.0"
        self.tokens: dict[str, list[int]] = {}
        self.probabilities: dict[int, float] = {}
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.release = threading.Event()


def write_python(path: Path) -> Path:
    """An executable that takes the place of the Python of vLLM's environment and runs this file instead."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o755)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--write-pid")
    parser.add_argument("--fail", action="store_true")
    options, _ = parser.parse_known_args()
    if options.fail:
        sys.exit("this model is not for me, says the fake")
    if options.write_pid:
        Path(options.write_pid).write_text(str(os.getpid()))
    FakeSocketServer(options.uds).serve_forever()


if __name__ == "__main__":
    main()
