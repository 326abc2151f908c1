"""A tokenizer.json of Hugging Face gives the same ids here, or an error that names what is not supported."""

from __future__ import annotations

import copy
import json
import random

import pytest
from test_tokenizer import EVERY_CHARACTER, SCRIPTS, TEXT, train_bpe

from data import patterns
from data.bpe import BPETokenizer
from data.hugging_face import byte_letters, from_hugging_face, to_hugging_face
from data.patterns import normalized
from data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, ExtendedTokenizer
from data.tokenizer_json import fingerprint, from_json

STYLES = {
    "gpt2": {"pattern": None, "special": [END_OF_TEXT]},
    "llama3": {"pattern": patterns.LLAMA3, "special": ["<|begin_of_text|>", "<|end_of_text|>"], "ignore_merges": True},
    "qwen2": {"pattern": patterns.QWEN2, "special": [END_OF_TEXT, "<|im_start|>"], "normalizer": True, "in_text": ["<tool_call>", "<tool>"]},
    "gpt4o": {"pattern": patterns.O200K, "special": ["<pad>", "</s>"]},
}


@pytest.fixture(scope="module")
def tokenizers():
    return pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")


@pytest.fixture(scope="module", params=STYLES)
def theirs(request, tokenizers):
    """A tokenizer that the package trains. It gives the special tokens the first ids."""
    style = STYLES[request.param]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=style.get("ignore_merges", False)))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style["pattern"] is None)
    made.pre_tokenizer = byte_level
    if style["pattern"]:
        words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(style["pattern"]), "isolated")
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, byte_level])
    if style.get("normalizer"):
        made.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=style["special"], initial_alphabet=byte_level.alphabet(), show_progress=False)
    made.train_from_iterator([TEXT, *SCRIPTS.values()] * 2, trainer)
    made.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in style.get("in_text", [])])
    made.encode_special_tokens = True
    return made


@pytest.fixture(scope="module")
def ours(theirs):
    return from_hugging_face(json.loads(theirs.to_str()), "tokenizer.json")


def same_ids(ours, theirs, text):
    return ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_an_imported_tokenizer_gives_the_same_ids(ours, theirs):
    words = ["<tool_call>", "<tool_call>\u0338", "<tool>", "<tool_c", " <tool_call>a", *theirs.get_vocab()]
    for text in [TEXT, "", *SCRIPTS.values(), "\n".join(SCRIPTS.values()), "".join(words), " ".join(words)]:
        assert same_ids(ours, theirs, text)
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.special == {one.content: token for token, one in theirs.get_added_tokens_decoder().items()}
    assert ours.end_of_text in (theirs.token_to_id(word) for word in (END_OF_TEXT, "<|end_of_text|>", "</s>"))


@pytest.mark.slow
def test_nfc_is_that_of_the_package(tokenizers):
    """Also of characters between others that would compose or change places."""
    theirs = tokenizers.normalizers.NFC().normalize_str
    around = "{0} e{0}\u0301 e{0}\u0323\u0301 {0}\u0323 {0}\u0334 a\u0334{0} \u0301{0} \U00011935{0}"
    for start in range(0, len(EVERY_CHARACTER), 4096):
        text = "\n".join(map(around.format, EVERY_CHARACTER[start : start + 4096]))
        assert normalized(text) == theirs(text), f"from {EVERY_CHARACTER[start]!a}"


@pytest.mark.slow
def test_every_unicode_character_has_the_same_ids(ours, theirs):
    around = "a{0}b {0}1{0}!{0}'{0}\n{0}A{0}e{0}\u0301"
    plane_2 = EVERY_CHARACTER.index("\U00020000")
    some = EVERY_CHARACTER[:plane_2] + EVERY_CHARACTER[plane_2::16]
    for start in range(0, len(some), 1024):
        text = "".join(map(around.format, some[start : start + 1024]))
        assert same_ids(ours, theirs, text), f"from {some[start]!a}"


def test_random_texts_have_the_same_ids(ours, theirs):
    draw = random.Random(0)
    letters = [*"  \n\r\t'.,!<>|_ab stlvem0123\u0301é语ẞſ", *EVERY_CHARACTER[::5000], "<tool_call>", "'ll", "\r\n"]
    for _ in range(300):
        assert same_ids(ours, theirs, "".join(draw.choices(letters, k=40)))


def test_an_imported_tokenizer_is_saved_whole(ours):
    again = from_json(json.loads(json.dumps(ours.to_json())), "here")
    assert fingerprint(again) == fingerprint(ours) and again.special == ours.special
    for text in ("".join(SCRIPTS.values()), "a<tool_call>e\u0301"):
        assert again.encode(text) == ours.encode(text)
    assert again.decode_bytes(range(again.vocab_size)) == ours.decode_bytes(range(again.vocab_size))


def test_export_and_import_give_the_same_tokenizer(ours):
    again = from_hugging_face(to_hugging_face(ours), "here")
    assert fingerprint(again) == fingerprint(ours)


@pytest.mark.parametrize("made", [
    ByteTokenizer(), CharTokenizer("\nab语", True), CharTokenizer("ab", False), train_bpe(300),
    ExtendedTokenizer(ByteTokenizer(), ["<|user|>", "<|end|>"]), ExtendedTokenizer(CharTokenizer("\nab语", True), ["<|user|>"]),
], ids=["byte", "char", "text", "bpe", "byte+", "char+"])
def test_what_is_exported_can_be_imported(made):
    again = from_hugging_face(json.loads(json.dumps(to_hugging_face(made))), "here")
    assert fingerprint(again) == fingerprint(made)


