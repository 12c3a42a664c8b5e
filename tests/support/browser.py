"""A headless Chromium, driven by the DevTools protocol over a pipe: what tests of pages need, without a package.

`Browser(folder)` is a context manager. `CHROMIUM` is None where there is no browser.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no chromium on this machine: apt-get install -y --no-install-recommends chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
# Chromium reads commands from descriptor 3 and writes answers to 4.
ON_3_AND_4 = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]]
for x, place in zip(pipes, (3, 4)):
    os.dup2(x, place, inheritable=True)
    os.close(x)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 60.0  # seconds for one command


class Browser:
    """One tab. `problems` collects what the console and failed scripts say, `requests` every address asked for."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM
        to_browser, self.writes = os.pipe()
        self.reads, from_browser = os.pipe()
        pipes = [str(to_browser), str(from_browser)]
        command = [sys.executable, "-c", ON_3_AND_4, *pipes, CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
        self.process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self.waiting = b""
        self.number = 0
        self.session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> "Browser":
        tab = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None
        with suppress(AssertionError, OSError):  # it may have ended already
            self.send("Browser.close")
        self.process.wait(timeout=30)
        os.close(self.writes)
        os.close(self.reads)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result. Events that arrive before it are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while (answer := self.receive()).get("id") != self.number:
            self.note(answer)
            assert time.monotonic() < deadline, f"no answer to {method}"
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.waiting:
            part = os.read(self.reads, 1 << 20)
            assert part, "the browser ended"
            self.waiting += part
        message, _, self.waiting = self.waiting.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            about = said["exceptionDetails"]
            self.problems.append(about.get("exception", {}).get("description", about["text"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.problems.append(f"console.{said['type']}: {said['args']}")
        elif event.get("method") == "Log.entryAdded":
            self.problems.append(said["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])

    def open(self, address: str) -> None:
        """Go to an address, and wait until the page says that it is ready."""
        self.send("Page.navigate", url="about:blank")
        self.requests.clear()
        self.send("Page.navigate", url=address)
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate("document.documentElement?.dataset.ready || 0"):
            assert time.monotonic() < deadline, (address, self.problems)
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def theme(self, name: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key: str, times: int = 1) -> None:
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        typed = {"text": "\r"} if key == "Enter" else {}
        for _ in range(times):
            self.send("Input.dispatchKeyEvent", type="keyDown", **about, **typed)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, path: Path, kind: str = "png", **more: Any) -> None:
        shot = self.send("Page.captureScreenshot", format=kind, **more)
        path.write_bytes(base64.b64decode(shot["data"]))
