"""The text tools as a user runs them: from a corpus to tokens and back."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.datasets.indexed_dataset.sidecar import read_sidecar, tokenizer_settings
from megatron.core.errors import BackendError, ConfigError, DataError
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.helpers.tiny_tokenizers import SOURCE, sentencepiece_model
from tools import (
    inspect_dataset,
    make_stdlib_corpus,
    merge_datasets,
    preprocess_data,
    train_tokenizer,
)
from tools.preprocessing import sources

ROOT = Path(__file__).resolve().parents[2]
BYTES = ["--tokenizer-type", "ByteTokenizer"]
TEXTS = [f"def f{n}(x):\n\treturn  x + {n}  # caf\u00e9\r\n" * (1 + n % 7) for n in range(300)]


def _jsonl(path, texts=TEXTS, key="text"):
    path.write_text("".join(json.dumps({key: t, "n": str(n)}) + "\n" for n, t in enumerate(texts)))
    return path


def _documents(prefix):
    """Decode a dataset of bytes."""
    dataset = IndexedDataset(prefix)
    return [bytes(ids[ids < 256].tolist()).decode() for ids in dataset[:]]


def _preprocess(tmp_path, *flags, out="out", tokenizer=BYTES):
    preprocess_data.main([*flags, "--output-prefix", str(tmp_path / out), *tokenizer])
    return tmp_path / f"{out}_text_document"


def test_every_input_format_gives_the_same_tokens(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = _jsonl(tmp_path / "a.jsonl")
    content = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(content[:5000]) + gzip.compress(content[5000:])
    )
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(content[:5000]) + compress(content[5000:]))
    table = pyarrow.table({"n": list(range(300)), "text": TEXTS})
    parquet.write_table(table, tmp_path / "d.parquet")
    wanted = _preprocess(tmp_path, "--input", str(plain), "--append-eod")
    assert _documents(wanted) == TEXTS
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        found = _preprocess(tmp_path, "--input", str(tmp_path / name), "--append-eod", out=name)
        for suffix in (".bin", ".idx"):
            assert Path(f"{found}{suffix}").read_bytes() == Path(f"{wanted}{suffix}").read_bytes()


def test_a_text_file_is_a_document_or_a_document_per_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\nthree")
    prefix = _preprocess(tmp_path, "--input", str(tmp_path / "a.txt"))
    assert _documents(prefix) == ["one\ntwo\r\n\nthree"]
    per_line = ["--text-document-per-line", "--on-error", "skip"]
    prefix = _preprocess(tmp_path, "--input", str(tmp_path / "a.txt"), *per_line)
    assert _documents(prefix) == ["one", "two", "three"]


def test_globs_and_several_files_keep_their_order(tmp_path):
    for name in ("b2", "b1", "a"):
        _jsonl(tmp_path / f"{name}.jsonl", [name])
    files = [str(tmp_path / "b*.jsonl"), str(tmp_path / "a.jsonl")]
    assert _documents(_preprocess(tmp_path, "--input", *files)) == ["b1", "b2", "a"]


def test_every_key_gets_its_own_dataset(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    text = _preprocess(tmp_path, "--input", str(path), "--json-keys", "text", "n", "--append-eod")
    numbers = tmp_path / "out_n_document"
    assert _documents(text) == TEXTS
    assert _documents(numbers) == [str(n) for n in range(300)]
    assert read_sidecar(text).json_key == "text"
    assert read_sidecar(numbers).json_key == "n"
    assert read_sidecar(numbers).tokens == IndexedDataset(numbers).num_tokens


def test_the_output_does_not_depend_on_workers_partitions_or_chunks(tmp_path, monkeypatch):
    path = str(_jsonl(tmp_path / "a.jsonl"))
    model = str(sentencepiece_model(tmp_path / "T.model"))
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    found = []
    for workers, partitions, chunk_bytes in [("1", "1", 1 << 19), ("2", "2", 3000), ("3", "1", 1)]:
        monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
        flags = ["--input", path, "--workers", workers, "--partitions", partitions, "--append-eod"]
        prefix = _preprocess(tmp_path, *flags, tokenizer=tokenizer)
        found.append([Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx", ".json")])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_one_record_is_enough(tmp_path, end):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}' + end)
    assert _documents(_preprocess(tmp_path, "--input", str(tmp_path / "a.jsonl"))) == ["x"]


def test_the_end_of_document_ends_each_document_only_when_asked(tmp_path):
    path = str(_jsonl(tmp_path / "a.jsonl", ["ab"]))
    assert IndexedDataset(_preprocess(tmp_path, "--input", path))[0].tolist() == [97, 98]
    prefix = _preprocess(tmp_path, "--input", path, "--append-eod")
    assert IndexedDataset(prefix)[0].tolist() == [97, 98, 256]
    sidecar = read_sidecar(prefix)
    assert (sidecar.append_eod, sidecar.eod_id, sidecar.vocab_size) == (True, 256, 257)
    assert (sidecar.documents, sidecar.tokens, sidecar.dtype) == (1, 3, "uint16")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65498, "uint16"), (65536, "int32")])
def test_the_vocabulary_chooses_the_dtype_and_no_id_is_lost(tmp_path, vocab_size, dtype):
    path = str(_jsonl(tmp_path / "a.jsonl", [f"0 {vocab_size - 1}"]))
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]
    prefix = _preprocess(tmp_path, "--input", path, "--append-eod", tokenizer=tokenizer)
    assert IndexedDataset(prefix)[0].tolist() == [0, vocab_size - 1, vocab_size]
    assert read_sidecar(prefix).dtype == dtype


def test_a_missing_package_is_named_with_a_substitute(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(BackendError, match=r"megatron-moe\[zstd\].*recompress it as \.gz"):
        _preprocess(tmp_path, "--input", str(tmp_path / "a.jsonl.zst"))


def test_a_parquet_file_without_the_column_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; it has \['body'\]"):
        _preprocess(tmp_path, "--input", str(tmp_path / "a.parquet"))


def test_progress_lines_are_megatrons(tmp_path, capsys):
    _preprocess(tmp_path, "--input", str(_jsonl(tmp_path / "a.jsonl")))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Processed 300 documents (")
    assert " docs/s, " in line
    assert " MB/s)." in line


def test_a_trained_tokenizer_gives_python_source_back_exactly(tmp_path, capsys):
    library = Path(json.__file__).parent
    texts = [path.read_bytes().decode() for path in sorted(library.glob("*.py"))]
    corpus = _jsonl(tmp_path / "c.jsonl", [*texts, SOURCE])
    flags = ["--input", str(corpus), "--vocab-size", "600", "--num-threads", "1"]
    train_tokenizer.main([*flags, "--output", str(tmp_path / "T.model")])
    train_tokenizer.main([*flags, "--model-prefix", str(tmp_path / "U")])
    assert (tmp_path / "T.model").read_bytes() == (tmp_path / "U.model").read_bytes()
    tokenizer = SentencePieceTokenizer(tmp_path / "T.model")
    assert tokenizer.vocab_size == 600
    for text in [*texts, texts[0].replace("\n", "\r\n"), SOURCE, "\u2581\t\U0001f389 \x0c\n "]:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert "600 ids" in capsys.readouterr().out


def test_a_vocabulary_too_large_for_the_text_is_refused(tmp_path):
    corpus = str(_jsonl(tmp_path / "c.jsonl", ["a b"]))
    flags = ["--input", corpus, "--vocab-size", "5000", "--output", str(tmp_path / "T.model")]
    with pytest.raises(DataError, match=r"cannot make --vocab-size 5000 .* too high"):
        train_tokenizer.main(flags)
    with pytest.raises(ConfigError, match="--vocab-size 200 must be 300 or more"):
        train_tokenizer.main([*flags, "--vocab-size", "200"])


def _library(folder):
    for name in ("b.py", "a.py", "site-packages/c.py", "test/d.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"x = {name!r}\n")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    return folder


def test_the_corpus_is_the_library_in_a_fixed_order(tmp_path, capsys):
    library = _library(tmp_path / "lib")
    flags = ["--library", str(library), "--output"]
    make_stdlib_corpus.main([*flags, str(tmp_path / "c.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    # too small, so that the tests are taken as well
    assert {record["path"] for record in records} == {"a.py", "b.py", "test/d.py"}
    assert records[0].keys() == {"text", "path"}
    assert "only 0.0 MB, less than 10" in capsys.readouterr().err
    make_stdlib_corpus.main([*flags, str(tmp_path / "again.jsonl")])
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    make_stdlib_corpus.main([*flags, str(tmp_path / "other.jsonl"), "--seed", "3"])
    assert (tmp_path / "c.jsonl").read_bytes() != (tmp_path / "other.jsonl").read_bytes()
    assert len(list(make_stdlib_corpus.source_files(library, with_tests=False))) == 2


def test_inspection_shows_counts_and_text(tmp_path, capsys):
    model = str(sentencepiece_model(tmp_path / "T.model"))
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    path = str(_jsonl(tmp_path / "a.jsonl", [SOURCE, "x = 1\n"]))
    _preprocess(tmp_path, "--input", path, "--append-eod", tokenizer=tokenizer)
    capsys.readouterr()
    flags = [str(tmp_path / "out"), "--checksum", "--document", "0", "1", "--max-tokens", "9999"]
    inspect_dataset.main(flags)
    said = capsys.readouterr().out
    for part in ("documents  2", "dtype      uint16", "SentencePieceTokenizer", SOURCE, "x = 1\n"):
        assert part in said
    assert said.count("sha256 ") == 2
    with pytest.raises(DataError, match="--document 2 must lie in 0 to 1"):
        inspect_dataset.main([str(tmp_path / "out"), "--document", "2"])


def test_inspection_names_the_document_with_an_id_beyond_the_vocabulary(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "d.bin") as builder:
        builder.add_document([1, 2])
        builder.add_document([3, 300])
        builder.finalize(tmp_path / "d.idx")
    with pytest.raises(DataError, match="document 1 holds the id 300"):
        inspect_dataset.main([str(tmp_path / "d"), *BYTES])


def test_histograms_count_by_powers_of_two():
    lines = inspect_dataset.histogram_lines(np.array([1, 5, 6, 7, 8]))
    counts = [int(line.split()[3]) for line in lines]
    assert counts == [1, 0, 3, 1]


def test_merged_datasets_hold_all_documents_and_the_tokenizer(tmp_path):
    model = str(sentencepiece_model(tmp_path / "T.model"))
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    parts = []
    for name in ("p", "q"):
        path = str(_jsonl(tmp_path / f"{name}.jsonl", [f"{name} = 1", "pass"]))
        parts.append(_preprocess(tmp_path, "--input", path, out=name, tokenizer=tokenizer))
    target = tmp_path / "sub" / "all"
    flags = ["--input", *map(str, parts), "--output-prefix", str(target)]
    merge_datasets.main(flags)
    merged = IndexedDataset(target)
    merged.verify()
    wanted = [ids.tolist() for part in parts for ids in IndexedDataset(part)[:]]
    assert [ids.tolist() for ids in merged[:]] == wanted
    sidecar = read_sidecar(target)
    assert (sidecar.documents, sidecar.tokens) == (4, merged.num_tokens)
    assert build_tokenizer(tokenizer_settings(target, sidecar)).fingerprint() == sidecar.fingerprint
    assert sidecar.tokenizer_files["tokenizer_model"].relative == "../T.model"


def test_datasets_of_other_tokenizers_or_dtypes_are_not_merged(tmp_path):
    path = str(_jsonl(tmp_path / "a.jsonl", ["1 2"]))
    one = _preprocess(tmp_path, "--input", path, out="one")
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
    two = _preprocess(tmp_path, "--input", path, out="two", tokenizer=[*null, "50"])
    target = str(tmp_path / "all")
    with pytest.raises(DataError, match="do not belong together: vocab_size is 257"):
        merge_datasets.main(["--input", str(one), str(two), "--output-prefix", target])
    wide = _preprocess(tmp_path, "--input", path, out="wide", tokenizer=[*null, "99999"])
    for prefix in (one, wide):
        Path(f"{prefix}.json").unlink()
    with pytest.raises(DataError, match=r"holds uint16, .* holds int32"):
        merge_datasets.main(["--input", str(one), str(wide), "--output-prefix", target])
    assert list(tmp_path.glob("all*")) == []


@pytest.mark.parametrize(
    "tool",
    ["preprocess_data", "train_tokenizer", "inspect_dataset", "merge_datasets",
     "make_stdlib_corpus", "show_config"],
)  # fmt: skip
def test_help_comes_at_once_and_without_torch(tool, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{tool}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'tools' / tool)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert ("Show every option of a run" in done.stdout) == (tool == "show_config")
