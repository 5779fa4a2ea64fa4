"""The life of a model, as a matrix: from every start through every stage and engine, and back.

What was in memory at the end of a run is read again by plain transformers or PEFT, by our own
loader, and out of the last checkpoint. A run that starts from a LoRA result starts from its merged
weights, not from the base's. The table in docs/lifecycle.md is made from ``CELLS``.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS, run_command
from rlhf.commands.generate import GenerateConfig, generate
from rlhf.config.export import ExportConfig
from rlhf.config.model import LoraSpec, ModelSpec
from rlhf.errors import UserError
from rlhf.export import export_model
from rlhf.models.adapters import load_merged_model
from rlhf.models.architecture import unwrap_peft
from rlhf.models.loading import load_model, merge_adapter
from rlhf.models.trainable import WeightChangeDetector
from rlhf.pipeline import read_pipeline, run_pipeline
from rlhf.reward_models.implicit import ImplicitReward
from rlhf.training import checkpoint, offline
from tests.helpers.training import (
    evaluations,
    label_rows,
    metrics_of,
    offline_tree,
    online_tree,
    pair_rows,
    save_model,
    sft_rows,
    write_rows,
)

LORA = {"rank": 4, "alpha": 16}
STARTS = ("full", "lora", "lora on lora", "merged")
OFFLINE = {"sft": sft_rows, "reward": pair_rows, "dpo": pair_rows, "kto": label_rows}
ONLINE = ("ppo", "grpo")
READING = ("evaluate", "generate", "merge", "export", "pipeline")
IDS = torch.tensor([[5, 17, 80, 9, 30, 61], [7, 8, 9, 100, 11, 12]])
WORKS, ABSENT = "works", "does not exist"

NO_ADAPTER = "contains no LoRA adapter (no adapter_config.json)"
NOT_NATIVE = "engine: native supports only sft, dpo, and reward models of kind preference"


def state_of(start: str, stage: str, engine: str) -> str:
    """What a cell of the matrix is: it works, does not exist, or is refused with these words."""
    if engine == "trl" and stage in (*ONLINE, *READING):
        return ABSENT
    if stage == "merge" and start in ("full", "merged"):
        return NO_ADAPTER
    if stage == "kto" and engine == "native":
        return NOT_NATIVE
    return WORKS


CELLS = {
    (start, stage, engine): state_of(start, stage, engine)
    for start in STARTS
    for stage in (*OFFLINE, *ONLINE, *READING)
    for engine in ("native", "trl")
}
TRAINED = [
    cell for cell, state in CELLS.items() if state == WORKS and cell[1] in (*OFFLINE, *ONLINE)
]


def table() -> str:
    """The matrix as the documentation shows it, with the words of the refusals below."""
    names = {"full": "full", "lora": "LoRA", "lora on lora": "LoRA on LoRA", "merged": "merged"}
    refusals = sorted({state for state in CELLS.values() if state not in (WORKS, ABSENT)})
    lines = [
        "| stage | engine | " + " | ".join(names[start] for start in STARTS) + " |",
        "| --- | --- |" + " --- |" * len(STARTS),
    ]
    for stage in (*OFFLINE, *ONLINE, *READING):
        for engine in ("native", "trl"):
            states = [CELLS[start, stage, engine] for start in STARTS]
            if set(states) == {ABSENT}:
                continue
            words = [
                f"refused ({refusals.index(state) + 1})" if state in refusals else state
                for state in states
            ]
            by = "" if stage in READING else engine
            lines.append(f"| `{stage}` | {by} | " + " | ".join(words) + " |")
    notes = [f"{number}. refused with: `… {words} …`" for number, words in enumerate(refusals, 1)]
    absent = (
        "Online algorithms, evaluation, generation, merging, exports and pipelines have no engine, "
        "because they do not use TRL."
    )
    return "\n".join([*lines, "", *notes, "", absent])


def test_the_table_in_the_documentation_is_the_matrix() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "lifecycle.md"
    assert table() in page.read_text()


def plain(model: Any) -> Any:
    """A copy of a model that computes by transformers' own functions."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    unwrap_peft(model).set_attn_implementation("eager")
    return model.eval()


@torch.no_grad()
def output_of(model: Any) -> torch.Tensor:
    """What a model says of two rows: logits, of a classifier one score each."""
    if "score" in dict(unwrap_peft(model).named_children()):
        hidden = unwrap_peft(model).base_model(input_ids=IDS).last_hidden_state
        return unwrap_peft(model).score(hidden[:, -1])
    return model(input_ids=IDS).logits


