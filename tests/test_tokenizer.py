"""Text to token ids and back."""

import base64
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import rustbpe
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from test_checkpoint import reseal
from tiktoken_ext import openai_public

from checkpointing import store
from checkpointing.weights import tokenizer_of
from conf.schema import ConfigError, compose
from data.bpe import LONGEST_WORD, PUBLISHED, BPETokenizer, with_few_words
from data.hugging_face import to_hugging_face
from data.patterns import PATTERN
from data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from data.tokenizer_json import fingerprint, from_json, read_tokenizer
from scripts import export_tokenizer
from train import train

TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us."""
SCRIPTS = {
    "latin": "Ça va? Straße, naïve façade: “don’t” I'LL we've THEY'RE  e\u0301 ﬁn ſo ŉ",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· ὦ ἄνδρες",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم، ١٢٣٤٥ لَا",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה, שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा १२३४",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "chinese": "我能吞下玻璃而不伤身体。「你好」，世界！𠀀𪚥",
    "japanese": "いろはにほへと ちりぬるを。カタカナー、１２３４５",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. \u1112\u1161\u11ab",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽! 🇺🇳❤️‍🔥1️⃣",
    "line ends": "one\r\ntwo\rthree\n\n\n  four \t\n \r\n\v\f\x85\u2028\u2029 \xa0\u3000 five   ",
    "numbers": "34 34 34 1 12 123 1234 12345678.90e-10 ½ Ⅻ ²³ 1,000,000",
    "code": "def f(x):\n    return {'a': x[0] ** 2, \"b\": lambda *y: None}  # ==== !!!\n\tif a&&b || !c: <div/>\n",
    "odd": "\0\x01\x7f\ufeff\ufffd\uffff\U0010ffff\u200b\u202e",
}
CHARACTERS = "".join(sorted(set(TEXT + END_OF_TEXT + "".join(SCRIPTS.values()))))
EVERY_CHARACTER = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


def train_bpe(vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.train(iter(TEXT.splitlines()), vocab_size)


@pytest.fixture(scope="module", params=["char", "byte", "bpe", "o200k_base"])
def tokenizer(request):
    """Each kind. The large published vocabularies have their own pattern and special tokens, with unused ids between
    them, but without their files the ranks are trained here."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
        yield BPETokenizer.published("gpt2")
    elif request.param in PUBLISHED:
        learned = BPETokenizer.train(iter([TEXT, *SCRIPTS.values()] * 2), 700)
        ranks = {token: rank for rank, token in enumerate(learned.ranks())}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiktoken.registry, "ENCODINGS", {})
            with pytest.MonkeyPatch.context() as loading:
                loading.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: ranks)
                made = BPETokenizer.published(request.param)
            yield made
    elif request.param == "bpe":
        yield train_bpe()
    else:
        yield ByteTokenizer() if request.param == "byte" else CharTokenizer(CHARACTERS, with_end_of_text=True)


