"""What the fuzzers share."""

from __future__ import annotations

from collections.abc import Callable

from fqt.kernels.cpu import library


def fuzz(case: Callable[[int], str], cases: int, seed: int) -> dict:
    """Runs `case(seed)`, …, `case(seed + cases − 1)`, and prints each failure with the seed that shows it again.

    Args:
        case: returns what is wrong, or "".
        cases: how many.
        seed: the first one.

    Returns:
        "cases", "level" (the kernels under test), and "failures": one line each, seed first.
    """
    failures = []
    for number in range(seed, seed + cases):
        try:
            wrong = case(number)
        except Exception as error:  # a fuzzer's finding is any error at all
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            failures.append(f"seed {number}: {wrong}")
            print(failures[-1], flush=True)
    return {"cases": cases, "level": library.status().level, "failures": failures}
