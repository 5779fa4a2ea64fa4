"""Attributions against closed forms, finite differences, captum, and compositions of rewards."""

from __future__ import annotations

import pytest
import torch

from rlhf.config.explain import AttributionSpec
from rlhf.errors import UserError
from rlhf.explain.attribution import gradient_times_input, integrated_gradients
from rlhf.explain.reward.explainer import RewardExplainer
from rlhf.explain.score_function import DifferentiableReward
from rlhf.models.rewards import enable_reward_packing
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.core import last_reply
from rlhf.reward_models.ensemble import Ensemble
from rlhf.reward_models.learned import LearnedReward
from tests.explain.rewards import PAIRS, linear_reward

ONLY_ATTRIBUTIONS = AttributionSpec(prefix_points=0, other_prompts=0, counterfactual_words=0)


def attributions(reward, pair, **options):
    """The explanation of a pair without anything but attributions."""
    changed = {**vars(ONLY_ATTRIBUTIONS), **options}
    explainer = RewardExplainer(reward, AttributionSpec(**changed))
    (explained,) = explainer.explain_pairs([pair]).pairs
    return explained


def score_and_inputs(reward, conversation):
    """The score as a function of embeddings, and the embeddings."""
    function = DifferentiableReward(reward)
    encoded = function.encode(conversation, num_prompt_messages=1)
    constants = function.scores_without_models(conversation)

    def score(batch):
        return function.scores_of_embeddings(batch, constants)

    return score, function.embed(encoded.ids)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients"])
def test_a_linear_reward_has_the_closed_form_weight_times_count(method, template):
    reward, weights = linear_reward(template=template)
    for pair in PAIRS:
        explained = attributions(reward, pair, methods=[method])
        for sign, conversation, text in (
            (1, pair.chosen, explained.chosen),
            (-1, pair.rejected, explained.rejected),
        ):
            ids = torch.tensor(reward.encode(conversation))
            counted = torch.ones(len(ids), dtype=torch.bool)
            if method == "integrated_gradients":  # the reference contains the template
                counted = torch.tensor([part != "template" for part in text.parts])
            expected = sign * weights[ids] * counted
            torch.testing.assert_close(
                torch.tensor(text.attributions[method]), expected, rtol=1e-4, atol=1e-5
            )
            counts = torch.bincount(ids[counted], minlength=len(weights))
            by_token = torch.zeros(len(weights))
            by_token.index_add_(0, ids, torch.tensor(text.attributions[method]))
            torch.testing.assert_close(by_token, sign * weights * counts, rtol=1e-4, atol=1e-5)
        total = sum(explained.chosen.attributions[method] + explained.rejected.attributions[method])
        start = (explained.chosen.reference_score or 0) - (explained.rejected.reference_score or 0)
        assert total == pytest.approx(explained.margin - start, abs=1e-4)


def finite_difference(score, inputs, token: int, width: float = 0.02) -> float:
    """The derivative of the score by a factor of one token's embedding, by a five-point stencil."""

    def at(factor: float) -> float:
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[token] *= factor
        with torch.no_grad():
            return float(score([x[None] for x in changed])[0])

    near, far = (at(1 + n * width) - at(1 - n * width) for n in (1, 2))
    return (8 * near - far) / (12 * width)


@pytest.mark.parametrize("kind", ["decoder", "encoder", "ensemble", "uncertainty", "sum"])
def test_gradient_times_input_equals_finite_differences(
    kind, decoder_path, encoder_path, tmp_path, helpers
):
    decoder = LearnedReward.load(decoder_path)
    other = LearnedReward.load(helpers["decoder"](tmp_path / "other", seed=3))
    other.name = "other"
    reward = {
        "decoder": lambda: decoder,
        "encoder": lambda: LearnedReward.load(encoder_path),
        "ensemble": lambda: Ensemble([decoder, other], how="worst"),
        "uncertainty": lambda: Ensemble([decoder, other], how="uncertainty", penalty=0.5),
        "sum": lambda: (2.0 * decoder + other.clip(-50, 50)) * 0.5,
    }[kind]()
    score, inputs = score_and_inputs(reward, PAIRS[0].chosen)
    found = gradient_times_input(score, inputs)
    assert max(map(abs, found.values)) > 0.01
    for token, value in enumerate(found.values):
        assert value == pytest.approx(finite_difference(score, inputs, token), rel=1e-3, abs=1e-4)
    assert found.score == pytest.approx(reward.score([PAIRS[0].chosen]).values[0], abs=1e-5)


