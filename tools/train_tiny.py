"""Train the embedded model, `llaisys/data/tiny`, from nothing but the Python that runs this script.

A parity test on random weights proves little: the logits of a random network are almost flat, so the winning token is
decided by noise. A trained network has margins, and a wrong kernel visibly turns its text into rubbish. The model must
also be ours to give away and possible to make again, hence the training text: the sources of the standard library,
which every machine with Python has.

The shape is awkward on purpose. Grouped-query attention with an odd ratio (6 query heads on 2 key/value heads), a head
dimension that is neither hidden_size / heads nor a power of two, biases that are not zero, tied embeddings: each of
them is a place where an engine that guesses goes wrong.

    python tools/train_tiny.py --work /tmp/tiny --steps 1300

Interrupt it at will: the same command goes on from the last checkpoint in `--work`. Which text comes at which step is
a function of the step number alone and needs no saving. `--minutes` bounds the time; a later run with more minutes goes
on from there, at the learning rate that the longer schedule has at that point.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
import tokenize
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

# ---------------------------------------------------------------------------------------------------------------------
# Constants: what the model is
# ---------------------------------------------------------------------------------------------------------------------

#: Qwen2 adds its special tokens behind the learned vocabulary; so do we.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 4096
CONTEXT = 2048
MAX_FOLDER_BYTES = 9_500_000
PROMPT = "def fibonacci(n):"

#: The word split of Qwen2: contractions, words with a leading character, digits, punctuation, line ends, spaces.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json in the form of the published Qwen2 checkpoints, which transformers 4 and 5 both read."""
    endoftext = tokenizer.token_to_id(SPECIAL_TOKENS[0])
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": endoftext,
        "eos_token_id": endoftext,
        "head_dim": 48,
        "hidden_act": "silu",
        "hidden_size": 224,
        "initializer_range": 0.02,
        "intermediate_size": 576,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": 5,
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


@dataclass(frozen=True)
class Recipe:
    """How to train. A checkpoint of another recipe is refused, because its schedule would no longer fit."""

    steps: int
    seed: int
    #: Tokens per step. Small: a CPU affords few tokens, so that their number is better spent on steps.
    batch_tokens: int = 2048
    #: Text is shuffled in pieces of this length, the longest row that is trained on.
    block: int = 1024
    #: Row lengths and how often each is drawn: short rows are cheap, long ones keep late positions meaningful.
    row_lengths: tuple[int, ...] = (512, 1024)
    row_weights: tuple[float, ...] = (0.7, 0.3)
    warmup: int = 20
    muon_lr: float = 0.03
    adam_lr: float = 8e-3
    weight_decay: float = 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

#: Not prose and not programs, or not the standard library proper.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib-dynload", "ensurepip"}
SKIPPED_FILES = {"html/entities.py", "this.py", "stringprep.py", "pydoc_data/topics.py"}
#: Tables that a program wrote, by what their first lines say, and the code pages, by what they define.
GENERATED_MARKS = ("generated by", "generated from", "autogenerated", "auto-generated", "automatically generated")
CODE_PAGE_MARKS = ("decoding_table = (", "decoding_map = codecs")


@dataclass(frozen=True)
class Document:
    """One source file; `name` is its path inside the library, so that nothing depends on where Python is installed."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is for validation; by a hash of the name, so that a file never changes sides."""
        return hashlib.sha256(self.name.encode()).digest()[0] < 8  # 1 in 32


def machine_paths() -> list[str]:
    """Return the folders of this machine that must not leak into the model; the common prefixes betray nothing."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path.home()), str(Path.cwd()), tempfile.gettempdir()}
    return sorted(paths - {"/", "/usr", "/usr/local", "/tmp", "/root"})


def is_table(name: str, text: str) -> bool:
    """Whether a file is data in Python's clothing: such text teaches a language model only to recite numbers."""
    head = text[:600].lower()
    return (
        name in SKIPPED_FILES
        or any(mark in head for mark in GENERATED_MARKS)
        or (name.startswith("encodings/") and any(mark in text for mark in CODE_PAGE_MARKS))
    )


