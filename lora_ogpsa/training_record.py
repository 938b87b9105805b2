"""What a training leaves for its report: removed energy, time, memory, adapters on the way.

All of it is gathered in callbacks of the Trainer, so that the training itself knows nothing of it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_ogpsa.export.folder import staged_folder

if TYPE_CHECKING:
    from lora_ogpsa.callback import OGPSACallback

ENERGY_FILE = "energy.jsonl"
POINTS_FOLDER = "points"


class Energy(NamedTuple):
    """Removed energy of a training, by step and layer.

    Attributes:
        layers: indices of the transformer layers, as text.
        steps: optimizer steps, counted from 1.
        removed: for each step one share per layer.
    """

    layers: list[str]
    steps: list[int]
    removed: list[list[float]]


def read_energy(path: Path) -> Energy:
    """What a `StepRecorder` wrote; empty where there is no file."""
    found = Energy([], [], [])
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn when the process was killed
        if "layers" in row:
            found.layers.extend(row["layers"])
        else:
            found.steps.append(row["step"])
            found.removed.append(row["removed"])
    return found


def point_steps(total: int, count: int) -> list[int]:
    """`count` evenly spaced optimizer steps of `total`, the last one among them."""
    return sorted({max(1, round(total * i / count)) for i in range(1, count + 1)})


class StepRecorder(TrainerCallback):
    """Records what the report shows besides the Trainer's own log.

    Removed energy by layer goes to ``energy.jsonl`` in `folder`: a line naming the layers, then a
    line per optimizer step. On a CPU the time of the projection is measured around OGPSA's hooks.
    On a GPU, where kernels run behind the program's back, it stays part of the training's; there
    the peak of memory is told apart instead: training, reference passes, projection.

    Args:
        folder: of the stage.
        protection: what protects the training, attached to the trainer before this callback.
    """

    def __init__(self, folder: Path, protection: OGPSACallback | None) -> None:
        self._file = folder / ENERGY_FILE
        self._protection = protection
        self._hooks = 0.0
        self._mark = 0.0
        self._handles: list[Any] = []
        self._peaks: dict[str, int] = {}
        #: Seconds of reference passes in this process.
        self.passes = 0.0

    # ------------------------------------------------------------------ callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put clocks before and after OGPSA's hooks."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        ogpsa = self._protection.ogpsa if self._protection is not None else None
        self._keep_rows(state.global_step if ogpsa is not None else 0)
        if ogpsa is None:
            return
        ogpsa.logs.watch_layers(ogpsa.space)
        optimizer = ogpsa.optimizer
        # Hooks run in the order in which they were registered, and these embrace OGPSA's.
        ogpsa.detach()
        self._handles = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._begin),
        ]
        ogpsa.attach()
        self._handles += [
            optimizer.register_step_pre_hook(self._end_before_step),
            optimizer.register_step_post_hook(self._end_after_step),
        ]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the steps since the last log; OGPSA's callback has just added its numbers."""
        self.passes += (logs or {}).get("ogpsa/refresh_seconds", 0.0)
        self._write(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no gap before a checkpoint that a later process goes on from."""
        self._write(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is left and remove the clocks."""
        self._write(state.global_step)
        if self._protection is not None and self._protection.ogpsa is not None:
            self.passes += self._protection.ogpsa.pop_logs().get("refresh_seconds", 0.0)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._peak("training")

    # ------------------------------------------------------------------ results

    @property
    def projection(self) -> float | None:
        """Seconds of projection in this process; ``None`` where they cannot be told."""
        if self._protection is None:
            return 0.0
        return None if torch.cuda.is_available() else max(self._hooks - self.passes, 0.0)

    @property
    def memory(self) -> dict[str, int]:
        """Peak bytes by what was done; on a CPU, of the whole process since it began."""
        if self._peaks:
            return dict(self._peaks)
        try:
            import resource
        except ImportError:  # Windows
            return {}
        # Kilobytes on Linux, bytes on a Mac.
        unit = 1 if sys.platform == "darwin" else 1024
        return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

    # ------------------------------------------------------------------ clocks

    def _begin(self, *_: Any) -> None:
        self._mark = time.perf_counter()
        self._peak("training")

    def _end_before_step(self, *_: Any) -> None:
        self._hooks += time.perf_counter() - self._mark
        self._peak("reference_passes")

    def _end_after_step(self, *_: Any) -> None:
        self._hooks += time.perf_counter() - self._mark
        self._peak("projection")

    def _peak(self, phase: str) -> None:
        """Give the peak since the last call to `phase`; asks the allocator, not the device."""
        if torch.cuda.is_available():
            found = torch.cuda.max_memory_allocated()
            self._peaks[phase] = max(found, self._peaks.get(phase, 0))
            torch.cuda.reset_peak_memory_stats()

    # ------------------------------------------------------------------ the file

    def _keep_rows(self, step: int) -> None:
        """Drop what an earlier process wrote after `step`, which is done again now."""
        earlier = read_energy(self._file)
        self._file.unlink(missing_ok=True)
        kept = [
            pair for pair in zip(earlier.steps, earlier.removed, strict=True) if pair[0] <= step
        ]
        if kept:
            self._append(earlier.layers, kept)

    def _write(self, step: int) -> None:
        if self._protection is None or self._protection.ogpsa is None:
            return
        layers, shares = self._protection.ogpsa.logs.pop_layers()
        if shares:
            # A step that a GradScaler skipped was not projected, so count back from the last one.
            self._append(layers, list(enumerate(shares, start=step - len(shares) + 1)))

    def _append(self, layers: list[str], rows: list[tuple[int, list[float]]]) -> None:
        lines: list[dict[str, Any]] = [] if self._file.is_file() else [{"layers": layers}]
        lines += [{"step": s, "removed": [float(f"{v:.4g}") for v in row]} for s, row in rows]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


class PointSaver(TrainerCallback):
    """Saves the adapter at evenly spaced steps, to be evaluated when the training is over.

    The Trainer's own checkpoint is asked for at the same steps, so that an interrupted training
    goes on from there. The last point is the trained adapter, which is saved elsewhere.

    Args:
        folder: of the stage; the adapters go to ``points/step-N`` in it.
        count: how many points, the last one included.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder / POINTS_FOLDER
        self._count = count

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter, if this step is a point."""
        step = state.global_step
        if step < state.max_steps and step in point_steps(state.max_steps, self._count):
            with staged_folder(point_folder(self._folder.parent, step)) as partial:
                kwargs["model"].save_pretrained(partial, selected_adapters=["default"])
            control.should_save = True


def point_folder(stage: Path, step: int) -> Path:
    """Where the adapter of a point on the way lies."""
    return stage / POINTS_FOLDER / f"step-{step}"
