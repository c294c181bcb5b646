#!/usr/bin/env bash
# Sets up like run_all.sh, then runs ruff and pytest in two processes. Arguments go to pytest: -k mp4
set -euo pipefail
cd "$(dirname "$0")/.."
test_modules="pytest xdist ruff datasets"
. ./setup.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
export OMP_WAIT_POLICY=passive  # threads of two processes that wait actively would hinder each other
exec "$python" -m pytest -n 2 --dist worksteal "$@"
