#!/usr/bin/env bash
# Makes assets/tiny/ from nothing: config and tokenizer, then weights, trained by train.py --method sft in three stages.
# About 70 minutes on 2 cores.      bash experiments/make_tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python experiments/make_tiny.py
sft() {
    torchrun --nproc-per-node 2 train.py --method sft --optimizer muon --lr 3e-3 --weight-decay 0 --warmup-steps 20 \
        --prompts-per-step 64 --micro-rows 32 --eval-data "" --save-every 0 "$@"
}
# 1. Short answers only: captions, counting, attributes, where things are. Long captions teach the vision tower.
sft --name tiny-words --data scenes:words --model assets/tiny --random-weights --normaliser token-mean --steps 1500
# 2. Grounding as well. One-token answers would vanish beside forty-token ones, hence seq-mean.
sft --name tiny-pretrain --data scenes:pretrain --model runs/tiny-words/checkpoints/step_1500 --normaliser seq-mean \
    --steps 2100 --cooldown-steps 1640
# 3. More of the same, on other examples.
sft --name tiny --data scenes:pretrain --model runs/tiny-pretrain/checkpoints/step_2100 --normaliser seq-mean \
    --seed 43 --lr 2e-3 --steps 1400 --cooldown-steps 1380
cp runs/tiny/checkpoints/step_1400/model.safetensors assets/tiny/
python eval.py --model assets/tiny --data scenes:test --out runs/tiny/eval
