"""Write the structure files of this folder: ``python docs/structures/make.py``."""

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import make_supercell
from ase.collections import dcdft
from ase.io import write

METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
EXPANSION = 1.03
SHEAR = 0.03
RATTLE = 0.05  # Å, standard deviation of each coordinate


def variants(crystal: Atoms) -> dict[str, Atoms]:
    """Return the crystal and three disturbed 2 x 2 x 2 supercells of it."""
    supercell = make_supercell(crystal, 2 * np.eye(3, dtype=int))

    expanded = supercell.copy()
    expanded.set_cell(EXPANSION * expanded.cell, scale_atoms=True)

    sheared = supercell.copy()
    shear = np.eye(3)
    shear[0, 1] = SHEAR
    sheared.set_cell(sheared.cell @ shear, scale_atoms=True)

    rattled = supercell.copy()
    rattled.rattle(stdev=RATTLE, seed=42)

    return {"crystal": crystal, "expanded": expanded, "sheared": sheared, "rattled": rattled}


if __name__ == "__main__":
    for metal in METALS:
        found = dcdft[metal]
        crystal = Atoms(
            found.symbols,
            positions=found.positions.round(6),
            cell=found.cell.lengths().round(6),
            pbc=True,
        )
        for name, atoms in variants(crystal).items():
            atoms.info = {"metal": metal, "variant": name}
            write(Path(__file__).parent / f"{metal}-{name}.xyz", atoms, format="extxyz")
