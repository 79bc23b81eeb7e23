"""What every operator is tested for, made from its SPEC: deriving from OperatorTests is enough."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import llaisys
from kernel_harness import (
    LAYOUTS,
    POISONS,
    THREADS,
    TIERS,
    Array,
    Case,
    case_of,
    cases,
    invoke,
    judge,
    just_outside,
    make_case,
    place,
    raw,
    run,
    same_bits,
    using,
)
from llaisys import errors
from llaisys.reference import FLOATS, SPECS, Oracle, check
from llaisys.reference.numerics import f64
from llaisys.reference.refusals import error_dims, refusals
from llaisys.reference.spec import ErrorCase, Spec, empty_outputs

CLASSES = {
    "SHAPE": errors.ShapeError,
    "DTYPE": errors.DTypeError,
    "STRIDE": errors.StrideError,
    "ALIAS": errors.AliasError,
    "INDEX": errors.IndexRangeError,
    "INVALID_ARGUMENT": errors.InvalidArgumentError,
}


def need(tier: str) -> None:
    if not llaisys.has_isa(tier):
        pytest.skip(f"this machine (or build) has no {tier}")


class OperatorTests:
    """`name`: the operator. `alike`: least share of elements that have the twin's very bits, over all cases, by dtype,
    or dtype-tier where one differs: a rounding point in another place would change a third of them."""

    name: ClassVar[str]
    alike: ClassVar[dict[str, float]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "dtype" in metafunc.fixturenames:
            every = metafunc.function.__name__ in ("test_cases", "test_threads")
            metafunc.parametrize("dtype", SPECS[self.name].dtypes if every else FLOATS)
        if "tier" in metafunc.fixturenames:
            metafunc.parametrize("tier", TIERS)

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    def where(self, *parts: object) -> str:
        return " ".join(map(str, (self.name, *parts)))

    # ------------------------------------------------------------- results

    def test_cases(self, dtype: str, tier: str) -> None:
        """Every case of the SPEC: oracle, twin, and the same bits in every layout, whatever the output held before."""
        need(tier)
        alike, total = 0, 0
        with using(tier):
            for n, case in enumerate(cases(self.name, dtype)):
                for i, layout in enumerate(LAYOUTS):
                    where = self.where(dtype, tier, case.label, layout)
                    with using(threads=THREADS[(n + i) % len(THREADS)]):
                        outputs = run(self.spec, case.values, where, layout, poison=POISONS[i % 2])
                    if i == 0:
                        packed = outputs
                        judge(self.spec, case, outputs, where)
                    assert all(map(same_bits, outputs, packed)), f"{where}: other bits than packed"
                for out, twin, oracle in zip(packed, case.twins, case.oracles, strict=True):
                    finite = np.isfinite(f64(twin)) if dtype in FLOATS else np.ones(twin.shape, bool)
                    if not oracle.exact:  # not what may be nothing but rounding errors
                        finite &= np.abs(oracle.y) > oracle.a
                    alike += int(np.count_nonzero((out == twin) & finite))
                    total += int(np.count_nonzero(finite))
        least = self.alike.get(f"{dtype}-{tier}", self.alike.get(dtype, 0))
        assert alike >= least * total, f"{self.where(dtype, tier)}: {alike} of {total} as the twin"

    def test_threads(self, dtype: str, tier: str) -> None:
        """Sizes that are shared out to threads: right, and the same bits for any number of them."""
        need(tier)
        case = case_of(self.name, dtype, tuple(self.spec.shared.items()))
        results: list[tuple[Array, ...]] = []
        for threads in THREADS:
            where = self.where(dtype, tier, case.label, f"{threads} threads")
            with using(tier, threads):
                results.append(run(self.spec, case.values, where, poison=POISONS[threads % 2]))
            if threads == 1:
                judge(self.spec, case, results[0], where)
            assert all(map(same_bits, results[0], results[-1])), f"{where}: other bits than 1 thread"

    def test_large(self, dtype: str, tier: str) -> None:
        """Sizes beyond any block: as the oracle and the twin have them."""
        need(tier)
        for dims in self.spec.large:
            case = case_of(self.name, dtype, tuple(dims.items()))
            with using(tier):
                where = self.where(dtype, tier, case.label)
                judge(self.spec, case, run(self.spec, case.values, where), where)

    def test_repeated_rows(self, dtype: str, tier: str) -> None:
        """Inputs whose rows are all one row in memory (stride 0)."""
        need(tier)
        with using(tier):
            for case in cases(self.name, dtype):
                values, plain = dict(case.values), dict(case.values)
                for arg in self.spec.inputs_args:
                    x = values[arg.name]
                    if x is not None and x.ndim > 1 and x.shape[0] > 1:
                        values[arg.name] = np.broadcast_to(x[:1], x.shape)
                        plain[arg.name] = np.ascontiguousarray(values[arg.name])
                if all(values[name] is plain[name] for name in values):
                    continue
                where = self.where(dtype, tier, case.label, "repeated rows")
                expected = run(self.spec, plain, where)
                outputs = {a.name: np.zeros_like(x) for a, x in zip(self.spec.outputs, expected, strict=True)}
                assert invoke(self.spec, {**values, **outputs})[0] == "OK", where
                assert all(map(same_bits, outputs.values(), expected)), where

    def outcome(self, dtype: str, tier: str, label: str, values: dict[str, Any]) -> tuple[Array, ...]:
        """The outputs for special values, judged; for the tests that an operator has of its own."""
        need(tier)
        case, where = make_case(self.spec, label, values), self.where(dtype, tier, label)
        with using(tier):
            outputs = run(self.spec, values, where)
        judge(self.spec, case, outputs, where)
        return outputs

    # ------------------------------------------------------- shared memory

    def test_in_place(self, dtype: str, tier: str) -> None:
        """Each output in the memory of each input that the SPEC allows: the same bits as apart."""
        need(tier)
        pairs = [(out.name, source) for out in self.spec.outputs for source in out.may_alias]
        if not pairs:
            pytest.skip(f"{self.name} has no output that may be an input")
        with using(tier):
            for case in cases(self.name, dtype):
                apart = run(self.spec, case.values, self.where(dtype, tier, case.label))
                for out, source in pairs:
                    for layout in ("packed", "reversed", "odd"):
                        where = self.where(dtype, tier, case.label, layout, f"{out} is {source}")
                        outputs = run(self.spec, case.values, where, layout, in_place={out: source})
                        assert all(map(same_bits, outputs, apart)), where

    def test_column_ranges_of_one_buffer(self, dtype: str) -> None:
        """An output beside an input in the rows of one buffer, as the parts of a fused q/k/v are: accepted."""
        spec = self.spec
        for case in cases(self.name, dtype):
            apart = dict(zip([a.name for a in spec.outputs], run(spec, case.values, self.where(dtype)), strict=True))
            for out, result in apart.items():
                for arg in spec.inputs_args:
                    x = case.values[arg.name]
                    if x is None or x.ndim < 2 or result.ndim < 2 or x.dtype != result.dtype:
                        continue
                    rows, columns = max(len(x), len(result)), [int(np.prod(y.shape[1:])) for y in (x, result)]
                    for first in (0, 1):
                        buffer = np.zeros((rows, sum(columns)), x.dtype)
                        cut = columns[first]
                        sides = (buffer[:, :cut], buffer[:, cut:])
                        left = sides[first][: len(x)].reshape(x.shape)
                        right = sides[1 - first][: len(result)].reshape(result.shape)
                        raw(left)[...] = raw(x)
                        if not (np.shares_memory(left, buffer) and np.shares_memory(right, buffer)):
                            continue
                        where = self.where(dtype, case.label, f"{out} beside {arg.name}")
                        given = {**case.values, **{k: np.zeros_like(y) for k, y in apart.items()}}
                        status, text = invoke(spec, {**given, arg.name: left, out: right})
                        assert status == "OK", f"{where}: {status}: {text}"
                        assert same_bits(np.ascontiguousarray(right), result), where
                        assert same_bits(np.ascontiguousarray(left), np.ascontiguousarray(x)), where

    # -------------------------------------------------------------- errors

    def valid(self, dtype: str) -> dict[str, Any]:
        dims, kind = error_dims(self.spec), self.spec.dtypes[dtype]
        inputs = self.spec.inputs(self.spec, np.random.default_rng(5), dims, kind)
        return {**empty_outputs(self.spec, dims, kind), **inputs}

    def outputs_that_overlap_themselves(self) -> Iterator[ErrorCase]:
        """Rows that are all one row in memory; in outputs of a single axis that would be a STRIDE error."""
        for arg in self.spec.outputs:
            if len(arg.shape.split()) > 1:

                def folded(v: dict[str, Any], name: str = arg.name) -> dict[str, Any]:
                    x = v[name]
                    return {name: np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:]))}

                yield ErrorCase(f"{arg.name}: all rows one row", "ALIAS", folded, (self.name, arg.name))

    def test_refusals(self, dtype: str) -> None:
        """Every error of the SPEC, through the C ABI and through Python: status, message, and outputs left alone."""
        spec = self.spec
        function = getattr(llaisys.ops, self.name)
        for case in [*refusals(spec), *self.outputs_that_overlap_themselves()]:
            values = self.valid(dtype)
            values.update(case.change(values))
            values.update({k: np.asarray(x) for k, x in values.items() if isinstance(x, np.generic)})
            outputs = {a.name: values[a.name] for a in spec.outputs}
            for output in outputs.values():
                raw(output)[...] = np.void(b"\x5a" * output.dtype.itemsize)
            before = {name: output.tobytes() for name, output in outputs.items()}
            where = self.where(dtype, case.title)
            status, text = invoke(spec, values)
            assert status == case.status, f"{where}: expected {case.status}, found {status}: {text}"
            assert text.startswith(f"{self.name}: ") and all(n in text for n in case.names), f"{where}: {text}"
            assert all(x.tobytes() == before[name] for name, x in outputs.items()), f"{where}: outputs were written to"

            given = tuple(outputs.values())
            arguments = [values[a.name] for a in spec.inputs_args] + [values[s.name] for s in spec.scalars]
            faulty = next((a for a in spec.inputs_args if case.title.startswith(f"{a.name}: ")), None)
            converted = faulty and (case.status == "STRIDE" or (case.status == "DTYPE" and faulty.dtype == "i64"))
            if converted:  # Python copies what the C entry refuses
                function(*arguments, out=given if len(given) > 1 else given[0])
                continue
            with pytest.raises(CLASSES[case.status]) as caught:
                function(*arguments, out=given if len(given) > 1 else given[0])
            text = str(caught.value)
            assert text.startswith(f"{self.name}: ") and all(n in text for n in case.names), f"{where}: {text}"
            assert all(x.tobytes() == before[name] for name, x in outputs.items()), f"{where}: outputs were written to"

    # -------------------------------------------------------------- Python

    def test_python(self, dtype: str) -> None:
        """`llaisys.ops` gives the bits of the C ABI on arrays of any layout, inputs without a contiguous last axis
        among them, and into `out=`."""
        spec, function = self.spec, getattr(llaisys.ops, self.name)
        for case in cases(self.name, dtype):
            expected = run(spec, case.values, self.where(dtype, case.label))
            for kind in (*LAYOUTS, "every other column"):
                where = self.where(dtype, case.label, kind, "through Python")
                values = dict(case.values)
                for arg in spec.inputs_args:
                    if (x := values[arg.name]) is not None and x.ndim and kind != "every other column":
                        values[arg.name] = place(x, arg, kind, lambda n: np.empty(n, np.uint8))[0]
                        raw(values[arg.name])[...] = raw(x)
                    elif x is not None and x.ndim:
                        values[arg.name] = np.repeat(x, 2, axis=-1)[..., ::2]
                arguments = [values[a.name] for a in spec.inputs_args] + [values[s.name] for s in spec.scalars]
                found = function(*arguments)
                results = found if isinstance(found, tuple) else (found,)
                assert all(map(same_bits, results, expected)), where
                outputs = tuple(np.zeros_like(x) for x in expected)
                returned = function(*arguments, out=outputs if len(outputs) > 1 else outputs[0])
                assert all(map(same_bits, outputs, expected)), where
                results = returned if isinstance(returned, tuple) else (returned,)
                assert all(a is b for a, b in zip(results, outputs, strict=True)), where

    # --------------------------------------------------------- able to fail

    def test_bound_can_fail(self, dtype: str) -> None:
        """Of what the kernel gave, one element moved just past the bound, one NaN, another shape or dtype: each is
        found, where it is, by the check that the cases go through."""
        found = 0
        for case in cases(self.name, dtype):
            outputs = run(self.spec, case.values, self.where(dtype, case.label))
            for n, (output, oracle) in enumerate(zip(outputs, case.oracles, strict=True)):
                for value, index in self.faults(output, oracle):
                    broken = output.copy()
                    broken[index] = value
                    verdict = check(broken, oracle, output.dtype)
                    assert not verdict and verdict.index == index, self.where(dtype, case.label, value)
                    self.must_fail(case, outputs, n, broken)
                    found += 1
                self.must_fail(case, outputs, n, output[None])
                self.must_fail(case, outputs, n, output.astype(np.float64))
        assert found >= 10

    def must_fail(self, case: Case, outputs: tuple[Array, ...], n: int, broken: Array) -> None:
        with pytest.raises(AssertionError, match="somewhere"):
            judge(self.spec, case, (*outputs[:n], broken, *outputs[n + 1 :]), "somewhere")

    def faults(self, output: Array, oracle: Oracle) -> Iterator[tuple[Any, tuple[int, ...]]]:
        usable = np.argwhere(np.isfinite(f64(output)) & np.isfinite(f64(oracle.y)) & (np.abs(f64(output)) < 1e4))
        if not len(usable) or output.size > 5000:
            return
        index = tuple(int(i) for i in usable[len(usable) // 2])
        if output.dtype == np.int64:
            yield output[index] + 1, index
            return
        if oracle.exact:
            yield np.nextafter(output[index], np.asarray(np.inf, output.dtype)), index
            yield np.copysign(np.asarray(np.nan), 1).astype(output.dtype), index
        else:
            yield just_outside(oracle, output.dtype, index), index
            yield np.asarray(np.nan).astype(output.dtype), index

    def must_notice(self, dtype: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """The kernel, called with other inputs or scalars than the oracle, does not pass in one of the cases."""
        for case in cases(self.name, dtype):
            values = {**case.values, **change(case.values)}
            outputs = run(self.spec, values, self.where(dtype, case.label))
            try:
                judge(self.spec, case, outputs, "changed")
            except AssertionError:
                return
        raise AssertionError(f"{self.where(dtype)}: the change passed in all cases")

    # ------------------------------------------------- in a process apart

    def test_guarded_memory_and_abuse(self) -> None:
        """Accesses outside the tensors and nonsense arguments, in a process of their own, as a defect may kill it."""
        child = Path(__file__).with_name("kernel_child.py")
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", str(child), self.name], capture_output=True, text=True, timeout=300
        )
        lines = done.stdout.splitlines() or ["nothing"]
        assert done.returncode == 0 and lines[-1] == "done", (
            f"{self.name}: ended with {done.returncode} during: {lines[-1]}\n{done.stderr[-3000:]}"
        )
