"""The command line: mistakes are one line and exit code 2, and nothing written is lost."""

from __future__ import annotations

import dataclasses
import gzip
import json
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml

import rlhf
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.common.imports import import_object
from rlhf.errors import UserError
from tests.helpers.runs import write_run
from tests.helpers.training import offline_tree, online_tree, pair_rows, sft_rows, write_rows


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of standard error that are ours."""
    capsys.readouterr()
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, [line for line in err.splitlines() if line.startswith("rlhf:")]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a call is refused."""
    code, _, lines = call(capsys, *arguments)
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


def config_file(folder: Path, tree: dict) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def sft(tmp_path: Path, echo_model: Path) -> dict:
    """A right configuration of an SFT run."""
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    return offline_tree(tmp_path / "run", echo_model, data)


def test_help_and_version(capsys):
    assert call(capsys, "--help")[0] == 0
    code, out, _ = call(capsys)
    assert code == 0
    assert "rlhf COMMAND" in out
    assert call(capsys, "--version")[1].startswith("rlhf ")
    assert "--output_dir" in call(capsys, "ppo", "--help")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_class_and_function_of_a_row_exists(name):
    command = COMMANDS[name]
    options = command.options.values()
    paths = [command.config, command.run, command.plan, command.read, *options]
    assert all(callable(import_object(path)) for path in paths if path)
    keys = [field.name for field in dataclasses.fields(import_object(command.config))]
    assert {*command.arguments} - {"config"} <= {*keys}


def test_help_lists_every_command(capsys):
    text = call(capsys, "--help")[1]
    for group, commands in COMMANDS.groups.items():
        assert f"{group}\n" in text
        assert all(f"  {command.name} " in text for command in commands)
    assert "rlhf envs COMMAND" in call(capsys, "envs", "--help")[1]


def test_unknown_command_names_the_nearest(capsys):
    assert "'ppo'" in refused(capsys, "pppo")
    assert "unknown command 'pppo'" in refused(capsys, "pppo", "--help")
    assert "'envs list'" in refused(capsys, "envs", "lst")
    assert "'envs'; the commands are envs list, envs demos, envs" in refused(capsys, "envs")
    assert "unknown command 'data split'; did you mean 'split'" in refused(capsys, "data", "split")
    assert "unknown command '--pppo'" in refused(capsys, "--pppo")


def test_unknown_key_names_the_nearest(capsys, tmp_path, sft):
    line = refused(capsys, "sft", "--config", config_file(tmp_path, sft | {"bach_size": 8}))
    assert "'bach_size'" in line
    assert "'batch_size'" in line


def test_unknown_setting_of_an_algorithm(capsys, tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model)
    line = refused(capsys, "ppo", "--config", config_file(tmp_path, tree), "--algorithm.clip", "1")
    assert "'algorithm.clip'" in line


def test_setting_without_effect(capsys, tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, algorithm={"lam": 0.9, "group_size": 4})
    line = refused(capsys, "grpo", "--config", config_file(tmp_path, tree))
    assert "lam has no effect with grpo" in line
    assert not (tmp_path / "run").exists()


def test_wrong_type(capsys, tmp_path, sft):
    file = config_file(tmp_path, sft)
    assert "batch_size" in refused(capsys, "sft", "--config", file, "--batch_size", "many")


def test_missing_config_file(capsys):
    assert "nowhere.yaml does not exist" in refused(capsys, "sft", "--config", "nowhere.yaml")


def test_missing_data_file(capsys, tmp_path, sft):
    file = config_file(tmp_path, sft)
    line = refused(capsys, "sft", "--config", file, "--data.0.path", str(tmp_path / "row.jsonl"))
    assert "row.jsonl" in line
    assert "rows.jsonl" in line  # the nearest that exists
    assert not (tmp_path / "run").exists()


