"""A conversation with several models: the same replies as elsewhere, and nothing is lost."""

import itertools
import random
import resource
from pathlib import Path
from typing import Any

import pytest

from rlhf.chat.notes import reply_notes
from rlhf.chat.policy import model_folder
from rlhf.chat.session import ChatSession
from rlhf.chat.turn import Vote
from rlhf.chat.votes import VoteRecorder, pair_rows
from rlhf.commands.generate import GenerateConfig, generate
from rlhf.config.chat import ChatConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.load import load
from rlhf.errors import UserError
from rlhf.labeling.store import LabelFile
from rlhf.models.rewards import load_rewards
from rlhf.rollout.episode import EpisodeSeed
from tests.chat.conftest import Checkpoints, save
from tests.helpers.chats import GUESS, generated, open_session

LENGTH = [{"kind": "length"}, {"kind": "regex", "pattern": "e"}]


def talk(session: ChatSession, text: str) -> list[str]:
    """Send a message; the replies in the order of the models."""
    session.add_user_message(text)
    return reply(session)


def reply(session: ChatSession) -> list[str]:
    """Let the models reply; their texts in the order of the models."""
    for _ in session.generate():
        pass
    return [each.text if each else "" for each in session.turns[-1].replies]


def test_the_model_of_a_run_is_final_or_the_newest_checkpoint(checkpoints: Checkpoints):
    assert [model_folder(path) for path in checkpoints.paths] == checkpoints.folders


@pytest.mark.parametrize("rollout", [{}, {"temperature": 0.0}, {"top_k": 5, "system": "Be brief."}])
def test_first_replies_are_those_of_generate(checkpoints: Checkpoints, rollout: dict):
    session = open_session(checkpoints.paths, seed=3, rollout=rollout)
    replies = talk(session, "Which colour is the sky?")
    expected = [
        generated(folder, "Which colour is the sky?", seed=3, **rollout)[0]
        for folder in checkpoints.folders
    ]
    assert replies == expected
    assert len(set(replies)) == 3


def test_retries_are_the_further_samples_of_generate(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:1], seed=1)
    replies = talk(session, "Guess")
    for _ in range(2):
        session.prepare_retry()
        replies += reply(session)
    assert replies == generated(checkpoints.folders[0], "Guess", seed=1, samples=3)
    assert len(set(replies)) == 3
    assert len(session.turns) == 1


def test_interleaved_sampling_gives_the_same_replies(checkpoints: Checkpoints):
    expected = talk(open_session(checkpoints.paths, seed=5), "Repeat: stone")
    session = open_session(checkpoints.paths, seed=5)
    session.add_user_message("Repeat: stone")
    seen: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for index, text in session.generate(interleaved=True):
        seen[index].append(text)
    assert [texts[-1] for texts in seen.values()] == expected
    assert max(map(len, seen.values())) > 5  # streamed, not at once
    assert all(
        later.startswith(earlier) for texts in seen.values()
        for earlier, later in itertools.pairwise(texts)
    )  # fmt: skip


def test_a_streamed_reply_decodes_each_token_a_constant_number_of_times(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    session = open_session(checkpoints.paths[:1], seed=5, rollout={"max_new_tokens": 200})
    tokenizer = session.policies[0].collector.chat_format.tokenizer
    decode, lengths = tokenizer.decode, []

    def counted(ids, **keys):
        lengths.append(len(ids))
        return decode(ids, **keys)

    session.add_user_message("Repeat: stone")
    monkeypatch.setattr(tokenizer, "decode", counted)
    texts = [text for _, text in session.generate()]
    tokens = session.turns[-1].replies[0].completion.tokens
    assert len(tokens) > 50
    assert len(texts) > 50
    assert sum(lengths) < 10 * len(tokens)


def test_an_episode_is_that_of_the_collector(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:1], env=GUESS, seed=8)
    while session.can_generate:
        reply(session)
    branch = session.branches[0]
    session.policies[0].engine.reset()
    played = session.policies[0].collector.collect([EpisodeSeed(8, 0, 0)])[0]
    assert branch.conversation == played.conversation
    assert branch.episode.rollout.tokens == played.tokens
    assert sum(result[1] for result in branch.results) == played.env_return
    assert len(session.turns) == played.num_turns == 4


