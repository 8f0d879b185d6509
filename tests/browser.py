"""A headless Chromium that tests click and type in, driven over a pipe by its own DevTools protocol.

Nothing is downloaded: Debian's `chromium-headless-shell` or `chromium`, Google's, or the one that the variable
DDE_CACHE_BROWSER names. It resolves no names, so that a page that wants the network shows.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

KEYS = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13,
}  # fmt: skip


def find_browser() -> str | None:
    """The browser of this machine, or None."""
    named = os.environ.get("DDE_CACHE_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser process with one page."""

    def __init__(self, executable: str, folder: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4; ours must not be in their way.
        read, write = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (ours[0], theirs[1]))
        self._write, self._read = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (ours[1], theirs[0]))
        for one in (*ours, *theirs):
            os.close(one)
        log = os.open(folder / "browser.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        flags = (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--force-color-profile=srgb", "about:blank",
        )  # fmt: skip
        self._pid = os.posix_spawn(
            executable,
            [executable, *flags],
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, read, 3),
                (os.POSIX_SPAWN_DUP2, write, 4),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setpgroup=0,
        )
        for one in (read, write, log):
            os.close(one)
        self._number, self._held, self._session = 0, b"", None
        self.events = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and everything it started."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self, end):
        while b"\0" not in self._held:
            if not select.select([self._read], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser did not answer")
            part = os.read(self._read, 2**20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width=1280, height=1000, dark=False) -> None:
        """Open a file and wait until it has loaded."""
        self.events.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, expression):
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def wait(self, condition, seconds=20):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}")
            time.sleep(0.02)

    def text(self, selector):
        """What an element says."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent.trim()")

    def point(self, selector, x=0.5, y=0.5, click=False) -> None:
        """Move the mouse over an element, to a share of its width and height, and maybe click there."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            "return [b.x, b.y, b.width, b.height]; })()"
        )
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self._call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        self.settle()

    def click(self, selector, x=0.5, y=0.5) -> None:
        """Click into an element."""
        self.point(selector, x, y, click=True)

    def press(self, key) -> None:
        """Press and release a key."""
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {"text": key}
        for kind in ("keyDown", "keyUp"):
            extra = code if kind == "keyDown" or key in KEYS else {}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key if key in KEYS else "", **extra)
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def screenshot(self, path: Path, whole=False) -> None:
        """Save what the page shows as PNG."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """What the page logged as an error, threw, or asked of the network."""
        self.run("1")
        found = []
        for event in self.events:
            method, detail = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(detail["exceptionDetails"]))
            elif method == "Log.entryAdded" and detail["entry"]["level"] == "error":
                found.append(detail["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = detail["request"]["url"]
                if not url.startswith(("file:", "data:", "about:")):
                    found.append(f"request of {url}")
        return found
