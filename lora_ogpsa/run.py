"""A run of a recipe: evaluate, train, evaluate, merge, report; every part on disk when done."""

from __future__ import annotations

import gc
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ogpsa.checkpoints import last_checkpoint
from lora_ogpsa.checks import check_adapters, check_arguments, check_data, check_hub
from lora_ogpsa.console import err, out, say
from lora_ogpsa.evaluation import EvaluationResult, evaluate
from lora_ogpsa.export import export_merged, write_model_card
from lora_ogpsa.export.folder import staged_folder
from lora_ogpsa.export.pipeline import REPORT_JSON
from lora_ogpsa.export.quantisation import RUN_FILE
from lora_ogpsa.measure import recipe_suite
from lora_ogpsa.output_folder import RECIPE_FILE, OutputFolder
from lora_ogpsa.quiet import quiet_libraries
from lora_ogpsa.recipe import Recipe, Stage
from lora_ogpsa.report import HTML_FILE, REPORT_FILES, write_report
from lora_ogpsa.results import (
    ARM_TITLES,
    card_evaluation,
    column_title,
    results_table,
    sample_answers,
    save_result,
)
from lora_ogpsa.run_record import columns_of, merge_line, results_json, results_page
from lora_ogpsa.stage_data import checked_rows
from lora_ogpsa.stages import (
    TRAINING_FILE,
    Trained,
    load_base,
    load_trained,
    read_record,
    train_stage,
    write_json,
    write_text,
)

# Everything a run puts into its folder, and all that --overwrite deletes.
_OWN = (
    RECIPE_FILE,
    "runs",
    "evaluations",
    "adapter",
    "merged",
    "results.json",
    "results.md",
    *REPORT_FILES,
)


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says what is saved and how to go on."""


def run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Do what a recipe says.

    Args:
        recipe: the recipe.
        overwrite: delete what an earlier run left in the output folder.
        resume: go on where an earlier run of the same recipe stopped.

    Returns:
        The content of ``results.json``.

    Raises:
        OGPSAError: something in the recipe, the data, the model or the training cannot work.
        RunInterrupted: on Ctrl-C.
    """
    quiet_libraries()
    work = _Run(recipe, overwrite=overwrite, resume=resume)
    try:
        return work.execute()
    except KeyboardInterrupt:
        if not work.output.claimed:
            raise
        raise RunInterrupted(work.interrupted()) from None


