"""Every kind of reward model, on decoders and encoders: trained, saved, and scored alike."""

import json
import signal

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rlhf.cli.table import configure, run_command
from rlhf.config.reward import MODEL_KINDS, RewardModelKind
from rlhf.errors import UserError
from rlhf.reward_models import LearnedReward, build, losses
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.pairwise import PairModel
from rlhf.runs.interrupt import Interrupted
from rlhf.training import offline
from rlhf.training.reward_models.base import reward_kind_of
from rlhf.training.reward_models.encoding import RewardEncoder, collate_texts, length_grouped_order
from rlhf.training.reward_models.preference import PairKind
from rlhf.training.trl.callback import RunCallback
from tests.helpers.reward_runs import REWARD_RUNS, labeled_texts
from tests.helpers.training import (
    assistant,
    evaluations,
    pairs_tree,
    same,
    save_encoder,
    user,
    weights_of,
    write_rows,
)


@pytest.fixture(scope="module")
def encoder_model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def tree_of_kind(name, tmp_path, place, **more):
    settings, rows = REWARD_RUNS[name]
    return pairs_tree(tmp_path, place, rows=rows, **{"kind": name, **settings, **more})


@pytest.mark.parametrize("backbone", ["echo_model", "encoder_model"])
@pytest.mark.parametrize("name", REWARD_RUNS)
def test_held_out_loss_of_each_kind_from_the_saved_checkpoint(tmp_path, request, name, backbone):
    """The held-out loss in the log, worked out anew from what the saved checkpoint says."""
    place = request.getfixturevalue(backbone)
    tree = tree_of_kind(name, tmp_path, place)
    final = run_command("reward", tree)
    logged = evaluations(tmp_path / "run")
    assert sorted(logged) == [0, 2, 4, 6, 8]
    assert (tmp_path / "run" / "evaluation" / "run" / "summary.json").exists()
    config = configure("reward", tree)
    method = offline.method_of("reward", config)
    _, rows = offline.load_train_and_eval_rows(config, method)
    best = min(value for step, value in logged.items() if step)
    kind = reward_kind_of(config)
    tokenizer = AutoTokenizer.from_pretrained(final)
    encoder = RewardEncoder(kind, tokenizer, append_eos=backbone == "echo_model")
    if name == "pairwise":
        encoder.append_eos = False
    examples = list(encoder(rows, False))
    if name == "length_debiased":
        assert LearnedReward.load(final).model.config.num_labels == 1
        return  # the head that the loss also reads is gone
    automatic = AutoModelForSequenceClassification
    if name == "process":
        automatic = AutoModelForTokenClassification
    model = automatic.from_pretrained(final).eval()
    total, weight = 0.0, 0
    for example in examples:  # each alone, without padding
        batch = collate_texts([example], pad_id=tokenizer.pad_token_id)
        labels = batch.pop("labels")
        logits = []
        with torch.no_grad():
            for text in example.ids:
                logits.append(model(torch.tensor([text])).logits)
        total += kind.loss(torch.cat(logits), labels, torch.tensor(1.0)).item()
        weight += int((labels != IGNORED).sum())
    if name in ("regression", "process"):  # the logged mean of batches weighs missing labels evenly
        assert total / weight == pytest.approx(best, rel=0.1)
    else:
        assert total / weight == pytest.approx(best, abs=1e-4)


SCORERS = {
    "preference": "LearnedReward",
    "heads": "HeadEnsemble",
    "cost": "CostModel",
    "pairwise": "PairModel",
    "process": "ProcessReward",
}


@pytest.mark.parametrize("name", SCORERS)
def test_kind_trained_loads_the_scorer_of_the_sidecar(tmp_path, encoder_model, name):
    final = run_command("reward", tree_of_kind(name, tmp_path, encoder_model))
    scorer = build({"kind": "trained", "path": str(final)})
    assert type(scorer).__name__ == SCORERS[name]
    talks = [
        [*user("Repeat: apple"), {"role": "assistant", "content": text, "answer": "river"}]
        for text in ("apple", "river stone cloud apple river", "stone 3")
    ]
    together = scorer.score(talks)
    assert all(value is not None for value in together.values)
    alone = [scorer([talk])[0] for talk in talks]
    assert together.values == pytest.approx(alone, abs=1e-5)


