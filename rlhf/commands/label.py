"""Implements `rlhf label`: people label items on a local page or in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from rlhf.common.ranges import AtLeastTwo, Port, PositiveInt, Seed
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import CommandConfig
from rlhf.config.data import DataSpec
from rlhf.config.labeling import LabelMode, LabelOrder, check_annotator
from rlhf.errors import UserError


@dataclass(frozen=True)
class LabelConfig(CommandConfig):
    """Configuration of `rlhf label`: the items, the annotator, and the file of labels."""

    data: list[DataSpec]
    """Items to label: prompts with two or more replies, or with one reply, see docs/labeling.md."""
    output: str
    """JSONL file to which labels are appended. An existing file is continued."""
    annotator: str
    """Id of the annotator, which can be a pseudonym; it is part of every label."""
    pseudonym_key: str | None = None
    """File with a secret key. If it is set, the labels contain a pseudonym that is computed from
    the annotator's id and the key. The file is created if it does not exist."""
    mode: LabelMode = "pairs"
    """pairs: which of two replies is better; ratings: how good a reply is; rankings: the order of
    several replies; demonstrations: the annotator writes a reply."""
    interface: Literal["page", "terminal"] = "page"
    """page: a page in the browser, served to this machine only; terminal: this terminal."""
    port: Port = 0
    """Port of the page; 0 chooses a free one."""
    order: LabelOrder = "data"
    """Order of the items. data: that of the data; random: shuffled; disagreement: pairs about which
    the reward models in rewards disagree most come first; suspicion: pairs whose label is probably
    wrong, according to a model that is fitted on the other pairs, come first."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Reward models for order: disagreement, in the format of a training configuration: several, or
    one of kind ensemble or heads."""
    checks: list[DataSpec] = field(default_factory=list)
    """Pairs with known answers that are mixed with the items to check the annotator. They are not
    training data."""
    check_every: AtLeastTwo = 10
    """One in this number of items is a check, until each check was used once."""
    strengths: Annotated[int, Interval(ge=1, le=3)] = 3
    """Number of strengths of a preference; the strength is the margin of the pair."""
    scale: Annotated[int, Interval(ge=2, le=10)] = 5
    """Best rating; the worst is 1."""
    guidelines: str = ""
    """Text that the page shows above the items."""
    limit: PositiveInt | None = None
    """Maximum number of items, without the checks."""
    seed: Seed = 0
    """Seed of the order of the replies of an item, of the random order, of the cross-validation
    folds for suspicion, and of the checks."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: give at least one source of items")
        check_annotator(self.annotator)
        if self.mode != "pairs":
            for key, default in (("checks", []), ("strengths", 3), ("check_every", 10)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} has no effect on mode: {self.mode} (only on pairs)")
            if self.order in ("disagreement", "suspicion"):
                raise ValueError(f"order: {self.order} needs mode: pairs, got {self.mode}")
        if not self.checks and self.check_every != 10:
            raise ValueError("check_every has no effect without checks")
        if self.mode != "ratings" and self.scale != 5:
            raise ValueError(f"scale has no effect on mode: {self.mode} (only on ratings)")
        if bool(self.rewards) != (self.order == "disagreement"):
            raise ValueError("set rewards and order: disagreement together")
        if self.interface == "terminal" and self.port:
            raise ValueError("port has no effect on interface: terminal")


def label(config: LabelConfig) -> Iterator[str]:
    """Collect labels until the annotator stops.

    The address of the page is yielded, or a summary after labeling in the terminal.

    Raises:
        UserError: The items, the file of labels or the port cannot be used.
        Interrupted: A signal stopped the page.
    """
    from rlhf.labeling.pseudonyms import pseudonym_of
    from rlhf.labeling.session import LabelingSession, LabelSettings
    from rlhf.labeling.store import LabelFile

    if config.interface == "page":
        from rlhf.web import require_web_packages

        require_web_packages("rlhf label (or use --interface terminal)")
    annotator = config.annotator
    if config.pseudonym_key:
        annotator = pseudonym_of(annotator, config.pseudonym_key)
    items = _items_to_label(config, annotator)
    settings = LabelSettings(config.mode, config.strengths, config.scale, config.seed)
    with LabelFile(config.output) as file:
        session = LabelingSession(items, file, annotator=annotator, settings=settings)
        if config.interface == "terminal":
            from rlhf.labeling.terminal import label_in_terminal

            label_in_terminal(session)
            yield _progress_text(session.progress(), config.output)
            return
        yield from _serve_page(config, session)


def _items_to_label(config: LabelConfig, annotator: str) -> list[Any]:
    """Return the items in the order of labeling, at most `limit` of them, with the checks.

    Raises:
        UserError: The items or checks are invalid, or every item is also a check.
    """
    from rlhf.labeling.items import read_check_items, read_items
    from rlhf.labeling.queue import insert_check_items, order_items

    def load_rewards() -> list[Any]:
        from rlhf.models.rewards import load_rewards as load_reward

        return [load_reward([spec]) for spec in config.rewards]

    items = order_items(
        read_items(config.data, config.mode),
        config.order,
        seed=config.seed,
        load_rewards=load_rewards,
    )[: config.limit]
    if not config.checks:
        return items
    checks = read_check_items(config.checks)
    seed = f"{config.seed}/{annotator}"
    queue = insert_check_items(items, checks, every=config.check_every, seed=seed)
    if not queue:
        raise UserError("checks: every item is also a check; give other pairs in data or checks")
    return queue


def _serve_page(config: LabelConfig, session: Any) -> Iterator[str]:
    from rlhf.labeling.page import labeling_app
    from rlhf.web.security import new_token, secured
    from rlhf.web.server import open_listener, serve

    token = new_token()
    app = secured(labeling_app(session, guidelines=config.guidelines), token=token)
    listener = open_listener(port=config.port)
    yield (
        f"{session.progress().total} items for {session.annotator}: open "
        f"{listener.url(token=token)}\nCtrl-C ends; every label is saved at once to {config.output}"
    )
    serve(app, listener, stop_message_suffix=f"the labels are in {config.output}")


def _progress_text(progress: Any, output: str) -> str:
    return (
        f"{progress.labeled} of {progress.total} items labeled, {progress.skipped} skipped; the "
        f"labels are in {output}"
    )
