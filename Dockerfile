# Two images, the service without torch and, as target `attacker`, the attacker with it:
# docs/how-to/containers.md. Needs BuildKit, as Docker 20.10 and later have it.
# The only place that names the base image; CONTRIBUTING.md says how to name a newer one.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
# Where packages are installed, with the same Python. One of your own may bring pip's configuration
# and certificates of a mirror; nothing of it gets into the images but what the last lines copy.
ARG BUILD_IMAGE=${BASE_IMAGE}

# The wheel. What builds it is locked, too.
FROM ${BUILD_IMAGE} AS wheel
WORKDIR /src
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/tools \
    && python3 -m pip --python /opt/tools/bin/python3 install --require-hashes --only-binary :all: \
        -r requirements/build.txt -r requirements/sbom.txt
COPY pyproject.toml README.md LICENSE ./
COPY models/mnist models/mnist
COPY scumble scumble
COPY app app
RUN python3 -m pip --python /opt/tools/bin/python3 wheel --no-deps --no-build-isolation \
        --wheel-dir /wheel . \
    && for image in service attacker attacker-cpu; do \
        /opt/tools/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o "/wheel/$image.cdx.json" "requirements/$image.txt" || exit 1; \
    done
COPY docker/slim.py docker/slim.py

FROM wheel AS build-attacker
# A further package index, of torch for the processor alone. Without one pip takes the locked build
# for NVIDIA's processors, which is several gigabytes larger. What another index serves is not
# locked, but for the release.
ARG TORCH_INDEX=
ARG TORCH_VERSION=
RUN --mount=type=cache,target=/root/.cache/pip \
    locked=attacker${TORCH_INDEX:+-cpu} \
    && version=${TORCH_VERSION:-$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/attacker.txt)} \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python3 install --require-hashes --only-binary :all: \
        -r "requirements/$locked.txt" \
    && if [ -n "${TORCH_INDEX}" ]; then \
        python3 -m pip --python /opt/venv/bin/python3 install --only-binary :all: \
            --extra-index-url "${TORCH_INDEX}" "torch==$version" torchvision; \
    fi \
    && python3 -m pip --python /opt/venv/bin/python3 install --no-deps --no-index /wheel/*.whl \
    && cp "/wheel/$locked.cdx.json" /opt/venv/sbom.cdx.json \
    && python3 docker/slim.py /opt/venv/lib/python3*/site-packages

FROM ${BASE_IMAGE} AS attacker
# The folder is the user's, and so is a new volume that is mounted there.
RUN useradd --no-log-init --uid 10002 --user-group --no-create-home thief \
    && install --directory --owner=thief --group=thief /report
COPY --from=build-attacker /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10002:10002
WORKDIR /report
CMD ["scumble", "attack", "--help"]

FROM wheel AS build-service
# Compiled is only what a start loads: the whole would be 60 MB. The check serves nothing, but loads
# both engines and runs the model once.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python3 install --no-compile --require-hashes \
        --only-binary :all: -r requirements/service.txt \
    && python3 -m pip --python /opt/venv/bin/python3 install --no-compile --no-deps --no-index \
        /wheel/*.whl \
    && cp /wheel/service.cdx.json /opt/venv/sbom.cdx.json \
    && python3 docker/slim.py /opt/venv/lib/python3*/site-packages
WORKDIR /
RUN SCUMBLE_ENGINE=onnxruntime /opt/venv/bin/scumble check \
    && /opt/venv/bin/scumble check \
    && /opt/venv/bin/python3 -c "import app.processes.serve, app.processes.supervisor, app.processes.worker, app.admin.application, app.admin.console.preview_process"

FROM ${BASE_IMAGE} AS service
RUN useradd --no-log-init --uid 10001 --user-group --no-create-home scumble
COPY --from=build-service /opt/venv /opt/venv
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
