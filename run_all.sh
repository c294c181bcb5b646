#!/usr/bin/env bash
# The five stages in order, for one data set and IPC, up to the closing table: Table 1's column for that IPC, or with
# --quick its two rows GVD and random.
#
#   bash run_all.sh                      demo 5 --quick: about 13 minutes on two CPU cores, no GPU, no download of data
#   bash run_all.sh demo 5               the demo's whole column: about 40 minutes, by estimate
#   bash run_all.sh hmdb51 20            HMDB51 at 20 videos per class: about 22 hours on one A100, by estimate
#   bash run_all.sh --03 '--guidance 0.3'      one stage with another option; what it does not touch stays
#
# It sets itself up first (--setup-only: nothing else). Every stage skips what is fresh, so running it again goes on
# where it stopped. What it leaves is in work/<data set>/.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash run_all.sh [DATASET [IPC]] [options]

DATASET  demo, hmdb51, miniucf or ucf101; without one: demo 5 --quick
IPC      videos per class of the distilled data set (default 5)

It makes Table 1's column: random, herding, k-center, GVD with hard and with soft labels, random with soft labels, full.

  --quick             GVD beside random real clips only, with hard labels
  --from N --to M     only stages N to M (1 to 5)
  --seed S            seed of everything that is drawn (0)
  --work-dir D        artifacts go to D/<data set> (work)
  --data-root D       folder that holds the data sets (data)
  --model M           folder or hub name of the text-to-video model
  --unet U            published, or the folder of another U-Net; without it hmdb51 and miniucf fine-tune one first
  --device DEV        cpu, cuda, cuda:1 ...
  --classes A,B       only these classes
  --limit N           at most N items of each class
  --0N 'OPTIONS'      options for stage N alone, as --03 '--guidance 0.3' (see python 0N_*.py --help); those of --05 are for
                      every row, but --teacher, --alpha and --tau for soft labels alone
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

dataset="" ipc="" from=1 to=5 quick=0 dry=0 setup_only=0 clean_old=0
work_dir=work data_root=data
shared=()          # options for every stage
model=() unet=()   # for the stages that load the model
finetune=()        # for the fine-tuning
declare -a options_1=() options_2=() options_3=() options_4=() options_5=()

while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) usage; exit 0 ;;
    --quick) quick=1 ;;
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
[ -n "$dataset" ] || quick=1
dataset="${dataset:-demo}" ipc="${ipc:-5}"
case "$dataset" in demo|hmdb51|miniucf|ucf101) ;; *) fail "unknown data set $dataset" ;; esac
[[ "$ipc" =~ ^[1-9][0-9]*$ ]] || fail "IPC must be a number of at least 1, not $ipc"
[[ "$from" =~ ^[1-5]$ && "$to" =~ ^[1-5]$ ]] || fail "--from and --to are 1 to 5"
shared+=(--work-dir "$work_dir" --data-root "$data_root")

if [ "$clean_old" = 1 ]; then
  [ -d "$work_dir/$dataset" ] || exit 0
  find "$work_dir/$dataset" -depth -type d -name '*.old-????????' -print -exec rm -rf {} +
  exit 0
fi

. ./setup.sh  # makes or finds an interpreter that fits requirements.txt: $python
[ "$setup_only" = 0 ] || exit 0

# What --05 says, for what depends on it. The teacher's options are no good to a row with hard labels.
declare -A given=() # {option: its value, or itself}
hard=("${shared[@]}") soft=(--labels soft "${shared[@]}" "${options_5[@]}")
option=-
for word in "${options_5[@]}"; do # --option value or --option=value
  [[ "$word" != --* ]] || option="${word%%=*}"
  given[$option]="${word#"$option="}"
  [[ "$option" =~ ^--(teacher|alpha|tau)$ ]] || hard+=("$word")
done
[ "${given[--labels]:-hard}" = hard ] || hard=("${shared[@]}" "${options_5[@]}")
if [ "${given[--protocol]:-}" = dancing ] || [ "${given[--sampling]:-}" = drawn ]; then options_1+=(--windows); fi