def collect_documents() -> list[Document]:
    """Read the standard library of the running Python, sorted by name, without tests, tables and build leftovers."""
    root = Path(sysconfig.get_paths()["stdlib"])
    forbidden = machine_paths()
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        build_leftover = relative.parts[0].startswith(("config-", "_sysconfigdata"))
        if folders & SKIPPED_FOLDERS or build_leftover:
            continue
        with tokenize.open(path) as file:  # honours the coding cookie
            text = unicodedata.normalize("NFC", file.read())
        if not text.strip() or is_table(relative.as_posix(), text) or any(p in text for p in forbidden):
            continue
        documents.append(Document(relative.as_posix(), text))
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Learn a byte-level BPE in Qwen2's form: NFC, Qwen2's word split, bytes as letters, special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, expected {VOCAB_SIZE}")
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer_config.json, with the keys the published Qwen2 has."""
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[0],
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": SPECIAL_TOKENS[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[Tensor]:
    """Encode each document, with <|endoftext|> behind it."""
    end = tokenizer.token_to_id(SPECIAL_TOKENS[0])
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return [torch.tensor([*encoding.ids, end], dtype=torch.int32) for encoding in encodings]


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """Packed training rows as a pure function of the step number.

    Each epoch joins the documents in a new order, cuts the stream into blocks and shuffles these. A batch is a few
    blocks of different files, seen as rows of one length. Nothing is padded, and no token comes twice in an epoch.
    """

    def __init__(self, documents: list[Tensor], recipe: Recipe) -> None:
        """Keep the encoded documents; `recipe` says how they are cut."""
        self.documents = documents
        self.recipe = recipe
        self.blocks_per_step = recipe.batch_tokens // recipe.block
        tokens = sum(len(document) for document in documents)
        # One block less than fits: it pays for the random start of the epoch and for the target of the last token.
        self.steps_per_epoch = (tokens // recipe.block - 1) // self.blocks_per_step
        self._epoch = -1
        self._blocks = torch.empty(0)

    def _cut(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        block = self.recipe.block
        order = torch.randperm(len(self.documents), generator=generator).tolist()
        stream = torch.cat([self.documents[i] for i in order])
        start = int(torch.randint(block, (1,), generator=generator))
        blocks = stream[start:].unfold(0, block + 1, block)  # one token more: the target of the last one
        return blocks[torch.randperm(len(blocks), generator=generator)]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, both [rows, row length]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._blocks = epoch, self._cut(epoch)
        blocks = self._blocks[index * self.blocks_per_step :][: self.blocks_per_step].long()
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        drawn = torch.multinomial(torch.tensor(self.recipe.row_weights), 1, generator=generator)
        length = self.recipe.row_lengths[int(drawn)]
        return blocks[:, :-1].reshape(-1, length), blocks[:, 1:].reshape(-1, length)


def validation_rows(documents: list[Tensor], length: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the held-out text as inputs and targets, evenly picked if there is a limit to the number of rows."""
    rows = torch.cat(documents).unfold(0, length + 1, length).long()
    if limit is not None and limit < len(rows):
        rows = rows[torch.linspace(0, len(rows) - 1, limit).long()]
    return rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, for the weight matrices of the layers.

    It is known to need clearly fewer steps than AdamW, and steps are what a CPU is short of. torch.optim.Muon does the
    iteration in bfloat16, which a processor without bfloat16 arithmetic emulates slowly; hence these lines in float32.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """Take matrices only."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
        """Push all singular values of a stack of matrices towards one by the quintic Newton-Schulz iteration."""
        transposed = matrices.shape[-2] > matrices.shape[-1]
        x = matrices.mT if transposed else matrices
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(iterations):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if transposed else x

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update; matrices of one shape go through the iteration as one stack, which keeps the products large."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                shapes.setdefault(param.shape, []).append(param)
            for (rows, columns), params in shapes.items():
                directions = []
                for param in params:
                    state = self.state[param]
                    if not state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                    directions.append(param.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
                updates = self.orthogonalise(torch.stack(directions))
                scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def make_optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Split the parameters: Muon for the layers' matrices, AdamW for the embedding, the norms and the biases."""
    matrices, vectors, biases = [], [], []
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            biases.append(param)
        elif "layers" in name and param.ndim == 2:
            matrices.append(param)
        else:
            vectors.append(param)
    adam_groups = [{"params": vectors}, {"params": biases}]
    return [
        Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(adam_groups, lr=recipe.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]


def rate_factor(warm: float, done: float) -> float:
    """Return the factor on the learning rates: a linear warm-up, then half a cosine from 1 down to 1 %."""
    return min(1.0, warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def loss_of(model: Qwen2ForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per token."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def mean_loss(model: Qwen2ForCausalLM, inputs: Tensor, targets: Tensor) -> float:
    """Return the mean loss over many rows, a few at a time."""
    chunks = max(1, math.ceil(inputs.numel() / 4096))
    pieces = zip(inputs.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return sum(loss_of(model, x, y).item() * y.numel() for x, y in pieces if y.numel()) / targets.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Writing and checking the folder
# ---------------------------------------------------------------------------------------------------------------------


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return generation_config.json: greedy, and ended by either end token, as a list, which engines must cope with."""
    end, _, turn_end = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    return {"bos_token_id": end, "do_sample": False, "eos_token_id": [end, turn_end], "pad_token_id": end}


def export(model: Qwen2ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder in Hugging Face layout, in bfloat16.

    Others load the folder while training goes on, so each file is made beside it and renamed into place.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tiny-") as temporary:
        folder = Path(temporary)
        config = model_config(tokenizer)
        for name, content in (
            ("config.json", config),
            ("generation_config.json", generation_config(tokenizer)),
            ("tokenizer_config.json", tokenizer_config(tokenizer)),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        # Without indentation: it would double the largest of the text files.
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
        weights = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
        weights.pop("lm_head.weight", None)  # tied to the embedding
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            file.replace(out / file.name)


@torch.no_grad()
def report(out: Path, tokenizer: Tokenizer, documents: list[Document]) -> None:
    """Load the folder as a user would, check it, and print what is worth knowing about it."""
    auto = AutoTokenizer.from_pretrained(out)
    held_out = [document for document in documents if document.held_out]
    for document in held_out:
        ids = tokenizer.encode(document.text).ids
        if auto(document.text)["input_ids"] != ids or auto.decode(ids) != document.text:
            raise RuntimeError(f"{document.name}: the folder's tokenizer disagrees with the one that was trained")

    # The rounded weights, but f32 arithmetic: the figures then depend on the model, not on a machine's bfloat16.
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    encoded = encode_documents(tokenizer, held_out)
    tokens, size = sum(map(len, encoded)), sum(len(document.text.encode()) for document in held_out)
    for length in (256, 1024, CONTEXT):
        loss = mean_loss(model, *validation_rows(encoded, length))
        bits = loss / math.log(2) * tokens / size
        print(f"validation, rows of {length:4}: {loss:.4f} nats a token, {bits:.3f} bits a byte")

    logits = torch.cat([model(input_ids=row[None]).logits[0] for row in validation_rows(encoded, 512, limit=24)[0]])
    report_margins("held-out text", logits)
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    sample = model.generate(prompt, max_new_tokens=128, do_sample=False)
    report_margins("greedy sample", model(input_ids=sample).logits[0, prompt.shape[1] - 1 : -1])
    biases = {name: param.abs().mean().item() for name, param in model.named_parameters() if name.endswith("bias")}
    smallest = min(biases, key=biases.__getitem__)
    print(f"biases: {len(biases)}, the smallest mean magnitude is {biases[smallest]:.4f} in {smallest}")
    print(f"parameters: {sum(param.numel() for param in model.parameters()):,}")
    print(f"--- {PROMPT!r}, greedy, {sample.shape[1] - prompt.shape[1]} tokens")
    print(tokenizer.decode(sample[0].tolist(), skip_special_tokens=False))
    print("---")

    sizes = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    print(f"files: {sizes}, together {sum(sizes.values()):,} bytes")
    if sum(sizes.values()) > MAX_FOLDER_BYTES:
        raise RuntimeError(f"{out} is larger than {MAX_FOLDER_BYTES:,} bytes")


def report_margins(title: str, logits: Tensor) -> None:
    """Print how far the best token leads the second: what a parity test of tokens can count on."""
    best = logits.topk(2).values
    margin = best[:, 0] - best[:, 1]
    low, median, high = margin.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    close = (margin < 0.05).float().mean().item()
    print(
        f"top-1/top-2 margin, {title}: 5 % {low:.3f}, median {median:.3f}, 95 % {high:.3f}; "
        f"smallest {margin.min().item():.4f}, below 0.05 in {close:.1%} of {len(margin)} positions"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def load_or_train_tokenizer(work: Path, documents: list[Document]) -> Tokenizer:
    """Return the tokenizer of an earlier run in `work`, for weights mean nothing without it, or train one."""
    path = work / "tokenizer.json"
    if not path.exists():
        started = time.monotonic()
        train_tokenizer([document.text for document in documents if not document.held_out]).save(str(path))
        print(f"tokenizer: {VOCAB_SIZE} tokens, {time.monotonic() - started:.1f} s", flush=True)
    return Tokenizer.from_file(str(path))


@dataclass
class Progress:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: Path, recipe: Recipe, progress: Progress, model: Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Write a checkpoint that is either whole or not there."""
    state = {
        "recipe": asdict(recipe),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(
    path: Path, recipe: Recipe, model: Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> Progress:
    """Restore a checkpoint, if there is one."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise typer.BadParameter(f"{path} is of another recipe: {state['recipe']}; give another --work")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def due(minutes: float, since: float) -> bool:
    """Whether that many minutes went by."""
    return time.monotonic() - since > minutes * 60


def train(
    recipe: Recipe,
    tokenizer: Tokenizer,
    documents: list[Document],
    work: Path,
    out: Path,
    minutes: float,
    snapshot_minutes: float,
    compiled: bool,
) -> Qwen2ForCausalLM:
    """Train, or go on training, and return the model.

    The schedule ends with the steps or with the minutes, whichever comes first: a machine that others use too is no
    reason to stop at a high learning rate, which would waste most of what was learnt.
    """
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(Qwen2Config(**model_config(tokenizer))).float()
    optimizers = make_optimizers(model, recipe)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    checkpoint = work / "checkpoint.pt"
    progress = load_checkpoint(checkpoint, recipe, model, optimizers)

    batches = Batches(encode_documents(tokenizer, [d for d in documents if not d.held_out]), recipe)
    held_out = encode_documents(tokenizer, [d for d in documents if d.held_out])
    watched = validation_rows(held_out, 512, limit=32)
    print(
        f"{sum(map(len, batches.documents)):,} training tokens, {sum(map(len, held_out)):,} held out; "
        f"{recipe.steps} steps are {recipe.steps / batches.steps_per_epoch:.2f} epochs; from step {progress.step}",
        flush=True,
    )

    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    saved = exported = tick = time.monotonic()
    losses: list[float] = []
    shown = replace(progress)
    while (done := max(progress.step / recipe.steps, progress.seconds / 60 / minutes)) < 1:
        factor = rate_factor((progress.step + 1) / recipe.warmup, done)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = step_loss(model, *batches[progress.step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.step += 1
        now = time.monotonic()
        progress.seconds, tick = progress.seconds + now - tick, now

        if progress.step % 10 == 0:
            pace = (progress.seconds - shown.seconds) / (progress.step - shown.step)
            left = min((recipe.steps - progress.step) * pace / 60, minutes - progress.seconds / 60)
            train_loss = sum(losses[-10:]) / len(losses[-10:])
            speed = f"{recipe.batch_tokens / pace:.0f} tokens/s, {left:.1f} min left"
            print(f"step {progress.step:5}  {done:4.0%}  loss {train_loss:.3f}  {speed}", flush=True)
            shown = replace(progress)
        if progress.step % 100 == 0:
            print(f"step {progress.step:5}  validation loss {mean_loss(model, *watched):.4f}", flush=True)
        if due(2.0, saved):
            save_checkpoint(checkpoint, recipe, progress, model, optimizers)
            saved = time.monotonic()
        if snapshot_minutes and due(snapshot_minutes, exported):
            export(model, tokenizer, out)
            exported = time.monotonic()
            print(f"step {progress.step:5}  snapshot in {out}", flush=True)
    save_checkpoint(checkpoint, recipe, progress, model, optimizers)
    print(f"trained {progress.step} steps in {progress.seconds / 60:.1f} min", flush=True)
    return model


def counted(documents: list[Document]) -> Iterator[str]:
    """Yield the lines that say what the text is."""
    held = [document for document in documents if document.held_out]
    total = sum(len(document.text.encode()) for document in documents)
    yield f"Python {sys.version.split()[0]}: {len(documents)} files, {total:,} bytes; {len(held)} files held out"


def main(
    work: Annotated[Path, typer.Option(help="Folder for the tokenizer and the checkpoint, outside the repository.")],
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path(__file__).parents[1] / "llaisys/data/tiny",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps; the schedule ends with the last.")] = 1300,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="The schedule ends by then, if the steps are not done.")
    ] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the order of the text.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = os.cpu_count() or 1,
    snapshot_minutes: Annotated[float, typer.Option(min=0, help="Export to --out this often; 0 is never.")] = 10.0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Fuse with torch.compile (needs g++).")
    ] = True,
    report_only: Annotated[bool, typer.Option("--report-only", help="Check the model in --out and end.")] = False,
) -> None:
    """Train the embedded model and write it to --out, or go on where an interrupted run in --work stopped."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    documents = collect_documents()
    for line in counted(documents):
        print(line, flush=True)
    if report_only:
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = load_or_train_tokenizer(work, documents)
        recipe = Recipe(steps, seed)
        with tempfile.TemporaryDirectory(prefix="train-tiny-") as cache:
            # Compiled code is not kept: if an interrupted run left half a library there, no later run could load it.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
            model = train(recipe, tokenizer, documents, work, out, minutes, snapshot_minutes, compiled)
        export(model, tokenizer, out)
    report(out, tokenizer, documents)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
