#!/usr/bin/env bash
# Everything there is to learn on a machine with a GPU and no network, in one command of less than ten minutes:
#
#     benchmarks/gpu.sh OUT [--device cuda|cpu|stub] [--rest BEFORE] [--seconds N] [--slow FACTOR] [--go-on]
#
# Loads (or builds), tests, measures and runs the sanitizers, what matters most first; if the library does not work or
# tests/test_cuda.py fails, that is where it ends, unless --go-on is given. Every section has a time limit; one that
# fails is reported and the next one starts. After each, OUT holds all that is known so far: results.json, summary.txt,
# parts.json (what each section wrote) and the logs, seven files in all. What there was no time for, and what failed,
# is what a second command runs: --rest BEFORE, with the first one's OUT, whose results it takes over as long as csrc/ is
# the same. The exit status is 0 if nothing failed and nothing is missing.
#
# So that the time goes into measuring, build where there is no GPU: `benchmarks/variants.py build`, for an H200, puts
# into build/carried/ the library as it is installed and others with other choices (csrc/cuda/choices.h). A library is
# used if it was built from these sources and, as the record beside it says, for this GPU.
#
# --device cpu     the same sections on the C++ backend, with the same keys; only the shapes are fewer (and tiny, with
#                  FASTSAM_SHRUNK=1 in the environment), and the sanitizers' place is taken by the tests that prove the
#                  same of the CUDA kernels' bodies
# --device stub    the branch for a GPU without one: the same commands with fewer cases, on the host (devices.py), tiny
#                  tensors, stand-ins for nvidia-smi and compute-sanitizer. Its times mean nothing
# --slow FACTOR    every limit is that many times as long (cpu and stub: 4, for a busy machine)
set -u
cd "$(dirname "$0")/.." || exit
usage='usage: benchmarks/gpu.sh OUT [--device cuda|cpu|stub] [--rest BEFORE] [--seconds N] [--slow FACTOR] [--go-on]'
out=${1:?$usage} device=cuda before='' seconds=550 slow='' go_on=''
shift
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?$usage} ;;
    --rest) before=${2:?$usage} ;;
    --seconds) seconds=${2:?$usage} ;;
    --slow) slow=${2:?$usage} ;;
    --go-on) go_on=yes && shift && continue ;;
    *) echo "$usage" >&2 && exit 2 ;;
  esac
  shift 2
done
case $device in
  cuda) slow=${slow:-1} ;;
  cpu | stub) ;;
  *) echo "$usage" >&2 && exit 2 ;;
