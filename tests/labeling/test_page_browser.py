"""The labeling page in Chromium: keys, the mouse, both widths, light and dark, hostile text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.common.files import write_jsonl
from tests.helpers.browser import Page, open_browser
from tests.helpers.web import ServedCommand
from tests.labeling.helpers import lines, pair_rows, ranking_rows

pytestmark = pytest.mark.browser

PICTURES = os.environ.get("RLHF_PICTURES")
"""Folder for pictures of the pages, to look at."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def serve_labels(folder: Path, rows: list[dict], *more: str) -> ServedCommand:
    write_jsonl(folder / "items.jsonl", rows)
    words = ["label", "--data", "[{path: items.jsonl}]", "--output", "labels.jsonl"]
    return ServedCommand([*words, "--annotator", "ann", *more], folder)


def picture(browser: Page, name: str) -> None:
    if PICTURES:
        browser.picture(Path(PICTURES) / f"{name}.png")


def good_side(browser: Page) -> int:
    """Place of the reply that begins with `good`."""
    first = browser.evaluate("document.querySelector('.reply .turn').textContent")
    return 0 if first.startswith("good") else 1


def wait_for_count(browser: Page, count: int, total: int = 20) -> None:
    text = json.dumps(f"{count} of {total} labeled")
    browser.wait_for(f"document.getElementById('progress').textContent.startsWith({text})")


def check_good(folder: Path, count: int) -> None:
    rows = lines(folder / "labels.jsonl")
    assert len({row["item_id"] for row in rows}) == len(rows) == count
    assert all(row[f"response_{row['winner']}"][0]["content"].startswith("good") for row in rows)


@pytest.mark.parametrize(
    ("width", "dark", "mouse"),
    [(1280, False, False), (380, True, True), (1280, True, True), (380, False, False)],
)
def test_twenty_pairs_with_the_server_killed_in_the_middle(
    browser: Page, tmp_path: Path, width: int, dark: bool, mouse: bool
):
    browser.console.clear()
    browser.requests.clear()
    done = 0
    for stop in (8, 20):
        with serve_labels(tmp_path, pair_rows(20)) as served:
            browser.show(served.url, width=width, dark=dark)
            wait_for_count(browser, done)
            assert "token" not in browser.evaluate("location.href")
            while done < stop:
                key = "1" if good_side(browser) == 0 else "7"
                if mouse:
                    browser.click(f"#choices [data-key='{key}']")
                else:
                    browser.press(key)
                done += 1
                wait_for_count(browser, done)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert set(browser.requests) <= {
                served.url,
                *(
                    f"{served.base}/{path}"
                    for path in (
                        "",
                        "style.css",
                        "static/label.css",
                        "static/label.js",
                        "api/task",
                        "api/label",
                    )
                ),
                "data:,",
            }
            paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(20, 22, 26)" if dark else "rgb(251, 250, 247)")
            if stop == 8:
                picture(browser, f"pairs-{width}-{'dark' if dark else 'light'}")
            assert browser.console == []
            served.process.kill()
            served.process.wait()
            if stop == 8:  # an answer without a server is reported and can be given again
                browser.press("4")
                browser.wait_for("document.getElementById('status').classList.contains('error')")
                assert "does not answer" in browser.evaluate(
                    "document.getElementById('status').textContent"
                )
                browser.console.clear()
            browser.requests.clear()
    check_good(tmp_path, 20)


def test_undo_skip_note_and_strengths(browser: Page, tmp_path: Path):
    with serve_labels(tmp_path, pair_rows(4)) as served:
        browser.show(served.url)
        wait_for_count(browser, 0, 4)
        browser.press("n")
        browser.type("because 1 < 2 & s")
        browser.press("1")  # typed into the note
        wait_for_count(browser, 0, 4)
        browser.press("Escape")
        browser.press("1")
        wait_for_count(browser, 1, 4)
        assert browser.evaluate("document.getElementById('note-box').hidden")
        browser.press("u")
        wait_for_count(browser, 0, 4)
        browser.press("4")
        wait_for_count(browser, 1, 4)
        browser.press("s")
        browser.wait_for("document.getElementById('progress').textContent.endsWith('1 skipped')")
        browser.press("6")
        wait_for_count(browser, 2, 4)
        browser.press("5")
        wait_for_count(browser, 3, 4)
        assert browser.evaluate("!document.getElementById('done').hidden")
        picture(browser, "done")
        browser.click("#undo")
        wait_for_count(browser, 2, 4)
    rows = lines(tmp_path / "labels.jsonl")
    assert [row.get("margin") for row in rows] == [3, None, 0, None, 2, 1, None]
    assert rows[0]["note"] == "because 1 < 2 & s1"
    assert all("note" not in row for row in rows[1:])


