#!/usr/bin/env bash
# What works on this GPU machine and how fast; see benchmarks/cuda_check/__main__.py, or --help.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=. exec "${PYTHON:-python3}" -m benchmarks.cuda_check "$@"
