"""The pages of a finished benchmark: verdicts, colors and names, the same on all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf.studies.bench.report import write_bench_report
from rlhf.studies.bench.scores import analyze_scores, read_scores
from tests.studies.fake_bench import planted_bench

SFT = {"echo": [0.25, 0.25, 0.25, 0.25, 0.25], "maze": [0.1, 0.2, 0.1, 0.2, 0.15]}
PPO = {"echo": [0.60, 0.62, 0.61, 0.63, 0.59], "maze": [0.3, 0.35, 0.3, 0.35, 0.32]}
RLOO = {"echo": [0.90, 0.93, 0.91, 0.93, 0.90], "maze": [0.5, 0.56, 0.5, 0.55, 0.52]}
TWIN = {"echo": [0.92, 0.91, 0.92, 0.91, 0.90], "maze": [0.52, 0.51, 0.52, 0.53, 0.54]}
RETURNS = {"sft": SFT, "ppo": PPO, "rloo": RLOO, "twin": TWIN}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    bench = planted_bench(tmp_path_factory.mktemp("benches") / "b", RETURNS)
    scores = read_scores(bench)
    write_bench_report(bench, scores, analyze_scores(scores, baseline=bench.baseline))
    return bench.root


@pytest.fixture(scope="module")
def page(home: Path) -> str:
    return (home / "report.html").read_text(encoding="utf-8")


def test_every_named_winner_is_green_and_coverage_is_a_note(page: str):
    found = re.findall(r'<li class="(\w*)"><strong>([^<]*)</strong>', page)
    tones = {words.split(" (")[0]: tone for tone, words in found if tone}
    assert tones == {
        f"{winner} is significantly better than {loser}": "good"
        for winner, loser in (
            ("PPO", "SFT"),
            ("RLOO", "SFT"),
            ("twin", "SFT"),
            ("RLOO", "PPO"),
            ("twin", "PPO"),
        )
    }
    assert "<li><strong>1 of 3 pairs of algorithms have no winner" in page
    assert '<p class="note">Simulated coverage of the 95% intervals with 5 training seeds' in page


def test_tiles_and_words_speak_as_the_tables_do(page: str):
    tiles = re.findall(r'<li class="(c\d)"><b>(\w+)</b><span>IQM (0\.\d+) \[', page)
    assert [name for _, name, _ in tiles] == ["PPO", "RLOO", "twin"]
    # Above halfway of both environments: 8 of the 10 runs of RLOO lie between .8 and .96.
    assert 0.8 < float(tiles[1][2]) < 0.96
    assert "the row SFT." in page
    assert "P(better than SFT)" in page
    assert "<code>rlhf tune</code>" in page
    assert "`" not in page[: page.index("<script>")]


def test_an_arm_has_one_color_on_every_page(home: Path, page: str):
    pages = [page, *(p.read_text() for p in sorted((home / "pages").glob("*.html")))]
    assert len(pages) == 3
    for text in pages:
        keys = set(re.findall(r'class="key (\w+)">(\w+)</span>', text))
        tiles = set(re.findall(r'<li class="(\w+)"><b>(\w+)</b>', text))
        dots = set(re.findall(r'class="who">(\w+)<small>.*?class="track (\w+) ink"', text))
        assert keys | tiles >= {("c1", "PPO"), ("c2", "RLOO"), ("c3", "twin")}
        assert dots >= {("PPO", "c1"), ("RLOO", "c2"), ("twin", "c3"), ("SFT", "ref")}
        assert len({name for _, name in keys | tiles}) == len(keys | tiles), "two colors of one"
    assert 'class="key ref">SFT</span>' in page


def test_an_environment_page_knows_no_folders(home: Path):
    text = (home / "pages" / "echo.html").read_text()
    assert "<h1>SFT against PPO against RLOO against twin</h1>" in text
    body = re.sub(r'href="data:[^"]*"', "", text)
    assert "seed0/" not in body
    assert "<b>evaluate</b>" not in body
    assert "<b>reference</b>" not in body


def test_profile_keeps_its_columns(page: str):
    profile = page[page.index("<h2>Share of runs above a score") :]
    assert profile[: profile.index("</thead>")].count("<th ") == 22
