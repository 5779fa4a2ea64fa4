"""Sweeps: the table is that of the runs, its order is that of the goal, mistakes are one line."""

from __future__ import annotations

import csv
import json
import re
from html import unescape

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.config.load import assemble_tree_and_load_plugins, build_config
from rlhf.config.sweep import SweepConfig
from rlhf.errors import UserError
from rlhf.studies.sweep.run import (
    Setting,
    last_metric_value,
    make_sweep,
    read_setting_results,
    result_lines,
    write_result,
)
from tests.helpers.sweep import write_sweep
from tests.helpers.training import unknown_entries


def write_metrics(sweep, values):
    """Write the metric of each run: values[setting index][seed index]."""
    for setting, numbers in zip(sweep.settings, values, strict=True):
        for seed, number in zip(sweep.config.seeds, numbers, strict=True):
            folder = sweep.run_path(setting, seed)
            folder.mkdir(parents=True)
            rows = [{"step": 0, "eval/return": 9.0}, {"step": 2, "eval/return": number}]
            rows.append({"step": 2, "train/loss": 1.0})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "metrics.jsonl").write_text(text)


def made(path, **changes):
    tree = yaml.safe_load(path.read_text()) | changes
    return make_sweep(build_config(SweepConfig, tree), COMMANDS)


@pytest.mark.parametrize(("goal", "order"), [("maximize", [1, 2, 0]), ("minimize", [0, 2, 1])])
def test_settings_are_ordered_by_the_mean_of_their_last_values(tmp_path, goal, order):
    grid = {"optimizer.learning_rate": [1e-3, 1e-2, 1e-1]}
    sweep = made(write_sweep(tmp_path, grid=grid), goal=goal)
    write_metrics(sweep, [[0.0, 0.2], [1.0, 0.6], [0.5, 0.3]])
    ranked = read_setting_results(sweep)
    assert [r.setting.values for r in ranked] == [sweep.settings[i].values for i in order]
    assert ranked[order.index(1)].values == [1.0, 0.6]


def test_every_combination_has_a_folder_that_does_not_change_when_the_grid_grows(tmp_path):
    grid = {"optimizer.learning_rate": [1e-3, 1e-2], "algorithm.kl_coef": [0.0, 0.1]}
    path = write_sweep(tmp_path, grid=grid)
    names = {setting.name for setting in made(path).settings}
    assert len(names) == 4
    grid["optimizer.learning_rate"].insert(0, 0.5)
    assert names < {setting.name for setting in made(path, grid=grid).settings}
    strange = {"env.kwargs": {"text": "../../x y"}, "model.path": "/a/b"}
    assert "/" not in Setting(strange).name
    assert Setting({"a": "x/y"}).name != Setting({"a": "x_y"}).name
    assert len(Setting({"a": "x" * 500}).name) < 100


