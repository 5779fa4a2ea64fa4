"""Trainers, batches and configurations for tests of the training loops."""

import contextlib

import pytest

from rlhf.cli.table import configure
from rlhf.models.loading import load_model
from rlhf.runs.directory import Run, seed_everything
from rlhf.training import offline
from rlhf.training.batch import make_training_batch
from rlhf.training.trl.trainer import make_trainer, make_training_arguments
from tests.helpers.training import (
    assistant,
    label_rows,
    offline_tree,
    pair_rows,
    sft_rows,
    write_rows,
)

ROWS = {"sft": sft_rows, "reward": pair_rows, "dpo": pair_rows, "kto": label_rows}


def tree_of(command, tmp_path, place, *, rows=None, name="run", engine="trl", **keys):
    """Configuration of an offline run of a method, by default on its own kind of rows."""
    data = write_rows(tmp_path / f"{name}.jsonl", ROWS[command]() if rows is None else rows)
    return offline_tree(tmp_path / name, place, data, engine=engine, **keys)


def trl_trainer(command, tree, change=None):
    """The TRL trainer of a method, with a model that ``change`` has modified in memory."""
    config = configure(command, tree)
    seed_everything(config.seed)
    method = offline.method_of(command, config)
    run = Run.open({**tree, "command": command})
    train_rows, eval_rows = offline.load_train_and_eval_rows(config, method)
    with changed_at_load(change):
        setup = method.setup(config, train_rows, "trl")
    train_set, eval_set = setup.encode(train_rows, True), setup.encode(eval_rows, False)
    assert setup.trainer is not None
    options = make_training_arguments(method, setup.trainer, config, run.directory, len(train_set))
    return make_trainer(setup, config, options, train_set, eval_set)


@contextlib.contextmanager
def changed_at_load(change):
    """Context in which every loaded model is passed to ``change``."""

    def load(*args, **kwargs):
        model, tokenizer = load_model(*args, **kwargs)
        change(model)
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        if change:
            patch.setattr(offline, "load_model", load)
        yield


def divergent(tmp_path, place, **keys):
    """Configuration of a run whose held-out loss first decreases and then increases."""
    rows = [row | {"completion": assistant("apple")} for row in sft_rows()]
    other = [row | {"completion": assistant("cloud")} for row in sft_rows(8)]
    held_out = write_rows(tmp_path / "held_out.jsonl", other)
    trainer = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "max_steps": 24}
    keys |= {"eval_data": [{"path": str(held_out)}], "evaluations": 12, "trainer": trainer}
    return tree_of("sft", tmp_path, place, rows=rows, **keys)


def collected_batch(trainer):
    """The training batch of one collection of an online run."""
    collected = trainer.step_collector.collect(0)
    return make_training_batch(trainer, collected.rollouts, collected.rewards)[0]
