"""Reward models on families that transformers has no classifier for."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.cli.table import run_command
from rlhf.models.loading import load_causal_model
from rlhf.reward_models import LearnedReward
from rlhf.reward_models.generic_heads import transformers_has_classifier
from tests.helpers.models import tiny_tokenizer
from tests.helpers.training import pair_rows, pairs_tree
from tests.models.families import config_of, model_of


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "granitemoe"])
def test_a_family_without_a_classifier_carries_a_reward_head(tmp_path, name):
    assert not transformers_has_classifier(config_of(name), per_token=False)
    place = tmp_path / "model"
    model_of(name).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    trainer = {"max_steps": 1, "learning_rate": 0.0}
    tree = pairs_tree(tmp_path, place, rows=pair_rows(12), max_length=100, trainer=trainer)
    final = run_command("reward", tree)
    reward = LearnedReward.load(final)
    assert reward.sidecar.pooling == "last"
    # Nothing was learned: the trunk is the language model's own, to the bit.
    ids = torch.arange(40, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(place).base_model.eval()
    expected = base(input_ids=ids, use_cache=False).last_hidden_state
    found = reward.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # And a text's score is the head at its last token.
    states = reward.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    by_hand = reward.model.score(states[:, -1].float())
    torch.testing.assert_close(
        reward.logits_of_token_ids([ids[0].tolist()]), by_hand, rtol=1e-4, atol=1e-5
    )
    assert (reward.logits_of_token_ids([list(range(40, 59))]) - by_hand).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"weights (lm_head|score)\.weight"):
        load_causal_model(str(final))  # a reward model is no policy
