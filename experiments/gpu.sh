#!/usr/bin/env bash
# What one H100 or H200 does, in at most 8 minutes: the parts of experiments/gpu.py, the most valuable first.
#
#     bash experiments/gpu.sh [FOLDER] [--tiny]
#
# Each part leaves FOLDER/PART.json (default: experiments/gpu) and is left out the next time, unless it was cut off or
# did not start. Then the file says "unfinished".
set -euo pipefail
cd "$(dirname "$0")/.."
folder=experiments/gpu
[[ ${1:-} == [!-]* ]] && folder=$1 && shift
mkdir -p "$folder"
for limit in tests:100 3B:110 7B:110 step:60 1x24G-3b:60 1x24G-7b:70 lora:50 qwen3:50 compiled:100; do
    part=${limit%:*} seconds=${limit#*:} file=$folder/${limit%:*}.json
    if [[ -s $file ]] && ! grep -q '^ *"unfinished"' "$file"; then continue; fi
    (( (left = 470 - SECONDS) > 15 )) || { echo "no time for $part: run this again"; continue; }
    printf '{\n "part": "%s",\n "unfinished": "it did not start"\n}\n' "$part" > "$file"
    echo "== $part"
    timeout -k 5 $(( seconds < left ? seconds : left )) python experiments/gpu.py "$part" "$file" "$@" \
        || echo "$part did not end: $?"
done
