"""The labels of axes: categories, numbers and powers of ten, each in few letters."""

import math
from typing import Any

import numpy as np

from setting import as_word
from terminal import escaped

MAX_CATEGORIES = 16  # labels below an axis


def label_categories(axes: Any, texts: list[str]) -> None:
    """Texts at x = 0, 1, 2, ..., in short: level if they fit, else slanted; of many, only some."""
    texts = [short_text(text) for text in texts]
    slanted = {}
    if len("".join(texts)) > 32:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    every = math.ceil(len(texts) / MAX_CATEGORIES)
    axes.set_xticks(range(0, len(texts), every), texts[::every], **slanted)
    axes.set_xlim(-0.5, len(texts) - 0.5)


def label_numbers(axes: Any, numbers: list[float]) -> None:
    """An x-axis for numbers, on a log scale if they span a factor of ten.

    A few numbers are the ticks themselves, if their texts fit side by side.
    """
    from matplotlib.ticker import MaxNLocator

    # Choose the scale, and its ticks.
    logarithmic = min(numbers) > 0 and max(numbers) >= 10 * min(numbers)
    if logarithmic:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    else:
        integer = all(isinstance(number, int) for number in numbers)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=integer))
        axes.xaxis.set_major_formatter(lambda value, _: number_text(value, 6))

    # Replace the ticks by the numbers themselves if there is space for their texts.
    positions = np.log(numbers) if logarithmic else np.array(numbers)
    texts = number_texts(numbers)
    # The axis is about 36 letters wide.
    needed = np.ptp(positions) * max(map(len, texts)) / 36
    if len(numbers) <= 5 and (np.diff(positions) > needed).all():
        axes.set_xticks(numbers, texts)


def log_ticks(axis: Any) -> None:
    """At most six plain numbers along a log axis: 1, 2 and 5 times powers of ten, or fewer."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    # Use the densest of these sets of ticks that has at most six of them in view.
    low, high = sorted(axis.get_view_interval())
    dense = LogLocator(subs=(1, 2, 5), numticks=99)
    for locator in (dense, LogLocator(numticks=99), LogLocator(numticks=6)):
        ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        if len(ticks) <= 6:
            break
    # matplotlib finds none between 1e-300 and 1e300.
    if not ticks:
        ticks = [low, high]

    # Label them, and hide those between.
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value, 3)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def abbreviate(axis: Any) -> None:
    """Large numbers in short, such as 10 k and 2 M."""

    def short(value: float, _: int) -> str:
        for power, letter in ((9, " G"), (6, " M"), (3, " k")):
            if abs(value) >= 10**power:
                return number_text(value / 10**power, 6) + letter
        return number_text(value, 6)

    axis.set_major_formatter(short)


def number_text(value: float, digits: int) -> str:
    """A number with this many significant digits, as in 0.00123 and 3e-5; integers with all."""
    if abs(value) < 1e9:
        if float(value).is_integer():
            return f"{value:.0f}"
        digits = max(digits, len(f"{abs(value):.0f}"))
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def number_texts(values: list[Any]) -> list[str]:
    """Settings as texts; fractions have three significant digits, or more to tell them apart."""
    # Add digits until different values have different texts.
    different = len(set(map(str, values)))
    for digits in range(3, 18):
        texts = [setting_text(value, digits) for value in values]
        if len(set(texts)) >= different:
            break
    return texts


def setting_text(value: Any, digits: int) -> str:
    """A setting, rounded to this many significant digits."""
    if isinstance(value, float) and math.isfinite(value):
        return number_text(value, digits)
    return " ".join(map(str, value)) if isinstance(value, list) else as_word(value)


def short_text(text: str, longest: int = 20) -> str:
    """A text in which control characters are escaped, if it is long without its middle."""
    text = escaped(text, keep="")
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[: half - 1]}…{text[-half:]}"
