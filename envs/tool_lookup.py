"""Tool lookup: answer a question with a tool whose calls have a cost."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from rlhf.envs.core import Step, TextEnv, check_range, normalized

PEOPLE = ("ada", "ben", "cleo", "dan", "eve", "finn", "gus", "hana")
_COMMAND = re.compile(r"(lookup|answer) ([a-z]+|[0-9]{1,2})")


class ToolLookupParameters(NamedTuple):
    """Parameters of the task, as in `ToolLookup`."""

    hops: int
    others: int  # number of people except the person in the question
    rooms: int
    cost: float


class ToolLookup(TextEnv):
    """Find the room of a person, or that of the person's manager, with costly `lookup` calls.

    State: a register with the manager (any other person) and the room of each person, all drawn
    uniformly and independently at reset. Observation: a person's record after `lookup NAME`.
    Action: `lookup NAME` or `answer ROOM`. Reward: `-call_cost` per lookup, +1.0 for the correct
    answer. The episode ends with an answer or after `hops + 2` actions; an invalid action uses up a
    turn. Optimum: dynamic programming over the records read, where the policy may guess at any
    time. If calls are cheap, the optimum is 1 - hops * call_cost. Without the tool, the optimum is
    1 / rooms.

    Args:
        hops: Number of lookups needed: 1 if the question is about a person's room, 2 if the
            question is about the room of the person's manager.
        people: Number of people in the register.
        rooms: Number of rooms.
        call_cost: Cost of each lookup.
    """

    items = (
        "Questions name the same people as in training; the register is drawn anew in each episode."
    )

    def __init__(
        self,
        hops: int = 2,
        people: int = 6,
        rooms: int = 10,
        call_cost: float = 0.05,
        *,
        render_mode: str | None = None,
    ) -> None:
        check_range("hops", hops, 1, 2)
        check_range("people", people, 3, len(PEOPLE))
        check_range("rooms", rooms, 2, 100)
        check_range("call_cost", call_cost, 0.0, 1.0)
        super().__init__(max_turns=hops + 2, render_mode=render_mode)
        self.people = PEOPLE[:people]
        self.rules = ToolLookupParameters(hops, people - 1, rooms, call_cost)
        self.system_prompt = (
            f"A register knows each person's room (0 to {rooms - 1}) and manager. Each reply is "
            f"one command: 'lookup NAME' reads a record and costs {call_cost:g}; 'answer ROOM' "
            f"ends with your answer, worth 1 when right. You have {self.max_turns} commands."
        )
        self._begin_episode(self.people[0], dict.fromkeys(self.people, (0, self.people[1])))

    def _begin_episode(self, person: str, records: dict[str, tuple[int, str]]) -> None:
        """Start an episode whose question names `person`; `records` is name -> (room, manager)."""
        self._person, self._records = person, records
        self._target = person if self.rules.hops == 1 else records[person][1]
        self._read = set[str]()

    def start(self) -> str:
        count = len(self.people)
        rooms = self.np_random.integers(self.rules.rooms, size=count).tolist()
        shifts = self.np_random.integers(1, count, size=count).tolist()
        managers = [self.people[(i + shift) % count] for i, shift in enumerate(shifts)]
        person = self.people[int(self.np_random.integers(count))]
        records = zip(self.people, zip(rooms, managers, strict=True), strict=True)
        self._begin_episode(person, dict(records))
        target = person if self.rules.hops == 1 else f"the manager of {person}"
        return f"In which room sits {target}? {self.turns_left_text()}"

    def step(self, action: str) -> Step:
        command = _COMMAND.fullmatch(normalized(action))
        self.turns_left -= 1
        verb, argument = (command[1], command[2]) if command else ("", "")
        if verb == "answer" and argument.isdigit() and int(argument) < self.rules.rooms:
            success = int(argument) == self._records[self._target][0]
            return self.turn("", float(success), True, success=success)
        if verb == "lookup" and argument in self._records:
            self._read.add(argument)
            room, manager = self._records[argument]
            text = f"{argument}: room {room}, manager {manager}. {self.turns_left_text()}"
            return self.turn(text, -self.rules.cost)
        text = f"Commands are 'lookup NAME' and 'answer ROOM'. {self.turns_left_text()}"
        return self.turn(text, 0.0, valid=False, reason="not a command")

    def legal_actions(self) -> list[str]:
        lookups = [f"lookup {name}" for name in self.people]
        return lookups + [f"answer {room}" for room in range(self.rules.rooms)]

    def action_values(self) -> dict[str, float]:
        known_hops, room_counts = self._known_hops_and_room_counts()
        left = self.turns_left
        values = {}
        for name in self.people:
            if name == self._person and known_hops == 0:
                value = _value_after_person_lookup(self.rules, left, room_counts)
            elif name == self._target and known_hops == 1 and self.rules.hops == 2:
                value = _optimal_value(self.rules, left - 1, 2, ())
            elif name not in self._read and known_hops == 0 and self.rules.hops == 2:
                value = _value_after_other_lookup(self.rules, left, room_counts)
            else:
                value = _optimal_value(self.rules, left - 1, known_hops, room_counts)
            values[f"lookup {name}"] = value - self.rules.cost
        for room in range(self.rules.rooms):
            values[f"answer {room}"] = self._room_probability(room, known_hops)
        return values

    def optimal_value(self) -> float:
        return _optimal_value(self.rules, self.max_turns, 0, ())

    def random_value(self) -> float:
        rooms = self.rules.rooms
        answer = rooms / (len(self.people) + rooms)
        each_turn = answer / rooms - (1 - answer) * self.rules.cost
        return sum((1 - answer) ** turn * each_turn for turn in range(self.max_turns))

    def reference_values(self) -> dict[str, float]:
        """Return the value of `guess`, which answers at once without the tool."""
        return {"guess": 1 / self.rules.rooms}

    def _known_hops_and_room_counts(self) -> tuple[int, tuple[int, ...]]:
        """Return `known_hops` and `room_counts` of `_optimal_value` for the records read so far."""
        if self._person in self._read:
            return (2 if self.rules.hops == 2 and self._target in self._read else 1), ()
        if self.rules.hops == 1:
            return 0, ()
        seen = [self._records[name][0] for name in self._read]
        return 0, tuple(sorted(seen.count(room) for room in set(seen)))

    def _room_probability(self, room: int, known_hops: int) -> float:
        """Return the probability that `room` is the answer, given the records read so far."""
        rules = self.rules
        if known_hops == rules.hops:
            return float(room == self._records[self._target][0])
        if known_hops == 1 or rules.hops == 1:
            return 1 / rules.rooms
        in_room = sum(self._records[name][0] == room for name in self._read)
        return (in_room + (rules.others - len(self._read)) / rules.rooms) / rules.others


@cache
def _optimal_value(
    rules: ToolLookupParameters, actions_left: int, known_hops: int, room_counts: tuple[int, ...]
) -> float:
    """Return the value of the optimal policy.

    Args:
        rules: Parameters of the task.
        actions_left: Remaining actions.
        known_hops: Number of useful records that have been read: 0, 1 (the person's record) or 2
            (also the manager's record).
        room_counts: Used only if `known_hops` is 0: for each room that occurs in the records read,
            the number of records with this room. Each person in these records may be the manager.
    """
    if actions_left == 0:
        return 0.0
    if known_hops == rules.hops:
        return 1.0
    if known_hops == 1:
        return max(1 / rules.rooms, _optimal_value(rules, actions_left - 1, 2, ()) - rules.cost)
    if rules.hops == 1:
        return max(
            1 / rules.rooms, _value_after_person_lookup(rules, actions_left, ()) - rules.cost
        )
    unread = rules.others - sum(room_counts)
    guess = (max(room_counts, default=0) + unread / rules.rooms) / rules.others
    options = [guess, _value_after_person_lookup(rules, actions_left, room_counts) - rules.cost]
    if unread:
        options.append(_value_after_other_lookup(rules, actions_left, room_counts) - rules.cost)
    return max(options)


def _value_after_person_lookup(
    rules: ToolLookupParameters, left: int, room_counts: tuple[int, ...]
) -> float:
    """Return the value of reading the person's record, without the cost of the call."""
    if rules.hops == 1:
        return _optimal_value(rules, left - 1, 1, ())
    already = sum(room_counts) / rules.others
    after = (_optimal_value(rules, left - 1, 2, ()), _optimal_value(rules, left - 1, 1, ()))
    return already * after[0] + (1 - already) * after[1]


def _value_after_other_lookup(
    rules: ToolLookupParameters, left: int, room_counts: tuple[int, ...]
) -> float:
    """Return the value of reading another person's record before the record of the person.

    The cost of the call is not subtracted.
    """
    value = _optimal_value(rules, left - 1, 0, (1, *room_counts)) * (
        1 - len(room_counts) / rules.rooms
    )
    for i in range(len(room_counts)):
        more = tuple(sorted((*room_counts[:i], room_counts[i] + 1, *room_counts[i + 1 :])))
        value += _optimal_value(rules, left - 1, 0, more) / rules.rooms
    return value
