"""Full names and the rules of rooms, shared by both sides of the wire."""

import re
from typing import NamedTuple

GLOBAL_ROOM = "@global"
INTERNAL_ROOM = "@internal"
SPECIAL_ROOMS = frozenset({GLOBAL_ROOM, INTERNAL_ROOM})

MAX_LENGTH = 255

# Controls and lone surrogates can't be shown, logged or (NUL, surrogates) stored.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class FullName(NamedTuple):
    """What a job or provider is called: ``room:category:name``."""

    room: str
    category: str
    name: str

    def __str__(self) -> str:
        return ":".join(self)


def split_full_name(full_name: str) -> FullName:
    """Split a full name at its first two colons.

    Raises
    ------
    ValueError
        When there are fewer than two colons, or control characters.
    """
    parts = full_name.split(":", 2)
    if len(parts) != 3 or UNPRINTABLE.search(full_name):
        raise ValueError(f"{full_name!r} is not of the form room:category:name")
    return FullName(*parts)


def check_name(name: str) -> str:
    """Return ``name`` if it can be one part of a full name.

    Raises
    ------
    ValueError
        When it is empty, longer than 255 characters, or holds a colon or a
        control character.
    """
    if not 0 < len(name) <= MAX_LENGTH:
        raise ValueError(f"must have 1 to {MAX_LENGTH} characters")
    if ":" in name:
        raise ValueError("must not contain a colon")
    if UNPRINTABLE.search(name):
        raise ValueError("must not contain control characters or lone surrogates")
    return name


def check_room(room: str) -> str:
    """Return ``room`` if it is ``@global``, ``@internal`` or an ordinary room id.

    Raises
    ------
    ValueError
        When it is none of them: empty, longer than 255 characters, or holding
        ``@``, ``:`` or a control character.
    """
    if room in SPECIAL_ROOMS:
        return room
    if "@" in room:
        raise ValueError("must not contain '@'")
    return check_name(room)


def visible_rooms(room: str) -> tuple[str, ...]:
    """Return the rooms whose jobs and providers ``room`` sees, itself first."""
    return (room,) if room in SPECIAL_ROOMS else (room, GLOBAL_ROOM, INTERNAL_ROOM)
