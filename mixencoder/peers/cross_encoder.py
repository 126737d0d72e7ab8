"""Cross-encoder: query and document run as one sequence through all layers. Nothing is encoded ahead of time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from mixencoder.base.backbones import max_positions
from mixencoder.base.configuration import EncoderConfig
from mixencoder.base.engine import Request
from mixencoder.base.gradient_cache import in_chunks
from mixencoder.base.modeling import Batch, HeadedModel, RankingScores
from mixencoder.base.scores import Pairs, check_finite, unique
from mixencoder.base.tokenization import pad
from mixencoder.errors import CheckpointError, InputError, TruncationWarning
from mixencoder.peers.base import Peer
from mixencoder.peers.token_states import FirstTokenHeads, has_token_types
from mixencoder.progress import progress_bar


class CrossEncoderConfig(EncoderConfig):
    """Configuration of `CrossEncoderModel`.

    The fields describe how the tokenizer joins a pair: the query's token row, the separator, then the document's token
    row without its first tokens. `CrossEncoder.from_backbone` finds them by joining an example.

    Args:
        separator: token ids between the query's row and the rest of the document's row.
        document_prefix: number of tokens removed from the start of the document's row.
        document_suffix: number of special tokens at its end, which are kept when a document is cut.
        kwargs: fields of `EncoderConfig`. A query may take half of the backbone's positions; a document is cut to the
            positions that the query leaves.

    Raises:
        ValueError: a value is outside its range.
    """

    model_type = "mixencoder-cross-encoder"

    def __init__(
        self,
        backbone_config: Any = None,
        separator: Sequence[int] = (),
        document_prefix: int = 1,
        document_suffix: int = 1,
        **kwargs: Any,
    ) -> None:
        self.separator = list(separator)
        self.document_prefix = document_prefix
        self.document_suffix = document_suffix
        super().__init__(backbone_config, **kwargs)


class CrossEncoderModel(HeadedModel):
    """Linear heads on the first token of the joined sequence."""

    config_class = CrossEncoderConfig

    def __init__(self, config: CrossEncoderConfig) -> None:
        super().__init__(config)
        self.head = FirstTokenHeads(config)
        self.post_init()

    def join(
        self, query: Tensor, query_mask: Tensor, document: Tensor, document_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Join token rows (R, m) and (R, n), each padded on the right, into pairs.

        If a pair has more tokens than the backbone has positions, the end of its document is cut before the special
        tokens.

        Returns:
            Token ids, mask and token types of the pairs, each (R, longest) int64. Masked ids are arbitrary tokens.

        Raises:
            InputError: a query leaves no room for a document.
        """
        prefix, suffix = self.config.document_prefix, self.config.document_suffix
        separator = torch.tensor(self.config.separator, dtype=query.dtype, device=query.device)
        query_length, document_length = query_mask.sum(dim=1, keepdim=True), document_mask.sum(dim=1, keepdim=True)
        document_start = query_length + len(separator)
        room = max_positions(self.config.backbone_config) - document_start
        if int(room.min()) <= suffix:
            raise InputError(
                f"a query has {int(query_length.max())} tokens, which leaves no room for a document in "
                f"{max_positions(self.config.backbone_config)} positions; cut queries to fewer tokens"
            )
        kept = torch.minimum(document_length - prefix, room)
        length = document_start + kept
        # for every column of the pair, the column of [query ; separator ; document] that it comes from
        column = torch.arange(int(length.max()), device=query.device).expand(len(query), -1)
        kept_column = column - document_start
        in_document = torch.where(
            kept_column < kept - suffix, kept_column + prefix, document_length - (kept - kept_column)
        )
        in_separator = column - query_length + query.shape[1]
        source = torch.where(column < document_start, in_separator, query.shape[1] + len(separator) + in_document)
        source = torch.where(column < query_length, column, source)
        row = torch.cat([query, separator.expand(len(query), -1), document], dim=1)
        mask = column < length
        ids = row.gather(1, source.where(mask, 0))
        return ids, mask.long(), (column >= document_start).long()

    def score(
        self, query: Tensor, query_mask: Tensor, document: Tensor, document_mask: Tensor, head: str | None = None
    ) -> Tensor:
        """Score R pairs, given as the token rows of `join`.

        Returns:
            Scores (R,) or logits (R, num_labels), at least float32.

        Raises:
            InputError: the model does not have this head, or a query leaves no room for a document.
        """
        head = self.check_head(head)
        ids, mask, types = self.join(query, query_mask, document, document_mask)
        token_types = {"token_type_ids": types} if has_token_types(self.config) else {}
        states = self.run_backbone(ids, mask, None, **token_types)
        return self.head(states[:, 0], head)

    def _score_batch(
        self, query: Batch, document: Batch, candidates_per_query: int | None, head: str, mini_batch_size: int | None
    ) -> RankingScores | Tensor:
        """Join and score pairs; without candidates_per_query, every query with every document."""
        batch, count = len(query.ids), candidates_per_query or len(document.ids)
        repeats = batch if candidates_per_query is None else 1
        queries = (part.repeat_interleave(count, dim=0) for part in query)
        documents = (part.repeat(repeats, 1) for part in document)
        out = in_chunks(partial(self.score, head=head), (*queries, *documents), mini_batch_size)
        out = out.unflatten(0, (batch, count))
        return RankingScores(out, None) if head == "ranking" else out


