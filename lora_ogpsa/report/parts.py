"""The parts of a report that both of its forms show, and a sentence for each that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_ogpsa.report.answers import Group, answer_groups
from lora_ogpsa.report.costs import cost_rows
from lora_ogpsa.report.drawing import Picture
from lora_ogpsa.report.figures import (
    captured_picture,
    energy_picture,
    loss_picture,
    tradeoff_pictures,
)
from lora_ogpsa.report.model import Report


@dataclass
class Parts:
    """What is drawn and listed.

    Attributes:
        tradeoff: safety against what it cost.
        training: what OGPSA did on the way.
        answers: of the models, side by side.
        costs: headings and rows of time and memory.
        missing: by part, why it is not there.
    """

    tradeoff: list[Picture]
    training: list[Picture]
    answers: list[Group]
    costs: tuple[list[str], list[list[str]]]
    missing: dict[str, str]

    def pictures(self) -> Iterator[Picture]:
        """All pictures."""
        yield from self.tradeoff
        yield from self.training


def gather(report: Report) -> Parts:
    """Draw and list what a report shows."""
    arm = report.protected
    training = []
    if arm is not None:
        drawn = (energy_picture(arm), loss_picture(arm), captured_picture(arm))
        training = [picture for picture in drawn if picture is not None]
    finals = {"base": report.base} if report.base is not None else {}
    finals |= {arm.title: arm.final for arm in report.arms if arm.final is not None}
    answers = answer_groups(finals)
    trained = [arm.title for arm in report.arms if arm.stages]
    costs = (["", *trained], cost_rows(report.arms))
    tradeoff = tradeoff_pictures(report)
    missing = {}
    if not report.sections:
        missing["tradeoff"] = "Nothing was measured, so there is no trade-off to show."
    elif not tradeoff:
        missing["tradeoff"] = "There is no measure of safety, or nothing to set against it."
    if not answers:
        missing["answers"] = "No answers were generated in this run."
    if arm is None:
        missing["training"] = "No training with OGPSA is recorded here."
    elif not training:
        missing["training"] = "The training was too short to leave a log."
    if not costs[1]:
        missing["costs"] = "No training is finished yet."
    return Parts(tradeoff, training, answers, costs, missing)
