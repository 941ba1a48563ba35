#!/usr/bin/env bash
# The base model, and the default job with each method and in two stages, on 512 test scenes of each kind.
#     bash experiments/four_methods.sh            about 20 minutes on 2 cores (trainings measured two at a time); results in runs/four-*/eval/metrics.json
set -euo pipefail
cd "$(dirname "$0")/.."
test_model() { python eval.py --model "$1" --data scenes:test --out "runs/four-$2/eval"; }
test_model assets/tiny base
for method in visurf rlvr sft; do
    torchrun train.py --method $method --name four-$method
    test_model runs/four-$method $method
done
# Two-stage: half of the steps for each stage, so that all rows have seen as many prompts.
torchrun train.py --method sft --steps 200 --name four-sft-half
torchrun train.py --method rlvr --steps 200 --model runs/four-sft-half/checkpoints/step_200 \
    --name four-sft-rlvr
test_model runs/four-sft-rlvr sft-rlvr
