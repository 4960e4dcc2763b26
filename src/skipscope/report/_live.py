"""The live page: the lecture's network, interactive, computed in the browser, in one offline file.

The modules of ``live/`` are ES modules, so that each can be read and run separately. Here they are joined
into two scripts: one computes (run by two workers), the other draws. Joining drops imports and exports, which
only refer to the other modules; no two modules define the same name.
"""

from __future__ import annotations

import base64
import functools
import re
import zlib

import numpy as np
from markupsafe import escape

from skipscope import reference
from skipscope._version import __version__
from skipscope.report._page import asset, content_policy

# Pages in the same folder link to this file.
LIVE_PAGE = "play.html"
MATHEMATICS = (
    "settings",
    "random",
    "layers",
    "network",
    "spectrum",
    "readings",
    "build",
    "data",
    "training",
    "surface",
    "worker",
)
DRAWING = ("settings", "words", "address", "starts", "python", "draw", "grid", "controls", "page")


def live_page() -> str:
    """Render the live page.

    Example:
        >>> len(live_page()) < 400_000
        True
    """
    mathematics, script = join_modules(MATHEMATICS), asset("surface3d.js") + join_modules(DRAWING)
    content = {
        "css": asset("chart.css") + asset("page.css") + asset("live/page.css"),
        "policy": content_policy([script]) + "; worker-src blob:",
        "mathematics": mathematics,
        "script": script,
        "chain_rule": escape(_module("network")),
        "digits": packed_digits(),
        "version": __version__,
    }
    return re.sub("@@([a-z_]+)@@", lambda found: content[found[1]], asset("live/page.html"))


def join_modules(names: tuple[str, ...]) -> str:
    """Join ES modules into one script; each must come after the modules that it imports."""
    return '"use strict";\n' + "\n".join(_without_imports(_module(name)) for name in names)


def _without_imports(source: str) -> str:
    source = re.sub(r'^import \{[^}]*\} from "[^"]*";\n', "", source, flags=re.MULTILINE)
    return re.sub(r"^export (\{[^}]*\};\n)?", "", source, flags=re.MULTILINE)


@functools.cache
def packed_digits() -> str:
    """All digits, compressed by zlib, in base64: 64 bytes per image, then a byte per label."""
    inputs, target = reference.digits()
    content = (inputs.numpy() * 16).round().astype(np.uint8).tobytes() + target.numpy().astype(
        np.uint8
    ).tobytes()
    return base64.b64encode(zlib.compress(content, 6)).decode()


def _module(name: str) -> str:
    return asset(f"live/{name}.js")
