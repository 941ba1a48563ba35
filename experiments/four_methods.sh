#!/usr/bin/env bash
# The four rows of the README's table: the default job with each method, then 512 test scenes of each kind.
#     bash experiments/four_methods.sh            results in runs/four-*/eval/metrics.json
set -euo pipefail
cd "$(dirname "$0")/.."
python eval.py --model assets/tiny --data scenes:test --out runs/four-base/eval
for method in visurf rlvr sft; do
    torchrun train.py --method $method --name four-$method
    python eval.py --model runs/four-$method --data scenes:test --out runs/four-$method/eval
done
# Two-stage: half of the steps for each stage, so that all rows have seen as many prompts.
torchrun train.py --method sft --steps 150 --name four-sft-half
torchrun train.py --method rlvr --steps 150 --model "$(ls -d runs/four-sft-half/checkpoints/step_150)" \
    --name four-sft-rlvr
python eval.py --model runs/four-sft-rlvr --data scenes:test --out runs/four-sft-rlvr/eval
