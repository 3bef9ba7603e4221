#!/usr/bin/env bash
# Everything there is to learn on a machine with a GPU and no network, in under nine minutes:
#
#     benchmarks/gpu.sh OUT [--device cpu]
#
# Builds, tests, runs the sanitizers and all benchmarks, each with a time limit of its own; a part that fails is reported and
# the next one starts. Writes OUT/results.json, OUT/summary.txt and a log for each kind of work. With --device cpu the same
# sections run, shortened, on the C++ backend.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [--device cpu]}
device=cuda
[ "${2:-}" = --device ] && device=${3:?}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
start=$SECONDS

# section NAME LIMIT LOG COMMAND...: exit status and seconds go to the result.
section() {
  local name=$1 limit=$2 log=$out/$3 begun=$SECONDS status
  shift 3
  echo "== $name" | tee -a "$log"
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  echo "$name $status $((SECONDS - begun))" >>"$work/sections"
  echo "   status $status, $((SECONDS - begun)) s"
}
rm -f "$out"/*.log

if [ $device = cuda ]; then
  section build 150 build.log pip install --no-build-isolation --no-deps -e .
  section tests 70 tests.log python -m pytest -q -m cuda
  for check in memcheck racecheck initcheck; do
    section "$check" 25 sanitizer.log compute-sanitizer --tool "$check" --error-exitcode 9 \
      python -m pytest -q -x -p no:cacheprovider tests/test_cuda.py -k "two_dtypes or conversions"
  done
  models="resnet50 vit_b16 vit_l16 resnet18 wrn28_10 gpt2 tiny161"
  rounds="--processes 1 --rounds 10"
else
  section build 300 build.log pip install --no-build-isolation --no-deps -e .
  section tests 70 tests.log python -m pytest -q -x tests/test_cuda_core.py -k "plan and sgd"
  for check in memcheck racecheck initcheck; do
    section "$check" 20 sanitizer.log compute-sanitizer --tool "$check" python -c pass
  done
  models="tiny161"
  rounds="--quick --contenders fastsam eager"
fi

section train 90 train.log python benchmarks/train.py --device $device --json "$work/train.json" \
  $([ $device = cpu ] && echo --quick)
for dtype in float32 bfloat16; do
  for base in sgd adamw; do
    for model in $models; do
      [ $((SECONDS - start)) -gt 490 ] && { echo "$model-$base-$dtype 124 0" >>"$work/sections"; continue; }
      section "$model-$base-$dtype" 40 step.log python benchmarks/step.py --device $device --backend $device --model "$model" --base $base \
        --dtype $dtype $rounds --json "$work/step-$model-$base-$dtype.json"
    done
  done
done

python - "$work" "$out" $device $((SECONDS - start)) <<'PYTHON'
import json
import statistics
import sys
from pathlib import Path

work, out, device, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
rows = [line.split() for line in (work / "sections").read_text().splitlines()]
result = {
    "device": device,
    "seconds": seconds,
    "sections": {name: {"status": int(status), "seconds": int(s)} for name, status, s in rows},
    "train": {},
    "launches": {},
    "steps": {},
}
if (work / "train.json").is_file():
    result |= json.loads((work / "train.json").read_text())
lines = [f"{device}, {seconds} s"]
for name, section in result["sections"].items():
    outcome = "ok" if section["status"] == 0 else f"FAILED, status {section['status']}"
    lines.append(f"{name}: {outcome}, {section['seconds']} s")
lines.append(f"launches: {json.dumps(result['launches'])}")
lines += [f"train {model}: {json.dumps(found)}" for model, found in result["train"].items()]
for file in sorted(work.glob("step-*.json")):
    document = json.loads(file.read_text())
    result["environment"] = document["environment"]
    found = result["steps"][file.stem[5:]] = document["results"][0]
    for process in found["processes"]:
        times = process.get("calls", process)  # host time's have two lists
        mine = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        rate = {name: found["bytes"][name] / mine[name] / 1e6 for name in mine if name in found["bytes"]}
        text = ", ".join(f"{n} {ms:.4g} ms" + (f" {rate[n]:.4g} GB/s" if n in rate else "") for n, ms in mine.items())
        lines.append(f"{file.stem[5:]}: {text}")
(out / "results.json").write_text(json.dumps(result) + "\n")
(out / "summary.txt").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
PYTHON
