"""Values of the decision tasks, each compared with an independent method."""

import itertools
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from rlhf.envs import knowledge_graph, program_synthesis, recommend, triage
from rlhf.envs.knowledge_graph import KnowledgeGraph
from rlhf.envs.program_synthesis import ProgramSynthesis
from rlhf.envs.recommend import Recommend
from rlhf.envs.support import Support
from rlhf.envs.toy_text import CliffWalking, FrozenLake, Taxi
from rlhf.envs.triage import Triage


def occupancy_program(env: Support, limit: float) -> float:
    """The constrained optimum as a linear program over occupancy measures of the belief tree."""
    optimize = pytest.importorskip("scipy.optimize")
    rules = env.rules
    nodes = [(p, f) for n in range(rules.turns) for p in range(n + 1) for f in [n - p]]
    choices = [(node, action) for node in nodes for action in ("verify", "disclose", "refuse")]

    def joint(node):
        good = rules.honest * rules.pass_honest ** node[0] * (1 - rules.pass_honest) ** node[1]
        bad = (1 - rules.honest) * rules.pass_impostor ** node[0]
        return good, bad * (1 - rules.pass_impostor) ** node[1]

    reward, cost = [], []
    for node, action in choices:
        good, bad = (part / sum(joint(node)) for part in joint(node))
        reward.append({"verify": -rules.verify_cost, "disclose": good, "refuse": 0.0}[action])
        cost.append(bad if action == "disclose" else 0.0)
    flow = np.zeros((len(nodes), len(choices)))
    source = np.array([float(node == (0, 0)) for node in nodes])
    for column, (node, action) in enumerate(choices):
        flow[nodes.index(node), column] += 1
        if action == "verify":
            for after in ((node[0] + 1, node[1]), (node[0], node[1] + 1)):
                if after in nodes:
                    chance = sum(joint(after)) / sum(joint(node))
                    flow[nodes.index(after), column] -= chance
    solution = optimize.linprog(
        c=[-r for r in reward], A_ub=[cost], b_ub=[limit], A_eq=flow, b_eq=source
    )
    return -solution.fun


@pytest.mark.parametrize("limit", [0.0, 0.03, 0.05, 0.15, 0.3, 1.0])
def test_support_optimum_by_linear_programming(limit):
    env = Support(limit)
    assert env.optimal_value() == pytest.approx(occupancy_program(env, limit), abs=1e-9)


def test_support_priced_values_obey_strong_duality():
    """Constrained optimum = best priced value at the start + price * limit."""
    for limit in (0.03, 0.05, 0.1):
        env = Support(limit)
        env.reset(seed=0)
        dual = max(env.action_values().values()) + env.cost_price() * limit
        assert env.optimal_value() == pytest.approx(dual)


def test_support_expert_keeps_to_the_cost_limit():
    env, cost, reward = Support(), [], []
    for seed in range(4000):
        env.reset(seed=seed)
        done, total, spent = False, 0.0, 0.0
        while not done:
            _, r, done, _, info = env.step(env.expert())
            total, spent = total + r, spent + info["cost"]
        cost.append(spent)
        reward.append(total)
    for sample, expected in ((cost, 0.05), (reward, env.optimal_value())):
        assert abs(np.mean(sample) - expected) < 4 * np.std(sample) / len(sample) ** 0.5


def test_support_expert_continues_after_a_check_that_its_plan_does_not_make():
    """Without a cost limit the plan discloses at once; then disclosing never loses reward."""
    env = Support(1.0)
    env.reset(seed=0)
    env.step("verify")
    assert env.expert() == "disclose"


def test_support_frontier_ends_are_obvious():
    corners = Support().frontier()
    assert corners[0] == (0.0, 0.0)
    assert corners[-1] == pytest.approx((0.3, 0.7))
    assert Support().reference_values()["unconstrained"] == pytest.approx(0.7)


def test_support_cost_is_paid_for_disclosing_to_an_impostor():
    env = Support(honest=0.0)
    env.reset(seed=0)
    _, reward, done, _, info = env.step("disclose")
    assert (reward, done, info["cost"], info["is_success"]) == (0.0, True, 1.0, False)


def test_recommend_by_exact_recursion_over_histories():
    chances = [[Fraction(str(c)) for c in kind] for kind in recommend.WATCH_PROBABILITIES]

    @cache
    def value(weights: tuple[Fraction, ...], left: int) -> Fraction:
        if left == 0:
            return Fraction(0)
        options = []
        for item in range(4):
            total = Fraction(0)
            for watched in (0, 1):
                after = tuple(
                    w * (kind[item] if watched else 1 - kind[item])
                    for w, kind in zip(weights, chances, strict=True)
                )
                chance = sum(after) / sum(weights)
                total += chance * watched
                if chance:
                    total += chance * value(tuple(w / sum(after) for w in after), left - 1)
            options.append(total)
        return max(options)

    expected = float(value((Fraction(1, 3),) * 3, 3))
    assert Recommend(3).optimal_value() == pytest.approx(expected)
    env = Recommend()
    references = env.reference_values()
    assert references["oracle"] == pytest.approx(5.4)
    assert env.random_value() == pytest.approx(2.4, abs=0.1)
    assert references["favorite"] < env.optimal_value() < references["oracle"]


