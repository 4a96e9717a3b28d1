#!/bin/bash
# A Slurm cluster of this one machine, to try launch/slurm.sbatch on: Debian or Ubuntu, as root.
#
#   launch/one_machine_slurm.sh start FOLDER     installs slurm-wlm if it is missing, starts daemons
#   launch/one_machine_slurm.sh stop FOLDER      stops what start started
#
# FOLDER takes configuration, state and logs. Afterwards, in a shell:
#   export SLURM_CONF=FOLDER/slurm.conf
#   sbatch --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 launch/slurm.sbatch --config ...
set -eu
if [ $# -ne 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
host=$(hostname -s)

stop() {
    for name in slurmd slurmctld munged; do
        pid=$(cat "$folder/$name.pid" 2>/dev/null || true)
        if [ -n "$pid" ]; then kill "$pid" 2>/dev/null || true; fi
    done
}

start() {
    if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            slurm-wlm slurm-client munge >"$folder/install.log" 2>&1
    fi
    mkdir -p "$folder/state" "$folder/spool" /run/munge
    chown munge: /run/munge
    [ -f /etc/munge/munge.key ] || {
        dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
        chown munge: /etc/munge/munge.key
        chmod 400 /etc/munge/munge.key
    }
    cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES State=UP OverSubscribe=YES
CONF
    if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
        su -s /bin/bash munge -c "munged"
        cp /run/munge/munged.pid "$folder/munged.pid"
    fi
    SLURM_CONF=$folder/slurm.conf slurmctld
    SLURM_CONF=$folder/slurm.conf slurmd
    for _ in $(seq 60); do
        if [ "$(SLURM_CONF=$folder/slurm.conf sinfo -h -o %T 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$folder/slurm.conf"
            return
        fi
        sleep 1
    done
    echo "one_machine_slurm.sh: the node does not come up; see $folder/*.log" >&2
    exit 1
}

case $action in
    start) start ;;
    stop) stop ;;
    *) echo "one_machine_slurm.sh: start or stop, not $action" >&2; exit 2 ;;
esac
