#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes on one: benchmarks/gpu.sh OUTDIR
#
# The test suite over the Triton kernels, the ResNet-50 step and the operators at batch 256 beside every peer, a stress of
# the order between programs, and compute-sanitizer where it is installed. OUTDIR holds what benchmarks/results/ wants: README.md (the page), results.json
# and results.csv (the rows), the plots, and log.txt (everything that was printed, with the verdict of each part last).
#
# It needs a Python (named by PYTHON, else python3) with torch, triton, torchvision, timm, pytest, pytest-benchmark and
# hypothesis; matplotlib for the plots. fusedres need not be installed, and nothing is downloaded.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh OUTDIR" >&2
    exit 2
fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
SECONDS=0
TOTAL=520 # seconds, without the page

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The tree as it is installed: kernels/ and benchmarks/ inside fusedres/. No build tool is needed for that.
mkdir "$work/site"
cp -r "$repository/fusedres" "$work/site/fusedres"
cp -r "$repository/kernels" "$work/site/fusedres/kernels"
cp -r "$repository/benchmarks" "$work/site/fusedres/benchmarks"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 MPLBACKEND=Agg
cd "$work" || exit 2 # not in the repository: its fusedres/ has no kernels/ inside

if ! "$python" -c "import sys, torch, fusedres; sys.exit(not ('$device' == 'cpu' or torch.cuda.is_available()))"; then
    echo "gpu.sh: $python cannot import torch and fusedres, or torch sees no GPU" >&2
    exit 1
fi

log="$out/log.txt"
: >"$log"
verdicts=()
failed=0

# part NAME SECONDS COMMAND...: run it for at most so long, keep what it prints, remember how it ended.
part() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    [ "$limit" -le $((TOTAL - SECONDS)) ] || limit=$((TOTAL - SECONDS))
    if [ "$limit" -lt 5 ]; then
        verdicts+=("$name: not run: no time left")
        failed=1
        return
    fi
    printf '\n=== %s (at most %s s)\n' "$name" "$limit" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" </dev/null 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) verdict="passed" ;;
        75) verdict="not finished in $limit s; what ran passed" ;;
        124 | 137) verdict="stopped: its $limit s were over" ;;
        *) verdict="failed ($status)" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    verdicts+=("$name: $verdict, $((SECONDS - start)) s")
}

# The tests in as many processes as there are cores: nearly all of their time is compiling kernels.
tests() {
    local shares=$1 limit=$2 share status=0 pids=()
    # The kernels that the sanitizer will watch, compiled beforehand: it makes everything slow.
    timeout "$limit" "$python" -m fusedres.benchmarks.small_calls &
    for share in $(seq "$shares"); do
        # The project's own ini file asks for plugins that need not be here; its markers come from conftest.py.
        timeout --kill-after=5 "$((limit + 25))" "$python" -m pytest "$repository/tests" --rootdir="$repository" -c "$work/pytest.ini" \
            --import-mode=importlib -p no:cacheprovider -q -ra --tb=short -m 'not slow' --backend triton --share "$share/$shares" --seconds "$limit" \
            >"$work/tests.$share" 2>&1 &
        pids+=($!)
    done
    for share in $(seq "$shares"); do
        wait "${pids[share - 1]}"
        code=$?
        # 5: this share has no test. 2: it stopped when its time was over; failures until then are in its summary.
        if [ "$code" -eq 2 ] && ! grep -q '^FAILED\|^ERROR' "$work/tests.$share"; then
            [ "$status" -ne 0 ] || status=75
        elif [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then
            status=1
            echo "--- share $share of $shares ended with $code"
            tail -n 60 "$work/tests.$share"
        fi
        tail -n 1 "$work/tests.$share"
    done
    return "$status"
}
export -f tests
export python repository work
printf '[pytest]\nmarkers =\n    slow: takes more than a few seconds\n' >"$work/pytest.ini"

bench=("$python" -m fusedres bench --device "$device" --out "$out")
bfloat16=(--dtype bfloat16 --layout channels_last)
shares=$(nproc)
[ "$shares" -le 16 ] || shares=16

"$python" -m fusedres env 2>&1 | tee -a "$log"
command -v nvidia-smi >/dev/null && nvidia-smi 2>&1 | tee -a "$log"

# The most telling first; what a limit cuts off has its earlier rows on disk.
part "model: ResNet-50 step, batch 256" 150 "${bench[@]}" --quick --level model --model resnet50 --batch "${BATCH:-256}" "${bfloat16[@]}" --budget 125
part "operators, batch 256, without torch.compile" 60 "${bench[@]}" --quick --level operator --batch "${BATCH:-256}" "${bfloat16[@]}" --budget 50 \
    --provider "eager, in place" --provider fusedres --provider attorch --provider "apex groupbn" --provider inplace_abn
part "tests" 190 bash -c "tests $shares 160"
# Nothing but a GPU can show that the last program sees what the others left; see kernels/merging.py.
part "statistics in one launch, order" 15 "$python" -m fusedres.benchmarks.ordering --device "$device"
part "CUDA graphs" 30 "$python" -m pytest "$repository/tests/test_cuda_graphs.py" --rootdir="$repository" -c "$work/pytest.ini" \
    --import-mode=importlib -p no:cacheprovider -q -ra --tb=short -m gpu --backend triton
part "operators, batch 256, beside torch.compile" 55 "${bench[@]}" --quick --level operator --batch "${BATCH:-256}" "${bfloat16[@]}" --budget 40
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "compute-sanitizer $tool" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m fusedres.benchmarks.small_calls
    done
else
    verdicts+=("compute-sanitizer: not installed")
fi
TOTAL=540
part "page" 30 "${bench[@]}" --report

{
    printf '\n=== in all, %s s\n' "$SECONDS"
    printf '%s\n' "${verdicts[@]}"
} | tee -a "$log"
exit "$failed"
