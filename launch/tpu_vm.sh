#!/usr/bin/env bash
# Trains on a TPU slice of plain TPU VMs: the same commands on all hosts of the slice, by gcloud.
#
#   launch/tpu_vm.sh create                                  asks for the slice and waits for it
#   launch/tpu_vm.sh setup                                   installs HEAD on all hosts
#   launch/tpu_vm.sh train --config FILE --workdir DIR       starts; the same again: goes on
#   launch/tpu_vm.sh log | stop | delete
#
# `train` is a service of systemd on every host: it outlives the connection, and is started again
# when it fails, ten times an hour at most. A process that waits for a lost one is ended by jax or
# by the hang watchdog, so all meet again. `stop` saves the same step on all hosts. A slice that was
# preempted is gone: delete, create, setup, train.
#
# EDIT these, or set them in the environment. LIBTPU_INIT_ARGS there come after the platform's flags:
set -euo pipefail
name=${TPU_NAME:-apt-jax}
zone=${TPU_ZONE:-us-east5-a}
type=${TPU_TYPE:-v5p-128}             # 64 chips; v6e-64, ...
runtime=${TPU_RUNTIME:-v2-alpha-tpuv5} # v2-alpha-tpuv6e for v6e
options=${TPU_OPTIONS:-}              # --spot, --reserved, --network=...
patience=${TPU_PATIENCE:-7200}        # seconds that stop gives: an update and a checkpoint
share=${TPU_SHARE:-}                  # NFS that all hosts mount as /data, e.g. 10.0.0.2:/data
# --workdir and the data must lie on storage that all hosts see.

usage() { sed -n '2,/^# EDIT/{/^# EDIT/!s/^# \{0,1\}//p}' "$0"; }
all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

create() {
  # shellcheck disable=SC2086
  gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$runtime" $options
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED | SUSPENDED) echo "tpu_vm.sh: the request is $(state)" >&2; exit 1 ;;
    esac
    sleep "${TPU_POLL:-30}"
  done
}

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
}

setup() {
  local folder archive
  folder=$(mktemp -d)
  archive=$folder/apt_jax.tar.gz
  git -C "$(dirname "$0")/.." archive --prefix=apt_jax/ --format=tar.gz -o "$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$name:apt_jax.tar.gz" --zone="$zone" --worker=all
  rm -r "$folder"
  # The images' own Python is older than 3.11; uv brings one.
  all "set -e; tar xzf apt_jax.tar.gz; python3 -m pip install -q --user uv
    cd apt_jax; python3 -m uv venv -q --allow-existing --python 3.12 .venv
    python3 -m uv pip install -q --python .venv -e '.[tpu]'
    ${share:+sudo apt-get install -y -q nfs-common; sudo mkdir -p /data
    mountpoint -q /data || sudo mount -o rw,hard $share /data}
    .venv/bin/python -m apt_jax.parallel.flags tpu --known > /dev/null # names what train leaves out"
}

train() {
  [ $# -gt 0 ] || { usage >&2; exit 2; }
  # Status 2: the command is wrong. 75: saved after a SIGTERM; `stop` ends the service all the same.
  all "set -e; cd apt_jax
    flags=\$(.venv/bin/python -m apt_jax.parallel.flags tpu --known)
    flags+=' '$(printf %q "${LIBTPU_INIT_ARGS:-}")
    sudo systemctl reset-failed apt_jax 2>/dev/null || true
    sudo systemd-run --unit=apt_jax --uid=\"\$(id -un)\" --working-directory=\"\$PWD\" \
      --property=Restart=on-failure --property=RestartSec=10 \
      --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=10 \
      --property=RestartPreventExitStatus=2 --property=TimeoutStopSec=$patience \
      --setenv=LIBTPU_INIT_ARGS=\"\$flags\" --setenv=APT_JAX_DISTRIBUTED=1 \
      \"\$PWD/.venv/bin/apt-jax\" train --preempted-status 75 $(printf ' %q' "$@")"
}

case ${1:-} in
  create) create ;;
  setup) setup ;;
  train) shift; train "$@" ;;
  log) all "journalctl -u apt_jax -n 50 -o cat" ;;
  stop) all "sudo systemctl stop apt_jax" ;;
  delete) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet ;;
  *) usage >&2; exit 2 ;;
esac
