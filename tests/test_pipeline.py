"""Pipelines are checked whole before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.errors import UserError
from rlhf.pipeline import missing_references, read_pipeline, run_pipeline, stage_config_tree
from tests.helpers.training import pair_rows, same, sft_rows, weights_of, write_rows


def pipeline_file(folder: Path, stages: list, **keys) -> Path:
    path = folder / "pipeline.yaml"
    tree = {"output_dir": str(folder / "out"), "stages": stages} | keys
    path.write_text(yaml.safe_dump(tree))
    return path


def sft_stage(**keys) -> dict:
    stage = {"name": "sft", "command": "sft", "model": {"path": "m"}, "data": [{"path": "d.jsonl"}]}
    return stage | keys


def dpo_stage(**keys) -> dict:
    return sft_stage(name="dpo", command="dpo", model={"path": "stage:sft"}) | keys


RLOO = {
    "name": "rloo",
    "command": "rloo",
    "model": {"path": "stage:sft"},
    "env": {"id": "text/Echo-v0"},
}


def test_references_seed_and_overrides(tmp_path):
    file = pipeline_file(tmp_path, [sft_stage(), dpo_stage(seed=7)], seed=3)
    pipeline = read_pipeline(
        [file], [("dpo.batch_size", 32), ("output_dir", str(tmp_path / "o"))], COMMANDS
    )
    first, second = (stage_config_tree(pipeline, stage) for stage in pipeline.stages)
    assert (first["seed"], second["seed"]) == (3, 7)
    assert second["model"]["path"] == str(tmp_path / "o" / "sft" / "final")
    assert second["batch_size"] == 32
    assert second["output_dir"] == str(tmp_path / "o" / "dpo")
    assert missing_references(pipeline, pipeline.stages[1]) == ["stage:sft"]


@pytest.mark.parametrize(
    ("stages", "overrides", "words"),
    [
        ([sft_stage(command="stf")], [], ["stage sft", "'stf'", "'sft'"]),
        ([sft_stage(), dpo_stage(bach_size=3)], [], ["stage dpo", "'batch_size'"]),
        ([dpo_stage()], [], ["stage dpo", "stage:sft", "no earlier stage"]),
        ([sft_stage(), sft_stage()], [], ["two stages have the name 'sft'"]),
        ([{"command": "sft"}], [], ["stages.0", "name"]),
        ([], [], ["`stages` must be a list"]),
        ([sft_stage()], [("stf.seed", 1)], ["no stage is called 'stf'", "'sft'"]),
        ([sft_stage()], [("sed", 1)], ["unknown key 'sed'", "'seed'"]),
        ([sft_stage(), RLOO | {"algorithm": {"lam": 0.5}}], [], ["stage rloo: lam has no effect"]),
        ([sft_stage(), RLOO | {"critic": "separate"}], [], ["stage rloo: critic has no effect"]),
    ],
)
def test_mistakes_name_stage_key_and_cure(tmp_path, stages, overrides, words):
    with pytest.raises(UserError) as caught:
        read_pipeline([pipeline_file(tmp_path, stages)], overrides, COMMANDS)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


def test_a_failed_stage_is_named_and_finished_ones_stay(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    split = {"name": "split", "command": "split", "data": [{"path": str(data)}], "kind": "sft"}
    broken = sft_stage(data=[{"path": "stage:split/nowhere.jsonl"}])
    pipeline = read_pipeline([pipeline_file(tmp_path, [split, broken])], [], COMMANDS)
    with pytest.raises(UserError, match=r"stage sft: .*nowhere\.jsonl"):
        run_pipeline(pipeline, COMMANDS)
    assert (tmp_path / "out/split/finished").exists()
    assert not (tmp_path / "out/sft").exists()
    with pytest.raises(UserError, match="exists already"):
        run_pipeline(pipeline, COMMANDS)


def test_a_damaged_model_of_an_earlier_stage_is_not_trained_on(tmp_path, echo_model):
    rows = write_rows(tmp_path / "rows.jsonl", sft_rows())
    keys = {"data": [{"path": str(rows)}], "max_length": 32, "trainer": {"max_steps": 1}}
    first = sft_stage(name="first", model={"path": str(echo_model)}, **keys)
    second = sft_stage(name="second", model={"path": "stage:first"}, **keys)
    broken = second | {"data": [{"path": "stage:first/nowhere.jsonl"}]}
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run_pipeline(
            read_pipeline([pipeline_file(tmp_path, [first, broken])], [], COMMANDS), COMMANDS
        )
    weights = tmp_path / "out/first/final/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    file = pipeline_file(tmp_path, [first, second], resume=True)
    with pytest.raises(UserError, match=r"stage second: .*model\.safetensors is damaged.*remove"):
        run_pipeline(read_pipeline([file], [], COMMANDS), COMMANDS)
    assert not (tmp_path / "out/second").exists()


def reward_stage(**keys) -> dict:
    return sft_stage(name="reward", command="reward", model={"path": "m"}) | keys


PPO = {"name": "ppo", "command": "ppo", "env": {"id": "text/Echo-v0"}, "model": {"path": "m"}}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([reward_stage(), dpo_stage(model={"path": "stage:reward"})], "writes no language model"),
        (
            [sft_stage(), PPO | {"rewards": [{"kind": "learned", "path": "stage:sft"}]}],
            "`rlhf sft` writes no reward model",
        ),
        (
            [
                reward_stage(),
                {
                    "name": "e",
                    "command": "evaluate",
                    "policies": [{"name": "p", "model": {"path": "stage:reward"}}],
                    "text": [{"path": "d.jsonl"}],
                },
            ],
            "writes no language model",
        ),
    ],
)
def test_a_stage_is_no_model_of_the_other_kind(tmp_path, stages, words):
    with pytest.raises(UserError, match=words):
        read_pipeline([pipeline_file(tmp_path, stages)], [], COMMANDS)


LATER = {
    "options": (
        dpo_stage(trainer={"precompute_ref_log_probs": True}),
        "is not an option of the native engine",
    ),
    "modules": (
        dpo_stage(model={"path": "stage:sft", "lora": {"target_modules": ["q_prj"]}}),
        "did you mean 'q_proj'",
    ),
    "reward modules": (
        reward_stage(model={"path": "stage:sft", "lora": {"target_modules": ["q_prj"]}}),
        "did you mean 'q_proj'",
    ),
    "lengths": (
        reward_stage(model={"path": "stage:sft"}, max_length=999),
        "max_length must be <= 64",
    ),
    "updates": (
        PPO | {"model": {"path": "stage:sft"}, "algorithm": {"num_minibatches": 99}},
        "must be at most episodes_per_step",
    ),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("waits", ["for a model", "for data too"])
def test_a_dry_run_refuses_what_a_later_stage_would(tmp_path, echo_model, capsys, name, waits):
    later, words = LATER[name]
    rows = write_rows(tmp_path / "rows.jsonl", sft_rows())
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    first = sft_stage(model={"path": str(echo_model)}, data=[{"path": str(rows)}], max_length=48)
    if "data" in later:
        later = later | {"data": [{"path": str(pairs)}]}
        later = {"max_length": 48} | later
    if waits == "for data too":
        where = "data" if "data" in later else "rewards"
        waiting = {"path": "stage:sft/rows.jsonl"}
        if where == "rewards":
            waiting |= {"kind": "function"}
        later = later | {where: [waiting]}
    file = pipeline_file(tmp_path, [first, later])
    assert main(["run", str(file), "--dry-run"]) == 2
    errors = capsys.readouterr().err
    assert f"stage {later['name']}: " in errors
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_a_stage_takes_more_steps_without_a_permission(tmp_path, echo_model):
    """Later stages that used the earlier model are refused before the stage continues."""
    rows = write_rows(tmp_path / "rows.jsonl", sft_rows())
    constant = {"lr_scheduler_type": "constant", "learning_rate": 1e-2}
    keys = {"data": [{"path": str(rows)}], "max_length": 32, "evaluations": 1}
    first = sft_stage(
        name="first", model={"path": str(echo_model)}, trainer=constant | {"max_steps": 1}, **keys
    )
    second = first | {"name": "second", "model": {"path": "stage:first"}}
    third = second | {"name": "third", "model": {"path": "stage:second"}}

    def run(stages, *overrides):
        file = pipeline_file(tmp_path, stages)
        run_pipeline(read_pipeline([file], overrides, COMMANDS), COMMANDS)

    run([first])
    more = [("first.trainer.max_steps", 2), ("resume", True)]
    run([first], *more)
    run([first | {"name": "whole", "trainer": constant | {"max_steps": 2}}], ("resume", True))
    assert same(weights_of(tmp_path / "out/first"), weights_of(tmp_path / "out/whole"))
    run([first, second, third], *more)
    before = weights_of(tmp_path / "out/first")
    more[0] = ("first.trainer.max_steps", 3)
    message = r"stage second: model\.path is a result of the stage first.*/second and .*/third$"
    with pytest.raises(UserError, match=message):
        run([first, second, third], *more)
    assert same(before, weights_of(tmp_path / "out/first"))
    more[0] = ("first.trainer.max_steps", 1)
    with pytest.raises(UserError, match=r"stage first: .*already taken 2 steps"):
        run([first, second, third], *more)
    for name in ("second", "third"):
        shutil.rmtree(tmp_path / "out" / name)
    more[0] = ("first.trainer.max_steps", 3)
    run([first, second, third], *more)
    assert not same(before, weights_of(tmp_path / "out/first"))
    assert (tmp_path / "out/third/finished").exists()
