"""A worker for atomic structures: ``python docs/worker.py http://127.0.0.1:8000``.

It registers an analysis and a modifier in ``@global``, and the files of
``structures/`` as data to read, which a superuser may: his name and password come from
``WORKER_USER`` and ``WORKER_PASSWORD``.
"""

import os
import sys
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from pydantic import BaseModel, Field

from zndraw_joblib import Category, ClaimedTask, Extension, JobManager, Provider

STRUCTURES = Path(__file__).resolve().parent / "structures"

# what is saved of more would be larger than 64 KiB
MAX_SAVED_ATOMS = 500

Vector = tuple[float, float, float]


class Structure(BaseModel):
    """A periodic structure; lengths in Å."""

    symbols: list[str] = Field(min_length=1)
    positions: list[Vector]
    cell: tuple[Vector, Vector, Vector]

    @classmethod
    def from_atoms(cls, atoms: Atoms) -> Self:
        return cls(
            symbols=atoms.get_chemical_symbols(),
            positions=atoms.positions.tolist(),
            cell=atoms.cell.tolist(),
        )

    def to_atoms(self) -> Atoms:
        return Atoms(self.symbols, self.positions, cell=self.cell, pbc=True)


class RadialDistribution(Extension):
    """The radial distribution function g(r) of a periodic structure.

    Each pair counts as a Gaussian of width ``smearing``; lengths in Å.
    """

    category: ClassVar[Category] = Category.ANALYSIS

    structure: Structure
    cutoff: float = Field(default=6.0, gt=1.0, le=12.0)
    smearing: float = Field(default=0.1, ge=0.02, le=0.5)

    def run(self, vis: Any = None, **kwargs: Any) -> dict[str, Any]:
        atoms = self.structure.to_atoms()
        distances = neighbor_list("d", atoms, self.cutoff + 4 * self.smearing)
        r = np.arange(0.5, self.cutoff, 0.01)
        pairs = np.exp(-0.5 * ((r[:, None] - distances) / self.smearing) ** 2).sum(1)
        pairs /= self.smearing * np.sqrt(2 * np.pi) * len(atoms)
        g = pairs / (4 * np.pi * r**2 * len(atoms) / atoms.get_volume())
        inner = np.arange(1, len(r) - 1)
        maxima = inner[(g[inner] > g[inner - 1]) & (g[inner] >= g[inner + 1])]
        maxima = maxima[g[maxima] > 1]
        if not maxima.size:
            raise ValueError(f"no neighbours within {self.cutoff} Å")
        peak = maxima[0]
        shell = peak + np.argmin(g[peak : np.searchsorted(r, 1.4 * r[peak])])
        return {
            "first_peak": round(float(r[peak]), 3),
            "coordination": round(float((distances < r[shell]).sum() / len(atoms)), 3),
            "r": r[::5].round(3).tolist(),
            "g": g[::5].round(4).tolist(),
        }


class Relaxation(Extension):
    """Positions and cell relaxed with EMT until no force exceeds ``fmax``, in eV/Å.

    Energies are in eV per atom. If it is stopped half way, the next attempt goes on from there.
    """

    category: ClassVar[Category] = Category.MODIFIER

    structure: Structure
    fmax: float = Field(default=0.02, gt=0)
    max_steps: int = Field(default=100, ge=1, le=1000)

    def run(
        self, vis: Any = None, task: ClaimedTask | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        atoms = self.structure.to_atoms()
        atoms.calc = EMT()
        before = atoms.get_potential_energy() / len(atoms)
        steps = 0
        if task is not None and (saved := task.saved):
            atoms.set_cell(saved["cell"])
            atoms.set_positions(saved["positions"])
            steps = saved["steps"]
        optimizer = BFGS(FrechetCellFilter(atoms), logfile=None)
        for _ in optimizer.irun(fmax=self.fmax, steps=self.max_steps - steps):
            if task is not None:
                task.raise_if_cancelled()
                done = steps + optimizer.nsteps
                task.progress(done / self.max_steps)
                if len(atoms) <= MAX_SAVED_ATOMS:
                    task.save({"cell": atoms.cell[:], "positions": atoms.positions, "steps": done})
        steps += optimizer.nsteps
        return {
            "energy_before": before,
            "energy_after": atoms.get_potential_energy() / len(atoms),
            "converged": steps < self.max_steps,
            "steps": steps,
            "structure": Structure.from_atoms(atoms).model_dump(),
        }


class Listing(Provider):
    """Which files there are in a directory, and their sizes in bytes."""

    category: ClassVar[str] = "files"

    path: str = "/"

    def read(self, handler: Path) -> list[dict[str, Any]]:
        files = sorted(inside(handler, self.path).iterdir())
        return [
            {"name": file.name, "size": file.stat().st_size} for file in files if file.is_file()
        ]


class File(Provider):
    """A file as it is."""

    category: ClassVar[str] = "files"
    content_type: ClassVar[str] = "application/octet-stream"

    path: str

    def read(self, handler: Path) -> bytes:
        return inside(handler, self.path).read_bytes()


def inside(directory: Path, path: str) -> Path:
    """Return a path of the directory; one that leads out of it, whatever way, is none.

    Raises
    ------
    PermissionError
        When it leads out of the directory.
    """
    found = (directory / path.lstrip("/")).resolve()
    if not found.is_relative_to(directory.resolve()):
        raise PermissionError(f"{path} is not in this directory")
    return found


def execute(task: ClaimedTask) -> Any:
    """Run one task; what it returns becomes the task's ``result``."""
    return task.extension.run(None, task=task)


def main(url: str) -> None:
    manager = JobManager.connect(
        url, user=os.environ["WORKER_USER"], password=os.environ["WORKER_PASSWORD"], execute=execute
    )
    with manager:
        manager.register(RadialDistribution)
        manager.register(Relaxation)
        for provider in (Listing, File):
            name = provider.__name__
            manager.register_provider(provider, name=name, handler=STRUCTURES)
        manager.wait()


if __name__ == "__main__":
    main(sys.argv[1])
