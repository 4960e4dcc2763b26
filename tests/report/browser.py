"""A real browser for tests: headless Chromium, spoken to over two pipes, with no package in between."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-extensions",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One Chromium; :meth:`open` gives a page. Use as a context manager."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self.folder = tempfile.mkdtemp(prefix="skipscope-browser-")
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        # Chromium reads commands from file 3 and writes answers to file 4
        mover = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", mover, CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"],
            pass_fds=(read_commands, write_answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_answers)
        self._buffer, self._id, self.events = b"", 0, []
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.send("Browser.close")
            self.process.wait(20)
        except Exception:
            self.process.kill()
            self.process.wait(20)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; waits for its answer, keeps the events that come meanwhile."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer.get("result", {})
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 1 << 20)
            assert data, "the browser is gone"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def open(
        self,
        path: Path,
        width: int = 1280,
        height: int = 900,
        *,
        phone: bool = False,
        media: str = "",
        dark: bool = False,
    ) -> Page:
        """Open a file and wait until it is drawn."""
        return Page(self, path, width, height, phone=phone, media=media, dark=dark)


class Page:
    """One open page, what it asked for, and what it complained of."""

    def __init__(
        self, browser: Browser, path: Path, width: int, height: int, *, phone: bool, media: str, dark: bool
    ):
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")
        self.resize(width, height, phone=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        browser.events.clear()
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to this page."""
        return self.browser.send(method, self.session, **parameters)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the page another window."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def run(self, expression: str) -> Any:
        """The value of an expression in the page (the policy of the page does not bind the debugger)."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a condition holds in the page."""
        until = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < until, f"never: {condition}"
            time.sleep(0.1)

    def show_surfaces(self) -> int:
        """Open what is folded, scroll to every surface and wait until it is drawn; returns how many there are."""
        self.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        count = self.run("document.querySelectorAll('.scenes').length")
        for i in range(count):
            self.run(f"document.querySelectorAll('.scenes')[{i}].scrollIntoView({{behavior: 'instant'}})")
            self.wait(f"document.querySelectorAll('.scenes')[{i}].dataset.drawn === 'yes'", 120)
        return count

    def drag(self, x: float, y: float, to_x: float, to_y: float, steps: int = 6) -> None:
        """Press, move, release."""
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
        for i in range(1, steps + 1):
            self.send(
                "Input.dispatchMouseEvent",
                type="mouseMoved",
                x=x + (to_x - x) * i / steps,
                y=y + (to_y - y) * i / steps,
                button="left",
                buttons=1,
            )
            time.sleep(0.05)
        self.send(
            "Input.dispatchMouseEvent", type="mouseReleased", x=to_x, y=to_y, button="left", clickCount=1
        )

    def picture(self, path: Path, *, whole: bool = True) -> Path:
        """A screenshot of the whole page."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))
        return Path(path)

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(
            self.send("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)["data"]
        )

    @property
    def requests(self) -> list[str]:
        """Every address it asked for, apart from itself and what it carries inside."""
        asked = [e["params"]["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith(("data:", "blob:", "about:"))][1:]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings in the console, exceptions, and violations of its policy."""
        logged = [e["params"]["entry"] for e in self._events("Log.entryAdded")]
        called = [
            e["params"]
            for e in self._events("Runtime.consoleAPICalled")
            if e["params"]["type"] in {"error", "warning", "assert"}
        ]
        thrown = [e["params"]["exceptionDetails"]["text"] for e in self._events("Runtime.exceptionThrown")]
        loud = [
            entry["text"]
            for entry in logged
            if entry["level"] in {"error", "warning"} and not _about_the_driver(entry["text"])
        ]
        return loud + [str(c["args"]) for c in called if not _about_the_driver(str(c["args"]))] + thrown

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # takes in what is still in the pipe
        return [
            e for e in self.browser.events if e.get("method") == method and e.get("sessionId") == self.session
        ]


def _about_the_driver(text: str) -> bool:
    """What software drawing says about its own speed, which a machine with a screen does not."""
    return any(
        word in text for word in ("GPU stall", "GL Driver Message", "software WebGL", "willReadFrequently")
    )
