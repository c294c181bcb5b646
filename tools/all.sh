# What `run_all.sh DATASET all` runs: every table and figure of the paper, then a gallery. Sourced by
# run_all.sh: `stage N SCRIPT [ARGUMENTS]` runs a script of stage N, once, `column IPC` the rows of Table 1.

generated() { # IPC NAME OPTIONS OF 03: a set of videos, composed by default and trained on
  stage 3 03_guided_sample.py "$1" --name "$2" "${@:3}"
  stage 4 04_mvic_compose.py "$1" --samples "$2" --name "$2"
  stage 5 05_train_eval.py "$1" --train-on "$2" "${few[@]}"
}

ipcs=(1 5 10 20) few=() dancing="" measured=naive,knoise,gvd
[ "$baselines" = 0 ] || dancing=mtt+d measured+=,mtt+d # of Tables 2 and 3, Fig. 7 d
[ "$dataset" != demo ] || ipcs=(1 5 10)
if [ -d "$data_root/$dataset/train" ]; then # one's own videos: as far as the smallest class goes
  least=$(for c in "$data_root/$dataset"/train/*/; do find "$c" -type f ! -name '.*' | wc -l; done | sort -n | head -n 1)
  share=0 # that is held back
  [ -d "$data_root/$dataset/test" ] || share=0.2
  [[ ! "${options[01]}" =~ --val[=\ ]+([0-9.]+) ]] || share="${BASH_REMATCH[1]}"
  least=$(awk "BEGIN { print int($least * (1 - $share)) }")
  [ "$least" -ge 5 ] || fail "all needs 5 training clips of each class, not $least"
  for i in "${!ipcs[@]}"; do [ "${ipcs[i]}" -le "$least" ] || unset "ipcs[i]"; done
fi
options[metrics.py]="${options[coresets.py]:-}"
[[ ! "${options[soft]}" =~ --teacher[=\ ]+[^\ ]+ ]] || options[metrics.py]+=" ${BASH_REMATCH[0]}"

# Table 1; Fig. 7 a: samplers, b: decay, c: composition, soft labels; Fig. 8
for k in "${ipcs[@]}"; do
  more=() latents=()
  [ "$k" != 5 ] || more=(--draws 8 --save-latents) latents=(--save-latents) # for Table 4, Fig. 5
  column "$k"
  generated "$k" naive --sampler naive "${latents[@]}"
  stage 2 02_kmeans_prototypes.py "$k" --cluster dummy-video
  generated "$k" knoise --sampler knoise "${latents[@]}"
  generated "$k" gvd-no-decay --decay none
  stage 4 04_mvic_compose.py "$k" --pattern 1x16 --name gvd-1x16
  stage 5 05_train_eval.py "$k" --train-on gvd-1x16
done

# Table 2: other networks
for k in 1 5; do
  for net in cnn-gru cnn-rnn; do
    for name in random $dancing gvd; do stage 5 05_train_eval.py "$k" --train-on "$name" --net "$net"; done
  done
done

# Table 4: composition, and Fig. 9: clustering. On the demo of two networks each, to save an hour
[ "$dataset" != demo ] || few=(--repeats 2)
for pattern in 8x2 3-3-3-3-2-2 2x8; do
  for frames in random continuous; do
    name="gvd-$pattern"
    [ "$frames" = random ] || name+=-continuous
    stage 4 04_mvic_compose.py 5 --pattern "$pattern" --frames "$frames" --name "$name"
    stage 5 05_train_eval.py 5 --train-on "$name" "${few[@]}"
  done
done
stage 4 04_mvic_compose.py 5 --frames continuous --name gvd-continuous
stage 5 05_train_eval.py 5 --train-on gvd-continuous "${few[@]}"
for cluster in real-video dummy-video herding gmm; do
  stage 2 02_kmeans_prototypes.py 5 --cluster "$cluster"
  generated 5 "gvd-$cluster" --prototypes "$cluster"
done
stage 2 02_kmeans_prototypes.py 5 --distance cosine
generated 5 gvd-direct-cosine --prototypes direct-cosine

# Fig. 10: lambda and stop; Fig. 5: strength of K-Noise. One draw each
scored="$measured"
for value in 0 0.01 0.05 0.3 1; do # 0.1 is gvd
  stage 3 03_guided_sample.py 5 --guidance "$value" --draws 1 --name "guidance-$value"
  scored+=",guidance-$value"
done
for value in 0 0.25 0.75; do # 0.5 is gvd, 1 is guidance-0
  stage 3 03_guided_sample.py 5 --stop "$value" --draws 1 --name "stop-$value"
  scored+=",stop-$value"
done
for value in 0.3 0.5 0.9 1; do # 0.7 is knoise
  words=(--sampler knoise --strength "$value" --draws 1 --save-latents)
  stage 3 03_guided_sample.py 5 "${words[@]}" --name "knoise-$value"
done

# Table 3, Fig. 3; Fig. 7 d, 10; the tables and figures
stage 5 tools/metrics.py 5 --sets "$measured"
stage 5 tools/metrics.py 5 --sets "$scored" --score
stage 5 tools/mp4_bytes.py
[ "$dataset/$dry" != demo/0 ] || stage 5 demo/contact_sheet.py 5
stage 5 tools/tables.py
stage 5 tools/paper_tables.py
stage 5 tools/figures.py 5
stage 5 tools/gallery.py 5
