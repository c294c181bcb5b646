"""tools/gallery.py: the page names every video of a chain, and in a headless browser they play."""

import contract

import base64
import html
import json
import os
import re
import select
import shutil
import subprocess
import time
import urllib.parse
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
STATE = """(() => { const v = [...document.querySelectorAll("video")]; return JSON.stringify({
  videos: v.length, loaded: v.filter(x => x.readyState >= 1).length, failed: v.filter(x => x.error).length,
  played: v.filter(x => x.played.length && x.played.end(0) > 0).length,
  shown: v.filter(x => x.offsetParent).length,
  sources: [...document.querySelectorAll("span")].map(x => x.textContent).filter(x => x) }); })()"""


class Browser:
    """A headless Chromium that is spoken to through pipes; `complaints` is what its console says."""

    def __init__(self, folder):
        (self.commands, write), (read, self.answers) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4
        line = f'exec "$0" "$@" 3<&{self.commands} 4>&{self.answers}'
        words = (
            "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --window-size=1200,1600".split()
        )
        words += [f"--user-data-dir={folder}", "--autoplay-policy=no-user-gesture-required", "about:blank"]
        options = {"pass_fds": (self.commands, self.answers), "stdout": subprocess.DEVNULL}
        command = ["bash", "-c", line, CHROMIUM, *words]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
        self.write, self.read, self.left, self.number, self.complaints = write, read, b"", 0, []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self.do(f"{part}.enable")

    session = None

    def do(self, method, **params):
        """Sends a command, waits for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.left:
                assert select.select([self.read], [], [], 120)[0], f"no answer to {method}"
                self.left += os.read(self.read, 2**20)
            line, _, self.left = self.left.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") in COMPLAINTS:
                self.complaints.append(answer["params"])
            if answer.get("id") == self.number:
                return answer["result"]

    def state(self):
        return json.loads(self.do("Runtime.evaluate", expression=STATE)["result"]["value"])


@pytest.fixture
def gallery(place):
    place.must("tools/tables.py")
    place.must("tools/gallery.py", 2)
    return place.work / "demo/gallery.html"


def test_page_names_every_video(gallery, place):
    text = gallery.read_text("utf-8")
    sources = [urllib.parse.unquote(source) for source in re.findall(r'<video src="([^"]+)"', text)]
    assert all((gallery.parent / source).is_file() for source in sources)
    assert (
        len(sources) == len({*sources}) == 2 * (2 + 2 + 8 + 2)
    )  # per class: real, prototypes, generated, composed
    rows = contract.read(place.work / "demo/04_distilled/ipc2/gvd/metadata.csv")
    stated = [json.loads(html.unescape(line)) for line in re.findall(r'data-sources="([^"]+)"', text)]
    assert len(stated) == len(rows) == 4 and all(len(of_video) == 16 for of_video in stated)
    first = rows[0]["frames"].split()[0].split("-")[0]
    assert stated[0][0] == f"{rows[0]['sources'].split()[0]}, frame {first}"
    members = contract.read(place.work / "demo/02_prototypes/ipc2/direct/Walk.csv")
    for k in "01":
        distance, name = min((float(r["distance"]), r["name"]) for r in members if r["prototype"] == k)
        assert f"real: {name}<" in text
    result = contract.read(place.work / "demo/05_results/ipc2/gvd/minic3d__hard__demo/result.json")
    assert f"{result['top1']['mean']:.1f} ± {result['top1']['std']:.1f} (2) short of its protocol" in text

    made = place.work / "demo/gallery/ipc2/prototype/Walk/0.mp4"
    stamp = made.stat().st_mtime_ns
    assert "gallery fresh" in place.run("tools/gallery.py", 2)[1] and made.stat().st_mtime_ns == stamp


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_videos_play_in_a_browser(gallery, tmp_path):
    """GALLERY_SCREENSHOT=FILE keeps what it looks like."""
    browser = Browser(tmp_path / "profile")
    try:
        browser.do("Page.navigate", url=gallery.as_uri())
        limit = time.monotonic() + 60
        while (state := browser.state())["played"] < state["shown"] or not state["sources"]:
            assert time.monotonic() < limit, state
            time.sleep(0.5)
        assert state["videos"] == state["loaded"] == 28 and state["failed"] == 0 and browser.complaints == []
        assert re.fullmatch(r"[01]_\d, frame \d+", state["sources"][0])
        if target := os.environ.get("GALLERY_SCREENSHOT"):
            Path(target).write_bytes(base64.b64decode(browser.do("Page.captureScreenshot")["data"]))
        for name, value, shown in (("class", "Walk", 14), ("method", "gvd, composed", 2), ("class", "", 4)):
            element = f'document.getElementById("{name}")'
            script = f'{element}.value = "{value}"; {element}.dispatchEvent(new Event("change"))'
            browser.do("Runtime.evaluate", expression=script)
            assert browser.state()["shown"] == shown
    finally:
        browser.process.terminate()
        browser.process.wait()
