"""Known faults of published reward-model code: pooling, padding, EOS, templates, missing heads."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.models.loading import ensure_pad_token
from rlhf.reward_models import LearnedReward, build, checkpoint
from rlhf.reward_models.chat_template import encode_conversation, render_conversation
from rlhf.reward_models.ensemble import average_weights
from rlhf.reward_models.learned import pack_left

LENGTHS = (1, 9, 3, 30, 2, 14, 7)


@pytest.fixture(scope="module")
def talks(helpers):
    return [helpers["talk"]("how many?", "fox 7 " * n + "yes") for n in LENGTHS]


@pytest.fixture(scope="module")
def decoder(decoder_path):
    return LearnedReward.load(decoder_path, batch_size=3)


@pytest.fixture(scope="module", params=["decoder_path", "encoder_path"])
def reward(request):
    return LearnedReward.load(request.getfixturevalue(request.param), batch_size=3)


def test_alone_in_a_batch_left_and_right_agree(reward, talks):
    batched = reward(talks)
    alone = [reward([talk])[0] for talk in talks]
    assert batched == pytest.approx(alone, abs=1e-5)
    assert max(batched) - min(batched) > 0.01
    encoded = [reward.encode(talk) for talk in talks]
    for side in ("left", "right"):
        mask, ids = reward.pad_to_mask_and_ids(encoded, side=side)
        padded = reward.logits(mask, input_ids=ids)[:, 0].tolist()
        assert padded == pytest.approx(alone, abs=1e-5)


def test_what_lies_in_the_padding_does_not_matter(decoder, talks):
    encoded = [decoder.encode(talk) for talk in talks]
    mask, ids = decoder.pad_to_mask_and_ids(encoded, side="left")
    noise = torch.where(mask, ids, torch.full_like(ids, 17))
    torch.testing.assert_close(
        decoder.logits(mask, input_ids=noise), decoder.logits(mask, input_ids=ids)
    )


def test_embeddings_with_padding_give_the_same_score_as_ids(reward, talks):
    """Transformers reads the pad position here."""
    mask, ids = reward.pad_to_mask_and_ids([reward.encode(talk) for talk in talks], side="left")
    embeds = reward.model.get_input_embeddings()(ids).detach().requires_grad_()
    embeds.data[~mask] = float("nan")
    logits = reward.logits(mask, inputs_embeds=embeds)
    torch.testing.assert_close(logits, reward.logits(mask, input_ids=ids), atol=1e-5, rtol=0)
    logits.sum().backward()
    assert embeds.grad is not None
    assert torch.isfinite(embeds.grad[mask]).all()
    assert (embeds.grad[~mask] == 0).all()


def test_removing_the_final_eos_changes_the_score_even_where_pad_is_eos(helpers, tmp_path):
    """Transformers' pooling gives bit-identical scores with pad == EOS; ours must not."""
    tokenizer = helpers["tokenizer"](pad="<eos>")
    path = helpers["decoder"](tmp_path, tokenizer=tokenizer)
    reward = LearnedReward.load(path)
    ids = reward.encode(helpers["talk"]("q", "the fox"))
    assert ids[-1] == tokenizer.eos_token_id
    with_eos, without = reward.logits_of_token_ids([ids, ids[:-1]])[:, 0].tolist()
    assert abs(with_eos - without) > 1e-3

    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    theirs.config.pad_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        same = [theirs(torch.tensor([i])).logits.item() for i in (ids, ids[:-1])]
    assert same[0] == pytest.approx(same[1], abs=1e-6)


def test_plain_transformers_reads_the_same_score_when_pad_is_not_eos(decoder, decoder_path, talks):
    theirs = AutoModelForSequenceClassification.from_pretrained(decoder_path)
    for talk in talks:
        ids = torch.tensor([decoder.encode(talk)])
        with torch.no_grad():
            expected = theirs(ids).logits.item()
        assert decoder([talk])[0] == pytest.approx(expected, abs=1e-5)


