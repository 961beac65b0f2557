"""A headless Chromium driven over its DevTools protocol, for tests that need a browser."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "about:blank",
)
START_S = 60
PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")


class Page:
    """A page of the browser: `complaints` are console errors and warnings, uncaught exceptions
    and failed requests so far, `requests` addresses that the open page asked for."""

    def __init__(self, socket):
        self._socket = socket
        self._number = 0
        self._loaded = False
        self.complaints = []
        self.requests = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Send one command and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            data = json.loads(self._socket.recv(timeout=30))
            if data.get("id") == self._number:
                assert "error" not in data, data
                return data["result"]
            self._event(data)

    def _event(self, told):
        method, about = told.get("method"), told.get("params", {})
        level = about.get("type", about.get("entry", {}).get("level"))
        self._loaded |= method == "Page.loadEventFired"
        if method == "Runtime.exceptionThrown" or level in ("error", "warning"):
            self.complaints.append(str(about))
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def open(self, page, *, width, dark=False, scale=1):
        """Open a file or address at a width, in light or dark, and wait until it has loaded."""
        # A site remembers the theme it was last seen in, and looks for changes of it.
        self.run("location.protocol === 'http:' && localStorage.clear()")
        self._go("about:blank")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=scale,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setScrollbarsHidden", hidden=True)
        self.requests.clear()
        self._go(page if isinstance(page, str) else page.resolve().as_uri())

    def _go(self, url):
        self._loaded = False
        self.send("Page.navigate", url=url)
        while not self._loaded:
            self._event(json.loads(self._socket.recv(timeout=30)))

    def run(self, script):
        """Return the value of a JavaScript expression."""
        reply = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def screenshot(self, path, *, whole=False):
        """Write what is shown, or the whole page, as PNG."""
        reply = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(reply["data"]))


@contextmanager
def browser(program):
    """Yield a page of a fresh browser."""
    from websockets.sync.client import connect

    # Some of its processes write into the profile after the first has ended.
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, f"--user-data-dir={profile}", *FLAGS],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            until = time.monotonic() + START_S
            while not port_file.is_file() or not port_file.read_text():
                assert process.poll() is None, "the browser ended at its start"
                assert time.monotonic() < until, "the browser did not start in time"
                time.sleep(0.05)
            port = port_file.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            with connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait(timeout=20)


# Every visible text with its size and its contrast to what is behind it, in a page's own numbers.
TEXTS = """
(() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    const words = walk.currentNode.textContent.trim();
    if (!words || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    if (!element.checkVisibility({opacityProperty: true})) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const front = light(parts(style.color).slice(0, 3));
    const back = light(behind(element));
    const [high, low] = [Math.max(front, back), Math.min(front, back)];
    found.push({words, size: parseFloat(style.fontSize),
                contrast: (high + 0.05) / (low + 0.05)});
  }
  return found;
})()
"""


# Marks of visible figures outside their track.
CUT = """
[...document.querySelectorAll(".track i")].filter((mark) => {
  if (!mark.checkVisibility()) return false;
  const [box, around] = [mark.parentElement, mark].map((one) => one.getBoundingClientRect());
  return around.left < box.left - 2 || around.right > box.right + 2;
}).map((mark) => mark.closest("li").textContent.trim())
"""


@contextmanager
def served(folder):
    """Yield the address at which a folder is served to this machine."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def readable(page, place, *, figures, texts, home="file:", then=lambda: None):
    """Check a page wide and on a telephone, in light and dark, `then` run once it is open: no
    error, no network, nothing wider than it, every mark of a figure in its track, every text
    legible."""
    backs = set()
    for width, dark in ((1280, True), (1280, False), (390, False), (390, True)):
        page.open(place, width=width, dark=dark)
        then()
        assert page.complaints == []
        assert all(address.startswith((home, "data:")) for address in page.requests)
        assert page.run("document.documentElement.scrollWidth") <= width
        boxes = page.run(
            "[...document.querySelectorAll('.bars')].filter(e => e.checkVisibility())"
            ".map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
        )
        assert len(boxes) == figures
        assert all(wide > 250 and high > 20 for wide, high in boxes)
        assert page.run(CUT) == []
        actual = page.run(TEXTS)
        assert len(actual) > texts
        for text in actual:
            assert text["size"] >= 11, text
            assert text["contrast"] >= 4.5, text
        backs.add(page.run("getComputedStyle(document.body).backgroundColor"))
    assert len(backs) == 2
