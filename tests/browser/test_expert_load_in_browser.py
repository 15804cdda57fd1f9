"""The expert-load view in a real browser: on a page without a kernel, in JupyterLab while a cell runs, and by
``dsv3 watch`` beside a run of another process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from lab_page import VIEWPORT, LabPage
from lab_server import LabServer
from playwright.sync_api import Browser, Page

from dsv3lib.config import ModelConfig
from dsv3lib.viz.expert_load import ExpertLoad
from dsv3lib.viz.load_history import LoadHistory

SIZE = ModelConfig.preset("nano")
DOMAINS = ["code", "docs"]
START_SECONDS = 90
WORDS = ".dsv3-load .words"


def record(step: int) -> dict:
    """Expert ``step`` modulo 8 is the fullest in code, the one after it in docs."""
    loads = {name: np.full((3, 8), 4) for name in DOMAINS}
    for shift, name in enumerate(DOMAINS):
        loads[name][:, (step + shift) % 8] = 20 - 8 * shift
    total = sum(loads.values())
    return {
        "kind": "step", "step": step, "expert_load": total.tolist(), "bias_speed": 0.001, "seconds": 0.1,
        "domain_load": {name: load.tolist() for name, load in loads.items()},
    }  # fmt: skip


def header() -> dict:
    return {"kind": "header", "model": SIZE.to_dict(), "domains": DOMAINS, "total_steps": 9}


def wait_words(page: Page, text: str, timeout_s: float = 30) -> None:
    page.wait_for_function(
        f"(text) => {{ const e = document.querySelector('{WORDS}'); return e && e.innerText.includes(text); }}",
        arg=text,
        timeout=timeout_s * 1000,
    )


def drawn(page: Page, nth: int = 0) -> str:
    return page.evaluate(f"document.querySelectorAll('.dsv3-load canvas')[{nth}].toDataURL()")


def drive(page: Page) -> None:
    """What every form must do: step slider by keyboard, layer and domain selectors, a click on a row."""
    wait_words(page, "Step 5, layer 1, all text: expert 5 is the fullest")
    slider = page.locator(".dsv3-load input.step")
    slider.focus()
    before = drawn(page)
    slider.press("ArrowLeft")
    wait_words(page, "Step 4, layer 1, all text: expert 4 is the fullest")
    assert drawn(page) != before
    page.locator(".dsv3-load select.domain").select_option(label="docs")
    wait_words(page, "Step 4, layer 1, docs: expert 5 is the fullest, 2.40 times the mean, so MaxVio is 1.40")
    page.locator(".dsv3-load select.layer").select_option(label="MTP 1")
    wait_words(page, "Step 4, MTP 1, docs")
    box = page.locator(".dsv3-load canvas").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 22 + (box["height"] - 56) / 2)
    wait_words(page, "Step 4, layer 2, docs")
    assert page.locator(".dsv3-load canvas").count() == 5


def test_a_page_without_a_kernel(chromium: Browser, tmp_path: Path) -> None:
    history = LoadHistory.of_model(SIZE, DOMAINS)
    for step in range(1, 6):
        history.add(record(step))
    path = ExpertLoad(history).save_page(tmp_path / "load.html")
    context = chromium.new_context(viewport=VIEWPORT, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    drive(page)
    assert said == []
    context.close()


def test_a_page_of_a_run_over_ranks(chromium: Browser, tmp_path: Path) -> None:
    history = LoadHistory.of_model(SIZE)
    for step in range(1, 4):  # layers 1, 2 and the MTP module's, 3; both ranks compute layer 1, and rank 1 the MTP's
        own = [{"1": [2] * 8, "2": [4] * 8}, {"1": [2] * 8, "3": [4] * 8}]
        own[0]["1"][step], own[1]["1"][step + 3], own[1]["3"][step + 4] = 9, 16, 11
        total = [[sum(of.get(layer, [0] * 8)[e] for of in own) for e in range(8)] for layer in ("1", "2", "3")]
        history.add({"step": step, "expert_load": total, "rank_load": own})
    context = chromium.new_context(viewport=VIEWPORT, offline=True)
    page = context.new_page()
    page.goto(ExpertLoad(history).save_page(tmp_path / "ranks.html").as_uri())
    wait_words(page, "Step 3, layer 1, all text: expert 6 is the fullest")
    before = [drawn(page, nth) for nth in (0, 3)]
    rank = page.get_by_label("rank of the run")
    rank.focus()
    page.keyboard.press("ArrowDown")
    wait_words(page, "Step 3, layer 1, rank 0: expert 3 is the fullest, 3.13 times the mean")
    assert all(drawn(page, nth) != was for nth, was in zip((0, 3), before, strict=True))
    page.locator(".dsv3-load select.layer").select_option(label="MTP 1")
    wait_words(page, "Step 3, MTP 1, rank 0: no token.")
    rank.select_option(label="rank 1")
    wait_words(page, "Step 3, MTP 1, rank 1: expert 7 is the fullest")
    rank.select_option(label="all ranks")
    wait_words(page, "Step 3, MTP 1, all text: expert 7 is the fullest")
    assert "ranks by experts" in page.locator(".dsv3-load canvas").last.get_attribute("aria-label")
    context.close()


NOTEBOOK = """
import json, time
from dsv3lib.config import ModelConfig
from dsv3lib.viz.expert_load import ExpertLoad
records = [json.loads(line) for line in open("records.jsonl")]
view = ExpertLoad.of_model(ModelConfig.preset("nano"), ["code", "docs"])
view
---
for record in records[:3]:
    view.add(record)
