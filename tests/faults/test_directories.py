"""Two writers, a moved directory, changed inputs, missing files and a clock that jumps."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.runs.claim import DirectoryClaim
from rlhf.runs.inputs import fingerprint
from rlhf.training.online import OnlineTrainer
from tests.faults.process import check_failure, configuration, rlhf
from tests.helpers.training import assert_same_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, echo_model):
    """An undisturbed run, and one that SIGTERM stopped after three of its four steps."""
    root = tmp_path_factory.mktemp("directories")
    for name, fault, expected in (("whole", None, 0), ("cut", stop_at_third_step, 143)):
        config = configuration(root / name, echo_model)
        code, errors = rlhf("ppo", "--config", str(config), fault=fault)
        assert code == expected, errors
    return root


@pytest.fixture
def cut(runs, tmp_path):
    shutil.copytree(runs / "cut", tmp_path / "cut")
    return tmp_path / "cut"


def stop_at_third_step():
    original = OnlineTrainer.step

    def stop(self, step, run):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, run)

    OnlineTrainer.step = stop


def resume(config, run, **options):
    return rlhf("ppo", "--config", str(config), "--output_dir", str(run), "--resume", **options)


def test_a_moved_directory_continues(cut, runs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = cut.rename(tmp_path / "elsewhere/renamed")
    code, errors = resume(runs / "cut.yaml", moved)
    assert code == 0, errors
    assert_same_run(runs / "whole", moved)
    assert not cut.exists()


def test_the_second_writer_is_refused_and_the_first_ends(tmp_path, runs, echo_model):
    run, waits, goes = tmp_path / "run", tmp_path / "waits", tmp_path / "goes"
    config = configuration(run, echo_model)

    def pause():
        original = OnlineTrainer.step

        def wait(self, step, run):
            if step == 2:
                waits.touch()
                while not goes.exists():
                    time.sleep(0.01)
            return original(self, step, run)

        OnlineTrainer.step = wait

    first = os.fork()
    if first == 0:
        code = 99
        try:
            code, _ = rlhf("ppo", "--config", str(config), fault=pause)
        finally:
            os._exit(code)
    while not waits.exists():
        assert os.waitpid(first, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    for option in ("--resume", "--overwrite"):
        code, errors = rlhf("ppo", "--config", str(config), option)
        check_failure(run, code, errors, "is in use by process")
    goes.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    assert_same_run(runs / "whole", run)


def test_a_changed_model_is_refused_until_it_is_restored(tmp_path, runs, echo_model):
    model = tmp_path / "model"
    shutil.copytree(echo_model, model)
    run = tmp_path / "run"
    config = configuration(run, model)
    assert rlhf("ppo", "--config", str(config), fault=stop_at_third_step)[0] == 143
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    code, errors = resume(config, run)
    check_failure(run, code, errors, f"the content of model.path ({model}) has changed")
    weights.write_bytes(before)
    assert resume(config, run)[0] == 0
    assert_same_run(runs / "whole", run)


def test_a_checkpoint_without_any_of_its_files_is_not_used(cut, runs, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    names = sorted(path.name for path in (cut / "checkpoints/step-3").iterdir())
    assert len(names) > 4
    for name in random.Random(seed).sample(names, 3):
        run = tmp_path / name
        shutil.copytree(cut, run)
        (run / "checkpoints/step-3" / name).unlink()
        code, errors = resume(runs / "cut.yaml", run)
        assert code == 0, errors
        assert f"step-3/{name} is missing; using the previous checkpoint instead" in errors
        assert_same_run(runs / "whole", run)


def test_a_clock_that_jumps_changes_nothing(cut, runs):
    def jump():
        jumps = itertools.cycle((0.0, 400 * 86400.0, -400 * 86400.0))
        clock = time.time
        time.time = lambda: clock() + next(jumps)
        time.time_ns = lambda: int(time.time() * 1e9)

    code, errors = resume(runs / "cut.yaml", cut, fault=jump)
    assert code == 0, errors
    assert_same_run(runs / "whole", cut)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_restores_the_replaced_run(number, runs, tmp_path):
    run = shutil.copytree(runs / "whole", tmp_path / "run")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        "def stop(event, arguments):\n"
        "    if event == 'os.rename' and '.replaced' in str(arguments[1]):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(stop)\n"
    )
    before = {path.name: path.stat().st_size for path in run.iterdir() if path.is_file()}
    command = [sys.executable, "-m", "rlhf", "ppo", "--config", str(run / "config.yaml")]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.run(
        [*command, "--output_dir", str(run), "--overwrite"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(hook), str(root)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 128 + number, process.stderr
    assert process.stderr.splitlines() == [f"rlhf: stopped by {number.name}"]
    after = {path.name: path.stat().st_size for path in run.iterdir() if path.is_file()}
    assert after.items() >= {k: v for k, v in before.items() if k != ".rlhf"}.items()
    assert (run / "final").is_dir()
    assert not (run / ".replaced").exists()


def test_a_run_in_the_folder_of_its_model_does_not_change_the_model(tmp_path):
    model = tmp_path / "model"
    (model / "part").mkdir(parents=True)
    (model / "part" / "weights").write_text("1")
    before = fingerprint(model)
    claim = DirectoryClaim.open(model / "run", resume=False, overwrite=False)
    (model / "run" / "metrics.jsonl").write_text("{}\n")
    assert fingerprint(model) == before
    own = fingerprint(model / "run")
    (model / "run" / "metrics.jsonl").write_text("{}\n{}\n")
    assert fingerprint(model / "run") != own
    claim.close()
    (model / "part" / "weights").write_text("2")
    assert fingerprint(model) != before
