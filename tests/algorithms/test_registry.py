"""Rows, their checks, and the messages a user sees."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rlhf.algorithms.components import registered_components
from rlhf.algorithms.registry import ALGORITHMS, algorithm_table, configured_algorithm
from rlhf.algorithms.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")


def needs_by_name() -> dict[str, set[str]]:
    """Name -> what the algorithm needs, from the table "name, paper, update, needs" of the page."""
    header = "| name | paper | update | needs |\n|-|-|-|-|\n"
    rows = PAGE.split(header)[1].split("\n\n")[0].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    return {first.strip("`"): set(last.split(", ")) for first, *_, last in cells}


def test_the_page_has_a_row_for_every_algorithm():
    assert list(needs_by_name()) == list(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_defaults_of_every_algorithm_pass_the_checks(name: str):
    assert configured_algorithm(name) == ALGORITHMS[name]


def test_components_read_settings_that_exist():
    names = {field.name for field in fields(Settings)}
    for component in [
        *registered_components("advantages").values(),
        *registered_components("losses").values(),
    ]:
        assert component.reads <= names


def test_every_setting_has_an_effect_somewhere():
    configured = [configured_algorithm(name) for name in ALGORITHMS] + [
        configured_algorithm("ppo", advantage="turn_gae"),
        configured_algorithm("ppo", num_epochs=2),
    ]
    everywhere = frozenset().union(*(row.settings_with_effect for row in configured))
    assert everywhere == {field.name for field in fields(Settings)}


def test_settings_are_replaced_and_the_row_is_not():
    row = configured_algorithm("grpo", kl_coef=0.3, num_epochs=3, clip_high=0.4)
    assert (row.settings.kl_coef, row.settings.clip_high, row.settings.clip_low) == (0.3, 0.4, 0.2)
    assert ALGORITHMS["grpo"].settings.kl_coef == 0.04


def test_every_algorithm_needs_what_the_page_says():
    needs = {
        name: {
            word
            for word, needed in {
                "critic": row.needs_critic,
                "reference": row.needs_reference,
                "groups": row.needs_groups,
                "costs": row.constrained,
            }.items()
            if needed
        }
        for name, row in ALGORITHMS.items()
    }
    assert needs == needs_by_name()
    assert configured_algorithm("grpo", advantage="gae").needs_critic
    assert not configured_algorithm("ppo", kl_placement="none").needs_reference


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("pppo", {}, "unknown algorithm 'pppo'; did you mean 'ppo'?"),
        ("ppo", {"kl_coeff": 1.0}, "unknown setting 'kl_coeff'; did you mean 'kl_coef'?"),
        ("ppo", {"aggregation": "mean"}, "aggregation must be 'token', 'sequence' or 'constant'"),
        ("ppo", {"lam": 1.5}, "lam must be <= 1, got 1.5"),
        ("ppo", {"num_epochs": 0}, "num_epochs must be >= 1, got 0"),
        ("ppo", {"dual_clip": 0.5}, "dual_clip must be above 1 .or 0 for off., got 0.5"),
        ("ppo", {"kl_coef": -1.0}, "kl_coef must be >= 0, got -1.0"),
        ("ppo", {"advantage": "leave_one_out"}, "group_size must be at least 2"),
        ("grpo", {"group_size": 1}, "group_size must be at least 2"),
        ("grpo", {"kl_estimator": "k1"}, "k1 with kl_placement loss has no effect"),
        ("ppo", {"scale_by_std": True}, "scale_by_std has no effect with ppo: advantage gae"),
        ("grpo", {"clip_low": 0.1}, "increase num_epochs or num_minibatches"),
        ("dapo", {"kl_coef": 0.1}, "kl_coef has no effect with dapo: kl_placement is none"),
        ("grpo", {"value_coef": 0.1}, "advantage group_relative has no critic"),
        ("grpo", {"value_clip": 0.1}, "advantage group_relative has no critic"),
        ("online_dpo", {"kl_estimator": "k2"}, "loss pairwise do not use this setting"),
        ("ppo", {"cost_limit": 0.1}, "no cost constraint; use ppo_lagrangian"),
        ("grpo", {"advantage": "best_and_worst"}, "require each other"),
        ("online_dpo", {"advantage": "leave_one_out"}, "require each other"),
        ("online_dpo", {"aggregation": "token"}, "aggregation has no effect with online_dpo"),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, overrides: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        configured_algorithm(name, **overrides)
    assert "\n" not in str(error.value)


def test_table_is_complete_and_lists_only_effective_defaults():
    rows = {row["name"]: row for row in algorithm_table()}
    assert list(rows) == list(ALGORITHMS)
    assert all(value for row in rows.values() for key, value in row.items() if key != "source")
    assert not any(row["source"] for row in rows.values())  # plug-ins have the file as source
    assert "clip_high 0.28" in rows["dapo"]["defaults"]
    assert "kl_coef" not in rows["dapo"]["defaults"]


def test_the_table_does_not_import_torch():
    code = "import sys; import rlhf.algorithms.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_tells_every_row_and_setting():
    for row in ALGORITHMS.values():
        assert f"| `{row.name}` | {row.paper} | {row.equation} |" in PAGE
    for name in [*registered_components("advantages"), *(field.name for field in fields(Settings))]:
        assert f"| `{name}` |" in PAGE
