"""More steps after the end, changed settings of a resumed run, and branches of a run."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import run_command
from rlhf.common.files import read_jsonl
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.reports import write_report
from rlhf.runs.changes import FIXED_KEYS
from rlhf.training.online import OnlineTrainer
from tests.helpers.training import (
    assert_same_run,
    metrics_of,
    offline_tree,
    online_tree,
    pair_rows,
    read_rows,
    same,
    sft_rows,
    tensors_of,
    unknown_entries,
    weights_of,
    write_rows,
)

CONSTANT = {"optimizer": {"learning_rate": 1e-3, "schedule": "constant"}}
RESUME = {"resume": True}


def without_moved(rows):
    """Metrics without the one that is logged at checkpoints only."""
    return [{k: v for k, v in row.items() if k != "train/moved"} for row in rows]


def digests(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


ONLINE = {
    "ppo": {
        "kl": {"controller": "adaptive", "target": 0.001, "horizon": 40},
        "shaping": {"scale": "normalize", "missing_eos_penalty": 0.5},
        "algorithm": {"num_epochs": 2, "num_minibatches": 2},
        "critic": "separate",
    },
    "grpo": {"algorithm": {"group_size": 4}},
    "ppo_lagrangian": {},
}


@pytest.mark.parametrize("command", ONLINE)
def test_more_steps_after_the_end_are_those_of_a_longer_run(tmp_path, echo_model, command):
    """Bit for bit: weights, optimizer, controllers, metrics, transcripts and the evaluation."""
    keys = CONSTANT | ONLINE[command]
    run_command(command, online_tree(tmp_path / "whole", echo_model, **keys))
    run_command(command, online_tree(tmp_path / "short", echo_model, **keys, num_steps=2))
    run_command(command, online_tree(tmp_path / "short", echo_model, **keys) | RESUME)
    assert_same_run(tmp_path / "whole", tmp_path / "short")
    episodes = [
        read_rows(tmp_path / f"{n}/evaluation/{n}/episodes.jsonl") for n in ("whole", "short")
    ]
    for rows in episodes:
        for row in rows:
            row.pop("seconds"), row.pop("policy")
    assert episodes[0] == episodes[1]
    assert (tmp_path / "short/finished").exists()
    rows = read_jsonl(tmp_path / "short/changes.jsonl")
    assert rows == [{"step": 2, "key": "num_steps", "before": 2, "after": 4}]
    assert read_mapping_or_empty(tmp_path / "short/config.yaml")["num_steps"] == 4
    assert not unknown_entries(tmp_path)


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("engine", ["native", "trl"])
def test_more_steps_of_an_offline_run(tmp_path, echo_model, command, engine):
    """Six instead of two steps; two steps of DPO read only a part of the pairs."""
    rows = sft_rows() if command == "sft" else pair_rows()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    trainer = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "max_steps": 6}
    keys = {"engine": engine, "evaluations": 3}
    tree = offline_tree(tmp_path / "whole", echo_model, data, trainer=trainer, **keys)
    run_command(command, tree)
    short = offline_tree(
        tmp_path / "short", echo_model, data, trainer=trainer | {"max_steps": 2}, **keys
    ) | {"evaluations": 1}
    run_command(command, short)
    longer = short | {
        "trainer": tree["trainer"],
        "evaluations": 3,
        "allow_changes": ["evaluations"],
    }
    run_command(command, longer | RESUME)
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "short"))
    name = {"native": "step", "trl": "checkpoint"}[engine]
    assert same(
        *(tensors_of(tmp_path / f"{run}/checkpoints/{name}-6") for run in ("whole", "short"))
    )
    last = [metrics_of(tmp_path / run)[-1] for run in ("whole", "short")]
    assert last[0] == last[1]
    keys = [row["key"] for row in read_jsonl(tmp_path / "short/changes.jsonl")]
    assert keys == ["evaluations", "trainer.max_steps"]


@pytest.mark.parametrize("engine", ["online", "native", "trl"])
def test_a_decaying_learning_rate_continues_on_the_longer_schedule(
    tmp_path, echo_model, caplog, engine
):
    """After two of two steps a linear schedule is at 0; of four steps, it is at a half."""
    if engine == "online":
        one = {"algorithm": {"num_epochs": 1, "num_minibatches": 1}}
        short = online_tree(tmp_path / "run", echo_model, num_steps=2, **one)
        longer, command, key, peak = short | {"num_steps": 4}, "ppo", "num_steps", 1e-3
    else:
        data = write_rows(tmp_path / "rows.jsonl", sft_rows())
        trainer = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "warmup_steps": 0}
        short = offline_tree(
            tmp_path / "run", echo_model, data, trainer=trainer, engine=engine, evaluations=1
        )
        longer = short | {"trainer": {**trainer, "max_steps": 4}}
        command, key, peak = "sft", "trainer.max_steps", 1e-2
    run_command(command, short)
    before = tensors_of(
        tmp_path / f"run/checkpoints/{'checkpoint' if engine == 'trl' else 'step'}-2"
    )
    caplog.set_level("INFO")
    run_command(command, longer | RESUME)
    told = caplog.text
    assert f"changed after step 2: {key} was 2, now 4" in told
    assert "the learning rate depends on the number of steps" in told
    rates = {
        r["step"]: r["train/learning_rate"]
        for r in metrics_of(tmp_path / "run")
        if "train/learning_rate" in r
    }
    # online and native log the rate after the step, transformers the one of the step
    expected = [peak / 2, peak / 4] if engine == "trl" else [peak / 4, 0.0]
    assert [rates[3], rates[4]] == pytest.approx(expected)
    assert not same(before, weights_of(tmp_path / "run"))


def test_changed_settings_are_those_of_the_optimizer(tmp_path, echo_model, monkeypatch):
    """The checkpoint contains the old values; the run uses and records the new ones."""
    tree = online_tree(tmp_path / "run", echo_model, **CONSTANT, num_steps=2)
    run_command("ppo", tree)
    seen = {}
    original = OnlineTrainer.step

    def step(trainer, index, run):
        group = trainer.optimizer.param_groups[0]
        seen[index] = (group["lr"], group["weight_decay"], group["eps"], trainer.kl.coef)
        return original(trainer, index, run)

    monkeypatch.setattr(OnlineTrainer, "step", step)
    optimizer = {"learning_rate": 5e-4, "schedule": "constant", "weight_decay": 0.1, "eps": 1e-6}
    changed = tree | {
        "num_steps": 4,
        "optimizer": optimizer,
        "algorithm": {"kl_coef": 0.3},
        "allow_changes": ["optimizer", "algorithm.kl_coef"],
    }
    run_command("ppo", changed | RESUME)
    assert seen == dict.fromkeys((2, 3), (5e-4, 0.1, 1e-6, 0.3))
    rows = {r["key"]: (r["before"], r["after"]) for r in read_rows(tmp_path / "run/changes.jsonl")}
    assert rows == {
        "algorithm.kl_coef": (0.05, 0.3),
        "num_steps": (2, 4),
        "optimizer.eps": (1e-5, 1e-6),
        "optimizer.learning_rate": (1e-3, 5e-4),
        "optimizer.weight_decay": (0.0, 0.1),
    }
    seen.clear()
    del changed["allow_changes"]  # the new settings are the recorded ones
    run_command("ppo", changed | {"num_steps": 5} | RESUME)
    assert seen == {4: (5e-4, 0.1, 1e-6, 0.3)}
    page = write_report(tmp_path / "run").read_text()
    assert "after step 2: optimizer.learning_rate was 0.001, now 0.0005" in page
    assert "after step 4: num_steps was 4, now 5" in page


@pytest.mark.parametrize("kill", ["before the change is recorded", "before the next checkpoint"])
def test_a_run_killed_during_the_change_ends_like_one_that_was_not(
    tmp_path, echo_model, monkeypatch, kill
):
    tree = online_tree(tmp_path / "killed", echo_model, num_steps=2, save_every=2)
    run_command("grpo", tree)
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    shutil.move(tmp_path / "whole/evaluation/killed", tmp_path / "whole/evaluation/whole")
    longer = tree | {"num_steps": 6, "allow_changes": ["optimizer.learning_rate"]}
    longer |= {"optimizer": {"learning_rate": 5e-4}} | RESUME
    run_command("grpo", longer | {"output_dir": str(tmp_path / "whole")})

    class Killed(BaseException):
        pass

    def killed(*_args, **_keys):
        raise Killed

    name = {"before the change is recorded": "_write_configuration"}.get(kill)
    with monkeypatch.context() as patch:
        if name:
            patch.setattr("rlhf.runs.directory.Run._write_configuration", killed)
        else:
            original = OnlineTrainer.step
            patch.setattr(
                OnlineTrainer,
                "step",
                lambda self, step, run: killed() if step == 3 else original(self, step, run),
            )
        with pytest.raises(Killed):
            run_command("grpo", longer)
    run_command("grpo", longer)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert read_rows(tmp_path / "whole/changes.jsonl") == read_rows(
        tmp_path / "killed/changes.jsonl"
    )


def test_an_error_before_training_leaves_the_finished_run(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)
    run_command("ppo", tree)
    before = digests(tmp_path / "run")
    broken = tree | {"num_steps": 2, "rewards": [{"kind": "function", "path": "no.module:x"}]}
    with pytest.raises(UserError, match=r"no\.module"):
        run_command("ppo", broken | {"allow_changes": ["rewards"]} | RESUME)
    after = digests(tmp_path / "run")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {".rlhf", "environment.json", "report.html"}
    run_command("ppo", tree | {"num_steps": 2} | RESUME)
    assert len(metrics_of(tmp_path / "run")) == 2


def test_what_may_not_change_is_refused_with_its_reason(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2)
    run_command("ppo", tree)
    refused = {
        "seed": (1, "seed was 0, now 1, and this key cannot change, because the episodes"),
        "critic": ("separate", "weights of this critic"),
        "save_every": (2, None),
    }
    for key, (value, reason) in refused.items():
        permitted = tree | {key: value, "allow_changes": [key]} | RESUME
        if reason:
            with pytest.raises(UserError, match=reason):
                run_command("ppo", permitted)
        else:
            with pytest.raises(UserError, match=rf"set allow_changes: \[{key}\]$"):
                run_command("ppo", tree | {key: value} | RESUME)
            run_command("ppo", permitted)
    with pytest.raises(UserError, match=r"'optimizr' is not a key of this run; did you mean"):
        run_command("ppo", tree | {"allow_changes": ["optimizr"]} | RESUME)
    with pytest.raises(UserError, match="no effect without resume"):
        run_command("ppo", tree | {"allow_changes": ["seed"], "output_dir": str(tmp_path / "b")})
    for keys in ({}, {"allow_changes": ["num_steps"]}):  # the first refusal is the final one
        with pytest.raises(UserError, match="already taken 2 steps, so it cannot end at step 1"):
            run_command("ppo", tree | {"num_steps": 1, "save_every": 2} | keys | RESUME)
    shutil.rmtree(tmp_path / "run/checkpoints")
    for changed in ({"num_steps": 9, "save_every": 2}, {"num_steps": 1}, {"save_every": 3}):
        with pytest.raises(UserError, match="is finished and has no checkpoint") as caught:
            run_command("ppo", tree | changed | RESUME)
        assert "allow_changes" not in str(caught.value)
    assert (tmp_path / "run/finished").exists()


@pytest.mark.parametrize("engine", ["native", "trl"])
@pytest.mark.parametrize("key", ["max_steps", "num_train_epochs"])
def test_fewer_steps_of_a_finished_run_are_refused_at_once(tmp_path, echo_model, engine, key):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    trainer = {key: 2, "learning_rate": 1e-2}
    tree = offline_tree(tmp_path / "run", echo_model, data, trainer=trainer, engine=engine)
    run_command("sft", tree)
    message = {"max_steps": "has already taken 2 steps", "num_train_epochs": "fewer epochs"}[key]
    with pytest.raises(UserError, match=message) as caught:
        run_command("sft", tree | {"trainer": trainer | {key: 1}} | RESUME)
    assert "allow_changes" not in str(caught.value)


def test_a_changed_reward_file_is_permitted_by_its_key(tmp_path, echo_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "def score(conversations):\n    return [{} for _ in conversations]\n"
    (tmp_path / "mine.py").write_text(code.format("float(len(_[-1]['content']))"))
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2)
    tree["rewards"] = [{"kind": "function", "path": "mine.py:score"}]
    run_command("ppo", tree)
    (tmp_path / "mine.py").write_text(code.format("0.5"))
    longer = tree | {"num_steps": 3} | RESUME
    with pytest.raises(UserError, match=r"content of rewards\.0\.path .*set allow_changes"):
        run_command("ppo", longer)
    run_command("ppo", longer | {"allow_changes": ["rewards.0.path"]})
    rows = {row["key"]: row for row in read_rows(tmp_path / "run/changes.jsonl")}
    assert rows["rewards.0.path"]["content"] is True
    assert metrics_of(tmp_path / "run")[-1]["reward/mean"] == 0.5


def test_a_larger_kl_budget_continues_a_run_that_had_ended(tmp_path, echo_model):
    budget = {"kl": {"controller": "budget", "target": 1e-9}, "algorithm": {"kl_coef": 0.01}}
    tree = online_tree(tmp_path / "run", echo_model, **budget)
    run_command("ppo", tree)
    assert len(metrics_of(tmp_path / "run")) < 4
    larger = tree | {"kl": {"controller": "budget", "target": 1e6}, "allow_changes": ["kl.target"]}
    run_command("ppo", larger | RESUME)
    assert len(metrics_of(tmp_path / "run")) == 4


def test_every_reason_is_a_sentence_and_every_key_exists():
    from rlhf.config.help import sections_of
    from rlhf.config.online import OnlineConfig
    from rlhf.config.optimization import DPOOptions, RewardOptions
    from rlhf.config.reward import RewardConfig

    known = {"command", "trainer.optim"}
    for config in (OnlineConfig, RewardConfig):
        known |= {row.name for section in sections_of(config, {}) for row in section.keys}
    known |= {
        f"trainer.{name}" for cls in (DPOOptions, RewardOptions) for name in cls.__annotations__
    }
    missing = [
        key
        for key in FIXED_KEYS
        if not any(name == key or name.startswith(f"{key}.") for name in known)
    ]
    assert not missing


# Branches


def branch(source, target, capsys):
    code = main(["branch", str(source), str(target)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_a_branch_without_changes_ends_like_its_source(tmp_path, echo_model, capsys, command):
    keys = ONLINE[command] | {"keep_last": 4, "keep_best": True}
    keys["evaluation"] = {"episodes": 4, "every": 1}
    tree = online_tree(tmp_path / "source", echo_model, **keys)
    run_command(command, tree)
    before = digests(tmp_path / "source")
    code, told = branch(tmp_path / "source/checkpoints/step-2", tmp_path / "new", capsys)
    assert code == 0, told.err
    assert [row["step"] for row in metrics_of(tmp_path / "new")] == [1, 2]
    words = told.out.splitlines()[-1].removeprefix("continue: rlhf ").split()
    assert main(words) == 0, capsys.readouterr().err
    assert_same_run(tmp_path / "source", tmp_path / "new")
    assert digests(tmp_path / "source") == before
    origin = json.loads((tmp_path / "new/branch.json").read_text())
    assert origin == {"run": str(tmp_path / "source"), "checkpoint": "step-2", "step": 2}
    assert "Branched from" in (tmp_path / "new/report.html").read_text()
    assert not unknown_entries(tmp_path)
    words.remove("--resume")
    assert main([*words, "--overwrite"]) == 0, capsys.readouterr().err
    assert not (tmp_path / "new/branch.json").exists()


@pytest.mark.parametrize(
    ("command", "engine"), [("sft", "native"), ("dpo", "native"), ("sft", "trl")]
)
def test_a_branch_of_an_offline_run_keeps_the_best_model(
    tmp_path, echo_model, capsys, command, engine
):
    rows = sft_rows() if command == "sft" else pair_rows()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    tree = offline_tree(tmp_path / "source", echo_model, data, engine=engine, keep_last=4)
    run_command(command, tree)
    before = digests(tmp_path / "source")
    name = {"native": "step", "trl": "checkpoint"}[engine]
    code, told = branch(tmp_path / f"source/checkpoints/{name}-4", tmp_path / "new", capsys)
    assert code == 0, told.err
    assert "no longer exists" not in told.out
    run_command(command, tree | {"output_dir": str(tmp_path / "new")} | RESUME)
    assert same(weights_of(tmp_path / "source"), weights_of(tmp_path / "new"))
    assert metrics_of(tmp_path / "source") == metrics_of(tmp_path / "new")
    assert digests(tmp_path / "source") == before


def test_a_branch_needs_no_tracker(tmp_path, echo_model, capsys, monkeypatch):
    """The run may have been tracked on another machine, or by a plug-in."""
    tree = online_tree(tmp_path / "source", echo_model, num_steps=1)
    run_command("rloo", tree)
    recorded = tmp_path / "source" / "config.yaml"
    config = yaml.safe_load(recorded.read_text()) | {"track": ["wandb"]}
    recorded.write_text(yaml.safe_dump(config))
    monkeypatch.setattr("rlhf.runs.trackers.find_spec", lambda name: None)
    code, _ = branch(tmp_path / "source/checkpoints/step-1", tmp_path / "new", capsys)
    assert code == 0
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["track"] == ["wandb"]


def test_a_branch_with_other_settings(tmp_path, echo_model, capsys):
    tree = online_tree(tmp_path / "source", echo_model, keep_last=4)
    run_command("ppo", tree)
    assert branch(tmp_path / "source/checkpoints/step-3", tmp_path / "new", capsys)[0] == 0
    options = ["--config", str(tmp_path / "new/config.yaml"), "--output_dir", str(tmp_path / "new")]
    options += ["--resume", "--num_steps", "6", "--rollout.temperature", "0.7"]
    assert main(["ppo", *options]) == 2
    assert "set allow_changes: [rollout.temperature]" in capsys.readouterr().err
    assert main(["ppo", *options, "--allow_changes", "[rollout.temperature]"]) == 0
    assert len(metrics_of(tmp_path / "new")) == 6
    old, new = (metrics_of(tmp_path / name) for name in ("source", "new"))
    assert old[:3] == new[:3]
    assert old[3] != new[3]


def test_what_cannot_be_branched_is_one_line(tmp_path, echo_model, capsys):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2)
    run_command("ppo", tree)
    step = tmp_path / "run/checkpoints/step-2"
    cases = {
        tmp_path / "run": "step-1, step-2",
        tmp_path / "run/final": "is not a checkpoint",
        tmp_path / "run/checkpoints/step-9": "has step-1, step-2",
        tmp_path / "nowhere/step-1": "no checkpoint",
    }
    for source, message in cases.items():
        code, told = branch(source, tmp_path / "new", capsys)
        assert code == 2
        assert told.err.count("\n") == 1
        assert message in told.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for target in ("full", "full/notes.txt", "run", "run/checkpoints/new"):
        code, told = branch(step, tmp_path / target, capsys)
        assert (code, told.err.count("\n")) == (2, 1)
    weights = step / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, told = branch(step, tmp_path / "new", capsys)
    assert (code, told.err.count("\n")) == (2, 1)
    assert "is damaged" in told.err
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*part"))


def test_a_branch_needs_only_its_own_checkpoint(tmp_path, echo_model, capsys):
    """The state of the last checkpoint is torn, and a folder has a name like a checkpoint."""
    keys = {"keep_last": 4, "keep_best": True, "evaluation": {"episodes": 4, "every": 1}}
    run_command("grpo", online_tree(tmp_path / "run", echo_model, num_steps=2, **keys))
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-old").mkdir()
    assert branch(checkpoints / "step-1", tmp_path / "one", capsys)[0] == 0
    state = checkpoints / "step-2/state.json"
    state.write_text(state.read_text()[:40])
    code, told = branch(checkpoints / "step-1", tmp_path / "two", capsys)
    assert code == 0, told.err
    new = online_tree(tmp_path / "two", echo_model, num_steps=2, **keys)
    run_command("grpo", new | RESUME)
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "run")


def test_where_a_branch_can_be_written(tmp_path, echo_model, capsys):
    run_command("ppo", online_tree(tmp_path / "run", echo_model, num_steps=1))
    step = tmp_path / "run/checkpoints/step-1"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    cases = {
        "file/new": "file/new cannot be written",
        "nowhere": "which does not exist",
        "run/new": "is inside the run",
    }
    for target, message in cases.items():
        code, told = branch(step, tmp_path / target, capsys)
        assert (code, told.err.count("\n")) == (2, 1)
        assert message in told.err
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert branch(step, tmp_path / "link", capsys)[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/config.yaml").exists()
    (tmp_path / "run/config.yaml").write_text("num_steps: 3\n")
    code, told = branch(step, tmp_path / "new", capsys)
    assert (code, "is not the configuration of a training run" in told.err) == (2, True)


def test_the_page_lists_every_key_that_never_changes():
    page = (Path(__file__).resolve().parents[2] / "docs/continuing.md").read_text()
    assert not [key for key in FIXED_KEYS if f"`{key}`" not in page]
