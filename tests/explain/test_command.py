"""`rlhf explain` from configuration to files, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from tests.helpers.training import pair_rows, save_model, write_rows

TEXT = {"prompt": "Repeat: apple", "completion": "apple"}


@pytest.fixture
def files(tmp_path, helpers) -> dict[str, str]:
    """Models and data of the command."""
    return {
        "decoder": str(helpers["decoder"](tmp_path / "decoder")),
        "encoder": str(helpers["encoder"](tmp_path / "encoder", num_labels=2)),
        "base": str(save_model(tmp_path / "base")),
        "tuned": str(save_model(tmp_path / "tuned", seed=1)),
        "pairs": str(write_rows(tmp_path / "pairs.jsonl", pair_rows(8))),
        "texts": str(write_rows(tmp_path / "texts.jsonl", [TEXT] * 2)),
    }


def call(folder: Path, tree: dict, capsys, *flags: str) -> tuple[int, str, str]:
    (folder / "explain.yaml").write_text(yaml.safe_dump(tree))
    code = main(["explain", "--config", str(folder / "explain.yaml"), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_page_explains_reward_policy_and_stages(tmp_path, files, capsys):
    run = tmp_path / "run"
    tree = {
        "output_dir": str(run),
        "reward": files["decoder"],
        "pairs": [{"path": files["pairs"]}],
        "texts": [{"path": files["texts"]}],
        "train_pairs": [{"path": files["pairs"]}],
        "shown": 2,
        "faithfulness": {"pairs": 6, "draws": 2},
        "policy": {"model": {"path": files["tuned"]}, "reference": {"path": files["base"]}},
        "stage_models": [
            {"name": "base", "model": {"path": files["base"]}},
            {"name": "tuned", "model": {"path": files["tuned"]}},
        ],
    }
    code, out, err = call(tmp_path, tree, capsys)
    assert code == 0, err
    assert out.strip() == str(run / "explanation.html")
    content = json.loads((run / "explanation.json").read_text())
    assert len(content["reward"]["pairs"]) == len(content["reward"]["texts"]) == 2
    assert content["reward"]["faithfulness"][0]["pairs"] == 6
    assert content["reward"]["pairs"][0]["neighbors"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    scale = max(abs(content["reward"]["pairs"][0]["margin"]), content["reward"]["margin_std"])
    gap = sum(content["reward"]["pairs"][0][side]["gap"] for side in ("chosen", "rejected"))
    assert gap <= 0.01 * scale
    assert len(content["policy"]) == 4
    assert content["policy"][0]["advantages"] is not None  # both replies of a pair have a score
    assert content["stages"][0]["kl"]["mean"] > 0
    assert "base to tuned" in (run / "explanation.html").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["command"] == "explain"
    code, _, err = call(tmp_path, tree, capsys)
    assert code == 2
    assert "exists" in err
    assert call(tmp_path, tree, capsys, "--overwrite")[0] == 0


def test_a_text_classifier_is_explained(tmp_path, files, capsys):
    tree = {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"kind": "learned", "path": files["encoder"], "label": "LABEL_1"}],
        "texts": [{"path": files["texts"]}],
    }
    assert call(tmp_path, tree, capsys)[0] == 0
    content = json.loads((tmp_path / "run" / "explanation.json").read_text())
    assert content["reward"]["texts"][0]["tokens"][0] == "[CLS]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "give pairs or texts"),
        ({"reward": None}, "give a reward, a policy, or stage_models"),
        ({"rewards": [{"kind": "length"}]}, "either --reward FOLDER or --rewards"),
        ({"reward": None, "rewards": [{"kind": "length"}]}, "attribution.methods to [shapley]"),
        ({"attribution": {"methods": ["shapley", "gradient_x_input"]}}, "cannot be combined"),
        ({"stage_models": [{"name": "a", "model": {"path": "m"}}]}, "at least two stages"),
        ({"attribution": {"methods": []}}, "attribution.methods is empty"),
        ({"attribution": {"methods": ["lime"]}}, "attribution.methods.0 must be"),
        ({"attribution": {"tolerance": 0}}, "attribution.tolerance must be"),
        ({"reward": "nowhere"}, "no model at nowhere"),
        ({"pairs": [{"path": "missing.jsonl"}]}, "missing.jsonl"),
    ],
)
def test_a_mistake_is_one_line(change, message, tmp_path, files, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"output_dir": "run", "reward": files["decoder"], "pairs": [{"path": files["pairs"]}]}
    tree = {key: value for key, value in {**tree, **change}.items() if value is not None}
    code, _, err = call(tmp_path, tree, capsys)
    assert code == 2
    assert "Traceback" not in err
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "run" / "explanation.html").exists()
