"""The model card (README.md) of an export, filled from the files of its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rlhf.common.files import read_json
from rlhf.common.languages import language_metadata
from rlhf.common.numbers import is_number
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.config.export import ExportConfig
from rlhf.evaluation.records import Evaluation
from rlhf.export.cards.data_card import DATA_CARD_FILE, hub_datasets
from rlhf.export.cards.results import (
    Result,
    evaluation_notes,
    held_out_table,
    hub_eval_results,
    results_of,
    results_table,
)
from rlhf.export.cards.training import (
    configuration_block,
    cost_section,
    method_section,
    rewards_section,
    stages_table,
)
from rlhf.export.energy import estimate_energy, training_cost
from rlhf.export.public_text import without_paths_and_secrets
from rlhf.export.reward_meaning import encoding_and_calibration_facts, reward_meaning
from rlhf.export.source import ModelSource
from rlhf.export.weights import (
    count_parameters_and_dtypes,
    is_causal_model,
    model_class_name,
)
from rlhf.models.hub import SHORT_NAMES
from rlhf.reports.sections import run_warnings

MODEL_CARD_FILE = "README.md"


@dataclass(frozen=True)
class CardContent:
    """The content of a model card."""

    name: str
    """Name of the model."""
    source: ModelSource
    folder: Path
    """Folder of the exported model."""
    evaluations: Sequence[Evaluation]
    """Evaluations of the last run, and those that the configuration adds."""
    config: ExportConfig

    @property
    def results(self) -> list[Result]:
        """All metrics of the evaluations."""
        return results_of(self.evaluations)

    @property
    def is_causal(self) -> bool:
        """Whether the model is a language model and not a reward model."""
        return is_causal_model(self.folder)

    @property
    def task(self) -> str:
        """Task of the model on the Hub."""
        if self.is_causal:
            return "text-generation"
        steps = model_class_name(self.folder).endswith("ForTokenClassification")
        return "token-classification" if steps else "text-classification"


def make_model_card(content: CardContent) -> ModelCard:
    """Return the model card. Local paths are removed from its texts."""
    body = "\n\n".join(
        text
        for text in (
            f"# {escape_markdown(content.name)}",
            _introduction(content),
            _section("Use", _loading_code(content)),
            _section("What the outputs measure", _output_meaning(content)),
            _section("Training", _training_section(content)),
            _section("Results", _results_section(content)),
            _section("Limits", _limits_list(content)),
            _section("Environmental cost", _cost_section(content)),
            _section("Software", _software_table(content)),
            _section("Configurations", _configuration_blocks(content)),
        )
        if text
    )
    return ModelCard(f"---\n{metadata(content).to_yaml()}\n---\n\n{body}\n")


def metadata(content: CardContent) -> ModelCardData:
    """Return the metadata of the model card."""
    source, config = content.source, content.config
    commands = [stage.command for stage in source.stages if stage.command]
    results = hub_eval_results(content.results, content.task)
    datasets = hub_datasets(source.stages)
    license_name = config.license or license_of_hub_model(source.base_hub_id)
    more: dict[str, Any] = language_metadata(config.language)
    if source.base_hub_id:
        more["base_model_relation"] = "finetune"
    return ModelCardData(
        license=license_name,
        library_name="transformers",
        pipeline_tag=content.task,
        base_model=source.base_hub_id,
        datasets=datasets or None,
        model_name=content.name if results else None,
        eval_results=results or None,
        tags=["rlhf", *dict.fromkeys(commands), *([] if content.is_causal else ["reward-model"])],
        **more,
    )


def license_of_hub_model(hub_id: str | None) -> str | None:
    """Return the license of a model on the Hub in the Hub's notation, or None if it is unknown."""
    known = [entry.license for entry in SHORT_NAMES.values() if entry.hub == hub_id]
    return known[0].lower() if known else None


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _introduction(content: CardContent) -> str:
    source = content.source
    kind = "language model" if content.is_causal else "reward model"
    count, dtypes = count_parameters_and_dtypes(content.folder)
    origin = escape_markdown(without_paths_and_secrets(source.base_name))
    if source.base_hub_id:
        origin = f"[{origin}](https://huggingface.co/{source.base_hub_id})"
    trained = (
        "was trained with [rlhf](#software), from " + origin
        if source.stages
        else f"is based on {origin}; its training was not recorded"
    )
    merged = " The LoRA adapters are merged into the weights." if source.is_adapter else ""
    return (
        f"This {kind} (`{model_class_name(content.folder)}`, {count:,} weights, "
        f"{', '.join(dtypes)}) {trained}.{merged} Every number below is from the files of the "
        "training runs and evaluations or from the settings of the export, or is a sum or product "
        f"of such numbers. The data are described in the [data card]({DATA_CARD_FILE})."
    )


def _loading_code(content: CardContent) -> str:
    """Return code that loads the model."""
    name = content.config.push or content.name
    if not content.is_causal:
        auto = (
            f"AutoModelFor{'Token' if 'Token' in model_class_name(content.folder) else 'Sequence'}"
        )
        lines = [
            "from rlhf.reward_models import build",
            "",
            f"reward = build({json.dumps(_reward_spec(content, name), ensure_ascii=False)})",
            f"talk = {json.dumps(_scored_example(content))}",
            "print(reward([talk]))",
        ]
        note = (
            f"`{auto}Classification` of Transformers loads the same weights. `reward_model.json` "
            "states how texts are encoded."
        )
        if content.source.sidecar is None:
            note = f"`{auto}Classification` of Transformers loads the weights."
        return "```python\n" + "\n".join(lines) + f"\n```\n\n{note}"
    has_template = any(content.folder.glob("chat_template*"))
    folder = json.dumps(name, ensure_ascii=False)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        f"model = AutoModelForCausalLM.from_pretrained({folder})",
    ]
    if has_template:
        lines += [
            'talk = [{"role": "user", "content": "Hi"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    talk, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
        note = "Use the chat template: the model was trained with it."
    else:
        lines += ['inputs = tokenizer("Hi", return_tensors="pt")']
        note = "The tokenizer has no chat template: the model was trained on plain text."
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))',
    ]
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{note}"


