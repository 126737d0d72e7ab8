"""`python -m mixkernels.profile`: what it counts, what it prints, and what it refuses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import mixkernels
from mixkernels import profile
from mixkernels.devices import Peaks
from mixkernels.roofline import Cost

SMALL = ["--n", "20", "--m", "8", "--heads", "2", "--head-dim", "16", "--device", "cpu", "--repeats", "2"]


@pytest.mark.parametrize("operator", profile.OPERATORS)
def test_every_operator_is_profiled_on_a_cpu(operator, capsys):
    assert profile.main([operator, *SMALL, "--backend", "torch"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{operator}, B=1 N=20 k=1")
    assert "backend torch" in out
    assert "aten::" in out
    assert "of the limit" in out
    assert "ncu --set full" in out


def test_the_backward_pass_has_operators_of_its_own(capsys):
    options = ["candidate_attention", *SMALL, "--backend", "torch", "--k", "2"]
    profile.main([*options, "--backward"])
    backward = capsys.readouterr().out
    profile.main(options)
    assert "forward and backward" in backward
    assert "candidate_attention_backward" in backward
    assert "candidate_attention_backward" not in capsys.readouterr().out


def test_the_trace_is_whole_and_says_where_it_opens(tmp_path, capsys):
    path = tmp_path / "trace.json"
    profile.main(["candidate_attention", *SMALL, "--backend", "torch", "--trace", str(path)])
    assert any(event.get("name", "").startswith("aten::") for event in json.loads(path.read_text())["traceEvents"])
    assert "https://ui.perfetto.dev" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("old")

    def fail(name):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        profile.write_trace(SimpleNamespace(export_chrome_trace=fail), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["candidate_attention", "--n", "0"], "0 is not positive"),
        (["candidate_attention", "--m", "many"], "invalid positive_integer value: 'many'"),
        (["convolution"], "invalid choice: 'convolution'"),
        (["candidate_attention", "--device", "tpu"], "--device tpu is not auto, cpu, cuda"),
        (["candidate_attention", "--device", "cuda:99"], "GPU(s) that PyTorch sees"),
        (["candidate_attention", "--trace", "no/such/folder/trace.json"], "there is no folder no/such/folder"),
        (["residual_layer_norm", "--backward"], "--backward is for candidate_attention"),
        (["candidate_attention", "--top-k", "3"], "--top-k is for score_candidates"),
        (["candidate_attention", "--device", "cpu", "--n", "9", "--head-dim", "48", "--backend", "triton"], "48"),
    ],
)
def test_a_call_that_cannot_be_made_ends_with_2_and_the_reason(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        profile.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_work_is_counted_by_hand():
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    row = torch.randn(16).expand(4, 16)
    with profile.WorkCounter() as counter:
        product = a @ b
        product.add_(row)
        product.view(2, 32)
        torch.empty_like(product)
    assert counter.work["aten::mm"] == profile.Work(4 * (32 + 128 + 64), 2 * 4 * 8 * 16)
    # 64 read and written, and the row that was expanded read once
    assert counter.work["aten::add_"].bytes == 4 * (64 + 64 + 16)
    assert counter.work["aten::view"].bytes == 0
    assert counter.work["aten::empty_like"].bytes == 0


def test_work_inside_the_library_operator_is_seen():
    context, tokens = torch.randn(20, 2, 2, 16), torch.randn(1, 8, 2, 16)
    with profile.WorkCounter() as counter, torch.inference_mode():
        mixkernels.candidate_attention(context, context, context, context[:, 0], tokens, tokens, backend="torch")
    flash = counter.work["aten::_scaled_dot_product_flash_attention_for_cpu"]
    # shared keys meet 40 context and 20 state rows: 4 D a logit, and something for own keys
    assert flash.flops >= 4 * 16 * 2 * 60 * 8


def event(name, total, children=()):
    own = total - sum(child.cpu_time_total for child in children)
    return SimpleNamespace(name=name, cpu_time_total=total, self_cpu_time_total=own, cpu_children=list(children))


def test_rows_of_a_cpu_profile_add_up_to_the_call():
    # (total microseconds): 100 in the call, of which 20 Python, 30 in a wrapper's own code, 50 in a known operator
    known = event("aten::mm", 50, [event("aten::resolve_conj", 5)])
    call = event(profile._MARK, 100, [event("mixkernels::op", 80, [known])])
    rows = profile.operator_rows([call, known], {"aten::mm": profile.Work(10, 20)})
    assert [(row.name, round(row.seconds * 1e6), row.bytes) for row in rows] == [
        ("aten::mm", 50, 10),
        ("mixkernels::op", 30, 0),
        ("(Python)", 20, 0),
    ]


def test_an_operator_that_runs_twice_in_a_call_is_one_row_and_calls_give_a_median():
    calls = [event(profile._MARK, 2 * t, [event("aten::mm", t), event("aten::mm", t)]) for t in (10, 20, 60)]
    (row, _) = profile.operator_rows(calls, {"aten::mm": profile.Work(10, 20)})
    assert row.calls == 2
    assert row.seconds == pytest.approx(40e-6)


def test_kernels_are_summed_a_call_and_have_the_cost_of_their_operator():
    cost = Cost(flops=7, bytes=100, exps=1)
    kernels = [("candidate_attention_fwd_kernel", t) for t in (1.0, 3.0, 2.0)] + [("Memset (Device)", 0.5)]
    rows = profile.kernel_rows(kernels, 3, {"candidate_attention_fwd": cost})
    assert rows[0] == profile.Row("candidate_attention_fwd_kernel", 1.0, 2.0, 100, 7)
    assert rows[0].fraction_of_limit(Peaks(flops=7.0, bytes=50.0, exps=1.0)) == 1.0
    # what does not run in every call is spread over all
    assert rows[1].seconds == pytest.approx(0.5 / 3)
    assert rows[1].fraction_of_limit(Peaks(1.0, 1.0, 1.0)) is None


def test_only_kernels_of_the_calls_count_in_the_order_of_their_starts():
    def at(name, start, kind):
        span = SimpleNamespace(start=start, elapsed_us=lambda: 2.0)
        return SimpleNamespace(name=name, device_type=kind, time_range=span)

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [at("b", 2, gpu), at("aten::mm", 0, cpu), at("a", 1, gpu), at(profile._MARK, 0, gpu)]
    assert profile._kernels(SimpleNamespace(events=lambda: events)) == [("a", 2e-6), ("b", 2e-6)]


@pytest.mark.parametrize(("size", "sets"), [(200, 1), (100, 3), (60, 5), (1, 64)])
def test_inputs_rotate_until_a_cache_of_100_holds_none(size, sets):
    assert profile.input_sets(size, 100) == sets
    assert size * (sets - 1) >= 200 or sets in (1, 64)


def test_the_table_sums_what_it_does_not_show():
    rows = [profile.Row(f"aten::op{i}", 1, 1e-3, None, None) for i in range(20)]
    lines = profile.table(rows, Peaks(1.0, 1.0, 1.0))
    assert lines[-1].startswith("(8 more)")
    assert "8.000 ms" in lines[-1]


def test_the_commands_for_other_profilers_make_the_same_call(capsys):
    parser = profile._parser()
    given = ["candidate_attention", "--n", "20", "--k", "3", "--backward", "--dtype", "float16"]
    nsight, proton, _viewer = profile.foreign_commands(parser.parse_args(given))
    for command in (nsight, proton):
        words = command.split()
        again = parser.parse_args(words[len(words) - words[::-1].index("candidate_attention") - 1 :])
        assert (again.n, again.k, again.dtype, again.backward) == (20, 3, "float16", True)
        assert again.bare
        assert again.device == "cuda"
    assert "regex:candidate_attention" in nsight


def test_the_file_runs_by_its_path_and_bare_calls_print_nothing():
    # as Triton's profiler starts it
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, profile.__file__, "candidate_attention", *SMALL, "--backend", "torch", "--bare"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("operator", profile.OPERATORS)
def test_every_operator_is_profiled_on_a_gpu(operator, capsys):
    assert profile.main([operator, "--n", "5000", "--device", "cuda", "--backend", "triton", "--repeats", "5"]) == 0
    out = capsys.readouterr().out
    assert f"{operator}_fwd_kernel" in out
    assert "backend triton" in out
