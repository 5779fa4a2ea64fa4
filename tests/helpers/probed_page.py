"""A report page in Chromium with a probe, which records what the page shows."""

import functools
import http.server
import json
import re
import subprocess
import threading
from html import unescape
from pathlib import Path

from tests.helpers.browser import chromium

# Runs after the page's own script: hovers over the first chart and writes down what it saw.
_PROBE = """<script nonce="probe">
addEventListener("load", function () {
  const svg = document.querySelector("svg[data-chart]");
  const box = svg ? svg.getBoundingClientRect() : null;
  if (svg) {
    svg.dispatchEvent(new PointerEvent("pointermove", {
      clientX: box.left + box.width * 0.6, clientY: box.top + 40, bubbles: true }));
  }
  const said = document.getElementById("tip").textContent;
  const token = document.querySelector(".tokens [data-at='3']");
  const choice = document.querySelector(".shaded select");
  const shades = choice && ["reward", "kl"].map(function (name) {
    choice.value = name;
    choice.dispatchEvent(new Event("change"));
    return token.style.background;
  });
  if (token) { token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true })); }
  const axis = document.querySelector(".scatter select");
  const before = document.querySelectorAll(".scatter circle").length;
  if (axis) { axis.selectedIndex = 0; axis.dispatchEvent(new Event("change")); }
  document.body.dataset.probe = JSON.stringify({
    dots: [before, document.querySelectorAll(".scatter circle").length],
    ticks: Array.from(document.querySelectorAll(".scatter .tick"))
      .map(function (tick) { return tick.textContent; }),
    title: document.title,
    tip: said, token: document.getElementById("tip").textContent, shades: shades,
    cursor: document.querySelectorAll(".cursor line").length,
    width: innerWidth, content: document.documentElement.scrollWidth,
    scripts: document.scripts.length, charts: document.querySelectorAll("svg").length,
    paper: getComputedStyle(document.body).backgroundColor,
    wide: Array.from(document.querySelectorAll(".table"))
      .filter(function (box) { return box.scrollWidth > box.clientWidth; }).length,
    edges: getComputedStyle(document.querySelector(".table") || document.body).backgroundAttachment,
  });
});
</script>"""


class Recorder(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    def __init__(self, *args, asked: list[str], **kwargs):
        self.asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args):
        """Keep the test's output quiet."""


def open_page(page: Path, profile: Path, *flags: str) -> tuple[dict, str]:
    """Serve a page with the probe; returns what the probe saw and what the console said.

    The report's own policy forbids every foreign host, which would show in the console; requests to
    the server it came from are counted.
    """
    probed = page.with_name("probed.html")
    text = page.read_text(encoding="utf-8").replace("</body>", _PROBE + "</body>")
    # The page's policy allows its own script only.
    probed.write_text(text.replace("script-src '", "script-src 'nonce-probe' '"), encoding="utf-8")
    asked: list[str] = []
    handler = functools.partial(Recorder, asked=asked, directory=str(page.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    done = subprocess.run(
        [
            chromium(),
            "--headless",
            "--no-sandbox",
            *quiet,
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            *flags,
            "--dump-dom",
            f"http://127.0.0.1:{server.server_port}/probed.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    server.shutdown()
    server.server_close()
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(found[1])) | {"requests": asked}, "\n".join(console)
