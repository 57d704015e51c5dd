#!/usr/bin/env bash
# One knob each, beside table 3 and in its run folder, after the data of run.sh; what is finished is not done again:
#
#   configs/ablation/studies.sh ASSETS OUT VGG STUDY [options of `diff2to3 eval ablation`]
#
# STUDY is one of
#   backbone      plane of MARoPE, and double against single blocks: OUT/run/backbone
#   channels      autoencoders of 16 and 32 channels, trained on the same data: OUT/run/channels
#   visibility    features from all views, not the seeing ones alone: OUT/visibility against Exp 4 of OUT/run
#   gaussians-N   N Gaussians a voxel, against 8: OUT/gaussians-N against Exp 4 of OUT/run
set -euo pipefail
assets=$1 out=$2 vgg=$3 study=$4
here=$(cd "$(dirname "$0")" && pwd)
config=${CONFIG:-$here/tiny.yaml}
ablation() {  # ablation CONFIG RUN_FOLDER OPTIONS...
    python3 -m diff2to3 eval ablation "$1" --set data="$out/data" --set source="$assets" --set out="$2" \
        --set scoring.lpips="$vgg" --set scoring.networks.vgg="$vgg" "${@:3}"
}
case $study in
backbone) ablation "$here/backbone.yaml" "$out/run" "${@:5}" ;;
channels)
    for channels in 16 32; do
        [ -f "$out/autoencoder$channels/model/config.json" ] || python3 -m diff2to3 train autoencoder "$here/../tiny/autoencoder.yaml" \
            --resume --set data="$out/data" --set out="$out/autoencoder$channels" --set model.latent_channels=$channels \
            --set options.lpips_weight=0 --set steps="${STEPS:-2000}" >&2 &
    done
    wait
    ablation "$here/channels.yaml" "$out/run" --set extractors.sixteen.source="$out/autoencoder16/model" \
        --set extractors.thirty-two.source="$out/autoencoder32/model" "${@:5}"
    ;;
visibility) ablation "$config" "$out/visibility" --set lift.visibility=all --row "Exp 4" "${@:5}" ;;
gaussians-*)
    ablation "$config" "$out/$study" --row "Exp 4" \
        --set vae.model.gaussians.num_gaussians="${study#*-}" --set vae.model.gaussians.scale_bias=0.016 \
        --set vae.model.gaussians.min_scale=0.0018 "${@:5}"  # the other two as in the preset
    ;;
*) echo "$study: no such study; expected backbone, channels, visibility or gaussians-N" >&2 && exit 2 ;;
esac
