"""A page in headless Chromium, spoken to by the DevTools protocol: what it says, how wide it is, what it looks like."""

import asyncio
import base64
import itertools
import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
)
SECONDS = 120


class Page:
    """One tab. `complaints` are console errors, exceptions, refusals; `requests` the addresses that it asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; events before it are taken note of."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=SECONDS)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert", "warning"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(str(parameters["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    async def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def resize(self, width: int, height: int = 900) -> None:
        """The window has that many CSS pixels from now on."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)

    async def visit(self, address: str) -> None:
        """Loads an address; what its scripts do after that is not waited for."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=address)
        await self.wait_for("location.href != 'about:blank' && document.readyState == 'complete'")

    async def open(self, file: Path, width: int, height: int = 900) -> None:
        """Loads a file into a window of that many CSS pixels and draws all of it."""
        await self.resize(width, height)
        await self.visit(file.as_uri())
        await self.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        await asyncio.sleep(1)

    async def wait_for(self, condition: str, seconds: float = SECONDS) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := await self.evaluate(condition)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s: {condition}\n{await self.text()}")
            await asyncio.sleep(0.05)
        return value

    async def text(self) -> str:
        """What a person reads in the page."""
        return await self.evaluate("document.body.innerText")

    async def wait_for_text(self, *texts: str) -> None:
        """Waits until a person can read all of them; spaces of any kind and number are one."""
        # while a page is loaded it has no body yet
        read = r"(document.body?.innerText ?? '').replace(/\s+/g, ' ')"
        await self.wait_for(f"{json.dumps(texts)}.every((one) => {read}.includes(one))")

    async def click(self, element: str) -> None:
        """Presses the mouse on the element that a JavaScript expression answers, once it is there and lies still."""
        place = f"""(async () => {{
            const one = {element};
            if (!one || one.disabled) return null;
            one.scrollIntoView({{ block: "nearest", behavior: "instant" }});
            const box = one.getBoundingClientRect();
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            const after = one.getBoundingClientRect();
            const x = box.left + box.width / 2, y = box.top + box.height / 2;
            const hit = document.elementFromPoint(x, y);
            const moved = box.left != after.left || box.top != after.top;
            return moved || !hit || !(one.contains(hit) || hit.contains(one)) ? null : [x, y];
        }})()"""
        x, y = await self.wait_for(place)
        await self.point(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def click_text(
        self, text: str, selector: str = "a, button, [role=tab], [role=button], [role=menuitem]"
    ) -> None:
        """Presses the mouse on the first element that reads exactly so."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find((one) => one.innerText.trim() == "
        await self.click(f"{found}{json.dumps(text)})")

    async def type(self, text: str) -> None:
        """Characters arrive where the focus is."""
        await self.call("Input.insertText", text=text)

    async def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page below the window's edge too, or only the window."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def press(self, key: str) -> None:
        """A key goes down and up where the focus is."""
        more = {"windowsVirtualKeyCode": 13, "text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    async def point(self, x: float, y: float) -> None:
        """The mouse moves there, in CSS pixels of the window."""
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@asynccontextmanager
async def browser_page(profile: Path) -> AsyncIterator[Page]:
    """A tab of a browser of its own, whose new profile is in the empty folder `profile`."""
    command = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(SECONDS):
            while not (port_file.is_file() and port_file.read_text().strip()):
                await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = await answer.json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        process.terminate()
        process.wait()
