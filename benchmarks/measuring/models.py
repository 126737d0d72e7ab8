"""Models of MiniLM's shape with random weights: nothing to download, and as fast as trained ones."""

import importlib.util
import tempfile
from functools import cache
from typing import Any, TypeVar

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from benchmarks.measuring.costs import MINILM
from mixencoder import MixEncoder
from mixencoder.base.checkpoints.checkpoint import load_tokenizer
from mixencoder.base.engine import Engine
from mixencoder.bundled import default_checkpoint
from mixencoder.ranking.query_cache import QueryStateCache

Kind = TypeVar("Kind", bound=Engine)


def backbone_config(**changes: Any) -> BertConfig:
    """Make the configuration of a BERT of MiniLM's sizes."""
    return BertConfig(
        vocab_size=len(_tokenizer()),
        hidden_size=MINILM.d,
        num_hidden_layers=MINILM.layers,
        num_attention_heads=MINILM.heads,
        intermediate_size=MINILM.inner,
        **changes,
    )


@cache
def _tokenizer() -> Any:
    return load_tokenizer(default_checkpoint())


def _saved(model: Any) -> tempfile.TemporaryDirectory:
    """Save a model and the tokenizer in a temporary folder."""
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    _tokenizer().save_pretrained(folder.name)
    return folder


@cache
def _backbone() -> tempfile.TemporaryDirectory:
    """The encoder that all architectures share; its folder lasts as long as the process."""
    torch.manual_seed(0)
    return _saved(BertModel(backbone_config(), add_pooling_layer=False))


@cache
def engine(kind: type[Kind], **settings: Any) -> Kind:
    """Make an architecture over the backbone, once per process and settings.

    A MixEncoder without settings is as published: without the dual term, so that its query pass stops at the last tap.
    It encodes every query again, without a cache.
    """
    torch.manual_seed(0)
    made = kind.from_backbone(_backbone().name, **settings)
    if isinstance(made, MixEncoder):
        made._query_states = QueryStateCache(max_bytes=0)
    return made


def rival_unavailable() -> str | None:
    """Why sentence-transformers does not run here, or None."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed: pip install mixencoder[rivals]"
    return None


@cache
def sentence_transformers_cross_encoder() -> Any:
    """Make sentence-transformers' CrossEncoder of the same shape, once per process."""
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    torch.manual_seed(0)
    with _saved(BertForSequenceClassification(backbone_config(num_labels=1))) as folder:
        return TheirCrossEncoder(folder, device="cpu")
