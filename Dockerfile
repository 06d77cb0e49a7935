# The worker with its model.
#
#   docker build -t IMAGE .                    for a GPU: vLLM's own image, the model of the hub in a separate layer
#   docker build -t IMAGE --target cpu .       for a laptop: vLLM's CPU build, with the tiny model
#   docker build -t IMAGE --target cpu-hub .   the same, with the model of the hub
#   docker build -t IMAGE --target warm …      one of these, with what a worker compiles at its first start
#
# docs/deploy.md describes the build arguments. What changes most often comes last: a change of the code rebuilds only
# the last layer.

# Registry of the base images; may be a mirror.
ARG BASE_URL=docker.io
# An image with vLLM 0.32, or one with CUDA and Python 3.11 or later, into which vLLM is installed.
ARG BASE_IMAGE=${BASE_URL}/vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=${BASE_URL}/library/python:3.11.14-slim-bookworm
# The model, on the hub; empty for an image without a model.
ARG MODEL_NAME=unsloth/phi-4-bnb-4bit
ARG MODEL_REVISION=main
# What `warm` adds to: an image, or a target above it.
ARG WARM_FROM=cpu
# For the labels of the image: version and URL of this repository.
ARG VERSION=0.1.0
ARG SOURCE=


# Downloads and verifies a model.
FROM ${PYTHON_IMAGE} AS builder
WORKDIR /app
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/builder.lock requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --quiet --no-deps --requirement requirements/builder.lock
# Only what `download` and `verify` import, so that a change of other modules does not download the model again.
COPY builder/__init__.py builder/__main__.py builder/checkpoint.py builder/console.py builder/download.py \
    builder/errors.py builder/hf_hub.py builder/layout.py builder/manifest.py builder/process_lock.py \
    builder/verify.py builder/


# The model, complete and verified. The cache keeps the files of a failed build; the token is in no layer.
FROM builder AS model
ARG MODEL_NAME
ARG MODEL_REVISION
ARG HF_ENDPOINT=https://huggingface.co
RUN --mount=type=secret,id=HF_TOKEN --mount=type=cache,target=/cache \
    if [ -z "$MODEL_NAME" ]; then mkdir /model; exit; fi; \
    python3 -m builder download "$MODEL_NAME" "/cache/$MODEL_NAME/$MODEL_REVISION" --revision "$MODEL_REVISION" --update \
    && cp -r "/cache/$MODEL_NAME/$MODEL_REVISION" /model \
    && python3 -m builder verify /model
# Settings of this model; empty ones are not set. They are ignored if MODEL_NAME is another model at run time.
ARG QUANTIZATION=bitsandbytes
ARG DTYPE=bfloat16
ARG MAX_MODEL_LEN=
ARG SERVED_MODEL_NAME=
RUN python3 -c 'import json, os; \
    names = "MODEL_NAME", "QUANTIZATION", "DTYPE", "MAX_MODEL_LEN", "SERVED_MODEL_NAME"; \
    given = {name: os.environ[name] for name in names if os.environ.get(name)}; \
    json.dump(given, open("/settings.json", "w"), indent=2)'


# The CPU build of vLLM, and the worker's packages.
FROM ${PYTHON_IMAGE} AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# A library of vLLM's CPU kernels.
RUN apt-get update && apt-get install --yes --quiet --no-install-recommends libnuma1=2.0.16-1 \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/cpu.lock requirements/
# The CPU build of PyTorch has its own package index, which is used for that package only.
RUN --mount=type=cache,target=/root/.cache/pip \
    grep '^torch==' requirements/cpu.lock > requirements/torch.lock \
    && python3 -m pip install --quiet --no-deps --retries 1 --extra-index-url "$TORCH_INDEX" \
        --requirement requirements/torch.lock \
    && python3 -m pip install --quiet --no-deps --requirement requirements/cpu.lock
# The packages' bytecode, which the worker's user cannot write: else each start compiles what it imports, which takes
# longer than all the rest. Valid whatever the files' times are. Some packages have files that are no Python.
RUN python3 -W ignore -c 'import compileall, os, py_compile, sys; \
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH; \
    paths = [path for path in sys.path if os.path.isdir(path)]; \
    [compileall.compile_dir(path, quiet=2, workers=0, invalidation_mode=mode) \
        for path in paths if not any(path.startswith(other + "/") for other in paths)]'


# The tiny model: a real one of a few megabytes, trained here.
FROM cpu-packages AS tiny
COPY builder/ builder/
RUN python3 -m builder tiny /model && python3 -m builder manifest /model \
    && echo '{"SERVED_MODEL_NAME": "tiny", "TOOL_CALL_PARSER": "hermes", "ENABLE_AUTO_TOOL_CHOICE": true}' \
        > /settings.json


# The worker's own code with its bytecode, which is valid only for the very source.
FROM cpu-packages AS cpu-code
COPY . .
RUN python3 -m compileall -q --invalidation-mode checked-hash builder emulator engine


