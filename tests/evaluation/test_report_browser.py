"""The report in a real browser: no console error, no request, values on hover, no side scroll."""

import json
import re
from pathlib import Path

import pytest

from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.reports import write_comparison_report, write_report
from rlhf.reports.page import page_html as page_html
from rlhf.reports.scatter import Point, scatter_html
from rlhf.reward_models import PerConversationReward
from tests.evaluation import fake_pipeline as fake
from tests.evaluation.fake_study import overoptimization
from tests.evaluation.hostile_pages import pages_of
from tests.helpers.probed_page import open_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = fake.write_pipeline(tmp_path_factory.mktemp("runs") / "quickstart")
    hostile = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    row = {"step": 1, "seed": 9, "messages": fake.conversation(0, hostile), "return": 1.0}
    rows = [{**row, "split": split} for split in ("before", "after")]
    fake.write_rows(root / "dpo" / "samples.jsonl", rows)
    return root


@pytest.mark.parametrize("size", ["1180,900", "390,800"])
def test_report_opens_cleanly(pipeline: Path, tmp_path: Path, size: str):
    seen, console = open_page(write_report(pipeline), tmp_path / "profile", f"--window-size={size}")
    assert console == ""
    assert seen["requests"] == ["/probed.html"]
    assert seen["content"] <= seen["width"]
    assert seen["scripts"] == 2  # ours and the probe: nothing from the transcripts
    assert seen["charts"] > 10


def test_a_table_fits_a_desk_and_scrolls_with_a_shadow_on_a_phone(pipeline: Path, tmp_path: Path):
    page = write_report(pipeline / "ppo")
    desk, phone = (
        open_page(page, tmp_path / size, f"--window-size={size}")[0]
        for size in ("1280,900", "390,800")
    )
    assert desk["wide"] == 0
    assert phone["wide"] > 0
    # What covers the shadow moves with the columns; the shadow itself stays at the edge.
    assert phone["edges"].startswith("local, local, scroll, scroll")


def test_hover_reads_out_the_nearest_step(pipeline: Path, tmp_path: Path):
    seen, _ = open_page(write_report(pipeline), tmp_path / "profile")
    step = int(re.match(r"step (\d+)", seen["tip"])[1])
    rows = (pipeline / "ppo" / "metrics.jsonl").read_text().splitlines()
    logged = {row["step"]: row["reward/mean"] for row in map(json.loads, rows)}
    value = float(seen["tip"].split("proxy")[1].replace("−", "-"))
    assert value == pytest.approx(logged[step], rel=1e-3)
    assert 40 < step < 75
    assert seen["cursor"] == 1


def test_a_token_tells_what_is_known_of_it(pipeline: Path, tmp_path: Path):
    seen, console = open_page(write_report(pipeline), tmp_path / "profile")
    rows = map(
        json.loads, (pipeline / "ppo" / "samples.jsonl").read_text().rstrip("\n").split("\n")
    )
    tokens = next(row for row in rows if row["split"] == "train")["tokens"]
    names = [name for name in tokens if name not in ("text", "turn")]
    piece, *lines = seen["token"].splitlines()
    assert json.loads(piece) == tokens["text"][3]
    parts = (line.replace("−", "-").split("  ") for line in lines)
    told = {name: float(value) for name, value in parts}
    assert told == {name: tokens[name][3] for name in names}
    assert seen["shades"][0] == ""  # no reward before the last token
    assert "color-mix" in seen["shades"][1]
    assert console == ""


def test_dark_mode_changes_the_paper(pipeline: Path, tmp_path: Path):
    page, flag = write_report(pipeline), "--blink-settings=preferredColorScheme"
    light, dark = (
        open_page(page, tmp_path / mode, f"{flag}={number}")[0]["paper"]
        for mode, number in (("dark", 0), ("light", 1))
    )
    assert {light, dark} == {"rgb(251, 250, 247)", "rgb(20, 22, 26)"}


def test_comparison_and_unfinished_pages_open_cleanly(pipeline: Path, tmp_path: Path):
    run = tmp_path / "ppo"
    fake.write_rows(run / "metrics.jsonl", [{"step": 1, "train/loss": 1.0}])
    pages = [
        write_report(run),
        write_comparison_report([pipeline], tmp_path / "compare.html"),
    ]
    for number, page in enumerate(pages):
        seen, console = open_page(page, tmp_path / f"profile{number}")
        assert console == ""
        assert seen["requests"] == ["/probed.html"]


