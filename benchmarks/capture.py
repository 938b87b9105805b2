"""Per-example LoRA gradients in one backward: time and peak memory against an ordinary backward.

    python benchmarks/capture.py                                   # SmolLM2-135M on the CPU
    python benchmarks/capture.py --device cuda --shape 8b          # random NF4 weights
    python benchmarks/capture.py --markdown

Three ways take turns on one batch: an ordinary backward (the sum of the rows), the capture of all
rows in one backward, and one pass per example. On a GPU peak memory is the allocator's own; on a
CPU it is counted: every storage that an operation returns, from its birth to its death (what
kernels allocate inside themselves is not seen).

Results go to benchmarks/results/capture_<device>_<shape>.json.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.capture import capture_examples, gradients, quiet
from lora_ogpsa.models import load_model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations return while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in args:
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage()._cdata)  # there before: not ours
        tree_map_only(Tensor, self._count, found)
        return found

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, key, size)
        return tensor

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes alive at once during `work`, beyond those alive before it."""
    if device.type == "cuda":
        common.synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        common.synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        work()
    return live.peak


class Ways:
    """Three ways to the per-example gradients of one batch."""

    def __init__(self, model: Any, batch: dict[str, Tensor], autocast: bool) -> None:
        self.model, self.batch, self.autocast = model, batch, autocast
        self.space = AdapterSpace.from_model(model)
        self.examples = len(batch["input_ids"])
        self.rows = self.space.zeros(self.examples)
        self.targets = {
            name: self.rows[:, start:end] for name, (start, end) in self.space.spans().items()
        }
        self.inputs = list(self.space.parameters)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """Sum over examples of each one's own mean loss."""
        kept = {name: tensor[rows] for name, tensor in self.batch.items()}
        device = self.space.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(input_ids=kept["input_ids"], use_cache=False).logits[:, :-1]
        labels = kept["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
        )
        counted = (labels != -100).sum(-1)
        return (losses.view(labels.shape).sum(-1) / counted).sum()

    def ordinary(self) -> list[Tensor | None]:
        """The sum of the rows, as a training step would compute it."""
        return gradients(self.loss(), self.inputs)

    def captured(self) -> Tensor:
        """All rows, in one backward."""
        self.rows.zero_()
        with capture_examples(self.model, self.space, self.targets) as capture:
            gradients(self.loss(), [capture.anchor])
        return self.rows

    def separate(self) -> None:
        """All rows, one pass each."""
        for i in range(self.examples):
            found = gradients(self.loss(slice(i, i + 1)), self.inputs)
            for view, grad in zip(self.space.views(self.rows[i]), found, strict=True):
                view.copy_(grad)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    if options.shape == "smollm2":
        model = common.with_lora(load_model("embedded", dtype="float32", device=options.device)[0])
    else:
        shape = common.SHAPES[options.shape]
        model = common.with_lora(common.random_nf4_llama(shape, device))
    vocabulary = model.get_base_model().config.vocab_size
    batch = common.random_batch(vocabulary, options.batch, options.length, device)
    ways = Ways(model, batch, options.precision == "bfloat16")
    with quiet(model):
        expected = torch.cat([g.flatten() for g in ways.ordinary() if g is not None])
        error = float((ways.captured().sum(0) - expected).norm() / expected.norm())
        rivals = {
            "ordinary": ways.ordinary,
            "captured": ways.captured,
            "separate": ways.separate,
        }
        times = common.side_by_side(rivals, options.repeats, device)
        peaks = {name: peak_bytes(rivals[name], device) for name in ("ordinary", "captured")}
    typical = {name: common.typical(values) for name, values in times.items()}
    block = 4 * options.batch * max(block.size for block in ways.space.blocks)
    return {
        **common.settings_and_environment(options),
        "seconds": times,
        "peak_bytes": peaks,
        "summary": {
            "captured_to_ordinary": typical["captured"] / typical["ordinary"],
            "separate_to_captured": typical["separate"] / typical["captured"],
            "extra_peak_bytes": peaks["captured"] - peaks["ordinary"],
            "one_blocks_rows_bytes": block,
            "all_rows_bytes": ways.rows.nbytes,
            "relative_error_of_the_sum": error,
        },
    }


def markdown(folder: Path) -> str:
    """The table of all results in `folder`."""
    rows = []
    for path in sorted(folder.glob("capture_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        settings, summary = report["settings"], report["summary"]
        rows.append(
            [
                f"{settings['shape']}, {settings['batch']} x {settings['length']}",
                f"{report['device']}, {settings['precision']}",
                f"{summary['captured_to_ordinary']:.2f}x",
                f"{summary['separate_to_captured']:.2f}x",
                f"{summary['extra_peak_bytes'] / 1e6:.1f} MB",
                f"{summary['one_blocks_rows_bytes'] / 1e6:.1f} MB",
            ]
        )
    header = ["model, batch", "device", "capture / ordinary pass", "separate passes / capture"]
    return common.table([*header, "extra peak", "one block's rows"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_model_options(parser, batch=8)
    common.run_model_benchmark("capture", parser, measure, markdown)


if __name__ == "__main__":
    main()
