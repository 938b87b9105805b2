"""The verdict: what OGPSA did, in one plain sentence computed from numbers and their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_ogpsa.compare_settings import PLAIN
from lora_ogpsa.compare_table import matched_target
from lora_ogpsa.evaluation import EvaluationResult, Interval, differences
from lora_ogpsa.report.model import Tone, Verdict, headline
from lora_ogpsa.results import measure_title

NOTHING_MEASURED = (
    "Nothing was measured (`evaluation: false`), so nobody can say from this run whether OGPSA "
    "helped."
)


def run_verdict(
    base: EvaluationResult | None,
    plain: EvaluationResult | None,
    own: EvaluationResult | None,
    safety: str | None,
    taxes: list[str],
) -> Verdict:
    """The verdict on a run, by paired differences between OGPSA and plain training.

    Args:
        base: evaluation of the base model.
        plain: of plain training.
        own: of training with OGPSA.
        safety: the measure of safety.
        taxes: the measures in which a tax may be paid.
    """
    if own is None and plain is None:
        return Verdict("open", NOTHING_MEASURED)
    if own is None or plain is None:
        found = own or plain
        assert found is not None
        aims = [] if safety is None else [safety]
        facts = "; ".join(_against_base(n, base, found) for n in [*aims, *headline(taxes)])
        why = (
            "OGPSA was off in this run, so there is nothing to judge"
            if own is None
            else "Whether OGPSA helped cannot be said, because there is no plain training beside "
            "this run (`compare: true` adds it)"
        )
        return Verdict("open", f"{why}. After training: {facts}.")
    changes = differences(plain, own)
    sorted_by = _sorted(changes, plain, [n for n in headline(taxes) if n in changes])
    aim = _sorted(changes, plain, [] if safety not in changes else [safety])
    gained = aim["better"] + sorted_by["better"]
    lost = aim["worse"] + sorted_by["worse"]
    clear = [_versus(n, plain, own, changes[n]) for n in gained]
    costs = [_versus(n, plain, own, changes[n]) for n in lost]
    open_ = [_versus(n, plain, own, changes[n]) for n in aim["open"] + sorted_by["open"]]
    chance = f"Within chance: {'; '.join(open_)}." if open_ else ""
    tone: Tone
    if clear and not costs:
        tone, start = "good", f"OGPSA helped: {'; '.join(clear)}."
    elif clear:
        tone, start = (
            "mixed",
            (f"OGPSA helped, at a cost: {'; '.join(clear)}; but {'; '.join(costs)}."),
        )
    elif costs:
        tone, start = "bad", f"OGPSA did not help: {'; '.join(costs)}, and nothing clearly better."
    else:
        tone, start = (
            "open",
            ("No clear difference between OGPSA and plain training on these prompts."),
        )
    return Verdict(tone, f"{start} {chance}".strip())


def _sorted(
    changes: Mapping[str, Interval], plain: EvaluationResult, names: list[str]
) -> dict[str, list[str]]:
    """Measures by what their paired interval says."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for name in names:
        low, high = changes[name].low, changes[name].high
        if plain.measures[name].better == "lower":
            low, high = -high, -low
        found["better" if low > 0 else "worse" if high < 0 else "open"].append(name)
    return found


def _versus(name: str, plain: EvaluationResult, own: EvaluationResult, change: Interval) -> str:
    unit = own.measures[name].unit
    scale, digits, word = (100.0, 0, " points") if unit == "share" else (1.0, 3, "")
    value, low, high = (scale * x for x in (change.value, change.low, change.high))
    return (
        f"{measure_title(name, arrow=False)} {_number(own, name)} instead of "
        f"{_number(plain, name)} ({value:+.{digits}f}{word} [{low:+.{digits}f}, "
        f"{high:+.{digits}f}])"
    )


def _against_base(name: str, base: EvaluationResult | None, found: EvaluationResult) -> str:
    title = measure_title(name, arrow=False)
    if base is None or name not in base.measures:
        return f"{title} {_number(found, name)}"
    return f"{title} {_number(found, name)} (base {_number(base, name)})"


def _number(result: EvaluationResult, name: str) -> str:
    measure = result.measures[name]
    return f"{100 * measure.value:.0f} %" if measure.unit == "share" else f"{measure.value:.3f}"


