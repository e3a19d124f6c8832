"""Composition root: starts what a run needs, in order, and always stops it in reverse order.

Besides `main.py`, this is the only file that knows all services.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray

from common.backbones import model_sizes
from common.command import system_error
from common.config.rewards import RewardConfig
from common.config.run import Config
from common.console_stream import LOG
from common.errors import ConfigError, LearnerError, ModelError, RtdmdError, RunStopped, one_line
from common.policies import few_step_teacher_spec, student_spec, teacher_spec
from common.prompts import load_prompts
from common.redis_link import RedisAddress, RedisLink
from common.rewards.access import RewardAccess
from common.rewards.bearer import reward_token
from common.rewards.client import RewardEndpoint
from common.rewards.guard import Outage
from common.run_control import RunControl
from common.types import PromptSets, Stage
from common.urls import host_of
from learner.driver.call_queue import CALLS_PER_WORKER
from learner.driver.calls import remote_reason
from learner.driver.cluster import actor_environment, ray_cluster
from learner.driver.comparison import PolicyRecords
from learner.driver.durable_learner import DurableLearner
from learner.driver.embedded_redis import embedded_redis
from learner.driver.fleet import Fleet
from learner.driver.learner_group import started_learner
from learner.driver.local_servers import LocalServers, local_specs
from learner.driver.machines import RayMachines
from learner.driver.monitoring import metrics_endpoint, run_metrics
from learner.driver.placement import Placement, placed
from learner.driver.publisher import Publisher
from learner.driver.rank_health import RankHealth
from learner.driver.run_copies import check_copies
from learner.driver.run_directory import (
    Start,
    begin,
    claimed,
    continuity,
    decided,
    require_same_prompts,
    require_same_rewards,
    run_id,
)
from learner.driver.threads import with_known_threads, with_probed_threads
from learner.driver.worker_pool import HEALTH, WorkerPool
from learner.preflight.checks import (
    check_enough_prompts,
    check_files,
    check_gpus,
    check_guidance,
    check_requests,
    check_reward_devices,
    check_rewards,
    check_schedule,
    control_requests,
    warn_of_repeated_prompts,
)
from learner.preflight.command_line import Invocation
from learner.preflight.forecast import Prediction, choose_device, predict, requirements_text
from learner.preflight.prompt_checks import check_prompts
from learner.preflight.ray_environment import check_storage, cluster_address, temporary_folder
from learner.records.console import Console
from learner.records.live_page import page_of_run
from learner.records.metrics_log import Tracker
from learner.records.prometheus import RunMetrics
from learner.records.run_log import announce, run_log
from learner.records.trackers.feed import Feed
from learner.records.trackers.following import followed
from learner.records.trackers.protocol import require_installed
from learner.run import PolicySpecs, Service
from rollout_workers.actor import RolloutWorker, WorkerSettings


def run(invocation: Invocation) -> None:
    """Run; with `--dry-run`, start everything once and print the plan.

    Raises:
        RtdmdError: see `common/errors.py`; errors of Ray and of the operating system become one line.
    """
    with _errors_in_one_line(invocation):
        _run(invocation)


def forecast_text(config: Config, device_name: str) -> str:
    """The output of `rtdmd forecast`.

    Raises:
        ConfigError, ModelError: the model's sizes are unknown, or it cannot do what the run file asks.
        PromptError: a prompt file that is on this machine cannot be used.
    """
    sizes, device = model_sizes(config.backbone, config.lora), choose_device(device_name, config)
    if sizes is None:
        raise ConfigError(
            f"backbone.family = {config.backbone.family}: a forecast needs the sizes of the model, which only our own "
            "families give"
        )
    check_guidance(config, sizes.guidance)
    for path in (path for _, path in config.prompts if path is not None and path.exists()):
        load_prompts(path)
    return requirements_text(config, sizes, predict(config, sizes, device), device)


@contextmanager
def _errors_in_one_line(invocation: Invocation) -> Iterator[None]:
    """Re-raise our own errors from another process unchanged; shorten any other to one line, with a traceback file.

    Without a place for the traceback, an error that nobody expected stays as it is.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RtdmdError):
            raise error.cause from error
        raise RtdmdError(f"{remote_reason(error, invocation.run_dir)}{_logged(invocation, error)}") from error
    except OSError as error:
        raise RtdmdError(f"{system_error(error, invocation.run_dir)}{_logged(invocation, error)}") from error
    except RtdmdError:
        raise
    except Exception as error:
        logged = _logged(invocation, error)
        if not logged:
            raise
        raise RtdmdError(
            f"unexpected {type(error).__name__}: {one_line(error)}{logged}: report it with that file, and go on with "
            "--resume"
        ) from error


