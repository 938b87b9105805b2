"""The measures of a suite: from rows to numbers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from lora_ogpsa import chat
from lora_ogpsa.answers import base_mode
from lora_ogpsa.errors import ConfigError, DataError
from lora_ogpsa.evaluation.divergence import divergence
from lora_ogpsa.evaluation.exact import gold_number, last_number, strict_number
from lora_ogpsa.evaluation.harness import harness_missing
from lora_ogpsa.evaluation.judges import Judge, make_judge
from lora_ogpsa.evaluation.likelihood import Tokens
from lora_ogpsa.evaluation.model_judges import LocalJudge
from lora_ogpsa.evaluation.multiple_choice import (
    Question,
    as_question,
    choice_requests,
    judge_choices,
)
from lora_ogpsa.evaluation.result import Item, Sample
from lora_ogpsa.evaluation.session import Row, Run, item_keys, measured_rows, place
from lora_ogpsa.evaluation.store import content_key
from lora_ogpsa.evaluation.suite import EvaluationSuite, MeasureSpec
from lora_ogpsa.models import EMBEDDED, checked_source

_JUDGED_AT_A_TIME = 16


def run_measure(run: Run, name: str, spec: MeasureSpec) -> None:
    """Record the results of one measure in `run.result`.

    Raises:
        DataError: rows are missing or lack fields.
        ConfigError: the judge cannot answer what is asked.
    """
    _MEASURES[spec.measure](run, name, spec)


def check_measure(suite: EvaluationSuite, name: str, spec: MeasureSpec) -> list[str] | None:
    """Find out, without a model, whether a measure can be taken: its judge, data, and fields.

    Args:
        suite: the settings that measures share.
        name: of the measure.
        spec: the measure.

    Returns:
        The names that its results will have; ``None`` for the harness, which knows only when it
        runs.

    Raises:
        DataError: rows are missing or lack fields.
        ConfigError: the judge cannot answer what is asked.
        ModelError: the judge's model is not there, or the harness is not installed.
    """
    if spec.measure == "harness":
        if find_spec("lm_eval") is None:
            raise harness_missing(spec.tasks)
        return None
    judge = _judge(suite, name, spec) if spec.measure == "refusal" else None
    rows = measured_rows(name, spec, spec.limit or suite.limit)
    if judge is not None:
        _prompts(name, rows)
        groups = dict.fromkeys(group for group in _groups(rows, spec) if group is not None)
        return [f"{name}.{judge.verdict}", *(f"{name}.{judge.verdict}.{g}" for g in groups)]
    if spec.measure == "multiple_choice":
        _questions(name, rows, spec)
        return [f"{name}.acc", f"{name}.acc_norm"]
    if spec.measure == "preference":
        for number, row in enumerate(rows, start=1):
            chat.as_preference(row, name=place(name, number))
        return [f"{name}.ranked_right", f"{name}.ranked_right_norm"]
    if spec.measure == "divergence":
        if spec.answers == "given":
            _with_answers(name, rows)
        else:
            _prompts(name, rows)
        return [f"{name}.kl", f"{name}.kl_first{spec.first_tokens}"]
    _with_answers(name, rows)
    return [f"{name}.exact", f"{name}.flexible"] if spec.measure == "numeric" else [f"{name}.nll"]


def _judge(suite: EvaluationSuite, name: str, spec: MeasureSpec) -> Judge:
    judge = make_judge(suite.judge if spec.judge is None else spec.judge)
    if isinstance(judge, LocalJudge) and judge.name != EMBEDDED:
        checked_source(judge.name)
    if spec.want == "answer" and judge.verdict != "refused":
        raise ConfigError(
            f"The measure `{name}` asks whether harmless prompts are refused, and its judge tells "
            "safe from unsafe only. Give this measure another judge, such as `judge: phrases`."
        )
    return judge


def _refusal(run: Run, name: str, spec: MeasureSpec) -> None:
    judge = _judge(run.suite, name, spec)
    rows = run.rows(name, spec)
    chats = _prompts(name, rows)
    prompts = [run.encode(name, i, chat, None)[0] for i, chat in enumerate(chats, start=1)]
    answers = run.answers(name, spec, prompts)
    texts = [chat[-1]["content"] for chat in chats]
    pairs = [(text, answer.text) for text, answer in zip(texts, answers, strict=True)]
    verdicts = _verdicts(run, name, judge, pairs)
    groups = _groups(rows, spec)
    items: dict[str | None, list[Item]] = {None: []}
    keys = item_keys(chats)
    for i, verdict in enumerate(verdicts):
        run.result.samples.append(
            Sample(
                name, texts[i], answers[i].text, verdict, judge.verdict, groups[i], answers[i].cut
            )
        )
        if verdict is not None:
            item = Item(keys[i], float(verdict))
            items[None].append(item)
            if groups[i] is not None:
                items.setdefault(groups[i], []).append(item)
    unclear = len(verdicts) - len(items[None])
    if unclear:
        run.result.notes.append(
            f"{name}: the judge gave no clear verdict on {unclear} of {len(verdicts)} answers; "
            "they are left out."
        )
    for group, found in items.items():
        label = f"{name}.{judge.verdict}" + ("" if group is None else f".{group}")
        run.result.add_share(label, found, "higher" if spec.want == "refuse" else "lower")


def _verdicts(run: Run, name: str, judge: Judge, pairs: list[tuple[str, str]]) -> list[bool | None]:
    """The judge's verdicts, of which finished ones are kept."""
    cache = run.store.section("verdicts", content_key(judge.identity))
    keys = [cache.key(*pair) for pair in pairs]
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in cache}
    todo = list(missing)
    done = len(set(keys)) - len(todo)
    with run.progress.step(f"{name}: verdicts", len(set(keys)), done=done) as advance:
        for start in range(0, len(todo), _JUDGED_AT_A_TIME):
            part = todo[start : start + _JUDGED_AT_A_TIME]
            found = judge.judge([missing[key] for key in part])
            cache.add(dict(zip(part, found, strict=True)))
            advance(len(part))
    return [cache[key] for key in keys]


