#!/usr/bin/env bash
# Installs what the tests need and runs them all; arguments go to pytest (-m "not real": quick).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
# Suffix decoding's library is built from source, with what the lock file before it installs.
setup .venv scripts/requirements-cpu.txt scripts/requirements-suffix.txt scripts/requirements-test.txt
setup .venv-sglang scripts/requirements-sglang-cpu.txt
export VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
# Threads pinned to cores that others use, too, make a 10 ms step last 100 ms.
export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# Two files at a time: an engine mostly keeps one core busy.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
