"""The report in a real browser: it moves, obeys scrubber, keys and address, fits phone and desktop, and loads nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgpt.report import Clip, Report, write_report
from vidtok.page_parts import Measured, Table

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the search path"),
]
FRAMES, CONTEXT, SIDE = 6, 2, 64

# Runs after the page's own script and tells the page around it what it saw.
HOOK = """
<script>
const seen = {};
const look = (name) => {
  const screen = document.querySelector(".screen").getBoundingClientRect();
  const image = document.querySelector(".screen img").getBoundingClientRect();
  seen[name] = [document.documentElement.dataset.frame, (screen.top - image.top) / screen.height,
    document.querySelector(".badge").textContent, document.querySelector(".player button").textContent];
};
const press = (key, target) => (target || document.body).dispatchEvent(new KeyboardEvent("keydown", { key: key, bubbles: true }));
const scrubber = document.querySelector(".player input");
look("start");
scrubber.value = 4;
scrubber.dispatchEvent(new Event("input"));
look("scrubbed");
press("ArrowRight");
look("right");
press("ArrowLeft"); press("ArrowLeft");
look("left");
press("ArrowRight", scrubber);
look("inside the scrubber");
press(" ");
look("space");
press(" ");
seen.width = [document.documentElement.scrollWidth, innerWidth];
parent.postMessage("SEEN" + JSON.stringify(seen) + "END", "*");
</script>
</body>"""
# A window of its own cannot be as narrow as a phone.
PHONE = """<body style="margin: 0"><script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="hooked.html" style="border: 0; width: %dpx; height: 900px"></iframe></body>"""


def run(page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """Open a page; gives its document after the scripts ran, and what the browser logged. The profile is the test's own."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [*command, *quiet, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def dumped(page: Path, address: str, folder: Path, *flags: str) -> str:
    """Give the document that a page becomes at an address such as #frame=3; no line of the console may be written."""
    inner = folder / "frame.html"
    # The address travels in a copy, because as_uri would escape it.
    inner.write_text(
        page.read_text(encoding="utf-8").replace("<script>", f'<script>location.hash = "{address}";', 1), encoding="utf-8"
    )
    document, log = run(inner, folder, "--virtual-time-budget=2500", "--dump-dom", *flags)
    assert "CONSOLE" not in log, log
    return document


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    values = np.linspace(20, 220, FRAMES).astype(np.uint8)
    rows = {name: np.broadcast_to(values[:, None, None, None], (FRAMES, SIDE, SIDE, 3)).copy() for name in "abcde"}
    short = {name: frames[:4] for name, frames in rows.items()}
    wide = Table("A caption that is longer than a phone is wide, and wider still", ["", *(f"figure {n}" for n in range(12))],
                 [["model", *[Measured("31.20", "30.9 – 31.5")] * 12]])  # fmt: skip
    clips = [Clip(rows, CONTEXT, "worst clip"), Clip(short, CONTEXT, "best clip, which ends before the other")]
    return write_report(
        Report("Title " + "x" * 80, "Summary.", clips, tables=[wide], receipt={"seed": 1}), folder / "report.html"
    )


def test_the_address_opens_every_clip_at_its_frame(page: Path, tmp_path: Path) -> None:
    document = dumped(page, "frame=5", tmp_path)
    assert re.search(r'<html[^>]* data-frame="5"', document)
    assert re.findall(r"--frame: ?(\d+)", document.split("<main>")[1]) == ["4", "3"]
    assert re.findall(r'class="badge">([^<]*)<', document) == ["predicted 3", "predicted 2"]
    assert "frame 5 of 6</output>" in document and ">Play</button>" in document
    first = dumped(page, "frame=1", tmp_path)
    assert re.findall(r'class="badge">([^<]*)<', first) == ["given 1", "given 1"]


def test_the_clips_play_by_themselves_but_not_for_who_wants_less_motion(page: Path, tmp_path: Path) -> None:
    # 2.5 seconds of 8 frames each are 20 steps, over 6 frames.
    assert re.search(r'data-frame="3"', dumped(page, "", tmp_path))
    calm = dumped(page, "", tmp_path, "--force-prefers-reduced-motion")
    assert re.search(r'data-frame="3"', calm) and ">Play</button>" in calm and "predicted 1<" in calm


@pytest.mark.parametrize("width", [390, 1440])
def test_scrubber_and_keys_move_the_pictures_and_nothing_is_wider_than_its_window(page: Path, width: int, tmp_path: Path) -> None:
    copy = tmp_path / "hooked.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", HOOK), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(PHONE % width, encoding="utf-8")
    document, log = run(outer, tmp_path, "--virtual-time-budget=500", "--dump-dom", "--window-size=1500,900")
    assert "CONSOLE" not in log, log
    found = re.search("SEEN(.*)END", document)
    assert found
    seen = json.loads(found[1].replace("&lt;", "<").replace("&amp;", "&"))
    scrolled, inner = seen.pop("width")
    assert scrolled <= inner == width
    expected = {"start": 1, "scrubbed": 4, "right": 5, "left": 3, "inside the scrubber": 3, "space": 3}
    assert {name: int(values[0]) for name, values in seen.items()} == expected
    for name, (frame, moved, badge, button) in seen.items():
        # The picture is a column of frames, pushed up by as many as were shown before.
        assert moved == pytest.approx(int(frame) - 1, abs=0.02)
        assert badge == (f"given {frame}" if int(frame) <= CONTEXT else f"predicted {int(frame) - CONTEXT}")
        assert button == ("Pause" if name in ("start", "space") else "Play")


def test_a_screenshot_shows_the_frame_that_was_asked_for(page: Path, tmp_path: Path) -> None:
    shades = {}
    for frame in (1, 6):
        copy = tmp_path / "frame.html"
        text = page.read_text(encoding="utf-8").replace("<script>", f'<script>location.hash = "frame={frame}";', 1)
        copy.write_text(text, encoding="utf-8")
        shot = tmp_path / f"{frame}.png"
        run(copy, tmp_path, "--virtual-time-budget=500", f"--screenshot={shot}", "--window-size=1440,900")
        picture = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
        grey = picture[(picture == picture[:, :1]).all(1)][:, 0]
        shades[frame] = {shade: int((grey == shade).sum()) for shade in (20, 220)}
    assert shades[1][20] > 10 * SIDE**2 > shades[1][220]
    assert shades[6][220] > 5 * SIDE**2 > shades[6][20]


def test_the_browser_itself_would_refuse_anything_from_outside(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / "leaky.html"
    leak = '<img src="https://example.invalid/a.png"></body>'
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", leak), encoding="utf-8")
    _, log = run(copy, tmp_path, "--virtual-time-budget=500", "--dump-dom")
    assert "CONSOLE" in log and "Content Security Policy" in log
