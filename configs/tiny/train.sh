#!/usr/bin/env bash
# Trains every stage of the pipeline `tiny` and puts it together:
#
#   configs/tiny/train.sh ASSETS OUT [--set key=value ...]
#
# ASSETS holds the meshes and their index.csv, OUT becomes the run folder, OUT/pipeline the result. What is finished is
# not done again; settings are given to every stage. With two GPUs stage 1 trains on the second one while the 2to3-VAE
# and stage 2 train on the first.
#
#   MINUTES      wall-clock minutes of the whole run (default 26): the flows train until then
#   LPIPS        AlexNet LPIPS weights (safetensors) for the pictures' losses; without it L1 and SSIM only
#   INIT         model folders of an earlier run (`diff2to3 train unpack`): stages that train start from those
#   COPIES       stretched copies of every training object, for stage 1 (default 2)
#   WORKERS      processes that render and voxelize (default: all cores)
set -euo pipefail
assets=$1 out=$2
settings=("${@:3}")
here=$(cd "$(dirname "$0")" && pwd)
minutes=${MINUTES:-26} workers=${WORKERS:-$(nproc)} start=$(date +%s)
gpus=$(python3 -c "import torch; print(max(1, torch.cuda.device_count()))")
first=0 second=$((gpus > 1 ? 1 : 0))
data=$out/data shapes=$out/shapes
mkdir -p "$out"

run() { python3 -m diff2to3 "$@"; }
say() { echo "[$(($(date +%s) - start)) s] $*"; }
left() { python3 -c "print(max(0.2, $minutes - ($(date +%s) - $start) / 60 - $1))"; }  # minutes, less a reserve
stage() {  # stage GPU NAME MINUTES [more settings]
    local gpu=$1 name=$2 time=$3 folder=$out/${2//-/_}
    shift 3
    [ -f "$folder/model/config.json" ] && return
    [ -n "${INIT:-}" ] && [ -d "$INIT/${name//-/_}/model" ] && set -- --set init="$INIT/${name//-/_}/model" "$@"
    local set=$data
    [[ $name == structure* ]] && set=$shapes
    CUDA_VISIBLE_DEVICES=$gpu run train "$name" "$here/$name.yaml" --resume \
        --set data="$set" --set out="$folder" --set max_minutes="$time" "$@" "${settings[@]}" >>"$out/$name.log" 2>&1
    say "$name: $(tail -n 1 "$out/$name.log")"
}
shards() {  # shards COUNT COMMAND...: a data stage in COUNT processes over all GPUs
    local count=$1 index
    shift
    for ((index = 0; index < count; index++)); do
        CUDA_VISIBLE_DEVICES=$((index % gpus)) OMP_NUM_THREADS=1 run data "$@" --shard "$index/$count" >>"$out/$1.log" 2>&1 &
        pids+=($!)
    done
    wait "${pids[@]}"
    pids=()
}
pids=()
features=(--set parts.features="$out/autoencoder/model")
perceptual=()
[ -n "${LPIPS:-}" ] && perceptual=(--set options.lpips="$LPIPS" --set options.lpips_backbone=alex)

run data vary "$assets" "$out/assets" --copies "${COPIES:-2}"  # stage 1 knows the few shapes by heart otherwise
run data voxelize "$out/assets" "$shapes" --workers "$workers" --rule sampled
run data voxelize "$assets" "$data" --workers "$workers" --rule sampled  # as the embedded models were trained
say voxels
stage "$second" structure-vae 1.5 & structure_vae=$!
run data render "$assets" "$data" --workers "$workers" --split val
if [ ! -f "$out/autoencoder/model/config.json" ]; then
    # A part of the pictures is enough for the autoencoder, which then trains while the others are rendered.
    run data render "$assets" "$data" --workers "$workers" --split train --extra-views 2 --limit 600
fi
stage "$first" autoencoder 2.6 "${perceptual[@]}" & autoencoder=$!
run data render "$assets" "$data" --workers "$workers" --split train --extra-views 2
run data render "$out/assets" "$shapes" --workers "$workers" --views 1 --extra-views 0 --condition-views 8
say views
wait $autoencoder $structure_vae
stage "$second" structure-flow "$(left 0.7)" "${features[@]}" --set parts.structure_vae="$out/structure_vae/model" & structure_flow=$!
shards $((10 * gpus)) features "$data" --extractor "$out/autoencoder/model"
say features
stage "$first" vae "$(python3 -c "print($minutes * 0.25)")" "${perceptual[@]}"
shards $((5 * gpus)) latents "$data" --vae "$out/vae/model"
run data latents "$data" --vae "$out/vae/model"  # all are there: measures their statistics
say latents
stage "$first" flow "$(left 0.7)" "${features[@]}" --set parts.vae="$out/vae/model"
wait $structure_flow
# Threshold and guidance are chosen on validation objects; solvers and intervals cost 30 model calls instead of 100
# and change figures less than another seed does (benchmarks/results/solvers.md).
run train assemble "$out" "$out/pipeline" --threshold -3 \
    --structure-sampler method=multistep --structure-sampler steps=8 \
    --structure-sampler guidance=2 --structure-sampler 'interval=[0.7, 1]' \
    --sampler method=multistep --sampler steps=12 --sampler guidance=1 --sampler 'interval=[0.5, 1]'
say done
