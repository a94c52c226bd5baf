#!/usr/bin/env bash
# Installs what the tests need and runs them all; arguments go to pytest (-m "not real": quick).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup .venv scripts/requirements-cpu.txt scripts/requirements-test.txt
setup .venv-sglang scripts/requirements-sglang-cpu.txt
export VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
exec .venv/bin/python -m pytest "$@"
