# The image of every archfront service. Targets: cpu (the default) and cuda.
#
#   docker build --target cpu --tag archfront:cpu .
#   docker build --target cuda --tag archfront:cuda .
#
# All hosts of a cluster must run the same Python, packages and archfront: build once, and use the image everywhere.
ARG BASE=python:3.11-slim

FROM ${BASE} AS wheel
# pip reads these from its environment; an empty one counts as not set.
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --root-user-action=ignore --constraint constraints.txt setuptools
COPY src src
COPY search search
COPY evaluators evaluators
COPY db db
COPY spaces spaces
COPY kernels kernels
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /dist .

FROM ${BASE} AS runtime
# torch.compile and Triton compile what they generate while they run.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Whoever runs the containers may choose another user, who can read the secrets: so these folders are open like /tmp.
RUN useradd --uid 1000 --no-create-home --home-dir /home/archfront archfront \
    && mkdir --mode=1777 /home/archfront /files /data
# USER, because a user that has no entry in passwd has no name either, and torch asks for it.
ENV HOME=/home/archfront USER=archfront PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
COPY constraints.txt /dist/
COPY --from=wheel /dist /dist
WORKDIR /home/archfront
CMD ["archfront", "--help"]

# PyPI's torch brings the CUDA libraries itself; the host gives the driver.
FROM runtime AS cuda
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
# More distributions for all hosts: a file system of fsspec (s3fs, gcsfs), or your own plug-ins.
ARG PACKAGES=""
RUN set -- /dist/archfront-*.whl \
    && pip install --no-cache-dir --root-user-action=ignore --constraint /dist/constraints.txt "$1[postgres]" ${PACKAGES}
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER archfront

FROM runtime AS cpu
ARG PIP_INDEX_URL=""
# With PyTorch's index of CPU builds here, the image is some gigabytes smaller: a build "+cpu" is preferred to a plain
# one. Without it the ordinary build is installed, which needs no GPU either.
ARG PIP_EXTRA_INDEX_URL=""
ARG PACKAGES=""
RUN set -- /dist/archfront-*.whl \
    && pip install --no-cache-dir --root-user-action=ignore --constraint /dist/constraints.txt "$1[postgres]" ${PACKAGES}
USER archfront