esac
slow=${slow:-4}
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
python=$(command -v python3 || command -v python)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
end=$((SECONDS + seconds * slow))
gather=("$python" benchmarks/gather.py "$parts" "$out" --device "$device")
[ -z "$before" ] || "${gather[@]}" --unpack "$before" || exit
rm -f "$out"/*.log

# section NAME LIMIT LOG COMMAND...: exit status and seconds go to the result; 124 means that the limit was reached, 125
# that there was no time left. What ended with 0 in an earlier run is not run again, but for the library.
section() {
  local name=$1 limit=$(($2 * slow)) log=$out/$3 begun=$SECONDS status=125
  shift 3
  if [ "$name" != library ] && grep -qs "^$name 0 " "$parts/sections"; then # what another machine built is not here
    echo "== $name: in the results of $before"
    return
  fi
  [ "$limit" -lt $((end - SECONDS)) ] || limit=$((end - SECONDS))
  echo "== $name: $*" | tee -a "$log"
  if [ "$limit" -ge 8 ]; then
    timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1
    status=$?
    # 137 of a program that did not end when it was asked to, and had to be killed.
    [ $status != 137 ] || [ $((SECONDS - begun)) -lt "$limit" ] || status=124
  fi
  sed -i "/^$name /d" "$parts/sections" 2>/dev/null
  echo "$name $status $((SECONDS - begun))" >>"$parts/sections"
  echo "   status $status, $((SECONDS - begun)) s"
  "${gather[@]}"
  return $status
}

# stop WHY LOG: the end, with what is needed to mend it.
stop() {
  echo "STOPPED: $1; the end of $2:" >&2
  tail -n 40 "$out/$2" >&2
  "${gather[@]}" --stopped "$1"
  exit 1
}

# must LOG WHY: the end if the last section failed; one that had too little time is no reason.
must() {
  local status=$?
  case $status in 0 | 124 | 125) ;; *) [ -n "$go_on" ] || stop "$2" "$1" ;; esac
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

# budget LIMIT: what a program may take until it starts no other case, so that the last one has 15 s to finish.
budget() {
  local limit=$(($1 * slow))
  [ "$limit" -lt $((end - SECONDS)) ] || limit=$((end - SECONDS))
  echo $((limit > 20 ? limit - 15 : 5))
}

# sweep NAME LIMIT CASE...
sweep() {
  local name=$1 limit=$2
  shift 2
  section "$name" "$limit" benchmarks.log "$python" benchmarks/step.py --device "$device" --rounds "$rounds" \
    --sweep "$@" --budget "$(budget "$limit")" --json "$parts/$name.json"
}

pytest=("$python" -m pytest -q)
backend=$device
# A step with the backend of that name; fails, and says why, where the library is not there or not of these sources.
usable() {
  "$python" -c 'import sys, torch, fastsam
from fastsam.ops import native
p = torch.nn.Parameter(torch.ones(8, device=sys.argv[1]))
p.grad = torch.ones_like(p)
optimizer = fastsam.FusedSAM([p], "sgd", lr=0.1, backend=sys.argv[1])
optimizer.first_step()
optimizer.second_step()
print("the library in", native.folder(), "works: a step gives", p.tolist()[0])' "$backend"
}
# Without pip, which may want an index, and a setuptools that is new enough.
build=("$python" -c 'import setup; setup.build_and_record(setup.ROOT / "fastsam" / "_C.abi3.so")')
facts=(bash -c 'date; uname -a; nproc; free -g; df -h . /tmp; nvidia-smi; nvcc --version; "$0" -V
"$0" -c "import importlib.metadata as m; print(*sorted({f\"{d.name}=={d.version}\" for d in m.distributions()}))"
"$0" -c "import torch; print(torch.__config__.show())"; git log -1 --oneline; true' "$python")

if [ "$device" != cpu ]; then
  export PATH=$PATH:/usr/local/cuda/bin
  export FASTSAM_NATIVE=1 FASTSAM_CUDA=1 # what cannot be built is an error
  large="resnet50 vit_b16 vit_l16" small="resnet18 gpt2 wrn28_10" rounds=10 check=40 check_all=80
  train=() variants=() launches=()
  capability=("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  if [ "$device" = stub ]; then
    export PATH=$PWD/benchmarks/standins:$PATH FASTSAM_SHRUNK=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    backend=cpu rounds=2 capability=(echo 9.0) large=vit_l16 small=""
    variants=(--rounds 2 --cases resnet50-sgd-float32 resnet18-adamw-bfloat16) launches=(--models tiny100 tiny9000)
  fi
  # For this card alone, which is faster.
  TORCH_CUDA_ARCH_LIST=$("${capability[@]}") || {
    echo "there is nothing to measure: torch can use no GPU here" >&2
    exit 1
  }
  export TORCH_CUDA_ARCH_LIST
  built_for=sm_${TORCH_CUDA_ARCH_LIST/./} # PTX would do for a step, but is not what is to be measured
  # What only a GPU can say comes first. Every test that takes a backend runs on two: thousands, so two cores are left
  # to the driver and to what starts the processes, and all others have one each.
  all=(-m cuda --continue-on-collection-errors -p no:benchmark)
  "$python" -c "import xdist.plugin" && all+=(-n $(($(nproc) > 3 ? $(nproc) - 2 : 1)))
  tests=("${all[@]}" tests/test_cuda.py) # with whole tracebacks
  tests_library=("${all[@]}" --tb=short -k "not triton" --ignore tests/test_cuda.py)
  tests_triton=("${all[@]}" --tb=short -k triton)
  toolkit=$(dirname "$(readlink -f "$(command -v nvcc)")")
  sanitizer=$(PATH=$PATH:$toolkit command -v compute-sanitizer)
  run=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --error-exitcode 9)
  checked=("$python" benchmarks/sanitize.py --device "$device")
  # torch asks CUDA what may fail (peer access, attributes); only what a kernel does is an error here.
  memcheck=("${run[@]}" --tool memcheck --report-api-errors no --kernel-name kns=fastsam "${checked[@]}")
  racecheck=("${run[@]}" --tool racecheck --kernel-name kns=fastsam "${checked[@]}")
  initcheck=("${run[@]}" --tool initcheck "${checked[@]}") # has to see torch's kernels write, too
else
  large="resnet18" small="" rounds=3 check=80 check_all=80 train=(--quick) # these checks are compiled first
  variants=(--rounds 2 --cases resnet18-sgd-float32) launches=()
  export OMP_NUM_THREADS=1 # two threads on a busy machine wait for each other, a time slice in every operation
  export FASTSAM_NATIVE=1 FASTSAM_CUDA=0 # nothing here could run the CUDA kernels; tests/test_machine_code.py reads them
  built_for=
  tests=(tests/test_native.py -k "gather or checked or signature or instruction_sets or plan_fuses")
  tests_library=(tests/test_captures.py)
  tests_triton=(tests/test_triton.py -k "no_mark or before_the_first_step")
  memcheck=("${pytest[@]}" tests/test_cuda_core.py -k test_no_access_beyond)
  racecheck=("${pytest[@]}" tests/test_cuda_core.py -k test_blocks_on_several_threads)
  initcheck=("${pytest[@]}" tests/test_cuda_core.py -k test_three_sam_steps)
fi

"${facts[@]}" >"$out/build.log" 2>&1
found=''
for library in ${FASTSAM_LIBRARY:-} "$PWD/build/carried/default/_C.abi3.so" "$PWD/fastsam/_C.abi3.so"; do
  export FASTSAM_LIBRARY=$library
  if [ ! -f "$library" ]; then
    why='there is no such file'
  elif ! grep -qsw -e "$built_for" "$(dirname "$library")/_build.txt"; then
    why="the record beside it does not say $built_for"
  elif usable >>"$out/build.log" 2>&1; then
    found=$library
    break
  else
    why=$(tail -n 1 "$out/build.log")
  fi
  echo "not used: $library: $why" | tee -a "$out/build.log"
done
if [ -n "$found" ]; then
  section library 10 build.log echo "nothing to build: $found"
else
  unset FASTSAM_LIBRARY
  echo "no library of these sources is there, so it is built now; benchmarks/variants.py build spares that"
  section library 200 build.log "${build[@]}"
  usable >>"$out/build.log" 2>&1 || stop "backend='$backend' does not work here" build.log
fi
section diagnosis 60 build.log "$python" -m fastsam
must build.log "the self-check fails"
section tests 100 tests.log "${pytest[@]}" "${tests[@]}"
must tests.log "tests fail"
# shellcheck disable=SC2046 # cases are words
{
  sweep step-float32 100 $(cases "$large" float32)
  section launches 45 benchmarks.log "$python" benchmarks/launches.py --device "$device" --json "$parts/launches.json" \
    "${launches[@]}"
  sweep host 50 $(cases tiny161 float32)
  section train 80 benchmarks.log "$python" benchmarks/train.py --device "$device" --json "$parts/train.json" \
    --budget "$(budget 80)" "${train[@]}"
  section variants 70 benchmarks.log "$python" benchmarks/variants.py measure --device "$device" \
    --json "$parts/variants.json" --budget "$(budget 70)" "${variants[@]}"
  section tests-triton 80 tests.log "${pytest[@]}" "${tests_triton[@]}"
  sweep step-precision 50 $(precisions "${large##* }") # the largest model
  sweep step-bfloat16 70 $(cases "$large $small" bfloat16)
  section tests-library 100 tests.log "${pytest[@]}" "${tests_library[@]}"
  section memcheck "$check" sanitizers.log "${memcheck[@]}"
  section racecheck "$check" sanitizers.log "${racecheck[@]}"
  section initcheck "$check_all" sanitizers.log "${initcheck[@]}"
  sweep step-others 300 $(cases "$small" float32) $(cases "$large $small" "float16 float64")
}

tail -c 11000 "$out/summary.txt"
"${gather[@]}"
