#!/usr/bin/env bash
# Makes a base for photos:SPLIT from assets/tiny for every SEED, by train.py --method sft. SEED may be `boxing`: a base
# that is taught nothing but boxes.
#     bash experiments/make_photos.sh SEED ...
# An interrupted stage goes on where it was when the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
stage() {       # NAME, options
    if [ -e "runs/$1/config.json" ]; then
        torchrun train.py --resume "runs/$1"
    else
        torchrun train.py --method sft --optimizer muon --adam-eps 1e-8 --weight-decay 0 --warmup-steps 20 \
            --prompts-per-step 64 --micro-rows 16 --eval-data photos:tune --eval-examples 384 --eval-every 500 \
            --save-every 250 --name "$@"
    fi
}
for seed; do
    if [ "$seed" = boxing ]; then
        stage photos-boxing --data photos:boxing --model assets/tiny --normaliser seq-mean \
            --seed 41 --lr 2e-3 --cooldown 0.5 --steps 1000
        continue
    fi
    # 1. Captions tell most about a picture. Every token counts the same.
    stage "photos-$seed-words" --data photos:words --model assets/tiny --normaliser token-mean \
        --seed $((10 * seed + 1)) --lr 3e-3 --cooldown 0 --steps 2000
    # 2. Every answer counts the same, so that short ones (counts, colours) are learnt too.
    stage "photos-$seed-pretrain" --data photos:pretrain --model "runs/photos-$seed-words" --normaliser seq-mean \
        --seed $((10 * seed + 2)) --lr 2e-3 --cooldown 0.5 --steps 3000
done
