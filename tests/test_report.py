"""The report: verdicts, a page that is well-formed and safe, and whatever happens to be missing."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluations_for_tests import evaluated
from recipes_for_tests import tiny_recipe
from rich.console import Console
from typer.testing import CliRunner

from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.cli import app
from lora_ogpsa.compare_summary import Summary
from lora_ogpsa.compare_table import compare_markdown, compare_table
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation import EvaluationSuite
from lora_ogpsa.report import write_report
from lora_ogpsa.report.verdict import compare_verdict, cost_sentence, run_verdict
from lora_ogpsa.results import results_markdown, results_table
from lora_ogpsa.steplogs import StepLogs
from lora_ogpsa.training_record import StepRecorder, point_steps, read_energy

HOSTILE = "<script>alert(1)</script> ![x](http://evil.example/x.png) </details> `code` $x$"
TAXES = ["harmless.refused", "general.nll", "divergence.kl"]
BASE = evaluated(0.0, 0.0, None)
PLAIN = evaluated(1.0, 1.0, 0.8, nll=2.1)


# ---------------------------------------------------------------------------------------- verdicts


def _verdict(own: Any, plain: Any = PLAIN, base: Any = BASE) -> tuple[str, str]:
    found = run_verdict(base, plain, own, "harmful.refused", TAXES)
    assert "\n" not in found.sentence
    return found.tone, found.sentence


def test_helped() -> None:
    tone, sentence = _verdict(evaluated(1.0, 0.4, 0.2, nll=2.1))
    assert tone == "good" and sentence.startswith("OGPSA helped: ")
    assert "harmless refused 40 % instead of 100 % (-60 points [" in sentence
    assert "KL from base 0.200 instead of 0.800" in sentence
    assert "Within chance: harmful refused 100 % instead of 100 %" in sentence


def test_helped_at_a_cost() -> None:
    tone, sentence = _verdict(evaluated(0.6, 0.4, 0.2))
    assert tone == "mixed" and sentence.startswith("OGPSA helped, at a cost: ")
    assert "; but harmful refused 60 % instead of 100 % (-40 points" in sentence


def test_did_not_help() -> None:
    tone, sentence = _verdict(evaluated(1.0, 1.0, 1.2, nll=2.4))
    assert tone == "bad" and sentence.startswith("OGPSA did not help: ")
    assert "general NLL 2.400 instead of 2.100" in sentence and "nothing clearly better" in sentence


def test_overlapping_intervals_are_no_difference() -> None:
    plain = evaluated(0.95, 0.5, 0.8)
    tone, sentence = _verdict(evaluated(0.975, 0.475, 0.8), plain)
    assert tone == "open" and sentence.startswith("No clear difference")
    assert "helped" not in sentence and "harmless refused 48 % instead of 50 %" in sentence


def test_missing_parts_make_no_verdict() -> None:
    tone, sentence = _verdict(evaluated(1.0, 0.4, 0.2), plain=None)
    assert tone == "open" and "cannot be said" in sentence and "`compare: true`" in sentence
    assert "harmless refused 40 % (base 0 %)" in sentence
    assert "OGPSA was off" in _verdict(None)[1]
    assert "Nothing was measured" in _verdict(None, plain=None)[1]


def test_cost_in_time() -> None:
    seconds = {"training": 80.0, "reference_passes": 18.0, "projection": 2.0, "preparation": 9.0}
    assert cost_sentence(seconds) == (
        "The reference passes took 18 % of the training time and the projection 2 %."
    )
    assert cost_sentence({"training": 80.0, "reference_passes": 0.0}) == ""


def _comparison(low: float | None, high: float | None, **changes: Any) -> dict[str, Any]:
    value = None if low is None or high is None else (low + high) / 2
    tax = {"value": value, "low": low, "high": high, "clear": True, **changes}
    reached = {"reached": [0], "step": {"value": 20.0, "seeds": {"0": 20.0}}}
    rule = {"matched": reached, "tax_removed": {"matched": {"harmless.refused": tax}}}
    return {
        "rules": {"plain": {"matched": {"reached": [0], "step": {"value": 10.0}}}, "default": rule},
        "safety": "harmful.refused",
        "plain_safety": 1.0,
        "safety_margin": 0.02,
        "taxes": ["harmless.refused"],
        "measures": {"harmful.refused": {"unit": "share"}},
        "seeds": [0, 1],
    }


@pytest.mark.parametrize(
    ("content", "tone", "words"),
    [
        (_comparison(0.4, 0.8), "good", "helped: it removed 60 % [40, 80] of the tax in harmless"),
        (_comparison(-0.8, -0.2), "bad", "did not help: it paid 50 % [20, 80] of the tax"),
        (
            _comparison(-0.2, 0.6),
            "open",
            "made no clear difference in harmless refused (+20 % [-20",
        ),
        (_comparison(None, None), "open", "made no clear difference in harmless refused"),
        (_comparison(0.4, 0.8, clear=False), "open", "had nothing to remove"),
        ({"rules": {}, "seeds": []}, "open", "Nothing can be said yet"),
    ],
)
def test_verdicts_of_comparisons(content: dict[str, Any], tone: str, words: str) -> None:
    found = compare_verdict(content)
    assert found.tone == tone and words in found.sentence
    if "removed" in words:
        assert found.sentence.startswith("At matched safety (harmful refused at 98 %), `default`")
        assert "after 20 optimizer steps (plain training: 10)" in found.sentence


def test_verdict_on_a_rule_that_never_got_there_and_on_one_seed() -> None:
    content = _comparison(None, None)
    content["seeds"] = [0]
    rule = content["rules"]["default"]
    rule["matched"]["reached"] = []
    rule["end"] = {"harmful.refused": {"value": 0.9}}
    end = {"value": 0.5, "low": 0.2, "high": 0.7, "clear": True}
    rule["tax_removed"]["end"] = {"harmless.refused": end}
    found = compare_verdict(content)
    assert found.tone == "open" and "`default` cannot be judged: it never became" in found.sentence
    assert "(at its end 90 %, where it had removed 50 % [20, 70] of the tax in" in found.sentence
    assert "One seed is one seed" in found.sentence


# ---------------------------------------------------------------------------------------- the page


class _Page(HTMLParser):
    """Checks that tags close in order, and collects what tests ask for."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.folded = ""
        self.shown = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if "details" in self.open:
            self.folded += data
        else:
            self.shown += data