# What is made first for a data set that has no published one.
fine_tuned=0 teacher=0
if [[ "$dataset" =~ ^(hmdb51|miniucf)$ && ${#unet[@]} = 0 && "$from" -le 3 && "$to" -ge 3 ]]; then
  [ -f tools/finetune_unet.py ] || fail "tools/finetune_unet.py is missing; without it: --unet published"
  fine_tuned=1
fi
if [[ "$dataset" = hmdb51 && "$quick" = 0 && "$to" = 5 && -z "${given[--teacher]:-}" ]]; then
  [ -f tools/train_teacher.py ] || fail "tools/train_teacher.py is missing; without it: --quick, or --05 '--teacher MODEL'"
  teacher=1
fi

run() { # prints a command, then runs it
  printf '\n$ python'; printf ' %q' "$@"; printf '\n'
  "$python" "$@"
}

stage() { # number, script and its options: runs it, or with --dry-run prints its plan and sets `pending` and `after`
  local number="$1"; shift
  pending=""
  if [ "$number" -lt "$from" ] || [ "$number" -gt "$to" ]; then return; fi
  if [ "$dry" = 0 ]; then run "$@"; return; fi
  local line
  line="$("$python" "$@" --dry-run ${after:+--after "$after"})"
  echo "$line"
  if grep -qvE '^\w+ (fresh|memory)' <<<"$line"; then pending="$(tail -n1 <<<"$line" | cut -d' ' -f1)"; fi
  [ "$number" = 5 ] || after="${pending:-$after}"
}
pending="" # the stage that was just asked, if it has something to do
after=""   # what the next one waits for

if [ "$dataset" = demo ] && [ "$dry" = 0 ] && [ "$from" = 1 ]; then
  run demo/draw_videos.py --data-root "$data_root"
fi
stage 1 01_encode_latents.py "$dataset" "${shared[@]}" "${model[@]}" "${options_1[@]}"
after_01="$after"
stage 2 02_kmeans_prototypes.py "$dataset" "$ipc" "${shared[@]}" "${options_2[@]}"
if [ "$fine_tuned" = 1 ]; then # the U-Net of stage 03; it waits for 01 alone
  after_02="$after" after="$after_01"
  stage 3 tools/finetune_unet.py "$dataset" "${shared[@]}" "${model[@]}" "${finetune[@]}"
  after="${after_02:-$after}"
fi
stage 3 03_guided_sample.py "$dataset" "$ipc" "${shared[@]}" "${model[@]}" "${unet[@]}" "${options_3[@]}"
stage 4 04_mvic_compose.py "$dataset" "$ipc" "${shared[@]}" "${options_4[@]}"
after_04="$after"

# The rows of the table, the cheap ones first. Real clips wait for 01 alone.
stage 5 05_train_eval.py "$dataset" "$ipc" --train-on gvd "${hard[@]}"
after="$after_01"
stage 5 05_train_eval.py "$dataset" "$ipc" --train-on random "${hard[@]}"
if [ "$quick" = 0 ]; then
  after_teacher=""
  if [ "$teacher" = 1 ]; then
    stage 5 tools/train_teacher.py "$dataset" "${shared[@]}"
    after_teacher="$pending"
  fi
  after="${after_04:-$after_teacher}"
  stage 5 05_train_eval.py "$dataset" "$ipc" --train-on gvd "${soft[@]}"
  after="${after_01:-$after_teacher}"
  stage 5 05_train_eval.py "$dataset" "$ipc" --train-on random "${soft[@]}"

  # `full --save` leaves the features that the coresets are chosen by: MiniC3D's, whatever network --05 asks for.
  once=() other=()
  [ "$dataset" != demo ] || once=(--repeats 1) # 18 minutes on two cores; --05 '--repeats N' overrides it
  [ "${given[--net]:-minic3d}" = minic3d ] || other=(--net minic3d --repeats 1)
  after="$after_01"
  stage 5 05_train_eval.py "$dataset" --train-on full --save "${once[@]}" "${hard[@]}" "${other[@]}"
  after="${pending:+full}"
  stage 5 05_train_eval.py "$dataset" "$ipc" --train-on herding "${hard[@]}"
  stage 5 05_train_eval.py "$dataset" "$ipc" --train-on kcenter "${hard[@]}"
  after="$after_01"
  [ ${#other[@]} = 0 ] || stage 5 05_train_eval.py "$dataset" --train-on full "${once[@]}" "${hard[@]}"
fi
[ "$dry" = 0 ] && [ "$to" = 5 ] || exit 0

if [ "$dataset" = demo ]; then
  run demo/contact_sheet.py "$ipc" --work-dir "$work_dir" "${model[@]}"
fi
run 05_train_eval.py "$dataset" "$ipc" --table "${shared[@]}"
echo "total: $((SECONDS / 60)) min $((SECONDS % 60)) s"
