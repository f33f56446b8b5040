"""The page in a real browser, against torch."""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

import anyflow
from toy import flow2d, page, plots

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]


class Browser:
    """Chromium with one page, by the DevTools protocol: JSON messages that end in a zero byte, over pipes."""

    def __init__(self, profile):
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read, write)]
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        hand = lambda: [os.dup2(end, number) for number, end in zip((3, 4), ours)]  # it reads 3, writes 4
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(arguments, preexec_fn=hand, pass_fds=(3, 4), **quiet)
        for end in (read, write, *ours):
            os.close(end)
        self.count, self.rest, self.events, self.session = itertools.count(1), b"", [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Network", "Log", "Page", "Performance"):
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
        self.scheme(scheme)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"file://{path}{fragment and '#'}{fragment}")
        self.until("document.readyState === 'complete' && window.explore !== undefined")
        self.js("explore.ready")

    def scheme(self, value):
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def until(self, code, seconds=120):
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f"in vain: {code}"
            time.sleep(0.05)

    def mouse(self, kind, x, y):
        how = dict(button="left", buttons=int(kind != "mouseReleased"), clickCount=1)
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **how)

    def drag(self, start, *stops):
        self.mouse("mousePressed", *start)
        for stop in stops:
            self.mouse("mouseMoved", *stop)
        self.mouse("mouseReleased", *(stops or [start])[-1])

    def click(self, selector):
        self.drag(self.centre(selector)[:2])

    def key(self, name):
        codes = dict(ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, Delete=46, n=78)
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=codes[name])

    def seconds(self, code):
        """CPU seconds that the page's one thread takes for an expression, whatever else the machine does."""
        used = lambda: next(m["value"] for m in self.send("Performance.getMetrics")["metrics"]
                            if m["name"] == "ThreadTime")
        start = used()
        self.js(code)
        return used() - start

    def centre(self, selector):
        """Where an element is on the screen, after it is scrolled there."""
        return self.js(f"""(() => {{ const e = document.querySelector({selector!r});
            e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.left + b.width / 2, b.top + b.height / 2, b.width, b.height]; }})()""")

    def complaints(self):
        """What went to the console, and every request but for the file itself and data in it."""
        spoken = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        found = [event for event in self.events if event["method"] in spoken]
        urls = [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]
        return found, [url for url in urls if not url.startswith(("file:///", "data:", "about:"))]


@pytest.fixture(scope="module")
def networks():
    return {name: page.trained(name, 5, seed) for seed, name in enumerate(page.DENSITIES)}


