#!/bin/sh
# Does the real TensorBoard read what TensorBoardLogger writes? Installs it into a folder of its own (from PyPI), writes two runs,
# reads them with its EventAccumulator, starts its server and asks that too. Run by a person; the output of a run is kept in
# docs/external/tensorboard.txt.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
room=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server"; rm -rf "$room"' EXIT
python=${PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$room/venv"
    "$room/venv/bin/pip" install --quiet tensorboard setuptools
    python=$room/venv/bin/python
fi
"$python" -c 'import tensorboard; print("tensorboard", tensorboard.__version__)'
(cd "$here/../.." && cargo run --quiet -p fabric-tests --bin events -- "$room/logs")
"$python" -m tensorboard.main --logdir "$room/logs" --port 0 --host localhost --samples_per_plugin scalars=1000000 \
    >"$room/server.txt" 2>&1 &
server=$!
port=
for _ in $(seq 60); do
    port=$(sed -n 's#.*http://.*:\([0-9]*\)/.*#\1#p' "$room/server.txt")
    test -z "$port" || break
    sleep 1
done
test -n "$port" || { cat "$room/server.txt"; exit 1; }
for _ in $(seq 60); do # the server reads the logs after it has begun to listen
    curl -s "http://localhost:$port/data/plugin/scalars/tags" | grep -q version_1 && break
    sleep 1
done
"$python" -W ignore "$here/read_events.py" "$room/logs" "http://localhost:$port"
echo "GET /data/plugin/scalars/tags"
curl -s "http://localhost:$port/data/plugin/scalars/tags"
echo
echo "GET /data/plugin/scalars/scalars?run=digits/version_0&tag=train/loss (the first 100 bytes)"
curl -s "http://localhost:$port/data/plugin/scalars/scalars?run=digits/version_0&tag=train/loss" | head -c 100
echo
