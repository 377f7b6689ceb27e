"""Every kind of bad input: one line that names file and line, exit code 2, no files left."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.errors import DataError, MegatronError
from tests.helpers.processes import child_seconds
from tests.helpers.tiny_tokenizers import sentencepiece_model
from tools import preprocess_data
from tools.preprocessing import sources

ROOT = Path(__file__).resolve().parents[2]
BYTES = ["--tokenizer-type", "ByteTokenizer"]
GOOD = b'{"text": "good"}\n'

# name -> (the bad line, what is said of it)
BAD = {
    "empty text": (b'{"text": ""}', "empty text: 'text'"),
    "blank line": (b"", "blank line"),
    "line of spaces": (b"  \t ", "blank line"),
    "missing key": (b'{"body": "x"}', r"missing key: no 'text' among \['body'\]"),
    "null": (b'{"text": null}', "null text: 'text'"),
    "number": (b'{"text": 5}', "text is not a string: 'text' is int"),
    "list": (b'["text"]', "not a JSON object: found list, need one per line"),
    "bad UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at offset 13"),
    "truncated JSON": (b'{"text": "half', "not JSON: Unterminated string starting at at column 10"),
    "plain text": (b"hello", "not JSON: Expecting value at column 1"),
    "half a surrogate pair": (b'{"text": "x\\ud83d"}', "half a surrogate pair: in 'text' at 1"),
    "deep": (b'{"a":' * 100_000, "not JSON: nested too deeply"),
}
# not bad at all
GOOD_LINES = {
    "CRLF": b'{"text": "good"}\r',
    "1 MB line": b'{"text": "' + b"x" * 2**20 + b'"}',
    "end of document as text": b'{"text": "</s>"}',
    "spaces around": b'  {"text": "good"}  ',
    "surrogate pair": b'{"text": "\\ud83c\\udf89"}',
}


def _run(tmp_path, *flags, tokenizer=BYTES):
    preprocess_data.main([*flags, "--output-prefix", str(tmp_path / "out"), *tokenizer])


def _outputs(tmp_path):
    return sorted(path.name for path in tmp_path.glob("out*"))


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_stops_with_file_and_line_and_leaves_nothing(tmp_path, name, workers):
    bad, message = BAD[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD * 2 + bad + b"\n" + GOOD)
    with pytest.raises(DataError, match=rf"in\.jsonl:3: {message}; --on-error skip"):
        _run(tmp_path, "--input", str(path), "--workers", workers)
    assert _outputs(tmp_path) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_lines_are_counted_over_all_chunks_and_the_first_bad_one_is_named(
    tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 40)
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD * 100 + b"{\n" + GOOD * 20 + b"\n" + GOOD)
    with pytest.raises(DataError, match=r"in\.jsonl:101: not JSON"):
        _run(tmp_path, "--input", str(path), "--workers", workers)


def test_skipping_counts_every_kind(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    lines = [bad for bad, _ in BAD.values()]
    path.write_bytes(b"".join(line + b"\n" + GOOD for line in lines))
    _run(tmp_path, "--input", str(path), "--on-error", "skip")
    said = capsys.readouterr().err
    assert f"Skipped {len(lines)} bad records (" in said
    for counted in ("2 blank line", "3 not JSON", "1 null text", "1 not UTF-8"):
        assert counted in said
    assert "in.jsonl:1: empty text" in said
    assert f"and {len(lines) - 5} more" in said
    assert len(IndexedDataset(tmp_path / "out_text_document")) == len(lines)


@pytest.mark.parametrize("name", GOOD_LINES)
def test_unusual_but_good_records_are_kept(tmp_path, name):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + GOOD_LINES[name] + b"\n" + GOOD)
    _run(tmp_path, "--input", str(path))
    dataset = IndexedDataset(tmp_path / "out_text_document")
    text = json.loads(GOOD_LINES[name])["text"]
    assert bytes(dataset[1].tolist()).decode() == text
    assert bytes(dataset[0].tolist()) == bytes(dataset[2].tolist()) == b"good"


def test_a_document_of_nothing_but_the_end_of_document_is_bad(tmp_path):
    model = sentencepiece_model(tmp_path / "T.model", user_defined_symbols=["\n", "\t", "<eod>"])
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "<eod>"}\n')
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    with pytest.raises(DataError, match=r"in\.jsonl:1: no tokens besides the end of document"):
        _run(tmp_path, "--input", str(path), tokenizer=tokenizer)


def test_text_the_tokenizer_refuses_is_a_bad_record(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "1 2"}\n{"text": "1 99999"}\n')
    with pytest.raises(DataError, match=r"in.jsonl:2: .* numbers from 0 to 9 .* found '99999'"):
        _run(tmp_path, "--input", str(path), tokenizer=["--tokenizer-type", "NullTokenizer",
                                                        "--vocab-size", "10"])  # fmt: skip


def test_a_record_bad_in_one_key_is_left_out_of_all(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "t": "b"}\n{"text": "c"}\n{"text": "d", "t": "e"}\n')
    _run(tmp_path, "--input", str(path), "--json-keys", "text", "t", "--on-error", "skip")
    both = [IndexedDataset(tmp_path / f"out_{key}_document") for key in ("text", "t")]
    assert [[chr(ids[0]) for ids in dataset[:]] for dataset in both] == [["a", "d"], ["b", "e"]]


def test_nothing_but_bad_records_is_an_error(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"no usable document in .*: 2 bad records \(2 blank"):
        _run(tmp_path, "--input", str(path), "--on-error", "skip")
    assert _outputs(tmp_path) == []


def test_a_cut_off_gz_is_named(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 1000)[:-10])
    with pytest.raises(DataError, match=r"in\.jsonl\.gz is damaged after line \d+ or cut short"):
        _run(tmp_path, "--input", str(path), "--on-error", "skip")
    assert _outputs(tmp_path) == []


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.txt.gz"])
def test_a_gz_that_is_none_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match=rf"{name} is no gzip file; if it is plain text, take"):
        _run(tmp_path, "--input", str(path))
    assert _outputs(tmp_path) == []


def test_an_error_leaves_an_older_dataset_as_it_was(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(GOOD)
    bad.write_bytes(GOOD + b"{\n")
    _run(tmp_path, "--input", str(good))
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    with pytest.raises(DataError):
        _run(tmp_path, "--input", str(bad))
    assert {path: path.read_bytes() for path in tmp_path.glob("out*")} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--input", "gone*.jsonl"], r"gone\*.jsonl matches no file"),
        (["--input", "."], "is a folder; use"),
        (["--input", __file__], r"\.py: unknown kind of file; known are \.jsonl"),
        (["--input", "{in}", "{in}"], "names .* twice"),
        (["--input", "{in}", "--json-keys", "a", "a"], "names a key twice"),
        (["--input", "{in}", "--json-keys", "a/b"], "a key names a file"),
        (["--input", "{in}", "--text-document-per-line"], "has no effect"),
    ],
)
def test_bad_flags_are_answered(tmp_path, flags, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(MegatronError, match=message):
        _run(tmp_path, *(flag.replace("{in}", str(path)) for flag in flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "in.jsonl", *BYTES], "in.jsonl:2: not JSON"),
        (["--input", "in.jsonl", *BYTES, "--workers", "2"], "in.jsonl:2: not JSON"),
        (["--input", "in.jsonl", *BYTES, "--split-sentences"], "does not offer: sentences"),
        (["--input", "in.jsonl", *BYTES, "--dataset-impl", "mmap"], "does not offer: the format"),
        (["--input", "in.jsonl", *BYTES, "--apend-eod"], "did you mean --append-eod?"),
        (["--input", "in.jsonl", *BYTES, "--xyzzy"], "error: unknown: --xyzzy (see --help)"),
        (["--input", "in.jsonl", *BYTES, "--workers", "0"], "0 must be 1 or more"),
        (["--input", "in.jsonl", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
          "gone.json"], "--tokenizer-model gone.json does not exist"),
        (["--input", "in.jsonl"], "required: --tokenizer-type"),
    ],
)  # fmt: skip
def test_the_command_exits_with_2_and_one_line(tmp_path, flags, message):
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"{\n")
    before = child_seconds()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--output-prefix", "o", *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert child_seconds() - before < 3
    assert list(tmp_path.glob("o*")) == []
