# Sourced by checks that start four ranks in several ways: `write_job` makes $PLACE/job.toml, `train NAME COMMAND...`
# has the command train it in $PLACE/NAME, and unless that is `local` holds the losses to those of `local`.
write_job() {
    cat >"$PLACE/job.toml" <<END
[model]
layers = 4
hidden = 32
heads = 4
feed_forward = 64
vocabulary = 320
[cluster]
accelerators = 4
[data]
text = ["$PWD/*.md"]
[training]
sequence = 32
global_batch = 8
steps = 10
[layout]
pipeline = 2
[run]
measure = false
END
}

losses() { grep -h '"event":"step"' "$PLACE/$1/runs/job-001/metrics.jsonl" | grep -o '"loss":[^,]*'; }

train() { # NAME COMMAND...
    mkdir "$PLACE/$1"
    (cd "$PLACE/$1" && HOME=$PLACE timeout 120 "${@:2}" train ../job.toml >log 2>&1) || {
        cat "$PLACE/$1/log"
        exit 1
    }
    if [ "$1" != local ]; then
        diff <(losses local) <(losses "$1")
        echo "$1: $(losses "$1" | wc -l) steps, the losses of local ranks to the bit"
    fi
}
