"""The gate, on made-up records: a fall fails, a rise and noise pass, what was not measured is named."""

import json

import pytest
import torch

from benchmarks import compare as gate
from benchmarks.compare import ATTEMPTS, KEPT, KEPT_IN_CI, best, compare, figures, fresh_rivals, run_quick
from benchmarks.measuring.machine import kind_name, machine_facts
from benchmarks.suite import results as results_files
from benchmarks.suite.case import RECORD_KEYS, Case
from benchmarks.suite.results import GATE, GROUPS, machines
from mixkernels.roofline import Peaks

CASE = "attention N=10 float32"


def record(ratio=4.0, fraction=0.4, backend="torch", rival="sdpa", **changes):
    entry = {"group": "operators", "operator": "attention", "variant": "", "shape": {"N": 10}, "dtype": "float32"}
    entry |= {"backend": backend, "own": backend == "torch", "fraction_of_limit": fraction, "ratios": {rival: ratio}}
    return entry | changes


def judged(committed, found, *, skipped=()):
    return compare(figures(committed, fractions=True), figures(found, fractions=True), kept=KEPT, skipped=skipped)


@pytest.mark.parametrize(("ratio", "fraction"), [(4.0, 0.4), (40.0, 0.9), (2.41, 0.241)])
def test_the_same_a_rise_and_noise_pass(ratio, fraction):
    verdict = judged([record()], [record(ratio, fraction)])
    assert verdict.passed
    assert verdict.compared == 2


@pytest.mark.parametrize(
    ("ratio", "fraction", "what"),
    [(2.3, 0.4, "ratio to sdpa"), (4.0, 0.23, "fraction of the limit"), (float("nan"), 0.4, "ratio to sdpa")],
)
def test_a_fall_is_caught_and_says_what_fell(ratio, fraction, what):
    verdict = judged([record()], [record(ratio, fraction)])
    assert not verdict.passed
    (fall,) = verdict.falls
    assert (fall.case, fall.backend, fall.what) == (CASE, "torch", what)
    assert f"fell: {CASE}: torch, {what}" in "\n".join(verdict.lines())


def test_rivals_records_milliseconds_and_committed_fractions_above_one_are_not_compared():
    slower = record(0.01, 0.0001, backend="sdpa")
    assert judged([record(), record(1.0, 0.1, backend="sdpa")], [record(seconds=99.0), slower]).passed
    assert judged([record(fraction=14.7)], [record(fraction=0.4)]).passed


def test_a_rival_in_fresh_memory_may_vary_more():
    rival = record(backend="sdpa", own=False, peak_bytes=2**30, ratios={})
    fresh = fresh_rivals([record(peak_bytes=2**30), rival])
    assert fresh == {(CASE, "ratio to sdpa")}
    before = figures([record(4.0)], fractions=True)
    for ratio, passes in ((1.5, True), (1.3, False)):
        assert compare(before, figures([record(ratio)], fractions=True), kept=KEPT, fresh=fresh).passed == passes
    assert not fresh_rivals([record(backend="sdpa", own=False, peak_bytes=2**20)])


def test_what_is_missing_is_named_and_fails_unless_there_is_a_reason():
    verdict = judged([record(), record(shape={"N": 99})], [record()])
    assert not verdict.passed
    missing = [f"attention N=99 float32: torch, {what}" for what in ("ratio to sdpa", "fraction of the limit")]
    assert verdict.missing == missing
    assert "record again" in "\n".join(verdict.lines())
    skipped = [record(backend="flex") | {"reason": "needs a compiler"}]
    verdict = judged([record(ratios={"sdpa": 4.0, "flex": 2.0})], [record()], skipped=skipped)
    assert verdict.passed
    assert verdict.not_run == [f"{CASE}: torch, ratio to flex: needs a compiler"]


def test_variants_of_a_case_are_cases_of_their_own_and_one_without_a_record_is_named():
    compiled = record(2.0, variant="compiled")
    assert judged([record(), compiled], [record(), compiled]).compared == 4
    assert not judged([record(), compiled], [record(), record(1.0, variant="compiled")]).passed
    verdict = judged([record()], [record(), compiled])
    assert verdict.passed
    assert verdict.unrecorded == [f"{CASE} compiled"]


