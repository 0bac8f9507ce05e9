# Sourced by checks that need Slurm: `start_slurm FOLDER` starts one of Debian's packages, with this host as its
# only node and all its files in FOLDER, until the shell ends; `slurm_is_idle` comes before that.
need() { # COMMAND PACKAGES...
    command -v "$1" >/dev/null && return
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${@:2}" >/dev/null
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

start_slurm() {
    local place=$1 host user
    host=$(hostname -s) user=$(id -un)
    need slurmctld slurm-wlm munge
    mkdir -p "$place/"{state,spool} && chmod 755 "$place"
    rm -f "$place/munge.key" && head -c 1024 /dev/urandom >"$place/munge.key" && chmod 400 "$place/munge.key"
    cat >"$place/slurm.conf" <<END
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
CredType=cred/munge
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
END
    export SLURM_CONF=$place/slurm.conf
    munged --force --foreground --num-threads=2 --key-file="$place/munge.key" --socket="$place/munge.socket" \
        --pid-file="$place/munged.pid" --seed-file="$place/munge.seed" --log-file="$place/munged.log" &
    for _ in $(seq 100); do [ -S "$place/munge.socket" ] && break || sleep 0.1; done
    slurmctld -D &
    slurmd -D -N "$host" &
    for _ in $(seq 300); do
        sinfo -h -o %T 2>/dev/null | grep -q idle && return || sleep 0.1
    done
    tail -n 20 "$place"/*.log
    echo "Slurm does not start" >&2
    return 1
}

# Returns when no job is under way, or ending: a step that cannot tell the controller of its end keeps its daemon for minutes.
slurm_is_idle() {
    for _ in $(seq 100); do [ -z "$(squeue -h)" ] && return || sleep 0.1; done
    echo "a job does not end: $(squeue)" >&2
    return 1
}
