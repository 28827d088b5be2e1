# smelt in a container. Everything it keeps is in /data; it runs as a user without rights.
#   docker build --tag smelt .
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume smelt-data:/data smelt
# With CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128, and --gpus all when it runs.
FROM python:3.11-slim-bookworm

# A compiler: the kernels for this processor, and torch.compile, are built on first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Torch alone first: it is most of the image, and changes least.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/smelt
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
    --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY smelt smelt
RUN pip install --no-cache-dir --constraint constraints.txt '.[postgres,hub]' \
    && useradd --uid 10001 --create-home smelt \
    && install --directory --owner smelt /data

USER smelt
WORKDIR /data
ENV SMELT_HOME=/data SMELT_HOST=0.0.0.0 XDG_CACHE_HOME=/data/.cache PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["smelt"]
CMD ["serve"]
