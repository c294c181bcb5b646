"""Runs commands with --dry-run in one process, since loading the libraries for each would take minutes.

Reads:   standard input: a command a line, as `03_guided_sample.py demo 5`, quoted as for a shell
Writes:  nothing; prints what each prints, then hours and disk of each script and in all, and ends with the
         first exit code that is not 0
Run:     bash run_all.sh demo all --dry-run
Cost:    10 s
Expect:  what is fresh, stale or left of each command
"""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path


def dry_run(words):
    """(what a command prints with --dry-run, its exit code)."""
    out, sys.argv = io.StringIO(), [*words, "--dry-run"]
    sys.path[0] = str(Path(words[0]).resolve().parent)  # as Python has it for a script
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return out.getvalue(), stop.code or 0
    return out.getvalue(), 0


def totals(texts):
    """Lines of sums over lines as "03 8 of 8 videos left, 0.010 h on one CPU core, estimate, 0.002 GB"."""
    sums = {}
    lines = [line for text in texts for line in text.splitlines()]
    once = {line for line in lines if " of experts " in line}  # each call of mtt.py plans the same ones
    lines = [*once, *(line for line in lines if line not in once)]
    line = r"^(\w+) .* ([\d.]+) h on .*, (measured|estimate)\b.*, ([\d.]+) GB"
    for script, hours, mark, size in re.findall(line, "\n".join(lines), re.M):
        measured, estimate = (float(hours) * (mark == kind) for kind in ("measured", "estimate"))
        for name in (script, "in all"):
            n, *old = sums.pop(name, (0, 0.0, 0.0, 0.0))
            sums[name] = n + 1, old[0] + measured, old[1] + estimate, old[2] + float(size)
    text = "{}, {} parts: {:.1f} h ({:.1f} measured, {:.1f} estimate), {:.1f} GB"
    return [text.format(name, n, a + b, a, b, size) for name, (n, a, b, size) in sums.items()]


def main():
    texts = []
    for line in sys.stdin:
        text, code = dry_run(shlex.split(line))
        print(text, end="", flush=True)
        if code:
            sys.exit(code)
        texts.append(text)
    print("\n".join(totals(texts)))


if __name__ == "__main__":
    main()
