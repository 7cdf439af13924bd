#!/usr/bin/env bash
# Builds the wheel, installs it in an empty environment, and runs a command of every group there,
# in a folder that holds no source. Finds what an editable installation hides.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python=${PYTHON:-python3}
mkdir "$place/source"
(cd "$root" && git ls-files -z | xargs -0 cp --parents -t "$place/source")
"$python" -m venv "$place/env"
"$place/env/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$place" "$place/source"
cp "$root/experiments/configs/digits.py" "$root/docs/figures/digit.png" "$root/constraints.txt" "$place"
rm -rf "$place/source"
"$place/env/bin/python" -m pip install --quiet --constraint "$place/constraints.txt" "$place"/*.whl \
    onnx onnxruntime flatbuffers
cd "$place"
run() { echo "wheel: bitmixer $*"; env/bin/bitmixer "$@" > log 2>&1 || { cat log; exit 1; }; }
run train --config digits.py --workdir run --config.stages.activations.epochs=1 \
    --config.stages.weights.epochs=1 --config.stages.mixed.epochs=3 --config.report_random=2
run evaluate --workdir run --policy 3 --json result.json
run cost --workdir run --policy 3
run search --workdir run --method greedy --budget avg_bits=3 --images 100 --out policy.json
run export --workdir run --format packed --out net.packed --images 20
run export --workdir run --format onnx --out net.onnx --images 20
run export --workdir run --format stablehlo --out net.stablehlo --images 20
run predict --model net.packed digit.png
run predict --model net.onnx digit.png
run predict --model run digit.png
env/bin/python -c 'import bitmixer_jax as bm; print("wheel:", bm.Runtime.load("net.packed").classes)'
