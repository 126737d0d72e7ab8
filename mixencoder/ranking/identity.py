"""What tells one model's rows from another's: hashes of weights and tokenizer, and a name for people."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mixencoder.bundled import default_checkpoint
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.weights_version import weights_version


class ModelIdentity:
    """A model with its tokenizer, as an index's fingerprint names them.

    Args:
        model, tokenizer: both may be shared by several engines.
    """

    def __init__(self, model: MixEncoderModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._remembered: tuple[int, dict[str, str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # numbers of versions are those of one process and one model
        return {**self.__dict__, "_remembered": None}

    @property
    def name(self) -> str:
        """Return class, checkpoint (the last part of its path, or its hub id) and sizes; never compared."""
        config, where = self._model.config, self._model.name_or_path
        if where and Path(where) == default_checkpoint():
            where = "bundled default"
        elif where and Path(where).is_dir():
            where = Path(where).resolve().name
        quoted = f' "{where}"' if where else ""
        return f"MixEncoder{quoted} (d={config.hidden_size}, k={config.num_context_embeddings})"

    def parts(self) -> dict[str, str]:
        """Return hashes of weights and tokenizer, and the dtype: the same checkpoint cast to another gives other rows.

        Reads every weight: some 0.1 s for a model of MiniLM's size.
        """
        version = weights_version(self._model)
        weights = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        words = core.to_str() if core is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        parts = {
            "weights": weights.hexdigest()[:16],
            "tokenizer": hashlib.sha256(words.encode()).hexdigest()[:16],
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }
        self._remembered = version, parts
        return parts

    def remembered_parts(self, version: int) -> dict[str, str]:
        """Return `parts`, computed anew only if they were not for this version of the weights (`weights_version`)."""
        if self._remembered is None or self._remembered[0] != version:
            return self.parts()
        return self._remembered[1]
