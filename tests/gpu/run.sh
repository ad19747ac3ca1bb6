#!/usr/bin/env bash
# What only a GPU can tell, in one command and one table. Nothing is built here: `tests/gpu/build` has made tests/gpu/carry
# on another machine. Needs the driver, NCCL 2.14 or newer (found in Python's packages too), and for torch's figures torch.
#   tests/gpu/run.sh [FOLDER]      writes what it prints to FOLDER/gpu.txt too (default: $OUT, or out)
set -uo pipefail
cd "$(dirname "$0")"
carry=$PWD/carry
out=${1:-${OUT:-../../out}}
mkdir -p "$out"
[ -x "$carry/gpu" ] || { echo "there is no $carry/gpu: run tests/gpu/build where Rust is, and carry the folder here" >&2; exit 2; }
exec > >(tee "$out/gpu.txt") 2>&1

python=$(command -v python3 || true)
packages() { [ -n "$python" ] && "$python" -c "import importlib.util as u, sys
spec = u.find_spec('nvidia')
print('\n'.join(spec.submodule_search_locations) if spec else '')" 2>/dev/null; }
for folder in $(packages); do
    for library in "$folder"/*/lib; do [ -d "$library" ] && LD_LIBRARY_PATH=$library:${LD_LIBRARY_PATH:-}; done
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}

failed=0
step() { echo; echo "== $1"; shift; timeout 300 "$@" || { echo "   FAILED ($?): $*"; failed=1; }; }

# Ranks of one command, as processes on one GPU. NCCL takes ranks of different hosts there: their sockets are then what is
# measured. 2.30.3 and newer take several ranks of one host on one GPU where they are told to.
ranks() {
    local world=$1 rank bad=0 pids=() address=127.0.0.1:$((20000 + RANDOM % 20000))
    shift
    for ((rank = 0; rank < world; rank++)); do
        GPU_RANK=$rank GPU_WORLD=$world GPU_ADDRESS=$address GPU_DEVICE=${DEVICE:-0} NCCL_HOSTID=fabric-$rank \
            NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} timeout 240 "$carry/gpu" "$@" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || bad=$((bad + 1)); done
    return $bad
}
expect() { local wanted=$1 bad; shift; ranks "$@"; bad=$?; [ "$bad" -eq "$wanted" ]; }
group() { echo; echo "== $1"; shift; "$@" || { echo "   FAILED: $*"; failed=1; }; }

date -u "+%Y-%m-%d %H:%M UTC"
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step "what is here" "$carry/gpu" look
step "kernels" "$carry/gpu" kernels
torch=()
if [ -n "$python" ] && "$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null; then
    "$python" torch_peers.py > "$out/torch.json" && torch=(--torch "$out/torch.json")
    "$python" -c 'import torch; print("torch", torch.__version__)'
fi
step "speeds" "$carry/gpu" speeds "${torch[@]}"
group "NCCL, one rank" expect 0 1 rank
group "NCCL, two ranks on one GPU" expect 0 2 rank --most-mib 64
group "NCCL, four ranks on one GPU" expect 0 4 rank --most-mib 16
group "a collective that one rank never joins" expect 0 2 hang
group "a rank that ends without a word" expect 1 2 kill
if [ -x "$carry/gpt" ]; then
    step "gpt, single" "$carry/gpt" --accelerator cuda --devices 1 --max-steps 200
    for strategy in ddp zero1 fsdp; do
        # Two machines of one GPU each, as far as the ranks know.
        echo; echo "== gpt, $strategy, two ranks on one GPU"
        port=$((20000 + RANDOM % 20000)) pids=() bad=0
        for node in 0 1; do
            MASTER_ADDR=127.0.0.1 MASTER_PORT=$port WORLD_SIZE=2 RANK=$node LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 GROUP_RANK=$node \
                TORCHELASTIC_RUN_ID=fabric-$port NCCL_HOSTID=fabric-$node NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_SOCKET_IFNAME=lo FABRIC_SECURITY=plain \
                timeout 300 "$carry/gpt" --accelerator cuda --devices 1 --strategy "$strategy" --max-steps 200 &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || bad=1; done
        [ $bad -eq 0 ] || { echo "   FAILED"; failed=1; }
    done
fi
echo
[ $failed -eq 0 ] && echo "everything held" || echo "something FAILED: see above"
exit $failed
