"""Measuring works: roofs, cases, tables, plots and models. No test asserts a time."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import llaisys
from llaisys import _lib
from llaisys.bench import models, report
from llaisys.bench.cases import LINE, Case, Repeating, Result, aligned, all_cases, inputs_of, run_case, samples
from llaisys.bench.measure import copies_for, in_turns, installed, last_level_cache, rotating
from llaisys.bench.roof import ROOFS, Roofs, measure_roofs
from llaisys.dtypes import DataType
from llaisys.reference import SPECS, check
from llaisys.reference.spec import BenchCase
from test_cli import at_terminal, environment, run

ROOFS_OF_A_MACHINE = Roofs(2, 50e9, {"scalar_f32": 1e11, "avx2_f32": 3e11, "avx512_f32": 5e11, "amx_bf16": 6e12})


# ------------------------------------------------------------------- roofs


def test_roofs_are_plausible() -> None:
    """A machine from which nothing can be had in a second, or more than any has, was measured wrongly."""
    roofs = measure_roofs(0.01)
    assert 1e8 < roofs.read < 1e13
    assert "scalar_f32" in roofs.compute and set(roofs.compute) < set(ROOFS)
    assert all(1e8 < value < 1e15 for value in roofs.compute.values())
    for isa in llaisys.isas():
        assert isa in ("scalar", "amx") or f"{isa}_f32" in roofs.compute
        for dtype in report.DTYPES:
            name, value = roofs.unit(isa, dtype)
            assert name in roofs.compute and 0 < value <= roofs.compute[name]


def test_what_the_machine_lacks() -> None:
    lacking = [tier for tier in ("avx2", "avx512", "amx") if not llaisys.has_isa(tier)]
    for tier in lacking:
        with pytest.raises(llaisys.errors.UnsupportedError, match=f"no {tier}"):
            _lib.measure_roof("amx_bf16" if tier == "amx" else f"{tier}_f32", 0)
    assert not lacking or not any(name.startswith(lacking[-1]) for name in measure_roofs(0).compute)


@pytest.mark.parametrize(
    ("roof", "seconds", "text"),
    [
        ("write", 0.1, "expected read, .* found write"),
        ("", 0.1, "found $"),
        ("read", -1, "seconds: expected 0 to 60, found -1"),
        ("read", math.nan, "seconds: .* found -?nan"),
        ("read", math.inf, "seconds: .* found inf"),
        ("read", 61, "seconds"),
    ],
)
def test_bad_arguments_of_a_roof(roof: str, seconds: float, text: str) -> None:
    with pytest.raises(llaisys.errors.InvalidArgumentError, match=text):
        _lib.measure_roof(roof, seconds)


def test_null_arguments_of_a_roof() -> None:
    lib, value = _lib.library(), ctypes.c_double(7)
    assert lib.llaisysMeasureRoof(None, 0.0, ctypes.byref(value)) == llaisys.errors.InvalidArgumentError.status
    assert lib.llaisysMeasureRoof(b"read", 0.0, None) == llaisys.errors.InvalidArgumentError.status
    assert "per_second" in _lib.last_error() and value.value == 7


@pytest.mark.parametrize(
    ("isa", "dtype", "unit", "most"),
    [
        ("scalar", "bf16", "scalar_f32", 1e11),
        ("avx512", "bf16", "avx512_f32", 5e11),
        ("amx", "bf16", "amx_bf16", 6e12),
        ("amx", "f16", "amx_bf16", 1.5e12),
        ("amx", "f32", "amx_bf16", 1e12),
    ],
)
def test_the_unit_that_binds(isa: str, dtype: str, unit: str, most: float) -> None:
    assert ROOFS_OF_A_MACHINE.unit(isa, dtype) == (unit, most)


# --------------------------------------------------------------- measuring


def test_calls_take_turns_and_the_slow_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llaisys.bench.measure.TOO_SLOW", 0.0)
    assert in_turns({"a": lambda: None}) == {}
    monkeypatch.undo()
    order: list[str] = []
    found = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    for length, times in found.values():
        assert length >= 1 and len(times) >= 5 and all(seconds >= 0 for seconds in times)
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert changes >= 2 * len(found["a"][1]) - 1


def test_rotating() -> None:
    seen: list[int] = []
    call = rotating(lambda x, more: seen.append(x + more), [(1,), (2,), (3,)], more=10)
    for _ in range(4):
        call()
    assert seen == [11, 12, 13, 11]
    assert copies_for(1 << 40) == 1 and copies_for(last_level_cache()) == 2 and copies_for(0) >= 2


def test_repeating_values_are_normal_and_rows_differ() -> None:
    rng = Repeating(np.random.PCG64(0))
    x = rng.standard_normal((3000, 1024), np.float32)
    assert x.dtype == np.float32 and abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert len(np.unique(x[:, 0])) > 2900
    assert rng.standard_normal(5, np.float32).shape == (5,)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2, 0, 3), (4, 3, 5)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i64"])
def test_aligned_copies(shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(DataType.of_name(dtype).numpy)
    for source in (array, array.T, array.swapaxes(0, -1)) if shape else (array,):
        copy = aligned(source)
        assert copy.dtype == source.dtype and np.array_equal(copy, source)
        assert not np.shares_memory(copy, source)
        assert not copy.size or copy.ctypes.data % LINE == 0
        assert copy.size < 2 or copy.strides == source.strides


def test_samples_are_of_the_whole_output() -> None:
    """What the oracle says of a sample is what it says of all, there."""
    linear = SPECS["linear"]
    case = Case(linear, BenchCase("", {"...": (40,), "N": 2100, "C": 520}, "prefill", ""), "f32")
    values = inputs_of(case)
    (whole,) = linear.call(linear.oracle, values)
    seen = np.zeros(whole.y.shape, bool)
    for index, part in samples(linear, values):
        (some,) = linear.call(linear.oracle, part)
        assert np.allclose(whole.y[index], some.y, rtol=1e-12, atol=1e-12) and some.y.size < whole.y.size
        seen[index] = True
    assert seen[np.ix_((0, 39), (0, 2099))].all() and seen.any(axis=0).all() and seen.any(axis=1).all()
    assert any(column.all() for column in seen.T) and any(row.all() for row in seen)
    attention = SPECS["self_attention"]
    case = Case(attention, BenchCase("", {"T": 400, "S": 410, "H": 2, "K": 1, "D": 8}, "prefill", ""), "f32")
    values = inputs_of(case)
    output = attention.call(attention.twin, values)[0]
    tokens: set[int] = set()
    for rows, part in samples(attention, values):
        assert check(output[rows], attention.call(attention.oracle, part)[0])
        tokens.update(range(400)[rows])
    assert {*range(16), *range(384, 400)} < tokens


def small_case(name: str, dtype: str = "f32") -> Case:
    """The first, smallest benchmark of an operator."""
    return all_cases([name], [dtype], "decode")[0]


@pytest.mark.parametrize("name", ["add", "argmax", "self_attention"])
def test_a_case(name: str) -> None:
    result = run_case(small_case(name, "bf16"))
    assert set(result.times) == ({"native", "torch", "numpy"} if installed("torch") else {"native", "numpy"})
    for row in result.rows(measure_roofs(0)):
        assert row["op"] == name and row["dtype"] == "bf16" and row["phase"] == "decode"
        assert row["microseconds"] > 0 and row["gflops"] > 0 and 0 <= row["worst_ratio_to_bound"] <= 1
        assert row["roof_percent"] == max(row["read_roof_percent"], row["compute_roof_percent"])
        assert json.loads(json.dumps(row)) == row


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llaisys.ops.add", lambda a, b, out: np.add(a, 2 * b, out=out))
    with pytest.raises(llaisys.errors.InternalError, match="add f32 .*: native: out"):
        run_case(small_case("add"))


def test_shares_of_the_roof() -> None:
    """Worked out by hand: 1 GFLOP and 50 MB in 10 ms."""
    case = Case(SPECS["linear"], BenchCase("c", {"...": (10,), "N": 5000, "C": 10000}, "decode", ""), "f32")
    result = Result(
        case, {"native": (2, [0.02, 0.02, 0.04]), "torch": (1, [0.03])}, {"native": 0.5, "torch": 0.5}, 25e9
    )
    row = result.row("native", ROOFS_OF_A_MACHINE)
    assert row["iqr_percent"] == pytest.approx(50)
    assert row["microseconds"] == pytest.approx(10e3) and row["speed_relative_to_torch"] == pytest.approx(3)
    nbytes = 4 * (10 * 10000 + 5000 * 10000 + 5000 + 10 * 5000)
    assert row["bytes"] == nbytes and row["flops"] == 10**9 and row["gflops"] == pytest.approx(100)
    assert row["roof"] == "read" and row["roof_percent"] == pytest.approx(100 * nbytes / 25e9 / 0.01)


def test_every_operator_has_cases_of_both_models() -> None:
    cases = all_cases()
    assert {case.spec.name for case in cases} == set(SPECS)
    names = [(case.spec.name, case.dtype, case.case.title) for case in cases]
    assert len(set(names)) == len(names)
    rows = {case.dims["..."][0] for case in all_cases(["linear"]) if case.dims["N"] == 8960}
    assert rows == {1, 4, 16, 128, 512}
    keys = {(case.dims["T"], case.dims["S"]) for case in all_cases(["self_attention"])}
    assert keys == {(1, 512), (512, 512), (1, 2048), (2048, 2048)}


# ------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a short run, with its output beside them."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("bench", "add", "embedding", "--dtype", "f32", "--phase", "decode", "--json", str(folder / "r.json"))
    assert done.returncode == 0, done.stderr
    (folder / "out").write_bytes(done.stdout)
    return folder / "r.json"


def test_bench_prints_a_table_and_writes_json(saved: Path) -> None:
    data = json.loads(saved.read_text())
    assert data["llaisys"] == llaisys.__version__ and set(data) == {"llaisys", "machine", "rows"}
    machine = data["machine"]
    assert machine["isa"] == llaisys.isas()[-1] and machine["threads"] == 1 and machine["roofs"]["read"] > 0
    assert {row["op"] for row in data["rows"]} == {"add", "embedding"}
    assert {(row["dtype"], row["phase"]) for row in data["rows"]} == {("f32", "decode")}
    text = (saved.parent / "out").read_text()
    lines = text.splitlines()
    assert "\x1b" not in text and max(map(len, lines)) <= 100
    assert any(line.startswith("0.5B residual decode  f32") for line in lines)
    for part in ("memory read", "x torch, geometric mean", "roofs, 1 thread", "Medians in microseconds"):
        assert part in text or (part.startswith("x torch") and not installed("torch")), part


def test_bench_shows_saved_results_without_measuring(saved: Path) -> None:
    again = run("bench", "--from", str(saved))
    assert again.returncode == 0 and again.stdout.decode() == (saved.parent / "out").read_text()
    status, output = at_terminal("bench", "--from", str(saved), columns=100)
    assert status == 0 and "0.5B residual decode" in output
    text = run("bench", "--from", str(saved), "--markdown").stdout.decode()
    table = text[text.index("### add") :].split("\n\n")[1].splitlines()
    assert table[0].startswith("| case | dtype | us |") and len({line.count("|") for line in table}) == 1
    assert len(table) == 4


def test_bench_at_a_tier(tmp_path: Path) -> None:
    options = ["--isa", "scalar", "--threads", "2", "--dtype", "bf16", "--phase", "decode"]
    assert run("bench", "rope", *options, "--json", str(tmp_path / "r")).returncode == 0
    data = report.read(tmp_path / "r")
    assert data["machine"]["isa"] == "scalar" and {row["threads"] for row in data["rows"]} == {2}
    assert all(row["roof"] in ("read", "cache", "scalar_f32") for row in data["rows"])


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["nonsense"], 2, "expected an operator or model, found 'nonsense'"),
        (["add", "--dtype", "f64"], 2, "--dtype"),
        (["model", "--size", "7B"], 2, "--size"),
        (["add", "--from", "nowhere.json"], 2, "--from"),
        (["--from", "nowhere.json"], 1, "nowhere.json: expected a JSON file"),
        (["--from", "other.json"], 1, "other.json: expected benchmark results of llaisys"),
        (["--plot", "roof.pdf"], 1, "expected a file name that ends with .png or .svg, found 'roof.pdf'"),
    ],
)
def test_errors(args: list[str], status: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"benchmarks": []}')
    done = run("bench", *args, cwd=tmp_path, env={"COLUMNS": "200"})
    assert done.returncode == status and text in done.stderr.decode() and b"Traceback" not in done.stderr


def hiding(tmp_path: Path, *modules: str) -> dict[str, str]:
    """An environment in which `modules` are not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {modules}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        f"util.find_spec = lambda name, package=None: None if name in {modules} else found(name, package)\n"
    )
    return environment(PYTHONPATH=str(tmp_path))


