# Sourced by run_all.sh and tests/run.sh: sets $python to an interpreter with what requirements.txt names.
# An interpreter that fits is used as it is; else .venv is made here and the pins are installed into it.
# $test_modules: further modules that it must have.

fits() { # torch >= 2.11, the pinned minor versions of diffusers and transformers, and the rest at any version
  "$1" - ${test_modules:-} <<'PY' 2>/dev/null
import importlib.metadata as m, importlib.util as u, re, sys
minor = lambda v: tuple(int(x) for x in re.findall(r"\d+", v)[:2])
pins = dict(re.findall(r"^([a-z-]+)==([\d.]+)", open("requirements.txt").read(), re.M))
good = sys.version_info >= (3, 11) and minor(m.version("torch")) >= (2, 11)
good = good and all(minor(m.version(p)) == minor(pins[p]) for p in ("diffusers", "transformers"))
good = good and all(u.find_spec(p) for p in ("numpy", "sklearn", "tqdm", "cv2", "av", "matplotlib", *sys.argv[1:]))
sys.exit(not good)
PY
}

python=""
for candidate in .venv/bin/python python3 python; do
  if command -v "$candidate" >/dev/null && fits "$candidate"; then python="$candidate"; break; fi
done
if [ -z "$python" ]; then
  base=""
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      base="$candidate"; break
    fi
  done
  [ -n "$base" ] || { echo "set-up: no Python 3.11 or newer was found; install it, then run this again" >&2; exit 1; }
  echo "set-up: installing requirements.txt into .venv (a minute or more)"
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$base" .venv
    uv pip install --quiet --python .venv/bin/python -r requirements.txt
  else
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      rm -rf .venv
      "$base" -m venv .venv || { rm -rf .venv; echo "set-up: install python3-venv, then run this again" >&2; exit 1; }
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  fi
  python=.venv/bin/python
  fits "$python" || { echo "set-up: .venv does not fit requirements.txt; delete .venv and run this again" >&2; exit 1; }
fi
