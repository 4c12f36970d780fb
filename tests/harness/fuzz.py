"""Whose token a request of schemathesis carries; see fuzz.toml."""

import os
import random
from typing import Any

import schemathesis

TOKENS = os.environ["FUZZ_TOKENS"].split()
chance = random.Random(0)


@schemathesis.auth(refresh_interval=None)
class Users:
    """Most requests are an ordinary user's, some the superuser's."""

    def get(self, case: Any, context: Any) -> str:
        return chance.choices(TOKENS, (4, 1))[0]

    def set(self, case: Any, data: str, context: Any) -> None:
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}