def test_head_ensemble_score_and_disagreement(tmp_path, encoder_model):
    final = run_command("reward", tree_of_kind("heads", tmp_path, encoder_model))
    scores = build({"kind": "trained", "path": str(final)}).score([[*user("a"), *assistant("b")]])
    heads = [scores.components[f"ensemble.head{i}"][0] for i in range(3)]
    assert len(set(heads)) == 3
    assert scores.values[0] == pytest.approx(sum(heads) / 3, abs=1e-6)
    assert scores.components["ensemble.disagreement"][0] > 0


def test_a_reward_report_loads_the_kind_of_the_checkpoint(tmp_path, encoder_model):
    tree = tree_of_kind("heads", tmp_path, encoder_model)
    final = run_command("reward", tree)
    config = {"output_dir": str(tmp_path / "report"), "reward": str(final), "data": tree["data"]}
    run = run_command("reward-report", {**config, "stress_size": 2})
    summary = json.loads((run / "evaluation" / "pairs" / "summary.json").read_text())
    assert summary["reward"] == "reward"
    assert 0 <= summary["accuracy"]["value"] <= 1


def test_pair_model_is_antisymmetric(tmp_path, encoder_model):
    final = run_command("reward", tree_of_kind("pairwise", tmp_path, encoder_model))
    model = PairModel.load(final)
    prompts = [user("Repeat: apple")] * 2
    odds, agree = model.log_odds_and_consistency(prompts, ["apple", "river"], ["river", "apple"])
    assert odds[0] == pytest.approx(-odds[1], abs=1e-5)
    assert agree[0] == agree[1]


def test_classifier_of_bare_texts_ignores_the_prompt(tmp_path, encoder_model):
    final = run_command("reward", tree_of_kind("classification", tmp_path, encoder_model))
    reward_of = LearnedReward.load(final)
    bare, asked = reward_of([assistant("apple 3"), [*user("What?"), *assistant("apple 3")]])
    assert bare == asked


def test_class_names_in_the_transformers_config(tmp_path, encoder_model):
    final = run_command("reward", tree_of_kind("classes", tmp_path, encoder_model))
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.problem_type == "single_label_classification"
    assert LearnedReward.load(final, label="b")([assistant("river 1")])[0] is not None


def test_report_on_classes_has_tf_idf_baseline(tmp_path, encoder_model):
    run_command("reward", tree_of_kind("classes", tmp_path, encoder_model))
    summary = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert summary["baselines"]["TF-IDF"]["accuracy"]["mean"] == 1.0  # a word gives it away
    gain = summary["gains"]["TF-IDF"]["accuracy"]
    assert gain["low"] <= gain["mean"] <= 0
    gain = summary["gains"]["TF-IDF"]["macro_f1"]
    assert gain["mean"] <= 0
    assert gain["low"] is gain["high"] is None  # few rows have no interval of a macro-F1


def test_report_uses_test_data(tmp_path, encoder_model):
    rows = write_rows(tmp_path / "test.jsonl", labeled_texts(20))
    run_command(
        "reward",
        tree_of_kind("classification", tmp_path, encoder_model, test_data=[{"path": str(rows)}]),
    )
    summary = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert summary["rows"] == 20


class Halved(PairKind):
    """Half of the Bradley-Terry loss: a kind that is defined outside the package."""

    def pair_losses(self, chosen, rejected, margin):
        return 0.5 * losses.bradley_terry_loss(chosen, rejected)


def test_new_kind_is_one_class_and_one_row(tmp_path, encoder_model, monkeypatch):
    monkeypatch.setitem(MODEL_KINDS, "halved", RewardModelKind(f"{__name__}:Halved"))
    starts = {}
    for name in ("preference", "halved"):
        run_command("reward", pairs_tree(tmp_path, encoder_model, kind=name, name=name))
        starts[name] = evaluations(tmp_path / name)[0]
        assert (tmp_path / name / "evaluation" / name / "summary.json").exists()
    assert starts["halved"] == pytest.approx(starts["preference"] / 2, abs=1e-5)