def test_replies_in_the_place_of_the_model_are_steps_of_the_environment(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:2], env=GUESS, seed=8)
    hidden = session.branches[0].partner.env.unwrapped._hidden
    session.reply_for_all_models(str(hidden % 20 + 1))
    reply(session)
    session.reply_for_all_models(str(hidden))
    assert not session.can_generate
    for branch in session.branches:
        texts = [m["content"] for m in branch.conversation if m["role"] == "assistant"]
        assert texts[0] == str(hidden % 20 + 1)
        assert texts[2] == str(hidden)
        assert sum(result[1] for result in branch.results) == 1.0
    with pytest.raises(UserError, match="the episode is over"):
        session.reply_for_all_models("1")
    session.undo()
    assert session.can_generate
    assert [result[1] for result in session.branches[0].results] == [0.0, 0.0]


def test_taking_back_a_turn_restores_the_conversation(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths, seed=2)
    talk(session, "Repeat: apple")
    before = [branch.conversation for branch in session.branches]
    tokens = [list(branch.episode.rollout.tokens) for branch in session.branches]
    second = talk(session, "Repeat: river")
    assert [b.episode.rollout.tokens[: len(t)] for b, t in zip(session.branches, tokens,
                                                               strict=True)] == tokens  # fmt: skip
    session.undo()
    assert [branch.conversation for branch in session.branches] == before
    assert [branch.episode.rollout.tokens for branch in session.branches] == tokens
    assert talk(session, "Repeat: river") == second
    session.undo()
    session.undo()
    assert session.turns == []
    with pytest.raises(UserError, match="nothing to take back"):
        session.undo()


def test_a_canceled_reply_leaves_the_message(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths, seed=2)
    expected = talk(session, "Repeat: apple")
    session.undo()
    session.add_user_message("Repeat: apple")
    stream = session.generate()
    for _ in range(14):  # in the middle of the second reply
        next(stream)
    stream.close()
    assert session.turns == []
    assert session.can_generate
    with pytest.raises(UserError, match="have not replied"):
        session.add_user_message("again")
    assert reply(session) == expected


def test_a_vote_continues_every_conversation_with_the_preferred_reply(checkpoints: Checkpoints):
    votes: list[Vote] = []
    session = open_session(checkpoints.paths, seed=4, on_vote=votes.append)
    replies = talk(session, "Repeat: cloud")
    session.vote(2)
    assert {branch.conversation[-1]["content"] for branch in session.branches} == {replies[2]}
    talk(session, "Repeat: stone")
    prompts = session.turns[-1].prompts
    assert prompts[0] == prompts[1] == prompts[2]
    assert [message["content"] for message in prompts[0]] == [
        "Repeat: cloud", replies[2], "Repeat: stone",
    ]  # fmt: skip
    session.vote(None)
    assert [vote.preferred for vote in votes] == [2, None]
    with pytest.raises(UserError, match="have a vote already"):
        session.vote(1)


def test_without_a_vote_the_conversations_differ(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:2], seed=4)
    first = talk(session, "Repeat: cloud")
    talk(session, "Repeat: stone")
    own = [turn.prompts for turn in session.turns][1]
    assert [prompt[1]["content"] for prompt in own] == first
    with pytest.raises(UserError, match="different conversations"):
        session.vote(0)


def test_votes_are_preference_rows(checkpoints: Checkpoints, tmp_path: Path):
    file = LabelFile(tmp_path / "votes.jsonl")
    recorder = VoteRecorder(file, "ann")
    session = open_session(
        checkpoints.paths, seed=4, on_vote=recorder.record, on_unvote=recorder.take_back
    )
    first = talk(session, "Repeat: cloud")
    session.vote(2)
    session.unvote()
    assert [branch.conversation[-1]["content"] for branch in session.branches] == first
    with pytest.raises(UserError, match="has no vote"):
        session.unvote()
    session.vote(1)
    second = talk(session, "Repeat: stone")
    session.vote(None)
    third = talk(session, "Repeat: river")
    session.vote(0)
    file.close()
    loaded = load(DataSpec(str(tmp_path / "votes.jsonl")), "preference", seed=None)
    pairs = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in loaded.rows]
    assert pairs == [
        (first[1], first[0]), (first[1], first[2]), (third[0], third[1]), (third[0], third[2]),
    ]  # fmt: skip
    history = ["Repeat: cloud", first[1], "Repeat: stone", second[0], "Repeat: river"]
    assert [m["content"] for m in loaded.rows[-1]["prompt"]] == history
    assert "3 tie" in loaded.summary()
    assert "2 undone label" in loaded.summary()


