"""Build a self-contained HTML page: a frame with styles and helpers, a template, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

FRAME = Path(__file__).with_name("page.html")


def build_page(template: Path, content: dict[str, Any]) -> str:
    """Return the page whose script reads `content`, a value for JSON with a `title`."""
    # Without "<" nothing in it can end its element.
    data = orjson.dumps(content).decode().replace("<", "\\u003c")
    page = FRAME.read_text(encoding="utf-8")
    page = page.replace("{{page}}", template.read_text(encoding="utf-8"))
    return page.replace("{{data}}", data)
