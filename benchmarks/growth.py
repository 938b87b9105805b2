"""How OGPSA's own cost grows with k, d, the number of blocks and the reference examples.

    python benchmarks/growth.py
    python benchmarks/growth.py --device cuda --scale 16
    python benchmarks/growth.py --markdown

Each curve varies one size and holds the others; its exponent is the slope of log(seconds) against
log(size). The cost model (docs/method.md): a projection is linear in k·d, since reading the basis
outweighs the k²·d products of its Gram matrix; an estimate is linear in d and, through the Gram
matrix of its rows, at most quadratic in their number; the number of blocks at the same d costs
next to nothing; a refresh is linear in its examples.

Results go to benchmarks/results/growth_<device>.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from lora_ogpsa import Subspace
from lora_ogpsa.adapters import AdapterSpace, Slab
from lora_ogpsa.estimator import Estimator, OGPSAConfig
from lora_ogpsa.reference import Reference

WIDTH, BLOCKS, RANK, ROWS = 16384, 32, 8, 16
CURVES: dict[str, list[int]] = {
    "projection, k": [2, 4, 8, 16, 32],
    "projection, d": [8, 16, 32, 64, 128],
    "projection, blocks at the same d": [8, 16, 32, 64, 128],
    "estimate, k": [2, 4, 8, 16],
    "estimate, d": [8, 16, 32, 64],
    "estimate, rows of the sketch": [8, 16, 32, 64],
    "refresh, examples": [4, 8, 16, 32],
}
# The largest exponent that the cost model allows each curve.
ALLOWED = {
    "projection, k": 1.0,
    "projection, d": 1.0,
    "projection, blocks at the same d": 0.0,
    "estimate, k": 2.0,
    "estimate, d": 1.0,
    "estimate, rows of the sketch": 2.0,
    "refresh, examples": 1.0,
}


def subspace(blocks: int, width: int, rank: int, device: torch.device) -> Subspace:
    names = tuple(str(i) for i in range(blocks))
    return Subspace([Slab(0, blocks, width, 0, width, names)], rank, device=device)


def projection(blocks: int, width: int, rank: int, device: torch.device) -> Callable[[], Any]:
    """A projection in the optimizer's metric."""
    bases = subspace(blocks, width, rank, device)
    for piece in range(blocks):
        rows = torch.randn(1, rank, width, device=device) / width**0.5
        bases.stored[0].write(slice(piece, piece + 1), rows)
    step = torch.randn(blocks * width, device=device)
    weights = torch.rand_like(step) + 0.1
    return lambda: bases.correction(step, weights)


def estimate(
    blocks: int, width: int, rank: int, rows: int, device: torch.device
) -> Callable[[], Any]:
    """A basis from a sketch of `rows` rows."""
    bases = subspace(blocks, width, rank, device)
    sketch = torch.randn(blocks, rows, width, device=device)
    return lambda: bases.estimate(None, [sketch])


def refresh(examples: int, device: torch.device) -> Callable[[], Any]:
    """A refresh of the orthogonal rule on a tiny model."""
    shape = common.SHAPES["tiny"]
    model = common.with_lora(common.random_nf4_llama(shape, device))
    rows = common.token_rows(shape["vocab"], examples, 8, 24)
    objective = Reference("a", rows, loss="sft").prepare(model)
    config = OGPSAConfig(
        constraint="orthogonal", references_per_refresh=examples, reference_batch_size=4
    )
    return Estimator(model, AdapterSpace.from_model(model), [objective], config).refresh


def work(curve: str, size: int, scale: int, device: torch.device) -> Callable[[], Any]:
    """What a point of a curve times."""
    width = WIDTH * scale
    cases: dict[str, Callable[[], Callable[[], Any]]] = {
        "projection, k": lambda: projection(BLOCKS, width, size, device),
        "projection, d": lambda: projection(size, width, RANK, device),
        "projection, blocks at the same d": lambda: projection(
            size, BLOCKS * width // size, RANK, device
        ),
        "estimate, k": lambda: estimate(BLOCKS, width, size, ROWS, device),
        "estimate, d": lambda: estimate(size, width, RANK, ROWS, device),
        "estimate, rows of the sketch": lambda: estimate(BLOCKS, width, RANK, size, device),
        "refresh, examples": lambda: refresh(size, device),
    }
    return cases[curve]()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    curves = {}
    for curve, sizes in CURVES.items():
        sizes = sizes[: options.points]
        points = {str(size): work(curve, size, options.scale, device) for size in sizes}
        # The least of several: what others on the machine take away is not growth.
        times = common.side_by_side(points, options.repeats, device)
        best = [min(times[str(size)]) for size in sizes]
        curves[curve] = {
            "sizes": sizes,
            "seconds": best,
            "exponent": common.exponent(sizes, best),
            "allowed": ALLOWED[curve],
        }
    return {
        **common.settings_and_environment(options),
        "curves": curves,
        "summary": {name: curve["exponent"] for name, curve in curves.items()},
    }


def markdown(folder: Path) -> str:
    """The tables of all results in `folder`."""
    tables = []
    for path in sorted(folder.glob("growth_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for name, curve in report["curves"].items():
            points = zip(curve["sizes"], curve["seconds"], strict=True)
            shown = ", ".join(f"{size}: {1e3 * taken:.1f}" for size, taken in points)
            rows.append([name, shown, f"{curve['exponent']:.2f}", f"{curve['allowed']:g}"])
        header = ["cost, against", "milliseconds by size", "exponent", "cost model"]
        tables.append(f"{report['device']}:\n\n{common.table(header, rows)}")
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="factor on the width of a block")
    parser.add_argument("--points", type=int, help="sizes per curve; all if left out")
    common.add_report_options(parser, repeats=5)
    options = parser.parse_args()
    if options.markdown:
        print(markdown(options.results))
        return
    torch.set_num_threads(options.threads)
    common.write(
        options.results / f"growth_{torch.device(options.device).type}.json", measure(options)
    )
    print(markdown(options.results))


if __name__ == "__main__":
    main()
