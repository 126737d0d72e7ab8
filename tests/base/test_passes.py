"""Passes of the encoder and trials of shapes: trials decide which shapes are used, and threads stay as they were."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mixencoder import MixEncoder
from mixencoder.base import encoder_passes as passes
from mixencoder.base.backbones import build_backbone
from mixencoder.base.encoder_passes import PASS_TOKENS, STEP, EncoderPasses, PassShape
from mixencoder.base.threads import on_one_thread, run_in_order
from mixencoder.ranking import pairs as scoring
from mixencoder.ranking.candidate_buffer import CandidateBuffer
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import StreamRanker
from tests.conftest import backbone_config
from tests.ranking.streaming_cases import chunks, contexts, make_model, queries

ROWS = [[2, *range(5, 5 + n), 3] for n in (1, 3, 8, 9, 20, 20, 20)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(backbone_path) -> MixEncoder:
    return MixEncoder.from_backbone(backbone_path)


def run(model: MixEncoder, rows: list[list[int]], batch_size: int = 32) -> list[tuple[list[int], Tensor, Tensor, int]]:
    """Return numbers, ids, mask and threads of every pass."""
    seen = []

    def encode(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
        return ids, mask, torch.get_num_threads()

    runner = EncoderPasses(model.model, pad_id=0)
    for numbers, found in runner.run(rows, encode, batch_size=batch_size, device=torch.device("cpu"), alone=False):
        seen.append((numbers, *found))
    return seen


def test_a_text_is_padded_by_its_own_length_alone_and_the_padding_is_masked(model):
    found = run(model, ROWS)
    assert sorted(number for numbers, *_ in found for number in numbers) == list(range(len(ROWS)))
    for numbers, ids, mask, _ in found:
        for place, number in enumerate(numbers):
            length = len(ROWS[number])
            assert ids.shape[1] == -(-length // STEP) * STEP
            assert ids[place, :length].tolist() == ROWS[number]
            assert mask[place].tolist() == [1] * length + [0] * (ids.shape[1] - length)


def test_passes_run_on_one_thread_and_hold_no_more_texts_than_asked_for(model):
    found = run(model, [[2, *range(5, 20), 3]] * 40, batch_size=4)
    assert {threads for *_, threads in found} == {1}
    assert max(len(numbers) for numbers, *_ in found) <= 4
    assert all(ids.numel() <= PASS_TOKENS for _, ids, _, _ in found)


def test_the_callers_threads_and_those_of_threads_that_start_later_stay_as_they_were(model):
    run(model, ROWS)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), seen) == (2, [2])
    assert on_one_thread(torch.get_num_threads) == 1


def test_work_comes_back_in_order_and_an_error_reaches_the_caller():
    assert list(run_in_order(lambda number: number * number, range(30), 2)) == [number * number for number in range(30)]

    def fail(number: int) -> int:
        if number == 5:
            raise ValueError("the fifth")
        return number

    with pytest.raises(ValueError, match="the fifth"):
        list(run_in_order(fail, range(30), 2))


def test_a_size_whose_products_round_otherwise_is_not_used(model, monkeypatch):
    linear = torch.nn.functional.linear

    def rounded(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # text by text, so that the number of rows makes no difference on any processor
        out = torch.stack([linear(text, weight, bias) for text in rows])
        # like a library that uses another routine for some numbers of rows
        return out + 1e-6 * out.abs() if 100 < rows.shape[:-1].numel() < 200 else out

    monkeypatch.setattr(passes.F, "linear", rounded)
    shapes = passes.ShapeTrial(model.model.backbone).shapes(16, alone=False)
    assert [shape.texts for shape in shapes] == [16, 4, 2, 1]


def test_a_trial_in_half_precision_sees_another_order_of_summation(monkeypatch):
    """Rounding to bfloat16 hides all but one difference in 10^5 numbers, unless the trial's terms cancel."""
    config = backbone_config("bert", hidden_size=384, intermediate_size=384, num_attention_heads=12)
    backbone = build_backbone(config).to(torch.bfloat16)
    linear = torch.nn.functional.linear

    def otherwise_at_the_end(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # text by text, so that the number of rows makes no other difference
        out = torch.stack([linear(text.float(), weight.float()) for text in rows])
        if 100 < rows.shape[:-1].numel() < 200:
            # as a library whose tiles end here, and which sums the rest without the rounding of float32
            out[..., -4:] = linear(rows.double(), weight[-4:].double()).float()
        return out.to(torch.bfloat16)

    monkeypatch.setattr(passes.F, "linear", otherwise_at_the_end)
    shapes = passes.ShapeTrial(backbone).shapes(16, alone=False)
    assert [shape.texts for shape in shapes] == [16, 4, 2, 1]


def test_a_size_whose_results_depend_on_the_row_is_not_used(model, monkeypatch):
    linear = torch.nn.functional.linear

    def rounded(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = linear(rows, weight, bias)
        if len(rows) == 16:
            out[3] *= 1 + 1e-6
        return out

    monkeypatch.setattr(passes.F, "linear", rounded)
    assert PassShape(16, 1) not in passes.ShapeTrial(model.model.backbone).shapes(16, alone=False)


def test_pieces_of_an_index_that_do_not_agree_are_not_used(monkeypatch):
    def rounded(self, query, count: int) -> Tensor:
        # the same for a candidate in any row, on any processor
        out = next(iter(self._parts.values()))[:count].clone()
        if count == 64:
            return out * (1 + 1e-6)
        if count == 512:
            # another result in one row, as at the end of a library's tiles
            out[3] *= 1 + 1e-6
        return out

    monkeypatch.setattr(CandidateBuffer, "vectors", rounded)
    model = make_model({})
    record_format = RecordFormat(model)
    ranker = StreamRanker(model, record_format)
    ranker.rank(queries(model, (5,)), chunks(record_format.encode(contexts(model, 20))))
    (sizes,) = ranker._sizes._found.values()
    assert tuple(size.candidates for size in sizes) == (384, 256, 192, 128, 96, 48, 32, 24, 16, 12)


def test_where_attention_of_a_chunk_depends_on_the_row_every_row_attends_on_its_own(backbone_path, monkeypatch):
    model = MixEncoder.from_backbone(backbone_path, num_context_embeddings=3)
    texts = ["boil the rice", "the dog sat", "undo a git commit"] * 30
    want = model.interact(model.encode_query("cook rice"), model.encode_document(texts))
    whole = scoring._attend_whole_chunk

    def by_row(*inputs: object) -> tuple[Tensor, Tensor | None]:
        context, state = whole(*inputs)
        context[:, 5:6] *= 1 + 1e-3
        return context, state

    monkeypatch.setattr(scoring, "_attend_whole_chunk", by_row)
    model.to("cpu")
    scores = model.interact(model.encode_query("cook rice"), model.encode_document(texts))
    assert (scores.view(30, 3) == scores[0, :3]).all()
    torch.testing.assert_close(scores, want)