def test_the_probe_sees_errors_and_requests(tmp_path: Path):
    """Control: a page that misbehaves is caught, so that silence above means something."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><div id=tip></div><img src=pixel.png><script>undefinedName()</script></body>"
    )
    seen, console = open_page(page, tmp_path / "profile")
    assert "undefinedName is not defined" in console
    assert "/pixel.png" in seen["requests"]


def test_reward_and_over_optimization_pages_open_cleanly(tmp_path: Path):
    length = PerConversationReward(lambda c: float(len(c[-1]["content"])), name="length")
    rows = [
        {"prompt": f"Question {i}?", "chosen": "yes " * (i % 7 + 1), "rejected": "no " * (i % 5)}
        for i in range(1, 60)
        if i % 5
    ]
    write_pair_evaluation(length, rows, tmp_path / "judged", name="pairs")
    study = tmp_path / "study"
    study.mkdir()
    (study / "config.yaml").write_text("command: overoptimize\n")
    (study / "overoptimization.json").write_text(json.dumps(overoptimization()))
    for size in ("1180,900", "390,800"):
        for run, charts in ((tmp_path / "judged", 3), (study, 6)):
            seen, console = open_page(
                write_report(run), tmp_path / f"{run.name}{size}", f"--window-size={size}"
            )
            assert console == ""
            assert seen["requests"] == ["/probed.html"]
            assert seen["content"] <= seen["width"]
            assert seen["charts"] == charts
    assert seen["tip"].startswith("√KL ")


def test_hostile_text_runs_and_deforms_nothing(tmp_path: Path):
    for number, page in enumerate(pages_of(tmp_path)):
        for size in ("1180,900", "390,800"):
            profile = tmp_path / f"hostile{number}{size}"
            seen, console = open_page(page, profile, f"--window-size={size}")
            assert console == ""
            assert seen["requests"] == ["/probed.html"]
            assert seen["title"] != "owned"
            assert seen["scripts"] == 2
            assert seen["content"] <= seen["width"]


def test_long_names_do_not_widen_a_page(tmp_path: Path):
    pipeline = fake.write_pipeline(tmp_path / ("P" * 150))
    for stage in ("ppo", "dpo"):
        (pipeline / stage).rename(pipeline / (stage + "N" * 200))
    length = PerConversationReward(lambda c: float(len(c[-1]["content"])), name="L" * 200)
    rows = [
        {"prompt": f"{i}?", "chosen": "yes " * (i % 7 + 1), "rejected": "no"} for i in range(40)
    ]
    write_pair_evaluation(length, rows, tmp_path / "judged", name="p" * 150)
    pages = [
        write_report(pipeline),
        write_comparison_report([pipeline], tmp_path / "compare.html"),
        write_report(tmp_path / "judged"),
    ]
    for number, page in enumerate(pages):
        for size in ("1180,900", "390,800"):
            profile = tmp_path / f"profile{number}{size}"
            seen, _ = open_page(page, profile, f"--window-size={size}")
            assert seen["content"] <= seen["width"]


def test_the_policy_blocks_injected_scripts(tmp_path: Path):
    """Control: a script that was not escaped does not run, nor does a handler or a link."""
    body = "<header></header><img src=data:, onerror=\"document.title='owned'\">"
    body += "<script>document.title='owned'</script>"
    written = tmp_path / "bad.html"
    written.write_text(page_html("good", body), encoding="utf-8")
    seen, console = open_page(written, tmp_path / "profile")
    assert seen["title"] == "good"
    assert "Content Security Policy" in console


def test_a_plot_of_runs_is_redrawn_for_another_quantity(tmp_path: Path):
    hostile = "</script><b onclick=alert(1)>\"'\u202e"
    points = [
        Point(
            f"{hostile} {i}", {"policy/kl": 0.1 * i, "reward/mean": -i, "a": 5.0}, f"c{i % 6 + 1}"
        )
        for i in range(7)
    ]
    points.append(Point("incomplete", {"reward/mean": 1.0, hostile: 2.0}))
    body = "<header></header>" + scatter_html(
        points, x="policy/kl", y="reward/mean", title=hostile, note=hostile
    )
    (tmp_path / "plot.html").write_text(page_html("plot", body), encoding="utf-8")
    for size in ("1180,900", "390,800"):
        seen, console = open_page(tmp_path / "plot.html", tmp_path / size, f"--window-size={size}")
        assert console == ""
        assert seen["content"] <= seen["width"]
        assert seen["dots"] == [7, 0]  # only the incomplete run has the first quantity by name
        assert seen["ticks"] == ["no run logged both"]
