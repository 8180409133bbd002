#!/usr/bin/env bash
# Checks and times mmkw on this machine's GPU: needs PyTorch and this repository alone, at most 20
# minutes. Writes gpu.json. Please send it with an issue: no machine of the project has your GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHONPATH="$PWD" exec "${PYTHON:-python3}" tools/benchmarks/gpu.py "$@"
