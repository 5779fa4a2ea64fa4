from pathlib import Path

import pytest

from benchmarks.__main__ import expand_workload_names
from benchmarks.results import (
    append_result,
    describe_measurement,
    machine_name,
    newest_results,
    read_results,
)
from benchmarks.table import BEGIN, END, write_page
from benchmarks.texts import decreasing_density_lengths, lognormal_lengths
from benchmarks.workloads import WORKLOADS
from rlhf.common.imports import import_object
from rlhf.errors import UserError


def result(workload: str, seconds: float, **more) -> dict:
    sides = {
        side: {
            "label": spec.label,
            "seconds": seconds * (1 + place),
            "rate": 100.0,
            "peak_gib": 1.5,
            "kept": 10,
            "dropped": 2,
        }
        for place, (side, spec) in enumerate(WORKLOADS[workload].sides.items())
    }
    ratio = {"speed": 2.5, "quartiles": [2.0, 3.0], "pairs": 9}
    ratios = {side: ratio for side in list(sides)[1:]}
    row = {"workload": workload, "unit": "real tokens", "sides": sides, "ratios": ratios}
    return {**describe_measurement(), **row, "partial": False, **more}


def test_the_newest_whole_result_of_a_workload_counts(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    for row in (result("sft", 1.0), result("sft", 2.0), result("sft", 3.0, partial=True)):
        append_result(path, row)
    ((machine, found),) = newest_results(read_results(path)).items()
    assert machine == machine_name(describe_measurement())
    assert found["sft"]["sides"]["ours"]["seconds"] == 2.0


def test_machines_do_not_replace_each_other_and_the_last_one_stands_first(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    old, new = ({**describe_measurement()["machine"], "processor": name} for name in ("old", "new"))
    rows = (result("sft", 1.0, machine=old), result("sft", 2.0, machine=new))
    for row in (*rows, result("dpo", 3.0, machine=old), result("dpo", 4.0, machine=new)):
        append_result(path, row)
    found = newest_results(read_results(path))
    seconds = [
        [found[machine][name]["sides"]["ours"]["seconds"] for name in ("sft", "dpo")]
        for machine in found
    ]
    assert [machine.split(",")[0] for machine in found] == ["new", "old"]
    assert seconds == [[2.0, 4.0], [1.0, 3.0]]


def test_the_page_keeps_what_stands_around_the_results(tmp_path: Path):
    page, picture = tmp_path / "page.md", tmp_path / "images" / "picture.png"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    row = {"environment": "text/Echo-v0", "raw steps/s": 5}
    found = {"sft": result("sft", 1.5), "environments": {**describe_measurement(), "rows": [row]}}
    results = {"one machine": found, "another": {"dpo": result("dpo", 1.0)}}
    for _ in range(2):
        write_page(results, page=page, picture=picture)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (
        "| TRL tuned | 4.5 | 100 real tokens | 1.5 | 2.50× [2.00, 3.00] | ≥ 2.5× | 9, 2 |" in text
    )
    assert "| text/Echo-v0 | 5 |" in text
    assert text.index("### one machine") < text.index("text/Echo-v0") < text.index("### another")
    assert 0 < picture.stat().st_size < 200_000
    page.write_text("no marks")
    with pytest.raises(UserError, match="around the results"):
        write_page(results, page=page, picture=picture)


def test_names_groups_and_all():
    assert expand_workload_names(["startup", "startup-help"])[0] == "startup-help"
    assert len(expand_workload_names(["startup", "startup-help"])) == 3
    assert expand_workload_names(["all"]) == list(WORKLOADS)
    with pytest.raises(UserError, match="decoding"):
        expand_workload_names(["decodng"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_function_in_the_table_is_there(name: str):
    row = WORKLOADS[name]
    paths = [row.prepare, row.check, row.measure]
    paths += [side.run for side in row.sides.values() if side.venv != "trl-ppo"]
    for path in filter(None, paths):
        assert callable(import_object(path))


def test_lengths():
    assert sum(lognormal_lengths(8, 800)) == pytest.approx(800, abs=4)
    lengths = decreasing_density_lengths(64, most=96)
    assert sum(lengths) / 64 == pytest.approx(32, rel=0.02)
    assert max(lengths) > 85
