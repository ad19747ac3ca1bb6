#!/usr/bin/env bash
# The training example started by each mpirun: Open MPI's and MPICH's. Installs Debian's openmpi-bin and mpich when they
# miss and this user is root; needs nothing else. `tests/external/mpi.sh`
set -euo pipefail
cd "$(dirname "$0")/../.."

install=()
for pair in mpirun.openmpi:openmpi-bin mpirun.mpich:mpich; do
    command -v "${pair%%:*}" >/dev/null || install+=("${pair##*:}")
done
if ((${#install[@]} > 0)); then
    [ "$(id -u)" = 0 ] || { echo "as root, install ${install[*]}"; exit 1; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${install[@]}" >/dev/null
fi
target=${CARGO_TARGET_DIR:-target}
cargo build -q -p fabric-facade --example 02_training_loop
example=$(realpath "$target")/debug/examples/02_training_loop
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

open=(mpirun.openmpi --oversubscribe)
[ "$(id -u)" = 0 ] && open+=(--allow-run-as-root)
hydra=(mpirun.mpich)

say() { echo "== ${*/#*\/examples\//}"; "$@" 2>&1 | sed "s#$work#.#g"; }
mpirun.openmpi --version | head -n 1
say "${open[@]}" -n 2 "$example" auto
say "${open[@]}" -n 3 "$example" auto
mpirun.mpich --version | sed -n 's/^ *Version: */MPICH /p'
say "${hydra[@]}" -n 2 "$example" auto
say "${hydra[@]}" -n 2 sh -c "$example auto"
echo "== two jobs of each at once"
for job in 1 2; do
    "${open[@]}" -n 2 "$example" auto &
    "${hydra[@]}" -n 2 "$example" auto &
done
wait
