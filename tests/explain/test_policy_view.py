"""The quantities of each token under a policy, against independent computations."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.config.model import ModelSpec
from rlhf.errors import UserError
from rlhf.explain.policy_cards import policy_cards_html
from rlhf.explain.policy_view import explain_policy, load_policy
from rlhf.models.policy import Policy
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.core import last_reply
from tests.helpers.models import CONVERSATIONS, recomputed_logprobs, tiny_model

LENGTH = PerConversationReward(lambda talk: float(len(last_reply(talk))), name="length")


def policy_and_reference(critic="none"):
    policies = []
    for seed in (0, 1):
        model, tokenizer = tiny_model(seed=seed)
        policies.append(Policy(model, tokenizer, critic=critic if seed == 0 else "none"))
    return policies


def test_log_ratio_and_entropy_equal_those_of_plain_forward_passes():
    policy, reference = policy_and_reference()
    (found,) = explain_policy(policy, [CONVERSATIONS[0]], reference=reference)
    text = policy.tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    # The reply is at the end of the rendered conversation, up to its stop token.
    size = len(found.tokens)
    end = len(ids) - 1 - ids[::-1].index(policy.tokenizer.eos_token_id) + 1
    ours, theirs = (
        recomputed_logprobs(p.model, ids)[end - size : end] for p in (policy, reference)
    )
    assert found.logprobs == pytest.approx(ours.tolist(), abs=1e-4)
    assert found.log_ratio == pytest.approx((ours - theirs).tolist(), abs=1e-4)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0, end - size - 1 : end - 1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert found.entropy == pytest.approx(entropy.tolist(), abs=1e-4)
    assert "".join(found.tokens).startswith("It is blue.")
    assert (found.values, found.advantages, found.score) == (None, None, None)


def test_a_policy_equals_itself():
    policy, _ = policy_and_reference()
    same = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    (found,) = explain_policy(policy, [CONVERSATIONS[0]], reference=same)
    assert found.log_ratio == pytest.approx([0.0] * len(found.tokens), abs=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_are_hand_worked_generalized_advantages(lam):
    policy, _ = policy_and_reference(critic="shared")
    torch.nn.init.normal_(
        policy.value_head.linear.weight, generator=torch.Generator().manual_seed(2)
    )
    (found,) = explain_policy(policy, [CONVERSATIONS[0]], reward=LENGTH, gamma=0.9, lam=lam)
    assert found.score == len("It is blue.")
    expected, advantage, following = [], 0.0, 0.0
    for i in reversed(range(len(found.values))):
        reward = found.score if i == len(found.values) - 1 else 0.0
        delta = reward + 0.9 * following - found.values[i]
        advantage = delta + 0.9 * lam * advantage
        following = found.values[i]
        expected.append(advantage)
    assert len(set(found.values)) > 1
    assert found.advantages == pytest.approx(expected[::-1], abs=1e-5)


def test_replies_to_one_prompt_have_leave_one_out_advantages_without_a_critic():
    policy, _ = policy_and_reference()
    prompt = [{"role": "user", "content": "Say a number."}]
    texts = ["7", "seven", "3!"]
    replies = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
    found = explain_policy(policy, [*replies, CONVERSATIONS[0]], reward=LENGTH)
    assert [set(r.advantages) for r in found[:3]] == [{1 - 3.5}, {5 - 1.5}, {2 - 3.0}]
    assert found[3].advantages is None  # no other reply to its prompt
    page = policy_cards_html([found[3], found[0]])
    assert page.count(">advantage<") == policy_cards_html(found[:1]).count(">advantage<") > 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critic_of_a_saved_policy_is_loaded(critic, tmp_path):
    policy, _ = policy_and_reference(critic=critic)
    torch.nn.init.normal_(
        policy.value_head.linear.weight, generator=torch.Generator().manual_seed(2)
    )
    policy.save(tmp_path / "final")
    loaded = load_policy(ModelSpec(path=str(tmp_path / "final"), dtype="float32"))
    before, after = (explain_policy(p, [CONVERSATIONS[0]])[0] for p in (policy, loaded))
    assert after.values == pytest.approx(before.values, abs=1e-5)
    assert len(set(after.values)) > 1


def test_a_reference_with_another_tokenizer_is_refused():
    policy, reference = policy_and_reference()
    reference.tokenizer = copy.deepcopy(policy.tokenizer)
    reference.tokenizer.chat_template += "\n"
    with pytest.raises(UserError, match="different tokenizers or chat templates"):
        explain_policy(policy, [CONVERSATIONS[0]], reference=reference)


def test_a_reply_beyond_the_context_is_omitted_with_a_warning(caplog):
    policy = Policy(*tiny_model())
    talk = CONVERSATIONS[0]
    long = [{"role": "user", "content": "word " * 2000}, talk[-1]]
    policy.model.config.max_position_embeddings = 1000
    (found,) = explain_policy(policy, [long, talk])
    assert found.prompt == talk[:-1]
    assert "replies omitted from the policy view: 1 (longer than the 1000 tokens" in caplog.text
    with pytest.raises(UserError, match="no reply can be encoded for the policy: longer than"):
        explain_policy(policy, [long])
