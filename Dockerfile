# The server with a bundle inside, for processors (the last stage) and for NVIDIA's GPUs:
#   docker build --tag r2-edge .
#   docker build --tag r2-edge:cuda --target cuda .
# docs/serving.md says how both are run; --build-arg BUNDLE=FOLDER takes another bundle.
FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --system --create-home server
WORKDIR /srv/r2-edge
COPY pyproject.toml README.md LICENSE ./
COPY locks/full.txt locks/full.txt
COPY runtime runtime
COPY serving serving
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["python", "-m", "serving", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]

# CUDA and cuDNN come as packages of Python; the driver is lent by NVIDIA's container toolkit.
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --constraint locks/full.txt '.[gpu,serve]'
ARG BUNDLE=build/mnist
COPY ${BUNDLE} /bundle
USER server
CMD ["mnist=/bundle", "--provider", "cuda"]

FROM base AS cpu
RUN pip install --constraint locks/full.txt '.[cpu,serve]'
ARG BUNDLE=build/mnist
COPY ${BUNDLE} /bundle
USER server
CMD ["mnist=/bundle"]