FROM cpu-packages AS cpu
ARG MODEL_DIR=/workspace/vllm/tiny
RUN useradd --create-home --uid 10001 worker && install --directory --owner=10001 /workspace/vllm/compiled
ENV BAKED_MODEL_DIR=${MODEL_DIR} COMPILE_CACHE_DIR=/workspace/vllm/compiled PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1
COPY --from=tiny /model ${MODEL_DIR}
COPY --from=tiny /settings.json /workspace/vllm/settings.json
COPY --from=cpu-code /app .
USER 10001
HEALTHCHECK --interval=30s --start-period=10m CMD ["python3", "-m", "engine.health"]
ARG VERSION
ARG SOURCE
LABEL org.opencontainers.image.title="vllm-serverless (CPU)" \
    org.opencontainers.image.description="A serverless worker that runs vLLM in process, on a CPU, with a model inside" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.version="${VERSION}"
CMD ["python3", "handler.py"]


FROM cpu AS cpu-hub
ARG MODEL_DIR=/workspace/vllm/model
ENV BAKED_MODEL_DIR=${MODEL_DIR}
COPY --from=model /model ${MODEL_DIR}
COPY --from=model /settings.json /workspace/vllm/settings.json
ARG MODEL_NAME
ARG MODEL_REVISION
LABEL vllm-serverless.model="${MODEL_NAME}" vllm-serverless.model.revision="${MODEL_REVISION}"


# An image that was started once: its build context is a directory with what `python -m builder warm` has packed there.
# hadolint ignore=DL3006
FROM ${WARM_FROM} AS warm
# Not `ADD`: what it unpacks may belong to root, and the worker adds to these directories.
RUN --mount=type=bind,source=compiled.tar,target=/compiled.tar \
    python3 -m builder unpack /compiled.tar "$COMPILE_CACHE_DIR"


FROM ${BASE_IMAGE} AS gpu-packages
WORKDIR /app
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# If `python3` is too old, as on Ubuntu 22.04, link it to a later version that is installed too.
RUN is_new="import sys; sys.exit(sys.version_info < (3, 11))"; \
    python3 -c "$is_new" 2>/dev/null \
    || ln -sf "$(command -v python3.13 || command -v python3.12 || command -v python3.11)" /usr/local/bin/python3; \
    hash -r; \
    { python3 -c "$is_new" && python3 -m pip --version; } >/dev/null 2>&1 \
    || { echo "BASE_IMAGE has no Python from 3.11 with pip" >&2; exit 1; }
COPY requirements/gpu.lock requirements/worker.lock requirements/
# If the base has vLLM, its packages are not changed: worker.lock has only what the worker needs in addition. Otherwise
# gpu.lock is installed beside the base's packages, not over them: an older torch has libraries that are built for it.
ENV PATH=/opt/packages/bin:${PATH}
RUN --mount=type=cache,target=/root/.cache/pip \
    if python3 -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("vllm") is None)'; \
    then python3 -m pip install --quiet --no-deps --requirement requirements/worker.lock; \
    else pip=$(python3 -c 'import pip; print(*pip.__path__)') \
        && python3 -m venv --without-pip /opt/packages && hash -r \
        && python3 "$pip" install --quiet --no-deps --ignore-installed --requirement requirements/gpu.lock; \
    fi
# The packages' bytecode, as in `cpu-packages`: vLLM's image has none.
RUN python3 -W ignore -c 'import compileall, os, py_compile, sys; \
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH; \
    paths = [path for path in sys.path if os.path.isdir(path)]; \
    [compileall.compile_dir(path, quiet=2, workers=0, invalidation_mode=mode) \
        for path in paths if not any(path.startswith(other + "/") for other in paths)]'


FROM gpu-packages AS gpu-code
COPY . .
RUN python3 -m compileall -q --invalidation-mode checked-hash builder emulator engine


FROM gpu-packages AS gpu
# Outside of /runpod-volume and other mount points of platforms: a volume would hide it.
ARG MODEL_DIR=/workspace/vllm/phi-4-bnb-4bit
# The user. Volumes may belong to root: use --build-arg WORKER=0 if models are downloaded to one.
ARG WORKER=10001
RUN useradd --create-home --uid 10001 worker && install --directory --owner=10001 /workspace/vllm/compiled
ENV BAKED_MODEL_DIR=${MODEL_DIR} COMPILE_CACHE_DIR=/workspace/vllm/compiled PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1
COPY --from=model /model ${MODEL_DIR}
COPY --from=model /settings.json /workspace/vllm/settings.json
COPY --from=gpu-code /app .
USER ${WORKER}
HEALTHCHECK --interval=30s --start-period=10m CMD ["python3", "-m", "engine.health"]
ARG MODEL_NAME
ARG MODEL_REVISION
ARG VERSION
ARG SOURCE
LABEL org.opencontainers.image.title="vllm-serverless" \
    org.opencontainers.image.description="A serverless worker that runs vLLM in process, with a model inside" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.version="${VERSION}" \
    vllm-serverless.model="${MODEL_NAME}" \
    vllm-serverless.model.revision="${MODEL_REVISION}"
# Replaces that of the base, `vllm serve`.
ENTRYPOINT []
CMD ["python3", "handler.py"]
