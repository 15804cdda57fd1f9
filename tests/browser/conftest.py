"""A real Chromium and a real JupyterLab, started once and certainly ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab_page import CHROMIUM_FLAGS, VIEWPORT, LabPage
from lab_server import DARK, LabServer, serve
from playwright.sync_api import Browser, BrowserContext, sync_playwright
from sample_notebook import write_sample

from dsv3lib.course.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder drives a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium(browser_path: str) -> Iterator[Browser]:
    """The system's Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def course_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner's own copy of the course, made as ``dsv3 lab`` makes it, and the small lesson beside it."""
    root = tmp_path_factory.mktemp("course")
    Workspace(root).prepare(ROOT)
    write_sample(root)
    return root


@pytest.fixture(scope="session")
def light(
    course_copy: Path, tmp_path_factory: pytest.TempPathFactory, browser_path: str
) -> Iterator[LabServer]:
    """JupyterLab as it comes."""
    with serve(course_copy, tmp_path_factory.mktemp("light")) as server:
        yield server


@pytest.fixture(scope="session")
def dark(
    course_copy: Path, tmp_path_factory: pytest.TempPathFactory, browser_path: str
) -> Iterator[LabServer]:
    """JupyterLab in its dark theme and in German."""
    with serve(course_copy, tmp_path_factory.mktemp("dark"), theme=DARK, locale="de_DE") as server:
        yield server


@pytest.fixture(scope="session")
def open_page(chromium: Browser) -> Iterator[Callable[[LabServer], LabPage]]:
    """A function that opens a page on a server; pages of one server share the browser's cache."""
    contexts: dict[str, BrowserContext] = {}

    def opened(server: LabServer) -> LabPage:
        if server.url not in contexts:
            contexts[server.url] = chromium.new_context(viewport=VIEWPORT)
        return LabPage(contexts[server.url].new_page(), server)

    yield opened
    for context in contexts.values():
        context.close()
