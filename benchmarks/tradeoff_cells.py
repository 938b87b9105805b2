"""Cells: one method with one seed, trained, measured along the way, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rivals import Method
from tradeoff_data import Source
from tradeoff_measures import Limits, measure, suite
from tradeoff_stages import Spent, StageSettings, run_stage
from tradeoff_summary import MARGIN

from lora_ogpsa import OGPSAConfig
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.models import load_model
from lora_ogpsa.strength import at_strength

BASE = Method("base", "plain", {}, "the model as it was")


def default_passes() -> float:
    """Reference passes per step of this library's default rule."""
    config = OGPSAConfig()
    return (config.references_per_refresh or 1) / (config.refresh_every or 1)


def cell_name(stage: str, method: str, seed: int, made_of: Mapping[str, Any]) -> str:
    """What a cell's file and its adapter's folder are called.

    Args:
        stage: name of the setting.
        method: its name.
        seed: of the cell.
        made_of: identities of its ``"setting"`` and ``"method"``.
    """
    content = json.dumps([made_of["setting"], made_of["method"], seed], sort_keys=True)
    return f"{stage}-{method}-{seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Setting:
    """Everything that all cells of one table share.

    Attributes:
        source: of the data.
        model: name or folder.
        load_in_4bit: NF4 base.
        stages: in order.
        max_length: longest training example, in tokens.
        precision: of forward passes, ``"bfloat16"`` or ``"float32"``.
        passes: reference examples per step.
        checkpoints: steps of each stage after which the run is measured, by stage.
        limits: how much is measured.
        strengths: factors on the trained adapter at which it is measured besides.
    """

    source: Source
    model: str
    load_in_4bit: bool
    stages: tuple[StageSettings, ...]
    max_length: int
    precision: str
    passes: float
    checkpoints: Mapping[str, tuple[int, ...]]
    limits: Limits = field(default_factory=Limits)
    strengths: tuple[float, ...] = ()

    def identity(self) -> dict[str, Any]:
        """JSON values that change with anything that changes a result.

        Not with the strengths: others can be measured later, of the adapter kept with a cell.
        """
        return {
            "data": self.source.identity(),
            "model": Path(self.model).name,
            "load_in_4bit": self.load_in_4bit,
            "stages": [stage.identity() for stage in self.stages],
            "max_length": self.max_length,
            "precision": self.precision,
            "reference_passes": self.passes,
            "checkpoints": {name: list(steps) for name, steps in self.checkpoints.items()},
            "limits": self.limits.identity(),
        }

    @property
    def name(self) -> str:
        """``"sft"``, ``"dpo"`` or ``"sft_dpo"``."""
        return "_".join(stage.name for stage in self.stages)

    @property
    def ranks_with_likelihood(self) -> bool:
        """Whether it is one stage, of preferences with a part of likelihood."""
        return self.name == "dpo" and self.stages[0].likelihood > 0

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)


