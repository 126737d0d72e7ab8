"""Token ids and special tokens, cutting, padding, threads."""

import threading

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixencoder.base.tokenization import TextEncoder, pad
from mixencoder.errors import CheckpointError, EmptyTextWarning, InputError, TruncationWarning


def test_a_text_gets_the_tokenizers_own_special_tokens(tokenizer):
    encode = TextEncoder(tokenizer, 40)
    assert encode(["the cat"]) == [tokenizer("the cat")["input_ids"]]
    assert encode([]) == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_keeps_one_end_and_its_special_tokens(tokenizer, side):
    encode = TextEncoder(tokenizer, 5, side)
    whole = tokenizer("the cat sat in a pot")["input_ids"]
    with pytest.warns(TruncationWarning, match="1 of 2 documents are longer than 5 tokens"):
        (row, short) = encode(["the cat sat in a pot", "the cat sat"])
    assert row == [whole[0], *(whole[1:4] if side == "right" else whole[-4:-1]), whole[-1]]
    assert len(short) == 5


def test_a_text_without_tokens_is_read_as_special_tokens_and_named(tokenizer):
    with pytest.warns(EmptyTextWarning, match=r"1 of 2 queries hold no token .* the first is query 1: '\\n\\t'"):
        rows = TextEncoder(tokenizer, 9, role="query")(["the", "\n\t"])
    assert rows[1] == tokenizer("")["input_ids"]
    with pytest.raises(InputError, match=r"query 1 holds no token: '\\n\\t'; expected some text"):
        TextEncoder(tokenizer, 9, role="query", on_empty="error")(["the", "\n\t"])


def test_a_tokenizer_without_special_tokens_works_and_one_that_surrounds_nothing_is_refused():
    core = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    assert TextEncoder(plain, 9)(["a a"]) == [[0, 0]]
    with pytest.raises(InputError, match=r"document 0 holds no token.*no special tokens"):
        TextEncoder(plain, 9)([" "])

    class Odd:
        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(CheckpointError, match="special tokens"):
        TextEncoder(Odd(), 9)(["a"])


def test_padding_is_on_the_right():
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.filterwarnings("ignore::mixencoder.errors.TruncationWarning")
def test_threads_with_different_limits_do_not_interfere(tokenizer):
    text, failures = "the cat sat in a pot " * 3, []

    def work(limit: int) -> None:
        for _ in range(100):
            (row,) = TextEncoder(tokenizer, limit)([text])
            if len(row) != limit:
                failures.append(limit)

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (5, 7, 9, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
