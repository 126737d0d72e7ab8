"""A model's identity in an index's fingerprint: hashes of weights and tokenizer, and a name for messages."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mixencoder.base.weights_version import KeptForWeights, weights_version
from mixencoder.bundled import default_checkpoint
from mixencoder.index.schema import raw_bytes
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.record_format import RecordFormat


class ModelIdentity:
    """A model and its tokenizer as an index's fingerprint names them, part by part.

    ========== ===========================================================================
    part       what
    ========== ===========================================================================
    encoder    hash of what E_0 depends on (`MixEncoderModel.encoder_weights`, context_norm)
    projection hash of the weights that `RecordFormat` projects E_0 with
    weights    hash of all weights
    tokenizer  hash of the tokenizer
    dtype      of the weights; a candidate's rows depend on it too
    ========== ===========================================================================

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

    def parts(self, names: Iterable[str]) -> dict[str, str]:
        """Compute parts by name.

        Hashing reads every weight that the part covers: some 0.1 s for all weights of a model of MiniLM's size.
        """
        return self._keep(weights_version(self._model), {name: self._computed(name) for name in names})

    def remembered_parts(self, version: int, names: Iterable[str]) -> dict[str, str]:
        """Return `parts`, computed again only if the version of the weights (`weights_version`) is another one."""
        kept = self._parts.get(version, dict)
        found = {name: kept.get(name) or self._computed(name) for name in names}
        return found if found.keys() <= kept.keys() else self._keep(version, found)

    def _keep(self, version: int, found: dict[str, str]) -> dict[str, str]:
        self._parts.put(version, {**self._parts.get(version, dict), **found})
        return found

    def _computed(self, name: str) -> str:
        compute: dict[str, Callable[[], str]] = {
            "encoder": self._hash_of_encoder,
            "projection": lambda: _hash(RecordFormat(self._model, "projected").projection_weights()),
            "weights": lambda: _hash(self._model.state_dict()),
            "tokenizer": self._hash_of_tokenizer,
            "dtype": lambda: str(self._model.dtype).removeprefix("torch."),
        }
        return compute[name]()

    def _hash_of_encoder(self) -> str:
        found, norm = _hash(self._model.encoder_weights()), self._model.config.context_norm
        # E_0 depends on it too
        return found if norm is None else hashlib.sha256(f"{found} {norm!r}".encode()).hexdigest()[:16]

    def _hash_of_tokenizer(self) -> str:
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        contents = core.to_str() if core is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(contents.encode()).hexdigest()[:16]


def _hash(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of weights and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor.detach().cpu().contiguous()))
    return found.hexdigest()[:16]