@pytest.fixture(scope="module")
def file(networks, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explore.html"
    path.write_text(page.page(networks))
    return path


@pytest.fixture(scope="module")
def browser(file, tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.open(file)
    yield browser
    try:
        assert browser.complaints() == ([], [])
    finally:
        browser.close()


def mlp(state):
    net = flow2d.MLP()
    net.load_state_dict(state)
    return net.requires_grad_(False)


def points(text):
    return torch.tensor(text).reshape(-1, 2)


def flat(z):
    return json.dumps(z.flatten().tolist())


def test_networks_are_those_of_torch(browser, networks):
    for density, states in networks.items():
        for method, state in states.items():
            net, z = mlp(state), 1.5 * torch.randn(45, 2)  # no whole number of blocks
            for t, r in ((1.0, 0.0), (0.7, 0.7), (0.61, 0.13), (0.02, 0.0)):
                code = f"Array.from(explore.network(explore.NETS['{density}{method}'], {flat(z)}, {t}, {r}))"
                u = net(z, torch.full((45,), t), torch.full((45,), r))
                assert (points(browser.js(code)) - u).abs().max() < 1e-4, (density, method, t, r)


@pytest.mark.parametrize("name", page.DENSITIES)
def test_velocity_is_exact_in_the_tails_and_at_both_ends(browser, name):
    """Against torch's, which tests/test_flow2d.py holds against arithmetic of 60 digits."""
    density = flow2d.DENSITIES[name]()
    for t in (0.0, 1e-5, 1e-3, 0.03, 0.3, 0.75, 0.97, 0.9999, 1.0):
        some = torch.cat([scale * torch.randn(20, 2) for scale in (0.7, 1.5, 6)]).double()
        code = (f"{flat(some)}.map((x, i, all) => {{ const out = [0, 0]; if (i % 2) explore.velocity("
                f"explore.DATA.densities.{name}, all[i - 1], x, {t}, out); return out; }})"
                ".filter((_, i) => i % 2)")
        found, wanted = torch.tensor(browser.js(code), dtype=torch.float64), density.velocity(some, t)
        assert ((found - wanted).abs() / wanted.abs().clamp(min=1)).max() < 1e-6, t


@pytest.mark.parametrize("name", page.DENSITIES)
def test_exact_path_is_that_of_torch(browser, name):
    z = torch.randn(6, 2).double()
    wanted = flow2d.DENSITIES[name]().flow(z, anyflow.time_grid(64))
    for i, (x, y) in enumerate(z.tolist()):
        road = points(browser.js(f"Array.from(explore.flow(explore.DATA.densities.{name}, {x}, {y}))"))
        assert (road[::2] - wanted[:, i]).abs().max() < 1e-4


@pytest.mark.parametrize("grid", [[1, 0], [1, 0.75, 0.5, 0.25, 0], [1, 0.93, 0.4, 0.37, 0.05, 0], "even"])
def test_samplers_are_those_of_anyflow(browser, networks, grid, monkeypatch):
    grid = anyflow.time_grid(64).tolist() if grid == "even" else grid
    z, fresh = torch.randn(37, 2), torch.randn(64, 37, 2)
    for density, states in networks.items():
        for method, gamma in (("teacher", 0), ("consistency", 1), ("anyflow-forward", 0), ("anyflow", 0.4)):
            drawn = iter(fresh)
            monkeypatch.setattr(torch, "randn_like", lambda _: next(drawn))
            net = mlp(states[method])
            asked = (lambda z, t, r: net(z, t, t)) if method == "teacher" else net
            wanted = torch.stack(anyflow._visit(asked, z, grid, gamma))
            eps = json.dumps([row.flatten().tolist() for row in fresh[: len(grid) - 1]])
            code = (f"explore.sample('{density}', '{method}', {flat(z)}, {grid}, 0.4, k => {eps}[k])"
                    ".map(states => Array.from(states))")
            if method == "anyflow-forward":
                code = code.replace("0.4, k", "0, k")
            found = torch.tensor(browser.js(code)).reshape(wanted.shape)
            assert (found - wanted).abs().max() < 1e-3, (density, method)


def test_random_numbers_are_normal_and_differ(browser):
    z, other = (torch.tensor(browser.js(f"Array.from(explore.normals({seed}, 40000))")) for seed in (1, 2))
    for moment, wanted in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert (z**moment).mean().sub(wanted).abs() < 0.1
    assert (z * other).mean().abs() < 0.03 and (z[::2] * z[1::2]).mean().abs() < 0.03


def test_figures_are_those_of_flow2d(browser, file, networks, monkeypatch):
    """Measured anew in torch, from other noise: 5,000 points differ by the sampling error."""
    monkeypatch.setattr(flow2d, "NFE", [2, 64])  # the last is what drift is held against
    browser.open(file, "d=mixture&n=2")
    browser.until("explore.measured() !== null")
    found, density = browser.js("explore.measured()"), flow2d.mixture()
    ruler = flow2d.Ruler(density, 5000, fresh=1)
    for method in ("teacher", "consistency", "anyflow"):
        scores, *_ = ruler.measure(method, mlp(networks["mixture"][method]))
        wanted = [scores[key][0] for key in ("swd", "path_error", "budget_drift")]
        assert found[method] == pytest.approx(wanted, rel=0.15, abs=0.03), method


def state(browser, key):
    return browser.js(f"explore.state().{key}")


def test_every_control_does_what_it_says(browser, file):
    browser.open(file)
    x, y, width, height = browser.centre("#plane")
    picture = lambda: browser.js("document.querySelector('#plane').toDataURL()")
    frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    settle = lambda: browser.js(frame)
    scale = min(height / 4.9, width / 5.4)
    settle()
    before = picture()
    browser.drag((x - 2.2 * scale, y - 1.5 * scale), (x, y), (x + scale, y - 0.5 * scale))
    assert state(browser, "p")[0] == pytest.approx([1, 0.5], abs=0.02)
    settle()
    assert picture() != before
    browser.key("ArrowLeft")
    browser.key("ArrowUp")
    assert state(browser, "p")[0] == pytest.approx([0.95, 0.55], abs=0.02)
    browser.click("#scatter")
    assert len(state(browser, "p")) == 24
    browser.js("document.querySelector('#plane').focus()")
    browser.key("n")
    second = state(browser, "p")[1]
    browser.key("ArrowRight")
    assert state(browser, "p")[1] == pytest.approx([second[0] + 0.05, second[1]])
    browser.click("#single")
    assert len(state(browser, "p")) == 1
    for name in page.DENSITIES:
        browser.click(f"input[value={name}]")
        assert state(browser, "d") == name
    for name in page.STARTS:
        browser.click(f"input[value={name}]")
    assert state(browser, "m") == []
    browser.click("input[value=anyflow]")
    assert state(browser, "m") == ["anyflow"]
    for control, key, value in (("calls", "n", 5), ("gamma", "g", 0.05), ("moment", "t", 0.005)):
        browser.js(f"document.querySelector('#{control}').focus()")
        browser.key("ArrowLeft" if control == "moment" else "ArrowRight")
        assert state(browser, key) == pytest.approx(value), control
    browser.js("location.hash = '#t=1'")
    browser.until("explore.state().t === 1")
    browser.click("#play")
    browser.until("0 < explore.state().t && explore.state().t < 0.9")
    browser.click("#play")
    held = state(browser, "t")
    time.sleep(0.3)
    assert state(browser, "t") == pytest.approx(held, abs=1e-3) and held > 0
    browser.click("#reroll")
    assert state(browser, "s") == 2
    browser.click("#what summary")
    assert browser.js("document.querySelector('#what').open")
    browser.click("#reset")
    assert browser.js("explore.viewText()") == ""


def test_times_can_be_dragged_added_and_taken_away(browser, file):
    browser.open(file)
    x, y, *_ = browser.centre(".knob:nth-child(2)")
    left, _, width, _ = browser.js("(b => [b.left, b.top, b.width, b.height])"
                                   "(document.querySelector('#track').getBoundingClientRect())")
    browser.drag((x, y), (left + 0.6 * width, y))
    assert state(browser, "k") == pytest.approx([0.75, 0.4, 0.25], abs=0.01)
    browser.drag((left + 0.6 * width, y), (left + 0.99 * width, y))  # as far as its neighbour
    assert 0.25 < state(browser, "k")[1] < 0.26
    browser.drag((left + 0.1 * width, y))
    assert state(browser, "n") == 5 and state(browser, "k")[0] == pytest.approx(0.9, abs=0.01)
    browser.key("ArrowRight")
    assert state(browser, "k")[0] == pytest.approx(0.89, abs=0.01)
    browser.key("ArrowDown")
    browser.key("Delete")
    assert state(browser, "n") == 4 and state(browser, "k")[0] == pytest.approx(0.89, abs=0.01)
    assert browser.js("explore.grid()") == [1, *state(browser, "k"), 0]
    browser.click("#even")
    assert browser.js("explore.grid()") == [1, 0.75, 0.5, 0.25, 0]


def test_address_holds_the_view(browser, file):
    fragment = "d=spiral&n=3&g=0.5&t=0.25&s=7&m=teacher,anyflow&p=0.5,-1;1,1&k=0.8,0.1"
    browser.open(file, fragment)
    view = browser.js("explore.state()")
    assert view == dict(d="spiral", n=3, g=0.5, t=0.25, s=7, m=["teacher", "anyflow"], p=[[0.5, -1], [1, 1]],
                        k=[0.8, 0.1])
    browser.until(f"location.hash === '#{fragment}'")
    browser.js("location.hash = '#n=9'")
    browser.until("explore.state().n === 9 && explore.state().d === 'checkerboard'")


@pytest.mark.parametrize("fragment", ["nonsense", "%%%&&==", "n=0&g=2&t=-1&s=x&d=moons", "n=65&p=1&k=2,1",
                                      "n=4.5&g=NaN&t=Infinity&p=a,b", "p=9,9&k=0.2,0.8", "k=0.5,0.5&p=;"])
def test_nonsense_in_the_address_is_the_default_view(browser, file, fragment):
    browser.open(file, fragment)
    assert browser.js("explore.viewText()") == ""


@pytest.mark.parametrize("width", [1200, 360])
def test_it_fits_the_screen_and_every_control_has_a_name(browser, file, width):
    browser.open(file, "n=6", width, scheme="light")
    browser.until("explore.measured() !== null")
    assert browser.js("document.documentElement.scrollWidth") <= width
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "slider", "radio", "checkbox", "application", "image", "img", "group"}
    nodes = [n for n in nodes if n.get("role", {}).get("value") in roles and not n["ignored"]]
    assert len(nodes) >= 3 + 4 + 3 + 6 + 5 + 1 + 5
    assert not [n for n in nodes if not n.get("name", {}).get("value")]
    for name in page.STARTS:
        colour = browser.js(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        assert colour.strip().lower() == plots.STYLE[name]["color"].lower()
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        paper = browser.js("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 384) == (scheme == "dark")


@pytest.mark.slow
def test_it_is_fast_enough(browser, file):
    """5,000 samples of 64 calls in 2 s, a frame of a drag in a sixtieth of a second, of one core; in as much
    more where it takes above a fifth of a second for 2e8 multiply-adds of a plain loop."""
    loop = """(() => {
        const w = new Float32Array(4096).fill(0.5), x = new Float32Array(64).fill(1);
        let sum = 0;
        for (let n = 0; n < 50000; n++)
            for (let i = 0; i < 64; i++) for (let j = 0; j < 64; j++) sum += w[64 * i + j] * x[j];
        return sum;
    })()"""
    least = lambda code: min(browser.seconds(code) for _ in range(4))  # the first is compiled on the way
    browser.open(file, "n=64&p=-2,0")
    browser.until("explore.measured() !== null")
    cloud = "explore.sample('checkerboard', 'anyflow', explore.normals(1, 10000), explore.evenGrid(64), 0), 0"
    unit = max(1, least(loop) / 0.2)
    assert least(cloud) < 2 * unit
    x, y, *_ = browser.centre("#plane")
    frames = lambda start: f"""(async () => {{
        const send = (kind, x) => document.querySelector('#plane').dispatchEvent(new PointerEvent(kind,
            {{clientX: x, clientY: {y}, pointerId: 1, bubbles: true}}));
        HTMLElement.prototype.setPointerCapture = () => 0;
        send('pointerdown', {start});
        for (let i = 0; i < 60; i++) {{
            send('pointermove', {start} + i); await new Promise(requestAnimationFrame);
        }}
        send('pointerup', {start} + 60);
    }})()"""
    assert least(frames(x - 100)) / 60 < 1 / 60 * unit


def kept(folder, networks, density="checkerboard", leave=None):
    (folder / "networks").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"density": density}))
    for name, state in networks.items():
        if name != leave:
            save_file(state, folder / "networks" / f"{name}.safetensors")
    return folder