view.refresh(now=True)
end = time.monotonic() + 20
while time.monotonic() < end:
    time.sleep(0.1)
    if __import__("os").path.exists("seen"):
        break
assert time.monotonic() < end, "nobody saw three steps while this cell ran"
---
for record in records[3:]:
    view.add(record)
    time.sleep(0.3)
"""


def test_live_in_jupyterlab_while_a_cell_runs(
    light: LabServer, open_page: Callable[[LabServer], LabPage]
) -> None:
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK.split("---\n")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), light.root / "load_view.ipynb")
    (light.root / "records.jsonl").write_text("".join(json.dumps(record(s)) + "\n" for s in range(1, 6)))
    (light.root / "seen").unlink(missing_ok=True)
    lab = open_page(light)
    lab.open_notebook("load_view.ipynb")
    lab.run_cell(0, timeout_s=START_SECONDS)
    wait_words(lab.page, "No step has been recorded yet")
    lab.select(1)
    lab.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")
    wait_words(lab.page, "Step 3, layer 1, all text: expert 3 is the fullest")  # the cell is still running
    (light.root / "seen").touch()
    lab.wait_idle()
    lab.run_cell(2)
    drive(lab.page)
    assert lab.errors() == []
    lab.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """``dsv3 watch`` on a run of two steps: the run's log, and the page's address."""
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps(r) + "\n" for r in (header(), record(1), record(2))))
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **folders, "IPYTHONDIR": str(tmp_path / "ipython")}
    words = tmp_path / "voila.log"
    with words.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsv3lib.cli", "watch", str(log.parent), "--no-browser"],
            env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        end, found = time.monotonic() + START_SECONDS, None
        while found is None:
            assert process.poll() is None and time.monotonic() < end, words.read_text()[-3000:]
            time.sleep(0.2)
            found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\w+", words.read_text())
        yield log, found.group()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_dsv3_watch_follows_a_run_of_another_process(watched: tuple[Path, str], chromium: Browser) -> None:
    log, address = watched
    with urllib.request.urlopen(address.partition("?")[0], timeout=20) as answer:
        assert "login" in answer.url, "without the token there is only the way to log in"
    context = chromium.new_context(viewport=VIEWPORT)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(WORDS, timeout=START_SECONDS * 1000)
    wait_words(page, "Step 2, layer 1, all text: expert 2 is the fullest")
    with log.open("a") as file:
        whole = json.dumps(record(3)) + "\n"
        file.write(whole[:100])
        file.flush()
        time.sleep(1.5)
        assert "Step 2," in page.locator(WORDS).inner_text(), "half a line is no step"
        file.write(whole[100:] + json.dumps(record(4)) + "\n" + json.dumps(record(5)) + "\n")
    wait_words(page, "Step 5, layer 1, all text: expert 5 is the fullest")
    assert "Step 5 of 9. Following the run." in page.locator(".dsv3-load .state").inner_text()
    drive(page)
    resumed = log.with_suffix(".new")
    resumed.write_text("".join(json.dumps(r) + "\n" for r in (header(), record(1))))
    os.replace(resumed, log)
    wait_words(page, "Step 1, layer 2, docs: expert 2 is the fullest")
    context.close()