def _logged(invocation: Invocation, error: Exception) -> str:
    """Write the traceback into the run directory and return the end of a sentence; "" if impossible."""
    log = invocation.run_dir / "logs" / "error.log"
    if invocation.dry_run or not log.parent.is_dir():
        return ""
    try:
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""
    return f"; see {log}"


def _checked_prediction(config: Config) -> Prediction | None:
    """The forecast to compare the run with at its end; None if only the cluster has the model or sizes are unknown.

    Raises:
        ConfigError, ModelError: the model's small files show that the run is impossible.
    """
    paths = [value for value in config.backbone.model_dump().values() if isinstance(value, Path)]
    elsewhere = cluster_address(os.environ) is not None and not all(path.is_dir() for path in paths)
    sizes = None if elsewhere else model_sizes(config.backbone, config.lora)
    if sizes is None:
        return None
    check_guidance(config, sizes.guidance)
    return predict(config, sizes, choose_device("auto", config))


def _token_hosts(config: Config) -> list[str]:
    """Hosts whose users could try to guess the token: reward servers, and a Redis that holds signatures."""
    urls = [url for reward in config.rewards for url in reward.urls]
    return list(filter(None, map(host_of, [*urls, config.redis.url])))


def _run(invocation: Invocation) -> None:
    config = invocation.config
    check_storage(invocation.run_dir, os.environ)
    check_copies(config.checkpoint.copy_to)
    invocation = decided(invocation)
    check_files(config, resuming=invocation.resume)
    check_reward_devices(config)
    require_installed(config.trackers.kinds)
    reward_token(_token_hosts(config))
    if cluster_address(os.environ) is None:
        temporary_folder(os.environ)
        check_gpus(config)
    prompts = _load_prompts(config)
    check_enough_prompts(config, prompts)
    warn_of_repeated_prompts(config, prompts)
    check_requests(config, prompts)
    prediction = _checked_prediction(config)
    with (
        claimed(invocation) as (run_dir, start),
        started_service(invocation, run_dir, start, prompts, prediction) as service,
    ):
        if invocation.dry_run:
            print(plan_text(invocation, start))
            return
        try:
            service.run(start)
        except KeyboardInterrupt as error:
            raise RunStopped("interrupted") from error  # from here on there is a run to continue


def _load_prompts(config: Config) -> PromptSets:
    files = config.prompts
    train, evaluation = load_prompts(files.train), load_prompts(files.evaluation)
    return PromptSets(train if files.cold_start is None else load_prompts(files.cold_start), train, evaluation)


