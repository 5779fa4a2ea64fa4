"""Completions outside of training: one list, in the order of the prompts."""

from rlhf.config.rollout import RolloutSpec
from rlhf.rollout.completions import sample_completions
from tests.helpers.models import tiny_model
from tests.helpers.training import user


def test_completions_are_in_the_order_of_the_prompts() -> None:
    model, tokenizer = tiny_model()
    prompts = [user(text) for text in ("a", "b", "c", "d", "e")]
    for seed in (0, 3):
        found = sample_completions(
            model, tokenizer, prompts, RolloutSpec(max_new_tokens=2), samples=2, seed=seed
        )
        assert [rollout.conversation[:-1] for rollout in found] == [
            prompt for prompt in prompts for _ in range(2)
        ]
        assert [rollout.sample_index for rollout in found] == [0, 1] * 5
