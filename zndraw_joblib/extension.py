"""What a worker's author subclasses to offer a job."""

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel


class Category(StrEnum):
    """Where a host's menus show a job."""

    MODIFIER = "modifiers"
    """Changes the structure, or adds to it."""
    SELECTION = "selections"
    """Chooses atoms."""
    ANALYSIS = "analysis"
    """Computes something from the structure and leaves it alone."""


class Extension(BaseModel, ABC):
    """A job: its fields are the parameters, its JSON schema is the job's schema.

    Attributes
    ----------
    category : Category
        Set by every subclass. A host may allow other categories, as plain strings.

    Examples
    --------
    >>> class Rotate(Extension):
    ...     category: ClassVar[Category] = Category.MODIFIER
    ...     angle: float = 90.0
    ...
    ...     def run(self, vis, **kwargs):
    ...         vis.atoms.rotate(self.angle, "z")
    """

    category: ClassVar[Category]

    @abstractmethod
    def run(self, vis: Any, **kwargs: Any) -> Any:
        """Do the work on ``vis``; ``kwargs`` are those given at registration."""