class CrossEncoder(Peer):
    """Cross-encoder: every pair runs through the backbone as one sequence; nothing can be encoded ahead of time.

    Configuration: `CrossEncoderConfig`.

    Example:
        >>> model = CrossEncoder.from_backbone("sentence-transformers/all-MiniLM-L6-v2")
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': ..., 'score': ...}]
    """

    model: CrossEncoderModel
    model_class = CrossEncoderModel
    reads_jointly = True

    @classmethod
    def _tokenizer_fields(cls, tokenizer: Any) -> dict[str, Any]:
        """Find how the tokenizer joins a pair, by comparing a pair with the token rows of its texts.

        Raises:
            CheckpointError: the pair is not the query's row, a separator and the end of the document's row.
        """
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        single, pair = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
        prefix = next((i for i in range(len(single)) if single[i : i + len(bare)] == bare), 0)
        suffix = len(single) - prefix - len(bare)
        separator = pair[len(single) : len(pair) - len(bare) - suffix]
        if not bare or pair != [*single, *separator, *single[prefix:]]:
            raise CheckpointError(
                "the tokenizer must join a pair as the first text's tokens, a separator, and the second text's tokens "
                f"without their start; but 'a' is {single} and the pair ('a', 'a') is {pair}"
            )
        return {"separator": separator, "document_prefix": prefix, "document_suffix": suffix}

    def _max_tokens(self, role: str) -> int:
        """As `Engine._max_tokens`; a query may have half of the positions, the rest is left for the document."""
        return super()._max_tokens(role) // (2 if role == "query" else 1)

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        query_lengths = torch.tensor([len(row) for row in queries])
        document_lengths = torch.tensor([len(row) for row in documents])
        lengths = query_lengths[pairs.query] + document_lengths[pairs.candidate]
        lengths += len(self.config.separator) - self.config.document_prefix
        longest = max_positions(self.config.backbone_config)
        cut = int((lengths > longest).sum())
        if cut:
            self._notices.note(
                "truncated pairs",
                cut,
                f"{cut:,} of {len(lengths):,} pairs are longer than {longest} tokens; the end of their document was "
                "cut",
                TruncationWarning,
            )
        size = () if request.head == "ranking" else (self.config.num_classes,)
        out = torch.empty(len(lengths), *size, dtype=torch.float32, device=self.device)
        with progress_bar(len(lengths), "Pairs", "pair", request.show_progress_bar) as bar:
            # longest first: if a batch does not fit into memory, the first one fails
            for rows in lengths.argsort(descending=True, stable=True).split(request.batch_size):
                query = pad([queries[number] for number in pairs.query[rows].tolist()], 0)
                document = pad([documents[number] for number in pairs.candidate[rows].tolist()], 0)
                tensors = (tensor.to(self.device) for tensor in (*query, *document))
                out[rows.to(self.device)] = self.model.score(*tensors, head=request.head).float()
                bar.update(len(rows))
        return check_finite(out, self.dtype)

    def _score_all(self, queries: Sequence[str], documents: Sequence[str], request: Request) -> Tensor:
        query_rows, query_of = unique(self.read_query(queries))
        document_rows, document_of = unique(self.read_document(documents))
        batch, count = len(query_rows), len(document_rows)
        pairs = Pairs(torch.arange(batch).repeat_interleave(count), torch.arange(count).repeat(batch))
        scores = self._score_pairs(query_rows, document_rows, pairs, request)
        return scores.view(batch, count)[query_of][:, document_of]


AutoConfig.register(CrossEncoderConfig.model_type, CrossEncoderConfig)
AutoModel.register(CrossEncoderConfig, CrossEncoderModel)
