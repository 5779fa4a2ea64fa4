"""Reports of whole, partial and hostile run directories."""

import base64
import csv
import json
import re
from pathlib import Path

import pytest

from rlhf.reports import write_report
from rlhf.reports.markup import Table, with_minus_signs
from tests.evaluation import fake_pipeline as fake


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.write_pipeline(tmp_path_factory.mktemp("runs") / "quickstart")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_whole_pipeline_tells_its_story(whole: Path):
    page = text_of(write_report(whole))
    for words in (
        "PPO is better than SFT on these episodes",
        "of optimal",
        "Proxy reward",
        "Gold reward",
        "KL to the start",
        "Simulated coverage of the 95% intervals with 128 episodes",
        "Before training",
        "accuracy on held-out pairs",
        "from SFT",
        "torch 2.13.0",
    ):
        assert words in page
    assert page.index("<b>SFT</b>") < page.index("<b>reward</b>") < page.index("<b>PPO</b>")


def test_a_path_is_read_like_the_output_directory_of_a_run(whole: Path):
    """A run writes to this path, too, although the folder `missing` does not exist."""
    page = write_report(whole / "missing" / ".." / "../quickstart")
    assert page == whole.resolve() / "report.html"


def test_nothing_is_fetched(whole: Path):
    page = text_of(write_report(whole))
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_contents_link_to_every_section(whole: Path):
    page = text_of(write_report(whole))
    sections = re.findall(r'<section id="([^"]+)"><h2>([^<]*)</h2>', page)
    nav = re.search(r'<nav class="contents"[^>]*>(.*?)</nav>', page)
    assert nav
    assert re.findall(r'<a href="#([^"]+)">([^<]*)</a>', nav[1]) == sections
    assert ("learning-curves", "Learning curves") in sections
    assert len(dict(sections)) == len(sections)


def test_hostile_text_stays_text(whole: Path):
    row = {
        "step": 1,
        "split": "before",
        "seed": 9,
        "messages": fake.conversation(0, "</script><script>alert(1)</script><img src=x>"),
        "return": 9.0,
    }
    samples = whole / "dpo" / "samples.jsonl"
    fake.write_rows(samples, [row, {**row, "split": "after"}])
    page = text_of(write_report(whole))
    samples.unlink()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script>") == 1