@torch.no_grad()
def states_of(model: Any) -> torch.Tensor:
    """Last hidden states [2, 6, D], which a reward model shares with its start."""
    return unwrap_peft(model).base_model(input_ids=IDS).last_hidden_state


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-5 of the largest number."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@dataclass
class Life:
    """What a run held in memory, and where it left what."""

    folder: Path = Path()
    model: Any = None
    start: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """Hidden states before the first step."""
    output: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """Of the trained model, just before it was saved."""
    states: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def final(self) -> Path:
        return self.folder / "final"


def live(command: str, tree: dict[str, Any]) -> Life:
    """Train, and look at the model before its first step and before it is saved."""
    life = Life(Path(tree["output_dir"]))

    class Watched(WeightChangeDetector):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            life.model, life.start = model, states_of(plain(model))

    def before_saving(*folders: Path) -> None:
        trained = plain(life.model)
        life.output, life.states = output_of(trained), states_of(trained)
        copy_base_to_final(*folders)

    copy_base_to_final = offline.copy_base_to_final
    with pytest.MonkeyPatch.context() as patch:
        for module in ("trainer", "trl.trainer"):
            patch.setattr(f"rlhf.training.{module}.WeightChangeDetector", Watched)
        for module in (offline, checkpoint):
            patch.setattr(module, "copy_base_to_final", before_saving)
        run_command(command, tree)
    return life