def test_the_score_is_read_at_eos_not_at_white_space_after_it(decoder, helpers):
    """Chat templates of the SmolLM2 kind end in EOS and a line break."""
    talk = helpers["talk"]("q", "the fox")
    assert render_conversation(decoder.tokenizer, talk).endswith("<eos>\n")
    ids = decoder.encode(talk)
    assert ids[-1] == decoder.tokenizer.eos_token_id
    exact = encode_conversation(decoder.tokenizer, talk, append_eos=False)
    assert exact[: len(ids)] == ids
    assert decoder.tokenizer.decode(exact[len(ids) :]) == "\n"


def test_long_texts_keep_the_end_of_the_reply_and_are_counted(decoder, helpers):
    talk = helpers["talk"]("the fox " * 100, "maybe 9")
    short = helpers["talk"]("q", "maybe 9")
    ids = decoder.encode(talk)
    assert len(ids) == 64
    assert decoder.tokenizer.decode(ids).endswith("<|assistant|>maybe 9<eos>")
    scores = decoder.score([talk, short, talk])
    assert scores.counts == {"learned: truncated": 2}
    assert scores.unscored == 0


def test_truncation_keeps_the_class_token(encoder_path, helpers):
    reward = LearnedReward.load(encoder_path)
    ids = reward.encode([{"role": "assistant", "content": "fox " * 100}])
    assert len(ids) == 64
    assert (ids[0], ids[-1]) == (reward.tokenizer.cls_token_id, reward.tokenizer.sep_token_id)


def test_prefix_scores_are_the_scores_of_the_prefixes(decoder, helpers):
    talk = helpers["talk"]("q", "the quick brown fox")
    ids = decoder.encode(talk)
    prefixes = decoder.prefix_scores(talk)
    expected = decoder.logits_of_token_ids([ids[: t + 1] for t in range(len(ids))])[:, 0].tolist()
    assert prefixes.values == pytest.approx(expected, abs=1e-5)
    assert "".join(prefixes.tokens) == decoder.tokenizer.decode(ids)


def test_prefix_scores_of_an_encoder_are_refused(encoder_path, helpers):
    with pytest.raises(ValueError, match="need a decoder"):
        LearnedReward.load(encoder_path).prefix_scores(helpers["talk"]("a", "b"))


def test_bf16_model_keeps_an_fp32_head(decoder_path, encoder_path, talks):
    for path in (decoder_path, encoder_path):
        exact, coarse = LearnedReward.load(path), LearnedReward.load(path, dtype="bfloat16")
        mask, ids = coarse.pad_to_mask_and_ids([coarse.encode(talks[0])])
        assert coarse.logits(mask, input_ids=ids).dtype == torch.float32
        assert coarse(talks) == pytest.approx(exact(talks), abs=0.15)
        head = [c for c in coarse.model.children() if c is not coarse.model.base_model]
        assert {p.dtype for c in head for p in c.parameters()} == {torch.float32}


def test_a_base_model_without_a_head_is_refused(helpers, tmp_path):
    """Transformers would initialize the head randomly and warn."""
    path = helpers["causal"](tmp_path)
    with pytest.raises(UserError, match=r"no trained reward head .*score\.weight"):
        LearnedReward.load(path)


def test_a_missing_checkpoint_is_one_readable_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*missing: there is no such"):
        LearnedReward.load(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["trained", "learned", "heads", "pairwise", "process", "cost"])
@pytest.mark.parametrize("place", ["missing", "empty"])
def test_every_kind_says_in_one_line_that_there_is_no_checkpoint(tmp_path, kind, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no model at .*{place}: there is no such"):
        build({"kind": kind, "path": str(tmp_path / place)})
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"the model of this run is .*run.final$"):
        build({"kind": kind, "path": str(tmp_path / "run")})


