"""`Estimator`: what a refresh does, from reference examples to mean rows, sketches and bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.basis import thin_product
from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.errors import ConfigError, ReferenceLossError
from lora_ogpsa.full_precision import full_precision
from lora_ogpsa.passes import ReferencePass
from lora_ogpsa.processes import failing_together, gather_rows, sum_over_processes, world
from lora_ogpsa.reference import Objective
from lora_ogpsa.rules import MAX_INEQUALITIES
from lora_ogpsa.sketch import FrequentDirections
from lora_ogpsa.subspace import Subspace

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass
class Refreshed:
    """What a refresh saw; tensors are scalars on the model's device.

    Attributes:
        losses: mean reference loss by name.
        excess: mean excess over the base model by name.
        captured: share of each fresh mean gradient's energy that the rows or bases held before
            it was folded in.
        examples: how many reference examples were differentiated.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    excess: dict[str, Tensor] = field(default_factory=dict)
    captured: list[Tensor] = field(default_factory=list)
    examples: int = 0


class Estimator:
    """Keeps the mean rows, sketches and bases of the reference objectives up to date.

    Args:
        model: the PEFT model.
        space: its adapter space.
        objectives: the prepared references, K of them.
        config: the settings.

    Raises:
        ConfigError: no objectives, or more than the constraint can take.
    """

    def __init__(
        self,
        model: nn.Module,
        space: AdapterSpace,
        objectives: Sequence[Objective],
        config: OGPSAConfig,
    ) -> None:
        _check_count(len(objectives), config)
        self.space = space
        self.objectives = list(objectives)
        self.config = config
        self.slabs = space.slabs(config.granularity or "adapter")
        # Where they only go into bases, at intervals, they would take up the device in vain.
        home = "cpu" if config.mean_rows_idle else space.device
        count, size = len(self.objectives), space.size
        self.means = torch.zeros(count, size, dtype=torch.float32, device=home)
        self.excess = torch.zeros(count, dtype=torch.float32, device=space.device)
        #: Which references a refresh has measured since this was last cleared.
        self.measured = torch.zeros(len(self.objectives), dtype=torch.bool, device=space.device)
        #: Mean gradient [d] of the last refresh's examples, where the penalty is of them.
        self.latest = space.zeros() if config.keeps_latest else None
        # How much of each mean row is data rather than its initial zero (bias correction).
        self.mass = [0.0] * len(self.objectives)
        self.probes = 0
        self.drawn = [0] * len(self.objectives)
        self.subspace: Subspace | None = None
        self.sketches: list[FrequentDirections] | None = None
        if config.constraint == "orthogonal":
            assert config.rank is not None and config.basis_dtype is not None
            self.subspace = Subspace(
                self.slabs,
                config.rank,
                dtype=_DTYPES[config.basis_dtype],
                device=space.device,
                offload=config.offload,
            )
            if config.sketch_rows:
                self.sketches = [
                    FrequentDirections(
                        config.sketch_size or 2 * config.rank,
                        slab.width,
                        slab.count,
                        capacity=config.sketch_rows,
                        device="cpu" if config.offload else space.device,
                    )
                    for slab in self.slabs
                ]
        self.passes = ReferencePass(model, space, self.slabs if self.sketches else ())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (mean rows, sketches, bases) and JSON values (counters) to go on from."""
        tensors = {"means": self.means, "excess": self.excess}
        for index, sketch in enumerate(self.sketches or ()):
            tensors[f"sketch.{index}"] = sketch.rows
        if self.subspace is not None:
            tensors.update(self.subspace.state_dict())
        if self.latest is not None:
            tensors["latest"] = self.latest
        facts = {"mass": self.mass, "probes": self.probes, "drawn": self.drawn}
        return tensors, facts

    def load_state_dict(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, exactly."""
        self.means.copy_(tensors["means"])
        self.excess.copy_(tensors["excess"])
        for index, sketch in enumerate(self.sketches or ()):
            sketch.load_state_dict({"rows": tensors[f"sketch.{index}"]})
        if self.subspace is not None:
            self.subspace.load_state_dict(tensors)
        if self.latest is not None:
            self.latest.copy_(tensors["latest"])
        self.mass, self.probes = list(facts["mass"]), int(facts["probes"])
        self.drawn = list(facts["drawn"])

    # ------------------------------------------------------------------ refreshes

    def refresh(self) -> Refreshed:
        """Take fresh reference gradients and fold them in, as `config.refresh` says.

        Raises:
            ReferenceLossError: a loss or gradient is not finite, or one example does not fit
                into memory.
        """
        seen = Refreshed()
        count = self.config.references_per_refresh or 1
        if self.config.refresh == "stream":
            shares = {self._next_turn(count): count}
        elif self._still_holds(seen):
            return seen
        else:
            shares = dict(enumerate(_split(count, [o.reference.share for o in self.objectives])))
        self._age_sketches()
        if self.latest is not None:
            self.latest.zero_()
        total = sum(self.objectives[index].reference.share for index in shares)
        for index, share in shares.items():
            fresh = self._gather(index, share, seen)
            if self.latest is not None:
                self.latest.add_(fresh, alpha=self.objectives[index].reference.share / total)
        self._update_basis()
        if self.config.sketches_start_over:
            for sketch in self.sketches or ():
                sketch.clear()
        return seen

    def _next_turn(self, count: int) -> int:
        """The reference that is furthest behind its share of the examples."""
        shares = [o.reference.share for o in self.objectives]
        return furthest_behind(self.drawn, shares, sum(self.drawn) + count)

    def _still_holds(self, seen: Refreshed) -> bool:
        """Probe with one example whether the bases are good enough to be kept."""
        threshold = self.config.adaptive_threshold
        if threshold is None or self.subspace is None or not all(self.mass):
            return False
        index = self.probes % len(self.objectives)
        self.probes += 1
        probe = self.space.zeros()
        with failing_together(self.space.device):
            # One example is too few to split: every process takes the same.
            self._differentiate(index, self._draw(index, 1), probe, None)
        with full_precision():
            captured = self.subspace.captured_energy(probe)
        seen.captured.append(captured)
        return bool(captured >= threshold)

    def _age_sketches(self) -> None:
        decay = self.config.decay or 0.0
        for sketch in self.sketches or ():
            if decay == 0.0:
                sketch.clear()
            else:
                sketch.decay(decay)

    def _gather(self, index: int, count: int, seen: Refreshed) -> Tensor:
        """Fold `count` examples of one objective into its mean row and into the sketches.

        In a run of several processes with whole parameters the examples are split over them; all
        end with the same.

        Returns:
            Their mean gradient [d].
        """
        fresh = self.space.zeros()
        # Under FSDP2 every process takes every example: their passes gather the model's weights
        # together, and FSDP2 averages the (equal) gradients.
        rank, size = (0, 1) if self.space.sharded else world()
        mine = self._draw(index, count)[rank::size]
        sketches = self.sketches
        if sketches is not None and size > 1:
            sketches = [sketch.empty_like() for sketch in sketches]
        with failing_together(self.space.device):
            sums = self._differentiate(index, mine, fresh, sketches)
        if size > 1:
            sum_over_processes(fresh)
            sum_over_processes(sums)
        loss, excess = sums / count
        fresh /= count
        if sketches is not None and self.sketches is not None and size > 1:
            for own, local in zip(self.sketches, sketches, strict=True):
                own.append(gather_rows(local.rows.to(self.space.device)))
        captured = self._captured(fresh)
        if captured is not None:
            seen.captured.append(captured)
        name = self.objectives[index].name
        seen.losses[name], seen.excess[name] = loss, excess
        seen.examples += count
        # A decayed average that starts from data, not from zero: the weight of the new row is
        # its share of all the mass seen so far.
        decay = self.config.decay or 0.0
        self.mass[index] = decay * self.mass[index] + (1 - decay)
        share = (1 - decay) / self.mass[index]
        self.means[index].lerp_(fresh.to(self.means.device), share)
        self.excess[index].lerp_(excess, share)
        self.measured[index] = True
        return fresh

    @full_precision()
    def _captured(self, fresh: Tensor) -> Tensor | None:
        """Share of the energy of `fresh` [d] held by what was known before."""
        if self.subspace is not None:
            return self.subspace.captured_energy(fresh) if all(self.mass) else None
        if not any(self.mass):
            return None
        gram = thin_product(self.means, self.means)
        inside = (self.means @ fresh).double()
        solution = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ inside
        length = torch.linalg.vector_norm(fresh, dtype=torch.float64)
        return (inside @ solution) / length.square().clamp_min(torch.finfo(torch.float64).tiny)

    @full_precision()
    def _update_basis(self) -> None:
        if self.subspace is None:
            return
        held = [row for row, mass in zip(self.means, self.mass, strict=True) if mass > 0]
        self.subspace.estimate(
            torch.stack(held),
            None if self.sketches is None else [sketch.rows for sketch in self.sketches],
            energy=self.config.energy,
        )

    def _draw(self, index: int, count: int) -> list[int]:
        """The next examples of an objective; the order depends on seed and position alone."""
        size = len(self.objectives[index])
        chosen = []
        for position in range(self.drawn[index], self.drawn[index] + count):
            epoch, at = divmod(position, size)
            generator = torch.Generator("cpu").manual_seed(
                (self.config.seed * 1009 + index) * 1_000_003 + epoch
            )
            order = torch.randperm(size, generator=generator, device="cpu")
            chosen.append(int(order[at]))
        self.drawn[index] += count
        return chosen

    def _differentiate(
        self,
        index: int,
        examples: list[int],
        total: Tensor,
        sketches: list[FrequentDirections] | None,
    ) -> Tensor:
        """Add the examples' gradients to `total` [d] and their rows to the sketches.

        A micro-batch that does not fit into memory is retried at half its size.

        Returns:
            The examples' summed loss and excess over the base model [2].
        """
        objective = self.objectives[index]
        batch = self.config.reference_batch_size
        sums = torch.zeros(2, dtype=torch.float32, device=self.space.device)
        todo = examples
        while todo:
            part = todo[:batch]
            rows = [sketch.reserve(len(part)) for sketch in sketches] if sketches else None
            try:
                found = self.passes.run(objective, part, total, rows)
            except BaseException as error:
                for sketch in sketches or ():
                    sketch.discard(len(part))
                if not _out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise ReferenceLossError(
                        f"One example of reference `{objective.name}` does not fit into memory "
                        "beside the training step. Lower its `max_length`, or turn gradient "
                        "checkpointing on."
                    ) from error
                batch = len(part) // 2
                continue
            for row in rows or ():
                row *= objective.reference.weight**0.5
            sums += torch.stack([values.sum() for values in found])
            todo = todo[batch:]
        return sums


