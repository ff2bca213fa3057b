#!/bin/sh
# Builds engines from the strongly typed ONNX files beside this script, on the machine that will run them, and compares each with the golden outputs.
#
#   sh build.sh [OUT]        OUT: folder for engines, timing cache and results (default: engines)
#
# Environment: TRTEXEC (path of trtexec), TRT_MAJOR (10 or 11, otherwise read from trtexec), PRECISIONS ("fp16" …), OPT_BATCH, MAX_BATCH.
set -eu
cd -- "$(dirname -- "$0")"

out=${1:-engines}
precisions=${PRECISIONS:-@PRECISIONS@}
opt=${OPT_BATCH:-1}
max=${MAX_BATCH:-@MAX_BATCH@}

trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
if [ ! -x "$trtexec" ]; then
    echo "error: there is no trtexec on the PATH or at $trtexec; it comes with TensorRT's tools (Jetson: apt install tensorrt), or name it with TRTEXEC" >&2
    exit 1
fi
# Its first line says "TensorRT v100300": ten thousands are the major version since 10 (8.6.1 was v8601).
number=$("$trtexec" --help 2>&1 | sed -n 's/.*TensorRT[ .]v\([0-9]*\).*/\1/p' | head -n 1)
major=${TRT_MAJOR:-$((${number:-0} / 10000))}
case $major in
    # 10 takes precisions from flags unless it is told to take them from the file.
    10) typed=--stronglyTyped; plain= ;;
    # 11 always takes them from the file; it leaves the copies to and from the device out of its times, waits busily and replays CUDA graphs unless told not to.
    11) typed=; plain="--includeDataTransfers --noSpinWait --noCudaGraph" ;;
    *) echo "error: TensorRT $major (v${number:-unknown}) is not supported: expected 10 (JetPack 6) or 11; set TRT_MAJOR if this was read wrongly" >&2; exit 1 ;;
esac

mkdir -p "$out"
failed=0
build() { # tower, input name, its shape behind the batch, golden rows
    for precision in $precisions; do
        name=$1.$precision
        [ -f "$name.onnx" ] || continue
        echo "== $name (TensorRT $major)"
        # shellcheck disable=SC2086
        "$trtexec" --onnx="$name.onnx" --saveEngine="$out/$name.engine" $typed --skipInference --timingCacheFile="$out/timing.cache" \
            --minShapes="$2:1x$3" --optShapes="$2:${opt}x$3" --maxShapes="$2:${max}x$3" > "$out/$name.build.log" 2>&1 ||
            { echo "error: $name was not built; see $out/$name.build.log" >&2; failed=1; continue; }
        # shellcheck disable=SC2086
        "$trtexec" --loadEngine="$out/$name.engine" --shapes="$2:$4x$3" --loadInputs="$2:golden/$1.bin" --exportOutput="$out/$name.output.json" --iterations=1 --warmUp=0 \
            --duration=0 > "$out/$name.check.log" 2>&1 &&
            python3 check.py "$out/$name.output.json" golden/expected.json "$1" "$precision" || { failed=1; continue; }
        # shellcheck disable=SC2086
        "$trtexec" --loadEngine="$out/$name.engine" --shapes="$2:1x$3" $plain --warmUp=500 --duration=10 --exportTimes="$out/$name.times.json" > "$out/$name.time.log" 2>&1 ||
            { echo "error: $name was not timed; see $out/$name.time.log" >&2; failed=1; }
    done
}

@CALLS@
exit $failed
