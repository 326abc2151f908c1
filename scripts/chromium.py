"""A headless Chromium that clicks, types and takes pictures, by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--remote-debugging-pipe")
# The protocol's pipes are file descriptors 3 and 4.
WITH_PIPES = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
# The messages of the protocol that the page or its errors cause.
CONSOLE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowLeft": (37, ""), "ArrowRight": (39, ""),
        "Tab": (9, "")}


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """A page in a browser. Use as a context manager.

    `console` has the messages of the page and its uncaught errors, as JSON.
    """

    def __init__(self, width: int = 1400, height: int = 900) -> None:
        program = find_chromium()
        if program is None:
            raise ValueError(f"No Chromium was found, of {', '.join(PROGRAMS)}: install one.")
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            ["sh", "-c", WITH_PIPES, "sh", program, *FLAGS, f"--user-data-dir={self.profile.name}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # A tab of its own, and the session that commands for it are sent to.
        self.number, self.session = 0, ""
        self.console: list[str] = []
        self.received = b""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *failure: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()

    def send(self, method: str, **params: Any) -> Any:
        """The result of a command of the protocol."""
        # Send it. Messages end with a zero byte.
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        self.process.stdin.write(json.dumps(command).encode() + b"\0")
        self.process.stdin.flush()
        # Events of the page arrive before the answer.
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                break
            if message.get("method") in CONSOLE:
                self.console.append(json.dumps(message["params"]))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.received:
            part = os.read(self.process.stdout.fileno(), 2**16)
            if not part:
                raise RuntimeError("Chromium has ended.")
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Open a page, and wait until it is loaded."""
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True,
                          returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['result'].get('description')}")
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is not true after {seconds} seconds. Console: "
                                   f"{self.console}")
            time.sleep(0.02)

    def click(self, element: str) -> None:
        """Click in the middle of an element: an expression of JavaScript, or a CSS selector.

        Waits until the element is displayed. Raises TimeoutError.
        """
        if not element.startswith("document."):
            element = f"document.querySelector({json.dumps(element)})"
        self.wait(f"{element}?.getClientRects().length")
        x, y = self.value(f"""(() => {{
            const element = {element};
            element.scrollIntoView({{block: "center"}});
            const box = element.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into the element that has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      text=text if kind == "keyDown" else "")

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