def tree_of(folder: Path, command: str, engine: str, model: dict[str, Any]) -> dict[str, Any]:
    """A run of a few steps."""
    place = Path(model["path"])
    if command in ONLINE:
        rate = {"optimizer": {"learning_rate": 1e-2}, "num_steps": 2, "save_every": 2}
        algorithm = {"algorithm": {"group_size": 4}} if command == "grpo" else {}
        return online_tree(folder, place, **rate, **algorithm) | {"model": model}
    data = write_rows(folder.with_suffix(".jsonl"), OFFLINE[command](16))
    keys = {"engine": engine, "evaluations": 1, "trainer": {"max_steps": 3}}
    tree = offline_tree(folder, place, data, **keys)
    return tree | {"model": model}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose replies differ."""
    return save_model(tmp_path_factory.mktemp("base") / "model", sharp=6.0)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Life:
    """The result of SFT with adapters: what `lora on lora` and `merged` start from."""
    folder = tmp_path_factory.mktemp("first") / "sft"
    return live("sft", tree_of(folder, "sft", "native", {"path": str(base), "lora": LORA}))


def start_model(start: str, base: Path, first: Life) -> dict[str, Any]:
    """The key `model` of a start."""
    path = base if start in ("full", "lora") else first.final
    lora = {"lora": LORA} if start.startswith("lora") else {}
    return {"path": str(path), **lora}


def read_plainly(folder: Path, *, reward: bool) -> Any:
    """By transformers or PEFT alone."""
    if (folder / "adapter_config.json").exists():
        return plain(AutoPeftModelForCausalLM.from_pretrained(folder))
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model, missing = kind.from_pretrained(folder, output_loading_info=True)
    assert not missing["missing_keys"]
    return plain(model)


@pytest.mark.parametrize(("start", "command", "engine"), TRAINED)
def test_what_was_trained_is_what_is_loaded(
    tmp_path: Path, base: Path, first: Life, start: str, command: str, engine: str
) -> None:
    tree = tree_of(tmp_path / "run", command, engine, start_model(start, base, first))
    life = live(command, tree)
    reward, adapted = command == "reward", start.startswith("lora")

    origin = AutoModelForCausalLM.from_pretrained(base) if start in ("full", "lora") else None
    expected = first.states if origin is None else states_of(plain(origin))
    assert close(life.start, expected)
    assert metrics_of(life.folder)[-1]["train/moved"] > 0
    assert not close(life.states, expected)

    folders = {path.name for path in life.final.iterdir() if path.is_dir()}
    assert folders == ({"base"} if adapted else set())
    found = output_of(read_plainly(life.final, reward=reward))
    if reward and adapted:  # saved merged
        assert close(found, life.output)
    else:
        assert torch.equal(found, life.output)
    if not reward:
        ours, tokenizer = load_model(ModelSpec(path=str(life.final)), seed=0)
        assert close(output_of(plain(ours)), life.output)
        assert all(p.requires_grad for p in ours.parameters())
        assert tokenizer.chat_template
        assert (life.final / "generation_config.json").exists()
    (checkpoint, *_) = sorted((life.folder / "checkpoints").glob("*-[0-9]*"), reverse=True)
    if reward and adapted:
        assert (checkpoint / "adapter_model.safetensors").exists()
    else:
        opened = output_of(read_plainly(checkpoint, reward=reward))
        assert torch.equal(opened, life.output)


@pytest.mark.parametrize(
    "cell", [cell for cell, state in CELLS.items() if state not in (WORKS, ABSENT)]
)
def test_a_refused_cell_is_one_line(
    tmp_path: Path, base: Path, first: Life, cell: tuple[str, str, str]
) -> None:
    start, command, engine = cell

    def attempt() -> None:
        if command == "merge":
            folder = base if start == "full" else merge_adapter(str(first.final), tmp_path / "m")
            merge_adapter(str(folder), tmp_path / "target")
        else:
            run_command(
                command, tree_of(tmp_path / "run", command, engine, start_model(start, base, first))
            )

    with pytest.raises(UserError) as error:
        attempt()
    assert CELLS[cell] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, base: Path, first: Life) -> dict[str, Life]:
    """A result of every start."""
    found = {"lora": first}
    for start in ("full", "lora on lora", "merged"):
        folder = tmp_path_factory.mktemp("results") / start.replace(" ", "-")
        model = start_model(start, base, first)
        found[start] = live("dpo", tree_of(folder, "dpo", "native", model))
    return found


@pytest.mark.parametrize("start", STARTS)
def test_a_result_is_evaluated_generated_from_merged_and_exported(
    tmp_path: Path, results: dict[str, Life], start: str
) -> None:
    life = results[start]
    model = read_plainly(life.final, reward=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(life.final)
    rows = sft_rows(4)
    data = write_rows(tmp_path / "text.jsonl", rows)
    policy = {"name": "it", "model": {"path": str(life.final)}}
    tree = {"output_dir": str(tmp_path / "e"), "policies": [policy], "text": [{"path": str(data)}]}
    run_command("evaluate", tree)
    summary = json.loads((tmp_path / "e/evaluation/it/summary.json").read_text())
    loss = plain_loss(model, tokenizer, rows)
    assert summary["metrics"]["text_loss"]["mean"] == pytest.approx(loss, rel=1e-5)

    prompt = rows[0]["prompt"]
    config = GenerateConfig(
        model=ModelSpec(path=str(life.final)), prompt=prompt[0]["content"], decoding="greedy"
    )
    (reply,) = generate(config)
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64
        )
    expected = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected.startswith(reply)
    assert reply or not expected

    if CELLS[start, "merge", "native"] == WORKS:
        merged = merge_adapter(str(life.final), tmp_path / "merged")
        assert close(output_of(read_plainly(merged, reward=False)), life.output)
        assert (merged / "generation_config.json").exists()

    exported = export_model(ExportConfig(str(life.folder), str(tmp_path / "export"))).folder
    found = output_of(read_plainly(exported, reward=False))
    adapted = start.startswith("lora")
    assert close(found, life.output) if adapted else torch.equal(found, life.output)


@torch.no_grad()
def plain_loss(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    """Mean negative log-likelihood of the completions' tokens, stop token included."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        reply = tokenizer(row["completion"][0]["content"])["input_ids"]
        ids = torch.tensor([[*prompt, *reply, tokenizer.eos_token_id]])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total - chosen.sum().item(), count + len(chosen)
    return total / count


def test_a_chained_run_starts_at_the_loss_where_the_first_one_ended(
    tmp_path: Path, base: Path, first: Life
) -> None:
    for start in ("lora on lora", "merged"):
        folder = tmp_path / start.replace(" ", "-")
        live("sft", tree_of(folder, "sft", "native", start_model(start, base, first)))
        before, after = evaluations(first.folder), evaluations(folder)
        assert after[0] == pytest.approx(min(before.values()), rel=1e-5)
        assert abs(after[0] - before[0]) > 1e-3
        assert max(after) == 3
        assert after[3] < after[0]


