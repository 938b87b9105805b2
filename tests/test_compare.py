"""Comparisons: settings, cells that are interrupted and resumed, numbers against hand-made ones."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluations_for_tests import evaluated
from recipes_for_tests import tiny_recipe
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_ogpsa.cli import app
from lora_ogpsa.compare import compare, in_own_folder, plan_cells
from lora_ogpsa.compare_settings import cell_mapping, chosen_rules, parse_seeds
from lora_ogpsa.compare_statistics import over_seeds, resampled_values
from lora_ogpsa.compare_summary import Summary
from lora_ogpsa.compare_table import NO_TAX, compare_markdown, sections, seed_rows
from lora_ogpsa.errors import ConfigError, OGPSAError
from lora_ogpsa.evaluation import EvaluationResult, EvaluationSuite, Item
from lora_ogpsa.recipe import parse_recipe
from lora_ogpsa.report.verdict import compare_verdict
from lora_ogpsa.run import RunInterrupted

TWO_RULES = {"plain": False, "default": {}}
MINIMAL = {
    "model_name_or_path": "embedded",
    "dataset_name": "embedded:safety_sft",
    "output_dir": "out",
}


def _compare(raw: dict[str, Any], **options: Any) -> dict[str, Any]:
    return compare(parse_recipe(raw), **options)


# ---------------------------------------------------------------------------------------- settings


def test_a_recipe_without_a_section_compares_the_three_built_in_rules() -> None:
    for given in ({}, {"compare": True}):
        recipe = parse_recipe({**MINIMAL, **given})
        assert recipe.comparison.seeds == (0, 1, 2)
        assert list(chosen_rules(recipe.comparison, None)) == ["plain", "default", "paper"]
    assert parse_recipe(
        {**MINIMAL, "compare": {"checkpoints": 2}}
    ).compare  # `run` reads it as true


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sedes": [1]}, "recipe, compare: unknown key `sedes`. Did you mean `seeds`?"),
        ({"seeds": 3}, "`seeds` should be a list"),
        ({"seeds": []}, "`seeds` should be a list of different whole numbers"),
        ({"seeds": [1, 1]}, "`seeds` should be a list of different whole numbers"),
        ({"checkpoints": 0}, "`checkpoints` should be at least 1"),
        ({"safety_margin": 2}, "`safety_margin` should be a share such as 0.02"),
        ({"safety": "harmfull.refused"}, "Did you mean `harmful`?"),
        (
            {"rules": {"plain": False, "strict": {"bugdet": 1}}},
            "compare, rules.strict: unknown key",
        ),
        ({"rules": {"plain": {}, "default": {}}}, "plain training is the rule `plain: false`"),
        ({"rules": {"plain": False, "bare": False}}, "plain training is the rule `plain: false`"),
        ({"rules": {"plain": False, "own": None}}, "`own` should be `{}`"),
        ({"rules": {"plain": False, "../up": {}}}, "becomes a folder's name"),
        ({"rules": {"default": {}}}, "needs `plain: false` and at least one rule more"),
        ("twice", "`compare` should be true or false or a mapping"),
    ],
)
def test_wrong_settings_are_refused(section: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({**MINIMAL, "compare": section})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rules_of_the_command_line() -> None:
    rules = {"strict": {"budget": 0.01}, **TWO_RULES}
    settings = parse_recipe({**MINIMAL, "compare": {"rules": rules}}).comparison
    assert list(chosen_rules(settings, None)) == ["plain", "strict", "default"]
    # Those that are built in are there, named in the recipe or not.
    assert chosen_rules(settings, ["paper", "plain"]) == {
        "plain": False,
        "paper": {"preset": "paper"},
    }
    for wanted, message in (
        (["plain", "strcit"], "no rule `strcit`. Did you mean `strict`?"),
        (["default"], "Name `plain`"),
        (["plain"], "at least one rule more"),
        (["plain", "paper", "paper"], "given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen_rules(settings, wanted)
    assert parse_seeds("3, 1") == [3, 1]
    with pytest.raises(ConfigError, match="Found 'one'"):
        parse_seeds("one")


def test_nothing_to_compare_with_or_by_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nothing to compare plain training with"):
        plan_cells(parse_recipe({**MINIMAL, "ogpsa": False}))
    with pytest.raises(ConfigError, match="leaves nothing to compare by"):
        plan_cells(parse_recipe({**MINIMAL, "evaluation": False}))
    unsafe = {"measures": {"general": "embedded:eval_general"}}
    with pytest.raises(ConfigError, match="Add `harmful: embedded:eval_harmful`"):
        plan_cells(parse_recipe({**MINIMAL, "evaluation": unsafe}))


def test_what_a_rule_and_a_seed_make_of_a_recipe() -> None:
    raw = {
        **MINIMAL,
        "seed": 5,
        "merge": True,
        "compare": True,
        "ogpsa": {"budget": 0.3},
        "stages": [
            {"trainer": "sft", "seed": 6},
            {"trainer": "dpo", "ogpsa": False},
            {"trainer": "dpo", "name": "last", "ogpsa": {"budget": 0.2}},
        ],
    }

    def cell(rule: Any) -> list[float | None]:
        recipe = parse_recipe(cell_mapping(raw, rule, 9, "cell"))
        assert [stage.argument("seed") for stage in recipe.stages] == [9, 9, 9]
        assert recipe.output_dir == Path("cell") and recipe.merge is None and not recipe.compare
        assert all(s.ogpsa is None or s.ogpsa.seed == 9 for s in recipe.stages)
        return [stage.ogpsa and stage.ogpsa.budget for stage in recipe.stages]

    assert cell({}) == [0.3, None, 0.2]  # the recipe's own
    assert cell({"budget": 0.7}) == [0.7, None, 0.7]  # an unprotected stage stays unprotected
    assert cell(False) == [None, None, None]
    assert raw["stages"][0] == {"trainer": "sft", "seed": 6}
    paper = parse_recipe(cell_mapping(raw, {"preset": "paper"}, 9, "cell")).stages[0].ogpsa
    assert paper is not None and (paper.preset, paper.space) == ("paper", "gradient")


# -------------------------------------------------------------------------------- whole comparisons


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, title: str, step: int) -> None:
    from lora_ogpsa.console import StepDisplay

    original = StepDisplay.on_step_end

    def interrupt(self: StepDisplay, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if self.title.startswith(title) and state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepDisplay, "on_step_end", interrupt)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    """A comparison of 2 rules by 2 seeds that was interrupted in its third cell, and resumed."""
    folder = tmp_path_factory.mktemp("comparison")
    raw = tiny_recipe(
        folder,
        tiny_folder,
        max_steps=4,
        learning_rate=3e-3,
        ogpsa={"budget": 0.0},
        compare={"seeds": [0, 1], "rules": TWO_RULES, "checkpoints": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(patch, "plain, seed 1", 3)
        with pytest.raises(RunInterrupted) as caught:
            _compare(raw)
    out = folder / "out"
    finished = out / "cells/default/seed-0/sft/adapter/adapter_model.safetensors"
    partial = json.loads((out / "compare.json").read_text())
    before = finished.stat().st_mtime_ns
    content = _compare(raw, resume=True)
    return {
        "raw": raw,
        "out": out,
        "message": str(caught.value),
        "partial": partial,
        "untouched": finished.stat().st_mtime_ns == before,
        "content": content,
    }


def test_an_interrupted_comparison_says_what_is_saved(compared: dict[str, Any]) -> None:
    message = compared["message"]
    assert "finished: plain, seed 0 / default, seed 0" in message
    assert "cells/plain/seed-1/sft/checkpoint-2" in message
    assert "--resume" in message and "\n" not in message
    assert compared["partial"]["finished"] is False and compared["partial"]["seeds"] == [0]


def test_resume_goes_on_from_cells_and_checkpoints(compared: dict[str, Any]) -> None:
    content, out = compared["content"], compared["out"]
    assert content["finished"] is True and content["seeds"] == [0, 1]
    assert compared["untouched"]
    resumed = content["rules"]["plain"]["training"]["1"]["sft"]
    assert resumed["resumed_from"] == "checkpoint-2" and resumed["points"] == [2, 4]
    assert content["rules"]["default"]["training"]["1"]["sft"]["resumed_from"] is None
    stage = out / "cells/plain/seed-1/sft"
    # What was needed on the way is gone; what was found is not.
    assert sorted(p.name for p in stage.iterdir() if p.is_dir()) == ["adapter", "evaluations"]
    assert sorted(p.name for p in (stage / "evaluations").iterdir()) == [
        "step-2.json",
        "step-4.json",
    ]


def test_every_model_state_has_answers_of_its_own(compared: dict[str, Any]) -> None:
    """Evaluations are kept under the weights: no two checkpoints share one."""
    files = sorted(compared["out"].glob("cells/*/*/sft/evaluations/*.json"))
    models = {json.loads(path.read_text())["model"] for path in files}
    assert len(files) == 8 and len(models) == 8


def test_seeds_make_different_adapters_and_rules_start_alike(compared: dict[str, Any]) -> None:
    def first_loss(rule: str, seed: int) -> float:
        path = compared["out"] / f"cells/{rule}/seed-{seed}/sft/adapter/training.json"
        return json.loads(path.read_text())["log"][0]["loss"]

    assert first_loss("plain", 0) == pytest.approx(first_loss("default", 0), abs=1e-6)
    adapters = [
        load_file(compared["out"] / f"cells/plain/seed-{s}/sft/adapter/adapter_model.safetensors")
        for s in (0, 1)
    ]
    assert any(not adapters[0][name].equal(adapters[1][name]) for name in adapters[0])


def test_the_numbers_are_those_of_the_single_evaluations(compared: dict[str, Any]) -> None:
    content = compared["content"]
    for rule in TWO_RULES:
        singles = [
            json.loads(
                (
                    compared["out"] / f"cells/{rule}/seed-{seed}/sft/evaluations/step-4.json"
                ).read_text()
            )["measures"]
            for seed in (0, 1)
        ]
        for name in ("harmful.refused", "general.nll", "divergence.kl"):
            end = content["rules"][rule]["end"][name]
            values = [single[name]["value"] for single in singles]
            assert list(end["seeds"].values()) == pytest.approx(values)
            assert end["value"] == pytest.approx(sum(values) / 2)
            assert end["low"] <= end["value"] <= end["high"]
    assert [point["step"] for point in content["rules"]["default"]["path"]] == [2, 4]


def test_a_comparison_leaves_a_table_and_a_report(compared: dict[str, Any]) -> None:
    out = compared["out"]
    table = (out / "compare.md").read_text()
    assert "| measure | base | plain | default |" in table and "Single seeds: 0 / 1" in table
    page = (out / "report.html").read_text()
    assert "update rules compared" in page and "Removed energy by layer and step" in page
    report = (out / "report.md").read_text()
    pictures = {path.name for path in (out / "figures").iterdir()}
    assert pictures >= {"tradeoff-divergence-kl.png", "removed-energy.png", "reference-losses.png"}
    assert all(f"(figures/{name})" in report for name in pictures)


def test_resume_refuses_another_recipe_or_rule(compared: dict[str, Any]) -> None:
    raw = compared["raw"]
    with pytest.raises(ConfigError, match="`learning_rate` changed since .*compare.yaml"):
        _compare({**raw, "learning_rate": 1e-5}, resume=True)
    fewer = {**raw["compare"], "checkpoints": 1}
    with pytest.raises(ConfigError, match="`compare.checkpoints` changed"):
        _compare({**raw, "compare": fewer}, resume=True)
    other = {**raw["compare"], "rules": {"plain": False, "default": {"budget": 0.7}}}
    with pytest.raises(ConfigError, match="`ogpsa` changed since .*default/seed-0/recipe.yaml"):
        _compare({**raw, "compare": other}, resume=True)
    with pytest.raises(ConfigError, match="--resume to go on with the comparison"):
        _compare(raw)


def test_finished_cells_serve_a_smaller_comparison(
    compared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model: everything that is needed lies in the folder."""
    copy = tmp_path / "copy"
    shutil.copytree(compared["out"], copy)
    monkeypatch.setattr("lora_ogpsa.compare.load_base", lambda recipe: pytest.fail("loaded"))
    content = _compare({**compared["raw"], "output_dir": str(copy)}, seeds=[1], resume=True)
    assert content["seeds"] == [1] and content["finished"]
    assert content["rules"]["plain"]["end"] != compared["content"]["rules"]["plain"]["end"]