def test_the_best_attempt_counts_figure_by_figure():
    first, second = ("a", "torch", "x"), ("a", "torch", "y")
    assert best([{first: 1.0, second: 3.0}, {first: 2.0, second: 1.0}]) == {first: 2.0, second: 3.0}


def quick_case(operator="attention", **options):
    options = {"quick": ("sdpa", "flex"), **options}
    return Case("operators", operator, {"N": 10}, torch.float32, ("torch",), ("sdpa", "flex"), list, **options)


class Measured:
    """Finds ratios as it was told to, and remembers the budgets."""

    def __init__(self, *ratios):
        self.ratios, self.budgets = list(ratios), []

    def __call__(self, case, budget):
        self.budgets.append(budget)
        return [record(self.ratios.pop(0), 0.0001, operator=case.operator)]


COMMITTED = figures([record()], fractions=False)


@pytest.mark.parametrize("ratios", [(4.0 * KEPT_IN_CI,), (0.1, 1.9, 3.9)])
def test_a_case_is_measured_until_it_passes(ratios):
    measure = Measured(*ratios)
    verdict = run_quick([quick_case(), quick_case("new")], COMMITTED, measure)
    assert verdict.passed
    assert verdict.compared == 1
    assert len(measure.budgets) == len(ratios)
    assert verdict.unrecorded == ["new N=10 float32"]


def test_what_stays_down_fails_after_a_longer_last_attempt():
    measure = Measured(*[1.9] * ATTEMPTS)
    verdict = run_quick([quick_case()], COMMITTED, measure)
    assert [fall.found for fall in verdict.falls] == [1.9]
    assert len(measure.budgets) == ATTEMPTS
    assert measure.budgets[-1].seconds > measure.budgets[0].seconds


def test_a_rival_that_is_not_installed_is_named_and_passes():
    committed = figures([record(ratios={"sdpa": 4.0, "flex": 9.0})], fractions=False)
    case = quick_case(unavailable=lambda name: "not installed" if name == "flex" else None)
    verdict = run_quick([case], committed, Measured(4.0))
    assert verdict.passed
    assert verdict.not_run == [f"{CASE}: torch, ratio to flex: not installed"]
    # without a reason it is missed
    assert not run_quick([quick_case()], committed, Measured(4.0)).passed


def test_every_group_is_part_of_the_quick_run_and_no_case_that_writes_to_disk():
    cases = gate.quick_cases()
    assert {case.group for case in cases} == {"operators", "layers", "end_to_end", "index"}
    assert {(case.operator, case.variant) for case in cases if case.group == "index"} == {("rank", "prefilter=100")}
    assert all(case.rivals == case.quick for case in cases)


PEAKS = {"float32": {"flops": 1e12, "bytes": 1e11, "exps": 1e10}}


def whole(ratio):
    costs = {"facts": {}, "flops": 10**9, "bytes": 10**6, "exps": 0, "seconds": 0.002}
    return dict.fromkeys(RECORD_KEYS) | record(ratio) | costs


def written(tmp_path, ratio, facts=None):
    path = tmp_path / "found.json"
    info = {"facts": facts or machine_facts(), "peaks": PEAKS}
    benchmarks = [{"extra_info": whole(ratio)}]
    path.write_text(json.dumps({"machine_info": info, "datetime": "now", "skipped": [], "benchmarks": benchmarks}))
    return str(path)


def test_the_command_fails_when_something_fell_and_compares_machines_of_one_kind_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "machines", lambda names: {"here": machine_facts()})
    monkeypatch.setattr(gate, "committed_records", lambda device, names=GROUPS: [whole(4.0)])
    assert gate.main([written(tmp_path, 4.0)]) == 0
    assert "nearest to here" in capsys.readouterr().out
    assert gate.main([written(tmp_path, 2.3)]) == 1
    assert "4 committed, 2.3 found" in capsys.readouterr().out
    assert gate.main([written(tmp_path, 2.3), "--kept", "0.5"]) == 0
    path = written(tmp_path, 0.1, machine_facts() | {"threads": 999})
    for arguments in ([path], [path, "--device", "here"]):
        capsys.readouterr()
        assert gate.main(arguments) == 0
        out = capsys.readouterr().out
        assert "threads is 999 here" in out
        assert "nothing compared" in out
    with pytest.raises(SystemExit):
        gate.main([path, "--device", "there"])
    assert "there has no record to compare with; expected one of here" in capsys.readouterr().err