def test_an_outdated_page_says_that_it_must_be_reloaded(browser: Page, tmp_path: Path):
    with serve_labels(tmp_path, pair_rows(2)) as served:
        browser.show(served.url)
        wait_for_count(browser, 0, 2)
        browser.evaluate("document.getElementById('item').dataset.settingsId = 'before'")
        browser.press("1")
        text = "document.getElementById('status').textContent"
        browser.wait_for(f"{text}.includes('reload the page')")
    assert lines(tmp_path / "labels.jsonl") == []


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e"


def test_hostile_text_is_text(browser: Page, tmp_path: Path):
    browser.console.clear()
    rows = [
        {"prompt": HOSTILE, "chosen": HOSTILE + "W" * 3000, "rejected": "{{ 7 * 7 }}" + HOSTILE}
    ]
    with serve_labels(tmp_path, rows, "--guidelines", HOSTILE) as served:
        for width in (1280, 380):
            browser.show(served.url, width=width)
            wait_for_count(browser, 0, 1)
            assert browser.evaluate("document.title") == "Which reply is better?"
            assert browser.evaluate("document.scripts.length") == 1
            assert browser.evaluate("document.images.length") == 0
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            text = browser.evaluate("document.body.innerText")
            assert "<img src=x onerror=alert(1)>\\u202e" in text
            assert "\u202e" not in text
            assert "{{ 7 * 7 }}" in text
            picture(browser, f"hostile-{width}")
    assert browser.console == []


@pytest.mark.parametrize("width", [1280, 380])
def test_the_other_modes(browser: Page, tmp_path: Path, width: int):
    browser.console.clear()
    for mode in ("ratings", "rankings", "demonstrations"):
        folder = tmp_path / mode
        folder.mkdir()
        with serve_labels(folder, ranking_rows(2), "--mode", mode) as served:
            total = 6 if mode == "ratings" else 2
            browser.show(served.url, width=width, dark=mode == "rankings")
            wait_for_count(browser, 0, total)
            if mode == "ratings":
                browser.press("4")
            elif mode == "rankings":
                browser.press("Enter")  # nothing is ranked yet
                browser.press("2")
                browser.click(".reply:nth-child(3)")
                browser.press("1")
                picture(browser, f"{mode}-{width}")
                browser.press("Enter")
            else:
                browser.click("#completion")
                browser.type("A reply\nof two lines.")
                picture(browser, f"{mode}-{width}")
                browser.click("[data-key='Ctrl+Enter']")
            wait_for_count(browser, 1, total)
            picture(browser, f"{mode}-next-{width}")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
        (row,) = lines(folder / "labels.jsonl")
        if mode == "ratings":
            assert row["rating"] == 4
        elif mode == "rankings":
            assert [row["ranks"][index] for index in row["shown_order"]] == [3, 1, 2]
        else:
            assert row["completion"][0]["content"] == "A reply\nof two lines."
    assert browser.console == []


def test_another_origin_gets_nothing(browser: Page, tmp_path: Path):
    """A page of another server of this machine, with the cookie of the labeling page."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        serve_labels(tmp_path / "one", pair_rows(2)) as served,
        serve_labels(tmp_path / "two", pair_rows(2)) as other,
    ):
        browser.show(served.url)
        wait_for_count(browser, 0, 2)
        browser.show(other.url)
        wait_for_count(browser, 0, 2)
        browser.send("Page.setBypassCSP", enabled=True)  # the other page has no such policy
        browser.show(other.url)
        body = json.dumps({"label_id": "x"})
        for options in (
            "{credentials: 'include'}",
            "{credentials: 'include', mode: 'no-cors'}",
            f"{{method: 'POST', credentials: 'include', mode: 'no-cors', body: '{body}'}}",
        ):
            seen = browser.evaluate(
                f"fetch('{served.base}/api/task', {options})"
                ".then(r => r.text()).catch(e => 'blocked')"
            )
            assert seen in ("blocked", "")
        browser.send("Page.setBypassCSP", enabled=False)
    assert (tmp_path / "one" / "labels.jsonl").read_bytes() == b""
