# Sourced by run_all.sh and tests/run.sh: sets $python to an interpreter with what requirements.txt names.
# An interpreter that fits is used as it is; else .venv is made beside this file with the pinned versions.
# $test_modules: further modules that it must have.

[ "$(locale charmap 2>/dev/null)" = UTF-8 ] || export LC_ALL=C.UTF-8 # names of classes may have any letters
here="$(dirname "${BASH_SOURCE[0]}")"
fits() { # torch >= 2.11, diffusers and transformers of the pinned minor version, OpenCV of the major one
  "$1" - "$here/requirements.txt" ${test_modules:-} <<'PY' 2>/dev/null
import importlib.metadata as m, importlib.util as u, re, sys
minor = lambda v: tuple(int(x) for x in re.findall(r"\d+", v)[:2])
pins = dict(re.findall(r"^([a-z-]+)==([\d.]+)", open(sys.argv[1]).read(), re.M))
modules = ("numpy", "sklearn", "tqdm", "cv2", "av", "filelock", "matplotlib", *sys.argv[2:])
good = sys.version_info >= (3, 11) and minor(m.version("torch")) >= (2, 11)
good = good and all(minor(m.version(p)) == minor(pins[p]) for p in ("diffusers", "transformers"))
cv = "opencv-python-headless"  # another one may decode to other frames
good = good and minor(m.version(cv))[0] == minor(pins[cv])[0]
sys.exit(not (good and all(u.find_spec(module) for module in modules)))
PY
}

python=""
for candidate in "$here/.venv/bin/python" python3 python; do
  if command -v "$candidate" >/dev/null && fits "$candidate"; then python="$candidate"; break; fi
done
if [ -z "$python" ]; then
  base=""
  for candidate in python3.11 python3.12 python3.13 python3; do
    command -v "$candidate" >/dev/null || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      base="$candidate"; break
    fi
  done
  [ -n "$base" ] || { echo "set-up: install Python 3.11 or newer, then run this again" >&2; exit 1; }
  echo "set-up: installing requirements.txt into .venv (a minute or more)"
  python="$here/.venv/bin/python"
  if command -v uv >/dev/null; then
    [ -x "$python" ] || uv venv --quiet --python "$base" "$here/.venv"
    uv pip install --quiet --python "$python" -r "$here/requirements.txt"
  else
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      rm -rf "$here/.venv"
      "$base" -m venv "$here/.venv" || {
        rm -rf "$here/.venv"; echo "set-up: install python3-venv, then run this again" >&2; exit 1
      }
    fi
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  fi
  fits "$python" || { echo "set-up: .venv does not fit; delete it, then run this again" >&2; exit 1; }
fi
