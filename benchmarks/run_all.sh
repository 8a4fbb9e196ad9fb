#!/usr/bin/env bash
# All benchmarks, one after the other; the lines of each go to a file of its own.
#   benchmarks/run_all.sh [FOLDER [PAIRS]]
set -uo pipefail
here=$(dirname "$0") out=${1:-benchmark_results}
mkdir -p "$out"
default="resnet32x4,resnet8x4;wrn_40_2,wrn_16_2;vgg13,MobileNetV2;resnet32x4,ShuffleV1;resnet32x4,ShuffleV2"
pairs=${2:-$default}
measure() {
    echo "$1 ${*:2}"
    python "$here/$1.py" "${@:2}" >"$out/$1.txt" 2>"$out/$1.log" || echo "  failed, see $out/$1.log"
}
measure step --pairs "$pairs"
for benchmark in seeds end_to_end teacher compile kernels losses input streaming dispatch; do
    measure "$benchmark"
done
