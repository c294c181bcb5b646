# Sourced by run_all.sh with --baselines: the rows of Table 1 whose sets are learnt from real clips, at one IPC.

row() { # IPC METHOD [--dynamic]: makes the set and trains on it
  stage 4 "baselines/$2.py" "$1" "${@:3}"
  stage 5 05_train_eval.py "$1" --train-on "$2${3:++d}"
}
baselines() { # IPC
  row "$1" dm
  row "$1" static_dc
  stage 4 baselines/static_dc.py $((2 * $1)) # the images of DM+D and MTT+D, two per video
  row "$1" dm --dynamic
  row "$1" frepo
  row "$1" frepo --dynamic
  row "$1" mtt
  row "$1" mtt --dynamic
}
