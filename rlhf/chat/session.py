"""The state of a chat with several models; the terminal and the page display it."""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.chat.branch import ModelConversation
from rlhf.chat.partner import EnvironmentPartner, Partner, UserPartner
from rlhf.chat.policy import ChatPolicy, Reply
from rlhf.chat.turn import ReplyScore, Turn, Vote
from rlhf.common.files import is_utf8_encodable
from rlhf.common.names import did_you_mean
from rlhf.common.ranges import convert_to_type
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.errors import UserError
from rlhf.reward_models.core import Reward

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
"""Keys of the sampling settings that the user can change during a chat."""


@dataclass
class ChatSession:
    """A conversation with several models, with the same seed and the same sampling settings.

    Without a vote, each model continues with its own reply. A vote continues all conversations with
    the preferred reply, or at a tie with the reply that was shown first, so that the next replies
    are comparable again. Bai et al. (2022, arXiv:2204.05862) collect preferences in this way.
    """

    policies: Sequence[ChatPolicy]
    env: EnvSpec | None = None
    """Environment that sends the messages; None if the user sends them."""
    seed: int = 0
    reward: Reward | None = None
    """Reward that scores every reply."""
    blind: bool = False
    """Whether the replies of a turn are shown in random order, and without the names of the models
    until the vote."""
    rng: random.Random = field(default_factory=random.Random)
    """Random generator for the order of the replies."""
    on_vote: Callable[[Vote], None] | None = None
    """Function that records a vote before the conversation continues."""
    on_unvote: Callable[[str], None] | None = None
    """Function that records that the vote with an id was taken back."""
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings: RolloutSpec = self.policies[0].collector.spec
        self._messages: list[str] = []
        self._sample_index = 0
        self.branches = [
            ModelConversation(policy, self._make_partner(policy)) for policy in self.policies
        ]
        if self.env is not None:
            self._restart_branches_with([])

    def _make_partner(self, policy: ChatPolicy) -> Partner:
        if self.env is None:
            return UserPartner(self._messages)
        return EnvironmentPartner(policy.collector, self.env.timeout)

    def close(self) -> None:
        """Cancel unfinished replies, and close the environments and the collectors."""
        for branch in self.branches:
            branch.clear()
            branch.partner.close()
            branch.policy.collector.close()

    # -- state --------------------------------------------------------------------------------

    @property
    def can_generate(self) -> bool:
        """Whether a model can reply now."""
        return any(branch.needs_reply for branch in self.branches)

    @property
    def why_vote_impossible(self) -> str | None:
        """Reason why the user cannot compare the replies of the last turn; None if possible."""
        if len(self.policies) < 2:
            return "a vote compares replies, so it needs at least two models"
        if not self.turns:
            return "there is no reply yet"
        turn = self.turns[-1]
        if turn.is_voted:
            return "the replies of this turn have a vote already"
        if turn.given_by_user or any(reply is None for reply in turn.replies):
            return "not every model has replied in this turn"
        if any(prompt != turn.prompts[0] for prompt in turn.prompts):
            return (
                "the models replied to different conversations, because an earlier turn has no "
                "vote: start a new conversation, and vote in every turn"
            )
        if len({reply.text for reply in turn.replies if reply}) == 1:
            return "the replies are equal"
        return None

    @property
    def shown_order(self) -> list[int]:
        """Indices of the models in the order in which the screen shows them."""
        return self.turns[-1].order if self.turns else list(range(len(self.branches)))

    def index_of(self, letter: str) -> int:
        """Return the index of the model whose reply is shown with a letter.

        Raises:
            UserError: No reply has the letter.
        """
        letters = [letter_of(position) for position in range(len(self.branches))]
        if letter.strip().upper() not in letters:
            raise UserError(f"give one of the letters {', '.join(letters)}, not {letter!r}")
        return self.shown_order[letters.index(letter.strip().upper())]

    # -- turns --------------------------------------------------------------------------------

    def add_user_message(self, text: str) -> None:
        """Add a message of the user. The models have not replied to it yet.

        Raises:
            UserError: The message is empty, is not valid Unicode or does not fit into the context,
                a model has not replied to the last message, or an environment is the partner.
        """
        if self.env is not None:
            raise UserError("the environment gives the messages in this chat")
        if not text.strip():
            raise UserError("the message is empty")
        check_unicode(text)
        if self.can_generate:
            raise UserError(
                "the models have not replied to the last message: retry, or take it back"
            )
        self._messages.append(text)
        try:
            if len(self._messages) == 1:
                self._restart_branches_with([])
            else:
                for branch in self.branches:
                    branch.add_partner_answer()
            if any(branch.is_over for branch in self.branches):
                raise UserError(
                    "the message does not fit into the context of a model: shorten it, or start "
                    "a new conversation"
                )
        except UserError:
            replies = [list(branch.replies) for branch in self.branches]
            self._messages.pop()
            self._restart_or_clear(replies)
            raise

    def generate(self, *, interleaved: bool = False) -> Generator[tuple[int, str], None, None]:
        """Sample the replies of all models that can reply.

        If the generator is closed or fails before all replies are complete, the replies of this
        turn are taken back.

        Args:
            interleaved: Whether the models take turns after each token. By default, each model
                completes its reply before the next one begins. The replies are the same.

        Yields:
            The index of a model and the text of its reply so far.

        Raises:
            UserError: No model can reply, or the environment failed.
        """
        turn = self.begin_turn()
        streams = {
            index: self._stream_reply(index)
            for index in turn.order
            if self.branches[index].needs_reply
        }
        try:
            while streams:
                for index in list(streams) if interleaved else list(streams)[:1]:
                    text = next(streams[index], None)
                    if text is None:
                        del streams[index]
                        reply = turn.replies[index]
                        text = reply.text if reply else ""
                    yield index, text
        except BaseException:
            for stream in streams.values():
                stream.close()
            self.undo_replies()
            raise
        self.score_turn()

    def begin_turn(self) -> Turn:
        """Append a turn without replies, and choose their order on the screen. Return the turn.

        Raises:
            UserError: No model can reply.
        """
        if not self.can_generate:
            raise UserError(
                "write a message first"
                if self.env is None
                else "the episode is over: start it again, or start another one"
            )
        count = len(self.branches)
        order = list(range(count))
        if self.blind:
            self.rng.shuffle(order)
        prompts = [branch.conversation for branch in self.branches]
        empty: list[Any] = [None] * count
        counts = [len(branch.replies) for branch in self.branches]
        self.turns.append(Turn(prompts, order, [*empty], [*empty], [*empty], counts))
        return self.turns[-1]

    def _stream_reply(self, index: int) -> Generator[str, None, None]:
        """Sample the reply of a model in the last turn; yield its text after every token."""
        reply = yield from self.branches[index].stream_and_add_reply()
        self._record_reply(index, reply)

    def reply_for_all_models(self, text: str) -> None:
        """Reply instead of all models, in a chat with an environment.

        Raises:
            UserError: The user is the partner, the episode is over, the text is not valid Unicode
                or does not fit into the context, or the environment failed.
        """
        if self.env is None:
            raise UserError("you are the partner in this chat: write a message")
        check_unicode(text)
        turn = self.begin_turn()
        turn.given_by_user = True
        try:
            for index, branch in enumerate(self.branches):
                if branch.needs_reply:
                    reply = branch.policy.encode_reply(branch.episode, text)
                    branch.add_reply_and_answer(reply)
                    self._record_reply(index, reply)
        except BaseException:
            self.undo_replies()
            raise
        self.score_turn()

    def _record_reply(self, index: int, reply: Reply) -> None:
        """Record a reply, and the result of the environment, in the last turn."""
        turn, branch = self.turns[-1], self.branches[index]
        turn.replies[index] = reply
        if len(branch.results) == len(branch.replies):
            turn.results[index] = branch.results[-1]

    def score_turn(self) -> None:
        """Score the replies of the last turn with the reward, if there is one.

        The scores are stored in the turn.
        """
        if self.reward is None:
            return
        turn = self.turns[-1]
        indices = [index for index, reply in enumerate(turn.replies) if reply is not None]
        conversations = [
            [*turn.prompts[index], {"role": "assistant", "content": reply.text}]
            for index in indices
            if (reply := turn.replies[index]) is not None
        ]
        scores = self.reward.score(conversations)
        for position, index in enumerate(indices):
            components = {name: column[position] for name, column in scores.components.items()}
            turn.scores[index] = ReplyScore(
                scores.values[position], components, scores.reasons[position]
            )

    # -- commands -----------------------------------------------------------------------------

    def undo_replies(self) -> None:
        """Take back the replies of the last turn. The models can then reply again."""
        turn = self.turns.pop()
        self._restart_or_clear(
            [
                branch.replies[:count]
                for branch, count in zip(self.branches, turn.earlier_reply_counts, strict=True)
            ]
        )

    def undo(self) -> None:
        """Take back the last turn with its user message, or a user message without a reply.

        Raises:
            UserError: There is nothing to take back.
        """
        if self.env is None and self._messages and self.can_generate:
            # The last message has no reply.
            replies = [list(branch.replies) for branch in self.branches]
            self._messages.pop()
            self._restart_or_clear(replies)
            return
        if not self.turns:
            raise UserError("there is nothing to take back")
        if self.env is None:
            self._messages.pop()
        self.undo_replies()

    def prepare_retry(self) -> None:
        """Take back the replies of the last turn; the replies that are sampled next are different.

        If the last user message has no reply yet, nothing is taken back.

        Raises:
            UserError: There is neither a reply nor a user message.
        """
        has_unanswered_message = self.env is None and self.can_generate
        if not self.turns and not has_unanswered_message:
            raise UserError("there is no reply yet")
        self._sample_index += 1
        if has_unanswered_message:
            self._restart_or_clear([list(branch.replies) for branch in self.branches])
        else:
            self.undo_replies()

    def reset(self, *, seed: int | None = None) -> None:
        """Start a new conversation, with the same seed unless another one is given."""
        self.seed = self.seed if seed is None else seed
        self._sample_index = 0
        self.turns.clear()
        self._messages.clear()
        for branch in self.branches:
            branch.clear()
        if self.env is not None:
            self._restart_branches_with([])

    def start_next_episode(self) -> None:
        """Start a new conversation with the next seed.

        Raises:
            UserError: The seed is the largest possible seed.
        """
        self.reset(seed=parse_seed(str(self.seed + 1)))

    def set_system(self, text: str) -> None:
        """Set the system message and start a new conversation; "" removes the system message.

        Raises:
            UserError: The text is not valid Unicode, or a model's chat template cannot render a
                system message.
        """
        check_unicode(text)
        if text:
            for policy in self.policies:
                policy.collector.chat_format.check_system_message_is_renderable(
                    [{"role": "system", "content": text}]
                )
        self._change_settings({"system": text or None})
        self.reset()

    def set_sampling(self, changes: Mapping[str, Any]) -> None:
        """Change sampling settings of all models, for the next replies.

        Args:
            changes: Key of `SETTINGS` -> value.

        Raises:
            UserError: A setting does not exist, or a value is invalid. Nothing is changed.
        """
        for key in changes:
            if key not in SETTINGS:
                raise UserError(
                    f"unknown setting {key!r}{did_you_mean(key, SETTINGS)}; the settings are "
                    f"{', '.join(SETTINGS)}"
                )
        self._change_settings(changes)

    def _change_settings(self, changes: Mapping[str, Any]) -> None:
        """Change the settings of all models after a check of their types and ranges."""
        tree = dataclasses.asdict(self.settings) | dict(changes)
        self.settings = convert_to_type(RolloutSpec, tree)
        for policy in self.policies:
            policy.engine.reset()  # cancels requests with the old settings
            policy.collector.settings.spec = self.settings

    def vote(self, preferred: int | None) -> None:
        """Compare the replies of the last turn, record the vote, and continue with one reply.

        Args:
            preferred: Index of the model with the preferred reply; None for a tie.

        Raises:
            UserError: The replies cannot be compared, see `why_vote_impossible`, or the preferred
                reply does not fit into the context of another model. In the second case, the vote
                is recorded, and each model continues with its own reply.
        """
        if reason := self.why_vote_impossible:
            raise UserError(reason)
        turn, vote_id = self.turns[-1], secrets.token_hex(8)
        if self.on_vote is not None:
            names = [policy.name for policy in self.policies]
            self.on_vote(Vote(vote_id, turn, names, preferred, self.blind, self.seed))
        turn.vote_id, turn.preferred = vote_id, preferred
        replies = [list(branch.replies) for branch in self.branches]
        try:
            self._continue_all_with_reply(turn, turn.order[0] if preferred is None else preferred)
        except UserError as error:
            self._restart_or_clear(replies)
            raise UserError(
                f"the vote counts, but the conversation cannot continue with this reply: {error}"
            ) from error

    def unvote(self) -> None:
        """Take back the vote of the last turn; each model continues with its own reply again.

        Raises:
            UserError: The last turn has no vote.
        """
        turn = self.turns[-1] if self.turns else None
        if turn is None or turn.vote_id is None:
            raise UserError("the last turn has no vote")
        if self.on_unvote is not None:
            self.on_unvote(turn.vote_id)
        turn.vote_id, turn.preferred = None, None
        replies: list[list[Reply | str]] = [
            [*branch.replies[:-1], *([reply] if reply else [])]
            for branch, reply in zip(self.branches, turn.replies, strict=True)
        ]
        self._restart_or_clear(replies)

    def _continue_all_with_reply(self, turn: Turn, model_index: int) -> None:
        """Replace the last reply of all models by the reply of one of them in the last turn."""
        reply = turn.replies[model_index]
        assert reply is not None
        replies: list[list[Reply | str]] = [
            [*branch.replies[:-1], branch.replies[-1] if index == model_index else reply.text]
            for index, branch in enumerate(self.branches)
        ]
        self._restart_or_clear(replies)

    def transcripts(self) -> list[dict[str, Any]]:
        """Return one row for each model, with its messages, name and settings."""
        settings = {key: getattr(self.settings, key) for key in SETTINGS}
        return [
            {
                "messages": branch.conversation,
                "model": branch.policy.name,
                "seed": self.seed,
                "rollout": settings,
            }
            for branch in self.branches
        ]

    def _restart_branches_with(self, replies: Sequence[Sequence[Reply | str]]) -> None:
        """Start all conversations again with the given replies of each model."""
        for index, branch in enumerate(self.branches):
            branch.restart(
                self.seed,
                sample_index=self._sample_index,
                replies=replies[index] if replies else (),
            )

    def _restart_or_clear(self, replies: Sequence[Sequence[Reply | str]]) -> None:
        """Start all conversations again with these replies; clear them if there is no message."""
        if self.env is None and not self._messages:
            for branch in self.branches:
                branch.clear()
        else:
            self._restart_branches_with(replies)


def check_unicode(text: str) -> None:
    """Raise UserError for a text with an unpaired surrogate, which tokenizers reject."""
    if not is_utf8_encodable(text):
        raise UserError("the text contains characters that are not valid Unicode")


def parse_seed(text: str) -> int:
    """Return the seed in a text.

    Raises:
        UserError: The text is not an integer in the range of seeds.
    """
    if not (text.isascii() and text.isdecimal() and int(text[:20]) < 2**63 and len(text) < 20):
        raise UserError(f"the seed must be an integer in [0, 2**63), got {text[:40]!r}")
    return int(text)


def letter_of(position: int) -> str:
    """Return the letter of the reply at a position on the screen."""
    return chr(ord("A") + position)
