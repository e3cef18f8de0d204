"""Chromium without a screen, driven by chromedriver: a page is opened, keys are pressed, the page is asked.

Both speak the WebDriver protocol of the W3C: JSON over HTTP, so nothing but the two programs is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
KEYS = {"right": "\ue014", "left": "\ue012", "up": "\ue013", "down": "\ue015", "home": "\ue011", "end": "\ue010",
        "tab": "\ue004", "enter": "\ue007"}  # fmt: skip
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"]


class Browser:
    """A window of the browser. Errors of the driver become exceptions of urllib."""

    def __init__(self, driver: str, profile: str) -> None:
        self._driver = driver
        chrome = {"binary": BROWSER, "args": [*OPTIONS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._ask("", {"capabilities": {"alwaysMatch": wanted}})
        self._driver += f"/{answer['sessionId']}"

    def _ask(self, command: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._driver}{command}", data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path, fragment: str = "") -> None:
        self.go(f"{path.as_uri()}{fragment}")
        self.wait("document.querySelector('iframe') || document.getElementById('picture').textContent")

    def go(self, address: str) -> None:
        self._ask("/url", {"url": "about:blank"})  # else a new fragment alone would load nothing
        self._ask("/url", {"url": address})

    def enter(self, selector: str) -> None:
        """Into a frame of the page: `run`, `wait` and `text` are about its document then."""
        element = self.run(f"document.querySelector({json.dumps(selector)})")
        self._ask("/frame", {"id": element})

    def run_async(self, script: str) -> Any:
        """What the script hands to `arguments[0]`."""
        return self._ask("/execute/async", {"script": script, "args": []})

    def run(self, expression: str) -> Any:
        return self._ask("/execute/sync", {"script": f"return {expression}", "args": []})

    def wait(self, expression: str) -> Any:
        """Until the expression is true, for 10 seconds at most."""
        for _ in range(200):
            if found := self.run(expression):
                return found
            self._ask("/execute/async", {"script": "setTimeout(arguments[0], 50)", "args": []})
        raise AssertionError(f"never true: {expression}")

    def text(self, name: str) -> str:
        return str(self.run(f"document.getElementById('{name}').textContent"))

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def devtools(self, command: str, **params: Any) -> Any:
        return self._ask("/goog/cdp/execute", {"cmd": command, "params": params})

    def errors(self) -> list[str]:
        """What the console said since it was asked last."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("/screenshot")))

    def close(self) -> None:
        self._ask("", method="DELETE")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    assert DRIVER is not None
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert driver.stdout is not None
            said = next(row for row in driver.stdout if "on port" in row and "successfully" in row)
            port = said.rsplit("port", 1)[1].strip(" .\n")
            window = Browser(f"http://127.0.0.1:{port}/session", profile)
            try:
                yield window
            finally:
                window.close()
        finally:
            driver.terminate()
            driver.wait(timeout=10)
