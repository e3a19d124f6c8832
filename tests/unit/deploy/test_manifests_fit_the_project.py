"""What the manifests of deploy/kuberay name exists: images, versions, options, scorers, metrics, settings."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from common.config.run import Config
from common.errors import ConfigError
from common.rewards.bearer import REWARD_TOKEN
from deploy.prometheus import kubernetes_rules
from learner.preflight.command_line import Invocation, parse
from reward_servers.metrics import ServerMetrics
from reward_servers.options import ServerSettings, build_parser, check
from reward_servers.scorers import BUILT_IN_SCORERS
from tests.helpers.manifests import (
    APPLIED,
    KUBERAY,
    PROJECT_ROOT,
    SIZES,
    Manifest,
    of_kind,
    pods,
    ray_cluster,
    rendered,
)

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKER = PROJECT_ROOT / "deploy/docker"
OTHER_IMAGES = ("redis",)
BASES = {"one_node": "rtdmd_sd35m", "two_nodes": "rtdmd_sd35m", "four_nodes": "rtdmd_flux2_klein_4b"}
"""The run file with the published settings that a size's run file has."""
GPU = "nvidia.com/gpu"


def ours(image: str) -> str | None:
    """The Dockerfile's name of an image; None for an image that is not ours."""
    name = image.rpartition(":")[0].rpartition("/")[2]
    return None if name in OTHER_IMAGES else name.removeprefix("rtdmd-").replace("-", "_")


def settings_of(folder: str, tmp_path: Path) -> Invocation:
    """The command of a job, read by the product's own command line."""
    manifests = rendered(folder)
    (run,) = (one["data"]["run.yaml"] for one in of_kind(manifests, "ConfigMap"))
    (tmp_path / "run.yaml").write_text(run)
    words = shlex.split(of_kind(manifests, "RayJob")[0]["spec"]["entrypoint"])
    assert words[:2] == ["rtdmd", "train"]
    assert "/etc/rtdmd/run.yaml" in words
    return parse([word.replace("/etc/rtdmd/", f"{tmp_path}/") for word in words[2:]], {})


@pytest.fixture
def server_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REWARD_TOKEN, "0123456789abcdef")


def server(manifest: Manifest) -> ServerSettings:
    """The command line of a Deployment, read by the server's own."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    arguments = [one.replace("$(POD_IP)", "10.0.0.7") for one in container["args"]]
    return check(build_parser().parse_args(arguments))


def image_problem(image: str) -> str | None:
    """Why the project does not make an image, or None."""
    name, tag = ours(image), image.rpartition(":")[2]
    if name is not None and not (DOCKER / f"{name}.Dockerfile").is_file():
        return f"{image} has no Dockerfile in deploy/docker"
    return None if name is None or tag == PROJECT["version"] else f"{image} is not of version {PROJECT['version']}"


@pytest.mark.parametrize("folder", APPLIED)
def test_images_are_those_of_the_project(folder: str) -> None:
    specs = [pod["spec"] for one in rendered(folder) for pod in pods(one)]
    images = {one["image"] for spec in specs for one in [*spec["containers"], *spec.get("initContainers", [])]}
    assert len(images) >= 3
    assert [problem for problem in map(image_problem, sorted(images)) if problem] == []


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("registry.example.com:5000/team/rtdmd-trainer:0.1.0", "rtdmd-trainer:0.1.0 has no Dockerfile"),
        ("rtdmd-learner:0.0.9", "rtdmd-learner:0.0.9 is not of version"),
        ("rtdmd-learner", "rtdmd-learner has no Dockerfile"),
    ],
)
def test_an_image_that_is_gone_would_be_named(image: str, problem: str) -> None:
    assert problem in (image_problem(image) or "")


@pytest.mark.parametrize("folder", APPLIED)
def test_the_version_of_ray_is_the_pinned_one(folder: str) -> None:
    (pin,) = (one for one in PROJECT["optional-dependencies"]["core"] if one.startswith("ray["))
    assert f"ray[default]=={ray_cluster(rendered(folder))['rayVersion']}" == pin


@pytest.mark.parametrize("size", SIZES)
def test_a_job_starts_and_resumes_with_one_command(size: str, tmp_path: Path) -> None:
    """An option, of the command line or of run.yaml, that no longer exists is an error that names it."""
    asked = settings_of(size, tmp_path)
    assert asked.resume_auto
    assert asked.run_dir.is_absolute()
    job = of_kind(rendered(size), "RayJob")[0]["spec"]
    assert job["backoffLimit"] > 0
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounts = [mount["mountPath"] for mount in head["volumeMounts"]]
    assert any(asked.run_dir.is_relative_to(mount) for mount in mounts)


@pytest.mark.parametrize(
    ("option", "section"), [("--alignment.gruop_size 4", ""), ("", "\nworker: {count: 1}\n"), ("--resum", "")]
)
def test_an_option_that_is_gone_would_be_named(option: str, section: str, tmp_path: Path) -> None:
    """A job's command and its run file are read as a run reads them."""
    text = (KUBERAY / "one_node/run.yaml").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(text + section)
    with pytest.raises(ConfigError, match=r"gruop_size|worker|--resum"):
        parse(["--config", f"{tmp_path}/run.yaml", *option.split()], {})


