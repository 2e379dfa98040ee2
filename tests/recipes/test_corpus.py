"""Packing, the split, and shards that are refused by name."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from pretraining import corpus, packing
from pretraining.corpus import is_validation, load, read_documents, read_shard, split, split_stream
from pretraining.packing import Collate, Packed, PackedStream


def shard(path, tokens, version=1, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:4] = (20240520 if version == 1 else 20260317, version, len(tokens) if count is None else count, 2)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=np.uint16).tobytes())
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_a_shard_is_read(tmp_path, version):
    assert read_shard(shard(tmp_path / "a.bin", [5, 6, 65535], version)).tolist() == [5, 6, 65535]


def test_bad_shards_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin: the header promises 9 tokens"):
        read_shard(shard(tmp_path / "a.bin", [5, 6], count=9))
    (tmp_path / "b.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"b\.bin: truncated"):
        read_shard(tmp_path / "b.bin")
    (tmp_path / "c.bin").write_bytes(bytes(2048))
    with pytest.raises(ValueError, match=r"c\.bin: magic number 0"):
        read_shard(tmp_path / "c.bin")


def test_packing_gives_every_block_once_an_epoch_in_another_order():
    arrays = [np.arange(0, 43, dtype=np.int32), np.arange(43, 83, dtype=np.int32)]
    data = Packed(arrays, 20, samples=8, seed=1)
    epochs = [torch.cat([data[4 * e + k] for k in range(4)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == [*range(40), *range(43, 83)] for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(data[0], Packed(arrays, 20, samples=8, seed=1)[0])


class Counter:
    """A tokenizer of numbers."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_of_a_stream_as_many_documents_are_held_out_as_validation_takes():
    rows = Dataset.from_dict({"text": [" ".join([str(k)] * 19) for k in range(1, 41)]}).to_iterable_dataset()
    data = SimpleNamespace(column="text", length=20, validation_blocks=8)
    train, held = split_stream(rows, data, Counter(), seed=0)
    assert [int(block[0]) for block in held] == list(range(1, 9))
    assert sorted(int(block[0]) for block in train) == list(range(9, 41))
    with pytest.warns(UserWarning, match="40 blocks are held out, not 50"):
        split_stream(rows, SimpleNamespace(column="text", length=20, validation_blocks=50), Counter(), seed=0)


def test_a_stream_gives_every_block_once_and_far_from_its_neighbours():
    rows = [{"text": " ".join(str(20 * k + j) for j in range(1, 20))} for k in range(3000)]
    blocks = torch.stack(list(PackedStream(rows, "text", Counter(), 20, seed=1)))
    assert sorted(blocks[:, 0].tolist()) == [20 * k + 1 for k in range(3000)]
    assert (blocks[1:, 0] - blocks[:-1, 0]).abs().float().mean() > 20 * 200
    with pytest.raises(ValueError, match=r"no text in column 'body' \(data.column\), but \['text'\]"):
        next(iter(PackedStream(rows, "body", Counter(), 20, seed=1)))


def test_validation_shards_are_known_by_name_or_cut_from_the_first(tmp_path):
    data = SimpleNamespace(dataset=str(tmp_path), tokenizer=None, length=4, validation_blocks=2)
    shard(tmp_path / "a_train.bin", range(40))
    _, train, held = load(data, seed=0, samples=8)
    assert torch.cat(list(held)).tolist() == list(range(8))
    assert sorted(torch.cat([train[k] for k in range(8)]).tolist()) == list(range(8, 40))
    shard(tmp_path / "a_val.bin", range(100, 140))
    _, train, held = load(data, seed=0, samples=10)
    assert torch.cat(list(held)).min() == 100
    assert sorted(torch.cat([train[k] for k in range(10)]).tolist()) == list(range(40))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_local_files_are_read(tmp_path, suffix):
    texts = [f"document {k} tells of many things and of {k * k}" for k in range(80)]
    if suffix == "txt":
        for k, text in enumerate(texts):
            (tmp_path / f"{k:03}.txt").write_text(text)
    else:
        rows = Dataset.from_dict({"text": texts})
        getattr(rows, {"jsonl": "to_json", "parquet": "to_parquet"}[suffix])(tmp_path / f"a.{suffix}")
    data = SimpleNamespace(
        dataset=str(tmp_path), tokenizer=None, column="text", vocab_size=300, length=8, validation_blocks=2
    )
    tokenizer, train, held = load(data, seed=0, samples=4)
    assert "document" in tokenizer.decode(torch.cat([train[k] for k in range(4)]))
    assert len(held) == 2