def _write_run(folder: Path, *, logs: bool = True, **evaluations: Any) -> Path:
    """A run's folder as `lora-ogpsa run` leaves it, without a model."""
    raw = tiny_recipe(folder, Path("model"), compare=True, ogpsa={"budget": 0.1})
    out = folder / "out"
    (out / "runs").mkdir(parents=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(raw))
    for name, result in evaluations.items():
        result.save(out / "evaluations" / f"{name.replace('_', '-')}.json")
    for arm in ("ogpsa", "plain") if logs else ():
        stage = out / "runs" / arm / "sft"
        (stage / "adapter").mkdir(parents=True)
        log = [
            {
                "step": s,
                "loss": 2.0 / s,
                "ogpsa/excess/$own$": 0.01 * s,
                "ogpsa/captured_energy": 0.5,
            }
            for s in (1, 2, 3)
        ]
        if arm == "plain":
            log = [{"step": 1, "loss": 2.0}]
        record = {
            "steps": 3,
            "seconds": {"training": 6.0, "reference_passes": 1.0, "projection": 0.5},
            "peak_bytes": {"process": 2_000_000_000},
            "log": log,
        }
        (stage / "adapter" / "training.json").write_text(json.dumps(record))
    if logs:
        facts = {"ogpsa": {"constraint": "budget", "budget": 0.1}}
        (out / "runs/ogpsa/sft/adapter/ogpsa_run.json").write_text(json.dumps(facts))
        rows: list[dict[str, Any]] = [{"layers": ["0", "1"]}]
        rows += [{"step": s, "removed": [0.1 * s, 0.2 * s]} for s in (1, 2, 3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "runs/ogpsa/sft/energy.jsonl").write_text(lines)
    return out


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = _write_run(
        tmp_path_factory.mktemp("reported"),
        base=BASE,
        plain_sft=PLAIN,
        ogpsa_sft=evaluated(0.95, 0.4, 0.2, answer=HOSTILE),
    )
    return write_report(out).parent


def test_the_page_is_well_formed_and_readable_by_machines(reported: Path) -> None:
    page = _Page((reported / "report.html").read_text())
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids)) > 20  # those of the pictures do not meet
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)  # no level is skipped
    images = [a for tag, a in page.tags if a.get("role") == "img"]
    assert len(images) == 6 and all(len(a["aria-label"] or "") > 40 for a in images)
    assert ("html", {"lang": "en"}) in page.tags


