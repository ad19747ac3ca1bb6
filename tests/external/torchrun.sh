#!/usr/bin/env bash
# The training example started by torchrun, in one group, restarted after a failure, and by two torchruns that make one job
# of two "machines". Uses the torchrun on PATH, or that of TORCHRUN; else makes a virtual environment with PyPI's torch for
# CPUs in $TMPDIR (200 MB to download). `tests/external/torchrun.sh`
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
torchrun=${TORCHRUN:-$(command -v torchrun || true)}
if [ -z "$torchrun" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install -q torch numpy --index-url https://download.pytorch.org/whl/cpu
    torchrun=$work/venv/bin/torchrun
fi
target=${CARGO_TARGET_DIR:-target}
cargo build -q -p fabric-facade --example 02_training_loop
example=$(realpath "$target")/debug/examples/02_training_loop
cd "$work"
export OMP_NUM_THREADS=1

"$(dirname "$torchrun")/python" -c 'import torch; print("torch", torch.__version__)'
echo "== torchrun --nproc-per-node 2"
"$torchrun" --no-python --nproc-per-node 2 "$example" auto
echo "== torchrun --standalone --nproc-per-node 2"
"$torchrun" --standalone --no-python --nproc-per-node 2 "$example" auto 2>&1 | grep -v -e 'W[0-9]' -e '^$' || true
echo "== torchrun --max-restarts 1, when rank 1 fails at first"
cat >"$work/once.sh" <<SCRIPT
test "\$RANK\$TORCHELASTIC_RESTART_COUNT" = 10 && exit 3
exec "$example" auto
SCRIPT
"$torchrun" --no-python --nproc-per-node 2 --max-restarts 1 sh "$work/once.sh" 2>&1 | grep '^y =' || echo "(failed)"
echo "== two torchruns with --nnodes 2, at loopback"
for node in 1 0; do
    "$torchrun" --no-python --nnodes 2 --node-rank $node --nproc-per-node 1 --master-addr 127.0.0.1 --master-port 29411 \
        "$example" auto &
done
wait
