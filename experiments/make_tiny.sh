#!/usr/bin/env bash
# Makes assets/tiny/ from nothing: config and tokenizer, then weights, trained by train.py --method sft in eight stages.
# About four hours on 2 cores (estimated).      bash experiments/make_tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python experiments/make_tiny.py
python - <<'END'
import torch
from model import random_model
torch.manual_seed(42)
random_model("assets/tiny").save_pretrained("runs/tiny-random")
END
sft() {
    torchrun --nproc-per-node 2 train.py --method sft --optimizer muon --adam-eps 1e-8 --lr 3e-3 --weight-decay 0 \
        --warmup-steps 20 --cooldown 0 --prompts-per-step 64 --micro-rows 8 --eval-data "" --save-every 0 "$@"
}
# 1. Short answers only: captions, counting, attributes, where things are. Long captions teach the vision tower.
sft --name tiny-words --data scenes:words --model runs/tiny-random --normaliser token-mean --steps 1500
# 2. Grounding as well. One-token answers would vanish beside forty-token ones, hence seq-mean.
sft --name tiny-pretrain --data scenes:pretrain --model runs/tiny-words/checkpoints/step_1500 --normaliser seq-mean \
    --steps 2100 --cooldown 0.781
# 3. More of the same, on other examples.
sft --name tiny-more --data scenes:pretrain --model runs/tiny-pretrain/checkpoints/step_2100 --normaliser seq-mean \
    --seed 43 --lr 2e-3 --steps 1400 --cooldown 0.9857
# 4. Which of several things is meant. Where every token counts the same, the coordinates that tell outweigh the counts;
#    then every answer counts the same again, and counting comes back.
sft --name tiny-crowds --data scenes:crowds --model runs/tiny-more/checkpoints/step_1400 --normaliser token-mean \
    --seed 44 --lr 1.5e-3 --prompts-per-step 128 --steps 1000
sft --name tiny-counts --data scenes:crowds --model runs/tiny-crowds/checkpoints/step_1000 --normaliser seq-mean \
    --seed 45 --lr 1e-3 --prompts-per-step 128 --steps 1500 --cooldown 1
# 5. More of the same, until it is colour and shape together that is counted.
sft --name tiny-more-counts --data scenes:crowds --model runs/tiny-counts/checkpoints/step_1500 --normaliser seq-mean \
    --seed 46 --lr 2e-3 --prompts-per-step 128 --steps 1200 --cooldown 0.5
later() {
    sft --normaliser seq-mean --prompts-per-step 128 "$@"
}
# 6. The first token of a grounding answer comes to depend on what is there: a fifth of the answers are bare counts, and
#    where every answer counts the same they are what the model gives. Then few of them, then none: it thinks first again.
later --name tiny-untidy --data scenes:untidy --model runs/tiny-more-counts/checkpoints/step_1200 \
    --seed 51 --lr 2e-3 --steps 600 --cooldown 0.8333
later --name tiny-tidying --data scenes:tidying --model runs/tiny-untidy/checkpoints/step_600 \
    --seed 52 --lr 2e-3 --steps 700 --cooldown 0.8571
later --name tiny-tidy --data scenes:crowds --model runs/tiny-tidying/checkpoints/step_700 \
    --seed 53 --lr 1e-3 --steps 150 --warmup-steps 10 --cooldown 1
# 7. Long: better boxes, and the family reasoning. What stage 6 did wears off, so it is done again.
later --name tiny-long --data scenes:tidying --model runs/tiny-tidy/checkpoints/step_150 \
    --seed 61 --lr 2e-3 --steps 2000 --cooldown 0.4
later --name tiny-untidy-again --data scenes:untidy --model runs/tiny-long/checkpoints/step_2000 \
    --seed 66 --lr 2e-3 --steps 300 --warmup-steps 10 --cooldown 0.6667
later --name tiny-tidy-again --data scenes:crowds --model runs/tiny-untidy-again/checkpoints/step_300 \
    --seed 70 --lr 1e-3 --steps 200 --warmup-steps 10 --cooldown 0.75
# 8. The mean of the weights after stages 6 and 7, and a short training that heals what the mean broke (reasoning).
cp -r assets/tiny runs/tiny-mean
python - <<'END'
from safetensors.torch import load_file, save_file
a, b = (load_file(f"runs/{name}/model.safetensors") for name in (
    "tiny-tidy/checkpoints/step_150", "tiny-tidy-again/checkpoints/step_200"))
save_file({name: (a[name] + b[name]) / 2 for name in a}, "runs/tiny-mean/model.safetensors", metadata={"format": "pt"})
END
later --name tiny-heal --data scenes:tidying --model runs/tiny-mean --seed 71 --lr 1e-3 --steps 50 --warmup-steps 10
later --name tiny --data scenes:crowds --model runs/tiny-heal/checkpoints/step_50 \
    --seed 72 --lr 1e-3 --steps 80 --warmup-steps 0 --cooldown 1
cp runs/tiny/checkpoints/step_80/model.safetensors assets/tiny/
python eval.py --model assets/tiny --data scenes:test --out runs/tiny/eval