def test_broken_row_names_file_and_line(capsys, tmp_path, sft):
    path = tmp_path / "broken.jsonl.gz"
    good = json.dumps(sft_rows(1)[0])
    path.write_bytes(gzip.compress(f"{good}\n{good}\n{{oops\n".encode()))
    line = refused(
        capsys, "sft", "--config", config_file(tmp_path, sft), "--data.0.path", str(path)
    )
    assert "broken.jsonl.gz, line 3" in line


def test_empty_data_set(capsys, tmp_path, sft):
    path = write_rows(tmp_path / "empty.jsonl", [])
    line = refused(
        capsys, "sft", "--config", config_file(tmp_path, sft), "--data.0.path", str(path)
    )
    assert "empty.jsonl" in line


def test_all_pairs_identical(capsys, tmp_path, echo_model):
    rows = [row | {"rejected": row["chosen"]} for row in pair_rows()]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    tree = offline_tree(tmp_path / "run", echo_model, data)
    for command in ("reward", "dpo"):
        line = refused(capsys, command, "--config", config_file(tmp_path, tree))
        assert "all 32 pairs are identical" in line
        assert not (tmp_path / "run").exists()


def test_prompt_longer_than_the_context(capsys, tmp_path, echo_model):
    data = write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": "apple " * 200 + str(i)} for i in "ab"]
    )
    tree = online_tree(tmp_path / "run", echo_model)
    tree["env"] = {"prompts": [{"path": str(data)}]}
    tree["rewards"] = [{"kind": "repetition"}]
    tree["evaluation"] = {"episodes": 2, "prompts_fraction": 0.5}
    line = refused(capsys, "ppo", "--config", config_file(tmp_path, tree))
    assert "tokens" in line
    assert "max_tokens" in line


def test_unknown_model(capsys, tmp_path, sft):
    file = config_file(tmp_path, sft)
    line = refused(capsys, "sft", "--config", file, "--model.path", "smollm2-135m-instuct")
    assert "'smollm2-135m-instruct'" in line


