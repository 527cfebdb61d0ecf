#!/bin/sh
# From a pretrained encoder to an ONNX model that may be deployed, or to exit code 1 and the reason on stderr.
#
#   MODEL      hub id or directory            demo
#   DATA       options that name the rows     --task demo
#   TRAIN      further options of training
#   SPARSITY   fraction of the gates          0.5
#   MAX_DROP   of the metric, full to ONNX    0.03
#   MAX_INT8   of the metric, fp32 to int8    0.01
#   MIN_SPEED  int8 against dense, a factor   1.2
#   OUT        directory of all results       build
set -eu
: "${MODEL:=demo}" "${DATA:=--task demo}" "${TRAIN:=}" "${SPARSITY:=0.5}" "${OUT:=build}"
: "${MAX_DROP:=0.03}" "${MAX_INT8:=0.01}" "${MIN_SPEED:=1.2}"
mkdir -p "$OUT"

# A step whose result is there is not done again. Words of DATA and TRAIN are options, so they are not quoted.
step() {
    name=$1
    shift
    if [ -e "$OUT/$name.json" ]; then return; fi
    echo "$name: gatepress $*" >&2
    gatepress "$@" --quiet --json > "$OUT/$name.json.new"
    mv "$OUT/$name.json.new" "$OUT/$name.json"
}

step full train --model "$MODEL" $DATA $TRAIN --method full -o "$OUT/full"
step press train --model "$OUT/full" $DATA $TRAIN --sparsity "$SPARSITY" -o "$OUT/run"
step prune prune "$OUT/run" -o "$OUT/pruned"
step dense export "$OUT/full" -o "$OUT/dense"
step export export "$OUT/pruned" -o "$OUT/onnx" --quantize int8 --max-metric-drop "$MAX_INT8"
step quality evaluate "$OUT/onnx" --against "$OUT/full" --max-metric-drop "$MAX_DROP"
step speed bench "$OUT/dense" "$OUT/onnx" --fail-under "$MIN_SPEED"
echo "passed: deploy $OUT/onnx/model.onnx" >&2
