#!/usr/bin/env bash
# The training example under a real SLURM, with two nodes that are both this machine: `srun` on one node and on two, a batch
# job that calls srun, and batch jobs that do not. Run as root on Debian or Ubuntu; installs slurm-wlm and munge when they
# miss, uses a folder of its own for their configuration and state, and stops what it started. `tests/external/slurm.sh`
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
mkdir -p "$work/state" "$work/spool/n07" "$work/spool/n08" "$work/run"
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
SlurmdParameters=config_overrides
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=n[07-08] NodeHostname=$node NodeAddr=127.0.0.1 Port=[16818-16819] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n[07-08] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$work/slurm.conf

munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
    --log-file="$work/munged.log" --seed-file="$work/munged.seed" >"$work/munged.out" 2>&1 &
pids+=($!)
slurmctld -D >"$work/slurmctld.log" 2>&1 &
pids+=($!)
for name in n07 n08; do
    slurmd -N $name -D >"$work/slurmd-$name.log" 2>&1 &
    pids+=($!)
done
for _ in $(seq 100); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && break
    sleep 0.2
done
sinfo -h -o '%P %N %T' || { tail -n 20 "$work"/*.log; exit 1; }
srun --version
cd "$work/run"

# The fields of SLURM's variables that this library reads.
variables='env | grep -E "^SLURM_(PROCID|LOCALID|NODEID|NTASKS|STEP_ID|STEP_NUM_TASKS|STEP_TASKS_PER_NODE|STEP_NODELIST|STEP_NUM_NODES|LAUNCH_NODE_IPADDR)=" | sort'

echo "== srun -N 1 -n 2"
srun -N 1 -n 2 "$example" auto
echo "== srun -N 2 -n 3, whose last rank has"
srun -N 2 -n 3 sh -c "test \$SLURM_PROCID = 2 || exit 0; $variables"
echo "== the same, at FABRIC_ADDR, in blocks and in turns: one print on each node"
FABRIC_ADDR=127.0.0.1 srun -N 2 -n 3 "$example" auto
FABRIC_ADDR=127.0.0.1 srun -N 2 -n 3 -m cyclic "$example" auto
echo "== the same, at the first node's name, which this machine does not know"
srun -N 2 -n 3 "$example" auto 2>&1 | grep '^Error' | head -n 1 || true
echo "== srun in an allocation of salloc's, which calls every job \"interactive\""
salloc --quiet -N 1 -n 2 srun "$example" auto
echo "== srun in the shell of srun --pty, and the shell's own program"
script -qc "srun -N 1 -n 1 -c 2 --pty bash -c 'srun --overlap -n 2 -c 1 $example auto; $example auto'" /dev/null | tr -d '\r' | sed 's/^^@//'

batch() { # name, options, script
    printf '#!/bin/sh\n%s\n' "$3" >"$work/$1.sh"
    # shellcheck disable=SC2086
    timeout 60 sbatch --wait --quiet $2 -o "$work/$1.out" "$work/$1.sh" || echo "(exit $?)"
    cat "$work/$1.out"
}
echo "== a batch job of 2 tasks that calls srun"
batch with "-N 1 -n 2" "srun $example auto"
echo "== a batch job of 2 tasks that forgets srun: one process, no task"
batch without "-n 2" "$example auto; $variables"
echo "== a batch job of 1 task, in which Fabric starts 2 ranks itself"
batch own "-N 1 -n 1 -c 2" "srun -n 1 -c 2 $example 2"
