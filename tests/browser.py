"""A page as text, and as a real headless browser sees it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the page is not rendered")


class Page(HTMLParser):
    """The elements of a page, checked for balance as it is read."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        """All values of one attribute."""
        return [value for _, key, value in self.attributes if key == name]

    @property
    def words(self) -> str:
        """Everything a reader sees, with single spaces."""
        return " ".join("".join(self.text).replace("\u00a0", " ").split())


def asked_for(text: str) -> list[str]:
    """Every address in a page that a browser would fetch."""
    parsed = Page(text)
    links = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background", "ping")
    found = [value for name in links for value in parsed.values(name)]
    found += re.findall(r"url\(\s*['\"]?([^)'\"]*)", text) + re.findall(r"@import[^;]*", text)
    return [address for address in found if not address.startswith(("#", "data:,"))]


def browse(path: Path, profile: Path, width: int = 1280) -> tuple[str, list[str]]:
    """Open a page in headless chromium; returns the DOM it made and what it wrote to the console."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={profile}",
        f"--window-size={width},900",
        "--virtual-time-budget=4000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, .paper") &&
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
parent.postMessage({inner: innerWidth, scroll: document.documentElement.scrollWidth, wide}, "*");
</script></body>"""
FRAME = """<!doctype html><pre id="out"></pre>
<script>
onmessage = e => { document.getElementById("out").textContent += JSON.stringify(e.data) + "\\n"; };
</script>
"""


def measured_widths(page: str, folder: Path) -> list[dict[str, Any]]:
    """What a browser measures of a page in windows of 375 and 1280 pixels: `inner` and `scroll` width, and the
    elements that reach beyond the right edge (`wide`; what scrolls by itself is left out)."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page)
    (folder / "inner.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    frames = [f'<iframe src="inner.html" width="{width}" height="800"></iframe>' for width in (375, 1280)]
    (folder / "outer.html").write_text(FRAME + "".join(frames), encoding="utf-8")
    dom, complaints = browse(folder / "outer.html", folder / "profile")
    assert complaints == []
    out = re.search(r'<pre id="out">(.*?)</pre>', dom, flags=re.S)
    assert out is not None
    measured = [json.loads(line) for line in out[1].split("\n") if line]
    assert sorted(each["inner"] for each in measured) == [375, 1280]
    return measured