def test_results_become_a_page(tmp_path, networks):
    folders = [kept(tmp_path / name, networks[name], name) for name in ("spiral", "mixture")]
    page.main(["--out", str(tmp_path / "new" / "page.html"), "--results", *map(str, folders)])
    text = (tmp_path / "new" / "page.html").read_text()
    assert text == page.page({name: networks[name] for name in ("spiral", "mixture")})
    assert "http" not in text.replace(data_of(text)["densities"]["spiral"]["weights"], "")


def data_of(text):
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_wrong_results_are_one_sentence(tmp_path, networks):
    nets = networks["spiral"]
    narrow = {name: flow2d.MLP(width=32).state_dict() for name in nets}
    good = kept(tmp_path / "good", nets)
    for folders, words in (([tmp_path / "none"], "no file"),
                           ([kept(tmp_path / "a", nets, leave="anyflow")], "no file .*anyflow.safetensors"),
                           ([kept(tmp_path / "b", nets, "moons")], "density 'moons', expected one of"),
                           ([kept(tmp_path / "c", narrow)], "shape"),
                           ([good, good], "two folders")):
        with pytest.raises(SystemExit, match=words):
            page.main(["--out", str(tmp_path / "page.html"), "--results", *map(str, folders)])
    assert not (tmp_path / "page.html").exists()
    for out, words in (("/dev/null/a", "File exists: .*/dev/null"), ("/proc/a", "No such|Permission"),
                       (str(tmp_path), "is a folder")):
        with pytest.raises(SystemExit, match=words):
            page.main(["--out", out])  # before the training


def test_template_is_short():
    assert len(page.TEMPLATE.read_text().splitlines()) <= 600


KEPT = page.TEMPLATE.with_name("explore.html")


@pytest.mark.skipif(not KEPT.exists(), reason="no page is kept")
def test_kept_page_is_of_the_template_and_at_most_a_megabyte():
    text = KEPT.read_text()
    before, after = page.TEMPLATE.read_text().split("{{data}}")
    assert text.startswith(before) and text.endswith(after) and KEPT.stat().st_size <= 1_000_000
    assert data_of(text)["densities"].keys() == {*page.DENSITIES}