@pytest.mark.parametrize("fault", ["full disk", "killed"])
def test_a_vote_is_saved_whole_or_not(checkpoints: Checkpoints, tmp_path: Path, fault: str):
    """A vote on three replies is two rows, or three at a tie."""
    path = tmp_path / "votes.jsonl"
    with LabelFile(path) as file:
        recorder = VoteRecorder(file, "ann")
        session = open_session(checkpoints.paths, seed=4, on_vote=recorder.record)
        talk(session, "Repeat: cloud")
        session.vote(2)
        before, size = path.read_bytes(), path.stat().st_size
        talk(session, "Repeat: stone")
        if fault == "full disk":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2, limits[1]))
            try:
                with pytest.raises(OSError, match="votes"):
                    session.vote(None)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert path.read_bytes() == before
            assert len(file.rows) == 2
        session.vote(None)
        assert len(file.rows) == 5
    if fault == "killed":
        whole = path.read_bytes()
        ends = [i + 1 for i in range(len(whole)) if whole[i : i + 1] == b"\n"]
        for end in (ends[2], ends[3], ends[3] + 40):
            path.write_bytes(whole[:end])
            with LabelFile(path) as file:
                assert len(file.rows) == 2
            assert path.read_bytes() == before
        path.write_bytes(whole[:-1])
        with LabelFile(path) as file:
            assert len(file.rows) == 5


def test_blind_replies_are_shown_in_random_order(checkpoints: Checkpoints):
    votes: list[Vote] = []
    seed = random.randrange(2**32)
    print("seed", seed)
    session = open_session(checkpoints.paths, blind=True, rng=random.Random(seed),
                           on_vote=votes.append)  # fmt: skip
    orders = []
    for _ in range(12):
        replies = talk(session, "Repeat: cloud")
        orders.append(tuple(session.shown_order))
        session.vote(session.index_of("c"))
        (row, _) = pair_rows(votes[-1], annotator="ann")
        winner = row[f"response_{row['winner']}"][0]["content"]
        assert winner == replies[orders[-1][2]]
        assert row["models"][row["winner"]] == session.policies[orders[-1][2]].name
        assert row["models"][row["shown_first"]] != row["models"][row["winner"]]
        assert row["blind"] is True
        session.reset()
    assert len(set(orders)) > 1  # the chance of one order is 6 ** -11


def test_replies_are_scored_by_any_reward(checkpoints: Checkpoints):
    reward = load_rewards(LENGTH)
    session = open_session(checkpoints.paths, reward=reward, seed=6)
    replies = talk(session, "Repeat: cloud")
    conversations = [
        [{"role": "user", "content": "Repeat: cloud"}, {"role": "assistant", "content": text}]
        for text in replies
    ]
    expected = reward.score(conversations)
    assert [score and score.value for score in session.turns[-1].scores] == expected.values
    assert {score and tuple(score.components) for score in session.turns[-1].scores} == {
        tuple(expected.components)
    }


def test_a_message_that_does_not_fit_changes_nothing(tmp_path: Path):
    session = open_session([str(save(tmp_path / "short", seed=0, context=64))])
    with pytest.raises(UserError, match="is limited to 64 tokens"):
        session.add_user_message("apple " * 100)
    talk(session, "Repeat: apple")
    before = session.branches[0].conversation
    with pytest.raises(UserError, match="does not fit"):
        session.add_user_message("apple " * 100)
    assert session.branches[0].conversation == before
    talk(session, "river")
    assert len(session.turns) == 2


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("temprature", 1, "did you mean 'temperature'"),
        ("temperature", -1, "temperature must be >= 0"),
        ("top_p", "much", "top_p"),
        ("max_new_tokens", 0, "max_new_tokens must be >= 1"),
        ("max_new_tokens", True, "max_new_tokens must be a number, got True"),
    ],
)
def test_a_wrong_setting_changes_nothing(checkpoints: Checkpoints, key, value, reason):
    session = open_session(checkpoints.paths[:1])
    with pytest.raises(UserError, match=reason):
        session.set_sampling({"top_k": 3, key: value})
    assert session.settings.top_k == 0


