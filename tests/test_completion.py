"""The completion scripts, used by real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bash_script() -> str:
    """The output of a separate process, as in `source <(rlhf completion bash)`."""
    command = [sys.executable, "-m", "rlhf", "completion", "bash"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def completed(script: str, *words: str, folder: Path) -> set[str]:
    """What a real bash offers after the words; the last word is the one under the cursor."""
    quoted = " ".join(f"'{word}'" for word in ("rlhf", *words))
    code = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}\n"
        "complete -p rlhf >&2; _rlhf; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "-F _rlhf" in done.stderr
    return set(done.stdout.split())


def test_commands_are_completed(bash_script, tmp_path):
    words = {name.split()[0] for name in COMMANDS}
    assert completed(bash_script, "", folder=tmp_path) == words | {"--help", "--version"}
    assert completed(bash_script, "gr", folder=tmp_path) == {"grpo"}
    assert completed(bash_script, "rein", folder=tmp_path) == {
        "reinforce++",
        "reinforce++-baseline",
    }
    models = {name.split()[1] for name in COMMANDS if name.startswith("models ")}
    assert completed(bash_script, "models", "", folder=tmp_path) == models
    assert completed(bash_script, "nothing", "x", folder=tmp_path) == set()


def test_keys_and_values_are_completed(bash_script, tmp_path):
    keys = completed(bash_script, "grpo", "--algorithm.g", folder=tmp_path)
    assert keys == {"--algorithm.gamma", "--algorithm.group_size"}
    assert "--trainer.beta" in completed(bash_script, "dpo", "--trainer.", folder=tmp_path)
    assert "--trainer.beta" not in completed(bash_script, "sft", "--trainer.", folder=tmp_path)
    assert completed(bash_script, "ppo", "--print", folder=tmp_path) == {"--print-config"}
    modes = completed(bash_script, "ppo", "--algorithm.aggregation", "", folder=tmp_path)
    assert modes == {"token", "sequence", "constant"}
    assert completed(bash_script, "sft", "--resume", "t", folder=tmp_path) == {"true"}
    kinds = completed(bash_script, "split", "--kind", "pre", folder=tmp_path)
    assert kinds == {"preference"}
    assert "--data.0.path" in completed(bash_script, "sft", "--data.0.", folder=tmp_path)
    assert "--json" in completed(bash_script, "envs", "list", "--", folder=tmp_path)


def typed(script: str, line: bytes, folder: Path) -> bytes:
    """The output of an interactive bash with the script, into whose terminal a line is typed."""
    import pty

    (folder / "rc").write_text(f"{script}\nPS1='ready> '\nrlhf() {{ echo \"got $*.\"; }}\n")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvp("bash", ["bash", "--rcfile", "rc", "-i"])
    os.write(terminal, line + b"; exit\n")
    output = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the shell has ended
            break
        if not chunk:
            break
        output += chunk
    os.waitpid(pid, 0)
    return output


def test_the_tab_key_of_an_interactive_bash_completes(bash_script, tmp_path):
    output = typed(bash_script, b"rlhf gsp\t--algorithm.gro\t4", tmp_path)
    assert b"got gspo --algorithm.group_size 4." in output


def test_the_tab_key_completes_file_names(bash_script, tmp_path):
    (tmp_path / "my run.yaml").touch()
    output = typed(bash_script, b"rlhf ppo --config my\t", tmp_path)
    assert b"got ppo --config my run.yaml." in output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_no_syntax_error(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name.split()[0] in script for name in COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_fish_completes(capsys, tmp_path):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    assert main(["completion", "fish"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for line, expected in (
        ("rlhf gr", "grpo"),
        ("rlhf ppo --algorithm.aggregation ", "sequence"),
        ("rlhf models ", "merge"),
    ):
        code = f"source {tmp_path}/script; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True
        )
        offered = [row.split("\t")[0] for row in done.stdout.splitlines()]
        assert expected in offered


def test_an_unknown_shell_is_one_line(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh' or 'fish'" in capsys.readouterr().err
