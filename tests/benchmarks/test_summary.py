import pytest

from benchmarks.summary import TimedStep, has_enough_rounds, speed_ratios, summarize


def step(seconds: float, *, others: float | None = 0.0, work: float = 12.0) -> TimedStep:
    return TimedStep(seconds, work, others, peak_gib=seconds)


ROUNDS = [
    {"ours": step(1.0), "trl": step(3.0)},
    {"ours": step(2.0), "trl": step(4.0)},
    {"ours": step(9.0, others=0.5), "trl": step(4.0)},
    {"ours": step(4.0), "trl": step(12.0)},
]


def test_disturbed_steps_are_counted_and_left_out_of_the_median():
    summary = summarize([r["ours"] for r in ROUNDS], max_other_cores=0.2)
    assert summary["seconds"] == 2.0
    assert summary["rate"] == 6.0
    assert (summary["kept"], summary["dropped"]) == (3, 1)
    assert summary["peak_gib"] == 9.0  # memory is memory, disturbed or not


def test_ratio_of_medians_and_quartiles_of_undisturbed_pairs():
    ratio = speed_ratios(ROUNDS, max_other_cores=0.2)["trl"]
    # Rates of ours 12, 6, 3 and of TRL 4, 3, 1; within pairs 3, 2, 3.
    assert ratio["speed"] == 2.0
    assert ratio["quartiles"] == [2.5, 3.0]
    assert ratio["pairs"] == 3
    assert ratio["memory"] == pytest.approx(4 / 12)


def test_unknown_load_counts_as_quiet():
    assert not step(1.0, others=None).is_disturbed(0.2)


def test_a_machine_that_is_never_quiet_ends_the_measurement():
    noisy = [{"ours": step(1.0, others=1.0)}] * 5
    assert not has_enough_rounds(noisy, 3, max_other_cores=0.2)
    assert has_enough_rounds([*noisy, *noisy[:1]], 3, max_other_cores=0.2)
    assert has_enough_rounds(ROUNDS[:2], 2, max_other_cores=0.2)
    assert summarize([r["ours"] for r in noisy], max_other_cores=0.2)["kept"] == 0
