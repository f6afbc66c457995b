#!/usr/bin/env bash
# 2,000 rollouts of the micro model: memory, open files, threads and speed stay flat. See docs/faults.md.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" scripts/soak.py "$@"
