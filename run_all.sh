#!/usr/bin/env bash
# The five stages in order, for one data set and IPC, up to the closing table.
#
#   bash run_all.sh                      the demo, IPC 5: about 8 minutes on two CPU cores, no GPU, no download of data
#   bash run_all.sh hmdb51 20            HMDB51 at 20 videos per class: about 13 hours on one A100, by estimate (see README.md)
#   bash run_all.sh demo 5 --03 '--guidance 0.3'      one stage with another option; what it does not touch stays
#
# It sets itself up first (--setup-only: nothing else). Every stage skips what is fresh, so running it again goes on
# where it stopped. What it leaves is in work/<data set>/.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash run_all.sh [DATASET [IPC]] [options]

DATASET  demo (default), hmdb51, miniucf or ucf101        IPC  videos per class of the distilled data set (default 5)

  --quick             GVD beside random real clips only (as of now, what every run does)
  --from N --to M     only stages N to M (1 to 5)
  --seed S            seed of everything that is drawn (0)
  --work-dir D        artifacts go to D/<data set> (work)
  --data-root D       folder that holds the data sets (data)
  --model M           folder or hub name of the text-to-video model
  --unet U            published, or the folder of another U-Net; without it hmdb51 and miniucf fine-tune one first
  --device DEV        cpu, cuda, cuda:1 ...
  --classes A,B       only these classes
  --limit N           at most N items of each class
  --0N 'OPTIONS'      options for stage N alone, as --03 '--guidance 0.3' (see python 0N_*.py --help)
  --finetune 'OPTIONS'  likewise for the fine-tuning of the U-Net (see python tools/finetune_unet.py --help)
  --dry-run           print the plan: what is fresh, stale or to do, hours and disk; run nothing
  --setup-only        install what is needed and stop
  --clean-old         delete the folders that were set aside as stale (*.old-*), and stop
  -h, --help          this text
TEXT
}

words() { # splits a text at blanks, quotes respected, into the array `words`
  mapfile -t words < <(xargs -n1 printf '%s\n' <<<"$1")
}
fail() { echo "run_all.sh: $*" >&2; echo "type: bash run_all.sh --help" >&2; exit 2; }

dataset="" ipc="" from=1 to=5 dry=0 setup_only=0 clean_old=0
work_dir=work data_root=data
shared=()          # options for every stage
model=() unet=()   # for the stages that load the model
finetune=()        # for the fine-tuning
declare -a options_1=() options_2=() options_3=() options_4=() options_5=()

while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) usage; exit 0 ;;
    --quick) ;;
    --tables) fail "--tables, the paper's further tables, is not there yet" ;;
    --dry-run) dry=1 ;;
    --setup-only) setup_only=1 ;;
    --clean-old) clean_old=1 ;;
    --from|--to|--seed|--work-dir|--data-root|--model|--unet|--device|--classes|--limit|--finetune|--0[1-5])
      [ $# -ge 2 ] || fail "$1 needs a value"
      case "$1" in
        --from) from="$2" ;;
        --to) to="$2" ;;
        --work-dir) work_dir="$2" ;;
        --data-root) data_root="$2" ;;
        --model) model=(--model "$2") ;;
        --unet) unet=(--unet "$2") ;;
        --seed|--device|--classes|--limit) shared+=("$1" "$2") ;;
        --finetune) words "$2"; finetune+=("${words[@]}") ;;
        --01) words "$2"; options_1+=("${words[@]}") ;;
        --02) words "$2"; options_2+=("${words[@]}") ;;
        --03) words "$2"; options_3+=("${words[@]}") ;;
        --04) words "$2"; options_4+=("${words[@]}") ;;
        --05) words "$2"; options_5+=("${words[@]}") ;;
      esac
      shift ;;
    -*) fail "unknown option $1" ;;
    *) if [ -z "$dataset" ]; then dataset="$1"; elif [ -z "$ipc" ]; then ipc="$1"; else fail "unexpected $1"; fi ;;
  esac
  shift
done
dataset="${dataset:-demo}" ipc="${ipc:-5}"
case "$dataset" in demo|hmdb51|miniucf|ucf101) ;; *) fail "unknown data set $dataset" ;; esac
[[ "$ipc" =~ ^[1-9][0-9]*$ ]] || fail "IPC must be a number of at least 1, not $ipc"
[[ "$from" =~ ^[1-5]$ && "$to" =~ ^[1-5]$ ]] || fail "--from and --to are 1 to 5"
paths=(--work-dir "$work_dir" --data-root "$data_root")
shared+=("${paths[@]}")

if [ "$clean_old" = 1 ]; then
  [ -d "$work_dir/$dataset" ] || exit 0
  find "$work_dir/$dataset" -depth -type d -name '*.old-????????' -print -exec rm -rf {} +
  exit 0
fi

. ./setup.sh  # makes or finds an interpreter that fits requirements.txt: $python
[ "$setup_only" = 0 ] || exit 0

run() { # prints a command, then runs it
  printf '\n$ python'; printf ' %q' "$@"; printf '\n'
  "$python" "$@"
}

stage() { # number, script and its options: runs it, or with --dry-run prints its plan and sets `after`
  local number="$1"; shift
  if [ "$number" -lt "$from" ] || [ "$number" -gt "$to" ]; then return; fi
  if [ "$dry" = 0 ]; then run "$@"; return; fi
  local line
  line="$("$python" "$@" --dry-run ${after:+--after "$after"})"
  echo "$line"
  if [ "$number" != 5 ] && grep -qvE '^\w+ (fresh|memory)' <<<"$line"; then after="$(tail -n1 <<<"$line" | cut -d' ' -f1)"; fi
}
after=""

if [ "$dataset" = demo ] && [ "$dry" = 0 ] && [ "$from" = 1 ]; then
  run demo/draw_videos.py --data-root "$data_root"
fi
stage 1 01_encode_latents.py "$dataset" "${shared[@]}" "${model[@]}" "${options_1[@]}"
after_01="$after"
stage 2 02_kmeans_prototypes.py "$dataset" "$ipc" "${shared[@]}" "${options_2[@]}"
if [[ "$dataset" =~ ^(hmdb51|miniucf)$ && ${#unet[@]} = 0 ]]; then # the U-Net of stage 03; it waits for 01 alone
  [ -f tools/finetune_unet.py ] || fail "tools/finetune_unet.py is missing; without it: --unet published"
  after_02="$after" after="$after_01"
  stage 3 tools/finetune_unet.py "$dataset" "${shared[@]}" "${model[@]}" "${finetune[@]}"
  after="${after_02:-$after}"
fi
stage 3 03_guided_sample.py "$dataset" "$ipc" "${shared[@]}" "${model[@]}" "${unet[@]}" "${options_3[@]}"
stage 4 04_mvic_compose.py "$dataset" "$ipc" "${shared[@]}" "${options_4[@]}"
stage 5 05_train_eval.py "$dataset" "$ipc" --train-on gvd "${shared[@]}" "${options_5[@]}"
stage 5 05_train_eval.py "$dataset" "$ipc" --train-on random "${shared[@]}" "${options_5[@]}"
[ "$dry" = 0 ] && [ "$to" = 5 ] || exit 0

if [ "$dataset" = demo ]; then
  run demo/contact_sheet.py "$ipc" --work-dir "$work_dir" "${model[@]}"
fi
run 05_train_eval.py "$dataset" "$ipc" --table "${paths[@]}"
echo "total: $((SECONDS / 60)) min $((SECONDS % 60)) s"
