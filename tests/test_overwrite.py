"""``--overwrite`` deletes nothing that no command wrote, and no finished run by a mistake."""

import itertools
import os
import shutil
import sys

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.runs.checksums import write_checksums
from rlhf.runs.claim import DirectoryClaim
from rlhf.runs.directory import Run, lock_directory_and_write_config
from tests.helpers.training import online_tree


def config(directory, **keys):
    return {"command": "ppo", "output_dir": str(directory), "overwrite": True} | keys


def finished_run(directory):
    """A finished run with a model, an evaluation and a report."""
    run = Run.open(config(directory, overwrite=False))
    run.log(1, {"a": 1.0})
    run.final.mkdir()
    (run.final / "model.safetensors").write_text("weights")
    write_checksums(run.final)
    (directory / "evaluation/run").mkdir(parents=True)
    (directory / "evaluation/run/summary.json").write_text("{}")
    (directory / "report.html").write_text("report")
    run.finish()
    run.close()


def saved_checkpoints(directory):
    """A finished run with checkpoints, and with the data of an alarm."""
    finished_run(directory)
    for folder in ("checkpoints/step-2", "checkpoints/best", "halted/step-2"):
        write(directory / folder / "model.safetensors", "weights")
        write_checksums(directory / folder)
    write(directory / "halted/alarm.json", "{}")


def pipeline(root):
    """A finished pipeline of one stage."""
    tree = {"stages": [{"name": "sft", "command": "ppo"}]}
    with lock_directory_and_write_config(
        root, "pipeline.yaml", tree, resume=False, overwrite=False
    ):
        finished_run(root / "sft")


def bench(root):
    """A finished benchmark of one run."""
    with lock_directory_and_write_config(root, "bench.yaml", {}, resume=False, overwrite=False):
        finished_run(root / "runs/menu/seed0/ppo")


