"""The page for people in a real browser, over the real routes: what it shows, what typing and clicking do, and that hostile text stays text."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from websockets.sync.client import connect

from genrecall.serving.api import VersionNotLoadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import ChallengerInfo, ItemExplanation, ModelInfo, Prefix, RecalledItem, RecalledSid, RecallResponse, Timings, Versions

EVIL = "<img src=x onerror=document.title='owned'>&<script>1</script>"
VERSIONS = Versions(model="genrecall-shop/3", bundle="0123456789abcdef")
CHALLENGER = Versions(model="genrecall-shop/4", bundle="fedcba9876543210", role="challenger")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found on PATH; install one to run the page in it")


class Backend:
    """Six SIDs under three first tokens; the first title, brand, category, label and prefix hold markup. The query "hurry" gets a degraded answer."""

    def __init__(self):
        self.requests = []
        self.challenger = None

    async def recall(self, request):
        self.requests.append(request)
        if request.version == "challenger" and request.query == "gone":
            raise VersionNotLoadedError("no challenger is loaded")
        sids = []
        for row in range(6):
            sid = f"<{row // 2},{row},7>"
            label = EVIL if row == 0 else f"Brackets {row}: angle, galvanized"
            steps = [(f"<{row // 2}>", EVIL if row < 2 else "Hardware", 30), (f"<{row // 2},{row}>", label, 20), (sid, label, 9 + row)]
            path = [Prefix(prefix=prefix, label=label, size=size) for prefix, label, size in steps]
            sids.append(RecalledSid(sid=sid, score=-0.8 - row / 2, size=9 + row, label=label, path=path))
        titles = [EVIL, "2-in x 4-in galvanized angle bracket", "Adjustable shelf bracket, 10 pack", f"answer to {request.query}"]
        items = [
            RecalledItem(
                item_id=f"i{row}",
                title=title,
                brand=EVIL if row == 0 else "Acme",
                category_path=["Hardware", EVIL if row == 0 else "Brackets"],
                rank=row,
                sid=sids[row // 2].sid,
                score=-1.4,
                explanation=ItemExplanation(sid_score=-0.8, share=-0.6, path=[step.prefix for step in sids[row // 2].path]),
            )
            for row, title in enumerate(titles * 3)
            if row < 11
        ]
        timings = Timings(generate_ms=4.2, expand_ms=0.1, batch_size=1, cached=request.query == "again")
        why = ["load", "deadline"] if request.query == "hurry" else []
        versions = CHALLENGER if request.version == "challenger" else VERSIONS
        read_as = f"hurry {EVIL}" if why else None
        return RecallResponse(items=items, sids=sids, beam_size=20, versions=versions, timings=timings, degraded=bool(why), degraded_by=why, read_as=read_as)

    def ready(self):
        return True

    def info(self):
        return ModelInfo(
            versions=VERSIONS,
            address="models:/genrecall-shop@champion",
            items=54667,
            sids=9120,
            levels=[256, 128, 140],
            stage="stage4",
            refused=f"shop/4: {EVIL}",
            genders=["f", "m"],
            age_bands=["18-24", EVIL],
            challenger=self.challenger,
        )


@pytest.fixture(scope="module")
def backend():
    return Backend()


@pytest.fixture(scope="module")
def url(backend):
    server = uvicorn.Server(uvicorn.Config(create_app(lambda: backend, ApiKeys()), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def options_of(profile):
    return ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]


def browse(url, profile, *arguments):
    done = subprocess.run(
        [BROWSER, *options_of(profile), "--virtual-time-budget=4000", *arguments, url], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


class Tab:
    """A page open in a browser, driven through its debugging port."""

    def __init__(self, socket):
        self._socket = socket
        self._number = 0

    def __call__(self, expression):
        """What a JavaScript expression gives there."""
        self._number += 1
        call = {"id": self._number, "method": "Runtime.evaluate", "params": {"expression": expression, "returnByValue": True, "userGesture": True}}
        self._socket.send(json.dumps(call))
        while (answer := json.loads(self._socket.recv(timeout=30))).get("id") != self._number:
            pass
        assert "exceptionDetails" not in answer["result"], answer["result"]["exceptionDetails"]
        return answer["result"]["result"].get("value")

    def until(self, expression):
        """Waits for an expression to be true."""
        deadline = time.monotonic() + 30
        while not self(expression):
            assert time.monotonic() < deadline, f"never true: {expression}; the page: {self('document.body.innerText')}"
            time.sleep(0.05)


@pytest.fixture
def tab(url, tmp_path):
    profile = tmp_path / "profile"
    browser = subprocess.Popen(
        [BROWSER, *options_of(profile), "--window-size=1400,900", "--remote-debugging-port=0", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < deadline, "the browser does not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        while not (pages := [one for one in httpx.get(f"http://127.0.0.1:{port}/json").json() if one["type"] == "page" and one["url"].startswith(url)]):
            assert time.monotonic() < deadline, "the browser does not open the page"
            time.sleep(0.05)
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            opened = Tab(socket)
            opened.until("document.readyState === 'complete' && Boolean(document.getElementById('model')?.textContent)")
            yield opened
    finally:
        browser.terminate()
        browser.wait(timeout=30)


def test_a_search_is_shown_as_a_tree_with_items_and_latency(url, tmp_path):
    page = browse(f"{url}/?q=angle+bracket", tmp_path / "profile", "--dump-dom")
    assert "11 items from 6 SIDs · beam 20 · 4.2 ms generating · 0.1 ms expanding" in page
    assert "genrecall-shop/3 · stage4 · 54,667 items in 9,120 SIDs" in page
    assert "answer to angle bracket" in page
    # Three first tokens, two second ones under each; a probability of exp(-0.8) + exp(-1.3) at the first.
    assert len(re.findall("<details", page)) == 9
    assert len(re.findall('class="leaf"', page)) == 6
    assert f"{100 * (math.exp(-0.8) + math.exp(-1.3)):.1f} % · 30 items" in page
    assert "Brackets 1: angle, galvanized" in page
    assert f"{100 * math.exp(-0.8):.1f} % × {100 * math.exp(-0.6):.1f} %" in page
    assert len(re.findall(r'<tr[^>]*data-sid="&lt;0,0,7&gt;"|<tr[^>]*data-sid="<0,0,7>"', page)) == 2
    assert re.search('class="degraded" hidden', page)
    assert re.search('class="dim read-as" hidden', page)


def test_hostile_titles_labels_and_queries_stay_text(url, backend, tmp_path):
    page = browse(f"{url}/?q={quote(EVIL)}&gender={quote(EVIL)}", tmp_path / "profile", "--dump-dom")
    assert backend.requests[-1].query == EVIL
    assert backend.requests[-1].shopper.gender == EVIL
    assert "<title>genrecall</title>" in page
    # In title, brand, category, label, the tree, the answer's own title, the refusal and the choice of shoppers.
    assert page.count("&lt;img src=x onerror=") >= 8
    assert "<img" not in page
    assert page.count("<script") == 1


def test_the_page_loads_nothing_but_its_own_script(url):
    page = httpx.get(url + "/")
    policy = page.headers["content-security-policy"]
    assert {part.strip() for part in policy.split(";")} >= {
        "default-src 'none'",
        "script-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
    }
    assert re.findall(r"""(?:src|href)=["']([^"']+)""", page.text) == ["data:,", "page.js"]
    assert not re.search(r"""\son\w+=|javascript:|<style[^>]+src""", page.text)
    script = httpx.get(url + "/page.js").text
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "setAttribute", "srcdoc"):
        assert sink not in script


