# One image for every process of the fleet: the jobs and their worker, the drain, the Prefect server, the example app.
#
#   docker build -t tallystick .

FROM python:3.11.14-slim-bookworm AS build
RUN python -m pip install --no-cache-dir --disable-pip-version-check uv==0.13.8
RUN uv venv /venv
ENV VIRTUAL_ENV=/venv UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
WORKDIR /app
COPY pyproject.toml requirements.lock README.md LICENSE ./
# Versions and hashes are the lock's. What only tests need is left out.
RUN uv pip install --require-hashes --constraints requirements.lock --all-extras --group jobs --requirements pyproject.toml
COPY metering metering
RUN uv pip install --no-deps --build-constraints requirements.lock --editable .

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --no-create-home tallystick \
    && install --directory --owner tallystick --group tallystick /var/lib/tallystick
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    METERING_HOME=/var/lib/tallystick \
    PREFECT_HOME=/var/lib/tallystick/prefect
COPY --from=build /venv /venv
WORKDIR /app
COPY pyproject.toml prefect.yaml ./
COPY reports reports
COPY metering metering
COPY tasks tasks
COPY flows flows
COPY examples examples
USER tallystick
HEALTHCHECK NONE
CMD ["tallystick", "--help"]
