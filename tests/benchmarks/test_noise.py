"""What is noisy is measured again, and refused after three tries with the reason: it never becomes a figure."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.index import speed as index_speed
from benchmarks.measuring import peaks
from benchmarks.measuring.noise import (
    LARGEST_SPREAD,
    TRIES,
    NoisyMeasurementError,
    measure_until_quiet,
    noise,
    quiet_medians,
    spread,
)
from benchmarks.suite.case import Case, Contender, Prepared, run_case, run_until_quiet
from benchmarks.suite.results import split
from mixkernels.roofline import Cost, Peaks

QUIET, NOISY = [1.0, 1.0, 1.1], [1.0, 1.0, 9.0]


class Take:
    """Gives samples as it was told to, and counts."""

    def __init__(self, *tries):
        self.tries, self.count = tries, 0

    def __call__(self, *arguments, **options):
        self.count += 1
        return self.tries[min(self.count, len(self.tries)) - 1]


def test_a_spread_is_that_of_the_quartiles():
    assert spread([1.0]) == 0.0
    assert spread([1.0, 2.0, 3.0]) == 0.5
    # two samples say nothing of what lies beyond them
    assert spread([1.0, 3.0]) == 0.5


def test_noise_is_a_wide_spread_or_what_is_faster_than_its_limit():
    assert noise(LARGEST_SPREAD, 1.0) is None
    assert noise(LARGEST_SPREAD + 0.01) == f"a spread of 0.66, expected {LARGEST_SPREAD} at most"
    assert noise(0.0, 14.7) == "14.7 of the limit, expected 1 at most"
    assert noise(float("nan"))
    assert noise(0.0, float("nan"))


def test_what_becomes_quiet_is_taken_and_measured_no_more():
    take = Take({"a": NOISY}, {"a": QUIET})
    assert quiet_medians(take) == {"a": 1.0}
    assert take.count == 2


def test_what_stays_noisy_is_refused_after_three_tries_by_name_and_with_the_reason():
    take = Take({"a": NOISY, "b": QUIET})
    with pytest.raises(NoisyMeasurementError, match=r"^a: refused after 3 tries .* a spread of 4.00, expected 0.65"):
        quiet_medians(take)
    assert take.count == TRIES == 3


def test_the_quietest_try_is_kept():
    tries = iter([("first", {"a": "x", "b": "y"}), ("second", {"a": "x"}), ("third", {"a": "x", "b": "y"})])
    found, why = measure_until_quiet(lambda: next(tries), lambda one: one[1])
    assert found[0] == "second"
    assert list(why) == ["a"]


NAMES = ("ours", "first", "second")


def made_up(flops=1, facts=None):
    def prepare(names):
        made = {name: Contender(lambda: None, Cost(flops, 1, 1), facts=facts or {}) for name in names}
        return Prepared(made, lambda name, result: None)

    return Case("operators", "nothing", {"N": 3}, torch.float32, ("ours",), ("first", "second"), prepare)


@pytest.fixture
def samples(monkeypatch):
    """Let tries give samples; peaks are one of each a second, unless a test says what looks find."""

    def give(*tries, looks=()):
        take = Take(*(dict(zip(NAMES, one, strict=True)) for one in tries))
        looks = iter(looks or [Peaks(100.0, 100.0, 100.0)])
        monkeypatch.setattr("benchmarks.suite.case.interleaved_samples", take)
        monkeypatch.setattr(peaks, "_best", {})
        monkeypatch.setattr(peaks, "_measure", lambda products: next(looks))
        return take

    return give


def test_a_noisy_case_is_run_again_until_it_is_quiet(samples):
    take = samples((NOISY, QUIET, QUIET), (QUIET, [4.0, 4.0], [2.0, 2.0]))
    outcome = run_until_quiet(made_up())
    assert take.count == 2
    assert not outcome.refused
    assert outcome.records["ours"]["ratios"] == {"first": 4.0, "second": 2.0}


@pytest.mark.parametrize(
    ("tries", "left"),
    [
        ((QUIET, [4.0, 4.0], NOISY), ["ours", "first"]),
        # without ours, or without a rival, there is nothing to compare
        ((NOISY, QUIET, QUIET), []),
        ((QUIET, NOISY, NOISY), []),
    ],
)
def test_what_stays_noisy_has_no_figure(samples, tries, left):
    take = samples(tries)
    outcome = run_until_quiet(made_up())
    assert take.count == TRIES
    assert list(outcome.records) == list(outcome.samples) == left
    if left:
        assert outcome.records["ours"]["ratios"] == {"first": 4.0}
    assert set(outcome.refused) == set(NAMES) - set(left)
    assert all("a spread of 4.00" in why for why in outcome.refused.values())


def test_peaks_are_measured_again_when_something_is_faster_than_its_limit(samples):
    slow, fast = Peaks(1.0, 100.0, 100.0), Peaks(20.0, 100.0, 100.0)
    take = samples((QUIET, QUIET, QUIET), looks=[slow, fast])
    outcome = run_until_quiet(made_up(10))
    assert take.count == 1
    assert not outcome.refused
    assert {record["fraction_of_limit"] for record in outcome.records.values()} == {0.5}
    # what stays faster is refused
    take = samples((QUIET, QUIET, QUIET), looks=[slow] * 10)
    outcome = run_until_quiet(made_up(10))
    assert (take.count, outcome.records) == (TRIES, {})
    assert "10 of the limit, expected 1 at most" in outcome.refused["ours"]


def test_other_products_have_a_limit_of_their_own(samples, monkeypatch):
    samples((QUIET, QUIET, QUIET))
    looked = {"float32": Peaks(1.0, 100.0, 100.0), "int8": Peaks(20.0, 100.0, 100.0)}
    monkeypatch.setattr(peaks, "_measure", looked.__getitem__)
    record = run_case(made_up(10, {"products": "int8"})).records["ours"]
    assert (record["dtype"], record["fraction_of_limit"]) == ("float32", 0.5)
    document = {
        "machine_info": {"facts": {}, "peaks": {name: found._asdict() for name, found in looked.items()}},
        "datetime": "now",
        "skipped": [],
        "benchmarks": [{"extra_info": record}],
    }
    assert split(document, "this test")["operators"].records[0]["fraction_of_limit"] == 0.5


def test_numbers_of_candidates_that_stayed_noisy_are_left_out_of_index_speed(monkeypatch, capsys):
    def measure(engines, context, folder):
        if len(context) == 2:
            raise NoisyMeasurementError("products: a spread of 4.00")
        return {"N": len(context), "seconds": {}, "row_bytes": 1, "token_size": 1}

    published = SimpleNamespace(encode_document=lambda texts: torch.zeros(4, 1, 2))
    written = {}
    monkeypatch.setattr(index_speed, "build_engines", lambda: SimpleNamespace(published=published))
    monkeypatch.setattr(index_speed, "texts_of", lambda *arguments, **options: [])
    monkeypatch.setattr(index_speed, "measure", measure)
    monkeypatch.setattr(index_speed, "ratios", lambda record: {})
    monkeypatch.setattr(index_speed, "middle_run", lambda found: found[0])
    monkeypatch.setattr(peaks, "_measure", lambda products: Peaks(1.0, 1.0, 1.0))
    monkeypatch.setattr(index_speed, "write_json", lambda path, document: written.update(document))
    assert index_speed.main(["--device", "here", "--counts", "1", "2", "3"]) == 1
    assert [record["N"] for record in written["records"]] == [1, 3]
    assert written["refused"] == [{"N": 2, "reason": "products: a spread of 4.00"}]
    written.clear()
    assert index_speed.main(["--device", "here", "--counts", "2"]) == 1
    assert written == {}
