"""`pytest` runs the tests, `pytest --benchmark-only` the benchmarks. What is named on the command line is run.

Either way it is the installed package that they are about. The tree has a folder llaisys too, without the library and
without llaisys.reference, which Python would find first wherever the tree is the current folder.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent

sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]


def pytest_configure(config: pytest.Config) -> None:
    """Look into `benchmarks` and not into `testpaths` if only benchmarks are asked for."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what runs in the background so, and all children would inherit it: also those that the tests
        # of Ctrl-C interrupt. A handler is not inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.getoption("benchmark_only", False):
        config.args = [str(ROOT / "benchmarks")]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What must be alike for --benchmark-compare, which looks at it before the conftest of `benchmarks` is read."""
    import llaisys

    machine_info["llaisys"] = {"isa": llaisys.isa(), "threads": llaisys.num_threads()}
    # As it comes back from a file: a tuple would differ from the list that it became there.
    machine_info.update(json.loads(json.dumps(machine_info)))


@pytest.fixture(scope="session", autouse=True)
def outside_of_the_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in an empty folder, and so do the interpreters that they start."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)
