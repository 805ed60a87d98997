#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud: makes it, installs, starts the same command on every host.
#
#   scripts/launch_tpu_pod.sh create            # the slice (billed from now on)
#   scripts/launch_tpu_pod.sh install           # this working tree and its dependencies
#   scripts/launch_tpu_pod.sh train --config=configs/gsm8k.py --workdir=/mnt/runs/gsm8k
#   scripts/launch_tpu_pod.sh logs
#   scripts/launch_tpu_pod.sh delete
#
# NOT YET RUN ON HARDWARE: written from Google's documentation, run with a stand-in for gcloud.
# Before paying, see that the run fits:
#   python -m adpo_jax.main --config=configs/gsm8k.py --dry_run_topology=v5e:4x4
#
# The working folder must be one that all hosts share (checkpoints are written by all of them), for
# example a Filestore share mounted at the same place on every host. Data files and model folders
# given by path must be there too.
#
# Settings, from the environment:
#   TPU_NAME, ZONE, PROJECT     the slice, its zone, the billed project
#   TPU_TYPE                    e.g. v5litepod-16, v5p-128, v6e-64
#   TPU_RUNTIME                 e.g. v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
#   TPU_SPOT=1                  cheaper and may be taken away; the same command goes on afterwards
set -euo pipefail

: "${TPU_NAME:=adpo}" "${ZONE:=us-west4-a}" "${TPU_TYPE:=v5litepod-16}"
: "${TPU_RUNTIME:=v2-alpha-tpuv5-lite}"
PROJECT="${PROJECT:-$(gcloud config get-value project 2>/dev/null)}"
readonly TPU=(gcloud compute tpus tpu-vm)
readonly WHERE=(--zone="$ZONE" --project="$PROJECT")

on_every_host() {
    "${TPU[@]}" ssh "$TPU_NAME" "${WHERE[@]}" --worker=all --command="$1"
}

create() {
    local spot=()
    [[ -n "${TPU_SPOT:-}" ]] && spot=(--spot)
    "${TPU[@]}" create "$TPU_NAME" "${WHERE[@]}" \
        --accelerator-type="$TPU_TYPE" --version="$TPU_RUNTIME" "${spot[@]}"
}

install() {
    local archive
    archive="$(mktemp --suffix=.tar.gz)"
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    # What git ignores stays here; what is not committed yet goes along.
    git ls-files -z --cached --others --exclude-standard --deduplicate |
        tar --null --ignore-failed-read -czf "$archive" -T -
    "${TPU[@]}" scp "$archive" "$TPU_NAME":adpo_jax.tar.gz "${WHERE[@]}" --worker=all
    rm -f "$archive"
    # The image's own Python may be older than 3.11; uv brings one.
    on_every_host "set -e; rm -rf adpo_jax; mkdir adpo_jax; tar xzf adpo_jax.tar.gz -C adpo_jax
        python3 -m pip install -q --user uv
        [ -e venv ] || python3 -m uv venv -q --python 3.12 venv
        python3 -m uv pip install -q --python venv/bin/python -e 'adpo_jax[tpu,hub]'"
}

train() {
    local arguments loop
    printf -v arguments ' %q' "$@"
    # The hosts find each other through the TPU's metadata. A host that is lost stops the others;
    # the loop on each host starts the command again, and it goes on from the last checkpoint.
    # Codes 2 to 4 are what another attempt would only repeat (docs/reliability.md).
    loop="for attempt in 1 2 3 4 5; do
            ../venv/bin/python -m adpo_jax.main --distributed$arguments
            code=\$?
            case \$code in 0 | [2-4]) exit \$code ;; esac
            echo \"attempt \$attempt ended with code \$code\"; sleep 20
        done"
    on_every_host "cd adpo_jax && nohup bash -c $(printf %q "$loop") >> ../train.log 2>&1 < /dev/null &"
}

logs() {
    "${TPU[@]}" ssh "$TPU_NAME" "${WHERE[@]}" --worker=0 --command="tail -n 50 -F train.log"
}

delete() {
    "${TPU[@]}" delete "$TPU_NAME" "${WHERE[@]}" --quiet
}

case "${1:-}" in
    create | install | train | logs | delete) "$@" ;;
    *)
        sed -n '2,25s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
