#!/usr/bin/env bash
# The tests that need a GPU, and the benches on one: 8192, 32768 and 131072 tokens, in the shapes of GPT-Neo-1.3B and
# Llama-3.2-1B with random weights. Needs an NVIDIA GPU, no network, and less than 25 minutes:
#
#   benchmarks/gpu.sh [FOLDER]              records go to FOLDER, by default benchmarks/results
#   SCALE=tiny benchmarks/gpu.sh [FOLDER]   the same parts at tiny sizes, on the CPU too: tries this script
#   benchmarks/gpu.sh --dry-run [FOLDER]    the same as SCALE=tiny
#
# Each part has a time limit of its own, and one that fails does not stop the rest. The last lines say what became of
# each; the exit status is the number of parts that failed. PYTHON names another interpreter, PARTS (a regular
# expression) a choice of parts. GPT-Neo stops at 8192 tokens: transformers' own class holds a mask of all positions
# squared in every layer.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
if [[ ${1:-} == --dry-run ]]; then SCALE=tiny; shift; fi
if [[ $# -gt 1 || ${1:-} == -* ]]; then sed -n '2,14s/^# \{0,1\}//p' benchmarks/gpu.sh >&2; exit 2; fi
SCALE=${SCALE:-full}
if [[ $SCALE != full && $SCALE != tiny ]]; then echo "SCALE is '$SCALE'; allowed: full, tiny" >&2; exit 2; fi
if [[ -z ${PYTHON:-} ]]; then PYTHON=python3; [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python; fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=150

device=$("$PYTHON" -c '
import re, torch
import masformer.cli
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))') || { echo "masformer does not run with $PYTHON" >&2; exit 2; }
if [[ $device == cpu && $SCALE == full ]]; then
  echo "torch sees no NVIDIA GPU; SCALE=tiny tries this script without one" >&2; exit 2
fi
out=${1:-}
if [[ -z $out ]]; then out=benchmarks/results; [[ $SCALE == tiny ]] && out=$(mktemp -d); fi
mkdir -p "$out" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Sizes
neo=benchmarks/shapes/gpt-neo-1.3b llama=benchmarks/shapes/llama-1b
neo_plan='full@8-15; block:1024' llama_plan='full@6-9; window:1024+4'
short=8192 middle=32768 long=131072 new=32
spans=(--span window:512 --span window:1024+4 --span block:1024x2) dtype=bfloat16
neo_heads=(--heads 16 --kv-heads 16 --head-dim 128) llama_heads=(--heads 32 --kv-heads 8 --head-dim 64)
repeats=(--repeats 5) few=(--repeats 3)
if [[ $SCALE == tiny ]]; then
  # The same shapes, cut down: so many layers, heads and positions.
  "$PYTHON" - "$neo" "$llama" "$scratch" <<'PYTHON' || exit 2
import json, sys
from pathlib import Path
*sources, target = map(Path, sys.argv[1:])
small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 8}
small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 61}
for source in sources:
    config = json.loads((source / "config.json").read_text())
    config |= {name: size for name, size in small.items() if name in config}
    if "attention_types" in config:
        config["attention_types"] = [[["global", "local", "local"], 1]]
    (target / source.name).mkdir()
    (target / source.name / "config.json").write_text(json.dumps(config))
PYTHON
  neo=$scratch/gpt-neo-1.3b llama=$scratch/llama-1b
  neo_plan='full@1; block:16' llama_plan='full@1; window:16+4'
  short=96 middle=160 long=288 new=2
  spans=(--span window:16 --span window:16+4 --span block:16x2) dtype=float32
  neo_heads=(--heads 4 --kv-heads 4 --head-dim 16) llama_heads=(--heads 4 --kv-heads 2 --head-dim 8)
  repeats=(--repeats 1) few=(--repeats 1)
fi

failed=0 summary=()
# part SECONDS NAME COMMAND...: runs it under a time limit; what it prints goes on to the screen
part() {
  local limit=$1 name=$2 start=$SECONDS status
  shift 2
  [[ $name =~ ${PARTS:-.} ]] || return 0
  printf '\n=== %s (at most %s s)\n' "$name" "$limit"
  timeout --kill-after=10 "$limit" "$@"
  status=$?
  case $status in
    0) summary+=("passed  $name, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("TIMEOUT $name, after $limit s"); failed=$((failed + 1)) ;;
    *) summary+=("FAILED  $name, exit status $status"); failed=$((failed + 1)) ;;
  esac
}
# bench SECONDS NAME COMMAND OPTIONS...: a bench with a record of its own, written whole by masformer
bench() {
  local limit=$1 name=$2
  shift 2
  part "$limit" "$name" "$PYTHON" -m masformer bench "$@" --json "$out/$name-$device.json"
}

gpu_tests=(-m gpu)
[[ $device == cpu ]] && gpu_tests=(-m gpu --collect-only)
part 300 tests-attention "$PYTHON" -m pytest -q "${gpu_tests[@]}" tests/attention
part 120 tests-models "$PYTHON" -m pytest -q "${gpu_tests[@]}" tests/models

attention() { bench "$1" "$2" attention --dtype $dtype "${spans[@]}" "${@:3}"; }
whole() { bench "$1" "$2" "$3" "$4" --random-weights --dtype $dtype --plan "$5" "${@:6}"; }

whole 80 prefill-llama-1b prefill "$llama" "$llama_plan" --lengths $short,$middle "${few[@]}"
whole 80 decode-llama-1b decode "$llama" "$llama_plan" --lengths $short,$middle --new $new "${few[@]}"
whole 90 train-llama-1b train "$llama" "$llama_plan" --lengths $short --checkpointing "${few[@]}"
whole 60 prefill-gpt-neo-1.3b prefill "$neo" "$neo_plan" --lengths $short "${few[@]}"
whole 60 decode-gpt-neo-1.3b decode "$neo" "$neo_plan" --lengths $short --new $new "${few[@]}"
whole 80 train-gpt-neo-1.3b train "$neo" "$neo_plan" --lengths $short --checkpointing "${few[@]}"
attention 120 attention-llama-1b "${llama_heads[@]}" --lengths $short,$middle "${repeats[@]}"
attention 60 attention-llama-1b-long "${llama_heads[@]}" --lengths $long --peers none "${repeats[@]}"
attention 60 attention-gpt-neo-1.3b "${neo_heads[@]}" --lengths $short,$middle --peers none "${repeats[@]}"
attention 50 attention-gpt-neo-1.3b-long "${neo_heads[@]}" --lengths $long --peers none "${repeats[@]}"
whole 110 prefill-llama-1b-long prefill "$llama" "$llama_plan" --lengths $long --peers none --repeats 1
whole 110 decode-llama-1b-long decode "$llama" "$llama_plan" --lengths $long --peers none --new $new "${few[@]}"
whole 100 train-llama-1b-middle train "$llama" "$llama_plan" --lengths $middle --checkpointing --repeats 1

printf '\n=== summary: %s parts, %s failed, %s s; records in %s\n' "${#summary[@]}" $failed $SECONDS "$out"
printf '%s\n' ${summary[@]+"${summary[@]}"}
exit $failed
