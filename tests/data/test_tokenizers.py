import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from smelt.data.bpe import BpeTokenizer, byte_symbols, train_bpe
from smelt.data.characters import ByteTokenizer, CharTokenizer, read_meta_pickle
from smelt.data.documents import PIECE_CHARS
from smelt.data.tokenizers import StreamDecoder, fingerprint, load_tokenizer, make_tokenizer, sample
from smelt.errors import MissingDependency, NotFound, TokenizerError, UnsafeFile

TEXT = """The tokenizer's job: 12345 numbers, naïve café, 你好世界 🙂🙃!
\tIndented\r\nlines -- and the end of it.

It reads the text and writes the ids; it reads the ids and writes the text. <|endoftext|>
"""


def texts():
    return iter([TEXT] * 3)


@pytest.fixture(scope="module")
def bpe():
    return make_tokenizer("bpe:400", texts)


@pytest.fixture(scope="module")
def gpt2(shared_data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
        yield make_tokenizer("gpt2", texts)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SPECS = ["bytes", "bpe:400", "saved bpe:400"]


def tokenizer_of(spec, bpe, folder):
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "bpe:400":
        return bpe
    bpe.save(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("spec", SPECS)
def test_any_text_survives_the_round_trip(spec, bpe, tmp_path):
    tokenizer = tokenizer_of(spec, bpe, tmp_path)

    @settings(max_examples=150, deadline=None, database=None)
    @given(ANY_TEXT)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eot_id for token in ids)
        assert [batch.tolist() for batch in tokenizer.encode_batch([text, "x", text])] == [
            ids,
            tokenizer.encode("x"),
            ids,
        ]

    check()


@pytest.mark.parametrize("text", ["\r\n\r\n", "\x00\x00", "🙂" * 3, "a\u0301\u200d", "\ufeffbom", "<|endoftext|>", ""])
def test_awkward_texts_survive(text, bpe, gpt2):
    char = CharTokenizer.learn([text or "x"])
    for tokenizer in (ByteTokenizer(), bpe, gpt2, char):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_names_of_special_tokens_in_a_text_are_text(bpe, gpt2, tmp_path):
    gpt2.save(tmp_path)
    (tmp_path / "smelt_tokenizer.json").unlink()  # read as any Hugging Face folder
    for tokenizer in (ByteTokenizer(), bpe, gpt2, load_tokenizer(tmp_path)):
        assert tokenizer.eot_id not in tokenizer.encode("<|endoftext|>")
        assert tokenizer.decode([tokenizer.eot_id]) == ""


@pytest.mark.parametrize("spec", SPECS)
def test_lone_surrogates_are_named(spec, bpe, tmp_path):
    tokenizer = tokenizer_of(spec, bpe, tmp_path)
    with pytest.raises(TokenizerError, match=r"character 2 is '\\ud800', a lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode_batch(["fine", "ab\ud800"])


def test_char_ids_follow_code_points_and_unseen_characters_are_named():
    tokenizer = make_tokenizer("char", lambda: iter(["cab", "b🙂"]))
    assert tokenizer.encode("abc🙂") == [0, 1, 2, 3]
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (4, 5)
    with pytest.raises(TokenizerError, match=r"character 'z' \(U\+007A\) at position 2 is not among the 4"):
        tokenizer.encode("abz")
    with pytest.raises(TokenizerError, match="U\\+1F643"):
        tokenizer.encode_batch(["a", "🙃"])


@settings(max_examples=150, deadline=None, database=None)
@given(ANY_TEXT.filter(bool), st.data())
def test_char_gives_back_any_text_of_its_alphabet(text, data):
    tokenizer = CharTokenizer.learn([text])
    other = data.draw(st.text(alphabet=sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_batch([other])[0].tolist()) == other


def test_training_is_the_same_in_every_process(bpe):
    program = (
        "import sys; from smelt.data.tokenizers import make_tokenizer, fingerprint;"
        "text = sys.stdin.buffer.read().decode(); print(fingerprint(make_tokenizer('bpe:400', lambda: iter([text]*3))))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], input=TEXT.encode(), capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].decode().strip() == fingerprint(bpe)


def test_bpe_holds_all_bytes_and_no_more_ids_than_asked():
    tokenizer = make_tokenizer("bpe:257", texts)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert len(tokenizer.encode(TEXT)) == len(TEXT.encode())
    assert make_tokenizer("bpe:300", texts).vocab_size == 300


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:99999999", "bpe:", "bpe:x", "bpe:-5", "bpe:1e3", "klingon", ""])
def test_unknown_specs_are_refused(spec):
    with pytest.raises(TokenizerError, match=r"bpe:|klingon|bytes, char"):
        make_tokenizer(spec, texts)


@pytest.mark.parametrize("text", ["aXabXbXab aabb", "ababababa", "   \n \t x  ", "1234567", "''s'S don't", TEXT])
def test_saved_bpe_gives_the_same_ids_in_tokenizers_and_transformers(text, bpe, tmp_path):
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert backend.encode(text).ids == bpe.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == bpe.eot_id
    assert theirs.decode(bpe.encode(text)) == text


def test_both_libraries_agree_where_tokens_split_in_many_ways(tmp_path):
    tokenizer = train_bpe(290, iter(["abXab aabXb abab bXab Xabab baXb abXb"] * 20))
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.text(alphabet="abX ", max_size=40))
    def check(text):
        assert backend.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)

    check()


def test_gpt2_gives_tiktokens_ids_and_keeps_them_when_saved(gpt2, tmp_path):
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.name) == (50257, 50256, "gpt2")
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    gpt2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.name == "gpt2"
    assert again.encode(TEXT) == gpt2.encode(TEXT)
    (tmp_path / "smelt_tokenizer.json").unlink()
    as_huggingface = load_tokenizer(tmp_path)
    assert as_huggingface.encode(TEXT) == gpt2.encode(TEXT)
    assert fingerprint(as_huggingface) == fingerprint(gpt2)


def test_tiktoken_prefix_means_the_same(gpt2):
    assert fingerprint(make_tokenizer("tiktoken/gpt2", texts)) == fingerprint(gpt2)


def test_missing_vocabulary_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for proxy in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there: offline
    with pytest.raises(MissingDependency, match="TIKTOKEN_CACHE_DIR"):
        make_tokenizer("r50k_base", texts)


def test_very_long_words_and_spaces_are_encoded(bpe, gpt2):
    for text in ("a" * (3 * PIECE_CHARS), " " * (5 * PIECE_CHARS) + "x"):
        for tokenizer in (bpe, gpt2):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cutting_long_texts_does_not_change_the_tokens(gpt2):
    text = (TEXT * (2 * PIECE_CHARS // len(TEXT))).replace("<|endoftext|>", "")
    whole = gpt2._encoding.encode_ordinary(text)
    assert len(text) > PIECE_CHARS
    assert gpt2.encode(text) == whole


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe"])
def test_saving_keeps_everything(kind, bpe, tmp_path):
    tokenizer = {"bytes": ByteTokenizer(), "char": CharTokenizer.learn([TEXT]), "bpe": bpe}[kind]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.name, again.vocab_size, again.eot_id) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert fingerprint(again) == fingerprint(tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "char"])
def test_saved_alphabets_load_in_transformers(kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = {"bytes": ByteTokenizer(), "char": CharTokenizer.learn([TEXT])}[kind]
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eot_id


# --- Folders made elsewhere ------------------------------------------------------------------------------


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A tiny tokenizer with the parts of Llama 2's: a space before the text, bytes as a last resort."""
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def test_sentencepiece_like_folders_decode_exactly(tmp_path):
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot_id == 2
    for text in ("ab ab", "🙂 ab", "é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push([token]) for token in tokenizer.encode("ab 🙂")) + stream.finish() == " ab 🙂"


@pytest.mark.parametrize(("in_template", "says"), [(True, None), (True, False), (False, True), (False, None)])
def test_what_begins_every_text_is_what_transformers_puts_there(tmp_path, in_template, says):
    from transformers import PreTrainedTokenizerFast

    backend = sentencepiece_like()
    if in_template:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if says is None else {"add_bos_token": says})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    begins = in_template if says is None else says
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == (1 if begins else None)
    if says is None:
        theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        assert theirs("ab").input_ids == [1] * begins + tokenizer.encode("ab")


def test_vocab_and_merges_are_read(bpe, tmp_path):
    symbols = byte_symbols()
    vocab = {"".join(symbols[b] for b in token): rank for token, rank in bpe.ranks.items()}
    tokenizers.models.BPE(vocab, []).save(str(tmp_path))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    vocab |= {"th": len(vocab), "the": len(vocab) + 1, "<|endoftext|>": len(vocab) + 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eot_id is not None
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(TEXT) == tokenizer.encode(TEXT)


def test_folders_without_a_tokenizer_say_what_to_do(tmp_path):
    with pytest.raises(NotFound, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(TokenizerError, match="damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "smelt_tokenizer.json").write_text('{"kind": "alien", "name": "x"}')
    with pytest.raises(TokenizerError, match="damaged"):
        load_tokenizer(tmp_path)


# --- nanoGPT's meta.pkl ----------------------------------------------------------------------------------


def test_nanogpt_vocabulary_keeps_its_ids(tmp_path):
    characters = "\n abc"
    stoi = {char: i for i, char in enumerate(reversed(characters))}
    meta = {"vocab_size": 5, "itos": {i: char for char, i in stoi.items()}, "stoi": stoi}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    for tokenizer in (make_tokenizer(str(tmp_path / "meta.pkl"), texts), load_tokenizer(tmp_path)):
        assert tokenizer.encode("cab\n") == [0, 2, 1, 4]
        assert tokenizer.eot_id == 5


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_pickles_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Harmful()}))
    with pytest.raises(UnsafeFile, match=r"asks for \w+\.system"):
        read_meta_pickle(tmp_path / "meta.pkl")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"vocab_size": 50257})])
