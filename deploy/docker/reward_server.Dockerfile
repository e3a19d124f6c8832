# A reward server with every scorer that needs no vLLM.
#   docker build --file deploy/docker/reward_server.Dockerfile --tag rtdmd-reward-server:0.1.0 .
#   docker run --gpus all --env REWARD_SERVER_TOKEN --volume ./models:/models:ro --publish 8000:8000 \
#       rtdmd-reward-server:0.1.0 --scorer hps --model /models/hps_v2.1 --device cuda --host 0.0.0.0
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

RUN --mount=type=bind,source=deploy/docker/reward_server.txt,target=/tmp/reward_server.txt \
    pip install --no-deps --only-binary :all: --require-hashes --requirement /tmp/reward_server.txt
RUN --mount=type=bind,target=/project,rw \
    pip install --no-deps --no-build-isolation --no-index /project

RUN useradd --uid 1000 --create-home rtdmd
USER 1000:1000
WORKDIR /home/rtdmd
ENV OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
EXPOSE 8000
ENTRYPOINT ["rtdmd", "serve"]
CMD ["--help"]
