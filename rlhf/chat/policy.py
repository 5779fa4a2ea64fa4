"""Models of a chat: load them, and sample their replies token by token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.common.files import expand_user
from rlhf.config.chat import ChatConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError
from rlhf.evaluation.run_groups import run_names
from rlhf.models.loading import load_model
from rlhf.rollout.chat_format import LEFT_CONTEXT
from rlhf.rollout.collector import Collector, Episode, open_local_engine
from rlhf.rollout.sampling.base import Completion, FinishReason
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.training.checkpoint import checkpoints_in

_CHECKPOINT_PATTERNS = ("step-*", "checkpoint-*")
"""Names of the checkpoints of the native engine and of TRL."""
USER_AS_PARTNER = EnvSpec(prompts=[DataSpec("the messages of the user")])
"""Placeholder for the source of episodes of a chat with a user, which is not read."""


@dataclass(frozen=True)
class Reply:
    """A reply of a model, or of the user in the place of the model."""

    text: str
    completion: Completion

    @property
    def is_cut_off(self) -> bool:
        """Whether the limit on tokens ended the reply."""
        return self.completion.finish_reason == FinishReason.LENGTH


class ChatPolicy:
    """A model that replies in a chat.

    Args:
        name: Name of the model for people.
        collector: Collector of the model, whose methods build its episodes.
        engine: Engine of the collector.
    """

    def __init__(self, name: str, collector: Collector, engine: ContinuousEngine) -> None:
        self.name, self.collector, self.engine = name, collector, engine

    def stream(self, episode: Episode) -> Generator[str, None, Reply]:
        """Sample the next reply of an episode; yield its text after every token.

        The end of a text that can still change, such as an incomplete character, is not yielded. If
        the generator is closed, the reply is canceled.

        Returns:
            The reply.
        """
        request = self.collector.make_request(episode, self.collector.sampling_params())
        self.engine.submit([request])
        try:
            while not (completions := self.engine.poll()):
                text = self._decode(self.engine.new_tokens(episode.id, 0).tokens)
                # Bytes of an incomplete character are decoded as U+FFFD, and a newline may follow
                # a carriage return.
                yield text.rstrip("\ufffd\r")
        except BaseException:
            self.engine.reset()
            raise
        (completion,) = completions
        return Reply(self._decode(completion.tokens), completion)

    def encode(self, episode: Episode, text: str) -> Reply:
        """Return a reply with a given text, which is encoded as the reply of this model.

        Raises:
            UserError: The reply does not fit into the context.
        """
        chat_format = self.collector.chat_format
        prompt = episode.rollout.tokens
        left = chat_format.tokenizer.decode(prompt[-LEFT_CONTEXT:])
        tokens = [*chat_format.encode_after(left, text), chat_format.closing.token]
        if len(tokens) > episode.remaining_tokens:
            raise UserError(
                f"the reply has {len(tokens)} tokens, but the conversation has only "
                f"{episode.remaining_tokens} tokens left: shorten it, or start a new conversation"
            )
        request = self.collector.make_request(episode, self.collector.sampling_params())
        logprobs = [0.0] * len(tokens)  # nothing was sampled
        version = self.engine.policy_version
        return Reply(text, Completion(request, tokens, logprobs, FinishReason.STOP, version))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.collector.chat_format.decode_reply(tokens)


def load_policies(config: ChatConfig, *, prompts: Sequence[Any] = ()) -> list[ChatPolicy]:
    """Load the models of a chat.

    Args:
        config: Configuration of the chat.
        prompts: Prompts of ``config.env.prompts``.

    Raises:
        UserError: A model cannot be loaded, is given twice, or cannot chat with this configuration.
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
    return policies


def model_folder(path: str) -> str:
    """Return the folder of the trained model of a run directory; return other paths unchanged.

    It is ``final/``, or the newest checkpoint of a run that has not ended.

    Raises:
        UserError: The folder is neither a model nor a run with a model.
    """
    folder = expand_user(path)
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
