"""Sections of a model card on training: stages, algorithm, rewards, cost and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.numbers import decimal_text, is_number
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.common.yaml_text import dump_yaml
from rlhf.export.energy import EnergyEstimate, TrainingCost
from rlhf.export.source import Stage
from rlhf.reports.markup import esc

_OFFLINE_METHODS = {
    "sft": "Supervised fine-tuning: cross-entropy on the completions.",
    "dpo": "Direct preference optimization on preference pairs.",
    "kto": "KTO on replies with binary labels.",
    "reward": "Training of a reward model.",
}
"""Command -> description of its training method."""
_REWARD_KEY_ORDER = ("kind", "name", "weight", "path", "model", "pattern", "threshold", "clip")
"""Keys of a reward in the order in which a card shows them; other keys follow."""
_HIDDEN_KEYS = frozenset({"data_cache", "data_processes", "track", "alarms", "profile"})
"""Keys of a configuration that do not determine the model."""


def stages_table(stages: Sequence[Stage], base_name: str) -> str:
    """Return a Markdown table of the runs that trained the model, in order."""
    origins = [base_name, *(f"the result of {stage.name}" for stage in stages)]
    rows = [
        [stage.name, f"rlhf {stage.command}", origin, _data_text(stage.config), _steps_text(stage)]
        for stage, origin in zip(stages, origins, strict=False)
    ]
    return markdown_table(["run", "command", "started from", "data or environment", "steps"], rows)


def _data_text(config: Mapping[str, Any]) -> str:
    """Return the names of the datasets or of the environment of a run."""
    env = config.get("env") if isinstance(config.get("env"), Mapping) else {}
    if env and env.get("id"):
        return str(env["id"])
    sources = (env or {}).get("prompts") or config.get("data") or []
    names = [str(source.get("path")) for source in sources if isinstance(source, Mapping)]
    return ", ".join(names) or "not recorded"


def _steps_text(stage: Stage) -> str:
    steps = [row["step"] for row in stage.record.metrics if is_number(row.get("step"))]
    return f"{max(steps):,.0f}" if steps else "not recorded"


def method_section(stage: Stage) -> str:
    """Return a paragraph on the algorithm of a run, and its settings as YAML."""
    command, config = stage.command, stage.config
    if command in ALGORITHMS:
        row = ALGORITHMS[command]
        text = f"{escape_markdown(row.title)} (`{command}`): {escape_markdown(row.summary)}."
        settings = {key: config.get(key) for key in ("algorithm", "kl", "shaping", "optimizer")}
    else:
        text = _OFFLINE_METHODS.get(command, f"Trained with `rlhf {escape_markdown(command)}`.")
        keys = ("kind", "trainer", "batch_size", "max_length")
        settings = {key: config.get(key) for key in keys}
    if model := _trained_weights_sentence(config):
        text += f" {model}"
    shown = {key: value for key, value in settings.items() if value not in (None, {}, [])}
    return f"{text}\n\n{yaml_block(shown)}" if shown else text


def _trained_weights_sentence(config: Mapping[str, Any]) -> str:
    """Return a sentence on which weights were trained."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return ""
    lora = model.get("lora")
    if not isinstance(lora, Mapping):
        return "All weights were trained."
    return (
        f"LoRA adapters of rank {lora.get('rank')} with alpha {lora.get('alpha')} were trained; "
        "this export contains the merged weights."
    )


def rewards_section(config: Mapping[str, Any]) -> str:
    """Return a Markdown table of the rewards of an online run; "" without rewards."""
    rows = []
    env = config.get("env")
    if isinstance(env, Mapping) and env.get("id"):
        rows.append(["training", f"the reward of {env['id']}", f"weight: {env.get('reward', 1.0)}"])
    for use, key in (("training", "rewards"), ("only measured", "gold")):
        for spec in config.get(key) or []:
            if isinstance(spec, Mapping):
                names = [name for name in _REWARD_KEY_ORDER if name in spec]
                names += [name for name in spec if name not in names]
                settings = [f"{name}: {spec[name]}" for name in names if name != "kind"]
                rows.append([use, str(spec.get("kind")), ", ".join(settings)])
    return markdown_table(["use", "reward", "settings"], rows) if rows else ""


def configuration_block(stage: Stage) -> str:
    """Return the configuration of a run as a folded YAML block."""
    shown = {key: value for key, value in stage.config.items() if key not in _HIDDEN_KEYS}
    if isinstance(rollout := shown.get("rollout"), Mapping):
        # The engine's settings contain addresses of servers, and do not determine the model.
        shown["rollout"] = {key: value for key, value in rollout.items() if key != "engine"}
    title = esc(f"Configuration of {stage.name}")
    return f"<details><summary>{title}</summary>\n\n{yaml_block(shown)}\n\n</details>"


def yaml_block(tree: Mapping[str, Any]) -> str:
    """Return plain data as a fenced YAML block; the fence is longer than any in the data."""
    text = dump_yaml(dict(tree))
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}yaml\n{text}{fence}"


def cost_section(
    stages: Sequence[Stage], costs: Sequence[TrainingCost], energy: EnergyEstimate | None
) -> str:
    """Return the environmental cost: time, tokens and devices of each run, and energy."""
    rows = [
        [
            stage.name,
            f"{decimal_text(cost.seconds)} s" if cost.seconds else "not recorded",
            f"{cost.tokens:,}" if cost.tokens is not None else "not recorded",
            f"{cost.processes}",
            cost.device or "not recorded",
        ]
        for stage, cost in zip(stages, costs, strict=True)
    ]
    table = markdown_table(["run", "time", "tokens", "processes", "device"], rows)
    notes = (
        "The tokens are those of the training examples, or the sampled tokens of an online "
        "algorithm. The time is that of the training processes until the last logged step. It "
        "does not include earlier attempts, the search of settings, or the training of the base "
        "model and of reward models."
    )
    return f"{table}\n{notes}\n\n{_energy_text(energy)}"


def _energy_text(energy: EnergyEstimate | None) -> str:
    if energy is None:
        return (
            "Energy: not estimated, because not every run recorded the power of its devices, and "
            "none was given for the export."
        )
    watts = ", ".join(f"{power:g} W" for power in dict.fromkeys(energy.watts))
    amount = f"{decimal_text(energy.kilowatt_hours)} kWh"
    if energy.is_recorded:
        return (
            f"Energy: at most {amount} for the GPUs, if they drew their recorded power limit "
            f"({watts}) during the whole time. The other parts of the machine and the cooling are "
            "not included. The energy was not measured."
        )
    return (
        f"Energy: {amount}, the product of the time and an assumed power of {watts}, which was "
        "given for the export. The energy was not measured."
    )