def test_other_pickles_are_refused(content, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(TokenizerError):
        read_meta_pickle(tmp_path / "meta.pkl")


# --- Streaming, sampling, fingerprints -------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
def test_streaming_equals_decoding_at_once(spec, bpe, tmp_path):
    tokenizer = tokenizer_of(spec, bpe, tmp_path)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40), st.integers(1, 4))
    def check(ids, stride):
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(ids[i : i + stride]) for i in range(0, len(ids), stride)]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids)

    check()


def test_streaming_never_splits_a_character():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push([byte]) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push([0xF0, 0x9F]) == ""
    assert stream.finish() == "\ufffd"


def test_samples_are_spread_and_bounded():
    texts_of_ten = [f"{number:010d}" for number in range(1000)]
    taken = list(sample(iter(texts_of_ten), num_bytes=10_000, limit=1000))
    assert 500 <= sum(map(len, taken)) <= 1010
    assert taken == list(sample(iter(texts_of_ten), num_bytes=10_000, limit=1000))
    positions = [int(text) for text in taken]
    assert positions[0] < 100
    assert positions[-1] > 900
    assert list(sample(iter(texts_of_ten), num_bytes=None, limit=100)) == texts_of_ten[:10]


def test_fingerprints_tell_vocabularies_apart(bpe):
    other = train_bpe(400, iter(["completely different words about ships and the sea"] * 5))
    assert other.name == bpe.name
    assert fingerprint(other) != fingerprint(bpe)
    assert isinstance(bpe, BpeTokenizer)
    assert np.array(bpe.encode("x")).max() < bpe.vocab_size


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "saved bpe", "sentencepiece"])
def test_the_bytes_of_tokens_make_up_a_text(kind, bpe, tmp_path):
    if kind == "char":
        tokenizer = CharTokenizer.learn([TEXT])
    elif kind == "sentencepiece":
        sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
    else:
        tokenizer = tokenizer_of(kind.replace("bpe", "bpe:400"), bpe, tmp_path)
    text = "aé" if kind == "sentencepiece" else TEXT
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size
    assert b"".join(table[token] for token in tokenizer.encode(text)).lstrip(b" ") == text.encode("utf-8")
    assert tokenizer.eot_id is None or table[tokenizer.eot_id] == b""


def test_wordpieces_have_no_bytes_of_their_own(tmp_path):
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_bytes() is None
