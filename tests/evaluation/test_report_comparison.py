"""Comparison pages: bands over seeds, one name and color a method, what is folded, transcripts."""

import csv
import re
from pathlib import Path

import pytest
import yaml

from rlhf.evaluation.records import read_run
from rlhf.reports import write_comparison_report
from rlhf.reports.comparison_page import mean_metric_curve_over_runs
from tests.evaluation import fake_pipeline as fake


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_band_keeps_to_the_steps_of_every_seed(tmp_path: Path):
    runs = []
    for seed in range(5):
        rows = [{"step": i, "reward/mean": float(seed + i)} for i in range(3 + 2 * (seed > 0))]
        fake.write_rows(tmp_path / f"seed{seed}" / "metrics.jsonl", rows)
        runs.append(read_run(tmp_path / f"seed{seed}"))
    steps, band = mean_metric_curve_over_runs(runs, "reward/mean")
    assert steps == [0, 1, 2]
    assert [e.value for e in band] == [2, 3, 4]
    # seeds 0 to 4: half width t(.975, 4) * sqrt(2.5 / 5)
    assert band[0].high == pytest.approx(2 + 2.776445 * 0.5**0.5, abs=1e-5)
    assert "4 units" in mean_metric_curve_over_runs(runs[:4], "reward/mean")[1][0].needs


def test_comparison_page_bands_and_diffs(tmp_path: Path):
    runs = []
    for seed in range(5):
        pipeline = fake.write_pipeline(tmp_path / f"seed{seed}", seed=seed)
        runs.append(pipeline)
    page = text_of(write_comparison_report(runs, tmp_path / "compare.html"))
    assert "PPO is significantly better than SFT (95%, 5 training seeds)" in page
    assert 'class="band' in page
    with (tmp_path / "compare_tables" / "configs.csv").open() as file:
        changed = {row["key"]: (row["sft"], row["ppo"]) for row in csv.DictReader(file)}
    assert changed["env.id"] == ("", fake.ENV)
    assert "seed" not in changed
    with (tmp_path / "compare_tables" / "metrics.csv").open() as file:
        ended = {row["metric"]: row for row in csv.DictReader(file)}
    assert float(ended["kl/coef"]["ppo"]) == pytest.approx(0.05)
    assert ended["kl/coef"]["sft"] == ""
    assert ended["reward/mean"]["ppo n"] == "5"


def five_pipelines(root: Path) -> list[Path]:
    return [fake.write_pipeline(root / f"seed{seed}", seed=seed) for seed in range(5)]


def test_comparison_page_calls_one_arm_by_one_name(tmp_path: Path):
    page = text_of(write_comparison_report(five_pipelines(tmp_path), tmp_path / "compare.html"))
    tiles = re.findall(r"<li class=\"\w+\"><b>(\w+)</b><span>5 runs</span>", page)
    assert tiles[:3] == ["SFT", "PPO", "DPO"]
    assert "evaluate" not in tiles
    with (tmp_path / "compare_tables" / "evaluations.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["return"]]
    assert {(row["policy"], row["training seed"]) for row in rows} >= {
        ("ppo", "4"),
        ("sft", "0"),
        ("random", ""),
    }
    assert len(rows) == 3 * 5 + 2


def test_comparison_page_tells_in_words_what_never_moved(tmp_path: Path):
    steps = range(1, 6)
    for name, level in (("ppo", 0.1), ("rloo", 0.3)):
        rows = [
            {"step": i, "reward/mean": i * level, "kl/coef": level, "rollout/length_limited": 0.0}
            for i in steps
        ]
        for seed in range(3):
            fake.write_rows(tmp_path / name / f"seed{seed}" / "metrics.jsonl", rows)
    runs = [tmp_path / name / f"seed{s}" for name in ("ppo", "rloo") for s in range(3)]
    page = text_of(write_comparison_report(runs, tmp_path / "compare.html"))
    assert "Constant: kl/coef 0.1 (PPO), 0.3 (RLOO); rollout/length_limited 0." in page
    assert page.count("<svg") == 1


def test_comparison_page_shows_the_same_episode_under_every_arm(tmp_path: Path):
    page = text_of(write_comparison_report(five_pipelines(tmp_path), tmp_path / "compare.html"))
    cards = page[page.index('<details class="fold"><summary>Held-out episodes') :]
    assert cards.count('<article class="case">') == 4
    first = cards[: cards.index("</article>")]
    assert re.findall(r"<h4>(\w+) <span>return", first) == ["SFT", "PPO", "DPO"]


def test_configured_values_are_yaml(tmp_path: Path):
    runs = []
    for name, rewards in (("a", [{"kind": "learned", "name": "proxy", "fit": True}]), ("b", [])):
        config = {"rewards": rewards, "critic": None if rewards else "shared", "sep": "\n" + name}
        fake.write_rows(tmp_path / name / "metrics.jsonl", [{"step": 1, "reward/mean": 0.0}])
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        runs.append(tmp_path / name)
    write_comparison_report(runs, tmp_path / "compare.html")
    with (tmp_path / "compare_tables" / "configs.csv").open() as file:
        found = {row["key"]: (row["a"], row["b"]) for row in csv.DictReader(file)}
    assert found == {
        "rewards": ("[{kind: learned, name: proxy, fit: true}]", "[]"),
        "critic": ("", "shared"),
        "sep": ('"\\na"', '"\\nb"'),
    }
