"""The tiny reward models of the tests of rewards, and an explanation with hostile texts."""

import pytest

from rlhf.explain import Explanation, RewardExplainer, compare_stages, explain_policy
from rlhf.models.policy import Policy
from rlhf.reward_models.learned import LearnedReward
from tests.explain.rewards import PAIRS, pair
from tests.helpers.models import CONVERSATIONS, tiny_model
from tests.reward_models.conftest import decoder_path, encoder_path, helpers, save_decoder

__all__ = ["decoder_path", "encoder_path", "helpers"]

HOSTILE = (
    "</script><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)> \u202e 😀"
)


@pytest.fixture(scope="module")
def explanation(tmp_path_factory) -> Explanation:
    reward = LearnedReward.load(save_decoder(tmp_path_factory.mktemp("decoder")))
    hostile = pair(HOSTILE, HOSTILE, f"no {HOSTILE}")
    explainer = RewardExplainer(reward, train_pairs=[hostile, *PAIRS])
    policies = [Policy(*tiny_model(seed=seed)) for seed in (0, 1)]
    talk = [CONVERSATIONS[0][0], {"role": "assistant", "content": HOSTILE}]
    return Explanation(
        HOSTILE,
        reward=explainer.explain_pairs([hostile, *PAIRS], measure_on=4),
        policy=explain_policy(policies[0], [talk], reference=policies[1]),
        stages=[compare_stages(*policies, [talk, CONVERSATIONS[0]], names=("<b>base", "sft"))],
    )
