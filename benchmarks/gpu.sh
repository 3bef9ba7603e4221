#!/usr/bin/env bash
# Everything there is to learn on a machine with a GPU and no network, in under nine minutes:
#
#     benchmarks/gpu.sh OUT [--device cpu]
#
# Builds, tests, measures and runs the sanitizers, what matters most first. Every section has a time limit; one that
# fails is reported and the next one starts. After each, OUT/results.json and OUT/summary.txt hold all that is known so
# far. The exit status is 0 if nothing failed and nothing is missing. With --device cpu the same sections run on the C++
# backend and give the same keys; only the shapes are fewer, and the sanitizers' place is taken by the tests that prove
# the same of the CUDA kernels' bodies: guard pages, ThreadSanitizer, memory full of NaN.
#
# A library that is there is used if it was built from these sources and, as fastsam/_build.txt says, for this GPU. So
# that a lease is not spent on compiling, build where there is no GPU and carry fastsam/_C.abi3.so and
# fastsam/_build.txt along: TORCH_CUDA_ARCH_LIST="9.0+PTX" pip install -e . for an H200.
set -u
cd "$(dirname "$0")/.." || exit
out=${1:?usage: benchmarks/gpu.sh OUT [--device cpu]}
device=cuda
[ "${2:-}" = --device ] && device=${3:?usage: benchmarks/gpu.sh OUT [--device cpu]}
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
rm -f "$out"/*.log
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
python=$(command -v python3 || command -v python)
end=$((SECONDS + 520))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99

# section NAME LIMIT LOG COMMAND...: exit status and seconds go to the result; 124 means that the time was over.
section() {
  local name=$1 limit=$2 log=$out/$3 begun=$SECONDS status=124
  shift 3
  [ "$limit" -lt $((end - SECONDS)) ] || limit=$((end - SECONDS))
  echo "== $name: $*" | tee -a "$log"
  [ "$limit" -le 0 ] || { timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1; status=$?; }
  echo "$name $status $((SECONDS - begun))" >>"$parts/sections"
  echo "   status $status, $((SECONDS - begun)) s"
  "$python" benchmarks/gather.py "$parts" "$out" --device "$device"
}

# cases MODELS DTYPES: both base optimizers of every combination.
cases() {
  local model dtype
  for dtype in $2; do
    for model in $1; do echo "$model-sgd-$dtype" "$model-adamw-$dtype"; done
  done
}

# precisions MODELS: masters, rounding at random, bfloat16 states.
precisions() {
  local model base
  for model in $1; do
    for base in sgd adamw; do
      echo "$model-$base-bfloat16-masters" "$model-$base-bfloat16-drawn" "$model-$base-float32-bfloat16-states"
    done
  done
}

# sweep NAME LIMIT CASE...: the last case has 15 s to finish.
sweep() {
  local name=$1 limit=$2
  shift 2
  [ "$limit" -lt $((end - SECONDS)) ] || limit=$((end - SECONDS))
  section "$name" "$limit" benchmarks.log "$python" benchmarks/step.py --device "$device" --rounds "$rounds" \
    --sweep "$@" --budget $((limit - 15)) --json "$parts/$name.json"
}

pytest=("$python" -m pytest -q)
# A step with the backend of that name; fails, and says why, where the library is not there or not of these sources.
usable=("$python" -c 'import sys, torch, fastsam
p = torch.nn.Parameter(torch.ones(8, device=sys.argv[1]))
p.grad = torch.ones_like(p)
optimizer = fastsam.FusedSAM([p], "sgd", lr=0.1, backend=sys.argv[1])
optimizer.first_step()
optimizer.second_step()
print("the library works: a step gives", p.tolist()[0])' "$device")
# Without pip, which may want an index, and a setuptools that is new enough.
build=("$python" -c 'import setup; setup.build_and_record(setup.ROOT / "fastsam" / "_C.abi3.so")')

if [ "$device" = cuda ]; then
  export PATH=$PATH:/usr/local/cuda/bin
  export FASTSAM_NATIVE=1 FASTSAM_CUDA=1 # what cannot be built is an error
  large="resnet50 vit_b16 vit_l16" small="resnet18 gpt2 wrn28_10" rounds=10 check=40 check_all=80 train=(--device cuda --budget 60)
  # For this card alone, which is faster.
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
    echo "there is nothing to measure: torch can use no GPU here" >&2
    exit 1
  }
  export TORCH_CUDA_ARCH_LIST
  built_for=sm_${TORCH_CUDA_ARCH_LIST/./} # PTX would do for a step, but is not what is to be measured
  # What only a GPU can say comes first. Every test that takes a backend runs on two: thousands, so two cores are left
  # to the driver and to what starts the processes, and all others have one each.
  all=(-m cuda --continue-on-collection-errors --tb=short -p no:benchmark)
  "$python" -c "import xdist.plugin" && all+=(-n $(($(nproc) > 3 ? $(nproc) - 2 : 1)))
  tests=("${all[@]}" tests/test_cuda.py)
  tests_library=("${all[@]}" -k "not triton" --ignore tests/test_cuda.py)
  tests_triton=("${all[@]}" -k triton)
  toolkit=$(dirname "$(readlink -f "$(command -v nvcc)")")
  sanitizer=$(PATH=$PATH:$toolkit command -v compute-sanitizer)
  run=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --error-exitcode 9)
  # torch asks CUDA what may fail (peer access, attributes); only what a kernel does is an error here.
  memcheck=("${run[@]}" --tool memcheck --report-api-errors no --kernel-name kns=fastsam "$python" benchmarks/sanitize.py)
  racecheck=("${run[@]}" --tool racecheck --kernel-name kns=fastsam "$python" benchmarks/sanitize.py)
  initcheck=("${run[@]}" --tool initcheck "$python" benchmarks/sanitize.py) # has to see torch's kernels write, too
else
  large="resnet18" small="" rounds=3 check=80 check_all=80 train=(--device cpu --quick) # these checks are compiled first
  export OMP_NUM_THREADS=1 # two threads on a busy machine wait for each other, a time slice in every operation
  export FASTSAM_NATIVE=1 FASTSAM_CUDA=0 # nothing here could run the CUDA kernels; tests/test_machine_code.py reads them
  built_for=
  tests=(tests/test_native.py)
  tests_library=(tests/test_captures.py)
  tests_triton=(tests/test_triton.py -k "no_mark or before_the_first_step")
  memcheck=("${pytest[@]}" tests/test_cuda_core.py -k test_no_access_beyond)
  racecheck=("${pytest[@]}" tests/test_cuda_core.py -k test_blocks_on_several_threads)
  initcheck=("${pytest[@]}" tests/test_cuda_core.py -k test_three_sam_steps)
fi

if grep -qsw -e "$built_for" fastsam/_build.txt && "${usable[@]}" >"$out/build.log" 2>&1; then
  section build 10 build.log echo "nothing to build: $(tail -n 1 fastsam/_build.txt)"
else
  section build 200 build.log "${build[@]}"
  "${usable[@]}" >>"$out/build.log" 2>&1 || {
    echo "there is nothing to measure: backend='$device' does not work here; $out/build.log ends with" >&2
    tail -n 20 "$out/build.log" >&2
    exit 1
  }
fi

# shellcheck disable=SC2046 # cases are words
{
  section tests 70 tests.log "${pytest[@]}" "${tests[@]}"
  sweep step-float32 90 $(cases "$large" float32)
  section launches 50 benchmarks.log "$python" benchmarks/launches.py --device "$device" --json "$parts/launches.json"
  sweep host 60 $(cases tiny161 float32)
  section train 80 benchmarks.log "$python" benchmarks/train.py --json "$parts/train.json" "${train[@]}"
  section tests-library 100 tests.log "${pytest[@]}" "${tests_library[@]}"
  section memcheck "$check" sanitizers.log "${memcheck[@]}"
  section racecheck "$check" sanitizers.log "${racecheck[@]}"
  section initcheck "$check_all" sanitizers.log "${initcheck[@]}"
  sweep step-precision 60 $(precisions "${large##* }") # the largest model
  section tests-triton 80 tests.log "${pytest[@]}" "${tests_triton[@]}"
  sweep step-bfloat16 120 $(cases "$large $small" bfloat16)
  sweep step-others 400 $(cases "$small" float32) $(cases "$large $small" "float16 float64")
}

cat "$out/summary.txt"
"$python" benchmarks/gather.py "$parts" "$out" --device "$device"