def texts(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Any text that a tokenizer can encode, also with special tokens as plain text."""
    some = st.text(CHARACTERS) if isinstance(tokenizer, CharTokenizer) else st.text()
    known = [END_OF_TEXT, "<|endof", " ", "\r\n", "it was the ", "'ll ", *SCRIPTS.values()]
    return st.lists(some | st.sampled_from(known)).map("".join)


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.special.values()) if isinstance(tokenizer, BPETokenizer) else {tokenizer.end_of_text}


@given(data=st.data())
def test_any_text_survives_encoding_and_decoding(tokenizer, data):
    text = data.draw(texts(tokenizer))
    ids = tokenizer.encode_array(text)
    assert ids.dtype == (np.uint8 if isinstance(tokenizer, ByteTokenizer) else np.uint32)
    assert tokenizer.decode_bytes(ids).decode() == text and tokenizer.encode(text) == ids.tolist()
    assert ids.max(initial=0) < tokenizer.vocab_size
    if isinstance(tokenizer, BPETokenizer):
        assert ids.tolist() == tokenizer.encoding.encode_ordinary(text)


@pytest.mark.slow
def test_every_unicode_character_survives(tokenizer):
    if isinstance(tokenizer, CharTokenizer):
        tokenizer = CharTokenizer(EVERY_CHARACTER, with_end_of_text=True)
    for text in (EVERY_CHARACTER, " ".join(EVERY_CHARACTER[::7])):
        assert tokenizer.decode_bytes(tokenizer.encode(text)).decode() == text


@pytest.mark.slow
def test_encoding_is_thread_safe(tokenizer):
    many = [script * (number % 5) for number in range(200) for script in SCRIPTS.values()]
    with ThreadPoolExecutor(8) as threads:
        for text, ids in zip(many, threads.map(tokenizer.encode_array, many), strict=True):
            assert tokenizer.decode_bytes(ids).decode() == text


def test_special_tokens_in_a_text_are_plain_text(tokenizer):
    for word in tokenizer.special if isinstance(tokenizer, BPETokenizer) else [END_OF_TEXT]:
        ids = tokenizer.encode(f"the best{word}of times")
        assert not set(ids) & special_ids(tokenizer)
        assert tokenizer.decode_bytes([*ids, tokenizer.end_of_text]).decode() == f"the best{word}of times{END_OF_TEXT}"


def test_every_id_below_vocab_size_can_be_decoded(tokenizer):
    """A model can also generate an id without a token."""
    assert max(special_ids(tokenizer)) == tokenizer.vocab_size - 1
    tokens = [tokenizer.decode_bytes([one]) for one in range(tokenizer.vocab_size)]
    assert tokenizer.decode_bytes(range(tokenizer.vocab_size)) == b"".join(tokens)
    used = [token for token in tokens if token]
    assert len(set(used)) == len(used) and END_OF_TEXT.encode() == tokens[tokenizer.end_of_text]


def test_a_million_blanks_are_encoded_or_refused(tokenizer):
    text = " " * 1_000_000 + "x"
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        assert isinstance(tokenizer, BPETokenizer) and "a million or more blank characters" in str(error)
        assert "\n" not in str(error) and error.__suppress_context__
    else:
        assert tokenizer.decode_bytes(ids).decode() == text


def test_a_lone_surrogate_is_named(tokenizer):
    expected = r"no character '\\ud800'" if isinstance(tokenizer, CharTokenizer) else r"surrogate, '\\ud800', at character 3"
    with pytest.raises(ValueError, match=expected) as caught:
        tokenizer.encode("abc\ud800def" if not isinstance(tokenizer, CharTokenizer) else "abc\ud800")
    assert type(caught.value) is ValueError


def test_json_restores_the_same_tokenizer(tokenizer):
    again = from_json(json.loads(json.dumps(tokenizer.to_json())), "here")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert fingerprint(again) == fingerprint(tokenizer)


def test_different_tokenizers_have_different_fingerprints():
    different = [ByteTokenizer(), CharTokenizer("ab", True), CharTokenizer("ab", False), CharTokenizer("ba", True),
                 train_bpe(300), train_bpe(299)]
    assert len({fingerprint(one) for one in different}) == len(different)


# Characters


def test_char_ids_follow_the_given_characters():
    tokenizer = CharTokenizer("abc", with_end_of_text=False)
    assert tokenizer.encode("cab") == [2, 0, 1]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (3, None)
    tokenizer = CharTokenizer("abc", with_end_of_text=True)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4, 3)


@pytest.mark.parametrize("unknown", ["\0", "zé\U0010ffff"])
def test_unknown_characters_are_named(unknown):
    with pytest.raises(ValueError) as caught:
        CharTokenizer("abc", with_end_of_text=False).encode(f"ab{unknown}c{unknown}")
    assert f"no character {', '.join(map(repr, unknown))}:" in str(caught.value) and "knows the 3 characters" in str(caught.value)


# Bytes


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


# A trained byte-pair encoding


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_a_trained_vocabulary_has_the_requested_size(vocab_size):
    tokenizer = train_bpe(vocab_size)
    assert tokenizer.vocab_size == vocab_size and tokenizer.end_of_text == vocab_size - 1
    assert len({tokenizer.decode_bytes([one]) for one in range(vocab_size)}) == vocab_size


def test_training_merges_frequent_pairs():
    tokenizer = train_bpe()
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert len(tokenizer.encode(" was the")) == 2


def test_training_is_deterministic():
    assert fingerprint(train_bpe()) == fingerprint(train_bpe())


def test_too_small_a_corpus_names_the_possible_size():
    with pytest.raises(ValueError, match=r"vocab_size=5000 is too large .* set data.vocab_size=(\d+) or less") as caught:
        train_bpe(5000)
    possible = int(str(caught.value).split("vocab_size=")[-1].split()[0])
    assert f"gives {possible} tokens" in str(caught.value)
    assert train_bpe(possible).vocab_size == possible


@pytest.mark.parametrize("run", [" " * 1_000_000 + "x", "\u4e00" * 300_000])
def test_a_long_run_is_split_before_training(run):
    tokenizer = BPETokenizer.train(iter([TEXT, run]), 300)
    assert tokenizer.decode_bytes(tokenizer.encode(TEXT)).decode() == TEXT
    assert max(map(len, tokenizer.ranks())) <= 4 * (LONGEST_WORD + 1)


@given(st.lists(st.lists(st.sampled_from(["word ", "x" * 300, " " * 300, "\n", "语" * 1000, "😀"])).map("".join), max_size=8))
def test_a_sample_is_the_text_without_long_runs(many):
    parts = list(with_few_words(iter(many), 10**6))
    assert "".join(parts) == "".join(many)
    assert all(len(run) <= LONGEST_WORD for part in parts for run in re.findall(r"\S+|\s+", part))


def test_a_sample_ends_after_enough_distinct_words():
    assert list(with_few_words(iter(["one two", "two one"] * 1000), 7)) == ["one two", "two one"] * 1000
    assert list(with_few_words(iter(["one two", "two three", "four"]), 7)) == ["one two", "two three"]
    assert list(with_few_words(iter(["a 语", "b", "c"]), 5)) == ["a 语", "b"]  # bytes of UTF-8 are counted
    assert len(list(with_few_words(iter(["  ", "\t\t"] * 3), 4))) == 2


def test_training_stops_reading_after_enough_words(monkeypatch):
    monkeypatch.setattr("data.bpe.DISTINCT_BYTES", 2**16)
    read = []

    def texts():
        draw = random.Random(0)
        for number in range(1000):
            read.append(number)
            yield base64.b64encode(draw.randbytes(3 * 2**10)).decode()

    BPETokenizer.train(texts(), 300)
    assert len(read) == 16


@pytest.mark.slow
@pytest.mark.parametrize("text", ["base64.b64encode(draw.randbytes(3 * 2**16)).decode()",
                                  "''.join(map(chr, draw.choices(range(0x4e00, 0x9000), k=2**17)))",
                                  "' '.join(map(str, draw.choices(range(10**9), k=2**15)))"], ids=["base64", "chinese", "numbers"])
def test_training_takes_bounded_memory(text):
    script = f"""
import base64, random, resource
from data.bpe import BPETokenizer
draw = random.Random(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
BPETokenizer.train(({text} for _ in range(200)), 1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500 * 2**10  # KiB; without a bound, 45 MB for each MB of the 50


@pytest.mark.parametrize("mistake", [ValueError("book.txt is not UTF-8"), KeyboardInterrupt()])
def test_an_error_in_the_training_text_is_raised_unchanged(mistake):
    def reading():
        yield TEXT
        raise mistake

    with pytest.raises(type(mistake)) as caught:
        BPETokenizer.train(reading(), 300)
    assert caught.value is mistake


@pytest.mark.slow
def test_100_000_tokens_can_be_trained_saved_and_loaded():
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnop"), (60_000, 12))
    text = " ".join(map("".join, letters.tolist()))
    tokenizer = BPETokenizer.train(iter([text]), 100_000)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (100_000, 99_999)
    again = from_json(json.loads(json.dumps(tokenizer.to_json())), "here")
    assert again.encode(text[:5000]) == tokenizer.encode(text[:5000]) and max(again.encode(text)) > 90_000


def test_tiktoken_can_use_the_saved_json():
    saved = json.loads(json.dumps(train_bpe().to_json()))
    encoding = tiktoken.Encoding("mine", pat_str=saved["pattern"], special_tokens={END_OF_TEXT: len(saved["ranks"])},
                                 mergeable_ranks={base64.b64decode(token): rank for rank, token in enumerate(saved["ranks"])})
    for text in (TEXT, *SCRIPTS.values()):
        assert encoding.encode(text) == train_bpe().encode(text)
    assert encoding.eot_token == train_bpe().end_of_text


# Published vocabularies


def test_gpt2_ids_are_the_published_ones(gpt2_files):
    tokenizer = BPETokenizer.published("gpt2")
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert not tokenizer.unused


@pytest.mark.parametrize("tokenizer", ["gpt2", "cl100k_base", "o200k_base"], indirect=True)
def test_a_published_vocabulary_keeps_its_published_ids(tokenizer):
    name = tokenizer.encoding.name
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == {
        "gpt2": (50257, 50256), "cl100k_base": (100277, 100257), "o200k_base": (200019, 199999)}[name]
    assert tokenizer.to_json() == {"kind": name}
    holes = {one for one in range(tokenizer.vocab_size) if not tokenizer.decode_bytes([one])}
    assert holes == tokenizer.unused and len(holes) == tokenizer.vocab_size - len(tokenizer.ranks()) - len(tokenizer.special)


def answer(content: bytes, status: int = 200) -> requests.Response:
    response = requests.Response()
    response.status_code, response.raw = status, io.BytesIO(content)
    return response


@pytest.fixture
def network(monkeypatch, tmp_path):
    """Set the outcome of all downloads: `network(exception or response)`. The caches of tiktoken are empty."""
    def get(url, *args, **kwargs):
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    outcome = [requests.ConnectionError("no network")]
    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return lambda new: outcome.__setitem__(0, new)


def cached_as(url: str) -> str:
    return hashlib.sha1(url.encode()).hexdigest()


def failure(name: str) -> str:
    """The message of the error of loading `name`."""
    with pytest.raises(ValueError) as caught:
        BPETokenizer.published(name)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__ and type(caught.value) is ValueError
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_offline_the_files_and_their_folder_are_named(name, network, tmp_path):
    sentence = failure(name)
    for url in PUBLISHED[name]:
        assert f"the file {cached_as(url)} (a copy of {url})" in sentence
    assert f"in the folder {tmp_path}," in sentence and "set TIKTOKEN_CACHE_DIR" in sentence and "ConnectionError" in sentence
    with pytest.raises(ValueError, match=f"The tokenizer {name} needs"):
        from_json({"kind": name}, "here")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_named_files_are_those_of_tiktoken(name, monkeypatch):
    def read(url, expected_hash):
        asked.append(url)
        return b"{}"

    asked = []
    monkeypatch.setattr(tiktoken.load, "read_file_cached", read)
    with pytest.raises((AssertionError, ValueError)):
        openai_public.ENCODING_CONSTRUCTORS[name]()
    assert asked == list(PUBLISHED[name])


@pytest.mark.parametrize(("variables", "place"), [
    ({"DATA_GYM_CACHE_DIR": "gym"}, "gym"), ({}, "temporary/data-gym-cache"),
    ({"TIKTOKEN_CACHE_DIR": "mine", "DATA_GYM_CACHE_DIR": "gym"}, "mine"),
], ids=str)
def test_the_named_folder_is_the_one_of_tiktoken(variables, place, network, tmp_path, monkeypatch):
    """tiktoken deletes a damaged file, which shows that it looked there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    sentence = failure("cl100k_base")
    assert f"in the folder {tmp_path / place}," in sentence
    kept = tmp_path / place / cached_as(PUBLISHED["cl100k_base"][0])
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"damaged")
    assert failure("cl100k_base") == sentence and not kept.exists()


def test_an_empty_cache_variable_is_named(network, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    sentence = failure("o200k_base")
    assert "in the folder in TIKTOKEN_CACHE_DIR," in sentence and cached_as(PUBLISHED["o200k_base"][0]) in sentence


@pytest.mark.parametrize(("outcome", "reason"), [
    (requests.exceptions.ProxyError("no way"), "ProxyError"), (PermissionError(13, "Permission denied"), "PermissionError"),
    (answer(b"not here", 404), "HTTPError"), (answer(b"<html>Please log in to this network</html>"), "unexpected content"),
])
def test_a_failed_download_is_explained(outcome, reason, network):
    network(outcome)
    message = failure("cl100k_base")
    assert f"({reason})" in message and PUBLISHED["cl100k_base"][0] in message


def test_an_unreadable_file_is_named(network, tmp_path, monkeypatch):
    def unreadable(url, expected_hash):
        raise PermissionError(13, "Permission denied")

    (tmp_path / cached_as(PUBLISHED["o200k_base"][0])).write_bytes(b"something")
    monkeypatch.setattr(tiktoken.load, "read_file_cached", unreadable)
    assert "PermissionError" in (sentence := failure("o200k_base")) and PUBLISHED["o200k_base"][0] in sentence


# Saved


BYTES = [base64.b64encode(bytes((value,))).decode() for value in range(256)]


@pytest.mark.parametrize("saved", [
    {}, [], {"kind": 3}, {"kind": "byte", "more": 1}, {"kind": "char", "characters": "ab", "end_of_text": 1},
    {"kind": "char", "characters": "aa", "end_of_text": True}, {"kind": "char", "characters": "\ud800", "end_of_text": True},
    {"kind": "bpe", "pattern": PATTERN, "ranks": BYTES[1:]}, {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, BYTES[0]]},
    {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, "?"]}, {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, 7]},
    {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, ""]}, {"kind": "bpe", "pattern": PATTERN, "ranks": BYTES, "more": 1},
    {"kind": "bpe", "pattern": "(a+)+$", "ranks": BYTES}, {"kind": "byte", "added": ["x", "x"]}, {"kind": "byte", "added": [END_OF_TEXT]},
    *({"kind": "bpe", "pattern": PATTERN, "ranks": BYTES} | options for options in (
        {"special": {"<x>": 256}}, {"special": {END_OF_TEXT: 3}}, {"special": {END_OF_TEXT: 10**9}}, {"special": {END_OF_TEXT: "3"}},
        {"special": {END_OF_TEXT: 256, "x": 256}}, {"in_text": ["x"]}, {"normalizer": "NFKC"})),
], ids=range(23))
def test_other_json_is_not_a_tokenizer(saved):
    with pytest.raises(ValueError, match=r"^place is not a nanohydra tokenizer.$"):
        from_json(saved, "place")


def test_a_very_long_token_is_refused(tmp_path):
    longest = base64.b64encode(b"x" * 12_000_000).decode()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, longest]}))
    with pytest.raises(ValueError, match=r"tokenizer.json has a token of 12,000,000 bytes, more than the allowed 4,096"):
        read_tokenizer(path)


def test_a_very_large_file_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.touch()
    os.truncate(path, 10 * 2**30)
    with pytest.raises(ValueError, match=r"tokenizer.json has 10,240 MB, more than the 64 MB of a tokenizer"):
        read_tokenizer(path)


def test_a_pipe_is_not_a_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"is not a nanohydra tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_the_split_pattern_is_the_one_that_training_uses():
    """It is a constant, so that no file can bring a pattern that takes for ever."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(["hello world " * 10]), vocab_size=257)
    assert trainer.get_pattern() == PATTERN


# Hugging Face's format


@pytest.fixture(scope="module")
def tokenizers():
    return pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")


@pytest.fixture(scope="module")
def load(tokenizers):
    """Export a tokenizer and load it with the package tokenizers."""
    def load(tokenizer):
        loaded = tokenizers.Tokenizer.from_str(json.dumps(to_hugging_face(tokenizer)))
        loaded.encode_special_tokens = True
        return loaded
    return load


@pytest.fixture(scope="module")
def exported(tokenizer, load):
    return load(tokenizer)


@given(data=st.data())
@example(data=None)
@pytest.mark.slow
def test_an_export_gives_the_same_ids_and_text(tokenizer, exported, data):
    for text in [data.draw(texts(tokenizer))] if data else [TEXT, "", *SCRIPTS.values(), "\n".join(SCRIPTS.values())]:
        ids = exported.encode(text).ids
        assert ids == tokenizer.encode(text)
        assert exported.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("tokenizer", ["gpt2", "cl100k_base", "o200k_base"], indirect=True)
def test_an_export_splits_scripts_and_numbers_alike(tokenizer, exported):
    for text in SCRIPTS.values():
        assert exported.encode(text).ids == tokenizer.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bpe", "gpt2", "cl100k_base", "o200k_base"], indirect=True)
def test_an_export_splits_every_unicode_character_alike(tokenizer, exported):
    """Two regex libraries have two tables of letters, numbers and blanks."""
    around = "a{0}b {0}1{0}!{0}'{0}\n{0}A{0}"
    plane_2 = EVERY_CHARACTER.index("\U00020000")  # from there on: Chinese, private use, unassigned
    some = EVERY_CHARACTER[:plane_2] + EVERY_CHARACTER[plane_2::16]
    for start in range(0, len(some), 4096):
        text = "".join(map(around.format, some[start : start + 4096]))
        assert exported.encode(text).ids == tokenizer.encode(text), f"from {some[start]!a}"


def test_an_export_encodes_special_tokens_by_default(tokenizer, exported):
    words = f"the best{END_OF_TEXT}of times"
    assert tokenizer.end_of_text not in exported.encode(words).ids
    exported.encode_special_tokens = False
    try:
        assert exported.encode(words).ids == [
            *tokenizer.encode("the best"), tokenizer.end_of_text, *tokenizer.encode("of times")]
    finally:
        exported.encode_special_tokens = True


def test_an_export_keeps_all_ids(tokenizer, exported):
    assert exported.token_to_id(END_OF_TEXT) == tokenizer.end_of_text
    words = tokenizer.special if isinstance(tokenizer, BPETokenizer) else {END_OF_TEXT: tokenizer.end_of_text}
    assert {token: added.content for token, added in exported.get_added_tokens_decoder().items()} == {
        token: word for word, token in words.items()}
    unused = tokenizer.unused if isinstance(tokenizer, BPETokenizer) else set()
    assert set(exported.get_vocab().values()) == set(range(tokenizer.vocab_size)) - unused


def test_an_exported_char_tokenizer_refuses_unknown_ones(load):
    exported = load(CharTokenizer("ab", with_end_of_text=False))
    assert exported.encode("abba").ids == [0, 1, 1, 0] and not exported.get_added_tokens_decoder()
    with pytest.raises(Exception, match="UNK"):
        exported.encode("abc")


def test_a_merge_like_a_comment_is_exported(load):
    """In a list of merges, each as one string, "#version s" would be skipped."""
    tokenizer = BPETokenizer.train(iter(["\n#version\n#version\n#versions"] * 10), 265)
    assert b"#version" in (ranks := tokenizer.ranks()) and b"#versions" in ranks
    assert load(tokenizer).encode("\n#versions").ids == tokenizer.encode("\n#versions")


def test_ranks_that_cannot_be_trained_are_not_exported():
    tokenizer = BPETokenizer.from_ranks([*(bytes((value,)) for value in range(256)), b"abc"])
    with pytest.raises(ValueError, match=r"cannot be exported: its token b'abc' is not a pair"):
        to_hugging_face(tokenizer)


@pytest.fixture
def export(tmp_path):
    """Run the script for the run in `tmp_path`."""
    return lambda *overrides: export_tokenizer.main(
        compose(export_tokenizer.ExportTokenizerSettings, [f"runs_dir={tmp_path / 'runs'}", *overrides]))


def test_a_runs_export_is_loaded_by_the_package(compose_tiny, tokenizers, export, tmp_path, capsys):
    train(compose_tiny("data.tokenizer=bpe", "data.vocab_size=300", "training.max_steps=1"))
    tokenizer = store.load_of_run(tmp_path / "runs" / "tiny", "last", tokenizer_of)
    for overrides, path in ([], tmp_path / "runs/tiny/tokenizer.json"), ([f"out={tmp_path / 'new/mine.json'}"], tmp_path / "new/mine.json"):
        assert export("run=tiny", *overrides) == export("run=tiny", *overrides) == 0  # it overwrites itself
        assert f"Wrote {path}: 300 tokens" in capsys.readouterr().out
        for text in SCRIPTS.values():
            assert tokenizers.Tokenizer.from_file(str(path)).encode(text).ids == tokenizer.encode(text)
    ours = next(tmp_path.glob("runs/tiny/checkpoints/*/tokenizer.json"))
    before = ours.read_bytes()
    with pytest.raises(ValueError, match=r"tokenizer.json exists and is not this tokenizer: .*out=FILE"):
        export(f"out={ours}")
    assert ours.read_bytes() == before
    os.mkfifo(tmp_path / "pipe.json")
    for place in ("pipe.json", "runs.json"):
        (tmp_path / "runs.json").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"{place} exists and is not this tokenizer"):
            export(f"out={tmp_path / place}")


def test_another_tokenizer_in_a_checkpoint_is_refused(compose_tiny, export, tmp_path):
    train(compose_tiny("training.max_steps=1"))
    [ours] = tmp_path.glob("runs/tiny/checkpoints/*/tokenizer.json")
    saved = json.loads(ours.read_text())
    ours.write_text(json.dumps(saved | {"characters": "".join(sorted(saved["characters"].replace("a", "!")))}))
    reseal(ours.parent)
    with pytest.raises(ValueError, match="is not the tokenizer that the model was trained with"):
        export()


def test_nothing_to_export_is_an_error(export):
    with pytest.raises(ValueError, match="has no run with a checkpoint"):
        export()
    with pytest.raises(ConfigError, match=r"out=vocab.txt must end in .json"):
        export("out=vocab.txt")
