#!/usr/bin/env bash
# Install the wheel of a folder into a new venv and search with it outside of the checkout.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
wheel="$(ls "$root/$1"/archfront-*.whl)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "$wheel"
cp "$root/examples/ten.yaml" "$folder/job.yaml"
cd "$folder"
venv/bin/archfront --version
venv/bin/archfront run job.yaml
done_count="$(venv/bin/archfront status last --json | venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["evaluations"]["done"])')"
[ "$done_count" = 10 ] || { echo "the wheel made $done_count of 10 evaluations"; exit 1; }
venv/bin/archfront front last