def compare_verdict(content: Mapping[str, Any]) -> Verdict:
    """The verdict on a comparison, by the tax removed at matched safety.

    Args:
        content: of ``compare.json``.
    """
    rules = [name for name in content["rules"] if name != PLAIN]
    if not rules or PLAIN not in content["rules"]:
        return Verdict(
            "open", "Nothing can be said yet: plain training and one rule more are not finished."
        )
    target = matched_target(content)
    if target is None:
        return Verdict("open", _no_safer(content))
    first = "default" if "default" in rules else rules[0]
    tone, sentence = _rule_verdict(content, first)
    others = [_rule_verdict(content, name)[1] for name in rules if name != first]
    seeds = len(content["seeds"])
    caution = "One seed is one seed: another may rank the rules differently." if seeds == 1 else ""
    text = f"At matched safety ({target}), {sentence}."
    return Verdict(
        tone, " ".join([text, *(f"For comparison, {o}." for o in others), caution]).strip()
    )


def _no_safer(content: Mapping[str, Any]) -> str:
    name, after = content["safety"], content["plain_safety"]
    share = content["measures"][name]["unit"] == "share"
    end, begun = (
        f"{100 * value:.0f} %" if share else f"{value:.3f}"
        for value in (after, content["base"][name]["value"])
    )
    return (
        "Nothing can be said: plain training did not make the model clearly safer ("
        f"{measure_title(name, arrow=False)} {end} at its end, {begun} before), so there is no "
        "safety to match the rules at. Train longer, or at a higher learning rate."
    )


def _rule_verdict(content: Mapping[str, Any], name: str) -> tuple[Tone, str]:
    rule, plain = content["rules"][name], content["rules"][PLAIN]
    label = f"`{name}`"
    if not rule["matched"]["reached"]:
        safety = content["safety"]
        best = rule["end"][safety]["value"]
        share = content["measures"][safety]["unit"] == "share"
        value = f"{100 * best:.0f} %" if share else f"{best:.3f}"
        there = _shares(content, rule["tax_removed"]["end"])
        fewer = f", where it had removed {_and(there[0])}" if there[0] else ""
        return "open", (
            f"{label} cannot be judged: it never became that safe (at its end {value}{fewer}); "
            "train it longer, loosen its budget, or raise `safety_margin`"
        )
    found = rule["tax_removed"]["matched"]
    if not any(found[n]["clear"] for n in headline(content["taxes"])):
        return "open", f"{label} had nothing to remove: plain training paid no clear tax"
    removed, added, unclear = _shares(content, found)
    parts = []
    if removed:
        parts.append(f"removed {_and(removed)}")
    if added:
        parts.append(f"paid {_and(added)} on top of plain training's")
    if unclear:
        parts.append(f"made no clear difference in {_and(unclear)}")
    steps, usual = rule["matched"]["step"]["value"], plain["matched"]["step"]["value"]
    needed = f", after {steps:.0f} optimizer steps (plain training: {usual:.0f})"
    missing = len(rule["matched"]["step"]["seeds"]) - len(rule["matched"]["reached"])
    if missing:
        needed += f" ({missing} of its seeds never got there)"
    if removed and not added:
        tone: Tone = "mixed" if missing else "good"
    elif removed:
        tone = "mixed"
    else:
        tone = "bad" if added else "open"
    verb = "helped" if tone == "good" else "helped in part" if tone == "mixed" else None
    verb = verb or ("did not help" if added else "cannot be told from plain training")
    return tone, f"{label} {verb}: it {_and(parts)}{needed}"


def _shares(
    content: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Taxes that were clearly removed, clearly added to, and neither, in words."""
    removed, added, unclear = [], [], []
    for n in headline(content["taxes"]):
        low, high, value = found[n]["low"], found[n]["high"], found[n]["value"]
        title = measure_title(n, arrow=False)
        if not found[n]["clear"]:
            continue
        if value is None or low is None:
            unclear.append(title)
            continue
        text = f"{100 * abs(value):.0f} % [{_bounds(value, low, high)}] of the tax in {title}"
        if low > 0:
            removed.append(text)
        elif high < 0:
            added.append(text)
        else:
            unclear.append(f"{title} ({100 * value:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}])")
    return removed, added, unclear


def _bounds(value: float, low: float, high: float) -> str:
    ends = sorted((abs(low), abs(high))) if value < 0 else [low, high]
    return ", ".join(f"{100 * end:.0f}" for end in ends)


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def cost_sentence(seconds: Mapping[str, float]) -> str:
    """What OGPSA cost in time.

    Args:
        seconds: of a protected training, by what they went into.
    """
    passes, projection = seconds.get("reference_passes", 0.0), seconds.get("projection")
    total = seconds.get("training", 0.0) + passes + (projection or 0.0)
    if total <= 0 or passes <= 0:
        return ""
    text = f"The reference passes took {100 * passes / total:.0f} % of the training time"
    if projection is not None:
        text += f" and the projection {100 * projection / total:.0f} %"
    return f"{text}."
