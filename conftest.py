"""`pytest` runs the tests, `pytest --benchmark-only` the benchmarks. Folders or files that are named are run as ever."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Look into `benchmarks` and not into `testpaths` if only benchmarks are asked for."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.getoption("benchmark_only", False):
        config.args = [str(config.rootpath / "benchmarks")]
