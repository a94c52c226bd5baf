# speedbench on top of an engine's own image, which brings the engine, torch and CUDA:
#   docker build --build-arg ENGINE_IMAGE=vllm/vllm-openai:v0.26.0 -t speedbench .
#   docker run --gpus all --ipc=host -v /models:/models -v "$PWD/runs:/speedbench/runs" \
#       speedbench run --engine VLLM --model_dir /models/target ...
# The folder for the runs must be writable for user 10001.
ARG ENGINE_IMAGE
FROM ${ENGINE_IMAGE}

WORKDIR /speedbench
COPY setup.cfg pyproject.toml README.md LICENSE run.py ./
COPY speedbench speedbench
COPY engines engines
COPY data data
COPY scripts scripts
# Some images mark their Python as managed by the system; it is the engine's, and ours to add to.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# --no-deps for speedbench itself, and no pins: what the engine brought must not move. Beside it:
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir "pyarrow>=15" "scipy>=1.11" "pydantic>=2.5" "rich>=13" \
        "PyYAML>=6" "setuptools>=70.1" && \
    python3 -m pip install --no-cache-dir --no-deps --no-build-isolation -e .

RUN useradd --create-home --uid 10001 measurer && chown 10001 /speedbench
USER 10001
ENTRYPOINT ["speedbench"]
CMD ["--help"]
