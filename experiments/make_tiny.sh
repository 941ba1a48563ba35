#!/usr/bin/env bash
# Makes assets/tiny/ from nothing: config and tokenizer, then weights, trained by train.py --method sft in six stages.
# About two and a half hours on 2 cores (estimated).      bash experiments/make_tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python experiments/make_tiny.py
sft() {
    torchrun --nproc-per-node 2 train.py --method sft --optimizer muon --lr 3e-3 --weight-decay 0 --warmup-steps 20 \
        --cooldown-steps 0 --prompts-per-step 64 --micro-rows 8 --eval-data "" --save-every 0 "$@"
}
# 1. Short answers only: captions, counting, attributes, where things are. Long captions teach the vision tower.
sft --name tiny-words --data scenes:words --model assets/tiny --random-weights --normaliser token-mean --steps 1500
# 2. Grounding as well. One-token answers would vanish beside forty-token ones, hence seq-mean.
sft --name tiny-pretrain --data scenes:pretrain --model runs/tiny-words/checkpoints/step_1500 --normaliser seq-mean \
    --steps 2100 --cooldown-steps 1640
# 3. More of the same, on other examples.
sft --name tiny-more --data scenes:pretrain --model runs/tiny-pretrain/checkpoints/step_2100 --normaliser seq-mean \
    --seed 43 --lr 2e-3 --steps 1400 --cooldown-steps 1380
# 4. Which of several things is meant. Where every token counts the same, the coordinates that tell outweigh the counts;
#    then every answer counts the same again, and counting comes back.
sft --name tiny-crowds --data scenes:crowds --model runs/tiny-more/checkpoints/step_1400 --normaliser token-mean \
    --seed 44 --lr 1.5e-3 --prompts-per-step 128 --steps 1000
sft --name tiny-counts --data scenes:crowds --model runs/tiny-crowds/checkpoints/step_1000 --normaliser seq-mean \
    --seed 45 --lr 1e-3 --prompts-per-step 128 --steps 1500 --cooldown-steps 1500
# 5. More of the same, until it is colour and shape together that is counted.
sft --name tiny-more-counts --data scenes:crowds --model runs/tiny-counts/checkpoints/step_1500 --normaliser seq-mean \
    --seed 46 --lr 2e-3 --prompts-per-step 128 --steps 1200 --cooldown-steps 600
# 6. The first token of a grounding answer comes to depend on what is there: a fifth of the answers are bare counts, and
#    where every answer counts the same they are what the model gives. Then few of them, then none: it thinks first again.
sft --name tiny-untidy --data scenes:untidy --model runs/tiny-more-counts/checkpoints/step_1200 --normaliser seq-mean \
    --seed 51 --lr 2e-3 --prompts-per-step 128 --steps 600 --cooldown-steps 500
sft --name tiny-tidying --data scenes:tidying --model runs/tiny-untidy/checkpoints/step_600 --normaliser seq-mean \
    --seed 52 --lr 2e-3 --prompts-per-step 128 --steps 700 --cooldown-steps 600
sft --name tiny --data scenes:crowds --model runs/tiny-tidying/checkpoints/step_700 --normaliser seq-mean \
    --seed 53 --lr 1e-3 --prompts-per-step 128 --steps 150 --warmup-steps 10 --cooldown-steps 150
cp runs/tiny/checkpoints/step_150/model.safetensors assets/tiny/
python eval.py --model assets/tiny --data scenes:test --out runs/tiny/eval