def references_of(inputs, unchanged):
    """Zero embeddings, except for the tokens at some positions."""
    references = [torch.zeros_like(x) for x in inputs]
    for x, reference in zip(inputs, references, strict=True):
        reference[unchanged] = x[unchanged]
    return references


@pytest.mark.parametrize("unchanged", [[], [0, -1]])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_integrated_gradients_are_complete(kind, unchanged, decoder_path, encoder_path):
    reward = LearnedReward.load(decoder_path if kind == "decoder" else encoder_path)
    for pair in PAIRS:
        score, inputs = score_and_inputs(reward, pair.chosen)
        references = references_of(inputs, unchanged)
        found = integrated_gradients(score, inputs, references, tolerance=1e-3)
        with torch.no_grad():
            reference = float(score([x[None] for x in references])[0])
        assert found.gap <= 1e-3
        assert found.reference_score == pytest.approx(reference, abs=1e-6)
        assert sum(found.values) == pytest.approx(found.score - reference, abs=1.1e-3)
        assert all(found.values[position] == 0 for position in unchanged)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_template_is_part_of_the_reference(kind, decoder_path, encoder_path):
    reward = LearnedReward.load(decoder_path if kind == "decoder" else encoder_path)
    _, inputs = score_and_inputs(reward, PAIRS[0].chosen)
    text = attributions(reward, PAIRS[0]).chosen
    function = DifferentiableReward(reward)
    template = [i for i, part in enumerate(text.parts) if part == "template"]
    references = references_of(inputs, template)
    with torch.no_grad():
        expected = function.scores_of_embeddings([x[None] for x in references], {})
    assert text.reference_score == pytest.approx(float(expected[0]), abs=1e-5)
    values = text.attributions["integrated_gradients"]
    assert 0 < len(template) < len(values)
    assert {values[position] for position in template} == {0.0}


def test_fewer_steps_leave_a_gap_and_say_so(decoder_path):
    score, inputs = score_and_inputs(LearnedReward.load(decoder_path), PAIRS[0].chosen)
    references = references_of(inputs, [])
    few = integrated_gradients(score, inputs, references, tolerance=1e-5, max_steps=6)
    many = integrated_gradients(score, inputs, references, tolerance=1e-5, max_steps=3000)
    assert few.steps == 6
    assert few.gap > many.gap
    assert many.gap <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("unchanged", [[], [0, -1]])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_integrated_gradients_equal_captum(kind, unchanged, decoder_path, encoder_path):
    captum = pytest.importorskip("captum.attr")
    reward = LearnedReward.load(decoder_path if kind == "decoder" else encoder_path)
    score, (inputs,) = score_and_inputs(reward, PAIRS[1].rejected)
    (reference,) = references_of([inputs], unchanged)
    found = torch.tensor(
        integrated_gradients(score, [inputs], [reference], tolerance=1e-5, max_steps=6000).values
    )
    oracle = captum.IntegratedGradients(lambda x: score([x]))
    # The path of a decoder with RMSNorm needs many fixed steps near its start.
    values = oracle.attribute(inputs[None], reference[None], n_steps=4000, internal_batch_size=500)
    torch.testing.assert_close(values[0].sum(-1), found, rtol=1e-2, atol=2e-3)


def test_gradient_times_input_equals_captum(decoder_path):
    captum = pytest.importorskip("captum.attr")
    score, (inputs,) = score_and_inputs(LearnedReward.load(decoder_path), PAIRS[1].rejected)
    once = captum.InputXGradient(lambda x: score([x])).attribute(inputs[None].requires_grad_())
    ours = gradient_times_input(score, [inputs.detach()]).values
    torch.testing.assert_close(once[0].sum(-1), torch.tensor(ours), rtol=1e-4, atol=1e-5)


