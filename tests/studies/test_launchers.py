"""The launchers: the same runs from each, in the order of dependencies, stopped and continued."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.config.launcher import LauncherConfig
from rlhf.errors import UserError
from rlhf.runs.interrupt import Interrupted
from rlhf.studies.jobs import Interruption, Job
from rlhf.studies.launchers.base import JobQueue
from rlhf.studies.launchers.slurm import (
    SlurmLauncher,
    _task_error,
    _write_configs_and_make_job_script,
)
from rlhf.studies.launchers.worker import run_job_and_return_error
from tests.helpers.sweep import write_sweep

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

FAKE_SBATCH = """\
#!/bin/sh
# Run the tasks of an array one after another, as a cluster with one machine would.
for script; do case "$script" in
    --chdir=*) folder="${script#*=}" ;;
    --output=*) output="${script#*=}" ;;
    --array=*) count=$(echo "$script" | sed 's/.*=1-\\([0-9]*\\).*/\\1/') ;;
esac; done
echo "$*" >> "$FAKE_SLURM/calls"
printf '%s\\n' "$@" > "$FAKE_SLURM/options"
sleep "${FAKE_DELAY:-0}"
echo 17
echo $$ > "$FAKE_SLURM/pid"
cd "$folder" || exit 1
for task in $(seq "$count"); do
    test -e "$FAKE_SLURM/canceled" && exit 1
    log=$(echo "$output" | sed "s/%a.log$/$task.log/; s/%%/%/g")
    SLURM_ARRAY_TASK_ID=$task sh "$script" > "$log" 2>&1 &
    echo $! > "$FAKE_SLURM/task"
    wait $!
