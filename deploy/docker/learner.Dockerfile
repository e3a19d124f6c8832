# Ray's head, the driver, the learner and the rollout workers.
#   docker build --file deploy/docker/learner.Dockerfile --tag rtdmd-learner:0.1.0 .
# The wheels of torch bring CUDA; the machine needs only NVIDIA's driver and container toolkit.
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# triton compiles with gcc while a run works (workers.compiled). KubeRay's probes call wget.
# Versions are those of the base image's Debian release: a pinned one is removed from the archive with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*

RUN --mount=type=bind,source=deploy/docker/learner.txt,target=/tmp/learner.txt \
    pip install --no-deps --only-binary :all: --require-hashes --requirement /tmp/learner.txt
RUN --mount=type=bind,target=/project,rw \
    pip install --no-deps --no-build-isolation --no-index /project

RUN useradd --uid 1000 --create-home rtdmd
USER 1000:1000
WORKDIR /home/rtdmd
# Threads that wait sleep, see docs/running.md. Ray reports no usage to its makers.
ENV OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
CMD ["rtdmd", "--help"]
