"""Makes the modules that several tests share importable (`import kernel_harness`), with pytest's explained asserts."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("kernel_harness", "operator_tests")
