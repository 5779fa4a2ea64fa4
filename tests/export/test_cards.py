"""Cards load, survive a round trip, hold no local path, and state only recorded numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from rlhf.cli.table import run_command
from rlhf.config.reward import MODEL_KINDS
from rlhf.errors import UserError
from rlhf.export.reward_meaning import MEANINGS
from rlhf.reward_models import build
from tests.export.conftest import Runs, export, short
from tests.helpers.reward_runs import REWARD_RUNS
from tests.helpers.training import (
    offline_tree,
    online_tree,
    pair_rows,
    save_model,
    sft_rows,
    write_rows,
)

NAMES = ["sft", "lora", "chain", "merged", "ppo", "reward"]
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")


def model_card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("name", NAMES)
def test_cards_load_and_survive_a_round_trip(name: str, exports: dict[str, Path], tmp_path: Path):
    for file, card_class, data_class in (
        ("README.md", ModelCard, ModelCardData),
        ("DATA_CARD.md", DatasetCard, DatasetCardData),
    ):
        path = exports[name] / file
        card = card_class.load(path)
        again = data_class(**card.data.to_dict())
        assert again.to_dict() == card.data.to_dict()
        assert again.to_yaml() == card.data.to_yaml()
        card.save(tmp_path / file)
        assert (tmp_path / file).read_bytes() == path.read_bytes()


def test_the_metadata_are_those_of_the_run(runs: Runs, exports: dict[str, Path]):
    data = model_card(exports["ppo"]).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["rlhf", "sft", "dpo", "ppo"]
    assert data.get("base_model") is None  # a local model
    summary = json.loads((runs.ppo / "evaluation/ppo/summary.json").read_text())
    values = {result.metric_type: result for result in data.eval_results}
    for metric, estimate in summary["metrics"].items():
        assert values[metric].metric_value == estimate["mean"]
        if estimate["low"] is not None:
            interval = [estimate["low"], estimate["high"]]
            assert values[metric].metric_args["interval_95"] == interval
    assert model_card(exports["reward"]).data.pipeline_tag == "text-classification"
    assert "reward-model" in model_card(exports["reward"]).data.tags


@pytest.mark.parametrize("name", NAMES)
def test_cards_hold_no_local_path(name: str, exports: dict[str, Path]):
    for file in ("README.md", "DATA_CARD.md"):
        text = (exports[name] / file).read_text()
        for private in ("secret-folder", "spaces", "pytest-", "/tmp", str(Path.home())):
            assert private not in text
        assert not re.search(r"(?<![\w/:<.])/\w+/", text)


def numbers_of_files(directories: list[Path]) -> set[float]:
    """All numbers in the files of runs, including those in texts."""
    texts = []
    for directory in directories:
        names = ("config.yaml", "environment.json", "metrics.jsonl", "data_counts.json")
        texts += [(directory / name).read_text() for name in names if (directory / name).exists()]
        texts += [path.read_text() for path in directory.glob("evaluation/*/summary.json")]
        texts += [path.read_text() for path in directory.glob("final/*.json")]
    return {
        float(number)
        for text in texts
        for number in re.findall(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", text)
    }


def numbers_of_card(text: str) -> Iterator[tuple[str, float, int]]:
    """Numbers of a card as text, value and number of decimals, without code and digests."""
    body = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)
    body = body.replace("95%", "").replace("interval_95", "")
    for match in NUMBER.finditer(body):
        number = match.group()
        mantissa = number.partition("e")[0]
        yield number, float(number.replace(",", "")), len(mantissa.partition(".")[2])


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_card_is_in_the_files_of_its_runs(
    name: str, runs: Runs, exports: dict[str, Path]
):
    chain = {"sft": 1, "reward": 1, "lora": 2, "chain": 3, "merged": 3, "ppo": 4}[name]
    order = {"merged": [runs.sft, runs.lora, runs.merged], "reward": [runs.reward]}
    used = order.get(name, [runs.sft, runs.lora, runs.chain, runs.ppo][:chain])
    recorded = numbers_of_files(used)
    allowed = {float(weights_of(exports[name]))}
    for directory in used:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
        allowed.add(sum(row.get("train/tokens", 0) for row in rows))
        config = yaml.safe_load((directory / "config.yaml").read_text())
        if "episodes_per_step" in config:
            sampled = sum(row["rollout/tokens"] for row in rows) * config["episodes_per_step"]
            allowed.add(round(sampled))
    for file in ("README.md", "DATA_CARD.md"):
        for text, value, decimals in numbers_of_card((exports[name] / file).read_text()):
            found = any(abs(value - r) <= 0.51 * 10**-decimals for r in recorded | allowed)
            assert found, (file, text)


def weights_of(folder: Path) -> int:
    from tests.helpers.training import tensors_of

    return sum(tensor.numel() for tensor in tensors_of(folder).values())


def test_the_chain_of_runs_and_the_rewards_are_stated(exports: dict[str, Path]):
    text = (exports["ppo"] / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    stages = [row for row in rows if "`" not in row and "rlhf " in row]
    assert [row.split(" | ")[0] for row in stages[:4]] == ["| sft", "| lora", "| chain", "| ppo"]
    assert any("the local model base-model" in row for row in stages)
    assert any("learned" in row and "weight: 0.5" in row and "path: reward" in row for row in rows)
    assert "text/Echo-v0" in text
    data = (exports["ppo"] / "DATA_CARD.md").read_text()
    assert "answers.jsonl" in data
    assert "pairs.jsonl" in data
    assert "trained on: " in data


def test_a_changed_earlier_run_is_not_part_of_the_chain(runs: Runs, tmp_path: Path):
    import shutil

    for name in ("sft", "lora"):
        shutil.copytree(getattr(runs, name), tmp_path / name)
    config = yaml.safe_load((tmp_path / "lora/config.yaml").read_text())
    config["model"]["path"] = str(tmp_path / "sft/final")
    (tmp_path / "lora/config.yaml").write_text(yaml.safe_dump(config))
    folder = export(tmp_path / "lora", tmp_path / "a")
    assert "rlhf sft" in (folder / "README.md").read_text()
    (tmp_path / "sft/final/config.json").write_text("{}")
    folder = export(tmp_path / "lora", tmp_path / "b")
    text = (folder / "README.md").read_text()
    assert "rlhf sft" not in text
    assert "the local model sft" in text


def test_further_evaluations_are_added(runs: Runs, tmp_path: Path):
    summary = {
        "env": "my-test",
        "metrics": {"return": {"mean": 0.25, "low": 0.125, "high": 0.375, "n": 77}},
    }
    folder = tmp_path / "evaluation" / "ppo"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    text = (export(runs.sft, tmp_path / "a", evaluations=[str(folder)]) / "README.md").read_text()
    assert "| my-test | return | 0.250 | [0.125, 0.375] | 77 |" in text
    with pytest.raises(UserError, match=r"no summary\.json with metrics"):
        export(runs.sft, tmp_path / "b", evaluations=[str(tmp_path)])


def test_languages_are_in_the_keys_that_the_hub_accepts(runs: Runs, tmp_path: Path):
    folder = export(runs.sft, tmp_path / "a", language=["pt-BR", "en"])
    for card in (model_card(folder), DatasetCard.load(folder / "DATA_CARD.md")):
        assert card.data.get("language") == ["pt", "en"]
        assert card.data.get("language_bcp47") == ["pt-BR"]


def test_the_energy_is_stated_with_its_assumption(
    runs: Runs, exports: dict[str, Path], tmp_path: Path
):
    assert "Energy: not estimated" in (exports["sft"] / "README.md").read_text()
    text = (export(runs.sft, tmp_path / "a", power_watts=250.0) / "README.md").read_text()
    assert "an assumed power of 250 W" in text


def test_hostile_text_stays_text(tmp_path: Path):
    """Texts of a configuration that imitate metadata, HTML, tables and code blocks."""
    evil = "---\nlicense: stolen\n---\n<script>alert(1)</script> | a |\n```\n# heading"
    base = save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows | <b>π.jsonl", sft_rows(16))
    tree = short(offline_tree(tmp_path / "run---x", base, rows))
    run_command("sft", tree)
    record = tmp_path / "run---x" / "config.yaml"
    config = yaml.safe_load(record.read_text())
    config["data"][0]["system"] = evil
    record.write_text(yaml.safe_dump(config))
    folder = export(tmp_path / "run---x", tmp_path / "π <i>", language=["en"])
    card = model_card(folder)
    assert card.data.get("license") is None
    assert card.data.get("language") == ["en"]
    outside = re.sub(r"(`{3,})yaml\n.*?\n\1", "", card.text, flags=re.DOTALL)
    data = DatasetCard.load(folder / "DATA_CARD.md")
    for text in (outside, data.text):
        assert "<script>" not in text.replace("\\<script>", "")
        assert not re.search(r"^# heading", text, flags=re.MULTILINE)
    assert data.data.get("license") is None
    assert "π.jsonl" in data.text


def test_every_kind_of_reward_model_has_a_meaning():
    assert MEANINGS.keys() == MODEL_KINDS.keys()


@pytest.mark.parametrize("name", REWARD_RUNS)
def test_the_card_of_a_reward_model_states_what_it_measures(
    name: str, tmp_path: Path, echo_model, monkeypatch: pytest.MonkeyPatch, capsys
):
    settings, rows = REWARD_RUNS[name]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    tree = short(offline_tree(tmp_path / "run", echo_model, data, kind=name))
    tree["trainer"]["max_steps"] = 1
    run_command("reward", tree | settings)
    folder = export(tmp_path / "run", tmp_path / "export")
    text = (folder / "README.md").read_text()
    kind = settings.get("kind", name)
    assert MEANINGS[kind].split(". ")[0] in text
    for label in settings.get("labels", []):
        assert f"`{label}`" in text
    if name == "heads":
        assert "ensemble" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    (score,) = json.loads(capsys.readouterr().out)
    assert isinstance(score, float)
    data_type = model_card(folder).data.pipeline_tag
    assert data_type == ("token-classification" if name == "process" else "text-classification")
    assert model_card(folder).data.eval_results


def test_online_runs_with_prompts_state_them(tmp_path: Path, echo_model):
    prompts = write_rows(tmp_path / "prompts.jsonl", sft_rows(16))
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)
    tree["env"] = {"prompts": [{"path": str(prompts)}]}
    run_command("grpo", tree | {"algorithm": {"group_size": 4}})
    folder = export(tmp_path / "run", tmp_path / "export")
    data = (folder / "DATA_CARD.md").read_text()
    assert "| prompts.jsonl | training prompts |" in data
    assert "16 of 16 rows were used" in data
    assert "Group relative policy optimization" in (folder / "README.md").read_text()


def test_the_record_of_an_old_run_is_read(tmp_path: Path):
    golden = Path(__file__).parents[1] / "golden" / "run-0.1.0"
    folder = export(golden, tmp_path / "export")
    text = (folder / "README.md").read_text()
    assert "rlhf ppo" in text
    assert "AMD EPYC" in text


def test_the_card_of_a_checkpoint_ends_at_its_step(tmp_path: Path, echo_model):
    """Later metrics, and the evaluation of the final model, say nothing about a checkpoint."""
    run_command("ppo", online_tree(tmp_path / "first", echo_model, num_steps=3))
    recorded = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").open()]
    means = {row["step"]: row["rollout/tokens"] for row in recorded if "rollout/tokens" in row}
    early, whole = (round(8 * sum(means[step] for step in range(1, n + 1))) for n in (2, 3))
    assert 0 < early < whole
    checkpoint = tmp_path / "first/checkpoints/step-2"
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(24))
    run_command("dpo", short(offline_tree(tmp_path / "second", checkpoint, rows)))
    for source in (checkpoint, tmp_path / "second"):
        folder = export(source, tmp_path / "exports" / source.name)
        text = (folder / "README.md").read_text()
        assert re.search(r"\| first \| rlhf ppo \|.*\| 2 \|\n", text)
        assert f"| {early:,} | 1 |" in text
        assert f"| {whole:,} | 1 |" not in text
        assert "(step 3)" not in text
        assert not model_card(folder).data.eval_results
        assert ("This checkpoint was not evaluated." in text) == (source == checkpoint)
    folder = export(tmp_path / "first", tmp_path / "exports" / "first")
    assert f"| {whole:,} | 1 |" in (folder / "README.md").read_text()
    assert model_card(folder).data.eval_results


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_reward_checkpoint_without_its_encoding_is_refused(
    engine: str, tmp_path: Path, echo_model
):
    """Its scores would be those of texts in another form, without EOS."""
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(24))
    run_command("reward", short(offline_tree(tmp_path / "run", echo_model, rows, engine=engine)))
    (checkpoint, *_) = (tmp_path / "run/checkpoints").glob("*-2")
    with pytest.raises(UserError, match=r"without reward_model\.json.*: export the final model"):
        export(checkpoint, tmp_path / "export")
    with pytest.raises(UserError, match=r"without reward_model\.json.*: use the final model"):
        build({"kind": "trained", "path": str(checkpoint)})
    assert not (tmp_path / "export").exists()


def test_a_configuration_file_beside_a_model_is_not_its_run(tmp_path: Path):
    """The working directory of a user often has a config.yaml and a folder of models."""
    base = save_model(tmp_path / "models" / "base")
    rows = write_rows(tmp_path / "rows.jsonl", sft_rows(16))
    tree = short(offline_tree(tmp_path / "runs" / "sft", base, rows))
    for folder in (tmp_path, tmp_path / "models"):
        (folder / "config.yaml").write_text(yaml.safe_dump({"command": "ppo"} | tree))
    run_command("sft", tree)
    texts = [
        (export(source, tmp_path / "exports" / source.name) / "README.md").read_text()
        for source in (base, tmp_path / "runs" / "sft")
    ]
    assert "no record of a training run" in texts[0]
    assert "the local model base" in texts[1]
    assert "rlhf ppo" not in texts[1]
