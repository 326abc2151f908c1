"""The colors of runs by their ranks, the same in all pictures and tables."""

# These can be told apart on white and on black.
COLORS = ("#2f7fc1", "#d9702b", "#2f9e6e", "#c2569b", "#8a6fd1", "#a37f1f", "#d14d57", "#2f9fae")
# The ends of a scale for more runs than colors.
BEST, WORST = (0xD9, 0x70, 0x2B), (0x9A, 0xA8, 0xB8)


def color(rank: int, count: int) -> str:
    """The color of a run: its own, or of many runs one on a scale from BEST to WORST."""
    if count <= len(COLORS):
        return COLORS[rank]
    # With an exponent below 1, the first few ranks differ most.
    share = (rank / (count - 1)) ** 0.35
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(BEST, WORST, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
