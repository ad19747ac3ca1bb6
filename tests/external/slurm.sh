#!/usr/bin/env bash
# The training example under a real SLURM, all of it on this machine: `srun -n 2`, a batch job that calls srun, and a batch
# job that does not. Run as root on Debian or Ubuntu; installs slurm-wlm and munge when they miss, uses a folder of its own
# for their configuration and state, and stops what it started. `tests/external/slurm.sh [COMMAND...]` runs a command
# under srun instead of the example.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi
target=${CARGO_TARGET_DIR:-target}
cargo build -q -p fabric-facade --example 02_training_loop
example=$(realpath "$target")/debug/examples/02_training_loop

work=$(mktemp -d /tmp/fabric-slurm.XXXXXX)
chmod 755 "$work"
node=$(hostname -s)
mkdir "$work/state" "$work/spool" "$work/run"
pids=()
stop() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap stop EXIT

dd if=/dev/urandom of="$work/munge.key" bs=1024 count=1 status=none
chmod 400 "$work/munge.key"
cat >"$work/slurm.conf" <<CONF
ClusterName=fabric
SlurmctldHost=$node(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$work/slurm.conf

munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
    --log-file="$work/munged.log" --seed-file="$work/munged.seed" >"$work/munged.out" 2>&1 &
pids+=($!)
slurmctld -D >"$work/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D >"$work/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do
    sinfo -h -o %T 2>/dev/null | grep -q idle && break
    sleep 0.2
done
sinfo -h -o '%P %N %T' || { tail -n 20 "$work"/*.log; exit 1; }
srun --version
cd "$work/run"

if (($# > 0)); then
    srun -n 2 "$@"
    exit
fi

# The fields of SLURM's variables that this library reads, on the second rank.
variables='env | grep -E "^SLURM_(PROCID|LOCALID|NODEID|NTASKS|STEP_ID|STEP_NUM_TASKS|STEP_TASKS_PER_NODE|STEP_NODELIST|STEP_NUM_NODES|LAUNCH_NODE_IPADDR)=" | sort'

echo "== srun -n 2"
srun -n 2 "$example" auto
srun -n 2 sh -c "test \$SLURM_PROCID = 1 || exit 0; $variables"

batch() { # name, options, script
    printf '#!/bin/sh\n%s\n' "$3" >"$work/$1.sh"
    # shellcheck disable=SC2086
    timeout 60 sbatch --wait --quiet $2 -o "$work/$1.out" "$work/$1.sh" || echo "(exit $?)"
    cat "$work/$1.out"
}
echo "== a batch job of 2 tasks that calls srun"
batch with "-n 2" "srun $example auto"
echo "== a batch job of 2 tasks that forgets srun: one process, which says so"
batch without "-n 2" "$example auto; $variables"
echo "== a batch job of 1 task, in which Fabric starts 2 ranks itself"
batch own "-n 1 -c 2" "srun -n 1 -c 2 $example 2"
