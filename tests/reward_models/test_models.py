"""Implicit, process and cost rewards of tiny random models, compared with direct computation."""

import errno
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForTokenClassification

from rlhf.errors import UserError
from rlhf.reward_models import LearnedReward
from rlhf.reward_models.chat_template import template_hash
from rlhf.reward_models.cost import CostModel
from rlhf.reward_models.implicit import ImplicitReward, ids_and_reply_start
from rlhf.reward_models.pairwise import PairModel, encode_pair
from rlhf.reward_models.process import ProcessReward, encode_steps
from rlhf.reward_models.sidecar import Sidecar
from rlhf.reward_models.targets import ReferenceAnswerSource


@pytest.fixture(scope="module")
def pair_of_models(helpers, tmp_path_factory):
    return [helpers["causal"](tmp_path_factory.mktemp(f"lm{seed}"), seed=seed) for seed in range(2)]


def logprob(path, ids, start):
    """Sum of log p(ids[t] | ids[<t]) for t >= start, one position at a time."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    total = 0.0
    for t in range(start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:t]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[ids[t]].item()
    return total


def test_implicit_reward_is_the_log_ratio_of_the_reply(pair_of_models, helpers):
    policy, reference = pair_of_models
    talk = helpers["talk"]("how many?", "the fox 7")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    ids, start = ids_and_reply_start(tokenizer, talk)
    assert tokenizer.decode(ids[start:]) == "the fox 7<eos>"
    expected = logprob(policy, ids, start) - logprob(reference, ids, start)
    reward = ImplicitReward.load(policy, reference, beta=0.5)
    assert reward([talk])[0] == pytest.approx(0.5 * expected, abs=1e-5)
    mean = ImplicitReward.load(policy, reference, beta=1.0, average=True)
    assert mean([talk])[0] == pytest.approx(expected / (len(ids) - start), abs=1e-5)


def test_implicit_reward_of_the_reference_is_zero(pair_of_models, helpers):
    reward = ImplicitReward.load(pair_of_models[0], pair_of_models[0])
    assert reward([helpers["talk"]("a", "b c d"), helpers["talk"]("a", "")]) == [0.0, 0.0]


def test_implicit_models_must_read_text_alike(pair_of_models, helpers, tmp_path):
    other = helpers["causal"](tmp_path, tokenizer=helpers["tokenizer"](template=None))
    with pytest.raises(ValueError, match="different tokenizers or chat templates"):
        ImplicitReward.load(pair_of_models[0], other)
    with pytest.raises(ValueError, match="beta must be > 0"):
        ImplicitReward.load(*pair_of_models, beta=0.0)


SOLUTION = "two and 2\n\nis 4\n\nso 5"


def save_step_model(helpers, path):
    tokenizer = helpers["tokenizer"]()
    config = AutoModelForCausalLM.from_pretrained(helpers["causal"](path / "base")).config
    config.num_labels = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForTokenClassification(config)
        torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(path / "prm")
    tokenizer.save_pretrained(path / "prm")
    return path / "prm"


def test_process_reward_reads_the_step_ends(helpers, tmp_path):
    path = save_step_model(helpers, tmp_path)
    talk = helpers["talk"]("add", SOLUTION)
    reward = ProcessReward.load(path)
    steps = encode_steps(reward.tokenizer, talk)
    parts = [reward.tokenizer.decode(steps.ids[: end + 1]) for end in steps.ends]
    assert parts[0].endswith("two and 2\n\n")
    assert parts[1].endswith("is 4\n\n")
    assert parts[2].endswith("so 5\n\n")
    scores = reward.step_scores(talk)
    model = LlamaForTokenClassification.from_pretrained(path).eval()
    for end, score in zip(steps.ends, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([steps.ids[: end + 1]])).logits[0, -1]
        assert score == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert len(set(scores)) == 3
    for how, expected in [
        ("min", min(scores)),
        ("product", math.prod(scores)),
        ("last", scores[-1]),
    ]:
        assert ProcessReward.load(path, aggregate=how)([talk])[0] == pytest.approx(expected)


def test_process_mistakes(helpers, tmp_path):
    reward = ProcessReward.load(save_step_model(helpers, tmp_path))
    with pytest.raises(UserError, match="aggregate must be one of"):
        ProcessReward(reward.model, reward.tokenizer, aggregate="mean")
    scores = reward.score([helpers["talk"]("a", " \n\n "), helpers["talk"]("a", "b")])
    assert scores.values[0] is None
    assert scores.components["process.steps"] == [0.0, 1.0]
    assert scores.counts == {"process: no steps": 1}


def test_no_model_reads_more_tokens_than_it_has_positions(pair_of_models, helpers, tmp_path):
    """A model with learned positions fails at longer texts, others give meaningless scores."""
    reward = ProcessReward.load(save_step_model(helpers, tmp_path))
    reward.model.config.max_position_embeddings = 40
    short = ProcessReward(reward.model, reward.tokenizer)
    talks = [helpers["talk"]("a", "b\n\n7"), helpers["talk"]("a", "7 " * 40)]
    assert [len(encode_steps(reward.tokenizer, talk).ids) > 40 for talk in talks] == [False, True]
    scores = short.score(talks)
    assert scores.values == [reward(talks[:1])[0], None]
    assert scores.reasons[1] == "process: longer than the 40 tokens that the model can read"
    policy, other = pair_of_models
    implicit = ImplicitReward.load(policy, other)
    implicit.policy.config.max_position_embeddings = 40
    limited = ImplicitReward(implicit.policy, implicit.reference, implicit.tokenizer)
    assert limited(talks) == ImplicitReward.load(policy, other, max_length=40)(talks)


def test_cost_is_the_checkpoint_and_its_sign(decoder_path, helpers):
    talks = [helpers["talk"]("q", text) for text in ("the fox", "yes 1", "no no", "7 8 9")]
    cost = CostModel.load(decoder_path).score(talks)
    values = LearnedReward.load(decoder_path)(talks)
    assert cost.values == values
    assert cost.components["cost.unsafe"] == [float(v > 0) for v in values]


def pair_ids(helpers, prompt, first, second, *, max_length):
    return encode_pair(helpers["tokenizer"](), prompt, first, second, max_length=max_length)


def test_a_pair_of_replies_is_cut_at_the_prompt_first_and_alike(helpers):
    tokenizer = helpers["tokenizer"]()
    prompt = helpers["talk"]("0123456789")
    whole = tokenizer.decode(pair_ids(helpers, prompt, "yes", "no", max_length=500))
    assert whole.endswith("\n\n[REPLY A]\nyes\n\n[REPLY B]\nno<eos>")
    assert "0123456789" in whole
    size = len(pair_ids(helpers, prompt, "yes", "no", max_length=500))
    cut = tokenizer.decode(pair_ids(helpers, prompt, "yes", "no", max_length=size - 5))
    assert cut.endswith("\n\n[REPLY A]\nyes\n\n[REPLY B]\nno<eos>")
    long, short = "7 " * 100, "no"
    both = pair_ids(helpers, prompt, long, short, max_length=60)
    assert len(both) == 60
    assert tokenizer.decode(both).endswith("[REPLY B]\nno<eos>")  # the short one is whole
    mirrored = tokenizer.decode(pair_ids(helpers, prompt, short, long, max_length=60))
    assert "[REPLY A]\nno" in mirrored
    assert mirrored.count("7") == tokenizer.decode(both).count("7")
    equal = tokenizer.decode(pair_ids(helpers, prompt, long, long, max_length=60))
    a, b = equal.split("[REPLY B]")
    assert a.count("7") == b.count("7") > 5


def test_a_pair_model_beats_the_reference_reply_by_the_mean_of_both_orders(helpers, tmp_path):
    inner = LearnedReward.load(helpers["decoder"](tmp_path / "rm"))
    model = PairModel(inner, reference=ReferenceAnswerSource())
    talk = [*helpers["talk"]("why?", "because"), {"role": "user", "content": "ok"}][:2]
    known = [talk[0], talk[1] | {"answer": "the fox"}]
    one, other = (
        pair_ids(helpers, talk[:1], *texts, max_length=64)
        for texts in (("because", "the fox"), ("the fox", "because"))
    )
    with torch.no_grad():
        a, b = (inner.model(torch.tensor([ids])).logits.item() for ids in (one, other))
    scores = model.score([known, talk, known[1:]])
    assert scores.values[0] == pytest.approx((a - b) / 2, abs=1e-5)
    assert scores.values[1:] == [None, None]
    assert scores.counts["pairwise: no reference answer"] == 1
    assert scores.counts["pairwise: no prompt"] == 1
    assert scores.components["pairwise.consistent"][0] == float((a > 0) == (b < 0))


def test_a_process_reward_refuses_what_it_was_not_trained_with(helpers, tmp_path):
    tokenizer = helpers["tokenizer"]()
    from tests.reward_models.conftest import llama_config

    LlamaForTokenClassification(llama_config(tokenizer, num_labels=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sidecar = Sidecar(template_hash(tokenizer), False, 64, "steps", kind="process", separator="\n")
    sidecar.write(tmp_path)
    assert ProcessReward.load(tmp_path).separator == "\n"
    with pytest.raises(UserError, match="here it is ';'"):
        ProcessReward.load(tmp_path, separator=";")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained with template_hash="):
        ProcessReward.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it first: rlhf models merge"):
        ProcessReward.load(tmp_path)


def test_a_steps_checkpoint_is_no_learned_reward(helpers, tmp_path):
    tokenizer = helpers["tokenizer"]()
    path = helpers["decoder"](tmp_path, tokenizer=tokenizer)
    Sidecar(template_hash(tokenizer), True, 64, "steps", kind="process").write(path)
    with pytest.raises(UserError, match="was trained with pooling='steps', but here it is 'last'"):
        LearnedReward.load(path)


def test_a_sidecar_that_cannot_be_written_keeps_its_old_content(tmp_path, monkeypatch):
    """A study writes the scale of scores into a finished checkpoint, which must stay loadable."""
    Sidecar("hash", True, 64, "last").write(tmp_path)

    def write_half(path, text, **options):
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, "no space", str(path))

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space"):
        Sidecar("hash", True, 64, "last", mean=1.0, std=2.0).write(tmp_path)
    assert Sidecar.read(tmp_path) == Sidecar("hash", True, 64, "last")
