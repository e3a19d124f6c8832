"""The composition root: reads the command line, starts what a run needs, runs it, and stops it whatever happens.

    python learner/main.py --config deploy/runs/shapes.yaml
    RAY_AUTH_MODE=token ray job submit --working-dir . -- python learner/main.py

The only file that knows all services.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

PROJECT_ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Run as a script, Python puts this folder first on the path, not the project.
    sys.path[0] = str(PROJECT_ROOT)
# Which image processor transformers falls back to is of no interest here: only its errors are shown.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import ray
from prometheus_client import CollectorRegistry
from ray.actor import ActorHandle

from common.backbones.base import Network
from common.config import Config, RewardConfig
from common.config_file import dump_config
from common.errors import CheckpointError, ConfigError, ModelError, RtdmdError
from common.metrics import DriverMetrics, LearnerMetrics, serve
from common.reward_client import RewardClient, RewardEndpoint
from learner.actor import Learner
from learner.checkpoint import Position, latest_checkpoint, read_position
from learner.cli import Invocation, parse
from learner.console import Console
from learner.local_servers import LocalServers, LocalServerSpec
from learner.policies import PolicyRecords
from learner.service import PolicySpecs, Service
from learner.tracker import Tracker, cut_metrics
from learner.worker_pool import WorkerPool
from rollout_workers.actor import RolloutWorker, WorkerSettings
from rollout_workers.prompts import load_prompts
from rollout_workers.sampler import SamplingSpec

REWARD_TOKEN = "REWARD_SERVER_TOKEN"
"""Environment variable with the bearer token of reward servers that are not on loopback; never written anywhere."""
CALL_TIMEOUT_S = 1800.0
"""The run fails when no worker finishes anything for so long."""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 refused at start, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        invocation = parse(argv, os.environ)
        with started_service(invocation) as service:
            if invocation.dry_run:
                print(plan_text(invocation))
            else:
                service.run(resume=invocation.resume)
    except ray.exceptions.RayTaskError as error:
        # Comes first: Ray makes it an instance of its cause's class as well, but with a remote traceback for a message.
        if isinstance(error.cause, RtdmdError):
            return _fail(error.cause, 1)
        raise
    except ray.exceptions.RayActorError as error:
        return _fail(f"the learner died: {_root_cause(error)}; continue with --resume", 1)
    except (ConfigError, ModelError) as error:
        return _fail(error, 2)
    except RtdmdError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    return 0


@contextmanager
def started_service(invocation: Invocation) -> Iterator[Service]:
    """Everything a run needs, started in order and stopped in reverse, on every way out."""
    config, run_dir = invocation.config, invocation.run_dir
    train_prompts = load_prompts(config.prompts.train)
    evaluation_prompts = load_prompts(config.prompts.evaluation)
    _check_enough_prompts(config, len(train_prompts))
    with ExitStack() as stack:
        _prepare_run_dir(invocation)
        servers = stack.enter_context(LocalServers(_local_servers(config), run_dir / "logs"))
        endpoints = _endpoints(config, servers.urls)
        _check_rewards(config, endpoints)
        stack.enter_context(_ray_cluster(config))
        learner, workers = _start_actors(config, train_prompts, endpoints)
        sigmas = _wait_until_loaded(config, learner, workers)
        registry = CollectorRegistry()
        if config.metrics.port is not None:
            stack.callback(serve(config.metrics.port, registry).close)
        total = config.cold_start.iterations + config.alignment.iterations
        console = stack.enter_context(Console(total, config.run.name))
        tracker = Tracker(
            run_dir / "metrics.jsonl",
            console,
            DriverMetrics.build(registry),
            LearnerMetrics.build(registry),
            config.workers.count,
        )
        stack.callback(tracker.close)
        yield Service(
            config,
            run_dir,
            learner,
            sigmas,
            WorkerPool(workers, CALL_TIMEOUT_S),
            tracker,
            PolicyRecords(run_dir, config.evaluation.grid_prompts),
            train_prompts,
            evaluation_prompts,
            _policy_specs(config),
            servers.check,
        )


def _prepare_run_dir(invocation: Invocation) -> None:
    """Create the run's directory; refuse to mix two runs in one; on resume drop what will be repeated."""
    run_dir = invocation.run_dir
    metrics = run_dir / "metrics.jsonl"
    if invocation.resume:
        checkpoint = latest_checkpoint(run_dir / "checkpoints")
        cut_metrics(metrics, read_position(checkpoint) if checkpoint else Position("cold_start", 0))
    elif metrics.exists() and metrics.stat().st_size > 0 and not invocation.dry_run:
        raise ConfigError(f"{run_dir} holds a run already: use --resume to go on, or --run-dir for another directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(invocation.config))
    except OSError as error:
        raise CheckpointError(f"cannot write to {run_dir}: {error.strerror}; choose another --run-dir") from error


def _check_enough_prompts(config: Config, available: int) -> None:
    for key, needed in (
        ("cold_start.batch_size", config.cold_start.batch_size),
        ("alignment.prompts_per_iteration", config.alignment.prompts_per_iteration),
    ):
        if needed > available:
            raise ConfigError(f"{key} = {needed}, but {config.prompts.train} has only {available} prompts")


def _local_servers(config: Config) -> list[LocalServerSpec]:
    return [
        LocalServerSpec(reward.name, reward.scorer, reward.model, reward.threads, reward.max_batch)
        for reward in config.rewards
        if reward.url == "local" and reward.scorer is not None
    ]


def _endpoints(config: Config, local_urls: dict[str, str]) -> dict[str, RewardEndpoint]:
    return {
        reward.name: RewardEndpoint(reward.name, local_urls.get(reward.name, reward.url)) for reward in config.rewards
    }


def _check_rewards(config: Config, endpoints: dict[str, RewardEndpoint]) -> None:
    """Ask every server who it is, before anything expensive starts."""
    client = config.reward_client
    token = os.environ.get(REWARD_TOKEN)
    with RewardClient(list(endpoints.values()), client.timeout_s, client.attempts, token) as rewards:
        for reward in config.rewards:
            if reward.differentiable and not rewards.info(reward.name).differentiable:
                raise ConfigError(
                    f"rewards.{reward.name}.differentiable is true, but its server has no gradient: set it to false"
                )


@contextmanager
def _ray_cluster(config: Config) -> Iterator[None]:
    """The cluster of the job, or a private one on this machine."""
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        # Ray makes its workers yield to every other process; here they are what the machine is for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=max(
                os.cpu_count() or 1, 1 + int(config.learner.num_cpus + config.workers.count * config.workers.num_cpus)
            ),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT_ROOT)}},
        )
    try:
        yield
    finally:
        ray.shutdown()