@contextmanager
def started_service(
    invocation: Invocation,
    run_dir: Path,
    start: Start,
    prompts: PromptSets,
    prediction: Prediction | None,
) -> Iterator[Service]:
    """Everything that a run needs, started in order and stopped in reverse order on every exit."""
    require_same_prompts(start, prompts, invocation.config)
    with ExitStack() as stack:
        stack.enter_context(run_log(run_dir / "logs", invocation.log_level))
        stack.enter_context(_errors_in_one_line(invocation))  # inside: the log gets the line that the console shows
        stack.enter_context(page_of_run(run_dir, invocation.config.dashboard))
        metrics = run_metrics(invocation.config, run_dir)
        config = with_known_threads(invocation.config, run_dir, resume=invocation.resume)
        redis = stack.enter_context(_redis(config, run_dir))
        specs, logs = local_specs(config.rewards), run_dir / "logs"
        servers = stack.enter_context(LocalServers(specs, logs, say=announce, restarted=metrics.server_restarted))
        access = _reward_access(config, servers.urls, redis, run_id(run_dir))
        stack.enter_context(metrics_endpoint(config, run_dir, metrics, access))
        check_prompts(config, access, prompts)
        controls = control_requests(config, prompts.alignment[0], prompts.evaluation[0])
        access = check_rewards(config, access, controls)
        require_same_rewards(start, access.infos)
        stack.enter_context(ray_cluster(config))
        device = _device(config.learner.num_gpus)
        placement, machines = stack.enter_context(placed(config)), RayMachines()
        group = stack.enter_context(started_learner(config, prompts.cold_start, access, device, placement, machines))
        health = RankHealth(machines, config.learner.unhealthy_after_s)
        learner = DurableLearner(group, health, announce, metrics)
        keep_up = partial(servers.keep_up, _waited_for(config))
        pool = stack.enter_context(_workers(config, access, metrics, placement, keep_up))
        fingerprint = _loaded(learner)
        pool.admit(fingerprint, config.workers.least)
        sigmas = learner.sigmas(config.sampling.steps)
        check_schedule(config, sigmas)
        check_guidance(config, learner.guidance())
        if not invocation.dry_run:
            config = with_probed_threads(config, learner)
            learner.configure(config)
            begin(replace(invocation, config=config), start)
            feeds = [Feed(run_dir, config, kind) for kind in config.trackers.kinds]
            stack.enter_context(followed(feeds, announce))
        yield Service(
            config=config,
            run_dir=run_dir,
            learner=learner,
            publisher=Publisher(learner),
            sigmas=sigmas,
            pool=pool,
            tracker=stack.enter_context(_tracker(config, run_dir, metrics, invocation.log_level.number)),
            metrics=metrics,
            records=PolicyRecords(run_dir, config.evaluation.grid_prompts),
            prompts=prompts,
            specs=PolicySpecs(teacher_spec(config), few_step_teacher_spec(config), student_spec(config)),
            control=stack.enter_context(_run_control(config, redis, access.token)),
            prediction=prediction,
            settings=continuity(config, prompts, access.infos),
        )


@contextmanager
def _redis(config: Config, run_dir: Path) -> Iterator[RedisAddress | None]:
    """The run's Redis: embedded, from the run file, or none."""
    if config.redis.url == "none":
        yield None
    elif config.redis.url == "embedded":
        with embedded_redis(run_dir / "logs" / "redis.log") as address:
            LOG.info(f"redis: embedded, at {address.url} (redis.url names another, or none)")
            yield address
    else:
        address = RedisAddress.from_environment(config.redis.url)
        address.require("redis.url", "start it, name another, or do without (redis.url: none)")
        yield address


@contextmanager
def _run_control(config: Config, redis: RedisAddress | None, token: str | None) -> Iterator[RunControl | None]:
    if redis is None:
        yield None
        return
    with closing(RedisLink(redis)) as link:
        yield RunControl(link, config.run.name, token)


@contextmanager
def _tracker(config: Config, run_dir: Path, metrics: RunMetrics, level: int) -> Iterator[Tracker]:
    """Console and metrics.jsonl."""
    stages: dict[str, int] = {Stage.COLD_START: config.cold_start.iterations}
    stages[Stage.ALIGNMENT] = config.alignment.iterations
    with Console(stages, config.run.name, quiet=level > logging.INFO) as console:
        yield Tracker(run_dir / "metrics.jsonl", console, metrics)


