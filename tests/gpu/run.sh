#!/usr/bin/env bash
# What one GPU can show of this project, as one table:  bash tests/gpu/run.sh TIER [FOLDER]
#   TIER    1  torch and megatron-core: attention, log-probs, layouts over NCCL, MFU
#           2  and Transformer Engine: bf16, FP8, its own attention
#           3  and vLLM with Ray: whole runs, the weight push
#   FOLDER  parts of a tar of wheels (part-*), for a machine without network; installed beside what Python has
# At most 6 minutes a tier on one H200: what is cut by its own limit says so. OUT=DIR keeps the logs. Without a GPU the same
# commands are rehearsed: tests skip, benchmarks run at a small size.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tier=${1:-1} parts=${2:-} out=${OUT:-$(mktemp -d)}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
case $tier in 1 | 2 | 3) ;; *) echo "error: tier $tier: give 1, 2 or 3" >&2; exit 2 ;; esac
if [ -n "$parts" ]; then
    site=$out/site
    mkdir -p "$site" && cat "$parts"/part-* | tar x -C "$out" &&
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$out"/whl/*.whl ||
        { echo "error: $parts: its parts hold no wheels for this Python; see the lines above" >&2; exit 2; }
    PYTHONPATH=$PYTHONPATH:$site
fi

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
# ranks may share the GPU from NCCL 2.30 on; a newer one in the wheels goes before torch's own
nccl=$(ls -d "$out"/site/nvidia/nccl/lib/libnccl.so.2 2>/dev/null)
small=()
if [ -z "$gpu" ]; then
    small=(--tokens 20 --prompt 50 --questions 1 --heads 2 --kv-heads 1 --dim 16 --repeats 1)
fi
printf '%s\n%-26s %8s  %s\n' "${gpu:-no GPU: a rehearsal}" what seconds result

# line NAME LIMIT_S COMMAND...: runs it and prints its line; the last line of its output is the result
failed=0
line() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    LD_PRELOAD=${nccl:-} timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    local said
    said=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -1)
    [ $status = 124 ] && said="cut after $limit s"
    [ $status = 5 ] && said="no test ran"
    [ $status = 0 ] || { failed=1; said="FAILED ($status): $said"; }
    printf '%-26s %8d  %s\n' "$name" $((SECONDS - began)) "$said"
}
tests() { "$python" -m pytest -q -x -p no:cacheprovider "$@"; }
export -f tests
export python

case $tier in
1)
    line attention_tests 60 bash -c 'tests tests/gpu/test_attention_cuda.py'
    line attention_time 60 "$python" benchmarks/attention.py ${small[@]+"${small[@]}"}
    line policy_tests 60 bash -c 'tests tests/gpu/test_policy_cuda.py'
    [ -n "$gpu" ] && line mfu 90 "$python" benchmarks/trainer.py --shapes llama-1b --precision bf16
    line layout_tests 120 bash -c 'tests tests/gpu/test_layouts_cuda.py'
    ;;
2)
    line te_tests 150 bash -c 'tests tests/gpu/test_transformer_engine.py'
    [ -n "$gpu" ] && line mfu_bf16_fp8 150 "$python" benchmarks/trainer.py --shapes llama-1b --precision bf16 fp8
    ;;
3)
    line run_tests 340 bash -c 'tests tests/gpu/test_run_cuda.py'
    ;;
esac
echo "logs: $out"
exit $failed
