"""A real browser without a window, driven over a pipe by the DevTools protocol; the tests using it skip without one."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mgg_edge.compat import Self

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 60.0


class Browser:
    """One page of a headless browser."""

    def __init__(self, profile: Path, width: int = 1240, height: int = 900) -> None:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is on PATH (apt install chromium)")
        self._errors: list[str] = []
        self._number, self._received = 0, bytearray()
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        options = f"--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size={width},{height}"
        script = f'exec "$0" {options} --user-data-dir="$1" --remote-debugging-pipe 3<&{their_in} 4>&{their_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, str(profile)],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(their_in)
        os.close(their_out)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.page("Runtime.enable")
        self.page("Log.enable")

    @property
    def errors(self) -> list[str]:
        """What the page's console said of errors so far."""
        self.evaluate("0")
        return self._errors

    def open(self, address: str) -> None:
        """Go to an address, and wait until its document is there."""
        self.page("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """Value of an expression in the page."""
        answer = self.page("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = 20.0) -> Any:
        """Wait until an expression is true."""
        end_s = time.monotonic() + timeout_s
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end_s, f"the page never came to: {script}"
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path) -> Path:
        """What the page looks like, as PNG."""
        path.write_bytes(base64.b64decode(self.page("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
        return path

    def page(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the page."""
        return self._call(method, self._session, **parameters)

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait(10)
        os.close(self._in)
        os.close(self._out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        end_s = time.monotonic() + TIMEOUT_S
        while (answer := self._next(end_s)).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self._errors.append(str(parameters["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self._errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url')}")

    def _next(self, end_s: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            readable, _, _ = select.select([self._in], [], [], max(0.0, end_s - time.monotonic()))
            data = os.read(self._in, 1 << 20) if readable else b""
            if not data:
                raise AssertionError("the browser does not answer")
            self._received += data
        message, _, rest = bytes(self._received).partition(b"\0")
        self._received = bytearray(rest)
        return json.loads(message)
