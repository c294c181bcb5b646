#!/usr/bin/env bash
# The whole method on one data set at one IPC, then the table of its sets: a column of Table 1.
#
#   bash run_all.sh [DATASET [IPC | all]] [options]   a data set or folder (docs/data.md), videos per class (5)
#   bash run_all.sh                        demo 5 --quick: 8 minutes on two CPU cores, no GPU, no data needed
#   bash run_all.sh hmdb51 20              HMDB51, 20 videos per class: 21 hours on one A100, by estimate
#   bash run_all.sh demo all               IPC 1, 5, 10 (20), every table and figure, a gallery: tools/all.sh
#   bash run_all.sh --03 '--guidance 0.3'  another option for one stage; what it does not touch stays as it is
#   --quick               only the rows GVD and random, with hard labels
#   --baselines           also DM, MTT, FRePo, Static-DC and Dancing's DM+D, MTT+D, FRePo+D (demo: by estimate 1.5 h)
#   --from N, --to M      only stages N to M (1 to 5)
#   --0N 'OPTIONS'        for stage N alone, for each of its calls (see python 0N_*.py --help)
#   --finetune 'OPTIONS'  likewise for tools/finetune_unet.py (hmdb51, miniucf), but --steps and --name: by hand
#   --soft 'OPTIONS'      likewise for tools/soft_labels.py, as --soft '--teacher MODEL'
#   --dry-run             print what is fresh, stale or left, hours and disk, and run nothing
#   --setup-only, --help  install what is needed, or print this text, and stop
#
# Every other option goes to every stage: --seed S, --work-dir D, --data-root D, --model M, --device DEV,
# --classes A,B, --limit N, --threads N, --redo, --keep. A run that was stopped goes on where it was.
set -euo pipefail
fail() { echo "run_all.sh: $*; type: bash run_all.sh --help" >&2; exit 2; }

from=1 to=5 quick=0 baselines=0 dry=0 setup=0 data_root=data windows="" plan="" what=() shared=() more=()
declare -A done=() options=([01]="" [03]="" [05]="" [soft]="") # of a script, by the first word of its name
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    --quick|--baselines|--dry-run|--setup-only) words="${1#--}"; declare "${words%%-*}"=1 ;;
    --redo|--keep) shared+=("$1") ;;
    --*=*) set -- - "${1%%=*}" "${1#*=}" "${@:2}" ;; # --option=value is two words
    --*)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case "$1" in
        --from|--to) declare "${1#--}"="$2" ;;
        --0[1-5]|--finetune|--soft) options[${1#--}]+=" $2"; xargs -n1 <<<"$2" >/dev/null || fail "$1: $2" ;;
        --data-root) data_root="$2" ;;&
        *) shared+=("$1" "$2") ;;
      esac
      shift ;;
    *) what+=("$1") ;;
  esac
  shift
done
case ${#what[@]} in 0) quick=1 ;; 1|2) ;; *) fail "unexpected ${what[2]}" ;; esac
dataset="${what[0]:-demo}" ipc="${what[1]:-5}"
one="--(sampler|guidance|stop|decay|strength|draws|name|cluster|distance|pattern|frames)" # all has sets of its own
[[ ! "$ipc$quick${options[*]}" =~ ^all(1|.*$one) ]] || fail "--${BASH_REMATCH[2]:-quick}: for one IPC, not for all"
[[ "$ipc" =~ ^(all|[1-9][0-9]*)$ ]] || fail "IPC must be all or a number of at least 1, not $ipc"
[[ "$from,$to" =~ ^[1-5],[1-5]$ ]] || fail "--from and --to are 1 to 5"
if [[ "${options[05]}" =~ dancing|sampling=drawn ]]; then options[01]+=" --windows" windows=--windows; fi
[[ ! "${options[05]}" =~ --protocol[=\ ]*([a-z]+) ]] || options[coresets.py]="--protocol ${BASH_REMATCH[1]}"
root="$(dirname "$0")/" root="${root#./}" # paths stay relative to the folder in which this is typed
. "${root:-./}setup.sh" # makes or finds an interpreter that fits requirements.txt: $python
[ "$setup" = 0 ] || exit 0

stage() { # N SCRIPT [ARGUMENTS]: runs a script of stage N, once; with --dry-run adds it to `plan`
  local name="${2##*/}" words
  [ "$1" -ge "$from" ] && [ "$1" -le "$to" ] && [ -z "${done[$*]:-}" ] || return 0
  done["$*"]=1
  mapfile -t words < <(xargs -rn1 printf '%s\n' <<<"${options[${name%%_*}]:-}") # quotes are respected
  set -- "$root$2" "$dataset" "${@:3}" "${shared[@]}" "${words[@]}"
  if [ "$dry" = 0 ]; then printf '\n$ python'; printf ' %q' "$@"; echo; "$python" "$@"; return; fi
  plan+="${*@Q}"$'\n'
}

[ "$dataset/$from/$dry" != demo/1/0 ] || "$python" "${root}demo/draw_videos.py" --data-root "$data_root"
column() { # IPC: the rows of Table 1
  stage 1 01_encode_latents.py
  # The teacher is downloaded before the hours of stage 03.
  [[ "$dataset" =~ ^(demo|miniucf|ucf101)$ || "$quick${options[soft]}" =~ ^1|--teacher ]] || stage 5 tools/train_teacher.py
  [ "$quick" = 1 ] || stage 5 tools/soft_labels.py --train-on random $windows
  stage 2 02_kmeans_prototypes.py "$1" --name direct
  [[ ! "$dataset" =~ ^(hmdb51|miniucf)$ || "${options[03]}" = *--unet* ]] || stage 3 tools/finetune_unet.py
  stage 3 03_guided_sample.py "$1" "${more[@]}"
  stage 4 04_mvic_compose.py "$1" --name gvd
  stage 5 05_train_eval.py "$1" --train-on gvd
  stage 5 05_train_eval.py "$1" --train-on random
  [ "$baselines" = 0 ] || baselines "$1"
  [ "$quick" = 0 ] || return 0
  stage 5 tools/soft_labels.py "$1" --train-on gvd
  stage 5 05_train_eval.py "$1" --train-on gvd --labels soft
  stage 5 05_train_eval.py "$1" --train-on random --labels soft
  local net="${options[05]}"
  options[05]+=" --net minic3d" # coresets are chosen by its features
  stage 5 05_train_eval.py --train-on full --save
  options[05]="$net"
  stage 5 tools/coresets.py "$1"
  stage 5 05_train_eval.py "$1" --train-on herding
  stage 5 05_train_eval.py "$1" --train-on kcenter
  [[ "$net" != *--net* ]] || stage 5 05_train_eval.py --train-on full
}

[ "$baselines" = 0 ] || . "${root:-./}baselines/rows.sh"
if [ "$ipc" = all ]; then . "${root:-./}tools/all.sh"; else column "$ipc"; fi
if [ "$dry" = 1 ]; then "$python" "${root}tools/plan.py" <<<"${plan%$'\n'}"; exit; fi
if [ "$ipc" != all ]; then
  [ "$dataset" != demo ] || stage 5 demo/contact_sheet.py "$ipc"
  stage 5 tools/tables.py "$ipc"
fi
echo "total: $SECONDS s"