def test_a_refused_overwrite_keeps_the_old_run(capsys, tmp_path, sft):
    old = tmp_path / "run"
    old.mkdir()
    (old / "config.yaml").write_text("{}")
    (old / "metrics.jsonl").write_text("{}\n")
    file = config_file(tmp_path, sft)
    refused(capsys, "sft", "--config", file, "--overwrite", "--model.path", "smollm2-135m-instuct")
    assert sorted(path.name for path in old.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_a_pipeline_is_not_the_configuration_of_a_command(capsys, tmp_path, sft):
    file = config_file(tmp_path, {"stages": [{"name": "sft", "command": "sft", **sft}]})
    assert "run it with `rlhf run" in refused(capsys, "sft", "--config", file)
    assert "unknown key 'stages'" in refused(capsys, "sft", "--stages", "1")


def test_existing_and_unwritable_directories(capsys, tmp_path, sft):
    (tmp_path / "run").mkdir()
    keep = tmp_path / "run" / "thesis.txt"
    keep.write_text("years of work")
    file = config_file(tmp_path, sft)
    assert "--resume" in refused(capsys, "sft", "--config", file)
    assert "not a run directory" in refused(capsys, "sft", "--config", file, "--overwrite")
    assert keep.read_text() == "years of work"
    line = refused(capsys, "sft", "--config", file, "--output_dir", str(keep / "below"))
    assert "thesis.txt" in line


def test_print_config_round_trips(capsys, tmp_path, sft):
    code, out, _ = call(capsys, "sft", "--config", config_file(tmp_path, sft), "--print-config")
    shown = yaml.safe_load(out)
    assert code == 0
    assert shown["batch_size"] == 8
    assert shown["trainer"]["learning_rate"] == 1e-2
    assert not (tmp_path / "run").exists()


def test_a_run_s_own_configuration_is_taken_back_by_its_command(capsys, tmp_path, sft):
    shown = call(capsys, "sft", "--config", config_file(tmp_path, sft), "--print-config")[1]
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    assert call(capsys, "sft", "--config", str(path), "--print-config")[1] == shown
    message = refused(capsys, "dpo", "--config", str(path))
    assert "is for `rlhf sft`, not for `rlhf dpo`" in message


def test_dry_run_shows_the_algebra_and_trains_nothing(capsys, tmp_path, sft, echo_model):
    code, out, _ = call(capsys, "sft", "--config", config_file(tmp_path, sft), "--dry-run")
    assert code == 0
    assert "8 examples per step, in micro-batches of at most 4 x" in out
    assert "memory: about" in out
    tree = online_tree(tmp_path / "run", echo_model, algorithm={"group_size": 4})
    code, out, _ = call(capsys, "rloo", "--config", config_file(tmp_path, tree), "--dry-run")
    assert "8 episodes per step = 2 start states x 4" in out
    assert not (tmp_path / "run").exists()


def test_few_functions_lie_between_the_command_line_and_the_first_step(
    monkeypatch, tmp_path, echo_model
):
    package = str(Path(rlhf.__file__).parent)
    stack = []

    def step(self, number, run):
        stack.extend(f for f in traceback.extract_stack() if f.filename.startswith(package))
        raise UserError("the stack is recorded")

    monkeypatch.setattr("rlhf.training.online.OnlineTrainer.step", step)
    tree = online_tree(tmp_path / "run", echo_model)
    assert main(["ppo", "--config", config_file(tmp_path, tree), "--num_steps", "5"]) == 2
    assert stack[0].name == "main"
    assert len(stack) <= 6, [frame.name for frame in stack]


def test_generate_and_its_mistake(capsys, echo_model):
    arguments = ("generate", "--model.path", str(echo_model), "--rollout.max_new_tokens", "3")
    code, out, _ = call(capsys, *arguments, "--prompt", "Repeat: apple", "--samples", "2")
    assert code == 0
    assert out.count("\n") == 2
    assert "one of --prompt and --prompts" in refused(capsys, *arguments)


def test_data_check_and_its_mistake(capsys, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [*pair_rows(8), *pair_rows(8)])
    for words in ([str(path)], ["--path", str(path), "--kind", "preference"]):
        code, out, _ = call(capsys, "data", "check", *words)
        assert code == 1  # half of the rows repeat an earlier one
        assert "read as preference data" in out
        assert "fault: duplicates" in out
    clean = write_rows(tmp_path / "clean.jsonl", [{**row, "id": 1} for row in sft_rows(8)])
    code, out, _ = call(capsys, "data", "check", str(clean))
    assert (code, "columns not used: id" in out) == (0, True)
    assert call(capsys, "data", "check", str(clean), str(path))[0] == 1
    assert "kind" in refused(capsys, "data", "check", "--path", str(path), "--kind", "pairs")


def test_score_a_file(capsys, tmp_path):
    path = write_rows(tmp_path / "replies.jsonl", sft_rows(2))
    rewards = '[{kind: regex, pattern: "apple"}]'
    code, out, _ = call(capsys, "score", "--rewards", rewards, "--input", str(path))
    assert code == 0
    assert len([json.loads(line)["score"] for line in out.splitlines()]) == 2
    assert "either --reward" in refused(capsys, "score", "--input", str(path))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit(0)", "RuntimeError: called sys.exit(0) (broken_reward.py:1)"),
        ("1 / 0", "ZeroDivisionError: division by zero (broken_reward.py:1)"),
    ],
)
def test_a_module_that_fails_is_named(capsys, tmp_path, monkeypatch, code, reason):
    (tmp_path / "broken_reward.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "texts.jsonl").write_text("{}")
    rewards = "[{kind: function, path: 'broken_reward:f'}]"
    words = ["score", "--input", str(tmp_path / "texts.jsonl"), "--rewards", rewards]
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"cannot import 'broken_reward' ({reason})" in output.err


def test_code_that_ends_the_process_is_a_fault(capsys, monkeypatch):
    monkeypatch.setattr("rlhf.cli.main._run_and_print_output", lambda *_: sys.exit(0))
    assert main(["envs", "list"]) == 1
    assert "called sys.exit(0)" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m rlhf envs list --json | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[", "")


def test_listings(capsys, tmp_path):
    assert "smollm2-135m-instruct" in call(capsys, "models", "list")[1]
    rows = json.loads(call(capsys, "envs", "list", "--json")[1])
    assert {"text/TMaze-v0", "text/PreferenceBandit-v0"} <= {row["id"] for row in rows}
    assert "arXiv" in call(capsys, "algorithms", "grpo")[1]
    assert "unknown algorithm 'grp'" in refused(capsys, "algorithms", "grp")
    assert call(capsys, "envs", "check", "text/Echo-v0")[0] == 0
    target = tmp_path / "demos.jsonl"
    demos = ("envs", "demos", "text/Echo-v0", "--path", str(target), "--count", "5")
    code, out, _ = call(capsys, *demos)
    assert (code, out.strip()) == (0, f"{target}: 5 rows from 5 episodes, mean return 1")
    assert len(target.read_text().splitlines()) == 5
    assert "exists already" in refused(capsys, *demos)


def test_a_comparison_goes_where_it_was_asked_to(capsys, tmp_path):
    runs = [str(write_run(tmp_path / name, {0: 1.0, 1: 2.0})) for name in ("better", "worse")]
    page = tmp_path / "side-by-side.html"
    assert call(capsys, "report", *runs, "--output", str(page))[0] == 0
    assert "better against worse" in page.read_text().lower()
    assert "needs several runs" in refused(capsys, "report", runs[0], "--output", str(page))
    assert "is a file: expected a run directory" in refused(capsys, "report", str(page))
    assert "did you mean 'output'?" in refused(capsys, "report", *runs, "--outptu", "x")
    assert "did you mean 'metric'?" in refused(capsys, "compare", *runs, "--metrc", "return")


@pytest.mark.parametrize(
    "path", ["a" * 300, "a/" * 3000, "./rows.jsonl/x", "loop", "./loop/x"], ids=len
)
def test_a_path_that_cannot_exist_is_refused_in_one_line(capsys, tmp_path, monkeypatch, sft, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    config = config_file(tmp_path, sft)
    prompts = f"[{{path: {path}}}]"
    for words in (
        ["sft", "--config", config, "--data.0.path", path],
        ["sft", "--config", config, "--model.path", path],
        ["sft", "--config", path],
        ["ppo", "--env.prompts", prompts, "--model.path", config, "--output_dir", "out"],
        ["report", path],
        ["report", path, path],
        ["compare", path, path],
        ["replay", path],
        ["run", path],
        ["bench", path],
        ["data", "check", path],
        ["models", "merge", path, "out"],
        ["models", "get", path],
    ):
        refused(capsys, *words)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_thread_that_does_not_end_does_not_hold_the_process(guarded):
    """Also not if an environment in another thread is still in a call that must not end the run."""
    program = f"""
import threading, sys
from rlhf.cli import main
from rlhf.common.foreign import exit_as_exception
main.THREAD_SECONDS = 0.1
guard = exit_as_exception()
if {guarded}:
    guard.__enter__()
main.main = lambda: threading.Thread(target=threading.Event().wait).start() or 3
sys.exit(main.run_program())
"""
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 3
    assert process.stderr == (
        "rlhf: a thread of imported code still runs, so the process ends without it\n"
    )


def test_a_second_interruption_at_the_end_prints_no_traceback():
    program = """
import atexit, signal, sys
from rlhf.cli import main
atexit.register(signal.raise_signal, signal.SIGINT)
main.main = lambda: 130
sys.exit(main.run_program())
"""
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == -signal.SIGINT
    assert process.stderr == ""
