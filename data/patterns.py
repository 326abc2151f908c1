"""What is done to a text before byte-pair encoding: it is normalized, and split into words.

The patterns are a fixed list, so that no tokenizer file can bring one that takes forever.
"""

import re
import unicodedata

# Of the tokenizers that are trained here, as in GPT-4: letters with the space before them, numbers
# of up to three digits.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")

BLANKS = r"\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# GPT-2's, as Hugging Face's ByteLevel has it.
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{BLANKS}"
LLAMA3 = (rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
          rf"|\s*[\r\n]+|{BLANKS}")
QWEN2 = LLAMA3.replace("{1,3}", "")
# GPT-4o's.
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{SUFFIXES}?"
         rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{SUFFIXES}?"
         rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{BLANKS}")
# The same as GPT-2's and Llama 3's, as tiktoken writes them for GPT-2 and GPT-4.
GPT2_TIKTOKEN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)"
                 r"|\s")
CL100K_TIKTOKEN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
                   r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
KNOWN = (PATTERN, GPT2, LLAMA3, QWEN2, O200K, GPT2_TIKTOKEN, CL100K_TIKTOKEN)


def for_oniguruma(pattern: str) -> str:
    """A pattern for Hugging Face's regex library.

    That reads `{1,3}+` as a repetition, not as possessive.
    """
    return pattern.replace("{1,3}+", "{1,3}")


BY_ONIGURUMA = {for_oniguruma(pattern): pattern for pattern in KNOWN}

# The marks of Unicode 10 to 15 that are ordered or composed.
LATER_MARKS = re.compile(
    "([\u07fd\u0898-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u0ece\u1715\u1abf-\u1ace"
    "\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27\U00010eab\U00010eac\U00010efd-\U00010eff"
    "\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U0001145e\U00011839\U0001183a"
    "\U00011930\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42"
    "\U00011d44\U00011d45\U00011d97\U00011f41\U00011f42\U00016ff0\U00016ff1\U0001e08f"
    "\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef])")


def normalized(text: str) -> str:
    """The text in Unicode's form C, as Hugging Face's tokenizers compute it.

    They have the tables of Unicode 9, and leave marks that were added later as they are, with what
    stands on both sides of such a mark.
    """
    if text.isascii():
        return text
    # Every second piece is such a mark.
    pieces = LATER_MARKS.split(text)
    pieces[::2] = [unicodedata.normalize("NFC", piece) for piece in pieces[::2]]
    return "".join(pieces)
