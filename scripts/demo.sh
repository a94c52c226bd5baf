#!/usr/bin/env bash
# The main job, whole, on a CPU: both arms (without speculation, and DRAFT_TARGET) of a pair of
# checkpoints whose acceptance is known in closed form, on real vLLM; then the same on natural
# multi-turn prompts.
#
#   scripts/demo.sh [DIR]     DIR: where the runs go (default: runs/demo-<time>)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup .venv scripts/requirements-cpu.txt

out=${1:-runs/demo-$(date +%Y%m%d-%H%M%S)}
models=models/calibration
log=$out/engine.log
mkdir -p "$out"
.venv/bin/speedbench calibrate --build_only --save_dir "$models"

# Engine settings of the demo, not of a measurement: no compilation and one worker process less
# start faster; 2 GiB of KV cache are plenty.
cat >"$out/engine.yaml" <<'YAML'
engine_args:
  enforce_eager: true
YAML
export VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
# Threads pinned to cores that others use, too, make a 10 ms step last 100 ms.
export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

measure() { # measure PAIR DATASET
    echo "measuring both arms on the $2 prompts, real vLLM on the CPU"
    .venv/bin/python run.py --engine VLLM --model_dir "$models/$1/target" \
        --draft_model_dir "$models/$1/draft" --speculative_algorithm DRAFT_TARGET --draft_length 3 \
        --baseline --dataset "$2" --concurrency 16 --output_length 64 \
        --runtime_params "$out/engine.yaml" --save_dir "$out/$2" >"$out/$2.txt" 2>>"$log" || {
        tail -n 30 "$log" >&2
        echo "measuring failed: its log is $log" >&2
        return 1
    }
}

measure word calibration
measure bpe mini

for data in mini calibration; do
    echo
    cat "$out/$data.txt"
    .venv/bin/speedbench report "$out/$data" --format html
done
echo
echo "reports: $out/{calibration,mini}/report.html $out/{calibration,mini}.txt"
echo "records: $out/{calibration,mini}/{baseline,speculative}-1"