def _nll(run: Run, name: str, spec: MeasureSpec) -> None:
    rows = run.rows(name, spec)
    examples = _answered(run, name, rows)
    scores = run.scores(name, examples)
    keys = item_keys(rows)
    items = [
        Item(key, -s.logprob / s.tokens, s.tokens) for key, s in zip(keys, scores, strict=True)
    ]
    run.result.add_mean(f"{name}.nll", items, "lower", "nats")


def _multiple_choice(run: Run, name: str, spec: MeasureSpec) -> None:
    rows = run.rows(name, spec)
    questions = _questions(name, rows, spec)
    longest = _context_window(run.model)
    requests = [choice_requests(run.tokenizer, question, longest) for question in questions]
    flat = iter(run.scores(name, [request for group in requests for request in group]))
    judged = [
        judge_choices(question, [next(flat) for _ in question.choices]) for question in questions
    ]
    keys = item_keys(rows)
    for position, label in enumerate(("acc", "acc_norm")):
        items = [Item(key, float(found[position])) for key, found in zip(keys, judged, strict=True)]
        run.result.add_share(f"{name}.{label}", items, "higher")


def _numeric(run: Run, name: str, spec: MeasureSpec) -> None:
    rows = run.rows(name, spec)
    prompts, golds, texts = [], [], []
    for number, (messages, gold) in enumerate(_with_answers(name, rows), start=1):
        last = {**messages[-1], "content": messages[-1]["content"] + spec.suffix}
        prompts.append(run.encode(name, number, [*messages[:-1], last], None)[0])
        golds.append(gold_number(gold))
        texts.append(messages[-1]["content"])
    answers = run.answers(name, spec, prompts)
    keys = item_keys(rows)
    exact, flexible = [], []
    for i, answer in enumerate(answers):
        right = last_number(answer.text) == golds[i]
        exact.append(Item(keys[i], float(strict_number(answer.text) == golds[i])))
        flexible.append(Item(keys[i], float(right)))
        run.result.samples.append(
            Sample(name, texts[i], answer.text, right, "correct", cut=answer.cut)
        )
    run.result.add_share(f"{name}.exact", exact, "higher")
    run.result.add_share(f"{name}.flexible", flexible, "higher")


def _preference(run: Run, name: str, spec: MeasureSpec) -> None:
    rows = run.rows(name, spec)
    examples: list[Tokens] = []
    for number, row in enumerate(rows, start=1):
        prompt, chosen, rejected = chat.as_preference(row, name=place(name, number))
        examples += [run.encode(name, number, prompt, text) for text in (chosen, rejected)]
    keys = item_keys(rows)
    scores = run.scores(name, examples)
    won, lost = scores[::2], scores[1::2]

    def record(label: str, margins: list[float]) -> None:
        # Two answers that are level are not ranked right: a coin would be half the time.
        items = [Item(key, float(m > 0)) for key, m in zip(keys, margins, strict=True)]
        run.result.add_share(f"{name}.{label}", items, "higher")

    margins = [w.logprob - r.logprob for w, r in zip(won, lost, strict=True)]
    record("ranked_right", margins)
    record(
        "ranked_right_norm",
        [w.logprob / w.tokens - r.logprob / r.tokens for w, r in zip(won, lost, strict=True)],
    )
    if run.adapter:
        # DPO's implicit reward: what the adapter added to the margin (Rafailov et al. 2023).
        with base_mode(run.model):
            base = run.base().scores(f"{name} (base)", examples)
        base_margins = [w.logprob - r.logprob for w, r in zip(base[::2], base[1::2], strict=True)]
        record("reward_right", [m - b for m, b in zip(margins, base_margins, strict=True)])


