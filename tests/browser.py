"""A real browser for tests of pages: Chromium, driven by its own protocol over a pipe. It reaches no network.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
# Widths and heights in CSS pixels.
DESK, PHONE = (1280, 900), (390, 844)

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip


@dataclass
class Tab:
    """A page in the browser.

    Attributes
    ----------
    errors
        What the console says of errors: exceptions, and what the content security policy blocked.
    requests
        URLs that the page asked for, itself included.
    """

    _sent: int
    _received: Any
    _session: str = ""
    _number: int = 0
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def attach(self) -> None:
        """Opens a tab, and listens to what it says."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Calls a method of the protocol, and returns its result."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._sent, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._number:
            pass
        assert "error" not in found, (method, found["error"])
        result: dict[str, Any] = found["result"]
        return result

    def view(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """Sets the size of the window and the colours that the reader wants."""
        width, height = size
        phone = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])

    def scripts(self, allowed: bool) -> None:
        """Switches JavaScript off, or on again."""
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def open(self, path: Path, fragment: str = "") -> None:
        """Opens a file, and waits until all of it is loaded."""
        self.call("Page.navigate", url="about:blank")
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=f"{path.as_uri()}{fragment}")
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression: str) -> Any:
        """Returns the value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def type(self, text: str) -> None:
        """Types into the field that has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Writes what is seen, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._received.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        self._heard(message.get("method", ""), message.get("params", {}))
        return message

    def _heard(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(said["exceptionDetails"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(str(said["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """Starts Chromium with a profile of its own, and yields a tab of it."""
    assert CHROMIUM is not None
    (their_input, ours), (theirs, their_output) = os.pipe(), os.pipe()
    command = shlex.join([CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"])
    shell = f"exec {command} 3<&{their_input} 4>&{their_output}"
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell], pass_fds=(their_input, their_output), stderr=subprocess.DEVNULL
    )
    os.close(their_input)
    os.close(their_output)
    try:
        with open(theirs, "rb") as received:
            tab = Tab(ours, received)
            tab.attach()
            yield tab
    finally:
        process.kill()
        process.wait()
        os.close(ours)
