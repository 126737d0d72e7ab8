"""Models of MiniLM's shape with random weights, made here, with nothing to download: they time as trained ones do."""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from benchmarks.costs import MINILM
from mixencoder import MixEncoder
from mixencoder.checkpoint import default_checkpoint, load_tokenizer
from mixencoder.peers import CrossEncoder, DeFormer, DualEncoder, LateInteraction, PolyEncoder
from mixencoder.query_cache import QueryStateCache


class Engines(NamedTuple):
    """All six architectures over one backbone."""

    mix: MixEncoder
    """As published: no dual term, so that its query pass stops at the last tap. Every query is encoded anew."""
    cross: CrossEncoder
    dual: DualEncoder
    poly: PolyEncoder
    late: LateInteraction
    deformer: DeFormer


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


@contextmanager
def _saved(model: Any) -> Iterator[Path]:
    """A model in a folder, beside the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        yield Path(folder)


@cache
def engines() -> Engines:
    """Make them, once a process."""
    torch.manual_seed(0)
    with _saved(BertModel(backbone_config(), add_pooling_layer=False)) as folder:
        kinds = (MixEncoder, CrossEncoder, DualEncoder, PolyEncoder, LateInteraction, DeFormer)
        made = Engines(*(kind.from_backbone(folder) for kind in kinds))
    made.mix._query_states = QueryStateCache(max_bytes=0)
    return made


def rival_unavailable() -> str | None:
    """Why sentence-transformers' CrossEncoder does not run here, or None."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed: pip install mixencoder[rivals]"
    return None


@cache
def sentence_transformers_cross_encoder() -> Any:
    """Make sentence-transformers' CrossEncoder of the same shape, once a process."""
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    torch.manual_seed(0)
    with _saved(BertForSequenceClassification(backbone_config(num_labels=1))) as folder:
        return TheirCrossEncoder(str(folder), device="cpu")
