"""Measures the cost of serving a reward. Prints one JSON object.

    python -m benchmarks.reward_serving null                   # images/s and latency of a scorer that costs nothing
    python -m benchmarks.reward_serving model                  # a small HPS model served, over the same one in a loop;
                                                               # in a process of its own, and in the server's
    python -m benchmarks.reward_serving groups                 # groups of 9, 16 and 24: how full their calls are
    python -m benchmarks.reward_serving overload               # 3 times the capacity for 60 s: goodput, batches, memory
    python -m benchmarks.reward_serving consolidated           # hps and pickscore behind one port, and behind two

To be run on an otherwise idle machine; server and load share its cores. Processor time per image is told as well: it
holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reward_load import REFUSED, Target, closed_loop, open_loop, prepare, serving

PROJECT_ROOT = Path(__file__).resolve().parents[1]
NULL = "benchmarks.null_scorer:NullScorer"
HPS = PROJECT_ROOT / "zoo/weights/hps"
PICKSCORE = PROJECT_ROOT / "zoo/weights/pickscore"
WARM_SECONDS = 1.0
CONNECTIONS = 8
# Enough single-image requests in flight to keep the next batch complete while one runs.
CONNECTIONS_PER_BATCH = 3
WANTED_IMAGES_PER_S = 600.0
ROUNDS = 3
OVERLOAD = 3.0
# Of each measurement, where it is not 10.
SECONDS = {"overload": 60.0}
# Images a request: what trainers call a group. None but the second divides into calls of 16.
GROUPS = (9, 16, 24)


def main() -> None:
    arguments = _parse()
    benchmarks = {
        "null": _null,
        "model": _model,
        "groups": _groups,
        "overload": _overload,
        "consolidated": _consolidated,
    }
    figures = benchmarks[arguments.benchmark](arguments)
    conditions = {"seconds": arguments.seconds, "cpus": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)}
    print(json.dumps({"benchmark": f"reward_serving.{arguments.benchmark}"} | figures | conditions, indent=1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["null", "model", "groups", "overload", "consolidated"])
    parser.add_argument("--seconds", type=float, help="of each measurement: 10, and 60 of overload, when left out")
    parser.add_argument("--images", type=int, default=4, help="per request of the null scorer")
    parser.add_argument("--side", type=int, default=48, help="pixels, of the images of the small models")
    parser.add_argument("--max-batch", type=int, default=16)
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or SECONDS.get(arguments.benchmark, 10.0)
    return arguments


def _null(arguments: argparse.Namespace) -> dict[str, Any]:
    """512 x 512 raw, in process: the most, then the latency at half of it, and at half of what is wanted."""
    request = prepare(arguments.images, side=512)
    with serving("--scorer", NULL, "--max-batch", str(arguments.max_batch), "--in-process") as target:
        load_cpu = time.process_time()
        connections = CONNECTIONS_PER_BATCH * max(1, arguments.max_batch // arguments.images)
        requests_per_s, server_ms = _most([target], [request], connections, arguments)
        load_cpu = time.process_time() - load_cpu
        half = open_loop(target, request, requests_per_s / 2, arguments.seconds)
        wanted = open_loop(target, request, WANTED_IMAGES_PER_S / 2 / arguments.images, arguments.seconds)
    images_per_s = requests_per_s * arguments.images
    return {
        "images_per_s": round(images_per_s, 1),
        "images_per_request": arguments.images,
        "server_cpu_ms_per_image": round(server_ms / arguments.images, 3),
        "load_cpu_ms_per_image": round(load_cpu * 1000 / images_per_s / (arguments.seconds + WARM_SECONDS), 3),
        "half_load_p50_ms": half.milliseconds(50),
        "half_load_p99_ms": half.milliseconds(99),
        "half_of_600_p50_ms": wanted.milliseconds(50),
        "half_of_600_p99_ms": wanted.milliseconds(99),
    }


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scorer in a loop with full batches, against groups of as many as requests, and single images as requests.

    In turns, since a shared machine's speed wanders: ratios are of one round, and the middle one of the rounds is told.
    """
    size = arguments.max_batch
    group, rounds = prepare(size, arguments.side), []
    options = ("--scorer", "hps", "--model", str(HPS), "--max-batch", str(size))
    with serving(*options) as apart, serving(*options, "--in-process") as together:
        for _ in range(ROUNDS):
            offline, offline_ms = _offline(arguments)
            figures = {"offline_images_per_s": offline, "offline_cpu_ms_per_image": offline_ms}
            for prefix, target in ("", apart), ("in_process_", together):
                groups, group_ms = _most([target], [group], CONNECTIONS, arguments)
                singles, single_ms = _capacity(target, arguments)
                figures |= {
                    f"{prefix}groups_over_offline": groups * size / offline,
                    f"{prefix}groups_cpu_ms_per_image": group_ms / size,
                    f"{prefix}singles_over_offline": singles / offline,
                    f"{prefix}singles_cpu_ms_per_image": single_ms,
                }
            rounds.append(figures)
    middle = {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}
    return middle | {"max_batch": size, "rounds": ROUNDS}