done
"""

FAKE_SCANCEL = """\
#!/bin/sh
echo "$*" >> "$FAKE_SLURM/canceled"
case "$*" in *RUNNING*) ;; *) exit 0 ;; esac
task=$(cat "$FAKE_SLURM/task")
kill -TERM $(pgrep -P "$task") "$task"
"""


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Programs called sbatch and scancel, which run the tasks of an array on this machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("scancel", FAKE_SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


def table(folder: Path, name: str = "runs") -> str:
    return (folder / "out/tables" / f"{name}.csv").read_text()


def job(key: str, after: str | None = None) -> Job:
    return Job(key, (), after)


def test_a_queue_gives_jobs_after_their_dependencies_and_fails_those_of_failed_jobs():
    queue = JobQueue([job("a"), job("b"), job("c", "a"), job("d", "c"), job("e", "outside")])
    assert [j.key for j in queue.take_ready(2)] == ["a", "b"]
    assert [j.key for j in queue.take_ready()] == ["e"]
    assert queue.take_ready() == []
    queue.record_end("b", None)
    assert queue.take_ready() == []
    assert queue.num_ended == 1
    queue.record_end("a", "too hot")
    assert queue.failed == {"a": "too hot", "c": "a failed", "d": "c failed"}
    assert (queue.waiting, queue.num_ended) == ({}, 4)


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (UserError("it diverged"), "it diverged", str),
        (Interrupted("stopped by SIGTERM", 15), "stopped by SIGTERM", Interruption),
        (OSError(errno.ENOSPC, "", "a.pt"), "a.pt: the disk is full; free space", Interruption),
    ],
)
def test_a_job_that_was_stopped_from_outside_is_told_from_one_that_failed(error, text, kind):
    class Commands:
        def run_command(self, command, tree):
            raise error

    message = run_job_and_return_error(Job("a", (("ppo", {}),)), Commands())  # type: ignore[arg-type]
    assert (message, type(message)) == (text, kind)
    assert type(pickle.loads(pickle.dumps(message))) is kind


@pytest.mark.parametrize(("code", "kind"), [(2, str), (130, Interruption), (143, Interruption)])
def test_a_task_of_slurm_that_a_signal_stopped_has_not_failed(tmp_path, code, kind):
    (tmp_path / "1.exit").write_text(f"{code}\n")
    (tmp_path / "1.log").write_text("rlhf: the last line\n")
    assert type(_task_error(tmp_path, 1)) is kind


@pytest.mark.parametrize("seed", range(3))
def test_a_queue_runs_every_job_of_a_random_forest_once(seed):
    rng = random.Random(seed)
    print("seed", seed)
    jobs = [job("0")]
    for number in range(1, 30):
        jobs.append(job(str(number), rng.choice([None, str(rng.randrange(number))])))
    queue, ended, running = JobQueue(jobs), [], []
    while queue.waiting or running:
        running += queue.take_ready(rng.randrange(4))
        if running:
            chosen = running.pop(rng.randrange(len(running)))
            assert chosen.after is None or chosen.after in ended
            queue.record_end(chosen.key, None)
            ended.append(chosen.key)
    assert sorted(ended, key=int) == [str(number) for number in range(30)]
    assert queue.num_ended == 30


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gpus_per_job": 1}, "gpus_per_job has no effect with the launcher local"),
        ({"sbatch_options": ["--time=1"], "launcher": "ray"}, "used by slurm"),
        ({"ray_address": "auto", "launcher": "slurm"}, "used by ray"),
        ({"sbatch_options": ["time=1"], "launcher": "slurm"}, "'time=1' is not an option"),
        ({"sbatch_options": ["--array=1-4"], "launcher": "slurm"}, "--array is set by"),
    ],
)
def test_options_without_effect_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        LauncherConfig(**keys)


def test_slurm_runs_a_sweep_as_one_array_with_the_results_of_local_processes(
    tmp_path, fake_slurm, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    here = write_sweep(tmp_path / "here")
    assert main(["sweep", str(here), "--jobs", "2"]) == 0
    there = write_sweep(tmp_path / "there", output_dir="there/out")  # a relative path
    arguments = ["--launcher", "slurm", "--jobs", "3", "--sbatch-options", "[--time=1:00:00]"]
    assert main(["sweep", str(there), *arguments]) == 0
    assert table(tmp_path / "here") == table(tmp_path / "there")
    options = (fake_slurm / "options").read_text().splitlines()
    assert "--array=1-4%3" in options
    assert options[-2] == "--time=1:00:00"
    assert len((fake_slurm / "calls").read_text().splitlines()) == 1
    codes = [path.read_text() for path in (tmp_path / "there/out/logs/slurm-1").glob("*.exit")]
    assert codes == ["0\n"] * 4
    script = tmp_path / "there/out/logs/slurm-1/1.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert not list((tmp_path / "there").rglob("step-*"))


def test_a_failed_task_of_slurm_is_named_with_its_last_line_and_the_others_are_kept(
    tmp_path, fake_slurm, capsys
):
    path = write_sweep(tmp_path / "s", grid={"rollout.max_tokens": [8, 96]})
    assert main(["sweep", str(path), "--launcher", "slurm"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "limited to 8 tokens" in line
    assert "(and 1 more job failed)" in line
    assert len(list((tmp_path / "s/out/runs").rglob("finished"))) == 2


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_the_logs_are_kept_if_every_job_fails(tmp_path, fake_slurm, capsys, launcher):
    path = write_sweep(tmp_path / "s", grid={"rollout.max_tokens": [8]}, seeds=[0])
    assert main(["sweep", str(path), "--launcher", launcher]) == 2
    assert "limited to 8 tokens" in capsys.readouterr().err.splitlines()[-1]
    assert [log for log in (tmp_path / "s/out/logs").rglob("*.log") if log.stat().st_size]
    finished = tmp_path / "t/sweep.yaml"
    write_sweep(tmp_path / "t", output_dir=str(tmp_path / "s/out"), seeds=[0])
    assert main(["sweep", str(finished), "--overwrite"]) == 0
    assert main(["sweep", str(path), "--launcher", launcher, "--overwrite"]) == 2
    assert table(tmp_path / "s").count("0.01") == 1  # the earlier sweep is restored


def test_slurm_receives_paths_with_special_characters(tmp_path, fake_slurm, monkeypatch):
    folder = tmp_path / "a %j # 'b' \"c\" $d"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = write_sweep(folder / "s", output_dir="x %a'\" #1", seeds=[0])
    assert main(["sweep", str(path), "--launcher", "slurm"]) == 0
    logs = folder / "x %a'\" #1/logs/slurm-1"
    assert (logs / "1.log").read_text()
    assert f"--chdir={folder}" in (fake_slurm / "options").read_text().splitlines()
    subprocess.run(["sh", "-n", str(logs / "array.sh")], check=True)


def test_a_signal_while_sbatch_submits_cancels_the_array(tmp_path, fake_slurm):
    path = write_sweep(tmp_path / "s", seeds=[0])
    command = [sys.executable, "-m", "rlhf", "sweep", str(path), "--launcher", "slurm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FAKE_DELAY": "2"}
    process = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    while not (fake_slurm / "options").exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert "17" in (fake_slurm / "canceled").read_text()


def test_slurm_without_its_commands_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    path = write_sweep(tmp_path / "s")
    assert main(["sweep", str(path), "--launcher", "slurm"]) == 2
    assert "--launcher slurm needs sbatch" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_a_signal_saves_the_running_job_and_resume_gives_the_same_table(
    tmp_path, fake_slurm, launcher
):
    if launcher == "ray":
        pytest.importorskip("ray")
    changes = {"grid": {"optimizer.learning_rate": [1e-3]}, "seeds": [0]}
    whole = write_sweep(tmp_path / "whole", **changes)
    tree = yaml.safe_load(whole.read_text())
    tree["run"] |= {"num_steps": 60, "save_every": 60, "evaluation": {"every": 60, "episodes": 4}}
    whole.write_text(yaml.safe_dump(tree))
    assert main(["sweep", str(whole)]) == 0
    stopped = tmp_path / "stopped/sweep.yaml"
    stopped.parent.mkdir()
    stopped.write_text(yaml.safe_dump(tree | {"output_dir": str(tmp_path / "stopped/out")}))
    command = [sys.executable, "-m", "rlhf", "sweep", str(stopped), "--launcher", launcher]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    while not (logs := list(tmp_path.rglob("stopped/out/runs/**/metrics.jsonl"))):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert "stopped by SIGTERM; continue with --resume" in errors.splitlines()[-1]
    steps = len(logs[0].read_text().splitlines())
    assert steps < 60
    assert [p.name for p in logs[0].parent.glob("checkpoints/step-*")] == [f"step-{steps}"]
    (fake_slurm / "canceled").unlink(missing_ok=True)
    assert main(["sweep", str(stopped), "--resume", "--launcher", launcher]) == 0
    assert table(tmp_path / "whole") == table(tmp_path / "stopped")


def test_ray_runs_a_sweep_with_the_result_of_local_processes(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    here = write_sweep(tmp_path / "here")
    assert main(["sweep", str(here)]) == 0
    there = write_sweep(tmp_path / "there", output_dir="there/out")
    assert main(["sweep", str(there), "--launcher", "ray", "--jobs", "2"]) == 0
    assert table(tmp_path / "here") == table(tmp_path / "there")


def test_a_job_of_ray_that_fails_or_whose_process_dies_is_named(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    (tmp_path / "deadly_reward.py").write_text(
        "import os, signal\n\n\ndef reward(*_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = write_sweep(
        tmp_path / "dies",
        grid={"rewards": [[{"kind": "function", "path": "deadly_reward:reward"}]]},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["sweep", str(path), "--launcher", "ray"]) == 2
    assert "its process ended" in capsys.readouterr().err.splitlines()[-1]
    path = write_sweep(tmp_path / "fails", grid={"rollout.max_tokens": [8]}, seeds=[0])
    assert main(["sweep", str(path), "--launcher", "ray"]) == 2
    assert "limited to 8 tokens" in capsys.readouterr().err.splitlines()[-1]
    assert main(["sweep", str(path), "--launcher", "ray", "--resume", "--gpus-per-job", "99"]) == 2
    assert "no machine of the Ray cluster has 1 CPUs and 99 GPUs" in capsys.readouterr().err
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    arguments = ["--launcher", "ray", "--resume", "--ray-address", address]
    assert main(["sweep", str(path), *arguments]) == 2
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False], ids=["all processes", "the shell only"])
def test_a_task_waits_for_the_checkpoint_of_its_command_after_a_signal(
    tmp_path, monkeypatch, whole
):
    """`scancel --full` signals all processes, `--signal=B:TERM@120` only the shell of the task."""
    command = tmp_path / "command"
    command.write_text(
        f"#!/bin/sh\ntrap 'sleep 1; touch {tmp_path}/saved; exit 143' TERM\n"
        f"touch {tmp_path}/started\nwhile :; do sleep 0.1; done\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    launcher = SlurmLauncher(LauncherConfig(launcher="slurm"), COMMANDS, tmp_path / "it's a study")
    stages = (("rloo", {"output_dir": str(tmp_path / "out")}), ("ppo", {"output_dir": "never"}))
    folder, _ = launcher._write_array_scripts([Job("a", stages)])
    process = subprocess.Popen(["sh", str(folder / "array.sh")], start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    (os.killpg if whole else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (tmp_path / "saved").exists()
    assert (folder / "1.exit").read_text() == "143\n"


def test_a_task_runs_its_stages_in_order_and_removes_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "echo")
    (tmp_path / "a b/checkpoints").mkdir(parents=True)
    stages = (("sft", {"output_dir": str(tmp_path / "a b")}), ("ppo", {"output_dir": "o"}))
    script = tmp_path / "1.sh"
    script.write_text(_write_configs_and_make_job_script(tmp_path, 1, Job("a", stages)))
    text = subprocess.run(["sh", str(script)], check=True, capture_output=True, text=True).stdout
    assert [line.split()[2] for line in text.splitlines()] == ["sft", "ppo"]
    assert not (tmp_path / "a b/checkpoints").exists()