class Cells:
    """The finished cells of one setting in a folder; several processes may write to it.

    Args:
        folder: where they are kept.
        setting: what they share.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder
        self.setting = setting
        self._shared = setting.identity()

    def path(self, method: Method, seed: int) -> Path:
        """Where a cell is kept, by the content of everything that makes it."""
        name = cell_name(self.setting.name, method.name, seed, self._made_of(method))
        return self.folder / f"{name}.json"

    def _made_of(self, method: Method) -> dict[str, Any]:
        identity = method.identity(likelihood=self.setting.ranks_with_likelihood)
        return {"setting": self._shared, "method": identity}

    def adapter(self, method: Method, seed: int) -> Path:
        """Where a cell's trained adapter is kept; nowhere if it has no LoRA layer."""
        return self.path(method, seed).with_suffix("")

    def load(self, method: Method, seed: int) -> dict[str, Any] | None:
        """A finished cell."""
        path = self.path(method, seed)
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, method: Method, seed: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a finished cell."""
        cell = {
            "method": method.name,
            "seed": seed,
            "grid": method.grid,
            "description": method.description,
            "made_of": self._made_of(method),
            "environment": _environment(),
            **found,
        }
        self._write(self.path(method, seed), cell)
        return cell

    def take(self, report: Mapping[str, Any]) -> int:
        """Keep the cells of a result file that are of this setting and not in the folder yet.

        Their adapters are not in such a file, so other strengths of them cannot be measured.

        Args:
            report: its content.

        Returns:
            How many of its cells are of this setting.
        """
        own = [cell for cell in report["cells"] if cell["made_of"]["setting"] == self._shared]
        for cell in own:
            name = cell_name(self.setting.name, cell["method"], cell["seed"], cell["made_of"])
            path = self.folder / f"{name}.json"
            if not path.exists():
                self._write(path, cell)
        return len(own)

    def _write(self, path: Path, cell: Mapping[str, Any]) -> None:
        """Write a cell, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.getpid()}.tmp")
        work.write_text(json.dumps(cell, indent=1))
        os.replace(work, path)

    def all(self, known: Mapping[str, Method]) -> list[dict[str, Any]]:
        """Every finished cell of the setting, also those that other processes made.

        Of a method in `known`, only cells of what it is now; of others (variants named on
        earlier command lines), the newest of each name and seed.
        """
        found: dict[tuple[str, int], dict[str, Any]] = {}
        paths = self.folder.glob(f"{self.setting.name}-*.json")
        for path in sorted(paths, key=lambda p: p.stat().st_mtime):
            cell = json.loads(path.read_text())
            if cell["made_of"]["setting"] != self._shared:
                continue
            method = known.get(cell["method"])
            # Through JSON, which knows no tuples.
            if method is not None and cell["made_of"] != json.loads(
                json.dumps(self._made_of(method))
            ):
                continue
            if "strengths" in cell:
                asked = self.setting.strengths
                cell["strengths"] = [p for p in cell["strengths"] if p["strength"] in asked]
            found[cell["method"], cell["seed"]] = cell
        order = ["base", *known]
        rank = {name: index for index, name in enumerate(order)}
        return sorted(found.values(), key=lambda c: (rank.get(c["method"], len(rank)), c["seed"]))

    # ------------------------------------------------------------------ running

    def run(self, method: Method, seed: int, report: Callable[[str], None]) -> dict[str, Any]:
        """Train and measure one cell, or what is missing of it.

        Raises:
            ConfigError: the method cannot work in this setting.
        """
        model: Any = None
        cell = self.load(method, seed)
        if cell is None:
            model, tokenizer, found = self._trained(method, seed, report)
            if any(isinstance(module, LoraLayer) for module in model.modules()):
                model.save_pretrained(str(self.adapter(method, seed)))
            cell = self.save(method, seed, found)
        elif self._next_strength(method, cell) is None:
            report("finished already")
        while (strength := self._next_strength(method, cell)) is not None:
            if model is None:
                base, tokenizer = self._load()
                model = PeftModel.from_pretrained(base, str(self.adapter(method, seed)))
            with at_strength(model, strength):
                point = self._measure(model, tokenizer, base=False, final=False)
            report(f"strength {strength}: {_shown(point['values'])}")
            measured = [*cell["strengths"], {"strength": strength, **point}]
            measured.sort(key=lambda one: one["strength"])
            cell = self.save(method, seed, {**cell, "strengths": measured})
        return cell

    def _next_strength(self, method: Method, cell: Mapping[str, Any]) -> float | None:
        """The next strength at which a trained cell is to be measured, if there is one.

        Beyond 1 only until the model is as safe as any comparison can ask for.
        """
        if not self.adapter(method, cell["seed"]).is_dir():
            return None
        measured = {p["strength"]: p["values"]["harmful"] for p in cell["strengths"]}
        reached = cell["points"][-1]["values"]["harmful"]
        for strength in self.setting.strengths:
            if strength > 1 and reached >= 1 - MARGIN:
                return None
            if strength not in measured:
                return strength
            if strength > 1:
                reached = measured[strength]
        return None

    def run_base(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Measure the base model; it is the same for every seed."""
        finished = self.load(BASE, 0)
        if finished is not None:
            return finished
        report("measuring")
        model, tokenizer = self._load()
        point = self._measure(model, tokenizer, base=True, final=True)
        return self.save(BASE, 0, {"points": [{"stage": "base", "step": 0, **point}]})

    def _load(self) -> tuple[Any, Any]:
        options = {"dtype": "float32", "load_in_4bit": self.setting.load_in_4bit}
        return load_model(self.setting.model, **options)

    def _measure(self, model: Any, tokenizer: Any, *, base: bool, final: bool) -> dict[str, Any]:
        setting = self.setting
        dpo = any(stage.name == "dpo" for stage in setting.stages)
        chosen = suite(setting.source, setting.limits, setting.precision, dpo=dpo, final=final)
        return measure(model, tokenizer, chosen, base=base, cache=self.folder / "evaluation")

    def _trained(
        self, method: Method, seed: int, report: Callable[[str], None]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """The model to measure, with its tokenizer, and what was found up to its end."""
        setting = self.setting
        rival = method.build()
        if rival.full_precision and setting.load_in_4bit:
            raise ConfigError(
                f"`{method.name}` decomposes the base weights and cannot run on a 4-bit base."
            )
        model, tokenizer = self._load()
        objectives = setting.source.objectives(rival.references, model, tokenizer)
        rows = {
            stage.name: setting.source.answered(tokenizer, setting.max_length)
            if stage.name == "sft"
            else setting.source.pairs(tokenizer, setting.max_length, model)
            for stage in setting.stages
        }
        # Here and not earlier: the adapter's beginning is the same for every method of a seed.
        torch.manual_seed(seed)
        rival.see(rows[setting.stages[0].name])
        spent = Spent()
        with spent.tokens_of(model):
            model = rival.wrap(model, objectives, round(setting.passes * setting.steps))
        points: list[dict[str, Any]] = []
        taken = 0
        for stage in setting.stages:

            def after_step(step: int, stage: StageSettings = stage, before: int = taken) -> None:
                if step not in setting.checkpoints[stage.name]:
                    return
                final = stage is setting.stages[-1] and step == stage.steps
                point = self._measure(rival.measured(model), tokenizer, base=False, final=final)
                points.append({"stage": stage.name, "step": before + step, **point})
                report(f"{stage.name} step {step}: {_shown(point['values'])}")

            run_stage(
                stage,
                rival,
                model,
                rows[stage.name],
                objectives,
                pad=tokenizer.pad_token_id,
                precision=setting.precision,
                passes=setting.passes,
                seed=seed,
                spent=spent,
                after_step=after_step,
                report=report,
            )
            taken += stage.steps
        return (
            rival.measured(model),
            tokenizer,
            {
                "points": points,
                "strengths": [],
                "train_seconds": spent.seconds + rival.setup_seconds,
                "extra_seconds": rival.extra_seconds,
                "token_passes": spent.token_passes,
                "reference_passes": rival.passes / setting.steps,
            },
        )


def _environment() -> dict[str, Any]:
    """What this machine is, and with what it computes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"device": common.device_name(device), "versions": versions}


def _shown(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())