def test_settings_apply_to_the_next_reply(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:1], seed=3)
    talk(session, "Guess")
    session.undo()
    session.set_sampling({"temperature": 0, "max_new_tokens": 5})
    spec = RolloutSpec(max_new_tokens=5, temperature=0)
    config = GenerateConfig(ModelSpec(checkpoints.folders[0]), prompt="Guess", rollout=spec)
    assert talk(session, "Guess") == list(generate(config))
    session.set_system("Be brief.")
    assert session.turns == []
    talk(session, "Guess")
    assert session.turns[0].prompts[0][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("text", ["", "  \n", "half \ud83d"])
def test_a_message_that_is_no_text_is_refused(checkpoints: Checkpoints, text: str):
    session = open_session(checkpoints.paths[:1])
    with pytest.raises(UserError):
        session.add_user_message(text)
    assert session.branches[0].conversation == []


class BrittleEnv:
    """Makes an environment whose second step fails."""

    def __new__(cls) -> Any:
        from rlhf.envs.guess_number import GuessNumber

        class Brittle(GuessNumber):
            def step(self, action: str) -> Any:
                if self.turns_left == 3:
                    raise RuntimeError("the disk is on fire")
                return super().step(action)

        return Brittle()


def test_a_failing_environment_leaves_the_turn_before(checkpoints: Checkpoints):
    env = {"id": "tests.chat.test_session:BrittleEnv"}
    session = open_session(checkpoints.paths[:1], env=env)
    reply(session)
    before = session.branches[0].conversation
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is on fire") as error:
            reply(session)
        assert "env.errors" not in str(error.value)  # which a chat refuses
        assert session.branches[0].conversation == before
        assert len(session.turns) == 1


def test_prompts_as_the_partner(checkpoints: Checkpoints, tmp_path: Path):
    from rlhf.commands.chat import _open_session
    from tests.helpers.training import PROMPTS, write_rows

    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    env = EnvSpec(prompts=[DataSpec(str(data))])
    config = ChatConfig(checkpoints.paths[:2], env=env, rollout=RolloutSpec(max_new_tokens=4))
    with _open_session(config) as session:
        seen = set()
        for _ in PROMPTS:
            seen.add(session.branches[1].conversation[-1]["content"])
            reply(session)
            session.vote(1)
            session.reset(seed=session.seed + 1)
        assert seen == set(PROMPTS)


def test_a_vote_whose_reply_does_not_fit_leaves_a_conversation_that_can_go_on(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = LabelFile(tmp_path / "votes.jsonl")
    recorder = VoteRecorder(file, "ann")
    session = open_session(
        checkpoints.paths[:2], on_vote=recorder.record, on_unvote=recorder.take_back
    )
    first = talk(session, "Repeat: cloud")

    def refuse(*_: Any) -> None:
        raise UserError("the reply has 15 tokens, but the conversation has only 4 tokens left")

    with monkeypatch.context() as patch:
        patch.setattr(session.policies[0], "encode_reply", refuse)
        with pytest.raises(UserError, match=r"the vote counts, but .* only 4 tokens left"):
            session.vote(1)
    assert len(file.rows) == 1
    assert [branch.conversation[-1]["content"] for branch in session.branches] == first
    assert not session.can_generate
    session.unvote()
    session.vote(1)
    assert {branch.conversation[-1]["content"] for branch in session.branches} == {first[1]}
    talk(session, "Repeat: stone")
    file.close()


class LengthPartner:
    """An environment of two steps, whose rewards are the lengths of the replies."""

    def __init__(self, partner: Any) -> None:
        self.env, self.close, self._partner = partner.env, partner.close, partner

    def start(self, seed: int) -> Any:
        self._steps = 0
        return self._partner.start(seed)

    def answer(self, reply: str) -> Any:
        self._steps += 1
        return "next", float(len(reply)), self._steps == 2, False, {}


def test_the_return_after_a_vote_is_that_of_the_shared_conversation(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:2], env=GUESS, seed=8)
    for branch in session.branches:
        branch.partner = LengthPartner(branch.partner)
    session.reset()
    first = reply(session)
    session.vote(1)
    second = reply(session)
    returns = [reply_notes(session, session.turns[-1], index)[-1] for index in range(2)]
    assert returns == [
        f"the episode is over, return {len(first[1]) + len(last)}" for last in second
    ]
    assert len(first[0]) != len(first[1])
    session.undo()
    assert "over" not in reply_notes(session, session.turns[-1], 0)[-1]


def test_there_is_no_episode_after_the_largest_seed(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:1], env=GUESS, seed=2**63 - 1)
    with pytest.raises(UserError, match="seed must be an integer"):
        session.start_next_episode()
    assert session.seed == 2**63 - 1