FAKES = {
    "zen4": {"vendor": "AuthenticAMD", "family": "25", "model": "17", "capability": "AVX512", "native_bfloat16": True},
    "without AVX2": {"vendor": "GenuineIntel", "family": "6", "model": "42", "capability": "DEFAULT"},
    "sapphire rapids": {"vendor": "GenuineIntel", "family": "6", "model": "143", "capability": "AVX512", "tiles": True},
    "hidden": {"vendor": "AuthenticAMD", "family": "25", "model": "1", "capability": "DEFAULT"},
}


@pytest.mark.parametrize("fake", FAKES)
def test_the_committed_gate_never_fails_another_kind_of_machine(fake, monkeypatch, capsys):
    facts = {**machine_facts(), "native_bfloat16": False, "threads": 1, **FAKES[fake]}
    monkeypatch.setattr(gate, "machine_facts", lambda: facts)
    monkeypatch.setattr(gate, "quick_cases", lambda: pytest.fail("nothing may be measured"))
    for arguments in (["--quick"], ["--quick", "--device", "cpu-zen3-2-threads"]):
        assert gate.main(arguments) == 0
        out = capsys.readouterr().out
        assert "no machine of this kind has a committed record (" in out
        assert "cpu-zen3-2-threads: " in out
        assert "nothing compared" in out


KINDS = {
    "cpu-zen3-2-threads": {"vendor": "AuthenticAMD", "model": "1", "capability": "AVX2", "native_bfloat16": False},
    "cpu-emerald-rapids-2-threads": {"vendor": "GenuineIntel", "model": "207", "capability": "AVX512"},
}


@pytest.mark.parametrize("device", KINDS)
def test_the_committed_gate_is_used_on_its_own_kind(device, monkeypatch, capsys):
    (kind,) = (machine for name, machine in machines((GATE,)).items() if name == device)
    facts = {**kind, "name": "the same processor, as another host calls it"}
    assert facts.items() >= KINDS[device].items()
    monkeypatch.setattr(gate, "machine_facts", lambda: facts)
    monkeypatch.setattr(gate, "quick_cases", list)
    assert gate.main(["--quick"]) == 0
    assert f"nearest to {device}" in capsys.readouterr().out


def test_the_quick_cases_are_recorded_on_one_thread_and_a_quick_run_is_judged_by_them(monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()

    class Found:
        records = {"torch": whole(4.0)}  # noqa: RUF012
        refused = {"sdpa": "a spread of 4"}  # noqa: RUF012

    monkeypatch.setattr(gate, "quick_cases", lambda: [quick_case()])
    monkeypatch.setattr(gate, "run_case", lambda case, budget: Found)
    monkeypatch.setattr(gate, "run_until_quiet", lambda case, budget: Found)
    monkeypatch.setattr(gate, "best_peaks", lambda products: Peaks(**PEAKS[products]))
    monkeypatch.setattr(results_files, "RESULTS", tmp_path)
    # what stayed noisy is told, and what did not is kept
    assert gate.main(["--quick", "--record", "here"]) == 1
    assert f"{CASE}: sdpa: a spread of 4" in capsys.readouterr().out
    Found.refused = {}
    assert gate.main(["--quick", "--record", "here"]) == 0
    written = results_files.read_results(tmp_path / "here" / "gate.json")
    assert (written.machine["threads"], len(written.records)) == (1, 1)
    assert torch.get_num_threads() == threads
    for ratio, status in ((2.1, 0), (1.0, 1)):
        Found.records = {"torch": whole(ratio)}
        assert gate.main(["--quick"]) == status
    # another kind of machine writes nothing there, and has a folder of its own
    other = machine_facts() | {"model": "another"}
    monkeypatch.setattr(gate, "machine_facts", lambda: other)
    with pytest.raises(SystemExit):
        gate.main(["--quick", "--record", "here"])
    assert "model is 'another' here" in capsys.readouterr().err
    assert gate.main(["--quick", "--record"]) == 0
    assert (tmp_path / kind_name(other) / "gate.json").is_file()
