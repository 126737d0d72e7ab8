"""States of queries that were encoded before: bounded, and dropped when the weights change."""

import torch

from mixencoder.ranking.query_cache import QueryStateCache
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import StreamRanker
from tests.ranking.streaming_cases import FORMS, chunks, contexts, make_model


class TestQueryStateCache:
    def fetch(self, cache, model, rows, seen):
        def encode(missing):
            seen.append(missing)
            ids = torch.zeros(len(missing), max(map(len, missing)), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(missing):
                ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
            with torch.inference_mode():
                return model.encode_query(ids, mask)

        return cache.fetch(model, rows, encode)

    def test_a_query_is_encoded_once(self):
        model, cache, seen = make_model(FORMS[1]), QueryStateCache(), []
        first = self.fetch(cache, model, [[5, 6, 7], [8, 9], [5, 6, 7]], seen)
        again = self.fetch(cache, model, [[8, 9], [10]], seen)
        assert seen == [[(5, 6, 7), (8, 9)], [(10,)]]
        assert first[0] is first[2]
        assert first[1] is again[0]
        assert [len(state.keys[0][0]) for state in first] == [3, 2, 3]
        assert [int(state.lengths) for state in first] == [3, 2, 3]

    def test_states_rank_as_they_do_together(self):
        model, cache = make_model(FORMS[1]), QueryStateCache()
        record_format = RecordFormat(model)
        ranker, rows = StreamRanker(model, record_format), record_format.encode(contexts(model, 40))
        states = self.fetch(cache, model, [[5, 6, 7], [8, 9]], [])
        both = ranker.rank(states, chunks(rows))
        for number, state in enumerate(states):
            assert torch.equal(both.scores[number], ranker.rank(state, chunks(rows)).scores[0])

    def test_memory_is_bounded_and_the_least_recently_used_goes_first(self):
        model, seen = make_model({}), []
        cache = QueryStateCache()
        self.fetch(cache, model, [[5]], seen)
        one = cache.nbytes
        assert one == 2 * 32 * 4 + 8
        cache = QueryStateCache(max_bytes=2 * one)
        for rows in ([[5]], [[6]], [[5]], [[7]], [[5]], [[6]]):
            self.fetch(cache, model, rows, seen)
            assert cache.nbytes <= 2 * one
        assert seen[1:] == [[(5,)], [(6,)], [(7,)], [(6,)]]
        assert len(self.fetch(cache, model, [[5] * 9], seen)) == 1
        assert cache.nbytes <= 2 * one

    def test_changed_weights_are_noticed(self):
        model, cache, seen = make_model({}), QueryStateCache(), []
        (before,) = self.fetch(cache, model, [[5, 6]], seen)
        with torch.no_grad():
            model.backbone.embeddings.word_embeddings.weight.mul_(2)
        (after,) = self.fetch(cache, model, [[5, 6]], seen)
        assert not torch.equal(before.keys[0], after.keys[0])
        model.to(torch.float64)
        (wide,) = self.fetch(cache, model, [[5, 6]], seen)
        assert wide.keys[0].dtype == torch.float64
        assert len(seen) == 3
