"""Knowledge graph: walk from one entity to another along facts, in as few steps as possible."""

from __future__ import annotations

from collections import deque
from functools import cache

from rlhf.envs.core import Step, TextEnv, check_choice, check_range, normalized
from rlhf.envs.items import SPLITS, split_items

# subject | relation | relation read backwards | object
FACTS = """
paris | is the capital of | has the capital | france
madrid | is the capital of | has the capital | spain
lisbon | is the capital of | has the capital | portugal
rome | is the capital of | has the capital | italy
berlin | is the capital of | has the capital | germany
vienna | is the capital of | has the capital | austria
budapest | is the capital of | has the capital | hungary
france | borders | borders | spain
spain | borders | borders | portugal
france | borders | borders | italy
france | borders | borders | germany
germany | borders | borders | austria
austria | borders | borders | hungary
italy | borders | borders | austria
seine | flows through | lies on the | paris
tagus | flows through | lies on the | lisbon
tiber | flows through | lies on the | rome
danube | flows through | lies on the | vienna
danube | flows through | lies on the | budapest
rhine | flows through | is crossed by the | germany
louvre | stands in | houses the | paris
prado | stands in | houses the | madrid
colosseum | stands in | houses the | rome
goya | was born in | is the birthplace of | spain
mozart | died in | saw the death of | vienna
mozart | was born in | is the birthplace of | austria
liszt | was born in | is the birthplace of | hungary
monet | was born in | is the birthplace of | paris
galileo | was born in | is the birthplace of | italy
bach | was born in | is the birthplace of | germany
prado | shows works of | is shown in the | goya
"""
Edges = dict[str, dict[str, str]]  # entity -> neighbor -> relation


class KnowledgeGraph(TextEnv):
    """Walk from a start entity to a goal entity; each action follows one fact.

    State: the goal, the current entity and the number of remaining actions. The start and the goal
    are drawn uniformly from the pairs of entities whose shortest path has `hops` facts.
    Observation: the facts about the current entity, each of which names another entity, and the
    number of remaining actions; at the start, also the goal. Action: the name of one of these
    entities, with or without `go`. Reward: `-step_cost` per action, and +1.0 for reaching the goal.
    The episode ends at the goal or after `3 * hops` actions. Optimum: the shortest path, which has
    `hops` actions. The facts are the same in all episodes, so a policy can learn them.

    Args:
        hops: Number of actions of the shortest path from the start to the goal.
        step_cost: Cost of each action.
        split: Pairs of start and goal: "all", "train" or "test".
    """

    separable = True
    items = "A start and a goal; the evaluation pairs do not occur in training."

    def __init__(
        self,
        hops: int = 3,
        step_cost: float = 0.05,
        *,
        split: str = "all",
        render_mode: str | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_range("hops", hops, 1, max(d for row in distances().values() for d in row.values()))
        check_range("step_cost", step_cost, 0.0, 1.0 / (3 * hops))
        super().__init__(max_turns=3 * hops, render_mode=render_mode)
        self.hops, self.step_cost = hops, step_cost
        pairs = [(a, b) for a, row in distances().items() for b in row if row[b] == hops]
        self.pairs = split_items(pairs, split)
        self.system_prompt = (
            "You walk through a graph of facts: from an entity you can go to any entity that one "
            f"of its facts names. Reach the goal in few steps: each costs {step_cost:g}, the goal "
            f"pays 1, and you have {self.max_turns}. Answer: go NAME"
        )
        self._entity, self._goal = self.pairs[0]

    def start(self) -> str:
        self._entity, self._goal = self.pairs[int(self.np_random.integers(len(self.pairs)))]
        return f"Your goal: {self._goal}. {self._location_text()}"

    def step(self, action: str) -> Step:
        name = normalized(action).removeprefix("go ").removeprefix("to ")
        self.turns_left -= 1
        if name not in relations_by_entity()[self._entity]:
            text = f"No fact leads there. {self._location_text()}"
            reason = "not a neighbor of the current entity"
            return self.turn(text, -self.step_cost, valid=False, reason=reason)
        self._entity = name
        if name == self._goal:
            return self.turn("Goal reached.", 1.0 - self.step_cost, True, success=True)
        return self.turn(self._location_text(), -self.step_cost)

    def _location_text(self) -> str:
        """Return the facts about the current entity and the number of turns left."""
        return f"{facts_about(self._entity)} {self.turns_left_text()}"

    def legal_actions(self) -> list[str]:
        return [f"go {name}" for name in relations_by_entity()[self._entity]]

    def action_values(self) -> dict[str, float]:
        values = {}
        for name in relations_by_entity()[self._entity]:
            steps = 1 + distances()[name][self._goal]
            reached = float(steps <= self.turns_left)
            values[f"go {name}"] = reached - self.step_cost * min(steps, self.turns_left)
        return values

    def best_action(self) -> str:
        """Return a step along a shortest path."""
        nearest = min(
            relations_by_entity()[self._entity], key=lambda name: distances()[name][self._goal]
        )
        return f"go {nearest}"

    def optimal_value(self) -> float:
        """Return the mean value over the pairs.

        Every shortest path is shorter than the turn limit.
        """
        lengths = [distances()[start][goal] for start, goal in self.pairs]
        return 1.0 - self.step_cost * sum(lengths) / len(lengths)

    def random_value(self) -> float:
        """Compute the exact value by propagating the distribution over entities."""
        return sum(self._random_walk_return(*pair) for pair in self.pairs) / len(self.pairs)

    def _random_walk_return(self, start: str, goal: str) -> float:
        """Return the expected return of random actions from `start` to `goal`."""
        probabilities, value = {start: 1.0}, 0.0
        for _ in range(self.max_turns):
            value -= self.step_cost * sum(probabilities.values())
            after: dict[str, float] = {}
            for entity, probability in probabilities.items():
                for name in relations_by_entity()[entity]:
                    after[name] = after.get(name, 0.0) + probability / len(
                        relations_by_entity()[entity]
                    )
            value += after.pop(goal, 0.0)
            probabilities = after
        return value


@cache
def relations_by_entity() -> Edges:
    """Return the graph: entity -> neighbor (in the order of the facts) -> relation."""
    edges: Edges = {}
    for line in FACTS.strip().splitlines():
        subject, relation, backwards, target = (part.strip() for part in line.split("|"))
        edges.setdefault(subject, {})[target] = relation
        edges.setdefault(target, {})[subject] = backwards
    return edges


@cache
def distances() -> dict[str, dict[str, int]]:
    """Return start -> goal -> length of the shortest path, by breadth-first search."""
    table = {}
    for start in relations_by_entity():
        steps, queue = {start: 0}, deque([start])
        while queue:
            entity = queue.popleft()
            for name in relations_by_entity()[entity]:
                if name not in steps:
                    steps[name] = steps[entity] + 1
                    queue.append(name)
        table[start] = steps
    return table


def facts_about(entity: str) -> str:
    """Return the part of the observation that states an entity and all facts about it."""
    facts = (
        f"{entity} {relation} {name}" for name, relation in relations_by_entity()[entity].items()
    )
    return f"You are at {entity}. {'; '.join(facts)}."
