#!/usr/bin/env bash
# Table 3 of the paper from a folder of meshes; what is finished is not done again:
#
#   configs/ablation/run.sh ASSETS OUT VGG [options of `diff2to3 eval ablation`]
#
# ASSETS holds the meshes and their index.csv (splits train and val), OUT becomes the run folder, VGG is the file of
# VGG16 in LPIPS's layout: features of Exp 1, LPIPS, and FD_vgg and KD_vgg. OUT/run has the table and the page.
#
#   CONFIG       default configs/ablation/tiny.yaml
#   LIMIT        objects of a split that are used (default: all)
#   WORKERS      processes that render and voxelize (default: all cores)
#   GRID, SIZE   of voxels and pictures, where CONFIG is another one (micro.yaml: 16 and 64)
#   VIEWS        for features (default 24; micro.yaml: 8)
set -euo pipefail
assets=$1 out=$2 vgg=$3
here=$(cd "$(dirname "$0")" && pwd)
data=$out/data
prepare() {  # prepare STAGE OPTIONS...
    python3 -m diff2to3 data "$1" "$assets" "$data" --split train --split val --workers "${WORKERS:-$(nproc)}" \
        ${LIMIT:+--limit "$LIMIT"} "${@:2}"
}
prepare voxelize ${GRID:+--grid-size "$GRID"}
prepare render ${SIZE:+--size "$SIZE"} --views "${VIEWS:-24}" --extra-views 4 --condition-views 8
python3 -m diff2to3 eval ablation "${CONFIG:-$here/tiny.yaml}" --set data="$data" --set source="$assets" --set out="$out/run" \
    --set extractors.semantic.source="$vgg" --set scoring.lpips="$vgg" --set scoring.networks.vgg="$vgg" "${@:4}"