def test_without_torch(tmp_path: Path) -> None:
    hidden = hiding(tmp_path, "torch", "transformers", "threadpoolctl", "pytest")
    command = [sys.executable, "-m", "llaisys", "bench", "add", "--dtype", "f32", "--phase", "decode"]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in done.stderr and "0.5B residual decode" in done.stdout


# ------------------------------------------------------------------- plots


def test_plot(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("roof.png", "roof.svg"):
        assert run("bench", "--from", str(saved), "--plot", str(tmp_path / name)).returncode == 0
    png = (tmp_path / "roof.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82") and len(png) > 10_000
    assert ET.parse(tmp_path / "roof.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_plot_of_nothing(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = json.loads(saved.read_text())
    (tmp_path / "r.json").write_text(json.dumps({**data, "rows": []}))
    done = run("bench", "--from", str(tmp_path / "r.json"), "--plot", str(tmp_path / "roof.png"))
    assert done.returncode == 1 and b"expected rows of operators" in done.stderr


def test_without_matplotlib(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llaisys", "bench", "--plot", "roof.png"]
    hidden = hiding(tmp_path, "matplotlib")
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and 'run pip install "llaisys[bench]"' in done.stderr


# ------------------------------------------------------------------ doctor


def test_doctor_measures_the_roofs() -> None:
    done = run("doctor", "--roof", "--threads", "2", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["roofs"]["read"] > 0 and found["roofs"]["scalar_f32"] > 0
    assert found["threads"]["in_use"] == 2
    status, output = at_terminal("doctor", "--roof", columns=80)
    assert status == 0 and "memory read" in output and "GB/s" in output and "nothing is wrong" in output


# ------------------------------------------------------------------ models


def test_the_embedded_model() -> None:
    """One process of the native engine, with short cases."""
    found = models._process("native", models.make_checkpoint("tiny"), "bf16", 2, ["prefill 16", "decode 8"])
    assert set(found["seconds"]) == {"load", "prefill 16", "decode 8"}
    assert all(x > 0 for times in found["seconds"].values() for x in times)
    assert 1 << 20 < found["peak_rss_bytes"] < 1 << 34


def test_a_killed_benchmark_leaves_no_process() -> None:
    """The worker ends in the midst of its work when the process that started it does."""
    command = [sys.executable, "-m", "llaisys.bench.worker", "native", str(models.make_checkpoint("tiny")), "bf16", "1"]
    with subprocess.Popen([*command, *["decode 2000"] * 1000], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(2)
        worker.stdin.close()
        assert worker.wait(20) == 1


def test_a_checkpoint_of_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written whole, in a layout that the engine takes; and once only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(models.QWEN2_SIZES, "0.5B", {"E": 64, "H": 4, "K": 2, "D": 16, "F": 96, "V": 300})
    folder = models.make_checkpoint("0.5B")
    assert folder.is_relative_to(tmp_path) and len(list(folder.glob("*.safetensors"))) > 1
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir())
    assert models.make_checkpoint("0.5B") == folder
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    with llaisys.Qwen2(folder) as model:
        logits = model.logits([1, 2, 3])
        assert logits.shape == (3, 300) and np.isfinite(logits).all() and np.abs(logits).max() < 100
        assert model.config.num_hidden_layers == 24 and model.dtype == "bf16"


def test_the_rows_of_a_model() -> None:
    """1.5B, decode after 128 tokens: 3.087 GB of weights a token, as the sizes of the model say."""
    config = models.config_of("1.5B")
    parsed = llaisys.Qwen2("tiny").config
    fields = {name: config[name] for name in config if hasattr(parsed, name) and name != "eos_token_id"}
    values = {**parsed.__dict__, **fields, "head_dim": 128, "max_position_embeddings": 4096}
    one = type(parsed)(**{name: values[name] for name in parsed.__dataclass_fields__})
    process = {"seconds": {"decode 128": [0.1, 0.2, 0.3], "load": [1.0]}, "peak_rss_bytes": 4 << 30}
    runs = models.ModelRuns("1.5B", "bf16", one, {"native": [process], "transformers": [process, process]}, 25e9)
    row = runs.row("native", "decode 128", ROOFS_OF_A_MACHINE)
    assert row["tokens_per_second"] == pytest.approx(5) and row["speed_relative_to_transformers"] == 1
    assert row["bytes"] == pytest.approx(3.087e9, rel=0.003) and row["roof"] == "read"
    assert row["roof_percent"] == pytest.approx(100 * row["bytes"] / 25e9 / 0.2)
    loading = runs.row("native", "load", ROOFS_OF_A_MACHINE)
    assert loading["peak_rss_gib"] == 4 and 100 < loading["rss_limit_percent"] < 115
    data = {"llaisys": "0", "machine": {"roofs": {"read": 1.0}, "threads": 2}, "rows": [row, loading]}
    table = report.figures(data)[-1]
    assert [line[0] for line in table.lines] == ["1.5B decode 128, tok/s", "1.5B load, s", "1.5B peak RSS, GiB"]