def _divergence(run: Run, name: str, spec: MeasureSpec) -> None:
    if not run.adapter:
        run.result.notes.append(
            f"{name}: left out, since the evaluated model is its own base (no adapter is on)."
        )
        return
    rows = run.rows(name, spec)
    if spec.answers == "given":
        examples = _answered(run, name, rows)
    else:
        chats = _prompts(name, rows)
        prompts = [run.encode(name, i, chat, None)[0] for i, chat in enumerate(chats, start=1)]
        with base_mode(run.model):
            answers = run.base().answers(f"{name} (base)", spec, prompts)
        examples = [(prompt, a.ids) for prompt, a in zip(prompts, answers, strict=True)]
    found = divergence(
        run.model,
        run.tokenizer,
        examples,
        first=spec.first_tokens,
        batch_tokens=run.suite.batch_tokens,
        autocast=run.suite.autocast_dtype,
        cache=run.store.section("divergence", run.result.model),
        progress=run.progress,
        label=name,
    )
    keys = item_keys(rows)
    whole = [Item(k, d.total / d.tokens, d.tokens) for k, d in zip(keys, found, strict=True)]
    first = [
        Item(k, d.first_total / d.first_tokens, d.first_tokens)
        for k, d in zip(keys, found, strict=True)
    ]
    run.result.add_mean(f"{name}.kl", whole, "lower", "nats")
    run.result.add_mean(f"{name}.kl_first{spec.first_tokens}", first, "lower", "nats")


def _harness(run: Run, name: str, spec: MeasureSpec) -> None:
    from lora_ogpsa.evaluation.harness import run_harness

    measures, items = run_harness(
        run.model,
        run.tokenizer,
        spec.tasks,
        include_path=spec.include_path,
        limit=spec.limit or run.suite.limit,
        num_fewshot=spec.num_fewshot,
        apply_chat_template=spec.apply_chat_template,
        batch_size=run.suite.batch_size,
        cache=run.store.folder,
        identity=run.result.model,
    )
    run.result.measures.update({f"{name}.{key}": found for key, found in measures.items()})
    run.result.items.update({f"{name}.{key}": found for key, found in items.items()})


_MEASURES: dict[str, Callable[[Run, str, MeasureSpec], None]] = {
    "refusal": _refusal,
    "nll": _nll,
    "multiple_choice": _multiple_choice,
    "numeric": _numeric,
    "preference": _preference,
    "divergence": _divergence,
    "harness": _harness,
}


def _answered(run: Run, name: str, rows: list[Row]) -> list[Tokens]:
    """Prompts and given answers as tokens."""
    read = enumerate(_with_answers(name, rows), start=1)
    return [run.encode(name, number, *row) for number, row in read]


def _with_answers(name: str, rows: list[Row]) -> list[tuple[list[dict], str]]:
    """The rows' prompts as messages, and the answers given to them."""
    found = []
    for number, row in enumerate(rows, start=1):
        messages, answer = chat.as_messages(row, name=place(name, number))
        if answer is None:
            raise DataError(
                f"The measure `{name}` needs an answer in every row; row {number} has none. Its "
                f"fields are {sorted(row)}."
            )
        found.append((messages, answer))
    return found


def _prompts(name: str, rows: list[Row]) -> list[list[dict]]:
    """The rows' prompts as messages."""
    return [
        chat.as_messages(row, name=place(name, number))[0]
        for number, row in enumerate(rows, start=1)
    ]


def _questions(name: str, rows: list[Row], spec: MeasureSpec) -> list[Question]:
    """The rows' questions."""
    return [
        as_question(row, spec.style, name=place(name, number))
        for number, row in enumerate(rows, start=1)
    ]


def _groups(rows: list[Row], spec: MeasureSpec) -> list[str | None]:
    """The value of each row's grouping field, if there is one."""
    field = spec.by
    if field is None and spec.want == "answer":
        field = next((f for f in ("kind", "type") if any(f in row for row in rows)), None)
    if field is None:
        return [None] * len(rows)
    return [None if row.get(field) is None else str(row[field]) for row in rows]


def _context_window(model: Any) -> int:
    """Most tokens the model takes, as lm-evaluation-harness reads it from the configuration."""
    config = getattr(model, "config", None)
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 2048