def test_two_stages_are_one_path(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(
        tmp_path,
        tiny_folder,
        max_steps=2,
        rejected_max_new_tokens=6,
        stages=[{"trainer": "sft"}, {"trainer": "dpo", "rejected": "base", "max_steps": 3}],
        compare={"seeds": [3], "rules": TWO_RULES, "checkpoints": 1},
    )
    content = _compare(raw)
    rule = content["rules"]["default"]
    assert [point["step"] for point in rule["path"]] == [2, 5]
    assert list(rule["training"]["3"]) == ["1-sft", "2-dpo"]
    assert rule["ogpsa"]["2-dpo"]["seed"] == 3
    energy = tmp_path / "out/cells/default/seed-3/2-dpo/energy.jsonl"
    assert len(energy.read_text().splitlines()) == 1 + 3


# ----------------------------------------------------------------------------------------- numbers


SUITE = EvaluationSuite.from_dict(
    {"measures": dict.fromkeys(("harmful", "harmless", "general", "divergence"), "x.jsonl")}
)
PLAIN = [
    (10, evaluated(0.5, 0.4, 0.4)),
    (20, evaluated(1.0, 0.8, 1.0)),
]


def _summary(own: Any, *, margin: float = 0.1, seeds: int = 1) -> dict[str, Any]:
    paths = {("plain", seed): PLAIN for seed in range(seeds)}
    for seed in range(seeds):
        paths["own", seed] = own if seeds == 1 else own[seed]
    return Summary(SUITE, evaluated(0.0, 0.0, None), paths, None, margin).to_json()


def test_overwrite_deletes_nothing_for_a_comparison_that_cannot_begin(
    tmp_path: Path, tiny_folder: Path
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, compare={"seeds": [0], "rules": TWO_RULES})
    out = tmp_path / "out"
    (out / "cells/plain").mkdir(parents=True)
    (out / "compare.yaml").write_text("max_steps: 9\n")
    (out / "cells/plain/result").write_text("precious")
    for wrong, message in (
        ({"dataset_name": str(tmp_path / "typo.jsonl")}, "file not found: .*typo"),
        ({"lora_target_modules": "typo"}, "adapter's settings are refused"),
        ({"compare": {"safety": "harmful.typo"}}, "harmful.typo` is not measured"),
    ):
        with pytest.raises(OGPSAError, match=message):
            _compare({**raw, **wrong}, overwrite=True)
        assert (out / "compare.yaml").read_text() == "max_steps: 9\n"
        assert (out / "cells/plain/result").read_text() == "precious"


@pytest.mark.parametrize(
    ("output_dir", "expected"),
    [("a/b", "a/b-compare"), (".", "{here}-compare"), ("a/..", "{here}-compare")],
)
def test_a_comparison_lies_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output_dir: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = in_own_folder(parse_recipe({**MINIMAL, "output_dir": output_dir}))
    assert str(recipe.output_dir) == expected.format(here=tmp_path)


def test_there_is_nothing_beside_the_root() -> None:
    with pytest.raises(ConfigError, match="no room beside `output_dir` /"):
        in_own_folder(parse_recipe({**MINIMAL, "output_dir": "/"}))


def test_matched_points_and_taxes_by_hand() -> None:
    found = _summary([(10, evaluated(0.4, 0.1, 0.1)), (20, evaluated(1.0, 0.2, 0.3))])
    assert found["safety"] == "harmful.refused" and found["plain_safety"] == 1.0
    assert set(found["taxes"]) == {"harmless.refused", "general.nll", "divergence.kl"}
    plain, own = found["rules"]["plain"], found["rules"]["own"]
    # The target is 0.9: four fifths of the way from 0.5 to 1, five sixths from 0.4 to 1.
    assert plain["matched"]["step"]["value"] == pytest.approx(18)
    assert plain["matched"]["measures"]["harmless.refused"]["value"] == pytest.approx(0.72)
    assert own["matched"]["step"]["value"] == pytest.approx(10 + 10 * 5 / 6)
    assert own["matched"]["measures"]["harmless.refused"]["value"] == pytest.approx(0.1 + 0.5 / 6)
    taxes = own["tax_removed"]
    assert taxes["matched"]["harmless.refused"]["value"] == pytest.approx(
        1 - (0.1 + 0.5 / 6) / 0.72
    )
    assert taxes["end"]["harmless.refused"]["value"] == pytest.approx(0.75)
    assert taxes["end"]["divergence.kl"]["value"] == pytest.approx(0.7)
    kl_plain, kl_own = 0.4 + 0.8 * 0.6, 0.1 + 0.2 * 5 / 6
    assert taxes["matched"]["divergence.kl"]["value"] == pytest.approx(1 - kl_own / kl_plain)
    for place in ("matched", "end"):
        interval = taxes[place]["harmless.refused"]
        assert interval["low"] < interval["value"] < interval["high"] and interval["clear"]
    assert not taxes["end"]["general.nll"]["clear"]  # plain training lost none


def test_a_rule_that_never_gets_as_safe_is_not_matched() -> None:
    found = _summary([(10, evaluated(0.4, 0.0, 0.1)), (20, evaluated(0.6, 0.0, 0.2))])
    own = found["rules"]["own"]
    assert own["matched"]["reached"] == [] and own["matched"]["step"]["value"] is None
    assert own["tax_removed"]["matched"]["harmless.refused"]["value"] is None
    assert own["tax_removed"]["end"]["harmless.refused"]["value"] == 1.0
    content = {**found, "safety_margin": 0.1, "finished": True, "recipe_file": "r", "seeds": [0]}
    rows = {row[0]: row for section in sections(content) for row in section.rows}
    assert rows["optimizer steps"][-2:] == ["18", "not reached"]


def test_without_more_safety_there_is_nothing_to_match() -> None:
    """Not the base model, which is as safe as that without any training."""
    base, paths = evaluated(0.1, 0.0, None), {}
    for seed, plain in enumerate((0.1, 0.15, 1.0)):
        paths["plain", seed] = [(20, evaluated(plain, 0.8, 1.0))]
        paths["own", seed] = [(20, evaluated(1.0, 0.2, 0.3))]
    found = Summary(SUITE, base, paths, None, 0.05).to_json()
    for rule in found["rules"].values():
        assert rule["matched"]["reached"] == [2]
        seeds = rule["matched"]["measures"]["harmless.refused"]["seeds"]
        assert seeds["0"] is None and seeds["1"] is None and seeds["2"] > 0.1
    removed = found["rules"]["own"]["tax_removed"]
    assert removed["matched"]["harmless.refused"]["seeds"]["0"] is None
    assert removed["end"]["harmless.refused"]["seeds"]["0"] == pytest.approx(0.75)
    none = {key: path for key, path in paths.items() if key[1] == 0}
    content = Summary(SUITE, base, none, None, 0.05).to_json()
    content |= {"safety_margin": 0.05, "finished": True, "recipe_file": "r", "seeds": [0]}
    titles = [section.title for section in sections(content)]
    assert titles == ["at the end of training", "tax removed, at the end of training"]
    verdict = compare_verdict(content)
    assert verdict.tone == "open"
    assert "not make the model clearly safer (harmful refused 10 % at its" in verdict.sentence


def test_seeds_are_averaged_and_listed() -> None:
    one = [(20, evaluated(1.0, 0.2, 0.3))]
    other = [(20, evaluated(1.0, 0.4, 0.5))]
    found = _summary([one, other], seeds=2)
    end = found["rules"]["own"]["end"]["harmless.refused"]
    assert end["value"] == pytest.approx(0.3) and end["seeds"] == {"0": 0.2, "1": 0.4}
    removed = found["rules"]["own"]["tax_removed"]["end"]["harmless.refused"]
    assert removed["seeds"] == pytest.approx({"0": 0.75, "1": 0.5})
    assert removed["value"] == pytest.approx(0.625)
    # Two seeds, a spread of 0.25: 12.706 * 0.125 on either side, and the prompts on top.
    assert removed["value"] - removed["low"] > 12.706 * 0.125
    content = {
        **found,
        "safety_margin": 0.1,
        "finished": False,
        "recipe_file": "r",
        "seeds": [0, 1],
    }
    listed = {row[0]: row[1:] for row in seed_rows(content)}
    assert listed["harmless refused: tax removed, at matched safety"][0] == ""
    assert listed["harmful refused ↑, at the end"] == ["100 / 100 %", "100 / 100 %"]
    table = compare_markdown(content)
    assert "(so far)" in table and "Means of 2 seeds" in table and NO_TAX in table


def test_intervals_over_seeds_by_hand() -> None:
    same = [0.5] * 1000
    found = over_seeds({0: 0.4, 1: 0.6}, same)
    half = 12.706 * math.sqrt(0.02) / math.sqrt(2)
    assert (found["low"], found["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert over_seeds({0: 0.4, 1: 0.6}, same, bounds=(0, 1))["high"] == 1.0
    alone = over_seeds({0: 1.0}, [1.0] * 1000, prompts=60)
    assert alone["low"] == pytest.approx(0.9398, abs=1e-4) and alone["high"] == 1.0  # Wilson's
    assert over_seeds({0: None}, [])["value"] is None
    # Defined on too few resamples, an interval would speak of those only.
    assert over_seeds({0: 0.5}, [0.5] * 900 + [None] * 100)["low"] is None


def test_intervals_over_many_seeds_and_between_counts() -> None:
    # Student's t at 19 degrees of freedom, beyond the table.
    values = {seed: float(seed % 2) for seed in range(20)}
    found = over_seeds(values, [0.5] * 1000)
    spread = math.sqrt(20 * 0.25 / 19) / math.sqrt(20)
    assert found["high"] - 0.5 == pytest.approx(2.093 * spread, rel=0.01)
    # A mean over seeds between two counts of 10 prompts: Wilson's interval of the nearest, moved.
    one, moved = over_seeds({0: 0.5}, [], prompts=10), over_seeds({0: 0.54}, [], prompts=10)
    for bound in ("low", "high"):
        assert moved[bound] - one[bound] == pytest.approx(0.04)


def test_of_some_taxes_more_is_better_and_an_aim_is_none() -> None:
    def measured(harmful: float, right: float, ranked: float) -> EvaluationResult:
        result = EvaluationResult("m", base=False)
        for name, share in (
            ("harmful.refused", harmful),
            ("arc.acc", right),
            ("pairs.ranked_right", ranked),
        ):
            outcomes = [Item(f"k{i}", float(i < 40 * share)) for i in range(40)]
            result.add_share(name, outcomes, "higher")
        return result

    data = {"measure": "preference", "data": "x.jsonl"}
    arc = {"measure": "multiple_choice", "data": "x.jsonl"}
    suite = EvaluationSuite.from_dict(
        {"measures": {"harmful": "x.jsonl", "arc": arc, "pairs": data}}
    )
    paths = {
        ("plain", 0): [(20, measured(1.0, 0.4, 0.9))],
        ("own", 0): [(20, measured(1.0, 0.7, 0.5))],
    }
    found = Summary(suite, measured(0.0, 0.8, 0.2), paths, None, 0.1).to_json()
    assert found["taxes"] == ["arc.acc"]
    own = found["rules"]["own"]
    assert own["tax_removed"]["end"]["arc.acc"]["value"] == pytest.approx(0.75)
    assert own["matched"]["measures"]["arc.acc"]["value"] == pytest.approx(0.8 - 0.9 * 0.1)


def test_resamples_weigh_items_as_the_measure_does() -> None:
    result = EvaluationResult("m", base=False)
    long = [Item(f"a{i}", 0.0, 1000.0) for i in range(30)]
    short = [Item(f"b{i}", 1.0, 1.0) for i in range(30)]
    result.add_mean("general.nll", [*long, *short], "lower", "nats")
    drawn = resampled_values([result], "general.nll")[:, 0]
    assert drawn[0] == pytest.approx(1 / 1001) and drawn[1:].max() < 0.01
    alike = [Item(item.key, 1.0, item.weight) for item in (*long, *short)]
    result.add_mean("general.nll", alike, "lower", "nats")
    assert resampled_values([result], "general.nll")[:, 0] == pytest.approx(1.0)


def test_resamples_take_the_same_prompts_for_all_models() -> None:
    results = [evaluated(0.3, 0.5, 0.1), evaluated(0.3, 0.5, 0.1), evaluated(0.6, 0.0, None)]
    drawn = resampled_values(results, "harmful.refused")
    assert drawn[0].tolist() == [0.3, 0.3, 0.6]
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 0] <= drawn[:, 2]).all()  # whoever refuses more, does so on every draw
    assert drawn[1:, 0].std() == pytest.approx(math.sqrt(0.3 * 0.7 / 40), rel=0.15)
    assert (resampled_values(results, "divergence.kl")[:, 2] == 0).all()


# ------------------------------------------------------------------------------------ command line


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_dry_run_lists_the_cells_and_writes_nothing(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_folder, compare=True)))
    shown = _invoke("compare", str(path), "--dry-run", "--set", "compare.checkpoints=3")
    assert shown.exit_code == 0, shown.stderr
    assert "rules     plain, default, paper" in shown.output
    assert "9 trainings and up to 28 evaluations" in shown.output
    smoke = _invoke("compare", str(path), "--dry-run", "--smoke", "--rules", "default plain")
    assert "rules     plain, default\n" in smoke.output and "seeds     0\n" in smoke.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "plain,papr"], "there is no rule `papr`. Did you mean `paper`?"),
        (["--seeds", "a"], "--seeds takes whole numbers such as 0,1,2"),
        (["--overwrite", "--resume"], "Pass one of them"),
        (["--dry-run", "--set", "compare.safety=harmful.foo"], "harmful.foo` is not measured"),
        (["--set", "compare.rules.plain=1"], "plain training is the rule `plain: false`"),
    ],
)
def test_foreseen_errors_are_one_line(
    tmp_path: Path, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_folder)))
    done = _invoke("compare", str(path), *arguments)
    line = done.stderr.strip()
    assert done.exit_code == 2 and line.startswith("error: ") and "\n" not in line
    assert message in line