def _reward_access(config: Config, local_urls: dict[str, str], redis: RedisAddress | None, run: str) -> RewardAccess:
    urls = {
        reward.name: (local_urls[reward.name],) if reward.url == "local" else reward.urls for reward in config.rewards
    }
    return RewardAccess(
        endpoints=tuple(RewardEndpoint(name, url) for name, found in urls.items() for url in found),
        outages={reward.name: Outage(reward.outage, reward.outage_limit_s) for reward in config.rewards},
        settings=config.reward_client,
        token=reward_token(),
        redis=redis,
        cached_scores=config.redis.cached_scores,
        run=run,
    )


def _waited_for(config: Config) -> set[str]:
    """Rewards that the run cannot continue without: if a local server of one dies too often, the run ends."""
    return {reward.name for reward in config.rewards if reward.outage.holds_requests}


def _workers(
    config: Config, access: RewardAccess, metrics: RunMetrics, placement: Placement, watch: Callable[[], None]
) -> WorkerPool:
    """Rollout workers, placed by their resources or beside a rank; they start when the pool is entered."""
    settings = WorkerSettings(
        backbone=config.backbone,
        lora=config.lora,
        rewards=access,
        trained_rewards=tuple(reward.name for reward in config.rewards if reward.trained),
        seed=config.run.seed,
        threads=config.workers.threads,
        device=_device(config.workers.num_gpus),
        compiled=config.workers.compiled,
        releases_memory=config.phases_share_gpus,
    )
    # The pool starts another worker in the place of one that is gone. Ray's own restart would hold its calls back.
    actor = ray.remote(
        num_cpus=config.workers.num_cpus,
        num_gpus=config.workers.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=CALLS_PER_WORKER,
        concurrency_groups={HEALTH: 1},
        runtime_env=actor_environment(releases_memory=config.phases_share_gpus),
    )(RolloutWorker)
    workers = config.workers
    places = workers.most, workers.restarts, workers.unhealthy_after_s
    fleet = Fleet(lambda place: actor.options(**placement.worker(place)).remote(settings), *places)
    return WorkerPool(fleet, RayMachines(), workers.unhealthy_after_s, watch, announce, metrics=metrics)


def _loaded(learner: DurableLearner) -> str:
    """The fingerprint of the base, once all ranks have loaded the same one."""
    try:
        return learner.load()
    except LearnerError as error:
        raise ModelError(str(error)) from error


def plan_text(invocation: Invocation, start: Start) -> str:
    """The output of `--dry-run`, after everything was started and every server answered."""
    config = invocation.config
    alignment, cold_start = config.alignment, config.cold_start
    images = alignment.prompts_per_iteration * alignment.group_size
    lines = [
        f"run        {config.run.name}, seed {config.run.seed}, into {os.path.realpath(invocation.run_dir)}",
        f"start      at iteration {start.position.iteration} of {start.position.stage}"
        f"{f', from {start.checkpoint}' if start.checkpoint else ''}",
        f"backbone   {config.backbone.family} at {config.backbone.path}, {config.backbone.dtype}",
        f"stage 1    {cold_start.iterations} iterations of {cold_start.batch_size} samples",
        f"stage 2    {alignment.iterations} iterations of {images} samples, "
        f"policy gradient {alignment.policy_gradient}",
        f"workers    {config.workers.numbers} of {config.workers.num_cpus:g} CPU, {config.workers.num_gpus:g} GPU",
        f"learner    {config.learner.ranks} of {config.learner.num_cpus:g} CPU, {config.learner.num_gpus:g} GPU",
        *(_reward_text(reward) for reward in config.rewards),
        "everything loaded, every reward server answered: ready to run",
    ]
    return "\n".join(lines)


def _reward_text(reward: RewardConfig) -> str:
    use = "evaluation only" if not reward.trained else f"weight {reward.weight:g}"
    where = reward.url if isinstance(reward.url, str) else ", ".join(reward.url)
    where += f" on {reward.device}" if reward.device != "cpu" else ""
    gradient = ", differentiable" if reward.differentiable else ""
    return f"reward     {reward.name} at {where}, {use}{gradient}, when out: {reward.outage}"


def _device(num_gpus: float) -> str:
    return "cuda" if num_gpus > 0 else "cpu"