def _groups(arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole groups as one request each, of sizes that do not fit into a call."""
    figures: dict[str, Any] = {"max_batch": arguments.max_batch}
    with serving("--scorer", "hps", "--model", str(HPS), "--max-batch", str(arguments.max_batch)) as target:
        for size in GROUPS:
            calls, images = _batches(target)
            groups_per_s, server_ms = _most([target], [prepare(size, arguments.side)], CONNECTIONS, arguments)
            calls_after, images_after = _batches(target)
            figures[f"groups_of_{size}"] = {
                "images_per_s": round(groups_per_s * size, 1),
                "mean_batch_over_max": round((images_after - images) / (calls_after - calls) / arguments.max_batch, 3),
                "server_cpu_ms_per_image": round(server_ms / size, 3),
            }
    return figures


def _overload(arguments: argparse.Namespace) -> dict[str, Any]:
    """Three times the requests that the server can answer: groups that do not fit into a call, then single images."""
    return {"groups_of_9": _overloaded(arguments, 9), "single_images": _overloaded(arguments, 1)}


def _overloaded(arguments: argparse.Namespace, size: int) -> dict[str, Any]:
    request, connections = prepare(size, arguments.side), CONNECTIONS_PER_BATCH * arguments.max_batch // size
    options = ("--max-batch", str(arguments.max_batch), "--queue-items", str(4 * arguments.max_batch))
    with serving("--scorer", "hps", "--model", str(HPS), *options) as target:
        capacity, _ = _most([target], [request], connections, arguments)
        open_loop(target, request, capacity * OVERLOAD, WARM_SECONDS)
        memory, calls, images = (target.resident_mib(), *_batches(target))
        outcome = open_loop(target, request, capacity * OVERLOAD, arguments.seconds)
        memory_after, calls_after, images_after = (target.resident_mib(), *_batches(target))
    mean_batch = (images_after - images) / (calls_after - calls)
    return {
        "capacity_images_per_s": round(capacity * size, 1),
        "asked_over_capacity": round(sum(map(len, outcome.latencies.values())) / outcome.seconds / capacity, 2),
        "goodput_over_capacity": round(outcome.rate() / capacity, 3),
        "mean_batch_over_max": round(mean_batch / arguments.max_batch, 3),
        "memory_growth": round(memory_after / memory - 1, 3),
        "memory_mib": round(memory_after, 1),
        "answers": {str(status): len(values) for status, values in sorted(outcome.latencies.items())},
        "refused_p50_ms": outcome.milliseconds(50, REFUSED),
        "refused_p99_ms": outcome.milliseconds(99, REFUSED),
        "answered_p99_ms": outcome.milliseconds(99),
    }


def _consolidated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both rewards of every image: two scorers behind one port, in one process, and in a server each; two threads."""
    batch = ("--max-batch", str(arguments.max_batch))
    hps, pickscore = ("--scorer", "hps", "--model", str(HPS)), ("--scorer", "pickscore", "--model", str(PICKSCORE))
    connections = 2 * CONNECTIONS_PER_BATCH * arguments.max_batch
    requests = [prepare(1, arguments.side, prefix) for prefix in ("/hps", "/pickscore")]
    with serving(*hps, *pickscore, *batch) as port:
        one_port, one_port_ms = _most([port], requests, connections, arguments)
        memory_one_port = port.resident_mib()
    with serving(*hps, *pickscore, *batch, "--threads", "2", "--in-process") as both:
        together, together_ms = _most([both], requests, connections, arguments)
        memory_together = both.resident_mib()
    with serving(*hps, *batch) as one, serving(*pickscore, *batch) as other:
        apart, apart_ms = _most([one, other], [prepare(1, arguments.side)], connections, arguments)
        memory_apart = one.resident_mib() + other.resident_mib()
    return {
        "one_port_scores_per_s": round(one_port, 1),
        "one_process_scores_per_s": round(together, 1),
        "two_servers_scores_per_s": round(apart, 1),
        "one_port_cpu_ms_per_score": round(one_port_ms, 3),
        "one_process_cpu_ms_per_score": round(together_ms, 3),
        "two_servers_cpu_ms_per_score": round(apart_ms, 3),
        "one_port_mib": round(memory_one_port, 1),
        "one_process_mib": round(memory_together, 1),
        "two_servers_mib": round(memory_apart, 1),
    }


def _most(
    targets: Sequence[Target], requests: Sequence[bytes], connections: int, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Answers a second under a closed loop, and milliseconds of the servers' processor time for each."""
    closed_loop(targets, requests, connections, WARM_SECONDS)
    before = sum(target.cpu_seconds() for target in targets)
    outcome = closed_loop(targets, requests, connections, arguments.seconds)
    cpu = sum(target.cpu_seconds() for target in targets) - before
    return outcome.rate(), cpu * 1000 / (outcome.rate() * outcome.seconds)


def _capacity(target: Target, arguments: argparse.Namespace) -> tuple[float, float]:
    """The most single-image requests a second, and their cost as in `_most`."""
    return _most([target], [prepare(1, arguments.side)], CONNECTIONS_PER_BATCH * arguments.max_batch, arguments)


def _batches(target: Target) -> tuple[float, float]:
    """Model calls so far, and the images in them."""
    return target.metric("reward_server_batch_images_count"), target.metric("reward_server_batch_images_sum")


def _offline(arguments: argparse.Namespace) -> tuple[float, float]:
    """Images a second of the scorer alone, in full batches on one thread, and processor milliseconds for each."""
    import torch

    from common.rewards.api import Metadata
    from reward_servers.scorers.hps import HpsScorer

    torch.set_num_threads(1)
    scorer = HpsScorer.load(HPS, "cpu")
    size = arguments.max_batch
    images = np.random.default_rng(0).integers(0, 256, (size, arguments.side, arguments.side, 3), dtype=np.uint8)
    prompts = ["a red circle above a blue square"] * size
    metadata: list[Metadata] = [{}] * size
    scorer.score(images, prompts, metadata)
    started, cpu, calls = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < started + arguments.seconds:
        scorer.score(images, prompts, metadata)
        calls += 1
    images_scored = calls * size
    return images_scored / (time.perf_counter() - started), (time.process_time() - cpu) * 1000 / images_scored


if __name__ == "__main__":
    main()
