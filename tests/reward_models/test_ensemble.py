import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.reward_models import LearnedReward, PerConversationReward, build
from rlhf.reward_models.core import Unscorable, last_reply
from rlhf.reward_models.ensemble import Ensemble, HeadEnsemble, average_weights


def table(name, scores):
    def look_up(conversation):
        value = scores[last_reply(conversation)]
        if value is None:
            raise Unscorable("unknown")
        return value

    return PerConversationReward(look_up, name=name)


MEMBERS = [
    table("a", {"x": 1.0, "y": 0.0, "z": 1.0}),
    table("b", {"x": 3.0, "y": 0.0, "z": None}),
    table("c", {"x": 8.0, "y": 0.0, "z": 2.0}),
]


@pytest.mark.parametrize(
    ("how", "x"), [("mean", 4.0), ("worst", 1.0), ("uncertainty", 4.0 - 0.5 * 26 / 3)]
)
def test_combinations_by_hand(how, x, helpers):
    """The variance of 1, 3, 8 is 26/3 with ddof=0 (13 with ddof=1)."""
    ensemble = Ensemble(MEMBERS, how=how, penalty=0.5)
    scores = ensemble.score([helpers["talk"]("q", reply) for reply in "xyz"])
    assert scores.values == pytest.approx([x, 0.0, None])
    disagreement = scores.components["ensemble.disagreement"]
    assert disagreement == pytest.approx([(26 / 3) ** 0.5, 0.0, None])
    assert scores.components["ensemble.b"] == [3.0, 0.0, None]
    assert scores.counts == {"b: unknown": 1}


def test_mistakes():
    with pytest.raises(UserError, match="how must be one of"):
        Ensemble(MEMBERS, how="median")
    with pytest.raises(UserError, match="at least two members"):
        Ensemble(MEMBERS[:1])
    with pytest.raises(ValueError, match="2 rewards are named 'a'"):
        Ensemble([MEMBERS[0], table("a", {})])


def test_checkpoints_as_an_ensemble(helpers, tmp_path):
    paths = [str(helpers["decoder"](tmp_path / str(seed), seed=seed)) for seed in range(3)]
    talks = [helpers["talk"]("q", reply) for reply in ("the fox", "yes 1 2", "dog " * 9)]
    alone = np.array([LearnedReward.load(path)(talks) for path in paths])
    ensemble = build({"kind": "ensemble", "paths": paths, "how": "worst"})
    scores = ensemble.score(talks)
    assert scores.values == pytest.approx(alone.min(0).tolist(), abs=1e-5)
    assert scores.components["ensemble.disagreement"] == pytest.approx(
        alone.std(0).tolist(), abs=1e-5
    )
    members = [scores.components[f"ensemble.member{i}"] for i in range(3)]
    assert np.array(members) == pytest.approx(alone, abs=1e-5)


def test_the_members_of_two_ensembles_stay_apart(helpers, tmp_path):
    """Both ensembles have a ``member0``; its scores are those of its checkpoint."""
    paths = [str(helpers["decoder"](tmp_path / str(seed), seed=seed)) for seed in range(4)]
    talks = [helpers["talk"]("q", reply) for reply in ("the fox", "yes 1 2")]
    alone = [LearnedReward.load(path)(talks) for path in paths]
    spec = [
        {"kind": "ensemble", "name": "first", "paths": paths[:2]},
        {"kind": "ensemble", "name": "second", "paths": paths[2:]},
    ]
    components = build(spec).score(talks).components
    assert components["first.member0"] == pytest.approx(alone[0], abs=1e-5)
    assert components["second.member0"] == pytest.approx(alone[2], abs=1e-5)


def test_heads_of_one_backbone_as_an_ensemble(helpers, tmp_path):
    path = helpers["decoder"](tmp_path, num_labels=4)
    talks = [helpers["talk"]("q", reply) for reply in ("the fox", "yes 1 2")]
    ensemble = HeadEnsemble.load(str(path), how="uncertainty", penalty=0.2)
    inner = ensemble.inner
    logits = inner.logits_of_token_ids([inner.encode(talk) for talk in talks]).double().numpy()
    expected = logits.mean(1) - 0.2 * logits.var(1)
    assert ensemble(talks) == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="at least two heads"):
        HeadEnsemble.load(str(helpers["decoder"](tmp_path / "one")))


def test_averaged_weights_are_the_mean_and_load_again(helpers, tmp_path):
    paths = [helpers["decoder"](tmp_path / str(seed), seed=seed) for seed in range(2)]
    sidecar = paths[0] / "reward_model.json"
    calibrated = json.loads(sidecar.read_text()) | {"temperature": 3.0, "mean": 1.0, "std": 2.0}
    sidecar.write_text(json.dumps(calibrated))
    merged = average_weights(paths, tmp_path / "merged")
    states = [
        AutoModelForSequenceClassification.from_pretrained(p).state_dict() for p in [*paths, merged]
    ]
    for name, mean in states[2].items():
        torch.testing.assert_close(mean, (states[0][name] + states[1][name]) / 2)
    reward = LearnedReward.load(merged)
    assert (reward.temperature, reward.moments) == (1.0, None)
    with pytest.raises(FileExistsError, match="not empty"):
        average_weights(paths, merged)


def test_averaging_rejects_incompatible_checkpoints(helpers, tmp_path):
    a = helpers["decoder"](tmp_path / "a")
    b = helpers["decoder"](tmp_path / "b", num_hidden_layers=1)
    with pytest.raises(UserError, match="parameter names or shapes of the checkpoints differ"):
        average_weights([a, b], tmp_path / "out")
    sidecar = a / "reward_model.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"append_eos": False}))
    with pytest.raises(UserError, match="encode texts differently"):
        average_weights([a, b], tmp_path / "out")


def test_members_on_their_own_scale(helpers, tmp_path):
    paths = [helpers["decoder"](tmp_path / str(seed), seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match="has no stored mean and std"):
        Ensemble.load([str(p) for p in paths], own_scale=True)