def test_an_extended_tokenizer_keeps_its_special_tokens(tokenizers):
    made = ExtendedTokenizer(train_bpe(300), ["<|user|>", "<|end|>"])
    assert made.special == {END_OF_TEXT: 299, "<|user|>": 300, "<|end|>": 301} and made.vocab_size == 302
    assert made.decode_bytes([300, *made.encode("best <|end|>"), 301]) == b"<|user|>best <|end|><|end|>"
    assert fingerprint(from_json(made.to_json(), "here")) == fingerprint(made)
    for exported in (to_hugging_face(made), to_hugging_face(from_hugging_face(to_hugging_face(made), "here"))):
        loaded = tokenizers.Tokenizer.from_str(json.dumps(exported))
        assert loaded.encode("best<|end|>").ids == [*made.encode("best"), 301]


@pytest.mark.slow
def test_gpt2s_own_file_gives_gpt2s_ids(gpt2_files):
    published = BPETokenizer.published("gpt2")
    content = to_hugging_face(published)
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    imported = from_hugging_face(content, "here")
    for text in SCRIPTS.values():
        assert imported.encode(text) == published.encode(text)
    assert (imported.vocab_size, imported.end_of_text) == (50257, 50256)


def changed(path, value):
    """A valid tokenizer.json with another value at a path such as "model.type"."""
    content = copy.deepcopy(to_hugging_face(train_bpe(300)))
    *outer, last = path.split(".")
    place = content
    for name in outer:
        place = place[int(name) if name.isdecimal() else name]
    place[int(last) if last.isdecimal() else last] = value
    return content


SPLIT, BYTES = to_hugging_face(train_bpe(300))["pre_tokenizer"]["pretokenizers"]
BYTE_VOCAB = {letter: byte for byte, letter in enumerate(byte_letters())}
ADDED = {"id": 300, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.mark.parametrize(("path", "value", "reason"), [
    ("model.type", "Unigram", "its model is Unigram"),
    ("model.byte_fallback", True, "its model has byte_fallback=True"),
    ("model.end_of_word_suffix", "</w>", "its model has end_of_word_suffix=</w>"),
    ("model.continuing_subword_prefix", "##", "its model has continuing_subword_prefix=##"),
    ("model.dropout", 0.1, "its model has dropout=0.1"),
    ("normalizer", {"type": "NFKC"}, "its normalizer is NFKC"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, "its normalizer is Sequence"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}]}, "its normalizer is Prepend"),
    ("pre_tokenizer", {"type": "Metaspace"}, "does not end with ByteLevel"),
    ("pre_tokenizer", None, "does not end with ByteLevel"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space=true"),
    ("pre_tokenizer", BYTES, "merges bytes without splitting"),
    ("pre_tokenizer.pretokenizers", [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}], '"type": "Digits"'),
    ("pre_tokenizer.pretokenizers", [{"type": "Whitespace"}, BYTES], '"type": "Whitespace"'),
    ("pre_tokenizer.pretokenizers", [SPLIT, SPLIT, BYTES], "than one Split"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", "(a+)+$", r"known pattern: .*\(a\+\)\+\$"),
    ("pre_tokenizer.pretokenizers.0.behavior", "Removed", '"behavior": "Removed"'),
    ("added_tokens", [ADDED | {"lstrip": True}], "its added token '<x>' has lstrip=true"),
    ("added_tokens", [ADDED | {"content": "  "}], "its added token '  ' contains white space"),
    ("added_tokens", [ADDED | {"id": 5}], "two of its tokens have the same id"),
    ("added_tokens", [ADDED | {"id": 10**9}], "its largest id is 1,000,000,000"),
    ("model.merges", [], "is not made by its merges"),
    ("model.vocab", {"a": 0}, "has no token for the byte 0"),
    ("model.vocab", {"a b": 0}, "its token 'a b' is not written in the letters"),
    ("model.vocab", BYTE_VOCAB | {"a" * 5000: 256}, "it has a token of 5,000 bytes"),
    ("model.type", "WordLevel", "its model is WordLevel"),
])
def test_an_unsupported_feature_is_named(path, value, reason):
    with pytest.raises(ValueError, match=f"^own.json cannot be used as a tokenizer: .*{reason}.* Supported is byte-level BPE"):
        from_hugging_face(changed(path, value), "own.json")


def test_merges_in_another_order_than_ids_are_refused():
    content = to_hugging_face(train_bpe(300))
    content["model"]["merges"][3:5] = content["model"]["merges"][4:2:-1]
    with pytest.raises(ValueError, match="comes after one with a higher id"):
        from_hugging_face(content, "own.json")


@pytest.mark.parametrize("content", [None, [], {}, {"model": {}}, {"model": {"vocab": {"a": "b"}}}, {"model": {"vocab": 3}}, changed("model.merges", [["a"]]),
                                     changed("model.merges", ["a b c"]), changed("added_tokens", [{}]), changed("pre_tokenizer", {"x": 1})])
def test_other_json_is_not_imported(content):
    with pytest.raises(ValueError, match=r"^own.json is not a tokenizer"):
        from_hugging_face(content, "own.json")


def test_hostile_features_are_refused_in_a_short_sentence():
    deep = {"type": "NFC"}
    for _ in range(2000):
        deep = {"type": "Sequence", "normalizers": [deep]}
    for normalizer in (deep, {"type": "x" * 10_000}):
        with pytest.raises(ValueError) as refusal:
            from_hugging_face(changed("normalizer", normalizer), "own.json")
        assert len(str(refusal.value)) < 1000


def test_an_end_of_text_is_added_where_there_is_none():
    content = changed("added_tokens", [])
    del content["model"]["vocab"][END_OF_TEXT]
    assert from_hugging_face(content, "own.json").special == {END_OF_TEXT: 299}
