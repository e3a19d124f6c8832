"""`GET /docs`: the page of a server process for people: its routes, its limits, and lines to paste into a shell.

One HTML document without scripts, and without anything from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from common.rewards.api import (
    DEADLINE_HEADER,
    DOCS_PATH,
    FLOW_GRPO_PATH,
    GRADIENT_PATH,
    HEALTH_PATH,
    INFO_PATH,
    MAX_ASPECT,
    MAX_PROMPT_BYTES,
    METRICS_PATH,
    OPENAPI_PATH,
    PLAIN_SCORE_PATH,
    READY_PATH,
    SCORE_PATH,
    UNIRL_HEALTH_PATH,
    ServerInfo,
)
from common.rewards.bearer import REWARD_TOKEN
from reward_servers.doors import Door
from reward_servers.limits import RequestLimits
from reward_servers.picture_request import MAX_IMAGES

MEDIA_TYPE = "text/html; charset=utf-8"
POLICY = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
"""The page runs and loads nothing, even if a text in it were taken for HTML."""
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "pre,code{font:14px/1.5 ui-monospace,monospace;background:#f4f4f4}pre{padding:.75rem;overflow-x:auto}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}"
)
SUMMARIES = {
    SCORE_PATH: "uint8 images, prompts, metadata to scores; msgpack",
    GRADIENT_PATH: "float images to scores and their gradients; msgpack",
    PLAIN_SCORE_PATH: "base64 PNG or JPEG files and prompts to scores; JSON, UniRL's format included",
    FLOW_GRPO_PATH: "image files and prompts to scores; pickles of plain containers, for Flow-GRPO and verl-omni",
}
PROCESS_PAGES = {
    HEALTH_PATH: "the process is alive",
    READY_PATH: "every scorer has passed its start-up check, and no call is stuck",
    METRICS_PATH: "metrics of Prometheus",
    OPENAPI_PATH: "every route, message and status, for programs",
    DOCS_PATH: "this page",
}


def page(
    scorers: Sequence[tuple[str, ServerInfo]], limits: RequestLimits, queue_bytes: int, doors: Sequence[Door]
) -> bytes:
    """The page of a process that serves these scorers, each under its prefix, through these doors."""
    guarded = limits.token is not None
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Reward server</title><style>{STYLE}</style>",
        "<h1>Reward server</h1>",
        f"<p>Scores of images for reinforcement learning. Programs read <code>{OPENAPI_PATH}</code>.</p>",
        *(_token() if guarded else ()),
        *(part for prefix, info in scorers for part in _scorer(prefix, info, doors, guarded)),
        "<h2>The process</h2>",
        _table((f"GET {path}", summary) for path, summary in PROCESS_PAGES.items()),
        "<h2>Limits of a request</h2>",
        _table(_limits(limits, queue_bytes)),
        "<p>A request beyond a limit gets a status and <code>{&quot;error&quot;: cause, &quot;message&quot;: text}"
        "</code>. A failure is never a score. 429 and 503 may be tried again, after <code>Retry-After</code> seconds "
        "where it is given.</p></html>",
    ]
    return "\n".join(parts).encode()


def _token() -> list[str]:
    return [
        "<p>Scoring routes need the header <code>authorization: Bearer TOKEN</code>. The lines below read the token "
        f"from <code>{REWARD_TOKEN}</code>.</p>"
    ]


def _scorer(prefix: str, info: ServerInfo, doors: Sequence[Door], guarded: bool) -> list[str]:
    name, base = escape(info.scorer), f"http://HOST:PORT{prefix}"
    routes = [door for door in doors if info.differentiable or not door.needs_gradient]
    return [
        f"<h2>{name}</h2>",
        f"<p>URL of this reward: <code>{escape(base)}</code>. Every score lies in [{info.low:g}, {info.high:g}].</p>",
        _table(
            [
                *((f"POST {prefix}{door.path}", SUMMARIES[door.path]) for door in routes),
                (f"GET {prefix}{INFO_PATH}", "the identity that the scorer declares"),
                (f"GET {prefix}{UNIRL_HEALTH_PATH}", "the name of the reward, as UniRL's client asks for it"),
            ]
        ),
        f"<pre>{escape(_lines(base, info.scorer, guarded))}</pre>",
    ]


def _lines(base: str, name: str, guarded: bool) -> str:
    """Lines for a shell, and for Python."""
    header = f' -H "authorization: Bearer ${REWARD_TOKEN}"' if guarded else ""
    return f"""# one image; its file is PNG or JPEG
printf '{{"image_base64": "%s", "prompt": "a red cat"}}' "$(base64 < IMAGE | tr -d '\\n')" |
    curl --fail-with-body{header} --data-binary @- {base}{PLAIN_SCORE_PATH}

# the identity of the scorer
curl --fail-with-body{header} {base}{INFO_PATH}

# with this project installed
rtdmd score --url {base} IMAGE... --prompt "a red cat"

# in Python: many images, retries, the token of {REWARD_TOKEN}; also a reward function for TRL
from reward_servers import remote_reward
reward = remote_reward("{base}", name="{name}")
scores = reward(prompts=["a red cat"], images=[PIL.Image.open("IMAGE")])
"""


def _limits(limits: RequestLimits, queue_bytes: int) -> list[tuple[str, str]]:
    return [
        ("body, and its images once decoded", f"{limits.max_body_bytes} bytes"),
        ("requests of a scorer that wait, together", f"{queue_bytes} bytes"),
        ("image", f"{limits.max_pixels} pixels, sides that differ by a factor of at most {MAX_ASPECT}"),
        ("images of one request with files", f"{MAX_IMAGES}, all of one size"),
        ("a prompt, and each text in metadata", f"{MAX_PROMPT_BYTES} bytes"),
        ("time until the answer", f"{limits.deadline_s:g} s, or the header {DEADLINE_HEADER} if it is less"),
    ]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (f"<tr><td><code>{escape(first)}</code><td>{escape(second)}" for first, second in rows)
    return f"<table>{''.join(lines)}</table>"
