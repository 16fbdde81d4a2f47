"""All that needs Triton's interpreter, after one import of torch: `python -m tests.kernels.interpreted EVERY`.

Prints the lines of `compare`, and then what pytest says of `in_interpreter`, whose exit status is this one's.
"""

import sys
from pathlib import Path

import pytest

from tests.kernels import compare

if __name__ == "__main__":
    compare.main("cpu", 0, int(sys.argv[1]))
    promises = Path(__file__).parent / "in_interpreter.py"
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--show-capture=no", str(promises)]))
