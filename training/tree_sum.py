"""Adds gradients in a fixed binary tree: the sum does not depend on who computes which part.

Floating-point addition depends on its order: (a + b) + (c + d) has other last bits than
((a + b) + c) + d.
"""

from collections.abc import Sequence

from torch import Tensor


def add_in_tree(values: list[Tensor]) -> Tensor:
    """Add tensors in neighbouring pairs, then the sums in pairs, and so on. Changes the first."""
    while len(values) > 1:
        pairs = zip(values[0::2], values[1::2], strict=False)
        rest = values[-1:] if len(values) % 2 else []
        values = [left.add_(right) for left, right in pairs] + rest
    return values[0]


class TreeSum:
    """Adds the gradients of a step's micro-steps in a binary tree, as `add_in_tree` would.

    A process that has an aligned half or quarter of the micro-steps computes a subtree, so the sum
    over processes has the same bits for any power of two of them that divides the micro-steps.
    Keeps log2 of the micro-steps, less one, partial sums.
    """

    def __init__(self, parameters: Sequence[Tensor], micro_steps: int) -> None:
        self.parameters = parameters
        # The tree has as many leaves as the largest power of two that divides the micro-steps. In a
        # leaf, autograd adds to `.grad`; so it does in a pair of single micro-steps.
        leaves = micro_steps & -micro_steps
        self.micro_steps_of_leaf = micro_steps // leaves
        if self.micro_steps_of_leaf == 1 and leaves > 1:
            self.micro_steps_of_leaf = 2
        self.micro_steps = micro_steps
        # The number of leaves in each sum, and its gradients.
        self.partial_sums: list[tuple[int, list[Tensor | None]]] = []

    def after_backward(self, micro_step: int) -> None:
        """Move a finished leaf's gradients onto the stack, adding sums of equal size."""
        if micro_step + 1 == self.micro_steps or (micro_step + 1) % self.micro_steps_of_leaf:
            return
        # Add sums of equal size, as carrying adds binary digits.
        size, gradients = 1, [weights.grad for weights in self.parameters]
        while self.partial_sums and self.partial_sums[-1][0] == size:
            _, left = self.partial_sums.pop()
            gradients = [add(*pair) for pair in zip(left, gradients, strict=True)]
            size *= 2
        self.partial_sums.append((size, gradients))
        # The next leaf starts from zero.
        for weights in self.parameters:
            weights.grad = None

    def put_total(self, index: int) -> None:
        """After a parameter's last gradient: put the sum of all into its `.grad`."""
        weights = self.parameters[index]
        for _, gradients in reversed(self.partial_sums):
            weights.grad = add(gradients[index], weights.grad)
            gradients[index] = None

    def finish(self) -> None:
        """Put the sums of all parameters into their `.grad`."""
        for index in range(len(self.parameters)):
            self.put_total(index)


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum, in the memory of `left`; a missing gradient counts as zero."""
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)
