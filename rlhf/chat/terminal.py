"""The chat in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rlhf.chat.notes import reply_notes
from rlhf.chat.session import ChatSession, letter_of, parse_seed
from rlhf.chat.turn import Turn
from rlhf.common.files import describe_write_error, expand_user, find_write_error, write_jsonl
from rlhf.common.text import count_text, escape_invisible
from rlhf.config.load import parse_option_value
from rlhf.envs.play import legal_actions_or_hint_text
from rlhf.errors import UserError

COMMANDS = {
    ":retry": "sample the last replies again",
    ":undo": "take back the last turn",
    ":reset": "start a new conversation",
    ":system TEXT": "set the system message (none without TEXT), and start a new conversation",
    ":seed N": "set the random seed, and start a new conversation",
    ":set KEY VALUE": "change temperature, top_k, top_p, min_p or max_new_tokens",
    ":vote A": "prefer reply A, and continue every conversation with it",
    ":tie": "record that the replies are equally good, and continue with the first",
    ":unvote": "take back the vote; each model continues with its own reply",
    ":view A": "print what the model of reply A sees: the text of all its tokens",
    ":save FILE": "write the conversations to a new JSONL file",
    ":help": "print this list",
    ":quit": "end (also Ctrl-D)",
}
ENVIRONMENT_COMMANDS = {
    ":legal": "list the legal actions",
    ":hint": "print the action of the environment's expert",
    ":next": "start another episode, with the next seed",
}
_HELP_END = (
    "A line that begins with :: is a message that begins with a colon. A line that ends with a "
    "backslash is continued."
)


class Terminal:
    """Reads lines of the user, and prints the replies while they are sampled.

    Args:
        session: The conversation.
        read: Function that shows a prompt and returns a line of input. If it raises `EOFError`, the
            chat ends.
        write: Function that prints a text, without adding a line break.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        read: Callable[[str], str] = input,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self.session, self._read = session, read
        self._write = write or _write_and_flush
        self._commands: dict[str, Callable[[str], None]] = {
            "retry": self._retry,
            "undo": self._undo,
            "reset": lambda _: self._restart(),
            "system": self._set_system,
            "seed": self._set_seed,
            "set": self._set_sampling,
            "vote": self._vote,
            "tie": lambda _: self._record_vote(None),
            "unvote": self._unvote,
            "view": self._print_token_text,
            "save": self._save_transcripts,
            "help": lambda _: self._print_help(),
        }
        if session.env is not None:
            self._commands |= {
                "legal": lambda _: self._print_action_help(":legal"),
                "hint": lambda _: self._print_action_help(":hint"),
                "next": lambda _: self._start_next_episode(),
            }

    def run(self) -> None:
        """Read lines and handle them until the user ends the chat."""
        self._print_introduction()
        while True:
            try:
                line = self._read_line()
            except EOFError:
                self._print("")
                return
            except KeyboardInterrupt:  # as in a shell, Ctrl-C discards the line
                self._print("\n(:quit or Ctrl-D ends the chat)")
                continue
            if line.strip() == ":quit":
                return
            try:
                self._handle_line(line)
            except UserError as error:
                self._print(f"({' '.join(str(error).split())})")
            except OSError as error:
                if find_write_error(error) is None:
                    raise
                self._print(f"({error.filename}: {describe_write_error(error)})")

    def _read_line(self) -> str:
        """Read one line, and the lines that continue it."""
        line = self._read("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read("… ")
        return line

    def _handle_line(self, line: str) -> None:
        """Run the command in a line, or send the line as a message or as all models' reply.

        In a chat with an environment, a blank line lets the models reply.
        """
        if line.startswith(":") and not line.startswith("::"):
            name, _, argument = line[1:].strip().partition(" ")
            if name not in self._commands:
                raise UserError(f"unknown command :{name}; :help lists the commands")
            self._commands[name](argument.strip())
            return
        text = line[1:] if line.startswith("::") else line
        if self.session.env is None:
            if text.strip():
                self.session.add_user_message(text)
                self._generate_and_print_replies()
        elif text.strip():
            self.session.reply_for_all_models(text)
            self._print_results(self.session.turns[-1])
        else:
            self._generate_and_print_replies()

    # -- replies ------------------------------------------------------------------------------

    def _generate_and_print_replies(self) -> None:
        """Sample the replies, and print their texts while they grow. Ctrl-C cancels them."""
        stream = self.session.generate()
        current, shown = -1, ""
        try:
            for index, text in stream:
                if index != current:
                    self._write(("\n" if current >= 0 else "") + self._heading(index))
                    current, shown = index, ""
                text = escape_invisible(text)
                if text.startswith(shown):
                    self._write(text[len(shown) :])
                else:  # the end of the reply has changed the text before it
                    self._write("\n" + text)
                shown = text
        except KeyboardInterrupt:
            stream.close()
            hint = ":retry samples the replies again, :undo takes back the message"
            hint = hint if self.session.env is None else "Enter samples the replies again"
            self._print(f"\n(canceled; {hint})")
            return
        self._print("")
        self._print_results(self.session.turns[-1])

    def _heading(self, index: int) -> str:
        """Return the text before a reply: its letter and, unless it is hidden, the model's name.

        With only one model, the text is empty.
        """
        session = self.session
        letter = self._letter_prefix(session.shown_order.index(index))
        is_named = letter and not session.blind
        return letter + (f"{escape_invisible(session.policies[index].name)}: " if is_named else "")

    def _print_results(self, turn: Turn) -> None:
        """Print the notes on the replies of a turn, and the next observations."""
        for position, index in enumerate(turn.order):
            if notes := reply_notes(self.session, turn, index):
                self._print(f"{self._letter_prefix(position)}({'; '.join(notes)})")
            result = turn.results[index]
            if self.session.env is not None and result is not None and result[0]:
                self._print(self._letter_prefix(position) + result[0])

    def _letter_prefix(self, position: int) -> str:
        return f"[{letter_of(position)}] " if len(self.session.policies) > 1 else ""

    # -- commands -----------------------------------------------------------------------------

    def _retry(self, argument: str) -> None:
        self.session.prepare_retry()
        self._generate_and_print_replies()

    def _undo(self, argument: str) -> None:
        self.session.undo()
        turns = len(self.session.turns)
        self._print(f"(taken back; the conversation has {count_text(turns, 'turn')})")

    def _restart(self, *, seed: int | None = None) -> None:
        self.session.reset(seed=seed)
        self._print_new_conversation()

    def _start_next_episode(self) -> None:
        self.session.start_next_episode()
        self._print_new_conversation()

    def _print_new_conversation(self) -> None:
        self._print(f"(new conversation, seed {self.session.seed})")
        self._print_first_observation()

    def _set_system(self, argument: str) -> None:
        self.session.set_system(argument)
        self._print("(new conversation with this system message)")
        self._print_first_observation()

    def _set_seed(self, argument: str) -> None:
        self._restart(seed=parse_seed(argument))

    def _set_sampling(self, argument: str) -> None:
        key, _, value = argument.partition(" ")
        self.session.set_sampling({key: parse_option_value(key, value)})
        self._print(f"({key} is {getattr(self.session.settings, key)})")

    def _vote(self, argument: str) -> None:
        self._record_vote(self.session.index_of(argument))

    def _record_vote(self, preferred: int | None) -> None:
        self.session.vote(preferred)
        turn = self.session.turns[-1]
        names = [
            f"{letter_of(position)} is {self.session.policies[index].name}"
            for position, index in enumerate(turn.order)
        ]
        text = "tie" if preferred is None else "vote"
        text += " recorded" if self.session.on_vote is not None else ""
        self._print(f"({text}: {', '.join(names)})")

    def _unvote(self, argument: str) -> None:
        self.session.unvote()
        self._print("(vote taken back)")

    def _print_token_text(self, argument: str) -> None:
        index = self.session.index_of(argument) if len(self.session.policies) > 1 else 0
        self._print(self.session.branches[index].decode_all_tokens())

    def _save_transcripts(self, argument: str) -> None:
        if not argument:
            raise UserError("name the file: :save FILE")
        if not self.session.turns:
            raise UserError("there is no reply to save yet")
        try:
            path = expand_user(argument)
            exists = path.exists()
            if not exists:
                write_jsonl(path, self.session.transcripts())
        except (OSError, ValueError, RuntimeError) as error:  # such as ~NAME of an unknown user
            reason = describe_write_error(error) if isinstance(error, OSError) else error
            raise UserError(f"{argument} cannot be written: {reason}") from error
        if exists:
            raise UserError(f"{path} exists already: choose another name")
        self._print(f"(saved to {path})")

    def _print_action_help(self, command: str) -> None:
        for position, index in enumerate(self.session.shown_order):
            env = self.session.branches[index].partner.env
            self._print(
                self._letter_prefix(position) + legal_actions_or_hint_text(env.unwrapped, command)
            )

    # -- texts --------------------------------------------------------------------------------

    def _print_introduction(self) -> None:
        session = self.session
        for position, policy in enumerate(session.policies):
            hidden = session.blind or len(session.policies) == 1
            self._print(f"{policy.name}" if hidden else f"{letter_of(position)} is {policy.name}")
        partner = (
            "Type a message."
            if session.env is None
            else "Enter lets the models reply; a text is your reply in their place."
        )
        self._print(f"(seed {session.seed}; {partner} :help lists the commands)")
        self._print_first_observation()

    def _print_first_observation(self) -> None:
        """Print the messages that an environment starts with."""
        if self.session.env is not None:
            for message in self.session.branches[0].conversation:
                self._print(f"{message['role']}: {message['content']}")

    def _print_help(self) -> None:
        rows = COMMANDS | (ENVIRONMENT_COMMANDS if self.session.env is not None else {})
        width = max(map(len, rows))
        for command, text in rows.items():
            self._print(f"  {command:{width}}  {text}")
        self._print(_HELP_END)

    def _print(self, text: str) -> None:
        self._write(escape_invisible(text) + "\n")


def _write_and_flush(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