def test_local_files_that_cannot_be_read_are_named(tmp_path):
    def refused(name, content, message, column="text"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_documents(str(tmp_path / name), column)

    refused("latin.txt", "é".encode("latin-1"), r"latin\.txt is no UTF-8 text")
    refused("a.jsonl", b'{"text": "a"}\n', r"a\.jsonl has no column 'body' \(data.column\), but \['text'\]", "body")
    refused("null.jsonl", b'{"text": "a"}\n{"text": null}\n', r"null\.jsonl: row 1 has None in column 'text'")
    refused("cut.jsonl", b'{"text": "a"}\n{"text": "b', r"cut\.jsonl cannot be read")
    refused("empty.jsonl", b"", "no .txt, .md, .jsonl, .json or .parquet document there that has any text")


def test_empty_files_are_no_documents(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("text")
    assert read_documents(str(tmp_path), "text") == ["text"]


def test_a_dataset_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match="has 3 tokens, less than one block of 20"):
        Packed([np.arange(3, dtype=np.int32)], 20, None, 0)


def test_few_documents_are_split_without_a_leak():
    assert split(["document 0", "document 1"]) == (["document 1"], ["document 0"])
    assert split(["a" * 62 + "bb"]) == (["a" * 62], ["bb"])


def test_tokens_out_of_the_vocabulary_are_named():
    with pytest.raises(ValueError, match="token 7 of the data is out of the model's vocabulary of 7"):
        Collate(7)([torch.tensor([1, 7])])


def test_the_split_is_fixed():
    assert (
        sum(is_validation(f"document {k}") for k in range(3200)) == 107
    )  # of 100 expected; pinned, since moving it spoils every comparison


def damage(folder):
    (file,) = folder.iterdir()
    file.write_bytes(b"\x80\x04damaged")
    return file.name


def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "CACHE", tmp_path / "tokenizer")
    tokenizer = packing.bpe_tokenizer(["some text"] * 50, 300)
    name = damage(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*remove it, and it is made again"):
        packing.bpe_tokenizer(["some text"] * 50, 300)
    monkeypatch.setattr(packing, "CACHE", tmp_path / "tokens")
    packing.packed_tokens(["some text"], tokenizer)
    name = damage(tmp_path / "tokens")
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*remove it, and it is made again"):
        packing.packed_tokens(["some text"], tokenizer)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\x04damaged")
    with pytest.raises(ValueError, match=rf"data.tokenizer '{tmp_path}' cannot be read"):
        corpus._named_tokenizer(str(tmp_path))


def test_a_long_document_is_tokenized_in_pieces_as_it_is_whole(monkeypatch):
    tokenizer = packing.bpe_tokenizer(["the quick brown fox jumps over the lazy dog, and the cat "] * 40, 300)
    documents = ["the quick brown fox " * 30, "", "jumps over  the\n lazy dog" * 20, "x" * 500]
    whole = packing.tokenize(documents, tokenizer)
    asked = []

    def watched(texts, **options):
        asked.append(sum(map(len, texts)))
        return tokenizer(texts, **options)

    watched.eos_token_id = tokenizer.eos_token_id
    monkeypatch.setattr(packing, "TEXT", 100)
    pieces = packing.tokenize(documents, watched)
    assert max(asked) < 200
    assert [array[-1] for array in pieces] == [tokenizer.eos_token_id] * 4
    for k in (0, 1):  # one space before each word
        assert pieces[k].tolist() == whole[k].tolist()
    assert [tokenizer.decode(array) for array in pieces] == [tokenizer.decode(array) for array in whole]


@pytest.mark.parametrize("brackets", ["[]", "{}", "[{"])
def test_a_line_that_would_end_pyarrows_parser_is_named_before_it_is_parsed(tmp_path, brackets):
    deep = brackets[0] * 50_000 + (brackets[1] if brackets != "[{" else "{") * 50_000
    rows = ['{"text": "a"}', '{"text": ' + deep + "}"]
    (tmp_path / "deep.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"deep.jsonl: line 2 nests \d{5,6} brackets, more than 1000: remove the line"):
        corpus.read_documents(str(tmp_path), "text")


def test_brackets_in_a_text_and_beside_each_other_are_no_depth(tmp_path):
    text = "[{" * 50_000 + '\\"[{' + "]" * 10
    rows = [{"text": text, "more": [[1]] * 2000}]
    (tmp_path / "flat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert corpus.read_documents(str(tmp_path), "text") == [text]