def test_models_of_an_implicit_reward_or_an_ensemble_that_are_not_there(tmp_path):
    away = str(tmp_path / "away")
    for spec in (
        {"kind": "implicit", "policy": away, "reference": away},
        {"kind": "ensemble", "paths": [away, away]},
    ):
        with pytest.raises(FileNotFoundError, match=r"no model at .*away"):
            build(spec)
    with pytest.raises(FileNotFoundError, match=r"no model at .*away"):
        average_weights([away, away], tmp_path / "out")


def test_the_sidecar_of_a_hub_id_is_found(helpers, tmp_path, monkeypatch):
    path = helpers["decoder"](tmp_path)
    files = {"somebody/reward": str(path / "reward_model.json")}
    monkeypatch.setattr(checkpoint, "cached_file", lambda name, *_, **__: files.get(name))
    found = checkpoint.find_sidecar("somebody/reward")
    assert found is not None
    assert found.max_length == 64
    assert checkpoint.find_sidecar("somebody/plain") is None


def test_an_unmerged_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it first: rlhf models merge"):
        LearnedReward.load(tmp_path)


def test_pad_equal_eos_without_sidecar_needs_a_decision(helpers, tmp_path):
    tokenizer = helpers["tokenizer"](pad="<eos>")
    path = helpers["decoder"](tmp_path, tokenizer=tokenizer, sidecar=False)
    with pytest.raises(UserError, match="pad token is its EOS"):
        LearnedReward.load(path)
    assert LearnedReward.load(path, append_eos=False).sidecar.append_eos is False


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"template_hash": "0" * 16}, {}, "template_hash"),
        ({"pooling": "model"}, {}, "pooling='model'"),
        ({}, {"append_eos": False}, "append_eos=True, but here it is False"),
        ({}, {"max_length": 32}, "max_length=64, but here it is 32"),
        ({"max_length": 5000}, {}, "exceeds the model's 256 positions"),
        ({"temprature": 1.0}, {}, "temprature"),
        ({"std": 0.0, "mean": 0.0}, {}, "std must be > 0"),
        ({"temperature": "high"}, {}, r"reward_model\.json: temperature must be .*, got 'high'"),
        ({"append_eos": "maybe"}, {}, r"reward_model\.json: append_eos must be"),
        ({"max_length": -3}, {}, r"reward_model\.json: max_length must be .*, got -3"),
    ],
)
def test_mismatches_with_the_sidecar_are_refused(helpers, tmp_path, changes, arguments, message):
    path = helpers["decoder"](tmp_path)
    sidecar = path / "reward_model.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        LearnedReward.load(path, **arguments)


def test_reference_statistics_travel_with_the_checkpoint(helpers, tmp_path, talks):
    path = helpers["decoder"](tmp_path)
    sidecar = path / "reward_model.json"
    extra = {"mean": 2.0, "std": 4.0, "temperature": 0.5}
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | extra))
    reward = build({"kind": "learned", "path": str(path), "normalize": True, "weight": 3.0})
    raw = LearnedReward.load(path)
    assert reward(talks) == pytest.approx([3 * (v - 2) / 4 for v in raw(talks)])
    assert raw.temperature == 0.5


def test_scores_that_depend_on_padding_are_refused_at_load(decoder_path, monkeypatch):
    monkeypatch.setattr(
        "rlhf.reward_models.learned.pack_left", lambda mask, tensor, fill: (mask, tensor)
    )
    with pytest.raises(UserError, match="padding changes scores"):
        LearnedReward.load(decoder_path)


def test_classifier_label_gives_its_log_odds(helpers, tmp_path, talks):
    names = {0: "negative", 1: "neutral", 2: "positive"}
    path = helpers["encoder"](
        tmp_path, num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    )
    reward = LearnedReward.load(path, label="positive")
    logits = reward.logits_of_token_ids([reward.encode(talk) for talk in talks])
    p = torch.softmax(logits.double(), 1)[:, 2]
    assert reward(talks) == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-5)
    with pytest.raises(UserError, match="did you mean 'positive'"):
        LearnedReward.load(path, label="postive")
    with pytest.raises(UserError, match="3 outputs; with kind: learned, set label to one of"):
        LearnedReward.load(path)


