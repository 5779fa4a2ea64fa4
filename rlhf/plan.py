"""`--dry-run`: check everything that can be checked without training, and say what it will cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.errors import UserError
from rlhf.verbs import configure


def plan(verb: str, tree: Mapping[str, Any]) -> str:
    """What a verb would do with this configuration: rows, steps, batch algebra, memory.

    Loads the data, the model and the rewards, and trains nothing.

    Raises:
        UserError: what training would refuse.
    """
    config = configure(verb, tree)
    lines = {
        "OfflineConfig": _offline,
        "RewardConfig": _offline,
        "OnlineConfig": _online,
        "OveroptimizeConfig": _overoptimize,
    }
    plan_of = lines.get(type(config).__name__)
    return "\n".join(plan_of(verb, config)) if plan_of else "keys and types are right"


def _offline(verb: str, config: Any) -> list[str]:
    from rlhf.training.offline import check_options, load_rows, num_steps, stage_of
    from rlhf.training.stages import evaluation_steps

    stage = stage_of(verb, config)
    check_options(config.trainer)
    train_rows, eval_rows = load_rows(config, stage)
    work = stage.prepare(config, train_rows)
    examples = work.encode(train_rows, True)
    steps = num_steps(config, len(examples))
    accumulation = config.batch_size // config.micro_batch_size
    copies = 1 if "ref_model" in work.arguments else 0
    return [
        f"rows: {len(examples):,} for training, {len(eval_rows):,} held out"
        + (f" ({work.summary()})" if work.summary() else ""),
        f"batch: {config.batch_size} examples per step = {config.micro_batch_size} at once x "
        f"{accumulation} accumulated",
        f"steps: {steps:,}, evaluated every {evaluation_steps(config, steps)}",
        _memory(work.model, tokens=config.micro_batch_size * config.max_length, copies=copies),
    ]


def _overoptimize(verb: str, config: Any) -> list[str]:
    from rlhf.studies.overoptimize import check_parts

    check_parts(config)
    return ["keys and types are right, those of the proxies and of the training too"]


def _online(verb: str, config: Any) -> list[str]:
    from rlhf.training.session import open_session

    session = open_session(verb, config)
    settings = session.algorithm.settings
    size = settings.group_size
    per_update = config.episodes_per_step // settings.num_minibatches
    if per_update < 1:
        raise UserError(
            f"algorithm.num_minibatches ({settings.num_minibatches}) exceeds episodes_per_step "
            f"({config.episodes_per_step})"
        )
    copies = 1 if session.reference and not session.policy.is_lora else 0
    session.close()
    return [
        f"rollouts: {config.episodes_per_step} episodes per step = "
        f"{config.episodes_per_step // size} start states x {size}, "
        f"{config.rollout.parallel} decoding together",
        f"updates: {settings.num_epochs} epochs x {settings.num_minibatches} mini-batches of "
        f"{per_update} episodes; micro-batches of {config.micro_batch_tokens:,} tokens",
        f"steps: {config.num_steps:,}, {config.num_steps * config.episodes_per_step:,} episodes, "
        f"{config.num_steps * settings.num_epochs * settings.num_minibatches:,} optimizer steps",
        _memory(session.policy.model, tokens=config.micro_batch_tokens, copies=copies),
    ]


def _memory(model: Any, *, tokens: int, copies: int) -> str:
    """Weights, gradients, optimizer, references, and a rule of thumb for activations.

    Activations: about 34 values of the model's dtype per token, layer and unit of width without
    recomputation (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1 without the attention term).
    """
    width = {p.dtype: p.element_size() for p in model.parameters()}
    size = max(width.values())
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    masters = 0 if size == 4 else 4
    state = total * size * (1 + copies) + trained * (size + masters + 8)
    shape = model.config.get_text_config()
    activations = 17 * size * tokens * shape.hidden_size * shape.num_hidden_layers
    held = "gradients, optimizer" + (" and reference" if copies else "")
    return (
        f"memory: about {_bytes(state + activations)} = {_bytes(state)} for "
        f"{total / 1e6:.1f}M parameters ({trained / 1e6:.1f}M trained), {held} + "
        f"{_bytes(activations)} for activations of {tokens:,} tokens"
    )


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
