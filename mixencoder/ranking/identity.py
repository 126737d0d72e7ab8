"""A model's identity in an index's fingerprint: hashes of weights and tokenizer, and a name for messages."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mixencoder.bundled import default_checkpoint
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.weights_version import KeptForWeights, weights_version


class ModelIdentity:
    """A model and its tokenizer as an index's fingerprint names them.

    Args:
        model, tokenizer: several engines may share them.
    """

    def __init__(self, model: MixEncoderModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._parts: KeptForWeights[dict[str, str]] = KeptForWeights()

    @property
    def name(self) -> str:
        """Return class, checkpoint (the last part of its path, or its hub id) and sizes, for messages only."""
        config, checkpoint = self._model.config, self._model.name_or_path
        if checkpoint and Path(checkpoint) == default_checkpoint():
            checkpoint = "bundled default"
        elif checkpoint and Path(checkpoint).is_dir():
            checkpoint = Path(checkpoint).resolve().name
        quoted = f' "{checkpoint}"' if checkpoint else ""
        return f"MixEncoder{quoted} (d={config.hidden_size}, k={config.num_context_embeddings})"

    def parts(self) -> dict[str, str]:
        """Compute hashes of weights and tokenizer, and name the dtype, on which a candidate's rows depend too.

        Reads every weight: some 0.1 s for a model of MiniLM's size.
        """
        return self._parts.put(weights_version(self._model), self._computed_parts())

    def remembered_parts(self, version: int) -> dict[str, str]:
        """Return `parts`, computed again only if the version of the weights (`weights_version`) is another one."""
        return self._parts.get(version, self._computed_parts)

    def _computed_parts(self) -> dict[str, str]:
        weights = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        contents = core.to_str() if core is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return {
            "weights": weights.hexdigest()[:16],
            "tokenizer": hashlib.sha256(contents.encode()).hexdigest()[:16],
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }
