"""One operation, many backends.

An operation is declared once, by the plain-torch function that defines it and takes every input. A backend
registers beside it what it does faster, and the condition on the arguments under which it can:

    encode = Op(reference.encode)

    @encode.on("cpu", when=lambda x, *_: x.is_cpu)
    def _(x, ...): ...

Callers name the operation alone; tests go through its implementations and compare each with the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """What a backend does in place of the reference.

    Attributes:
        backend: its name, "cpu" or "cuda".
        run: the function, of the reference's signature; on codes it must equal the reference bit for bit.
        when: of the same signature: whether `run` can take these arguments.
    """

    backend: str
    run: Callable[P, R]
    when: Callable[P, bool]


class Op(Generic[P, R]):
    """An operation; a call runs the implementation registered last among those that can, else the reference.

    Attributes:
        reference: the plain-torch definition; takes every input that `check` lets through.
        implementations: the backends', in the order in which they are asked.
    """

    def __init__(self, reference: Callable[P, R], check: Callable[P, None] | None = None) -> None:
        """check: raises on arguments that no implementation takes."""
        self.reference = reference
        self.implementations: list[Implementation[P, R]] = []
        self._check = check
        functools.update_wrapper(self, reference)

    def on(self, backend: str, when: Callable[P, bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Registers the decorated function as this backend's implementation, for arguments where `when` holds."""

        def register(run: Callable[P, R]) -> Callable[P, R]:
            self.implementations.insert(0, Implementation(backend, run, when))
            return run

        return register

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result."""
        if self._check is not None:
            self._check(*args, **kwargs)
        for implementation in self.implementations:
            if implementation.when(*args, **kwargs):
                return implementation.run(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def backend(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The name of the backend that a call with these arguments runs on; "reference" where there is none."""
        found = (each.backend for each in self.implementations if each.when(*args, **kwargs))
        return next(found, "reference")
