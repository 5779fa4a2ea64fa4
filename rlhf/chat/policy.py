"""Load the models of a chat, and sample their replies token by token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.common.files import expand_user
from rlhf.common.text import count_text
from rlhf.config.chat import ChatConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError
from rlhf.evaluation.run_groups import run_names
from rlhf.models.loading import load_model
from rlhf.rollout.chat_format import LEFT_CONTEXT
from rlhf.rollout.collector import Collector, open_local_engine
from rlhf.rollout.episode import Episode
from rlhf.rollout.sampling.base import Completion, FinishReason
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.rollout.unused_keys import unused_rollout_key_message
from rlhf.runs.claim import path_without_dot_dot
from rlhf.training.checkpoint import checkpoints_in

_CHECKPOINT_PATTERNS = ("step-*", "checkpoint-*")
"""Names of the checkpoints of the native engine and of TRL."""
USER_AS_PARTNER = EnvSpec(prompts=[DataSpec("the messages of the user")])
"""Placeholder for the source of episodes in a chat with a user. It is never loaded."""


@dataclass(frozen=True)
class Reply:
    """A reply of a model, or of the user instead of the model."""

    text: str
    completion: Completion

    @property
    def is_cut_off(self) -> bool:
        """Whether the limit on tokens ended the reply."""
        return self.completion.finish_reason == FinishReason.LENGTH


class ChatPolicy:
    """A model that replies in a chat.

    Args:
        name: Displayed name of the model.
        collector: Collector of the model, whose methods build its episodes.
        engine: Engine of the collector.
    """

    def __init__(self, name: str, collector: Collector, engine: ContinuousEngine) -> None:
        self.name, self.collector, self.engine = name, collector, engine

    def stream_reply(self, episode: Episode) -> Generator[str, None, Reply]:
        """Sample the next reply of an episode; yield its text after every token.

        The end of a text that can still change, such as an incomplete character, is not yielded. If
        the generator is closed, the reply is canceled.

        Returns:
            The reply.
        """
        request = episode.make_request(self.collector.sampling_params())
        self.engine.submit([request])
        decoder, count = self.collector.chat_format.reply_decoder(), 0
        try:
            while not (completions := self.engine.poll()):
                new = self.engine.new_tokens(episode.id, count).tokens
                count += len(new)
                decoder.append(new)
                yield decoder.text.rstrip("\r")  # a newline may follow a carriage return
        except BaseException:
            self.engine.reset()
            raise
        (completion,) = completions
        text = self.collector.chat_format.decode_reply(completion.tokens)
        return Reply(text, completion)

    def encode_reply(self, episode: Episode, text: str) -> Reply:
        """Encode a text as a reply of this model.

        Raises:
            UserError: The reply does not fit into the context.
        """
        chat_format = self.collector.chat_format
        prompt = episode.rollout.tokens
        left = chat_format.tokenizer.decode(prompt[-LEFT_CONTEXT:])
        tokens = [*chat_format.encode_after(left, text), chat_format.closing.token]
        if len(tokens) > episode.remaining_tokens:
            raise UserError(
                f"the reply has {count_text(len(tokens), 'token')}, but the conversation has only "
                f"{count_text(episode.remaining_tokens, 'token')} left: shorten it, or "
                "start a new conversation"
            )
        request = episode.make_request(self.collector.sampling_params())
        logprobs = [0.0] * len(tokens)  # the tokens were not sampled
        version = self.engine.policy_version
        return Reply(text, Completion(request, tokens, logprobs, FinishReason.STOP, version))


def load_policies(config: ChatConfig, *, prompts: Sequence[Any] = ()) -> list[ChatPolicy]:
    """Load the models of a chat.

    Args:
        config: Configuration of the chat.
        prompts: Prompts of ``config.env.prompts``.

    Raises:
        UserError: A model cannot be loaded, is given twice, or cannot chat with this configuration,
            or a key of ``rollout`` has no effect.
    """
    folders = [model_folder(path) for path in config.models]
    resolved = [str(expand_user(folder).resolve()) for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(
                f"models: {config.models[index]} is given twice, and would give equal replies; "
                "remove one of them"
            )
    names = run_names([Path(path) for path in config.models])
    env = config.env or USER_AS_PARTNER
    prompts = prompts or [[{"role": "user", "content": "?"}]] if env.prompts else ()
    policies = []
    for name, folder in zip(names, folders, strict=True):
        spec = ModelSpec(path=folder, dtype=config.dtype)
        model, tokenizer = load_model(spec, seed=config.seed)
        engine = open_local_engine(model, config.rollout)
        collector = Collector.open(
            model, tokenizer, env, config.rollout, prompts=prompts, engine=engine
        )
        policies.append(ChatPolicy(name, collector, engine))
    # A key that only some models use has an effect.
    unused = [unused_rollout_key_message(policy.collector) for policy in policies]
    if all(unused):
        raise UserError(unused[0])
    return policies


def model_folder(path: str) -> str:
    """Return the folder of the trained model of a run directory; return other paths unchanged.

    This folder is ``final/``, or the newest checkpoint of a run that has not ended.

    Raises:
        UserError: The folder is neither a model nor a run with a model.
    """
    folder = path_without_dot_dot(expand_user(path))
    names = ("config.json", "adapter_config.json")
    if not folder.is_dir() or any((folder / name).exists() for name in names):
        return path
    if (folder / "final").is_dir():
        return str(folder / "final")
    for pattern in _CHECKPOINT_PATTERNS:
        if found := checkpoints_in(folder / "checkpoints", pattern):
            return str(found[-1])
    inner = sorted(child.name for child in folder.iterdir() if (child / "final").is_dir())
    hint = f"; it contains the runs {', '.join(inner)}" if inner else ""
    raise UserError(
        f"{path} contains neither a model nor a run with a model (config.json, final/ or "
        f"checkpoints/){hint}"
    )
