#!/usr/bin/env bash
# What a GPU must show, in at most 8 minutes and the most telling parts first: the tests that need one, attention in the
# heads of SmolLM2-135M and Llama-3.2-1B, and whole models of these shapes (and of GPT-Neo-1.3B) with random weights.
# Needs an NVIDIA GPU and no network:
#
#   benchmarks/gpu.sh [FOLDER]              records go to FOLDER, by default benchmarks/results
#   SCALE=tiny benchmarks/gpu.sh [FOLDER]   the same parts at tiny sizes, on the CPU too: tries this script
#   benchmarks/gpu.sh --dry-run [FOLDER]    the same as SCALE=tiny
#
# Each part writes its record as soon as it is done, has a time limit of its own, and one that fails does not stop the
# rest. A part whose record is in FOLDER already, made on this device by this torch, this code and the same options, is
# kept, so that a second run goes on where the first ended; FORCE=1 repeats it. LIMIT (480) is how many seconds all
# may take: what has no time left is not begun. The last lines say what became of each part; the exit status is the
# number of parts that failed. PYTHON names another interpreter, PARTS (a regular expression) a choice of parts.
# GPT-Neo stops at 8192 tokens: transformers' own class holds a mask of all positions squared in every layer.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
if [[ ${1:-} == --dry-run ]]; then SCALE=tiny; shift; fi
if [[ $# -gt 1 || ${1:-} == -* ]]; then sed -n '2,17s/^# \{0,1\}//p' benchmarks/gpu.sh >&2; exit 2; fi
SCALE=${SCALE:-full} LIMIT=${LIMIT:-480} slower=1
if [[ $SCALE != full && $SCALE != tiny ]]; then echo "SCALE is '$SCALE'; allowed: full, tiny" >&2; exit 2; fi
if [[ ! $LIMIT =~ ^[1-9][0-9]*$ ]]; then echo "LIMIT is '$LIMIT'; allowed: whole seconds from 1" >&2; exit 2; fi
if [[ -z ${PYTHON:-} ]]; then PYTHON=python3; [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python; fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=150

facts=$("$PYTHON" -c '
import re
import masformer.cli
from masformer.records import environment
found = environment()
name = found["device"] if not found["device"].startswith("CPU") else "cpu"
print(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))
print(found["device"], found["versions"]["torch"], found["code"], sep="|")') || {
  echo "masformer does not run with $PYTHON" >&2; exit 2; }
{ read -r device; read -r stamp; } <<<"$facts"
if [[ $device == cpu && $SCALE == full ]]; then
  echo "torch sees no NVIDIA GPU; SCALE=tiny tries this script without one" >&2; exit 2
fi
out=${1:-}
if [[ -z $out ]]; then out=benchmarks/results; [[ $SCALE == tiny ]] && out=$(mktemp -d); fi
mkdir -p "$out" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Sizes
shapes=benchmarks/shapes
neo_plan='full@8-15; block:1024' llama_plan='full@6-9; window:1024+4'
smollm2_plan='full@4,7-8,17-18,20,23-24; window:256+4' smollm2_local='window:256+4'
short=8192 middle=32768 long=131072 eval_lengths=2048,8192 eval_tokens=65536 new=16 rows=4 many=8 half=bfloat16 compile=(--compile)
neo_heads=(--heads 16 --kv-heads 16 --head-dim 128) llama_heads=(--heads 32 --kv-heads 8 --head-dim 64)
smollm2_heads=(--heads 9 --kv-heads 3 --head-dim 64 --batch $rows)
smollm2_spans=(--span window:256 --span window:256+4 --span window:512 --span block:512)
flex_spans=(--span window:256 --span window:256+4)
llama_spans=(--span window:512 --span window:1024+4 --span block:1024)
neo_spans=(--span window:512 --span block:1024 --span block:1024x2)
repeats=(--repeats 5 --cap 4)
if [[ $SCALE == tiny ]]; then
  # The same shapes, cut down: so many layers, heads and positions.
  "$PYTHON" - $shapes/{gpt-neo-1.3b,llama-1b,smollm2-135m} "$scratch" <<'PYTHON' || exit 2
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
  shapes=$scratch
  neo_plan='full@1; block:16' llama_plan='full@1; window:16+4' smollm2_plan='full@1; window:16+4' smollm2_local='window:16+4'
  short=96 middle=160 long=288 eval_lengths=48,96 eval_tokens=96 new=2 rows=2 many=2 half=float32
  neo_heads=(--heads 4 --kv-heads 4 --head-dim 16) llama_heads=(--heads 4 --kv-heads 2 --head-dim 8)
  smollm2_heads=(--heads 4 --kv-heads 2 --head-dim 8 --batch $rows)
  smollm2_spans=(--span window:16 --span window:16+4 --span block:16)
  flex_spans=(--span window:16) llama_spans=(--span window:16) neo_spans=(--span block:16)
  repeats=(--repeats 1 --cap 4)
  slower=4 # a limit is not what is tried here
  export TORCH_COMPILE_DISABLE=1 # compiling takes longer than all parts together
  compile=()
fi

failed=0 waiting=0 summary=()
# part SECONDS NAME COMMAND...: runs it under a time limit; what it prints goes on to the screen
part() {
  local limit=$(($1 * slower)) name=$2 start=$SECONDS left=$((LIMIT * slower - SECONDS)) status
  shift 2
  if [[ $left -lt 1 ]]; then
    summary+=("waits   $name, no time left"); waiting=$((waiting + 1))
    return 1
  fi
  [[ $limit -gt $left ]] && limit=$left
  printf '\n=== %s (at most %s s)\n' "$name" "$limit"
  timeout --kill-after=10 "$limit" "$@"
  status=$?
  case $status in
    0) summary+=("passed  $name, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("TIMEOUT $name, after $limit s"); failed=$((failed + 1)) ;;
    *) summary+=("FAILED  $name, exit status $status"); failed=$((failed + 1)) ;;
  esac
  return $status
}
# wanted NAME FILE COMMAND...: whether this part is to run, or is left out by PARTS or kept
wanted() {
  [[ $1 =~ ${PARTS:-.} ]] || return 1
  [[ -z ${FORCE:-} && -f $2 ]] || return 0
  "$PYTHON" -I - "$2" "$stamp" "${@:3}" <<'PYTHON' || return 0
import json, shlex, sys
path, stamp, *words = sys.argv[1:]
text = open(path, encoding="utf-8").read()
try:
    record = json.loads(text)
    made = [record["device"], record["versions"]["torch"], record["code"]]
    same = "|".join(made) == stamp and shlex.split(record["command"])[1:-1] == words[:-1]
except ValueError:  # what tests leave: no JSON
    same = text.splitlines() == [stamp, " ".join(words)]
except (KeyError, TypeError):  # a record of before there was such a key
    same = False
sys.exit(not same)
PYTHON
  summary+=("kept    $1, ${2##*/}")
  return 1
}
# bench SECONDS NAME COMMAND OPTIONS...: a bench with a record of its own, written whole by masformer
bench() {
  local limit=$1 name=$2 record="$out/$2-$device.json"
  shift 2
  wanted "$name" "$record" bench "$@" --json "$record" || return 0
  part "$limit" "$name" "$PYTHON" -m masformer bench "$@" --json "$record"
}
# tests SECONDS NAME FILE...: their tests for a GPU; a file says that they passed
tests() {
  local limit=$1 name=$2 record="$out/$2-$device.txt" digest
  local words=(-m pytest -q -m gpu "${@:3}")
  digest=$(find "${@:3}" -name '*.py' -exec cat {} + 2>&1 | cksum)
  [[ $device == cpu ]] && words+=(--collect-only)
  wanted "$name" "$record" "${words[@]}" "$digest" || return 0
  part "$limit" "$name" "$PYTHON" "${words[@]}" || return 0
  printf '%s\n%s\n' "$stamp" "${words[*]} $digest" >"$record"
}
attention() { bench "$1" "$2" attention --dtype $half "${@:3}" "${repeats[@]}"; }
whole() { bench "$1" "$2" "$3" "$shapes/$4" --random-weights "${@:5}" "${repeats[@]}"; }
training=(--dtype float32 --precision bfloat16 --lengths $short --loss-chunk 8192 --plan "$smollm2_plan")
llama=(--dtype $half --plan "$llama_plan") neo=(--dtype $half --plan "$neo_plan" --lengths $short)

# What matters most, within the limit
tests 60 tests-flash tests/attention/test_flash.py
tests 80 tests-decoding tests/attention/test_stored.py tests/models/test_graphs.py
attention 45 attention-smollm2 "${smollm2_heads[@]}" "${smollm2_spans[@]}" --lengths $short --peers torch-flash,hf-sdpa
whole 90 train-smollm2 train smollm2-135m "${training[@]}" --batch $rows --plan "$smollm2_local" --peers none ${compile[@]+"${compile[@]}"}
whole 80 decode-llama-1b decode llama-1b "${llama[@]}" --lengths $short,$middle,$long --new $new
whole 60 decode-llama-1b-rows decode llama-1b "${llama[@]}" --lengths $middle,$long --new $new --batch $many --peers none
whole 60 decode-llama-1b-compiled decode llama-1b "${llama[@]}" --lengths $middle,$long --new $new --peers none ${compile[@]+"${compile[@]}"}
# What a second run is for
whole 60 train-smollm2-rows train smollm2-135m "${training[@]}" --batch $many --peers none ${compile[@]+"${compile[@]}"}
attention 45 attention-llama-1b "${llama_heads[@]}" "${llama_spans[@]}" --lengths $short,$middle --peers torch-flash
whole 60 eval-smollm2 eval smollm2-135m --dtype float32 --lengths $eval_lengths --tokens $eval_tokens --plan "$smollm2_plan"
whole 60 prefill-llama-1b prefill llama-1b "${llama[@]}" --lengths $short,$middle
attention 80 attention-smollm2-flex "${smollm2_heads[@]}" "${flex_spans[@]}" --lengths $short --peers flex-attention,torch-flash
whole 60 train-smollm2-eager train smollm2-135m "${training[@]}" --batch $rows --plan "$smollm2_local"
attention 45 attention-gpt-neo-1.3b "${neo_heads[@]}" "${neo_spans[@]}" --lengths $short,$middle --peers torch-flash
tests 80 tests-rest tests/attention/test_flex.py tests/models
whole 60 prefill-llama-1b-long prefill llama-1b "${llama[@]}" --lengths $long --peers none
whole 60 train-llama-1b train llama-1b "${llama[@]}" --lengths $short --checkpointing --peers none
whole 60 prefill-gpt-neo-1.3b prefill gpt-neo-1.3b "${neo[@]}"
whole 60 decode-gpt-neo-1.3b decode gpt-neo-1.3b "${neo[@]}" --new $new
whole 80 train-gpt-neo-1.3b train gpt-neo-1.3b "${neo[@]}" --checkpointing

printf '\n=== summary: %s parts, %s failed, %s not begun, %s s; records in %s\n' \
  "${#summary[@]}" $failed $waiting $SECONDS "$out"
printf '%s\n' ${summary[@]+"${summary[@]}"}
exit $failed