def _reward_spec(content: CardContent, path: str) -> dict[str, Any]:
    """Return the specification of a reward with this model.

    If the model has several outputs, the score is their sum for regression, and otherwise the first
    output.
    """
    sidecar = content.source.sidecar
    config = read_json(content.folder / "config.json")
    outputs = list((config.get("id2label") or {}).values())
    if len(outputs) < 2 or (sidecar is not None and sidecar.kind != "learned"):
        return {"kind": "trained", "path": path}
    if config.get("problem_type") == "regression":
        return {"kind": "learned", "path": path, "attributes": dict.fromkeys(outputs, 1.0)}
    return {"kind": "learned", "path": path, "label": outputs[0]}


def _scored_example(content: CardContent) -> list[dict[str, str]]:
    """Return a conversation, for a pairwise model with the reply to compare with."""
    sidecar = content.source.sidecar
    is_pairwise = sidecar is not None and sidecar.kind == "pairwise"
    reference = {"answer": "Good day"} if is_pairwise else {}
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", **reference},
    ]


def _output_meaning(content: CardContent) -> str:
    """Return the meaning of the outputs of a reward model; "" for a language model."""
    if content.is_causal:
        return ""
    source = content.source
    run = source.last_run
    text = reward_meaning(run.config if run else {}, source.sidecar)
    labels = run.config.get("labels") if run else None
    if labels:
        names = ", ".join(f"`{escape_markdown(str(name))}`" for name in labels)
        text += f" The labels, in order, are {names}."
    if source.sidecar is None:
        return text
    facts = encoding_and_calibration_facts(source.sidecar)
    return f"{text}\n\n{markdown_table(['property', 'value'], facts)}"


def _training_section(content: CardContent) -> str:
    source = content.source
    if source.last_run is None:
        return "The folder has no record of a training run."
    parts = [
        stages_table(source.stages, source.base_name).rstrip(),
        f"### Algorithm\n\n{method_section(source.last_run)}",
    ]
    if rewards := rewards_section(source.last_run.config):
        parts.append(f"### Rewards\n\n{rewards.rstrip()}")
    return "\n\n".join(parts)


def _results_section(content: CardContent) -> str:
    source, parts = content.source, []
    if content.results:
        parts.append(
            "Means with 95% confidence intervals over independent units, such as prompts or "
            "episodes. The intervals do not contain the variation between training seeds."
        )
        parts.append(results_table(content.results).rstrip())
    elif source.last_run and source.last_run.checkpoint_step is not None:
        parts.append(
            "This checkpoint was not evaluated. Evaluations of the run after training are those of "
            "its final model."
        )
    else:
        parts.append("The run has no evaluation of the trained model.")
    if notes := evaluation_notes(content.evaluations):
        parts.append("\n".join(f"* {note}" for note in notes))
    if source.last_run and (table := held_out_table(source.last_run.record)):
        parts.append(f"Held-out metrics during training, without intervals:\n\n{table.rstrip()}")
    return "\n\n".join(parts)


def _limits_list(content: CardContent) -> str:
    """Return the limits of the model according to the records, as a Markdown list."""
    source = content.source
    lines = []
    for stage in source.stages:
        warnings = run_warnings(stage.record, with_false_alarm_rates=False)
        lines += [without_paths_and_secrets(warning) for warning in warnings]
        if not stage.record.finished:
            lines.append(f"{stage.name}: the run was not finished when the model was exported.")
    if source.last_run is not None:
        config = source.last_run.config
        rollout = config.get("rollout")
        if length := config.get("max_length"):
            lines.append(f"The training texts had at most {length} tokens.")
        if isinstance(rollout, dict) and (length := rollout.get("max_new_tokens")):
            lines.append(f"In training, a reply had at most {length} tokens.")
        if is_number(config.get("seed")):
            lines.append(f"The results are those of one training run, with seed {config['seed']}.")
    if not content.is_causal:
        lines.append(
            "Texts unlike the training data can have misleading scores, and a policy that is "
            "optimized against the scores can exploit their errors."
        )
    lines.append(
        "Safety, bias, factual accuracy and other abilities were evaluated only if the results "
        "above name them."
    )
    return "\n".join(f"* {escape_markdown(line)}" for line in lines)


def _cost_section(content: CardContent) -> str:
    stages = content.source.stages
    if not stages:
        return "The folder has no record of its training."
    costs = [training_cost(stage.record) for stage in stages]
    return cost_section(stages, costs, estimate_energy(costs, content.config.power_watts))


def _software_table(content: CardContent) -> str:
    """Return the versions of the software of the last run."""
    run = content.source.last_run
    machine = run.record.environment if run else {}
    versions = {"python": machine.get("python"), **(machine.get("versions") or {})}
    rows = [[name, str(version)] for name, version in versions.items() if version]
    if commit := machine.get("commit"):
        rows.append(["commit of rlhf-kit", str(commit)])
    return markdown_table(["package", "version"], rows).rstrip() if rows else "Not recorded."


def _configuration_blocks(content: CardContent) -> str:
    return "\n\n".join(configuration_block(stage) for stage in content.source.stages)