def published(config: Config) -> dict[str, object]:
    """The settings that a cluster does not change: all but paths, rewards, processes and places."""
    whole = config.model_dump(mode="json")
    whole["cold_start"].pop("from_checkpoint")
    kept = ("lora", "sampling", "cold_start", "alignment", "evaluation", "checkpoint")
    backbone = {key: value for key, value in whole["backbone"].items() if "path" not in key}
    return {key: whole[key] for key in kept} | {"backbone": backbone}


@pytest.mark.parametrize("size", SIZES)
def test_a_run_file_has_the_published_settings(size: str, tmp_path: Path) -> None:
    original = parse(["--config", str(PROJECT_ROOT / f"deploy/runs/{BASES[size]}.yaml")], {}).config
    own = settings_of(size, tmp_path).config
    assert published(own) == published(original)
    added = [reward for reward in own.rewards if reward.name not in {one.name for one in original.rewards}]
    assert [reward.name for reward in added] == ([] if size == "one_node" else ["judge"])


def gpus(pod: Manifest) -> int:
    return sum(container["resources"]["limits"].get(GPU, 0) for container in pod["spec"]["containers"])


@pytest.mark.parametrize("size", SIZES)
def test_ranks_and_workers_fit_their_own_pods(size: str, tmp_path: Path) -> None:
    config = settings_of(size, tmp_path).config
    learner, rollouts = ray_cluster(rendered(size))["workerGroupSpecs"]
    assert (learner["groupName"], rollouts["groupName"]) == ("learner", "rollouts")
    ranks, workers = config.learner, config.workers
    assert learner["minReplicas"] == learner["maxReplicas"] == 1
    assert gpus(learner["template"]) == ranks.ranks * ranks.num_gpus
    assert float(learner["rayStartParams"]["num-cpus"]) == ranks.ranks * ranks.num_cpus
    assert gpus(rollouts["template"]) == workers.num_gpus == 1
    assert (rollouts["minReplicas"], rollouts["maxReplicas"]) == (workers.min, workers.max)
    # A rank does not fit where workers go, and the ranks leave no room where they are.
    assert workers.num_cpus <= float(rollouts["rayStartParams"]["num-cpus"]) < ranks.num_cpus
    for group in (learner, rollouts):
        request = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert request["cpu"] == group["rayStartParams"]["num-cpus"]


@pytest.mark.parametrize(("size", "total"), [("one_node", 8), ("two_nodes", 16), ("four_nodes", 32)])
def test_a_size_uses_the_gpus_that_it_has(size: str, total: int) -> None:
    manifests = rendered(size)
    most = {
        one["metadata"]["name"]: one["spec"]["maxReplicas"] for one in of_kind(manifests, "HorizontalPodAutoscaler")
    }
    used = sum(gpus(group["template"]) * group["maxReplicas"] for group in ray_cluster(manifests)["workerGroupSpecs"])
    used += sum(
        gpus(one["spec"]["template"]) * most[one["metadata"]["name"]] for one in of_kind(manifests, "Deployment")
    )
    assert used == total


@pytest.mark.usefixtures("server_token")
@pytest.mark.parametrize("size", SIZES)
def test_every_reward_of_a_run_is_served(size: str, tmp_path: Path) -> None:
    manifests = rendered(size)
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "Service")}
    served = {}
    for deployment in of_kind(manifests, "Deployment"):
        settings = server(deployment)
        assert {scorer.scorer for scorer in settings.scorers} <= set(BUILT_IN_SCORERS)
        name, several = deployment["metadata"]["name"], len(settings.scorers) > 1
        (port,) = services[name]["ports"]
        pod = deployment["spec"]["template"]
        assert services[name]["selector"].items() <= pod["metadata"]["labels"].items()
        assert {"name": port["targetPort"], "containerPort": settings.port} in pod["spec"]["containers"][0]["ports"]
        for scorer in settings.scorers:
            reward = scorer.name or scorer.scorer
            served[reward] = f"http://{name}:{port['port']}" + (f"/{reward}" if several else "")
    config = settings_of(size, tmp_path).config
    assert {reward.name: reward.url for reward in config.rewards} == served
    assert urlsplit(config.redis.url).hostname in services
    (waits,) = of_kind(manifests, "RayJob")[0]["spec"]["submitterPodTemplate"]["spec"]["initContainers"]
    places = {f"http://{urlsplit(url).netloc}/readyz" for url in served.values()}
    assert sorted(waits["args"]) == sorted(places), "the job waits for each of its reward servers"


