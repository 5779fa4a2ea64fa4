"""Time, tokens, devices and energy of runs, against numbers worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.evaluation.records import RunRecord
from rlhf.export.energy import estimate_energy, training_cost
from rlhf.runs.machine import describe_gpus


def record(times: list[float], **keys: Any) -> RunRecord:
    metrics = [{"step": i, "time": time, "train/tokens": 100} for i, time in enumerate(times)]
    return RunRecord(directory=Path("run"), name="run", metrics=metrics, **keys)


def test_the_time_of_a_resumed_run_is_the_sum_over_its_processes():
    # 30 s until the last step before the interruption, then 12 s.
    assert training_cost(record([10.0, 30.0, 4.0, 12.0])).seconds == 42.0
    assert training_cost(record([])).seconds == 0.0


def test_tokens_of_offline_and_online_runs():
    assert training_cost(record([1.0, 2.0])).tokens == 200
    rows = [{"step": 1, "rollout/tokens": 12.5}, {"step": 2, "rollout/tokens": 7.5}]
    online = RunRecord(
        directory=Path("run"), name="run", metrics=rows, config={"episodes_per_step": 8}
    )
    assert training_cost(online).tokens == 160
    assert training_cost(RunRecord(directory=Path("run"), name="run")).tokens is None


def test_energy_is_time_times_recorded_power():
    gpu = {"name": "H200", "power_limit_watts": 700.0}
    machine = {"gpus": [gpu, gpu, gpu], "processes": 2, "processor": "CPU"}
    cost = training_cost(record([1800.0], environment=machine))
    assert (cost.device, cost.processes, cost.watts) == ("H200", 2, 1400.0)
    energy = estimate_energy([cost, cost], None)
    assert energy is not None
    assert energy.kilowatt_hours == pytest.approx(1.4)  # 2 runs x 0.5 h x 1.4 kW
    assert energy.is_recorded


def test_energy_of_an_unknown_power_is_not_estimated():
    cost = training_cost(record([3600.0], environment={"processor": "CPU"}))
    assert cost.device == "CPU"
    assert estimate_energy([cost], None) is None
    energy = estimate_energy([cost], 150.0)
    assert energy is not None
    assert energy.kilowatt_hours == pytest.approx(0.15)
    assert not energy.is_recorded
    assert estimate_energy([], 150.0) is None


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho '0, GPU-a, NVIDIA H200, 700.00'\necho '1, GPU-b, NVIDIA T4, [N/A]'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first = {"name": "NVIDIA H200", "power_limit_watts": 700.0}
    second = {"name": "NVIDIA T4", "power_limit_watts": None}
    assert describe_gpus() == [first, second]
    for visible, expected in {"1": [second], "GPU-a": [first], "": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert describe_gpus() == expected
    script.write_text("#!/bin/sh\necho broken\nexit 9\n")
    assert describe_gpus() == []
