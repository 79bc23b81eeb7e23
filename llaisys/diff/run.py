"""`run`: certifies a native run, node by node, while it runs."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .. import _lib
from ..checkpoint import Checkpoint
from ..doctor import cpu_model
from ..errors import IndexRangeError, InvalidArgumentError
from ..models import Qwen2
from ..models.generation import CachedSequence
from ..models.nodes import Kernel, choose_kernels
from ..models.session import as_tokens
from ..reference import FLOATS
from .bits import first_nonfinite
from .context import Context
from .finish import finish
from .ledger import MAIN, UNTAPPED, Entry, Ledger
from .local import Certifier
from .prefix import INFER, certify_infer
from .repeat import Again, Digests, Rerun
from .report import Report
from .trace import TraceWriter
from .untapped import LogitBits, Pass, Way, certify_untapped, pieces
from .watch import Broken, Visitor, Watch
from .weights import WeightBits
from .wiring import wire

#: What is done, the step, the site that just ran.
Progress = Callable[[str, int, str], None]

#: Bytes that certificates take at once, if `max_memory` does not say less.
_BUDGET = 256 << 20
#: Logits of the prefill that are asked for, at most, beyond those of the last token.
_LOGITS = 1 << 20
#: How the tokens behind a cut are given: in pieces of this many, then the rest.
_PIECES = (1, 2, 5, 8, 16)


def run(
    model: str | os.PathLike[str] = "tiny",
    prompt: str | None = None,
    decode: int = 8,
    *,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    isa: str | None = None,
    threads: int | None = None,
    oracle: str | None = None,
    swap: Mapping[str, Kernel] | None = None,
    save: str | os.PathLike[str] | None = None,
    save_sites: str | Sequence[str] | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    reproducers: str | os.PathLike[str] | None = None,
    context: bool = True,
) -> Report:
    """Run a prompt and `decode` greedy steps on the native engine, and certify every node of it.

    The certificates are EDGE, PARAM, STATE, LOCAL and REPEAT (see `llaisys.diff.report`). Nodes are certified while
    the engine runs; a few of them are kept in memory, and the keys and values of the sequence once more. What passes
    with all certificates is rounding; the first node that does not is the one to blame.

    Args:
        model: a folder in Hugging Face layout, or "tiny".
        prompt: the text to start from. Either this or `tokens`.
        decode: how many tokens to add.
        tokens: the prompt as token ids.
        dtype: "f32", "f16" or "bf16"; by default that of the checkpoint.
        isa: the instruction set tier; by default the one in use. It stays set.
        threads: threads of the kernels; by default those in use. They stay set.
        oracle: "hf" runs transformers beside it, as context; it must be installed.
        swap: kernels to put in place of the engine's, as `kernels` of `Qwen2`: {"rope": "reference"}.
        save: a file to write the nodes of the run to, for `llaisys trace-diff`.
        save_sites: which sites are saved (see `Session.tap`); all by default.
        max_memory: bytes that the process should not exceed. Certificates are then made in smaller parts, and the
            reference backend, should it need the weights a second time, is left out if they do not fit.
        progress: called with what is being done, the step and the site, after each node.
        reproducers: a folder to write the first faults to, one file each, for `llaisys replay`.
        context: whether to run the reference backend beside it. Without, no drift and no flips are told.

    Returns:
        A `Report`. Its `exit_code` is 0 if all is certified, 1 if a fault is named, 2 if neither can be said.

    Raises:
        CheckpointError: the folder is no sound Qwen2.
        InvalidArgumentError: an argument is out of range; neither or both of `prompt` and `tokens` are given.
        UnsupportedError: the machine lacks the tier.
        LibraryError: there is no library, or one with another ABI. `LLAISYS_LIBRARY` names the library under test.

    A fault that crashes the process takes this call with it; `llaisys.diff.run_isolated` runs it in another process.
    """
    begin = time.perf_counter()
    if isa is not None:
        _lib.set_isa(isa)
    if threads is not None:
        _lib.set_num_threads(threads)
    if (prompt is None) == (tokens is None):
        raise InvalidArgumentError(
            "prompt, tokens: expected one of them, found " + ("none" if prompt is None else "both")
        )
    if oracle not in (None, "hf"):
        raise InvalidArgumentError(f'oracle: expected "hf" or None, found {oracle!r}')
    if isinstance(decode, bool) or not isinstance(decode, int) or decode < 0:
        raise InvalidArgumentError(f"decode: expected an integer of at least 0, found {decode!r}")
    say: Progress = progress or (lambda scene, step, site: None)
    say("loading", 0, "")
    with Qwen2(model, dtype=dtype, kernels=swap) as engine:
        if tokens is None:
            assert prompt is not None
            ids = engine.tokenizer.encode(prompt)
            size = engine.config.vocab_size
            if ids and max(ids) >= size:
                raise IndexRangeError(f"prompt: the tokenizer gives {max(ids)}, the model has {size} tokens")
        else:
            ids = as_tokens("tokens", tokens, engine.config.vocab_size).tolist()
        most = engine.config.max_position_embeddings
        if not ids or len(ids) + decode > most:
            raise InvalidArgumentError(
                f"tokens: expected 1 to {most - decode} with {decode} to follow (max_position_embeddings is {most}), "
                f"found {len(ids)}"
            )
        runner = Runner(engine, str(model), ids, decode, swap or {}, oracle, max_memory, say)
        runner.trace(save, save_sites)
        try:
            report = runner.run(context)
            runner.save(report)
            finish(runner, report, None if reproducers is None else os.fspath(reproducers))
        finally:
            runner.close()
    report.seconds = time.perf_counter() - begin
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if max_memory is not None and report.peak_bytes > max_memory:
        report.notes.append(f"the process took {report.peak_bytes} bytes, more than the {max_memory} of max_memory")
    return report


class Runner:
    """One call of `run`, with all that takes part in it."""

    def __init__(
        self,
        engine: Qwen2,
        path: str,
        prompt: list[int],
        decode: int,
        swap: Mapping[str, Kernel],
        oracle: str | None,
        max_memory: int | None,
        say: Progress,
    ) -> None:
        self.engine, self.path, self.prompt, self.decode, self.say = engine, path, prompt, decode, say
        self.oracle, self.swap = oracle, swap
        self.checkpoint = Checkpoint.open(path)
        self.dtype = FLOATS[engine.dtype]
        self.wirings = wire(engine.config)
        self.kernels = {
            site: kernel for site, kernel in choose_kernels(swap, engine.sites).items() if kernel != "native"
        }
        self.ledger = Ledger(self.wirings, len(prompt), decode)
        self.weights = WeightBits(self.checkpoint, self.dtype)
        self.budget = _BUDGET
        self.max_memory = max_memory
        weights = engine.config.num_parameters * self.dtype.itemsize
        if max_memory is not None:
            self.budget = max(1 << 20, min(_BUDGET, (max_memory - weights) // 4))
        self.second_copy = max_memory is None or 2 * weights + (256 << 20) <= max_memory
        self.threads = _lib.num_threads()
        self.digests = Digests()
        self.logits = LogitBits()
        self.context: Context | None = None
        self.writer: TraceWriter | None = None
        self.notes: list[str] = []
        self.nonfinite: list[str] = []  # the first node that puts out NaN or infinities
        self.odd_logits = 0
        self.tokens = list(prompt)
        self.following: list[int] = []  # the token that the run would go on with, after the prompt and each step

    def trace(self, save: str | os.PathLike[str] | None, sites: str | Sequence[str] | None) -> None:
        """Write the nodes of the run to a file."""
        if save is not None:
            chosen = self.engine.find_sites(sites) if sites is not None else tuple(self.wirings)
            self.writer = TraceWriter(save, chosen)

    def save(self, report: Report) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.close(
                {
                    "model": report.model,
                    "config": _sizes(self.engine.config),
                    "dtype": report.dtype,
                    "isa": report.isa,
                    "threads": report.threads,
                    "machine": platform.machine(),
                    "cpu": cpu_model(),
                    "versions": report.versions,
                    "prompt": report.prompt,
                    "tokens": report.tokens,
                }
            )

    def watch(self, scene: str, visit: Visitor) -> Watch:
        """A fresh session, watched."""
        return Watch(
            self.engine.session(),
            self.ledger,
            self.weights,
            self.dtype,
            scene=scene,
            visit=visit,
            progress=self.say,
        )

    def run(self, context: bool) -> Report:
        """All scenes."""
        certifier = Certifier(self.ledger, self.budget, self.kernels, self._certified)
        try:
            try:
                self._main(certifier, context)
                self._repeat(certifier)
                certifier.drain()
            except Broken as broken:
                certifier.drain()
                self.notes.append(f"the run ended early, at {broken}")
        finally:
            certifier.close()
            _lib.set_num_threads(self.threads)
        return self._report()

    def _certified(self, entry: Entry) -> None:
        if entry.scene == MAIN:
            size = sum(x.size for x in entry.outputs.values())
            entry.size = size
        if not any(entry is kept for kept in self.ledger.evidence.values()):
            entry.forget()

    # -------------------------------------------------------------- scenes

    def _main(self, certifier: Certifier, context: bool) -> None:
        """The run itself: the prompt, then one token after the other. The session was used and reset before."""

        def visit(entry: Entry) -> None:
            if not recording:
                return
            self.digests.keep(entry)
            if self.context is not None:
                self.context.visit(entry)
            if self.writer is not None:
                self.writer.visit(entry)
            self._look(entry)
            self.ledger.entries.append(entry)
            certifier.submit(entry)

        recording = False
        watch = self.watch(MAIN, visit)
        try:
            watch.scene = "another text before"
            self._decoy(watch, len(self.prompt) + min(2, self.decode))
            watch.reset()
            if context:
                self._start_context()
            watch.scene, recording = MAIN, True
            rows = self._rows(len(self.prompt))
            if rows < len(self.prompt):
                self.notes.append(f"model.norm and lm_head of the prompt: the last {rows} of {len(self.prompt)} tokens")
            self._step(watch, 0, self.prompt, rows)
            for step in range(1, self.decode + 1):
                token = self.following[-1]
                self.tokens.append(token)
                self._step(watch, step, [token], 1)
        finally:
            watch.close()

    def _start_context(self) -> None:
        """The reference backend. It computes with the engine's own weights, where these were found to be those of the
        checkpoint, and else loads them."""
        weights = self.weights.certified()
        if weights is None and not self.second_copy:
            self.notes.append("the reference backend was left out: its copy of the weights does not fit in max_memory")
            return
        self.say("loading the reference", 0, "")
        self.context = Context(self.path, self.engine.config, self.engine.dtype, weights, self.oracle)

    def _step(self, watch: Watch, step: int, tokens: list[int], rows: int) -> None:
        logits = watch.forward(tokens, last=rows)
        self.odd_logits += int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))
        self.logits.keep(watch.length - len(logits), logits)
        self.following.append(int(logits[-1].argmax()))
        if self.context is not None:
            self.say("reference", step, "")
            self.context.step(step, tokens, logits, self.tokens)

    def _look(self, entry: Entry) -> None:
        """Note the first node whose output is not finite."""
        for name, x in entry.outputs.items():
            if not self.nonfinite and (odd := first_nonfinite(x)) is not None:
                step = "the prompt" if entry.step == 0 else f"decode step {entry.step}"
                where = f"{step}, position {entry.position + odd[0]}"
                self.nonfinite.append(f"the first node with {x[odd].item()} in {name} is {entry.site}, {where}")

    def _decoy(self, watch: Watch, count: int) -> None:
        """Other tokens, which must leave no trace."""
        size = self.engine.config.vocab_size
        room = self.engine.config.max_position_embeddings - watch.length
        rng = np.random.default_rng(count)
        if min(count, room) > 0:
            watch.forward(rng.integers(0, size, min(count, room)).tolist(), last=1)

    def _repeat(self, certifier: Certifier) -> None:
        """The same tokens in other ways."""
        more = max(2 * _lib.usable_cpus() + 1, self.threads + 1)
        tokens, count = self.tokens, len(self.tokens)

        def again(scene: str, threads: int, visit: Visitor | None = None) -> Watch:
            how = f"{scene}, {threads} thread{'s' if threads > 1 else ''}"
            compare = Again(self.ledger, self.digests, self.kernels, how, lambda entry: certifier.submit(entry.copy()))

            def both(entry: Entry) -> None:
                if watch.recording:
                    compare.visit(entry)
                    if visit is not None:
                        visit(entry)

            _lib.set_num_threads(threads)
            watch = self.watch(scene, both)
            return watch

        # As before, every node computed anew in passing.
        rerun = Rerun(self.ledger, self.kernels, (1, more), self.say)
        watch = again("the run again", 1 if self.threads > 1 else 2, rerun.visit)
        watch.forward(self.prompt, last=1)
        for token in tokens[len(self.prompt) :]:
            watch.forward([token], last=1)
        watch.close()

        # All at once; then cut back and written over, and the rest in pieces.
        watch = again("all tokens in one prefill, then cut", more)
        watch.forward(tokens, last=self._rows(count))
        for keep in dict.fromkeys((count // 2, max(0, count - 3))):
            watch.recording = False
            watch.truncate(keep)
            self._decoy(watch, count - keep)
            watch.truncate(keep)
            watch.recording = True
            for piece in pieces(tokens[keep:], _PIECES):
                watch.forward(piece, last=1)
        watch.close()

        # The prefix of another text, as `generate` reuses it.
        watch = again("after a text with the same beginning", self.threads)
        sequence = CachedSequence(watch)  # type: ignore[arg-type]
        shared = max(0, len(self.prompt) - 2)
        watch.recording = False
        size = self.engine.config.vocab_size
        sequence.start([*self.prompt[:shared], *((token + 1) % size for token in self.prompt[shared:])])
        watch.recording = True
        self.weights.again()  # each weight is looked at once more, after all that ran
        sequence.start(list(self.prompt))
        if tokens[len(self.prompt) :]:
            sequence.feed(tokens[len(self.prompt) :])
        watch.close()
        _lib.set_num_threads(self.threads)
        certifier.drain()
        self._untapped(more)

    def _untapped(self, more: int) -> None:
        """The same tokens with nobody watching, as users run them."""
        if self.kernels:
            self.notes.append(f"{UNTAPPED} and {INFER} were not tried: they have no part in swapped kernels")
            return
        other = [(token + 1) % self.engine.config.vocab_size for token in self.tokens]
        whole, half = len(self.tokens), len(self.tokens) // 2
        steps = [(len(self.prompt) + i, [token], 1) for i, token in enumerate(self.tokens[len(self.prompt) :])]
        cut: list[Pass] = [(0, self.tokens[:half], 1), (half, other[half:], 0)] if half else [(0, other, 0)]
        keep = half
        for piece in pieces(self.tokens[half:], _PIECES):
            cut.append((keep, piece, self._rows(len(piece))))
            keep += len(piece)
        ways = [
            Way("as in the run", self.threads, [(0, self.prompt, self._rows(len(self.prompt))), *steps]),
            Way("all tokens in one prefill", more, [(0, self.tokens, self._rows(whole))]),
            Way("cut back, and the rest in pieces", 1 if self.threads > 1 else 2, cut),
        ]
        if self.ledger.faults:  # then other splits may give other bits, with taps too
            del ways[1:]
        if not certify_untapped(self.engine, self.ledger, self.logits, ways, self.say):
            self.notes.append(f"{INFER} was not tried: {UNTAPPED} does not give the logits of the run as it is")
            return
        attention = next((site for site, wiring in self.wirings.items() if wiring.state), "lm_head")
        self.say(INFER, 0, "")
        certify_infer(self.engine, self.ledger, self.prompt, self.following[:4], attention)

    def _rows(self, tokens: int) -> int:
        """Of how many of the last tokens logits are asked for."""
        return min(tokens, max(1, _LOGITS // self.engine.config.vocab_size))

    def close(self) -> None:
        """Free the models beside the engine's."""
        if self.context is not None:
            self.context.close()
        if self.writer is not None:
            self.writer.abort()

    # -------------------------------------------------------------- report

    def _report(self) -> Report:
        entries = self.ledger.entries
        for (site, certificate), fault in self.ledger.faults.items():
            if certificate == "LOCAL" and not self.ledger.in_run(fault):
                continue  # of another call, whose ratio is not that of the run's; REPEAT says that they differ
            for entry in entries:
                if entry.site == site and entry.step == fault.step:
                    entry.outcomes[certificate] = "fault"  # also where a repetition found it
        for entry in entries:
            if entry.outcomes["REPEAT"] == "skipped":
                entry.outcomes["REPEAT"] = "pass"
        info = _lib.library_info()
        odd = [f"the logits of {self.odd_logits} positions are not finite"] if self.odd_logits else []
        return Report(
            model=self.path,
            dtype=self.engine.dtype,
            isa=_lib.isa(),
            threads=self.threads,
            layers=self.engine.config.num_hidden_layers,
            prompt=self.prompt,
            tokens=self.tokens,
            decode=self.decode,
            versions={
                "llaisys": info.version,
                "build": info.build_hash,
                "library": str(info.path),
                **({"override": _lib.OVERRIDE} if info.overridden else {}),
            },
            swaps={name: kernel if isinstance(kernel, str) else "function" for name, kernel in self.swap.items()},
            nodes=[self.ledger.result(entry) for entry in entries],
            faults=self.ledger.blamed(),
            flips=[] if self.context is None else self.context.flips,
            drift=[] if self.context is None else self.context.drift,
            notes=self.notes,
            nonfinite="; ".join([*filter(None, [self.weights.nonfinite]), *self.nonfinite, *odd]),
        )


def _sizes(config: Any) -> dict[str, Any]:
    """The numbers of a config that a run depends on."""
    return {name: x for name, x in asdict(config).items() if isinstance(x, (bool, int, float)) and x is not None}
