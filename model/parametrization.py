"""Initial sizes and learning rates of a wider or deeper model: the rules of muP, one a line.

Under muP the best learning rate of a narrow model is about that of a wide one: tune rates on the
narrow one. The rules change initial weights and rates only; `GPTConfig.query_scale` is the one
factor in the model itself. So checkpoints, exports and decoding need no rules of their own. Knows
names of parameters, neither tensors nor optimizers.

m is the width, and L the depth, relative to those of the base model, where muP changes nothing. For
AdamW and Muon, a factor of a weight matrix in the model is equal to the same factor in its initial
size and in its rate. So logits and residual branches have none.
"""

from model.config import GPTConfig


def initial_scale(config: GPTConfig, name: str) -> float:
    """The factor of a parameter's initial standard deviation, or of its initial gain."""
    if config.parametrization == "standard":
        return 1.0
    m, L = config.width_ratio, config.depth_ratio
    scale = 1.0
    if is_hidden(name):
        # A variance of 1 / m: arXiv:2203.03466, table 3, hidden weights.
        scale = m**-0.5
    elif scales_logits(config, name):
        # The same table, output weights.
        scale = 1 / m
    if enters_residual_stream(name):
        # Branches by 1 / L: arXiv:2505.01618. GPT-2's already have 1 / sqrt(L).
        scale *= L**-0.5
    return scale


def rate_scale(config: GPTConfig, name: str, optimizer: str) -> float:
    """The factor of a parameter's learning rate by the `optimizer`, "adamw" or "muon".

    Its weight decay is divided by it: arXiv:2505.01618, table 1, and arXiv:2510.19093.
    """
    if config.parametrization == "standard":
        return 1.0
    m, L = config.width_ratio, config.depth_ratio
    scale = 1.0
    if is_hidden(name):
        # arXiv:2203.03466, table 3, hidden weights. Muon needs no factor, since its update has a
        # spectral norm of sqrt(out / in): arXiv:2505.02222.
        scale = 1 / m if optimizer == "adamw" else 1.0
    elif scales_logits(config, name):
        # The same table, output weights.
        scale = 1 / m
    if enters_residual_stream(name):
        # arXiv:2505.01618, with 1 / L in the weights instead of the model.
        scale /= L
    return scale


def is_hidden(name: str) -> bool:
    """Whether the parameter is a matrix of a block: both its sizes grow with the width."""
    return name.startswith("h.") and name.endswith("weight") and ".ln_" not in name


def scales_logits(config: GPTConfig, name: str) -> bool:
    """Whether the logits are proportional to the parameter, and nothing else is.

    A tied head shares the weights of the embedding, which are not scaled: the last norm is instead.
    """
    return name.startswith("ln_f" if config.tie_head else "lm_head")


def enters_residual_stream(name: str) -> bool:
    """Whether the output of a block's branch is proportional to the parameter."""
    return ".c_proj." in name
