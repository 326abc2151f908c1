"""The regular expressions by which byte-pair encodings split a text into words before merging.

They are a fixed list, so that no tokenizer file can bring one that takes forever.
"""

from __future__ import annotations

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