def _check_count(count: int, config: OGPSAConfig) -> None:
    if count == 0:
        raise ConfigError("OGPSA needs at least one reference. Found none.")
    if config.constraint != "orthogonal" and count > MAX_INEQUALITIES:
        raise ConfigError(
            f"`constraint='{config.constraint}'` takes at most {MAX_INEQUALITIES} references. "
            f"Found {count}."
        )
    if config.constraint == "orthogonal" and count > (config.rank or 0):
        raise ConfigError(
            f"`rank={config.rank}` cannot hold the mean rows of {count} references. Raise `rank`, "
            "or use fewer references."
        )
    if config.refresh == "interval" and (config.references_per_refresh or 1) < count:
        raise ConfigError(
            f"`references_per_refresh={config.references_per_refresh}` leaves some of {count} "
            "references without an example at a refresh. Raise it."
        )


def _split(total: int, shares: Sequence[float]) -> list[int]:
    """`total` examples split by `shares`, at least one each."""
    given = [1] * len(shares)
    for so_far in range(len(shares) + 1, total + 1):
        given[furthest_behind(given, shares, so_far)] += 1
    return given


def furthest_behind(given: Sequence[int], shares: Sequence[float], total: int) -> int:
    """Which of `given` is furthest below its share of `total`; of equals the first."""
    missing = [total * share / sum(shares) - n for n, share in zip(given, shares, strict=True)]
    return missing.index(max(missing))


def _out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )
