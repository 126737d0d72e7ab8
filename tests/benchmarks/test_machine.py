"""Which machines are of one kind, so that their figures compare, and what a kind's folder of results is called."""

import pytest

from benchmarks.measuring.machine import kind_name, machine_facts, nearest
from benchmarks.suite.results import GATE, GROUPS, kind_mismatch, machines


def test_ratios_are_compared_with_a_machine_of_the_same_kind():
    here = machine_facts()
    assert nearest(here, {}) == (None, "no machine has a committed record")
    sibling = here | {"name": "the same, as another host calls it"}
    assert nearest(here, {"sibling": sibling, "same": here})[0] == "same"
    name, why = nearest(here, {"sibling": sibling})
    assert name == "sibling"
    assert "name is" in why
    # a record that lacks a later fact is matched by its processor, one that says nothing is not
    before = {fact: value for fact, value in here.items() if fact not in ("native_int8", "tiles")}
    assert nearest(here, {"before": before})[0] == "before"
    assert nearest(here, {"empty": {}})[0] is None


@pytest.mark.parametrize(
    "fact", ["vendor", "family", "model", "capability", "native_bfloat16", "native_int8", "tiles", "threads"]
)
def test_a_machine_of_another_kind_is_no_match_and_the_reason_names_the_difference(fact):
    name, why = nearest(machine_facts(), {"other": machine_facts() | {fact: "something else"}})
    assert name is None
    assert f"{fact} is" in why


def test_a_folder_is_named_after_the_kind_of_its_machine():
    (zen3,) = (facts for name, facts in machines().items() if name == "cpu-zen3-2-threads")
    assert kind_name(zen3) == "cpu-zen3-2-threads"
    unnamed = zen3 | {"vendor": "GenuineIntel", "family": "6", "model": "999", "threads": 8}
    assert kind_name(unnamed) == "cpu-intel-6-999-8-threads"
    assert kind_name(unnamed | {"vendor": "0x41", "family": "8", "model": "0xd0c"}) == "cpu-0x41-8-0xd0c-8-threads"


def test_a_folder_takes_no_records_of_another_kind():
    there, gate = machines()["cpu-zen3-2-threads"], machines((GATE,))["cpu-zen3-2-threads"]
    assert kind_mismatch("cpu-zen3-2-threads", there) is None
    # the gate's are of one thread
    assert kind_mismatch("cpu-zen3-2-threads", gate, (GATE,)) is None
    reason = kind_mismatch("cpu-zen3-2-threads", there | {"capability": "AVX512"}, GROUPS)
    assert "another kind of machine: capability is 'AVX512' here, 'AVX2' there" in reason
    assert kind_mismatch("new", there) is None