def files(root):
    """The content of every file below a folder, without locks and links."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock" and not path.is_symlink()
    }


def write(path, text="written by hand"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# What is refused: a function that prepares `root` and returns the configuration.


def no_run(root, patch):
    write(root / "run/chapter.txt")
    return config(root / "run")


def configuration_of_another_program(root, patch):
    write(root / "run/config.yaml", "name: other\n")
    write(root / "run/final/model.bin")
    return config(root / "run")


def only_hidden_files(root, patch):
    write(root / "run/.git/HEAD")
    return config(root / "run")


def copied_files_of_a_run_without_its_marker(root, patch):
    finished_run(root / "run")
    (root / "run/.rlhf").unlink()
    return config(root / "run")


def working_directory(root, patch):
    finished_run(root / "run")
    patch.chdir(root / "run")
    return config(".")


def empty_name_in_a_run(root, patch):
    finished_run(root / "run")
    patch.chdir(root / "run")
    return config("")


def parent_of_the_working_directory(root, patch):
    finished_run(root / "run")
    patch.chdir(root / "run/final")
    return config(root / "run")


def home_directory(root, patch):
    finished_run(root / "run")
    patch.setenv("HOME", str(root / "run"))
    return config(root / "run")


def parent_of_the_home_directory(root, patch):
    finished_run(root / "run")
    patch.setenv("HOME", str(root / "run/evaluation"))
    return config(root / "run")


def root_of_the_file_system(root, patch):
    return config("/")


def own_model(root, patch):
    finished_run(root / "run")
    return config(root / "run", model={"path": str(root / "run/final")})


def own_model_through_a_link(root, patch):
    finished_run(root / "run")
    (root / "link").symlink_to(root / "run")
    return config(root / "run", model={"path": str(root / "link/final")})


def own_model_by_a_relative_path(root, patch):
    finished_run(root / "run")
    patch.chdir(root)
    return config("other/../run", model={"path": "run/final"})


def own_data(root, patch):
    finished_run(root / "run")
    write(root / "run/prompts.jsonl")
    return config(root / "run", env={"prompts": [{"path": str(root / "run/prompts.jsonl")}]})


def own_reward_models(root, patch):
    finished_run(root / "run")
    rewards = [{"kind": "ensemble", "paths": [str(root / "run/final")]}]
    return config(root / "run", rewards=rewards)


def own_model_in_a_pipeline(root, patch):
    pipeline(root / "run")
    return config(root / "run", model={"path": str(root / "run/sft/final")})


def own_answers(root, patch):
    finished_run(root / "run")
    write(root / "run/pairs.jsonl")
    rewards = [{"kind": "exact_match", "answers": str(root / "run/pairs.jsonl")}]
    return config(root / "run", rewards=rewards)


def copy_of_a_checkpoint(root, patch):
    finished_run(root / "run")
    write(root / "run/checkpoints/step-1/state.json")
    write(root / "run/checkpoints/step-1-copy/state.json")
    return config(root / "run")


def file_among_the_runs_of_a_benchmark(root, patch):
    bench(root / "run")
    write(root / "run/runs/menu/notes.txt")
    return config(root / "run")


def link_in_place_of_the_replaced_run(root, patch):
    finished_run(root / "run")
    write(root / "home/thesis.txt")
    (root / "run/.replaced").symlink_to(root / "home")
    return config(root / "run")


def link_to_another_run_in_place_of_the_replaced_run(root, patch):
    finished_run(root / "run")
    finished_run(root / "other")
    (root / "run/.replaced").symlink_to(root / "other")
    return config(root / "run")


def file(root, patch):
    write(root / "run")
    return config(root / "run")


def link_to_a_file(root, patch):
    write(root / "text")
    (root / "run").symlink_to(root / "text")
    return config(root / "run")


def link_to_nothing(root, patch):
    (root / "run").symlink_to(root / "nowhere")
    return config(root / "run")


REFUSED = (
    no_run,
    configuration_of_another_program,
    only_hidden_files,
    copied_files_of_a_run_without_its_marker,
    working_directory,
    empty_name_in_a_run,
    parent_of_the_working_directory,
    home_directory,
    parent_of_the_home_directory,
    root_of_the_file_system,
    own_model,
    own_model_through_a_link,
    own_model_by_a_relative_path,
    own_data,
    own_reward_models,
    own_model_in_a_pipeline,
    own_answers,
    copy_of_a_checkpoint,
    file_among_the_runs_of_a_benchmark,
    link_in_place_of_the_replaced_run,
    link_to_another_run_in_place_of_the_replaced_run,
    file,
    link_to_a_file,
    link_to_nothing,
)


# A file that no command wrote: what is in the directory, and the path of the file.
FOREIGN_FILES = (
    (finished_run, "final/card.md"),
    (finished_run, "checkpoints/notes.txt"),
    (saved_checkpoints, "checkpoints/step-2/notes.txt"),
    (saved_checkpoints, "checkpoints/step-2/plots/loss.png"),
    (saved_checkpoints, "checkpoints/best/notes.txt"),
    (saved_checkpoints, "halted/notes.txt"),
    (saved_checkpoints, "halted/step-2/notes.txt"),
    (finished_run, "evaluation/run/plot.png"),
    (finished_run, "report_tables/analysis.ipynb"),
    (finished_run, "tensorboard/notes.md"),
    (bench, "runs/notes.jsonl"),
    (bench, "tables/analysis.ipynb"),
    (bench, "pages/index.md"),
    (pipeline, "sft/notes.txt"),
    (pipeline, "sft/src/main.py"),
    (pipeline, "sft/final/card.md"),
)


@pytest.mark.parametrize(("make", "path"), FOREIGN_FILES)
def test_a_foreign_file_is_not_replaced(tmp_path, make, path):
    make(tmp_path / "run")
    write(tmp_path / "run" / path)
    before = files(tmp_path)
    with pytest.raises(UserError, match="was not written by the toolkit"):
        Run.open(config(tmp_path / "run"))
    assert files(tmp_path) == before


@pytest.mark.parametrize("situation", REFUSED)
def test_what_must_not_be_replaced_is_refused(tmp_path, monkeypatch, situation):
    tree = situation(tmp_path, monkeypatch)
    before = files(tmp_path)
    with pytest.raises(UserError) as error:
        Run.open(tree)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


# Two commands that write no model, and the files that the second one writes.
DATA_FILES = {
    "demos": ["a.jsonl"],
    "split": ["train.jsonl", "test.jsonl"],
    "pairs": ["pairs.jsonl"],
    "ppo": ["metrics.jsonl", "samples.jsonl", "final", "evaluation", "tensorboard"],
}


@pytest.mark.parametrize("second", DATA_FILES)
@pytest.mark.parametrize("first", ["demos", "split", "pairs"])
def test_a_file_of_the_user_with_the_name_of_a_result_stays(tmp_path, first, second):
    def write_data(command, **keys):
        run = Run.open(config(tmp_path / "run", command=command, **keys))
        try:
            if command == "demos":
                run.declare_files(DATA_FILES[command])
            for name in DATA_FILES[command]:
                write(run.directory / name, "written by the toolkit")
            run.finish()
        finally:
            run.close()

    for name in DATA_FILES[second] if second != first else ():
        write_data(first, overwrite=(tmp_path / "run").exists())
        write(tmp_path / "run" / name)
        before = unmarked(files(tmp_path / "run"))
        with pytest.raises(UserError, match=rf"/{name} was not written by the toolkit") as error:
            write_data(second)
        assert "\n" not in str(error.value)
        assert unmarked(files(tmp_path / "run")) == before
        (tmp_path / "run" / name).unlink()
    if second == first:
        write_data(first, overwrite=False)
    write_data(second)  # without the file of the user, the directory is overwritten
    names = {path.name for path in (tmp_path / "run").iterdir() if path.name != "checkpoints"}
    kept = {"config.yaml", "inputs.json", "environment.json", "finished", ".rlhf", ".lock"}
    assert names == {*DATA_FILES[second], *kept}


# What is replaced without a loss: the run only.


def sources_beside(root):
    finished_run(root / "run")
    write(root / "run/src/main.py")
    write(root / "run/.git/HEAD")


def link_to_a_run(root):
    finished_run(root / "real")
    (root / "run").symlink_to(root / "real")


def model_is_a_link(root):
    finished_run(root / "run")
    shutil.move(root / "run/final", root / "models")
    (root / "run/final").symlink_to(root / "models")


def log_is_a_link(root):
    finished_run(root / "run")
    write(root / "log.jsonl")
    (root / "run/metrics.jsonl").unlink()
    (root / "run/metrics.jsonl").symlink_to(root / "log.jsonl")


def names_of_other_commands(root):
    finished_run(root / "run")
    for name in ("train.jsonl", "tables/notes.txt", "runs/1/out.csv", "logs/1.log", "bench.yaml"):
        write(root / "run" / name)


def sources_beside_a_pipeline(root):
    pipeline(root / "run")
    write(root / "run/notes.txt")


@pytest.mark.parametrize(
    "situation",
    [
        sources_beside,
        link_to_a_run,
        model_is_a_link,
        log_is_a_link,
        names_of_other_commands,
        sources_beside_a_pipeline,
    ],
)
def test_what_no_run_wrote_stays(tmp_path, situation):
    situation(tmp_path)
    foreign = ("src", ".git", "notes.txt", "models", "log.jsonl", "out.csv", "train.jsonl")
    foreign += ("1.log", "bench.yaml")
    before = {k: v for k, v in files(tmp_path).items() if any(n in k.split("/") for n in foreign)}
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"a": 2.0})
    run.close()
    assert before.items() <= files(tmp_path).items()
    assert '"a": 2.0' in (tmp_path / "run/metrics.jsonl").read_text()
    assert not (tmp_path / "run/.replaced").exists()


# Mistakes on the command line, which are found after the directory was opened, or before.
MISTAKES = {
    "wrong model": {"model": {"path": "no/such/model"}},
    "wrong environment": {"env": {"id": "text/NoSuch-v0"}},
    "wrong prompts": {"env": {"prompts": [{"path": "nowhere.jsonl"}]}},
    "wrong reward": {"rewards": [{"kind": "function", "path": "no.module:name"}]},
    "unknown key": {"nmu_steps": 3},
    "environment that fails": {"env": {"id": "text/Echo-v0", "kwargs": {"num_words": -1}}},
    "bad value": {"num_steps": 0},
    "reward that scores nothing": {
        "rewards": [{"kind": "function", "path": "tests.helpers.training:no_score"}]
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_cost_the_finished_run(tmp_path, echo_model, capsys, mistake):
    finished_run(tmp_path / "run")
    before = files(tmp_path / "run")
    tree = online_tree(tmp_path / "run", echo_model) | MISTAKES[mistake]
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(tree))
    code = main(["ppo", "--config", str(tmp_path / "ppo.yaml"), "--overwrite"])
    assert code == 2
    assert len([x for x in capsys.readouterr().err.splitlines() if x.startswith("rlhf:")]) == 1
    after = files(tmp_path / "run")
    assert unmarked(after) == unmarked(before)


KILLED = 137


def killed(change, action):
    """Do an action in a process killed at a change of the file system; return its exit code."""
    process = os.fork()
    if process == 0:
        moments = itertools.count(1)

        def kill(event, _):
            changes = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
            if event in changes and next(moments) == change:
                os._exit(KILLED)

        try:
            sys.addaudithook(kill)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("has_result", [False, True])
def test_a_kill_at_any_change_leaves_a_whole_run(tmp_path, has_result):
    def replace(directory):
        run = Run.open(config(directory, seed=1))
        if has_result:
            run.log(1, {"a": 2.0})
        run.close()

    finished_run(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    replace(tmp_path / "new")
    whole = [unmarked(files(tmp_path / name)) for name in ("old", "new")]
    for change in itertools.count(1):
        directory = tmp_path / str(change)
        shutil.copytree(tmp_path / "old", directory)
        if killed(change, lambda path=directory: replace(path)) != KILLED:
            assert change > 20
            return
        with pytest.raises(UserError):  # the directory is not empty
            Run.open(config(directory, overwrite=False))
        DirectoryClaim.open(directory, resume=True, overwrite=False).close()
        assert unmarked(files(directory)).keys() in [run.keys() for run in whole], change


def unmarked(content):
    """The content of a run without the marker, which names the last writer."""
    return {name: text for name, text in content.items() if name != ".rlhf"}


def test_a_stage_without_a_result_does_not_cost_the_finished_pipeline(tmp_path, echo_model, capsys):
    pipeline(tmp_path / "run")
    before = files(tmp_path / "run")
    stage = online_tree(tmp_path, echo_model) | MISTAKES["reward that scores nothing"]
    del stage["output_dir"]
    stages = [{"name": "ppo", "command": "ppo", **stage}]
    tree = {"output_dir": str(tmp_path / "run"), "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    assert main(["run", str(tmp_path / "pipeline.yaml"), "--overwrite"]) == 2
    assert "could not be scored" in capsys.readouterr().err
    after = files(tmp_path / "run")
    assert unmarked(after) == unmarked(before)


def test_a_mistake_in_a_late_stage_does_not_cost_the_finished_pipeline(
    tmp_path, echo_model, capsys
):
    pipeline(tmp_path / "run")
    before = files(tmp_path / "run")
    stage = online_tree(tmp_path, echo_model)
    del stage["output_dir"]
    stages = [{"name": "ppo", "command": "ppo", **stage}]
    stages += [{"name": "late", "command": "ppo", **stage, **MISTAKES["wrong reward"]}]
    tree = {"output_dir": str(tmp_path / "run"), "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    assert main(["run", str(tmp_path / "pipeline.yaml"), "--overwrite"]) == 2
    assert "stage late: " in capsys.readouterr().err
    assert files(tmp_path / "run") == before


def test_a_run_halted_at_its_first_step_leaves_its_evidence_in_the_old_run(tmp_path):
    finished_run(tmp_path / "run")
    before = files(tmp_path / "run")
    run = Run.open(config(tmp_path / "run"))
    run.write_sample({"step": 0})
    write(run.directory / "halted/alarm.json")
    run.close()
    after = files(tmp_path / "run")
    assert after.pop("halted/alarm.json") == b"written by hand"
    assert unmarked(after) == unmarked(before)


def test_a_refused_resumption_leaves_the_record_of_a_pipeline(tmp_path, echo_model, capsys):
    stage = online_tree(tmp_path, echo_model)
    del stage["output_dir"]
    stages = [{"name": "ppo", "command": "ppo", **stage}]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "stages": stages}))
    assert main(["run", str(path)]) == 0
    before = files(tmp_path / "run")
    assert main(["run", str(path), "--resume", "--seed", "5"]) == 2
    assert "stage ppo: " in capsys.readouterr().err
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", ".", "..", "a/b", "", "final", "-x"])
def test_names_of_stages_stay_in_the_directory(tmp_path, capsys, name):
    stage = {"name": name, "command": "demos", "env": "text/Echo-v0", "files": []}
    tree = {"output_dir": str(tmp_path / "out"), "stages": [stage]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    before = files(tmp_path)
    assert main(["run", str(tmp_path / "pipeline.yaml")]) == 2
    assert "is not a valid stage name" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_names_of_files_stay_in_the_directory(tmp_path, capsys):
    rows = [{"path": "../victim.jsonl", "kind": "sft", "count": 2}]
    tree = {"output_dir": str(tmp_path / "out"), "env": "text/Echo-v0", "files": rows}
    (tmp_path / "demos.yaml").write_text(yaml.safe_dump(tree))
    assert main(["demos", "--config", str(tmp_path / "demos.yaml")]) == 2
    assert "'../victim.jsonl' is not a file name" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["demos.yaml"]


@pytest.mark.parametrize(
    "place", ["checkpoints/step-9", "checkpoints", "halted/x", "final/x", "evaluation/a/b"]
)
@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_is_not_written_into_a_folder_of_another_run(tmp_path, place, option):
    """A resumed run removes damaged checkpoints and the evidence of an earlier alarm."""
    finished_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = files(tmp_path)
    for root in (tmp_path / "run", tmp_path / "link"):
        with pytest.raises(UserError, match="is inside the folder"):
            Run.open({"command": "ppo", "output_dir": str(root / place), **option})
    assert files(tmp_path) == before


@pytest.mark.parametrize("make", [finished_run, pipeline])
def test_a_run_in_the_directory_of_another_run_is_not_replaced_with_it(tmp_path, make):
    make(tmp_path / "run")
    finished_run(tmp_path / "run/child")
    before = files(tmp_path / "run/child")
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"a": 2.0})
    run.close()
    assert files(tmp_path / "run/child") == before
    assert not (tmp_path / "run/sft").exists()


@pytest.mark.parametrize("text", ['{"entries": [["a"], 5]}', "[" * 100_000, "[]", "\0"])
def test_a_damaged_marker_is_a_marker(tmp_path, text):
    finished_run(tmp_path / "run")
    write(tmp_path / "run/.rlhf", text)
    run = Run.open(config(tmp_path / "run"))
    run.close()
    assert (tmp_path / "run/final/model.safetensors").read_text() == "weights"


def test_a_run_beside_the_folders_of_another_run_is_allowed(tmp_path):
    finished_run(tmp_path / "run")
    finished_run(tmp_path / "run/child")
    finished_run(tmp_path / "checkpoints/step-9")
    assert main(["report", str(tmp_path / "run/child")]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 201, "at most 200 bytes"),
        ("é" * 101, "at most 200 bytes"),
        ("a\0b", "no null character"),
        (f"{'a' * 300}/b", "File name too long"),
        ("a/" * 3000, "File name too long"),
    ],
)
def test_names_that_the_file_system_does_not_accept_are_refused(tmp_path, capsys, name, words):
    tree = online_tree(tmp_path / name, tmp_path / "no-model")
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(tree))
    assert main(["ppo", "--config", str(tmp_path / "ppo.yaml")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert os.listdir(tmp_path) == ["ppo.yaml"]


def test_a_run_with_the_longest_name_has_a_final_evaluation(tmp_path, echo_model):
    tree = online_tree(tmp_path / ("a" * 200), echo_model, num_steps=1)
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(tree))
    assert main(["ppo", "--config", str(tmp_path / "ppo.yaml")]) == 0
