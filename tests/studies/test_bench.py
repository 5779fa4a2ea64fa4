"""Whole benchmarks of tiny runs: killed, continued, refused, done job by job elsewhere."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.config.load import assemble_tree_and_load_plugins
from rlhf.errors import UserError
from rlhf.studies.bench.array import write_job_array
from rlhf.studies.bench.manifest import make_bench
from rlhf.studies.bench.run import run_bench, run_one_job
from rlhf.studies.jobs import lock_study_directory
from tests.helpers.bench import write_manifest
from tests.helpers.training import unknown_entries

ROOT = Path(__file__).resolve().parents[2]
ALL = 2 + 2 * 2 * (4 + 2)
"""Stages: references; by task and seed demonstrations, held-out ones, sft, evaluate, two runs."""


def start(manifest: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf", "bench", str(manifest), "--jobs", "2", "--resume"]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(manifest: Path) -> Path:
    process = start(manifest)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return manifest.parent / "out"


def finished(root: Path) -> set[str]:
    # os.walk passes over folders that vanish: checkpoints are renamed while it looks.
    walk = os.walk(root / "runs")
    return {str(Path(folder).relative_to(root)) for folder, _, names in walk if "finished" in names}


def kill_after(manifest: Path, stages: int) -> set[int]:
    """Kill -9 after so many stages were finished; returns its workers' process ids."""
    process, root = start(manifest), manifest.parent / "out"
    while len(finished(root)) < stages:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return {int(path.stem.rpartition("-")[2]) for path in (root / "logs").glob("*.log")}


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and was not collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.sweep
def test_a_killed_bench_continues_and_ends_with_the_same_table(tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    whole = finish(write_manifest(tmp_path / "whole"))
    assert len(finished(whole)) == ALL
    manifest = write_manifest(tmp_path / "killed")
    workers = set()
    for stages in (rng.randrange(3, 12), rng.randrange(14, 24)):
        workers |= kill_after(manifest, stages)
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers)), "workers outlived their benchmark"
    killed = finish(manifest)
    assert finished(killed) == finished(whole)
    assert not unknown_entries(killed)
    for name in ("bench.md", "tables/scores.csv", "tables/tables.json"):
        assert (killed / name).read_text() == (whole / name).read_text(), name
    # Done is done: what was finished is not made again.
    stamps = {p: p.stat().st_mtime_ns for p in killed.glob("runs/**/finished")}
    finish(manifest)
    assert stamps == {p: p.stat().st_mtime_ns for p in killed.glob("runs/**/finished")}


@pytest.mark.slow
def test_a_signal_to_the_benchmark_alone_saves_its_runs(tmp_path):
    manifest = write_manifest(tmp_path / "b")
    tree = yaml.safe_load(manifest.read_text())
    tree["run"] |= {"num_steps": 2000, "save_every": 2000}
    manifest.write_text(yaml.safe_dump(tree))
    process, root = start(manifest), tmp_path / "b/out"
    while len(logs := [p for p in root.glob("runs/*/*/*/metrics.jsonl") if is_online(p)]) < 2:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors.splitlines()[-1] == f"rlhf: stopped by SIGTERM; continue with --resume ({root})"
    for path in logs:
        steps = len(path.read_text().splitlines())
        assert [p.name for p in path.parent.glob("checkpoints/step-*")] == [f"step-{steps}"]


def is_online(log: Path) -> bool:
    """Whether a log of a PPO or RLOO run has a step."""
    return log.parent.name in ("ppo", "rloo") and bool(log.read_text())


def test_a_job_array_does_the_same_jobs_one_command_each(tmp_path, capsys):
    manifest = write_manifest(tmp_path / "b")
    assert main(["bench", str(manifest), "--array", str(tmp_path / "array")]) == 0
    assert str(tmp_path / "array" / "submit.sh") in capsys.readouterr().out
    lists = {n: (tmp_path / f"array/{n}.txt").read_text().splitlines() for n in ("start", "train")}
    assert [len(lines) for lines in lists.values()] == [2 + 4, 8]
    first = [line for line in lists["start"] if "echo/seed1" in line]
    second = [line for line in lists["train"] if "echo/seed1/rloo" in line]
    with pytest.raises(UserError, match=r"needs the result of echo/seed1/sft"):
        run_one_job(
            make_bench(assemble_tree_and_load_plugins([manifest], []), COMMANDS), "echo/seed1/rloo"
        )
    for line in (*first, *second):
        program, *arguments = shlex.split(line)
        assert program == "rlhf"
        assert main(arguments) == 0
    run = tmp_path / "b/out/runs/echo/seed1/rloo"
    assert json.loads((run / "evaluation/rloo/summary.json").read_text())["episodes"] == 8
    script = (tmp_path / "array/train.slurm").read_text()
    assert "#SBATCH --array=1-8" in script
    submit = (tmp_path / "array/submit.sh").read_text()
    assert "afterok:$first" in submit
    for script in ("submit.sh", "start.slurm", "train.slurm"):
        subprocess.run(["sh", "-n", str(tmp_path / "array" / script)], check=True)


