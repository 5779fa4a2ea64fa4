"""The conversation of one model with its partner."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from rlhf.chat.partner import Partner
from rlhf.chat.policy import ChatPolicy, Reply
from rlhf.common.conversation import Conversation
from rlhf.errors import UserError
from rlhf.rollout.episode import Episode, EpisodeSeed, start_episode
from rlhf.rollout.turns import StepResult


class ModelConversation:
    """The conversation of one model.

    It is an episode like those of training: tokens are only appended, and sampled replies keep
    their tokens. To remove a message or a reply, the episode is started again, and the remaining
    replies are added again.

    Args:
        policy: The model.
        partner: Source of the messages to which the model replies.
    """

    def __init__(self, policy: ChatPolicy, partner: Partner) -> None:
        self.policy, self.partner = policy, partner
        self.replies: list[Reply] = []
        self.results: list[StepResult] = []
        """Result of each reply. The last reply may not have a result yet."""
        self._episode: Episode | None = None
        self._over = False

    def restart(
        self, seed: int, *, sample_index: int = 0, replies: Sequence[Reply | str] = ()
    ) -> None:
        """Start the conversation again.

        Args:
            seed: Seed of the environment and of sampling.
            sample_index: Index of the sample of this conversation, which also determines sampling.
            replies: Replies to add again. Texts are encoded as replies of this model.

        Raises:
            UserError: The environment failed or ended its episode earlier than before, or the
                conversation does not fit into the context.
        """
        self.clear()
        observation, info = self.partner.start(seed)
        self._episode = start_episode(
            self.policy.collector.settings,
            self.partner.env,
            EpisodeSeed(seed, 0, sample_index),
            observation,
            info,
            policy_version=self.policy.engine.policy_version,
        )
        for reply in replies:
            if not self.needs_reply:
                raise UserError(
                    "the environment does not repeat its episode with the same seed and replies: "
                    "start a new conversation"
                )
            self.add_reply_and_answer(
                self.policy.encode_reply(self.episode, reply) if isinstance(reply, str) else reply
            )

    def clear(self) -> None:
        """Remove all messages and replies, and cancel an unfinished reply."""
        self.policy.engine.reset()
        self._episode, self.replies, self.results, self._over = None, [], [], False

    @property
    def episode(self) -> Episode:
        """The episode of the conversation.

        Raises:
            UserError: The conversation has no message yet.
        """
        if self._episode is None:
            raise UserError("the conversation is empty: write a message first")
        return self._episode

    @property
    def needs_reply(self) -> bool:
        """Whether the model can reply now."""
        is_answered = len(self.results) == len(self.replies)
        return self._episode is not None and is_answered and not self._over

    @property
    def is_over(self) -> bool:
        """Whether the environment or the limit on tokens ended the conversation."""
        return self._over

    @property
    def conversation(self) -> Conversation:
        """All messages so far."""
        if self._episode is None:
            return []
        messages = [dict(message) for message in self._episode.rollout.conversation]
        if len(self.replies) > len(self.results):
            messages.append({"role": "assistant", "content": self.replies[-1].text})
        return messages

    def stream_and_add_reply(self) -> Generator[str, None, Reply]:
        """Sample a reply and add it; yield its text after every token."""
        reply = yield from self.policy.stream_reply(self.episode)
        self.add_reply_and_answer(reply)
        return reply

    def add_reply_and_answer(self, reply: Reply) -> None:
        """Add a reply, and the answer of the partner if there is one.

        Raises:
            UserError: The environment failed.
        """
        self.replies.append(reply)
        self.add_partner_answer()

    def add_partner_answer(self) -> None:
        """Add the answer of the partner to the last reply, if there is one.

        Raises:
            UserError: The environment failed.
        """
        if len(self.results) == len(self.replies):
            return
        reply = self.replies[-1]
        result = self.partner.answer(reply.text)
        if result is not None:
            self._over = self.episode.record_turn(reply.completion, reply.text, result)
            self.results.append(result)

    def decode_all_tokens(self) -> str:
        """Return the text of all tokens of the conversation, including special tokens.

        Raises:
            UserError: The conversation has no message yet.
        """
        reply = self.replies[-1].completion.tokens if len(self.replies) > len(self.results) else []
        tokenizer: Any = self.policy.collector.chat_format.tokenizer
        return tokenizer.decode([*self.episode.rollout.tokens, *reply])
