# A reward server for vlm_judge, geneval2 and unified_reward. It starts vLLM behind a socket file, so that only the reward
# server, which asks for a token, is reachable.
#   docker build --file deploy/docker/judge.Dockerfile --tag rtdmd-judge:0.1.0 .
#   docker run --gpus all --env REWARD_SERVER_TOKEN --volume ./models:/models:ro --publish 8000:8000 \
#       rtdmd-judge:0.1.0 --scorer vlm_judge --model /models/judge --host 0.0.0.0
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# triton and vLLM's own kernels are compiled when the model loads.
# Versions are those of the base image's Debian release: a pinned one is removed from the archive with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN --mount=type=bind,source=deploy/docker/judge.txt,target=/tmp/judge.txt \
    pip install --no-deps --only-binary :all: --require-hashes --requirement /tmp/judge.txt
RUN --mount=type=bind,target=/project,rw \
    pip install --no-deps --no-build-isolation --no-index /project
# judge.yaml looks for vLLM's Python in .venv-judge beside the packages, where `make judge-env` makes it.
RUN ln -s /usr/local "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/.venv-judge"

RUN useradd --uid 1000 --create-home rtdmd
USER 1000:1000
WORKDIR /home/rtdmd
ENV OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
EXPOSE 8000
ENTRYPOINT ["rtdmd", "serve"]
CMD ["--help"]