def test_scaling_follows_a_metric_of_the_servers() -> None:
    metrics = ServerMetrics()
    metrics.of_scorer("hps", 0.0, 1.0)
    exposed = set(re.findall(r"^# TYPE (\w+)", metrics.exposition().decode(), re.MULTILINE))
    for scaler in of_kind(rendered("two_nodes"), "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            assert metric["pods"]["metric"]["name"] in exposed, scaler["metadata"]["name"]


def test_the_ports_of_metrics_exist(tmp_path: Path) -> None:
    manifests = rendered("two_nodes")
    templates = [pod for one in manifests for pod in pods(one)]
    for monitor in of_kind(manifests, "PodMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        chosen = [pod["spec"]["containers"] for pod in templates if labels <= pod["metadata"]["labels"].items()]
        ports = {port["name"]: port for containers in chosen for one in containers for port in one.get("ports", [])}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports.keys()
        if "run-metrics" in ports:
            metrics = settings_of("two_nodes", tmp_path).config.metrics
            assert (metrics.port, metrics.host) == (ports["run-metrics"]["containerPort"], "0.0.0.0")


def secrets(node: object) -> set[tuple[str, str]]:
    """(Secret, key) of every reference in a manifest."""
    if isinstance(node, dict):
        here = {(node["secretKeyRef"]["name"], node["secretKeyRef"]["key"])} if "secretKeyRef" in node else set()
        if "secretName" in node and "items" in node:
            here |= {(node["secretName"], item["key"]) for item in node["items"]}
        return here.union(*map(secrets, node.values()))
    return set().union(*map(secrets, node)) if isinstance(node, list) else set()


@pytest.mark.parametrize("folder", APPLIED)
def test_secrets_are_referred_to_and_made_by_the_script(folder: str) -> None:
    manifests = rendered(folder)
    script = (KUBERAY / "make_secrets.sh").read_text(encoding="utf-8").replace("\\\n", "")
    made = {
        (name, key)
        for name, keys in re.findall(r"create secret generic (\S+)(.*)", script)
        for key in re.findall(r'"\$folder/([\w.-]+)"', keys)
    }
    assert secrets(manifests) == made
    assert of_kind(manifests, "Secret") == []
    for variable in re.findall(r"name: (\w*(?:TOKEN|PASSWORD)\w*)\n\s*value:", yaml.safe_dump(manifests)):
        pytest.fail(f"{folder}: {variable} has its value in the manifest")


@pytest.mark.parametrize("folder", APPLIED)
def test_no_container_is_privileged(folder: str) -> None:
    checked = 0
    for template in (pod for one in rendered(folder) for pod in pods(one)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("folder", APPLIED)
def test_every_pod_accepts_connections_by_a_policy_of_its_own(folder: str) -> None:
    manifests = rendered(folder)
    selectors = [one["spec"]["podSelector"] for one in of_kind(manifests, "NetworkPolicy")]
    assert {} in selectors, "the rest is refused"
    chosen = [selector["matchLabels"].items() for selector in selectors if selector]
    for template in (pod for one in manifests for pod in pods(one)):
        labels = template["metadata"]["labels"].items()
        assert any(one <= labels for one in chosen), labels


def test_the_rules_are_those_of_prometheus() -> None:
    """Else run: python -m deploy.prometheus.kubernetes_rules > deploy/kuberay/base/rules.yaml."""
    assert (KUBERAY / "base/rules.yaml").read_text(encoding="utf-8") == kubernetes_rules.text()


@pytest.mark.parametrize("size", SIZES)
def test_scraped_targets_have_the_labels_that_rules_and_dashboards_ask_for(size: str) -> None:
    manifests = rendered(size)
    endpoints = [one for monitor in of_kind(manifests, "PodMonitor") for one in monitor["spec"]["podMetricsEndpoints"]]
    changes = [endpoint.get("relabelings", []) for endpoint in endpoints]
    labels = [{one["targetLabel"]: one["replacement"] for one in found} for found in changes]
    name = yaml.safe_load((KUBERAY / size / "run.yaml").read_text(encoding="utf-8"))["run"]["name"]
    assert [one for one in labels if one] == [{"job": "driver", "run": name}, {"job": "reward_server", "run": name}]
