"""Text to token ids and back."""

import base64
import json

import pytest
import requests
import rustbpe
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import END_OF_TEXT, PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer, fingerprint, from_json

TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us."""
CHARACTERS = "".join(sorted(set(TEXT + END_OF_TEXT + "\ré\u2028🎉")))


def train_bpe(vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.train(iter(TEXT.splitlines()), vocab_size)


@pytest.fixture(scope="module", params=["char", "byte", "bpe", "gpt2"])
def tokenizer(request):
    """Each kind; `char` knows CHARACTERS."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
        return BPETokenizer.gpt2()
    if request.param == "bpe":
        return train_bpe()
    return ByteTokenizer() if request.param == "byte" else CharTokenizer(CHARACTERS, with_end_of_text=True)


def texts(tokenizer) -> st.SearchStrategy[str]:
    """Whatever a tokenizer should take, with the words of the special token among it."""
    some = st.text(CHARACTERS) if isinstance(tokenizer, CharTokenizer) else st.text()
    return st.lists(some | st.sampled_from([END_OF_TEXT, "<|endof", " ", "\r\n", "it was the "])).map("".join)


@given(data=st.data())
def test_decoding_gives_back_any_text(tokenizer, data):
    text = data.draw(texts(tokenizer))
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids).decode() == text
    assert all(0 <= one < tokenizer.vocab_size for one in ids)


def test_the_words_endoftext_in_a_text_stay_words(tokenizer):
    """A text cannot forge the end of itself."""
    ids = tokenizer.encode(f"the best{END_OF_TEXT}of times")
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1  # behind all others
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode_bytes([*ids, tokenizer.end_of_text]).decode() == f"the best{END_OF_TEXT}of times{END_OF_TEXT}"


def test_a_very_long_run_of_spaces_is_text_or_one_clear_error(tokenizer):
    text = " " * 1_000_000 + "x"
    if isinstance(tokenizer, BPETokenizer):  # tiktoken's pattern overflows its stack
        with pytest.raises(ValueError, match="more than tiktoken can split"):
            tokenizer.encode(text)
    else:
        assert tokenizer.decode_bytes(tokenizer.encode(text)).decode() == text


def test_json_gives_the_same_tokenizer_back(tokenizer):
    again = from_json(json.loads(json.dumps(tokenizer.to_json())), "here")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert fingerprint(again) == fingerprint(tokenizer)


def test_a_fingerprint_tells_tokenizers_apart():
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


@pytest.mark.parametrize("unknown", ["z", "é", "\n", "'", "zé"])
def test_unknown_characters_are_named(unknown):
    with pytest.raises(ValueError) as caught:
        CharTokenizer("abc", with_end_of_text=False).encode(f"ab{unknown}c{unknown}")
    assert f"no character {', '.join(map(repr, unknown))}:" in str(caught.value) and "the 3 that" in str(caught.value)


# Bytes


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


# A trained byte-pair encoding


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 330])
def test_a_trained_vocabulary_has_exactly_the_size_asked_for(vocab_size):
    """The end of the text counts; with 257, that and the bytes are all there is."""
    tokenizer = train_bpe(vocab_size)
    assert tokenizer.vocab_size == vocab_size and tokenizer.end_of_text == vocab_size - 1
    assert len({tokenizer.decode_bytes([one]) for one in range(vocab_size)}) == vocab_size


def test_a_trained_vocabulary_learns_what_is_frequent():
    tokenizer = train_bpe()
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert len(tokenizer.encode(" was the")) == 2


def test_training_again_gives_the_same_tokenizer():
    assert fingerprint(train_bpe()) == fingerprint(train_bpe())


def test_too_small_a_corpus_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"vocab_size=5000 .* set data.vocab_size=(\d+) or less") as caught:
        train_bpe(5000)
    possible = int(str(caught.value).split("vocab_size=")[-1].split()[0])
    assert f"gives {possible} tokens" in str(caught.value)
    assert train_bpe(possible).vocab_size == possible


# GPT-2's


def test_gpt2_ids_are_the_published_ones(gpt2_files):
    tokenizer = BPETokenizer.gpt2()
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.to_json() == {"kind": "gpt2"}


def test_gpt2_offline_is_one_sentence_that_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # what an earlier test may have loaded
    for attempt in (BPETokenizer.gpt2, lambda: from_json({"kind": "gpt2"}, "here")):
        with pytest.raises(ValueError, match=r"ConnectionError.*TIKTOKEN_CACHE_DIR") as caught:
            attempt()
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__


BYTES = [base64.b64encode(bytes((value,))).decode() for value in range(256)]


@pytest.mark.parametrize("saved", [
    {}, {"kind": 3}, {"kind": []}, {"kind": "byte", "more": 1}, {"kind": "char"}, {"kind": "char", "characters": 5, "end_of_text": True},
    {"kind": "char", "characters": ["a"], "end_of_text": True}, {"kind": "char", "characters": "ab", "end_of_text": 1},
    {"kind": "char", "characters": "aa", "end_of_text": True}, {"kind": "char", "characters": "\ud800", "end_of_text": True},
    {"kind": "bpe", "pattern": PATTERN}, {"kind": "bpe", "pattern": PATTERN, "ranks": BYTES[1:]},
    {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, BYTES[0]]}, {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, "?"]},
    {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, ""]}, {"kind": "bpe", "pattern": PATTERN, "ranks": [*BYTES, 7]},
    {"kind": "bpe", "pattern": PATTERN, "ranks": {}}, {"kind": "bpe", "pattern": "(a+)+$", "ranks": BYTES},
], ids=range(18))
def test_what_is_no_tokenizer_of_ours_is_one_sentence(saved):
    with pytest.raises(ValueError, match=r"^place holds no tokenizer of nanohydra's.$"):
        from_json(saved, "place")


def test_the_split_pattern_is_the_one_that_training_uses():
    """The pattern is a constant, so that no file can bring one that takes for ever; rustbpe's own default is the same."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(["hello world " * 10]), vocab_size=257)
    assert trainer.get_pattern() == PATTERN