def test_attributes_are_weighted_and_reported(helpers, tmp_path, talks):
    names = {0: "helpful", 1: "verbose"}
    path = helpers["encoder"](
        tmp_path, num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
    )
    reward = LearnedReward.load(path, attributes={"helpful": 1.0, "verbose": -0.5})
    scores = reward.score(talks)
    parts = zip(
        scores.components["learned.helpful"], scores.components["learned.verbose"], strict=True
    )
    assert scores.values == pytest.approx([h - 0.5 * v for h, v in parts], abs=1e-5)


def test_an_output_of_a_regression_is_a_prediction_and_not_log_odds(helpers, tmp_path, talks):
    names = {0: "helpful", 1: "verbose"}
    path = helpers["encoder"](
        tmp_path,
        num_labels=2,
        id2label=names,
        label2id={v: k for k, v in names.items()},
        problem_type="regression",
    )
    reward = LearnedReward.load(path, label="verbose")
    logits = reward.logits_of_token_ids([reward.encode(talk) for talk in talks])
    assert reward(talks) == pytest.approx(logits[:, 1].tolist(), abs=1e-5)
    with pytest.raises(UserError, match="set attributes to weights of: helpful, verbose"):
        LearnedReward.load(path)


def test_scope_reply_shows_the_model_the_last_reply_alone(encoder_path, helpers):
    reward = LearnedReward.load(encoder_path, scope="reply")
    talk = helpers["talk"]
    first, second = reward([talk("one prompt", "the fox"), talk("another", "the fox")])
    assert first == pytest.approx(second, abs=1e-6)
    scores = reward.score([[{"role": "user", "content": "alone"}], talk("a", "b")])
    assert scores.values[0] is None
    assert scores.counts == {"learned: no assistant message": 1}


def test_training_and_scoring_share_one_encoding(decoder, talks):
    policy = decoder.sidecar
    for talk in talks:
        ids = encode_conversation(
            decoder.tokenizer, talk, append_eos=policy.append_eos, max_length=policy.max_length
        )
        assert ids == decoder.encode(talk)


def test_facts_on_messages_never_reach_the_model(decoder, helpers):
    talk = helpers["talk"]("q", "the fox")
    marked = [{**talk[0], "answer": "42"}, talk[1]]
    assert decoder.encode(marked) == decoder.encode(talk)


def test_a_template_that_prints_the_date_gives_the_same_ids_every_day(helpers):
    tokenizer = helpers["tokenizer"](
        template="{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}"
        "{% endif %}{{ date_string }}|{{ strftime_now('%H:%M:%S.%f') }}|{{ messages[0].content }}"
    )
    assert render_conversation(tokenizer, helpers["talk"]("q")) == "01 Jan 2025|01 Jan 2025|q"


def test_render_without_a_template(helpers):
    tokenizer = helpers["tokenizer"](template=None)
    talk = helpers["talk"]
    assert render_conversation(tokenizer, talk("only")) == "only"
    assert render_conversation(tokenizer, talk("a", "b")) == "user: a\n\nassistant: b"
    ids = encode_conversation(tokenizer, talk("a", "b"), append_eos=True, max_length=None)
    assert tokenizer.decode(ids) == "user: a\n\nassistant: b<eos>"


def test_pad_token_becomes_distinct_from_eos(helpers):
    tokenizer = helpers["tokenizer"](pad="<eos>")
    assert ensure_pad_token(tokenizer) == tokenizer.convert_tokens_to_ids("<pad>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert ensure_pad_token(helpers["tokenizer"]()) == 0


def test_pack_left_by_hand():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    ids = torch.tensor([[9, 5, 9, 6], [9, 9, 9, 7]])
    packed, moved = pack_left(mask, ids, fill=0)
    assert packed.tolist() == [[True, True], [True, False]]
    assert moved.tolist() == [[5, 6], [7, 0]]
