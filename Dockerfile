# One image for the scheduler, the dashboard and the MLflow server.
# A smaller image without CUDA: --build-arg PIP_EXTRA_INDEX_URL=<an index with CPU wheels of torch>
FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md constraints.txt ./
# Dependencies first, from the metadata alone: they change less often than the sources.
RUN mkdir -p tsforge pipelines dashboards configs \
 && touch tsforge/__init__.py pipelines/__init__.py dashboards/__init__.py \
 && pip install -c constraints.txt '.[postgres]' \
 && pip uninstall --yes tsforge
COPY tsforge tsforge
COPY pipelines pipelines
COPY dashboards dashboards
COPY configs configs
RUN pip install --no-deps -c constraints.txt . && pip check

FROM python:3.12-slim
RUN groupadd --gid 10001 tsforge \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tsforge \
 && install --directory --owner=10001 --group=10001 /var/lib/tsforge /var/lib/mlflow
COPY --from=build /opt/venv /opt/venv
COPY deploy/healthcheck.py /opt/tsforge/healthcheck.py
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    TSFORGE_HOME=/var/lib/tsforge
USER 10001:10001
WORKDIR /tmp
CMD ["tsforge", "--help"]
