# The service, without torch: docs/containers.md. Needs BuildKit, as Docker 20.10 and later have it.
ARG BASE_IMAGE=python:3.11-slim
# Where packages are installed, with the same Python. One of your own may bring pip's configuration
# and certificates of a mirror; nothing of it gets into the image but the environment in /opt/venv.
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
ARG EXTRAS=redis
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY models/mnist models/mnist
COPY scumble scumble
COPY training training
COPY attacker attacker
COPY evaluation evaluation
COPY app app
COPY docker/slim.py docker/slim.py
# Compiled is only what a start loads: the whole would be 60 MB. The check serves nothing, but loads
# both engines and runs the model once.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python3 install --no-compile ".[${EXTRAS}]" \
    && python3 docker/slim.py /opt/venv/lib/python3*/site-packages
WORKDIR /
RUN SCUMBLE_ENGINE=onnxruntime /opt/venv/bin/scumble check \
    && /opt/venv/bin/scumble check \
    && /opt/venv/bin/python3 -c "import app.serve, app.supervisor, app.worker, app.admin, app.console.helper"

FROM ${BASE_IMAGE}
RUN useradd --no-log-init --uid 10001 --user-group --no-create-home scumble
COPY --from=build /opt/venv /opt/venv
COPY models /models
COPY docker/health.py /opt/health.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SCUMBLE_HOST=0.0.0.0 \
    SCUMBLE_MODEL_DIR=/models
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/opt/venv/bin/python3", "/opt/health.py"]
ENTRYPOINT ["scumble"]
CMD ["serve"]