def test_attributions_are_linear_in_the_reward(decoder_path, helpers, tmp_path):
    first = LearnedReward.load(decoder_path)
    second = LearnedReward.load(helpers["decoder"](tmp_path / "other", seed=3))
    second.name = "other"
    method = "gradient_x_input"
    a, b, both = (
        attributions(reward, PAIRS[0], methods=[method]).rejected.attributions[method]
        for reward in (first, second, 3.0 * first - second)
    )
    assert both == pytest.approx([3 * x - y for x, y in zip(a, b, strict=True)], abs=1e-5)


def test_a_rule_changes_the_margin_but_not_the_attributions(decoder_path):
    model = LearnedReward.load(decoder_path)
    length = PerConversationReward(lambda talk: float(len(last_reply(talk))), name="length")
    method = "gradient_x_input"
    alone, with_rule = (
        attributions(reward, PAIRS[0], methods=[method]) for reward in (model, model + length)
    )
    assert with_rule.chosen.attributions == alone.chosen.attributions
    assert with_rule.margin - alone.margin == pytest.approx(
        0.0 + len("yes the quick fox") - len("no lazy dog 1 2 3"), abs=1e-4
    )


def test_a_constant_score_has_attributions_of_zero(decoder_path):
    reward = LearnedReward.load(decoder_path).threshold(-1e9)
    explained = attributions(reward, PAIRS[0])
    assert set(explained.chosen.attributions["integrated_gradients"]) == {0.0}
    assert explained.completeness_gap == 0


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_other_pairs_and_packing_change_nothing(kind, decoder_path, encoder_path):
    path = decoder_path if kind == "decoder" else encoder_path
    alone = attributions(LearnedReward.load(path), PAIRS[1])
    packed = enable_reward_packing(LearnedReward.load(path))
    together = RewardExplainer(packed, ONLY_ATTRIBUTIONS).explain_pairs(PAIRS).pairs[1]
    assert together.margin == pytest.approx(alone.margin, abs=1e-5)
    for method in ("gradient_x_input", "integrated_gradients"):
        assert together.rejected.attributions[method] == pytest.approx(
            alone.rejected.attributions[method], abs=2e-3
        )


def test_classes_of_a_text_classifier_have_their_own_attributions(helpers, tmp_path):
    folder = helpers["encoder"](tmp_path / "classifier", num_labels=2)
    text = [{"role": "assistant", "content": "the quick brown fox"}]
    explained = []
    for label in ("LABEL_0", "LABEL_1"):
        reward = LearnedReward.load(folder, label=label)
        (found,) = RewardExplainer(reward, ONLY_ATTRIBUTIONS).explain_texts([text]).texts
        explained.append(found)
    # With two classes, the log-odds of one class are minus those of the other.
    assert explained[0].score == pytest.approx(-explained[1].score, abs=1e-5)
    values = [found.attributions["gradient_x_input"] for found in explained]
    assert values[0] == pytest.approx([-v for v in values[1]], abs=1e-5)
    assert explained[0].parts[0] == explained[0].parts[-1] == "template"  # [CLS] and [SEP]


def test_a_model_that_reads_token_ids_only_is_refused_in_one_line(decoder_path, monkeypatch):
    reward = LearnedReward.load(decoder_path)

    def refuse(*_, **keys):  # as the classifiers of BART do
        raise NotImplementedError("Passing input embeddings is currently not supported")

    explainer = RewardExplainer(reward, ONLY_ATTRIBUTIONS)
    texts = [PAIRS[0].chosen]
    assert explainer.explain_texts(texts).texts
    logits = LearnedReward.logits

    def logits_of_ids(self, mask, **inputs):
        return refuse() if "inputs_embeds" in inputs else logits(self, mask, **inputs)

    monkeypatch.setattr(LearnedReward, "logits", logits_of_ids)
    with pytest.raises(UserError, match="does not accept embeddings"):
        explainer.explain_texts(texts)


def test_a_gap_above_the_tolerance_is_a_warning(decoder_path, caplog):
    reward = LearnedReward.load(decoder_path)
    for steps, warned in ((6, True), (6000, False)):
        caplog.clear()
        spec = AttributionSpec(["integrated_gradients"], tolerance=1e-3, max_steps=steps)
        RewardExplainer(reward, spec).explain_pairs(PAIRS[:1])
        assert ("exceeds attribution.tolerance (0.1%)" in caplog.text) == warned