REFUSED = {
    "kind must be one of .* got 'prefrence'; did you mean 'preference'": {"kind": "prefrence"},
    "flip_rate has no effect on kind: preference": {"flip_rate": 0.1},
    "kind: unbiased needs flip_rate > 0": {"kind": "unbiased"},
    "margins has no effect on kind: ranking": {"kind": "ranking", "margins": True},
    "num_heads has no effect on kind: cost": {"kind": "cost", "num_heads": 2},
    "labels must name at least two classes": {"kind": "classification", "labels": ["a"]},
    "multilabel needs labels": {"kind": "multilabel"},
    "set micro_batch_size equal to batch_size, got 4 and 8": {"kind": "length_debiased"},
    "center_rewards_coefficient has no effect on kind: cost": {
        "kind": "cost",
        "trainer": {"center_rewards_coefficient": 0.1},
    },
    "separator is empty": {"kind": "process", "separator": ""},
    "max_length must be <= 64": {"max_length": 65},
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_settings_are_refused(tmp_path, encoder_model, message):
    with pytest.raises(UserError, match=message):
        run_command("reward", pairs_tree(tmp_path, encoder_model, **REFUSED[message]))


def test_missing_columns_are_refused(tmp_path, encoder_model):
    with pytest.raises(UserError, match="no column 'chosen_unsafe' to keep"):
        run_command("reward", pairs_tree(tmp_path, encoder_model, kind="cost"))
    with pytest.raises(UserError, match=r"steps data needs prompt \+ steps \+ labels"):
        run_command("reward", pairs_tree(tmp_path, encoder_model, kind="process", name="other"))


def test_invalid_labels_are_dropped(tmp_path, encoder_model, caplog):
    rows = [*labeled_texts(32), {"text": "apple", "label": 2}]
    with caplog.at_level("INFO"):
        run_command(
            "reward",
            pairs_tree(
                tmp_path, encoder_model, rows=rows, kind="classification", eval_fraction=0.1, seed=3
            ),
        )
    assert "1 dropped: label is not one of the classes 0 to 1" in caplog.text


@pytest.mark.parametrize("lora", [{"rank": 2}])
@pytest.mark.parametrize("name", ["classification", "process"])
def test_lora_on_an_encoder_is_merged(tmp_path, encoder_model, name, lora):
    model = {"path": str(encoder_model), "lora": lora}
    final = run_command("reward", tree_of_kind(name, tmp_path, encoder_model, model=model))
    assert not (final / "adapter_config.json").exists()
    logged = evaluations(tmp_path / "run")
    assert logged[8] != logged[0]
    build({"kind": "trained", "path": str(final)})


def test_resume_with_transformers_trainer_is_exact(tmp_path, encoder_model, monkeypatch):
    """Batches of like length come in an order of the seed, not of the trainer's generator."""
    keys = {"trainer": {"max_steps": 8, "num_train_epochs": 3}}
    whole = tree_of_kind("classification", tmp_path, encoder_model, **keys)
    run_command("reward", whole)
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    original = RunCallback.on_step_end

    def stop(self, args, state, control, **more):
        if state.global_step == 6:
            self.stop.number = signal.SIGINT
        return original(self, args, state, control, **more)

    monkeypatch.setattr(RunCallback, "on_step_end", stop)
    with pytest.raises(Interrupted):
        run_command("reward", cut)
    monkeypatch.undo()
    run_command("reward", cut | {"resume": True})
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "cut"))
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "cut")


def test_length_grouped():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 500, size=1003)
    order = length_grouped_order(lengths.tolist(), 8, generator)
    assert sorted(order.tolist()) == list(range(1003))
    widths = [lengths[order[i : i + 8]] for i in range(0, 1000, 8)]
    padding = sum(int(w.max() * len(w) - w.sum()) for w in widths) / sum(w.sum() for w in widths)
    assert padding < 0.05
    firsts = [w.max() for w in widths[1:]]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.3  # no order among batches
    assert widths[0].max() == lengths.max()
