#!/usr/bin/env bash
# What CIFAR-100 says on two CPU cores: the plain backbone, no distillation, one-for-all and all-for-all; then, on half
# of the images, what trains the CWEM and which head. About seven hours one after the other; cifar100_cpu.md holds what
# came out.
#
#   experiments/cifar100_cpu.sh FOLDER_WITH_CIFAR100_PARQUET OUTPUT_FOLDER
#
# A finished run is not run again, so a killed script can be started anew. The test split is read once per run, at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "$1")
out=$2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() {
    name=$1
    shift
    [ -e "$out/$name.json" ] && return
    rm -rf "${out:?}/$name" # an unfinished run begins anew
    python train.py --config "${config:-configs/cifar100_cpu.yaml}" --dataset "hfds/$data" --data-dir "$out/cache" \
        --output "$out" --experiment "$name" "$@"
    python validate.py --checkpoint "$out/$name/model_best.pth.tar" --split test --workers 1 --results-file "$out/$name.json"
    [ -z "${name##*afa-*}" ] && python experiments/mixing_weights.py \
        --checkpoint "$out/$name/model_best.pth.tar" --split test --workers 1 | tee "$out/$name.weights.txt"
    true
}

run se --exits 1 --distill none
run menm --distill none
run ofa --distill one-for-all --beta 0
run afa-ce --cwem-supervision ce
half=(--train-split 'train[:25000]')
run half-se "${half[@]}" --exits 1 --distill none
run half-menm "${half[@]}" --distill none
run half-ofa "${half[@]}" --distill one-for-all --beta 0
run half-afa-ce "${half[@]}" --cwem-supervision ce
run half-afa-kd "${half[@]}" --cwem-supervision kd
run half-afa-none "${half[@]}" --cwem-supervision none
run half-menm-conv1x1 "${half[@]}" --distill none --exit-head conv1x1
# in float32, without the recipe's --amp: PyTorch has no fast bfloat16 backward for depthwise convs on CPUs
sed 's/^amp: true/amp: false/' configs/cifar100_cpu.yaml > "$out/float32.yaml"
config=$out/float32.yaml run half-menm-slic_dw "${half[@]}" --distill none --exit-head slic_dw
run pool-max --distill none --train-split 'train[:5000]'
run pool-avg --distill none --train-split 'train[:5000]' --exit-pool avg
