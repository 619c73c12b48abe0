# One image for Airflow's processes, the simulated Models Backend and the command line.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 AIRFLOW_HOME=/airflow
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir uv && uv pip sync --system --no-cache --compile-bytecode requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --uid 10001 router \
    && install -d -o router -g router /airflow \
    && chown -R router:router config
USER router