def _start_actors(
    config: Config, prompts: Sequence[object], endpoints: dict[str, RewardEndpoint]
) -> tuple[ActorHandle, list[ActorHandle]]:
    """Learner and workers, placed by their resources."""
    token = os.environ.get(REWARD_TOKEN)
    gradients = [endpoints[reward.name] for reward in config.rewards if reward.trained and reward.differentiable]
    learner = (
        ray.remote(Learner)
        .options(num_cpus=config.learner.num_cpus, num_gpus=config.learner.num_gpus)
        .remote(config, prompts, gradients, token, _device(config.learner.num_gpus))
    )
    settings = WorkerSettings(
        backbone=config.backbone,
        lora=config.lora,
        trained_rewards=tuple(endpoints[reward.name] for reward in config.rewards if reward.trained),
        evaluation_rewards=tuple(endpoints[reward.name] for reward in config.rewards if not reward.trained),
        reward_client=config.reward_client,
        reward_token=token,
        seed=config.run.seed,
        threads=config.workers.threads,
        device=_device(config.workers.num_gpus),
    )
    worker_class = ray.remote(RolloutWorker).options(
        num_cpus=config.workers.num_cpus,
        num_gpus=config.workers.num_gpus,
        max_restarts=config.workers.restarts,
        max_task_retries=config.workers.restarts,
    )
    return learner, [worker_class.remote(settings) for _ in range(config.workers.count)]


def _wait_until_loaded(config: Config, learner: ActorHandle, workers: list[ActorHandle]) -> tuple[float, ...]:
    """The student's noise levels, once everybody has loaded."""
    sigmas = learner.sigmas.remote(config.sampling.steps)
    try:
        ray.get([sigmas, *(worker.ready.remote() for worker in workers)], timeout=CALL_TIMEOUT_S)
        levels: tuple[float, ...] = ray.get(sigmas)
        return levels
    except ray.exceptions.GetTimeoutError as error:
        raise ConfigError(
            f"learner and workers did not start in {CALL_TIMEOUT_S:.0f} s: does the cluster have the CPUs and GPUs "
            "that learner.* and workers.* ask for?"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise ModelError(f"learner or workers could not start: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    """The last line of a remote traceback: the error itself."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _policy_specs(config: Config) -> PolicySpecs:
    evaluation, sampling = config.evaluation, config.sampling
    return PolicySpecs(
        teacher=SamplingSpec(Network.TEACHER, evaluation.teacher_steps, evaluation.teacher_guidance, eta=0.0),
        teacher_few_steps=SamplingSpec(Network.TEACHER, sampling.steps, guidance=1.0, eta=0.0),
        student=SamplingSpec(Network.STUDENT, sampling.steps, guidance=1.0, eta=sampling.eta),
    )


def plan_text(invocation: Invocation) -> str:
    """What `--dry-run` prints, after everything has been started and asked once."""
    config = invocation.config
    alignment, cold_start = config.alignment, config.cold_start
    images = alignment.prompts_per_iteration * alignment.group_size
    lines = [
        f"run        {config.run.name}, seed {config.run.seed}, into {invocation.run_dir.resolve()}",
        f"backbone   {config.backbone.family} at {config.backbone.path}, {config.backbone.dtype}",
        f"stage 1    {cold_start.iterations} iterations of {cold_start.batch_size} samples",
        f"stage 2    {alignment.iterations} iterations of {images} samples, "
        f"policy gradient {alignment.policy_gradient}",
        f"workers    {config.workers.count} of {config.workers.num_cpus:g} CPU, {config.workers.num_gpus:g} GPU",
        f"learner    {config.learner.num_cpus:g} CPU, {config.learner.num_gpus:g} GPU",
        *(_reward_text(reward) for reward in config.rewards),
        "everything loaded, every reward server answered: ready to run",
    ]
    return "\n".join(lines)


def _reward_text(reward: RewardConfig) -> str:
    use = "evaluation only" if not reward.trained else f"weight {reward.weight:g}"
    return f"reward     {reward.name} at {reward.url}, {use}{', differentiable' if reward.differentiable else ''}"


def _device(num_gpus: float) -> str:
    return "cuda" if num_gpus > 0 else "cpu"


def _fail(error: BaseException | str, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