def test_tables_lie_beside_the_page(whole: Path):
    write_report(whole)
    folder = whole / "report_tables"
    tree = json.loads(text_of(folder / "tables.json"))
    assert set(tree) == {"evaluations", "differences"}
    with (folder / "curves.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["metric"] == "reward/mean"]
    assert [row["step"] for row in curve] == [str(step) for step in range(1, 101)]
    with (folder / "evaluations.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file) if row["stage"] == "evaluate"}
    summary = json.loads(text_of(whole / "evaluate" / "evaluation" / "ppo" / "summary.json"))
    assert float(rows["ppo"]["return"]) == pytest.approx(summary["metrics"]["return"]["mean"])
    assert float(rows["ppo"]["fraction of optimal"]) == pytest.approx(
        summary["metrics"]["normalized"]["mean"]
    )
    # What the summary holds: the exact upper end for 0 of 128, where t would give [0, 0].
    assert float(rows["random"]["success high"]) == pytest.approx(1 - 0.05 ** (1 / 128))


def test_forest_places_random_and_optimal(whole: Path):
    page = text_of(write_report(whole))
    place = {
        name: float(re.search(rf'left:([\d.]+)%">{name}</span>', page)[1])
        for name in ("random", "optimal")
    }
    # Marks at .12 and .95; ends are the lowest and highest interval end, 4% of space beyond each.
    assert 3.5 < place["random"] < 6
    assert 92 < place["optimal"] < 96.5


def test_transcripts_show_best_typical_and_worst_in_order(whole: Path):
    page = text_of(write_report(whole))
    first = page[page.index("The same prompts, every trained method") :]
    words = re.findall(r"<small>[A-Z6][a-z7 ]+: ([+−][\d.]+) \(", first)
    deltas = [float(word.replace("−", "-")) for word in words]
    assert len(deltas) == 4
    assert deltas == sorted(deltas, reverse=True)
    assert "DPO against SFT" in first


def test_constant_columns_move_to_the_caption(whole: Path):
    page = text_of(write_report(whole))
    assert "In every row: stage evaluate; environment text/PreferenceBandit-v0" in page
    assert '<th scope="col">environment</th>' not in page


def test_a_long_single_row_keeps_what_varied(tmp_path: Path):
    run = tmp_path / "only"
    row = {"env": "echo", "policy": "only", "decoding": "greedy", "success": True, "cost": 0.0}
    row |= {"turns": 1, "tokens": 4, "length_limited": 0}
    rows = [{**row, "seed": seed, "return": seed / 8} for seed in range(8)]
    fake.write_rows(run / "evaluation" / "only" / "episodes.jsonl", rows)
    page = text_of(write_report(run))
    folded = "policy only; environment echo; decoding greedy; over 8 episodes"
    assert f"Also: {folded}; cost 0.000; turns 1.000; tokens 4.000; length_limited 0.000." in page
    heads = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', page)
    assert heads == ["stage", "episodes", "return", "success"]


def saved(page: str, kind: str) -> list[str]:
    """What the links of a page save as a file of this kind."""
    found = re.findall(rf'href="data:{kind};base64,([^"]*)"', page)
    return [base64.b64decode(text).decode() for text in found]


def test_tables_are_saved_from_the_page_as_csv_and_json(whole: Path):
    page = text_of(write_report(whole))
    tables = json.loads(text_of(whole / "report_tables" / "tables.json"))
    assert [json.loads(text) for text in saved(page, "application/json")] == list(tables.values())
    assert saved(page, "text/csv")[0] == text_of(whole / "report_tables" / "evaluations.csv")


def test_a_minus_is_a_minus_on_the_page_and_a_hyphen_in_files(tmp_path: Path):
    run = tmp_path / "only"
    row = {"env": "echo", "policy": "only", "decoding": "greedy"}
    rows = [{**row, "seed": seed, "return": -1.5 - seed} for seed in range(2)]
    fake.write_rows(run / "evaluation" / "only" / "episodes.jsonl", rows)
    page = text_of(write_report(run))
    assert "−2.000 <span" in page
    assert "-2.000" not in page
    assert "-2.0" in text_of(run / "report_tables" / "evaluations.csv")
    assert all(
        "−" not in text for text in saved(page, "text/csv") + saved(page, "application/json")
    )
    assert (
        with_minus_signs("from -3 to [-1, -.5], seed-3, a-1") == "from −3 to [−1, −.5], seed-3, a-1"
    )


def test_columns_under_numbers_stay():
    rows = [["a", 1.0, 0.5, "x"], ["b", 1.0, 0.5, "x"]]
    shown = Table("t", "t", ["policy", "0.7", "50%", "env"], rows).to_html()
    assert ">0.7</th>" in shown
    assert ">50%</th>" in shown
    assert "In every row: env x." in shown


def test_over_optimization_is_named_with_its_step(tmp_path: Path):
    page = text_of(write_report(fake.write_pipeline(tmp_path / "p", over_optimized=True)))
    assert re.search(r"the gold score fell from 0\.7\d+ at step 4\d", page)
    assert "gold peaks" in page


def test_healthy_run_is_not_accused(whole: Path):
    assert "over-optimized" not in text_of(write_report(whole))


def test_long_transcript_folds(tmp_path: Path):
    run = tmp_path / "sft"
    rows = [
        {
            "step": 1,
            "split": split,
            "seed": 3,
            "messages": fake.conversation(0, "x" * 30_000),
            "return": None,
        }
        for split in ("before", "after")
    ]
    fake.write_rows(run / "samples.jsonl", rows)
    fake.write_rows(run / "metrics.jsonl", [{"step": 1, "train/loss": 2.0}])
    page = text_of(write_report(run))
    assert "19,300 more characters" in page
    assert "10,000 characters omitted" in page
    assert "not scored" in page


def test_a_sample_without_a_score_has_no_change(tmp_path: Path):
    """A missing score is not 0: the change from "not scored" to 2 is unknown."""
    run = tmp_path / "ppo"
    scores = {("before", 3): None, ("after", 3): 2.0, ("before", 4): 1.0, ("after", 4): 1.5}
    rows = [
        {"step": 1, "split": split, "seed": seed, "messages": fake.conversation(0, "x"), "score": s}
        for (split, seed), s in scores.items()
    ]
    fake.write_rows(run / "samples.jsonl", rows)
    fake.write_rows(run / "metrics.jsonl", [{"step": 1, "reward/mean": 2.0}])
    page = text_of(write_report(run))
    assert "+0.500 · seed 4" in page
    assert "not scored · seed 3" in page
    assert "+2.000" not in page


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 0, "time": 0.1}],
        [{"step": 1, "reward/mean": 0.5}],
        [{"step": 1, "train/loss": float("nan")}, {"step": 2, "train/loss": 1.0}],
    ],
)
def test_run_still_going_on(tmp_path: Path, metrics: list[dict]):
    run = tmp_path / "ppo"
    fake.write_rows(run / "metrics.jsonl", metrics)
    page = text_of(write_report(run))
    assert "<h1>PPO</h1>" in page
    assert "NaN" not in page
    if metrics:
        assert "Not finished" in page
    if any("train/loss" in row for row in metrics):
        assert "train/loss is not finite, first at step 1" in page