def test_an_array_manifest_stands_for_the_same_bench(tmp_path):
    bench = make_bench(
        assemble_tree_and_load_plugins([write_manifest(tmp_path / "b")], []), COMMANDS
    )
    written = write_job_array(bench, tmp_path / "array")
    assert (
        make_bench(assemble_tree_and_load_plugins([written[0]], []), COMMANDS).jobs()
        == bench.jobs()
    )


def test_an_existing_directory_is_neither_continued_nor_replaced_unasked(tmp_path):
    tree = yaml.safe_load(write_manifest(tmp_path / "b").read_text())
    root = Path(tree["output_dir"])

    def opened(**keys):
        with lock_study_directory(
            root, "bench.yaml", make_bench(tree | keys, COMMANDS).config, COMMANDS
        ):
            (root / "bench.json").touch()

    opened()
    with pytest.raises(UserError, match="exists already"):
        opened()
    opened(resume=True)
    (root / "mine.txt").touch()
    opened(overwrite=True)
    written = sorted(path.name for path in root.iterdir() if path.name[0] != ".")
    assert written == ["bench.json", "bench.yaml", "mine.txt"]
    (root / ".rlhf").unlink()
    with pytest.raises(UserError, match="not a run directory"):
        opened(overwrite=True)
    assert (root / "bench.json").exists()


def test_a_resumed_bench_that_changed_is_refused_before_anything_is_written(tmp_path):
    manifest = write_manifest(tmp_path / "b")
    bench = make_bench(assemble_tree_and_load_plugins([manifest], []), COMMANDS)
    run_one_job(bench, "echo/reference")
    changed = make_bench(
        assemble_tree_and_load_plugins([manifest], [("episodes", 16), ("resume", True)]), COMMANDS
    )
    with pytest.raises(UserError, match=r"episodes was 8, now 16"):
        run_bench(changed)
    assert not (bench.root / "bench.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "zwei"], "jobs must be a valid integer, got 'zwei'"),
        (["--jobs", "0"], "jobs must be >= 1, got 0"),
        (["--against", "FOLDER"], "cannot be read"),
        (["--against", "WEIRD"], "is not a bench.json"),
        (["--against", "OTHERS"], "share 0 training seeds"),
        (["--environments.echo.env.id", "text/Nope-v0"], "Nope"),
        (["--model.scratch", "null", "--model.path", "./nowhere"], "unknown model './nowhere'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, capsys, arguments, words):
    files = {
        "FOLDER": None,
        "WEIRD": {"seeds": [0, 1], "scores": [1, 2]},
        "OTHERS": {"seeds": [7, 8, 9, 10, 11], "scores": {"ppo": {"echo": [0.0] * 5}}},
    }
    for name, tree in files.items():
        place = tmp_path / name
        place.mkdir() if tree is None else place.write_text(json.dumps(tree))
    given = [str(tmp_path / word) if word in files else word for word in arguments]
    manifest = write_manifest(tmp_path / "b")
    assert main(["bench", str(manifest), *given]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told
    assert "\n" not in told
    assert not (tmp_path / "b" / "out").exists()


def test_an_unknown_job_is_told_the_nearest(tmp_path):
    bench = make_bench(
        assemble_tree_and_load_plugins([write_manifest(tmp_path / "b")], []), COMMANDS
    )
    with pytest.raises(UserError, match=r"did you mean 'echo/seed1/rloo'"):
        run_one_job(bench, "echo/seed1/rlo")


def test_a_refused_run_does_not_stop_the_others(tmp_path):
    manifest = write_manifest(tmp_path / "b")
    tree = yaml.safe_load(manifest.read_text())
    tree |= {"seeds": [0], "environments": {"echo": tree["environments"]["echo"]}}
    # Room for the prompt, which fine-tuning never checks, and for no reply.
    tree["algorithms"]["rloo"] = {"run": {"rollout": {"max_tokens": 2}}}
    manifest.write_text(yaml.safe_dump(tree))
    bench = make_bench(assemble_tree_and_load_plugins([manifest], []), COMMANDS)
    with pytest.raises(UserError, match=r"echo/seed0/rloo: the prompt of seed .*--resume"):
        run_bench(bench)
    assert "runs/echo/seed0/ppo" in finished(tmp_path / "b/out")
