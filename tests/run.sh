#!/usr/bin/env bash
# Sets up like run_all.sh, then runs ruff and pytest. Arguments go to pytest: bash tests/run.sh -k mp4
set -euo pipefail
cd "$(dirname "$0")/.."
test_modules="pytest ruff"
. ./setup.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "$@"
