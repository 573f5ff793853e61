"""Headless Chromium for tests, driven by Chrome's DevTools protocol through a pipe: no driver, no port, no package."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60
"""Seconds for whatever a page is to do; the machine may do much else."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """One page: scripts are evaluated in it, and what it says in its console is kept in ``said``."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, {}
        self.said: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")

    def ask(self, method, **parameters):
        """What the browser answers to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._hear(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _next(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _hear(self, event):
        about = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.said.append(about["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.said.append(" ".join(str(one.get("value")) for one in about["args"]))
            case "Log.entryAdded":
                self.said.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def open(self, address, width=1280, height=900, scale=1, dark=False):
        """Go to an address, in a window of a size; a width below 600 is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression; an AssertionError for what it throws."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, condition):
        """Wait for an expression to be true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not within {PATIENCE} s: {condition}"
            time.sleep(0.02)

    def click(self, selector):
        """A real click, with the mouse, on the middle of the first that a selector finds."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{find}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({find}.getBoundingClientRect())"
        )
        place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **place)

    def write(self, text):
        """Text into what has the focus, as typed."""
        self.ask("Input.insertText", text=text)

    def picture(self, whole=False):
        """A PNG of the window, or of the whole page."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])


@contextmanager
def browser():
    """A page of a browser of its own, which knows nothing of others and ends with the block."""
    found = next((path for name in _PROGRAMS if (path := shutil.which(name))), None)
    assert found, "a test needs Chromium: apt-get install chromium"
    command, theirs = os.pipe()
    mine, answer = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        script = 'exec "$@" 3<&"$COMMANDS" 4>&"$ANSWERS"'  # the browser reads 3 and writes 4
        program = [
            "bash",
            "-c",
            script,
            "bash",
            found,
            *FLAGS,
            f"--user-data-dir={Path(folder) / 'data'}",
            "about:blank",
        ]
        process = subprocess.Popen(
            program,
            env={**os.environ, "COMMANDS": str(command), "ANSWERS": str(answer), "HOME": folder},
            pass_fds=(command, answer),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(command)
        os.close(answer)
        try:
            yield Page(theirs, mine)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(theirs)
            os.close(mine)
