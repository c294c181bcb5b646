#!/usr/bin/env bash
# Rates of a baseline, by accuracy on the validation groups of the demo's training videos, never on test clips.
#
#   bash baselines/grid.sh METHOD IPC RATE ...       bash baselines/grid.sh dm+d 5 10 100 1000
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
. ./setup.sh
method="${1%+d}" dynamic=() ipc="$2" folders=(--data-root data/validation --work-dir work/validation)
"$python" demo/draw_videos.py --data-root data/validation --validation
"$python" 01_encode_latents.py demo "${folders[@]}"
if [ "$1" != "$method" ]; then
  dynamic=(--dynamic)
  [ "$method" = frepo ] && images="$ipc" || images=$((2 * ipc))
  "$python" baselines/static_dc.py demo "$images" "${folders[@]}"
fi
for rate in "${@:3}"; do
  name="$1-lr$rate"
  "$python" "baselines/$method.py" demo "$ipc" "${folders[@]}" "${dynamic[@]}" --set "lr=$rate" --name "$name"
  "$python" 05_train_eval.py demo "$ipc" "${folders[@]}" --train-on "$name"
done
