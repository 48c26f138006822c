#!/usr/bin/env bash
# What a machine with a GPU has to show, each step with its own time limit and its output in a file of its own:
#
#   tests/benchmarks/gpu_checks.sh OUT RAVDESS BACKBONE
#
# OUT: a folder for the output; RAVDESS: the corpus; BACKBONE: a directory with a Whisper encoder. About twelve minutes;
# MINUTES=8 is what gpu.py may take of them. The benchmark comes before the searches that only show that they end.
# OUT/steps.txt says how each step ended and how long it took; OUT/gpu.jsonl has the rows that were measured, however it
# ended. Results of searches are copied without their checkpoints.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
ravdess=$2
backbone=$3
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1
    echo "$name: exit code $?, $((SECONDS - started)) s" >> "$out/steps.txt"
}
search() { # NAME SECONDS SPACE [key=value ...]
    local name=$1 limit=$2 space=$3
    shift 3
    step "$name" "$limit" "$python" -m ser_ray.tune "search_spaces/$space" "experiment.name=$name" \
        "storage.results=$scratch/results" "storage.cache=$scratch/cache" "$@"
    mkdir -p "$out/$name"
    (cd "$scratch/results/$name" && cp -r plan.json trials.csv evaluation "$out/$name/") 2>> "$out/$name.txt"
}

nvidia-smi > "$out/gpu.txt" 2>&1
whisper=("experiment.corpora.ravdess=$ravdess" "experiment.backbone=$backbone")
# One process for one card, and no pytest-xdist, which a bare machine may lack.
step tests 120 "$python" -m pytest -o addopts= -m gpu -q -p no:cacheprovider tests
step gpu $((60 * ${MINUTES:-8} + 30)) "$python" tests/benchmarks/gpu.py --rows "$out/gpu.jsonl" \
    --minutes "${MINUTES:-8}" --ravdess "$ravdess" --whisper "$backbone"
search frozen 90 ravdess_whisper.yaml "${whisper[@]}" 'experiment.adapter={method: frozen}' \
    'search={optimizer.head_lr: {loguniform: [1.0e-5, 1.0e-3]}}' 'tune.first=[]' tune.trials=4
search uncached 120 ravdess_whisper.yaml "${whisper[@]}" tune.trials=2 experiment.augment.gain_db=3
cat "$out/steps.txt"
