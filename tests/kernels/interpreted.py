"""All that needs Triton's interpreter, after one import of torch: `python -m tests.kernels.interpreted EVERY`.

Prints the lines of `compare`, and then what pytest says of `in_interpreter`, whose exit status is this one's.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
from triton.runtime import interpreter

from tests.kernels import compare


def without_idle_work():
    """Leave out what takes half of the interpreter's time and has no effect.

    Whether integers overflow is computed for each sum and product, and looked at with `debug` only. Each call of a
    function in a kernel puts the interpreter's operations into the language's module, where the first call has put
    them for good.
    """
    builder, whole, called = interpreter.interpreter_builder, interpreter.InterpretedFunction.__call__, set()
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    assert not builder.options.debug

    def call(function, *args, **kwargs):
        if id(function.fn.__globals__) in called:
            return function.rewrite()(*args, **kwargs)
        called.add(id(function.fn.__globals__))
        return whole(function, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if __name__ == "__main__":
    without_idle_work()
    compare.main("cpu", 0, int(sys.argv[1]))
    promises = Path(__file__).parent / "in_interpreter.py"
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--show-capture=no", str(promises)]))
