"""The strict maker: what would stop a lock-wrapped host fails the test instead.

Under a lock-wrapped maker a session that stays open while its request waits for a timer,
Socket.IO, a broker or a cache stops the whole host, and a second session inside a first
one hangs it for ever. Here each of them is written down as a *violation*, with its stack.

Every task of a loop made by `new_event_loop` is `Watched`: whenever it is suspended while
it holds a session, the chain of its awaits must go through the database's driver. The test
function and its fixtures run in such a task too, so passes of the sweeper need no wrapper.
"""

import asyncio
import gc
import inspect
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType
from typing import Any, Self
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession

DATABASE = ("sqlalchemy.", "aiosqlite.", "asyncpg.")
SERVERS = ("httpx._transports.asgi", "uvicorn.")
AUTH = ("zndraw_auth", "fastapi_users")

violations: list[str] = []
_held: WeakKeyDictionary[asyncio.Task[Any], list[str]] = WeakKeyDictionary()


def strict_maker(
    base_maker: Callable[[], AbstractAsyncContextManager[AsyncSession]],
) -> Callable[[], AbstractAsyncContextManager[AsyncSession]]:
    """Return a maker that knows which task holds a session.

    Raises
    ------
    RuntimeError
        From the maker, when a task opens a session inside another one: under a lock it
        would wait for itself.
    """

    @asynccontextmanager
    async def maker() -> AsyncIterator[AsyncSession]:
        task = _current_task()
        assert isinstance(task.get_coro(), Watched), "a loop that nobody watches"
        held = _held.setdefault(task, [])
        here = "".join(traceback.format_stack()[-12:-2])
        if held:
            _note(f"a session was opened inside another one:\n{here}")
            raise RuntimeError("a session was opened inside another one")
        async with base_maker() as session:
            held.append(here)
            try:
                yield session
            finally:
                held.pop()

    return maker


def take_violations() -> list[str]:
    """Return the violations so far, and forget them."""
    taken = violations.copy()
    violations.clear()
    return taken


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that watches every one of its tasks."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(
        lambda loop, coro, **kwargs: asyncio.Task(Watched(coro), loop=loop, **kwargs)
    )
    return loop


class Watched(Coroutine[Any, Any, Any]):
    """A coroutine whose awaits are looked at each time that it is suspended."""

    def __init__(self, coro: Any) -> None:
        self.coro = coro

    def send(self, value: Any) -> Any:
        yielded = self.coro.send(value)
        self._inspect()
        return yielded

    def throw(self, *args: Any) -> Any:
        yielded = self.coro.throw(*args)
        self._inspect()
        return yielded

    def close(self) -> None:
        self.coro.close()

    def __await__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coro, name)

    def _inspect(self) -> None:
        if not _held.get(_current_task()):
            return
        frames = list(_await_chain(self.coro))
        if not any(_may_wait(frame) for frame in frames):
            stack = traceback.StackSummary.extract((f, f.f_lineno) for f in frames)
            _note(
                "a session was held while something else than the database was awaited:\n"
                + "".join(stack.format()[-12:])
            )


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _note(violation: str) -> None:
    # a task inside a task's coroutine would be seen twice
    if violation not in violations:
        violations.append(violation)


def _may_wait(frame: FrameType) -> bool:
    """Whether a session may be held while this frame waits."""
    module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    if module.startswith(DATABASE):
        return True
    if (module, function) == ("zndraw_joblib.dependencies", "commit"):
        # in a task of its own, which no client can cancel
        return True
    if function == "send" and module.startswith(SERVERS):
        # FastAPI leaves request-scoped dependencies after the response is sent
        return True
    if function == "run_in_threadpool":
        # auth's own plain functions, solved in a thread after its session is open; ours
        # would be caught
        solved = inspect.unwrap(frame.f_locals["func"].func)
        return solved.__module__.startswith(AUTH)
    return False


def _await_chain(awaitable: Any) -> Iterator[FrameType]:
    """Yield the frames that wait for each other, outermost first."""
    while awaitable is not None:
        if isinstance(awaitable, Watched):
            awaitable = awaitable.coro
            continue
        for prefix, inner in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            if hasattr(awaitable, f"{prefix}_frame"):
                if frame := getattr(awaitable, f"{prefix}_frame"):
                    yield frame
                awaitable = getattr(awaitable, f"{prefix}_{inner}")
                break
        else:
            # an async generator's step, or a coroutine's `__await__`, shows what it
            # runs to nobody but the garbage collector
            awaitable = next((o for o in gc.get_referents(awaitable) if _is_running_code(o)), None)


def _is_running_code(o: Any) -> bool:
    return isinstance(o, Watched) or (
        inspect.iscoroutine(o) or inspect.isgenerator(o) or inspect.isasyncgen(o)
    )
