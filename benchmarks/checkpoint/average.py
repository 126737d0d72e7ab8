"""Average the weights of trained checkpoints: ``python -m benchmarks.checkpoint.average A B --output C``."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixencoder import MixEncoder
from mixencoder.errors import InputError


def average(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of every weight.

    Args:
        weights: state dicts with the same names and shapes; what is not floating point is taken from the first.

    Raises:
        InputError: names or shapes differ.
    """
    first = weights[0]
    for other in weights[1:]:
        shapes = {name: tensor.shape for name, tensor in first.items()}
        if shapes != {name: tensor.shape for name, tensor in other.items()}:
            raise InputError("the checkpoints differ in the names or shapes of their weights; expected the same form")
    return {
        name: torch.stack([each[name].float() for each in weights]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.average", description=__doc__)
    parser.add_argument("models", nargs="+", help="trained checkpoints; the first one's settings are kept")
    parser.add_argument("--output", type=Path, required=True, help="folder for the averaged checkpoint")
    options = parser.parse_args(arguments)
    engines = [MixEncoder.from_pretrained(name) for name in options.models]
    averaged = average([engine.model.state_dict() for engine in engines])
    engines[0].model.load_state_dict(averaged)
    engines[0].save_pretrained(options.output)


if __name__ == "__main__":
    main()