def test_the_page_says_what_happened(reported: Path) -> None:
    shown = _Page((reported / "report.html").read_text()).shown.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "OGPSA helped: harmless refused 40 % instead of 100 %",
        "The reference passes took 13 % of the training time and the projection 7 %",
        "Removed energy by layer and step",
        "Reference losses",
        "Captured energy",
        "memory of the process at its peak",
        "2.00 GB",
        "OGPSA minus plain training, paired by prompt",
        "torch 2.",
    ):
        assert words in shown, words
    assert "budget 0.1" in shown  # the line in the picture; its letters are letters


def test_the_page_loads_nothing(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    page = _Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    assert "@import" not in text
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_answers_cannot_act_on_the_page(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<img" not in text
    markdown = (reported / "report.md").read_text()
    assert "<script" not in markdown and "![x](" not in markdown
    assert markdown.count("</details>") == markdown.count("<details>") == 1


def test_harmful_prompts_are_folded_away(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    page = _Page(text)
    assert "harmful prompt 0" in page.folded and "harmful prompt" not in page.shown
    assert "harmless prompt 0" in page.shown
    assert not any(tag == "details" and "open" in a for tag, a in page.tags)
    markdown = (reported / "report.md").read_text()
    before, _, rest = markdown.partition("<details>")
    inside, _, after = rest.partition("</details>")
    assert "harmful prompt 0" in inside
    assert "harmful prompt" not in before and "harmful prompt" not in after


def test_the_markdown_has_the_same_and_its_pictures_exist(reported: Path) -> None:
    markdown = (reported / "report.md").read_text()
    named = re.findall(r"\]\(figures/([\w-]+\.png)\)", markdown)
    there = sorted(path.name for path in (reported / "figures").iterdir())
    assert sorted(named) == there and len(there) == 6
    assert all((reported / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in named)
    assert "OGPSA helped: harmless refused 40 % instead of 100 %" in markdown
    assert "| harmful refused ↑ | 40 | 0 % [0, 9] | 100 % [91, 100] | 95 % [83, 99] |" in markdown


def test_the_dark_and_the_narrow_are_thought_of(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "currentColor" in text and "#24292f" not in text  # the pictures' ink is the page's
    tables = [tag for tag, _ in _Page(text).tags if tag == "table"]
    assert len(tables) == text.count('<div class="scroll"') > 2


def test_missing_parts_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    bare = write_report(_write_run(tmp_path / "bare", logs=False)).read_text()
    shown = _Page(bare).shown
    for words in (
        "Nothing was measured",
        "there is no trade-off to show",
        "No answers were generated",
        "No training with OGPSA is recorded here",
        "No training is finished yet",
    ):
        assert words in shown, words
    half = _write_run(tmp_path / "half", base=BASE, ogpsa_sft=evaluated(0.9, 0.2, 0.2))
    (half / "runs/ogpsa/sft/energy.jsonl").unlink()
    shown = _Page(write_report(half).read_text()).shown
    assert "cannot be said, because there is no plain training" in shown
    assert "Removed energy by layer and step" not in shown and "Reference losses" in shown


def test_the_command_writes_it_again_and_says_where_it_cannot(
    reported: Path, tmp_path: Path
) -> None:
    (reported / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(reported)])
    assert done.exit_code == 0 and (reported / "report.html").is_file()
    wrong = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert wrong.exit_code == 2 and "is not the output folder of" in wrong.stderr
    (tmp_path / "compare.yaml").write_text("{}")
    with pytest.raises(DataError, match="no part is finished"):
        write_report(tmp_path)


@pytest.mark.parametrize("damaged", [b"max_steps: [1", b"\xff\xfe"])
def test_a_damaged_recipe_is_named_in_a_line(tmp_path: Path, damaged: bytes) -> None:
    run = _write_run(tmp_path, base=BASE)
    (run / "recipe.yaml").write_bytes(damaged)
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    (comparison / "compare.yaml").write_bytes(damaged)
    (comparison / "compare.json").write_text('{"rules": {}}')
    for folder, file in ((run, "recipe.yaml"), (comparison, "compare.yaml")):
        done = CliRunner().invoke(app, ["report", str(folder)])
        line = done.stderr.strip()
        assert done.exit_code == 2 and line.startswith(f"error: {folder / file}"), line
        assert "\n" not in line


def test_a_folder_with_a_recipe_alone_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path, Path("model"))))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/mine.png").write_text("precious")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "is not the output folder of" in done.stderr
    assert (tmp_path / "figures/mine.png").read_text() == "precious"
    assert not (tmp_path / "report.html").exists()


# ------------------------------------------------------------------------------- what it is made of


def test_names_from_data_and_folders_format_nothing_in_tables() -> None:
    base, own = evaluated(0.1, 0.1, None), evaluated(0.9, 0.5, 0.1)
    for result in (base, own):
        for kind in ("[/b]", "[wiki]", "a|b"):
            items = result.items["harmless.refused"]
            result.add_share(f"harmless.refused.{kind}", items, "lower")
    shown = Console(file=io.StringIO(), width=120)
    shown.print(results_table({"base": base, "adapter[v2]": own}))
    suite = EvaluationSuite(dict.fromkeys(("harmful", "harmless", "general", "divergence"), "x"))
    paths = {("plain", 0): [(1, own)], ("default", 0): [(1, own)]}
    content = Summary(suite, base, paths, None, 0.02).to_json()
    content |= {"recipe_file": "r", "finished": True, "seeds": [0], "safety_margin": 0.02}
    shown.print(compare_table(content))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "adapter[v2]" in text
    assert text.count("harmless.refused.[/b]") > 1 and text.count("harmless.refused.[wiki]") > 1
    for page in (results_markdown({"base": base, "own": own}), compare_markdown(content)):
        row = next(line for line in page.splitlines() if "harmless.refused.a" in line)
        assert "a\\|b" in row and row.replace("\\|", "").count("|") == 5


def test_removed_energy_by_layer_is_that_of_its_parameters(tiny_peft: Any) -> None:
    space = AdapterSpace.from_model(tiny_peft(warm=True))
    step, fix = torch.randn(space.size), torch.randn(space.size)
    logs = StepLogs()
    logs.removed(fix, step)  # before anybody watches, nothing is kept by layer
    logs.watch_layers(space)
    logs.removed(fix, step)
    logs.removed(0 * fix, step)
    layers, shares = logs.pop_layers()
    assert layers == ["0", "1"] and len(shares) == 2
    for layer, found in zip(layers, shares[0], strict=True):
        spans = [s for name, s in space.spans().items() if f"layers.{layer}." in name]
        changed = sum(float(fix[a:b].square().sum()) for a, b in spans)
        whole = sum(float(step[a:b].square().sum()) for a, b in spans)
        assert found == pytest.approx(changed / whole, rel=1e-5)
    assert shares[1] == [0.0, 0.0]
    assert logs.pop_layers().shares == []
    assert logs.pop()["removed_energy"] > 0


def test_points_are_evenly_spaced_and_end_at_the_end() -> None:
    assert point_steps(50, 4) == [12, 25, 38, 50]
    assert point_steps(2, 4) == [1, 2]
    assert point_steps(7, 1) == [7]


def test_energy_survives_a_torn_line_and_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "energy.jsonl"
    lines = [{"layers": ["0"]}, *({"step": s, "removed": [s / 10]} for s in (1, 2, 3))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "rem')
    assert read_energy(path) == (["0"], [1, 2, 3], [[0.1], [0.2], [0.3]])
    StepRecorder(tmp_path, None)._keep_rows(2)
    assert read_energy(path) == (["0"], [1, 2], [[0.1], [0.2]])
    StepRecorder(tmp_path, None)._keep_rows(0)
    assert not path.exists()