def test_proxy_without_gold_is_said(tmp_path: Path):
    run = tmp_path / "ppo"
    rows = [{"step": i, "reward/mean": i / 9, "policy/kl": 0.1} for i in range(9)]
    fake.write_rows(run / "metrics.jsonl", rows)
    assert "No gold score and no held-out score were measured" in text_of(write_report(run))


def test_a_run_without_a_reference_has_no_panel_of_the_kl(tmp_path: Path):
    for name, more in (("with", {"policy/kl": 0.1}), ("without", {})):
        rows = [{"step": i, "reward/mean": i / 9, **more} for i in range(9)]
        fake.write_rows(tmp_path / name / "metrics.jsonl", rows)
    assert "KL to the start" in text_of(write_report(tmp_path / "with"))
    page = text_of(write_report(tmp_path / "without"))
    assert "Proxy reward" in page
    assert "KL to the start" not in page


def test_evaluation_without_summary_or_partner(tmp_path: Path):
    run = tmp_path / "only"
    row = {"env": "echo", "policy": "only", "decoding": "greedy", "seed": 1, "return": 0.5}
    fake.write_rows(run / "evaluation" / "only" / "episodes.jsonl", [row])
    report = write_report(run)
    page = text_of(report)
    assert "0.500" in page
    assert "no interval: 1 unit, an interval needs 5" in page
    # The reason wraps; in one line it would widen the column beyond the page.
    assert '<span class="interval missing">no interval' in report.read_text()


def test_summary_without_episodes(tmp_path: Path):
    folder = tmp_path / "rm" / "evaluation" / "pairs"
    folder.mkdir(parents=True)
    metrics = {"accuracy": {"mean": 0.7, "low": 0.66, "high": 0.74, "n": 500}}
    summary = {"name": "pairs", "episodes": 500, "metrics": metrics}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "[0.660, 0.740]" in text_of(write_report(tmp_path / "rm"))


def test_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run directory"):
        write_report(tmp_path)


def test_pipeline_page_compares_trained_policies_with_each_other(whole: Path):
    page = text_of(write_report(whole))
    assert "PPO is better than DPO on these episodes" in page
    assert "<small>from SFT, 95%</small>" in page
    assert "<small>from PPO, 95%</small>" in page
    with (whole / "report_tables" / "differences.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "return"]
    assert [row["difference"] for row in rows] == ["ppo − sft", "dpo − sft", "dpo − ppo"]


def _edit(folder: Path, change) -> None:
    rows = [
        json.loads(line)
        for line in (folder / "episodes.jsonl").read_text().rstrip("\n").split("\n")
    ]
    fake.write_rows(folder / "episodes.jsonl", [change(i, row) for i, row in enumerate(rows)])


def test_page_of_policies_that_share_no_episode_is_drawn(tmp_path: Path):
    root = fake.write_pipeline(tmp_path / "run")
    for k, name in enumerate(("ppo", "dpo")):
        folder = root / "evaluate" / "evaluation" / name
        _edit(folder, lambda i, row, k=k: {**row, "seed": 1000 * (k + 1) + i})
    page = text_of(write_report(root))
    assert "Not compared: PPO and SFT share no evaluation seed" in page
    assert "is better than" not in page.split('id="transcripts"')[0].replace("Better than", "")


def test_old_summaries_that_counted_episodes_are_made_anew(tmp_path: Path):
    """0.1.0 took 128 episodes on 4 prompts for 128 units."""
    root = fake.write_pipeline(tmp_path / "run")
    folder = root / "evaluate" / "evaluation" / "sft"
    _edit(folder, lambda i, row: {**row, "env": "prompts", "return": float(i % 4 == 0)})
    summary = json.loads((folder / "summary.json").read_text())
    wrong = {"mean": 0.25, "low": 0.18, "high": 0.33, "n": 128}
    summary |= {"env": "prompts", "metrics": {"return": wrong, "pass@2": wrong}}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report(root)
    with (root / "report_tables" / "evaluations.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["policy"] == "sft"]
    _, low, high = (float(row[key]) for key in ("return", "return low", "return high"))
    # One of about four prompts: exact mid-p bounds, not those of 128 episodes.
    assert low < 0.03
    assert high > 0.7
    assert (row["pass@2"], row["pass@2 low"]) == ("0.25", "")
