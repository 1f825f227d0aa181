"""The page for people in a real browser, over the real routes; titles with markup in them stay text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from genrecall.serving.api import create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import ModelInfo, RecalledItem, RecalledSid, RecallResponse, Timings, Versions

EVIL = "<img src=x onerror=\"document.title='owned'\"> & <script>document.title='owned'</script>"
VERSIONS = Versions(model="genrecall-shop/3", bundle="0123456789abcdef")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found on PATH; install one to run the page in it")


class Backend:
    async def recall(self, request):
        sids = [RecalledSid(sid=f"<{row // 2},{row},7>", score=-0.4 - row, size=9 + row) for row in range(6)]
        titles = [EVIL, "2-in x 4-in galvanized angle bracket", "Adjustable shelf bracket, 10 pack", f"answer to {request.query}"]
        items = [
            RecalledItem(item_id=f"i{row}", title=title, brand="Acme", category_path=["Hardware", "Brackets"], rank=row, sid=sids[row // 2].sid, score=-0.4)
            for row, title in enumerate(titles * 3)
            if row < 11
        ]
        timings = Timings(generate_ms=4.2, expand_ms=0.1, batch_size=1)
        return RecallResponse(items=items, sids=sids, beam_size=20, versions=VERSIONS, timings=timings)

    def info(self):
        return ModelInfo(
            versions=VERSIONS, address="models:/genrecall-shop@champion", items=54667, sids=9120, levels=[256, 128, 140], stage="stage4", refused=None
        )


@pytest.fixture(scope="module")
def url():
    server = uvicorn.Server(uvicorn.Config(create_app(Backend, ApiKeys()), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def browse(url, profile, *arguments):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}", "--virtual-time-budget=4000"]
    done = subprocess.run([BROWSER, *options, *arguments, url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_search_is_shown_and_markup_in_titles_stays_text(url, tmp_path):
    page = browse(f"{url}/?q=angle+bracket", tmp_path / "profile", "--dump-dom")
    assert "11 items from 6 SIDs" in page
    assert "genrecall-shop/3 · stage4 · 54,667 items in 9,120 SIDs" in page
    assert "answer to angle bracket" in page
    assert "&lt;img src=x onerror=" in page
    assert "<img" not in page
    assert "<title>genrecall</title>" in page
    assert len(re.findall(r'<tr[^>]*data-sid="&lt;0,0,7&gt;"|<tr[^>]*data-sid="<0,0,7>"', page)) == 2


def test_the_page_makes_a_screenshot(url, tmp_path):
    picture = os.environ.get("GENRECALL_SCREENSHOT") or str(tmp_path / "page.png")
    browse(f"{url}/?q=angle+bracket", tmp_path / "profile", f"--screenshot={picture}", "--window-size=1200,800", "--hide-scrollbars")
    with open(picture, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert os.path.getsize(picture) > 20_000
