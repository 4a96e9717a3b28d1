#!/bin/bash
# Trains on a TPU slice made of TPU VMs, without a scheduler.
#
#   launch/tpu_vm.sh NAME ZONE -- --config configs/seaweed_8b_video.py --workdir gs://BUCKET/runs/video
#
# The slice NAME exists (gcloud compute tpus tpu-vm create ...) and every host has this repository in
# ~/apt_jax with its environment (make venv EXTRAS=tpu). Everything after -- goes to `apt-jax train`,
# on all hosts at once; jax finds the slice's other hosts. While it fails it is started again, up to
# RESTARTS (20) times, and goes on from the last checkpoint; Ctrl-C ends it.
set -u
if [ $# -lt 4 ] || [ "$3" != "--" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 3
RESTARTS=${RESTARTS:-20}
arguments=$(printf '%q ' "$@")
# shellcheck disable=SC2016  # $(...) is for the hosts
remote='cd ~/apt_jax && export LIBTPU_INIT_ARGS="$(.venv/bin/python -m apt_jax.parallel.flags tpu)" &&
exec .venv/bin/apt-jax train --distributed '$arguments

for tries in $(seq 0 "$RESTARTS"); do
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote" && exit 0
    echo "tpu_vm.sh: ended with an error; starting all hosts again ($tries of $RESTARTS)" >&2
    # What another host still runs waits for one that is gone.
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
        --command="pkill -KILL -f '[a]pt-jax train' || true"
    sleep 10
done
exit 1