def test_typing_a_query_and_picking_a_shopper_asks_for_them(tab, backend):
    tab.until("document.getElementById('gender').options.length === 3")
    tab("document.getElementById('query').value = 'garden hose'")
    tab("document.getElementById('gender').value = 'm'; document.getElementById('age_band').value = '18-24'; document.getElementById('beam').value = '50'")
    tab("document.querySelector('form button').click()")
    tab.until("document.querySelectorAll('.items tr').length === 11")
    asked = backend.requests[-1]
    assert (asked.query, asked.shopper.gender, asked.shopper.age_band, asked.beam_size, asked.explain) == ("garden hose", "m", "18-24", 50, True)
    assert tab("location.search") == "?q=garden+hose&gender=m&age_band=18-24"
    tab("document.getElementById('query').value = 'hurry'; document.getElementById('form').requestSubmit()")
    tab.until("document.querySelector('.degraded').textContent === 'degraded: load, deadline' && !document.querySelector('.degraded').hidden")
    assert tab("document.querySelector('.read-as').hidden ? '' : document.querySelector('.read-as').textContent") == f"read as: hurry {EVIL}"
    assert tab("document.querySelectorAll('.column').length") == 1


def test_a_loaded_challenger_answers_beside_the_champion(tab, backend):
    backend.challenger = ChallengerInfo(versions=CHALLENGER, canary_share=0.1, shadow_share=0.0, refused=None)
    try:
        tab("document.getElementById('query').value = 'hose'; document.getElementById('form').requestSubmit()")
        tab.until("document.querySelectorAll('.column').length === 2")
        names = "[...document.querySelectorAll('.column .name')].map((one) => one.textContent)"
        assert tab(names) == ["genrecall-shop/3 · champion", "genrecall-shop/4 · challenger"]
        assert [request.version for request in backend.requests[-2:]] == ["champion", "challenger"]
        assert tab("[...document.querySelectorAll('.column')].map((one) => one.querySelectorAll('.items tr').length)") == [11, 11]
        left, right = tab("[...document.querySelectorAll('.column')].map((one) => one.getBoundingClientRect().left)")
        assert right > left  # side by side
        tab("document.getElementById('query').value = 'gone'; document.getElementById('form').requestSubmit()")
        tab.until("document.querySelectorAll('.column').length === 1")
        assert tab(names) == ["genrecall-shop/3 · champion"]
        assert "version: no challenger is loaded" in tab("document.getElementById('status').textContent")
    finally:
        backend.challenger = None


def test_a_click_on_a_sid_leaves_its_items_and_another_brings_all_back(tab):
    tab("document.getElementById('query').value = 'x'; document.getElementById('form').requestSubmit()")
    tab.until("document.querySelectorAll('.leaf').length === 6")
    shown = "[...document.querySelectorAll('.items tr')].filter((row) => row.offsetHeight > 0).length"
    assert tab(shown) == 11
    tab("document.querySelectorAll('.leaf')[1].click()")
    assert tab(shown) == 2
    assert tab("document.querySelectorAll('.leaf.chosen').length") == 1
    tab("document.querySelectorAll('.leaf')[1].click()")
    assert tab(shown) == 11


def test_a_refusal_is_shown_with_the_field(tab):
    tab("document.getElementById('history').value = 'x'.repeat(300); document.getElementById('form').requestSubmit()")
    tab.until("document.getElementById('status').classList.contains('wrong')")
    assert "history.0: String should have at most 256 characters" in tab("document.getElementById('status').textContent")


def test_the_page_makes_a_screenshot(url, tmp_path):
    picture = os.environ.get("GENRECALL_SCREENSHOT") or str(tmp_path / "page.png")
    browse(f"{url}/?q=angle+bracket", tmp_path / "profile", f"--screenshot={picture}", "--window-size=1200,800", "--hide-scrollbars")
    with open(picture, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert os.path.getsize(picture) > 20_000
