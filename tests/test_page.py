"""The page in a real browser, against torch and arithmetic of 60 digits."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import mpmath
import pytest
import torch
from safetensors.torch import save_file

import anyflow
from toy import flow2d, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


class Browser:
    """Chromium with one page, by the DevTools protocol: JSON messages that end in a zero byte, over pipes."""

    def __init__(self, profile):
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read, write)]
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        hand = lambda: [os.dup2(end, number) for number, end in zip((3, 4), ours)]  # it reads 3, writes 4
        self.process = subprocess.Popen(arguments, preexec_fn=hand, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        for end in (read, write, *ours):
            os.close(end)
        self.count, self.rest, self.events, self.session = itertools.count(1), b"", [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Runtime", "Network", "Log", "Page"):
            self.send(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)

    def send(self, method, **params):
        number = next(self.count)
        text = json.dumps({"id": number, "method": method, "params": params} | self.session)
        os.write(self.write, text.encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def receive(self, seconds=120):
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], seconds)[0], "the browser is silent"
            more = os.read(self.read, 1 << 20)
            assert more, "the browser is gone"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def js(self, code):
        """The value of an expression in the page; of a promise, what it comes to."""
        answer = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, fragment="", width=1200, height=900, scheme="light"):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"file://{path}{fragment and '#'}{fragment}")
        self.until("document.readyState === 'complete' && window.explore !== undefined")
        self.js("explore.ready")

    def until(self, code, seconds=120):
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f"in vain: {code}"
            time.sleep(0.05)

    def mouse(self, kind, x, y):
        button = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseReleased" else {"button": "left"}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def drag(self, start, *stops):
        self.mouse("mousePressed", *start)
        for stop in stops:
            self.mouse("mouseMoved", *stop)
        self.mouse("mouseReleased", *(stops or [start])[-1])

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def centre(self, selector):
        """Where an element is on the screen, after it is scrolled there."""
        return self.js(f"""(() => {{ const e = document.querySelector({selector!r});
            e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.left + b.width / 2, b.top + b.height / 2, b.width, b.height]; }})()""")

    def screenshot(self, path):
        height = self.js("document.documentElement.scrollHeight")
        clip = dict(x=0, y=0, width=self.js("innerWidth"), height=height, scale=1)
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        """What went to the console, and every request but for the file itself and data in it."""
        found = [event for event in self.events
                 if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
        urls = [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]
        return found, [url for url in urls if not url.startswith(("file:///", "data:", "about:"))]
