"""A real browser for pages that are tested; where there is none, their tests are skipped."""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
PHONE = 360

_TELLS_ERRORS = """<script>
window.errors = [];
window.onerror = function (message) { window.errors.push(message); };
</script>"""
# Runs in a page around the one that is tested, which has the width of a phone; what it finds out
# is all that is left in the end.
_AROUND = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", function () {
  const inner = frame.contentDocument, view = frame.contentWindow, found = {};
  PROBE
  found.width = inner.documentElement.scrollWidth;
  found.errors = view.errors;
  document.body.textContent = JSON.stringify(found);
});
"""


def browse(*words: str) -> str:
    """What a headless Chromium prints."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=4000", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def probe(page: str, script: str, folder: Path, data: object = None) -> dict[str, Any]:
    """What ``script`` puts into ``found``, run on a page of a phone's width; ``data`` is given it.

    ``inner`` is the page's document and ``view`` its window.
    """
    inner = page.replace("<head>", f"<head>{_TELLS_ERRORS}")
    path = folder / "around.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><body data-given="{escape(json.dumps(data))}">'
        f'<iframe width="{PHONE}" height="640" srcdoc="{escape(inner)}"></iframe>'
        f"<script>{_AROUND.replace('PROBE', script)}</script>",
        encoding="utf-8",
    )
    dumped = browse("--dump-dom", path.as_uri())
    body = re.search(r"<body[^>]*>(\{.*\})</body>", dumped, re.DOTALL)
    assert body, dumped[-2000:]
    text = body[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    found: dict[str, Any] = json.loads(text)
    return found
