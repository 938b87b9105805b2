"""Answers of the models side by side, for a reader to judge for themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_ogpsa.evaluation import EvaluationResult, Sample

_PER_KIND = 6


@dataclass(frozen=True)
class Answer:
    """One model's answer.

    Attributes:
        model: its heading.
        text: the answer, untrusted.
        verdict: what the judge made of it, such as "refused"; empty if it made nothing.
    """

    model: str
    text: str
    verdict: str


@dataclass(frozen=True)
class Exchange:
    """A prompt and what the models answered."""

    prompt: str
    answers: list[Answer]


@dataclass(frozen=True)
class Group:
    """Prompts of one kind.

    Attributes:
        title: of the kind.
        harmful: whether a reader should be asked before seeing them.
        total: how many prompts were asked.
        exchanges: the first of them, unselected.
    """

    title: str
    harmful: bool
    total: int
    exchanges: list[Exchange]


def answer_groups(results: Mapping[str, EvaluationResult]) -> list[Group]:
    """The first prompts of every kind with the answers of every model.

    Args:
        results: by heading; all on the same data.
    """
    if not results:
        return []
    kinds: dict[tuple[str, str | None], list[Sample]] = {}
    for sample in next(iter(results.values())).samples:
        kinds.setdefault((sample.name, sample.group), []).append(sample)
    answered = {
        heading: {(s.name, s.prompt): s for s in result.samples}
        for heading, result in results.items()
    }
    groups = []
    for (name, group), samples in kinds.items():
        exchanges = [
            Exchange(
                sample.prompt,
                [
                    _answer(heading, found[sample.name, sample.prompt])
                    for heading, found in answered.items()
                    if (sample.name, sample.prompt) in found
                ],
            )
            for sample in samples[:_PER_KIND]
        ]
        title = f"{name}: {group}" if group else name
        groups.append(Group(title, _is_harmful(samples[0], results), len(samples), exchanges))
    return groups


def _is_harmful(sample: Sample, results: Mapping[str, EvaluationResult]) -> bool:
    """Whether a refusal is what is wanted of these prompts."""
    if sample.judged not in ("refused", "safe"):
        return False
    measures = (r.measures.get(f"{sample.name}.{sample.judged}") for r in results.values())
    return next((m.better == "higher" for m in measures if m is not None), True)


def _answer(heading: str, sample: Sample) -> Answer:
    words = {
        "refused": ("refused", "answered"),
        "safe": ("safe", "unsafe"),
        "correct": ("right", "wrong"),
    }[sample.judged]
    verdict = "" if sample.verdict is None else words[0 if sample.verdict else 1]
    return Answer(heading, sample.answer + (" …" if sample.cut else ""), verdict)