def test_a_moved_result_needs_nothing_that_it_left_behind(
    tmp_path: Path, base: Path, first: Life
) -> None:
    """The runs are moved to another folder, and everything at the old place is gone."""
    here = tmp_path / "here"
    shutil.copytree(base, here / "base")
    model = {"path": str(here / "base"), "lora": LORA}
    live("sft", tree_of(here / "sft", "sft", "native", model))
    chain = {"path": str(here / "sft/final"), "lora": LORA}
    life = live("dpo", tree_of(here / "dpo", "dpo", "native", chain))
    shutil.move(here / "dpo", tmp_path / "there")
    shutil.rmtree(here)
    final = tmp_path / "there/final"
    ours, _ = load_model(ModelSpec(path=str(final)), seed=0)
    assert close(output_of(plain(ours)), life.output)
    under = AutoModelForCausalLM.from_pretrained(final / "base")
    assert torch.equal(output_of(plain(PeftModel.from_pretrained(under, final))), life.output)
    reward = ImplicitReward.load(final, final / "base")
    assert close(output_of(plain(reward.policy)), life.output)
    checkpoint = max((tmp_path / "there/checkpoints").glob("step-*"))
    assert close(output_of(plain(load_merged_model(str(checkpoint)))), life.output)


@pytest.mark.parametrize("start", STARTS)
def test_a_pipeline_takes_every_start_through_its_stages(
    tmp_path: Path, base: Path, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"lora": LORA}
    first_lora = {} if start == "full" else lora
    second_lora = lora if start == "lora on lora" else {}
    stages = [
        stage_of(tmp_path, "sft", {"path": str(base), **first_lora}),
        stage_of(tmp_path, "dpo", {"path": "stage:sft", **second_lora}),
    ]
    if start == "lora on lora":
        stages.append(stage_of(tmp_path, "reward", {"path": "stage:sft", **lora}))
        ppo = stage_of(tmp_path, "ppo", {"path": "stage:dpo", **lora})
        stages.append(ppo | {"rewards": [{"kind": "learned", "path": "stage:reward"}]})
    tree = {"output_dir": str(tmp_path / "out"), "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(tree))
    assert main(["run", str(tmp_path / "pipeline.yaml"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "stage:sft; planned with the initial model" in told
    assert " (0 trained)" not in told
    assert not (tmp_path / "out").exists()
    run_pipeline(read_pipeline([tmp_path / "pipeline.yaml"], [], COMMANDS), COMMANDS)
    sft, dpo = (states_of(merged(tmp_path / "out" / name / "final")) for name in ("sft", "dpo"))
    assert not close(dpo, sft)
    assert evaluations(tmp_path / "out/dpo")[0] == pytest.approx(math.log(2), abs=1e-6)


def merged(folder: Path) -> Any:
    """By our loader."""
    return plain(load_model(ModelSpec(path=str(folder)), seed=0)[0])


def stage_of(folder: Path, command: str, model: dict[str, Any]) -> dict[str, Any]:
    """A stage of a pipeline, named after its command."""
    tree = tree_of(folder / command, command, "native", {"path": "unused"})
    del tree["output_dir"]
    return tree | {"name": command, "command": command, "model": model}


FORMS = {
    "target modules": {"target_modules": ["q_proj", "down_proj"]},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "modules to save": {"modules_to_save": ["norm"]},
    "all of them": {
        "target_modules": ["v_proj"],
        "use_dora": True,
        "use_rslora": True,
        "modules_to_save": ["mlp"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_every_form_survive_saving_and_chaining(
    tmp_path: Path, base: Path, form: str
) -> None:
    lora = LORA | FORMS[form]
    tree = tree_of(tmp_path / "sft", "sft", "native", {"path": str(base), "lora": lora})
    life = live("sft", tree)
    names = [n for n, p in life.model.named_parameters() if p.requires_grad]
    if targets := lora.get("target_modules"):
        adapted = {n.split(".lora_")[0].rpartition(".")[2] for n in names if "lora_" in n}
        assert adapted == set(targets)
    assert any("magnitude" in n for n in names) == bool(lora.get("use_dora"))
    assert any("modules_to_save" in n for n in names) == ("modules_to_save" in lora)
    assert torch.equal(output_of(read_plainly(life.final, reward=False)), life.output)
    again = {"path": str(life.final), "lora": lora}
    second = live("ppo", tree_of(tmp_path / "ppo", "ppo", "native", again))
    assert close(second.start, life.states)
    assert metrics_of(second.folder)[0]["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(output_of(read_plainly(second.final, reward=False)), second.output)
    assert close(output_of(merged(second.final)), second.output)


def test_rs_lora_scales_by_the_root_of_the_rank(base: Path) -> None:
    for use, scale in ((False, 16 / 4), (True, 16 / 2)):
        spec = LoraSpec(rank=4, alpha=16, use_rslora=use)
        model, _ = load_model(ModelSpec(path=str(base), lora=spec), seed=0)
        layer = unwrap_peft(model).model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(scale)