@pytest.mark.slow
def test_a_sweep_runs_every_setting_and_seed_and_writes_the_table_of_its_runs(tmp_path, capsys):
    path = write_sweep(tmp_path)
    assert main(["sweep", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 runs: 2 settings x 2 seeds" in shown
    assert "steps: 2" in shown
    assert not (tmp_path / "out").exists()
    assert main(["sweep", str(path), "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "highest mean eval/return" in shown
    assert "biased toward better values" in shown
    assert not unknown_entries(tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/tables/runs.csv").open()))
    assert {(row["optimizer.learning_rate"], row["seed"]) for row in rows} == {
        (rate, seed) for rate in ("0.001", "0.01") for seed in "01"
    }
    sweep = made(path)
    for row in rows:
        setting = next(
            s
            for s in sweep.settings
            if s.values["optimizer.learning_rate"] == float(row["optimizer.learning_rate"])
        )
        logged = (sweep.run_path(setting, int(row["seed"])) / "metrics.jsonl").read_text()
        last = [json.loads(line) for line in logged.splitlines() if "eval/return" in line][-1]
        assert float(row["eval/return"]) == last["eval/return"]
    page = (tmp_path / "out/report.html").read_text()
    assert "eval/return" in page
    # Another metric needs no new runs, and a new seed only its own.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/runs").rglob("finished")}
    arguments = ["--resume", "--metric", "rollout/tokens", "--seeds", "[0, 1, 2]"]
    assert main(["sweep", str(path), *arguments]) == 0
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/runs").rglob("finished")}
    assert before.items() <= after.items()
    assert len(after) == 6


def test_base_files_are_part_of_the_recorded_sweep(tmp_path):
    path = write_sweep(tmp_path)
    tree = yaml.safe_load(path.read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree["run"] | {"num_steps": 7, "seed": 5}))
    sweep = made(path, base=[str(tmp_path / "base.yaml")], run={"episodes_per_step": 16})
    first = sweep.run_config_tree(sweep.settings[0], 1)
    assert (first["num_steps"], first["episodes_per_step"], first["seed"]) == (7, 16, 1)
    assert sweep.config.base == []
    assert sweep.config.run["num_steps"] == 7


def test_the_last_value_of_a_metric_counts_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/loss": 2.0}\n{"step": 2}\n')
    assert last_metric_value(tmp_path, "eval/loss") == 2.0
    with pytest.raises(UserError, match=r"logged no 'eval/los'; did you mean 'eval/loss'"):
        last_metric_value(tmp_path, "eval/los")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": {}}, "grid: there are no entries"),
        ({"grid": {"num_steps": []}}, "grid.num_steps: there are no values"),
        ({"grid": {"num_steps": [2, 2]}}, "grid.num_steps: a value occurs twice"),
        (
            {"grid": {"optimizer": [{"learning_rate": 0.1}], "optimizer.learning_rate": [0.2]}},
            "grid.optimizer contains grid.optimizer.learning_rate: remove one of them",
        ),
        (
            {"grid": {"optimizer.learning_rate": [1e-3, "0.001"]}},
            "optimizer.learning_rate = 0.001 and optimizer.learning_rate = '0.001' are the same",
        ),
        ({"grid": {"seed": [1, 2]}}, "seed is set by the sweep: use `seeds`"),
        ({"grid": {"num_stepz": [2]}}, "rloo with num_stepz = 2: unknown key 'num_stepz'"),
        ({"grid": {"num_steps": ["x"]}}, "rloo with num_steps = 'x'"),
        ({"grid": {"algorithm.lam": [1.0, 0.5]}}, "algorithm.lam = 1.0: lam has no effect with"),
        ({"grid": {"critic": ["separate"]}}, "critic has no effect with rloo"),
        ({"run": {"output_dir": "x"}}, "output_dir is set by the sweep"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"run_command": "rlo"}, "unknown command 'rlo'; did you mean 'rloo'"),
        ({"run_command": "bench"}, "'bench' cannot be swept"),
        ({"run_command": "report"}, "'report' cannot be swept"),
        ({"run_command": "split"}, "split"),
        ({"base": ["nowhere.yaml"]}, "nowhere.yaml does not exist"),
        ({"goal": "best"}, "goal"),
        ({"metric": " "}, "metric: give the name of a logged metric"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, capsys, changes, words):
    path = write_sweep(tmp_path, **changes)
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_metric_that_no_run_logged_loses_no_run(tmp_path, capsys):
    path = write_sweep(tmp_path, metric="eval/retrun", seeds=[0])
    assert main(["sweep", str(path)]) == 2
    assert "did you mean 'eval/return'" in capsys.readouterr().err
    assert main(["sweep", str(path), "--resume", "--metric", "eval/return"]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_a_setting_with_a_last_value_that_is_not_finite_is_last(tmp_path, goal, value):
    grid = {"optimizer.learning_rate": [1e-3, 1e-2, 1e-1]}
    sweep = made(write_sweep(tmp_path, grid=grid), goal=goal)
    write_metrics(sweep, [[0.0, value], [1.0, 0.6], [0.5, 0.3]])
    ranked = read_setting_results(sweep)
    assert ranked[-1].setting.values == {"optimizer.learning_rate": 1e-3}
    lines = result_lines(sweep.config, ranked)
    best = "0.01" if goal == "maximize" else "0.1"
    assert lines[0].endswith(f"with optimizer.learning_rate = {best}")
    assert lines[1] == "1 of 3 settings are last: a value is not finite"
    write_result(sweep, ranked)
    rows = list(csv.DictReader((tmp_path / "out/tables/settings.csv").open()))
    assert rows[-1]["optimizer.learning_rate"] == "0.001"
    assert rows[-1]["eval/return"] in ("", "nan")


def test_a_sweep_without_a_finite_value_names_no_best_setting(tmp_path):
    sweep = made(write_sweep(tmp_path))
    write_metrics(sweep, [[1.0, float("nan")], [float("nan"), 2.0]])
    lines = result_lines(sweep.config, read_setting_results(sweep))
    assert lines == ["no setting has a finite eval/return with every seed"]


def test_a_later_key_of_the_grid_does_not_change_an_earlier_value():
    value = {"a": 1}
    assert assemble_tree_and_load_plugins([], [("x", value), ("x.a", 2)]) == {"x": {"a": 2}}
    assert value == {"a": 1}


def plot_of(page):
    """Points and chosen axes of the plot of a page."""
    text = unescape(re.search(r'data-scatter="([^"]*)"', page)[1])
    chosen = dict(re.findall(r'data-axis="(.)">.*?value="([^"]*)" selected', page))
    return json.loads(text)["points"], chosen


def test_the_plot_shows_reward_against_kl_first_and_can_show_every_metric(tmp_path):
    sweep = made(write_sweep(tmp_path))
    write_metrics(sweep, [[0.0, 0.2], [1.0, float("inf")]])
    write_result(sweep, read_setting_results(sweep))
    points, chosen = plot_of((tmp_path / "out/report.html").read_text())
    assert chosen == {"x": "optimizer.learning_rate", "y": "eval/return"}
    assert len(points) == 4
    assert sorted(p["values"].get("eval/return", -1) for p in points) == [-1, 0.0, 0.2, 1.0]
    for setting in sweep.settings:
        for seed in sweep.config.seeds:
            with (sweep.run_path(setting, seed) / "metrics.jsonl").open("a") as file:
                row = {"step": 3, "reward/mean": 0.5, "policy/kl": 2.0 + seed}
                file.write(json.dumps(row) + "\n")
    write_result(sweep, read_setting_results(sweep))
    points, chosen = plot_of((tmp_path / "out/report.html").read_text())
    assert chosen == {"x": "policy/kl", "y": "reward/mean"}
    assert {p["values"]["policy/kl"] for p in points} == {2.0, 3.0}
    rows = list(csv.DictReader((tmp_path / "out/tables/metrics.csv").open()))
    assert [float(row["train/loss"]) for row in rows] == [1.0] * 4