class _Run:
    """The parts of one run and where they lie."""

    def __init__(self, recipe: Recipe, *, overwrite: bool, resume: bool) -> None:
        self.recipe = recipe
        self.folder = recipe.output_dir
        self.output = OutputFolder(
            self.folder,
            recipe.raw,
            marker=RECIPE_FILE,
            own=_OWN,
            what="run",
            overwrite=overwrite,
            resume=resume,
            relevant=self._fixed,
        )
        self.results: dict[str, EvaluationResult] = {}
        self.resume = resume
        self._base: tuple[Any, Any] | None = None
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._began = time.monotonic()
        self._step = 0
        self._merge_seconds: float | None = None

    # ------------------------------------------------------------------ before and after

    def _fixed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What of a recipe has to stay the same between a run and its resumption.

        That is all but the merge and the stages that have trained nothing yet: a later stage that
        did not fit into memory should not cost the earlier ones.
        """
        fixed = {key: value for key, value in raw.items() if key != "merge"}
        stages = fixed.get("stages")
        if isinstance(stages, list) and not (self.folder / "adapter").is_dir():
            fixed["stages"] = stages[: self._begun()]
        return fixed

    def _begun(self) -> int:
        """How many stages have trained something that is kept, in the arm that got farthest.

        Told from the folder alone, because the recipe at hand may name its stages otherwise.
        """
        kept = Counter(
            stage.parent
            for stage in self.folder.glob("runs/*/*")
            if (stage / "adapter").is_dir() or last_checkpoint(stage) is not None
        )
        return max(kept.values(), default=0)

    def interrupted(self) -> str:
        """What is saved, in one line."""
        saved = [f"the evaluation of {part}" for part in self.results]
        for arm in self.recipe.arms:
            for stage in self.recipe.stages:
                folder = self._stage_folder(arm, stage.name)
                checkpoint = last_checkpoint(folder)
                if (folder / "adapter").is_dir():
                    saved.append(f"the adapter {folder / 'adapter'}")
                elif checkpoint is not None:
                    saved.append(str(checkpoint))
        what = ", ".join(saved) if saved else "nothing yet"
        return (
            f"interrupted. Saved in {self.folder}: {what}. The same command with --resume goes on "
            "from there."
        )

    # ------------------------------------------------------------------ the parts

    def execute(self) -> dict[str, Any]:
        """Every part that is not there yet, in order."""
        stages = self.recipe.stages
        self.output.check()
        self._check()
        self.output.claim()
        if self.recipe.evaluation is not None:
            self._evaluate("base", None, None)
        for arm in self.recipe.arms:
            previous: Path | None = None
            for stage in stages:
                folder = self._stage_folder(arm, stage.name)
                trained = self._train(arm, stage, folder, previous)
                previous = folder / "adapter"
                if self.recipe.evaluation is not None:
                    self._evaluate(f"{arm}/{stage.name}", trained, previous)
                del trained
                gc.collect()
            if arm == self.recipe.arms[0] and previous is not None:
                self._publish(previous, f"{arm}/{stages[-1].name}")
        if self.recipe.merge is not None:
            self._merge_or_report()
        content = self._report(finished=True)
        write_report(self.folder)
        self._print(content)
        return content

    def _check(self) -> None:
        """Try settings and data of all parts: what is wrong should show before hours of work."""
        check_arguments(self.recipe)
        check_hub(self.recipe)
        self._base = self._fresh_base()
        model, tokenizer = self._base
        check_adapters(self.recipe, model.config)
        self._rows = {s.name: checked_rows(s, tokenizer) for s in self.recipe.stages}
        check_data(self.recipe, tokenizer)

    def _stage_folder(self, arm: str, stage: str) -> Path:
        return self.folder / "runs" / arm / stage

    def _heading(self, text: str) -> None:
        arms, stages = len(self.recipe.arms), len(self.recipe.stages)
        measured = self.recipe.evaluation is not None
        total = measured + arms * stages * (1 + measured) + (self.recipe.merge is not None)
        self._step += 1
        say(f"[{self._step}/{total}] {text}")

    def _fresh_base(self) -> tuple[Any, Any]:
        """A base model that nothing has changed; the one that was evaluated, the first time."""
        base, self._base = self._base or load_base(self.recipe), None
        return base

    def _train(self, arm: str, stage: Stage, folder: Path, previous: Path | None) -> Trained | None:
        title = f"{ARM_TITLES[arm]}: training {stage.name}"
        if (folder / "adapter").is_dir():
            self._heading(f"{title}: done already")
            return None
        self._heading(title)
        return train_stage(
            self.recipe,
            stage,
            self._fresh_base(),
            self._rows[stage.name],
            folder,
            protected=arm == "ogpsa",
            start=previous,
            resume=self.resume,
            title=title,
        )

    def _evaluate(self, part: str, trained: Trained | None, adapter: Path | None) -> None:
        path = self.folder / "evaluations" / f"{part.replace('/', '-')}.json"
        title = column_title(part, len(self.recipe.stages))
        if path.is_file():
            self._heading(f"{title}: evaluated already")
            self.results[part] = EvaluationResult.load(path)
            return
        self._heading(f"{title}: evaluating")
        suite = recipe_suite(self.recipe)
        if adapter is None:
            self._base = self._fresh_base()
            trained = Trained(*self._base)
        elif trained is None:
            trained = load_trained(self.recipe, adapter)
        result = evaluate(trained.model, trained.tokenizer, suite, base=adapter is None)
        save_result(result, path)
        self.results[part] = result
        self._report()

    def _publish(self, adapter: Path, part: str) -> None:
        """Copy the recipe's own adapter to where it is looked for, with a model card."""
        target = self.folder / "adapter"
        if target.is_dir():
            return
        with staged_folder(target) as partial:
            shutil.copytree(adapter, partial, dirs_exist_ok=True)
            facts = read_record(adapter / RUN_FILE)
            if part in self.results and "base" in self.results:
                facts["evaluation"] = card_evaluation(self.results["base"], self.results[part])
                write_json(partial / RUN_FILE, facts)
            write_model_card(partial, facts)

    def _merge_or_report(self) -> None:
        try:
            self._merge()
        except Exception:
            # All that was trained and measured is complete, and worth its report.
            self._report()
            write_report(self.folder)
            say(
                f"the merge failed. Everything before it: {self.folder / HTML_FILE}. The same "
                "command with --resume repeats the merge; so that it ends without one, put "
                "`merge: false` into the recipe first."
            )
            raise

    def _merge(self) -> None:
        target = self.folder / "merged"
        done = target / REPORT_JSON
        if done.is_file():
            dtype = read_record(done)["merge"]["dtype"]
            self._heading(f"merging: done already, in {dtype}")
            return
        dtype = self.recipe.merge or "bfloat16"
        self._heading(f"merging in {dtype}, reloading, comparing with the trained model")
        self._base = None
        gc.collect()
        began, bars = time.monotonic(), err.is_terminal
        export_merged(self.folder / "adapter", target, dtype=dtype, compare=False, progress=bars)
        self._merge_seconds = time.monotonic() - began

    # ------------------------------------------------------------------ the report

    def _report(self, *, finished: bool = False) -> dict[str, Any]:
        trainings = {}
        for arm in self.recipe.arms:
            for stage in self.recipe.stages:
                path = self._stage_folder(arm, stage.name) / "adapter" / TRAINING_FILE
                if path.is_file():
                    record = read_record(path)
                    trainings[f"{arm}/{stage.name}"] = record
        merged = self.folder / "merged" / REPORT_JSON
        content = results_json(
            self.recipe,
            self.results,
            trainings,
            read_record(merged) if merged.is_file() else None,
            finished=finished,
            merge_seconds=self._merge_seconds,
            wall_seconds=time.monotonic() - self._began,
        )
        write_json(self.folder / "results.json", content)
        write_text(self.folder / "results.md", results_page(self.recipe, self.results, content))
        return content

    def _print(self, content: dict[str, Any]) -> None:
        if self.results:
            columns = columns_of(self.recipe, self.results)
            out.print(results_table(columns))
            plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
            for kind, prompt, answers in sample_answers(columns):
                out.print(f"\n{kind}: {prompt}", style="bold", **plain)
                for heading, answer in answers.items():
                    out.print(f"  {heading}: {' '.join(answer.split())}", **plain)
            out.print()
        if merge_line(content):
            say(merge_line(content))
        spent = ", ".join(f"{k.replace('_', ' ')} {v:.0f} s" for k, v in content["seconds"].items())
        say(f"time: {spent}")
        say(f"adapter, results and settings: {self.folder}")
        say(f"report: {self.folder / HTML_FILE}")