def test_triage_by_enumerating_cases():
    """Search over sets of still possible (class, results) cases instead of posterior formulas."""
    cases = {}
    for truth in (1, -1):
        for results in itertools.product((1, -1), repeat=4):
            chance = 0.5
            for result, right in zip(results, triage.ACCURACIES, strict=True):
                chance *= right if result == truth else 1 - right
            cases[truth, results] = chance

    def value(possible: list, untaken: frozenset, cost: float) -> float:
        """Joint value: probabilities of `possible` are not normalized."""
        options = [sum(cases[c] for c in possible if c[0] == truth) for truth in (1, -1)]
        total = sum(cases[c] for c in possible)
        for test in untaken:
            parts = [[c for c in possible if c[1][test] == result] for result in (1, -1)]
            after = sum(value(part, untaken - {test}, cost) for part in parts)
            options.append(after - cost * total)
        return max(options)

    for cost in (0.0, 0.02, 0.04):
        expected = value(list(cases), frozenset(range(4)), cost)
        assert Triage(cost).optimal_value() == pytest.approx(expected)
    assert Triage(1.0).optimal_value() == 0.5


def test_program_synthesis_examples_identify_the_program():
    """At the default length, every program that fits the examples passes all tests of the pool."""
    for program in program_synthesis.all_programs(2):
        shown = program_synthesis.outputs_on(program, program_synthesis.VISIBLE_INPUTS)
        for other in program_synthesis.all_programs(2):
            if program_synthesis.outputs_on(other, program_synthesis.VISIBLE_INPUTS) == shown:
                pool = program_synthesis._test_inputs()
                assert program_synthesis.outputs_on(other, pool) == program_synthesis.outputs_on(
                    program, pool
                )
    assert ProgramSynthesis().optimal_value() == 1.0


def test_program_synthesis_operations_by_hand():
    assert program_synthesis.run_program(("sort", "double"), (3, -1, 2)) == (-2, 4, 6)
    assert program_synthesis.run_program(("positives", "sums"), (3, -1, 2)) == (3, 5)
    assert program_synthesis.run_program(("unique", "tail"), (3, 3, 2, 3)) == (2,)
    assert program_synthesis.run_program(("evens", "reverse", "negate"), (4, 1, 6)) == (-6, -4)
    assert program_synthesis.run_program(("square", "increment"), (-2, 0)) == (5, 1)


def test_program_synthesis_gives_feedback_and_ends_with_a_fitting_program():
    env = ProgramSynthesis()
    env._begin_episode(("sort", "double"), [0, 1, 2])
    text, reward, done, _, _ = env.step("sort")
    assert text.startswith("Wrong: [3 -1 4 4 -5 1] must become [-10 -2 2 6 8 8]")
    assert (reward, done) == (0.0, False)
    assert env.step("import os")[4]["valid"] is False
    _, reward, done, _, info = env.step("Sort | Double")
    assert (reward, done, info["is_success"]) == (1.0, True, True)


def test_knowledge_graph_distances_by_matrix_powers():
    names = list(knowledge_graph.relations_by_entity())
    step = np.array([[b in knowledge_graph.relations_by_entity()[a] for b in names] for a in names])
    assert (step == step.T).all()
    reached, walks = np.eye(len(names), dtype=bool), np.eye(len(names), dtype=int)
    expected = np.zeros((len(names), len(names)), dtype=int)
    for hops in range(1, len(names)):
        walks = walks @ step
        new = (walks > 0) & ~reached
        expected[new] = hops
        reached |= new
        walks = np.minimum(walks, 1)
    assert reached.all()
    for a, b in itertools.product(range(len(names)), repeat=2):
        assert knowledge_graph.distances()[names[a]][names[b]] == expected[a, b]
    assert KnowledgeGraph(2).optimal_value() == pytest.approx(1 - 2 * 0.05)
    assert len(KnowledgeGraph().pairs) == (expected == 3).sum()


def test_knowledge_graph_describes_facts_in_both_directions():
    assert "seine flows through paris" in knowledge_graph.facts_about("seine")
    assert "paris lies on the seine" in knowledge_graph.facts_about("paris")


def test_toy_text_values():
    assert FrozenLake().optimal_value() == pytest.approx(0.744, abs=5e-4)
    assert FrozenLake().random_value() == pytest.approx(0.014, abs=5e-4)
    assert FrozenLake(slippery=False).optimal_value() == 1.0
    assert CliffWalking().optimal_value() == pytest.approx(-13.0)
    assert Taxi().optimal_value() == pytest.approx(7.93)


def test_frozen_lake_values_by_simulating_gymnasiums_own_environment():
    """The expert of the text task plays gymnasium's own environment."""
    text, original = FrozenLake(), FrozenLakeEnv(is_slippery=True)
    returns = []
    for seed in range(300):
        text.reset(seed=seed)
        state, _ = original.reset(seed=seed)
        total = 0.0
        for turn in range(text.max_turns):
            text._state, text.turns_left = int(state), text.max_turns - turn
            action = ("left", "down", "right", "up").index(text.expert())
            state, reward, ended, _, _ = original.step(action)
            total += float(reward)
            if ended:
                break
        returns.append(total)
    assert abs(np.mean(returns) - text.optimal_value()) < 4 * np.std(returns) / 300**0.5


def test_taxi_is_described_by_its_own_decoder():
    env = Taxi()
    env.reset(seed=0)
    env._state = env._table.encode(4, 3, 2, 1)
    env.step("north")
    text = env.step("sing")[0]
    assert text.endswith(
        "The taxi is at row 4, column 4. The passenger is at yellow and wants to go to green. "
        "28 turns left."
    )
