"""The monitor: its numbers, its screen, logs that grow, break or are none, and the GPU's meter."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.cells import cell_len
from support.hand_made_log import BYTES, hand_made

from paged_ref.cli import main
from paged_ref.extras.plain_text import plain
from paged_ref.timeline.events import (
    Event,
    PoolCleared,
    SequenceAdmitted,
    SequenceFreed,
    StepPlanned,
    StepTimed,
    TokenNamed,
    to_json,
    write_events,
)
from paged_ref.timeline.following import Follower
from paged_ref.timeline.history import histories
from paged_ref.views.monitor.gpu_meter import EVERY, GPUMeter, GPUReading
from paged_ref.views.monitor.monitor import Command, Live
from paged_ref.views.monitor.report import as_json, as_prometheus
from paged_ref.views.monitor.screen import screen
from paged_ref.views.monitor.state import KEPT, Monitor

GOLDEN = Path(__file__).parent / "golden"
SIZES = ((80, 24), (60, 16), (120, 40))
MANAGERS = ("paged", "standard", "swapping")
H100 = GPUReading("NVIDIA H100 80GB HBM3", 87, 45, 44 * 2**30, 80 * 2**30, 1_200_000_000, 0)


def monitored(events: list[Event]) -> Monitor:
    monitor = Monitor()
    for event in events:
        monitor.take(event)
    return monitor


def written(path: Path, events: list[Event]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        write_events(events, file)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return written(tmp_path / "run.jsonl", hand_made())


# --- numbers -----------------------------------------------------------------------------------------------


def test_the_numbers_by_hand() -> None:
    found = as_json(monitored(hand_made()), None)
    assert (found["manager"], found["model"], found["run"], found["steps"]) == ("paged", "model-1", 1, 14)
    # 1 has 22 tokens in 6 blocks, 2 has 16 in 4; of 0, which has ended, the prefix cache keeps 4 full blocks.
    assert found["slots"] == {"total": 96, "block_size": 4, "tokens": 38, "empty": 2, "cached": 16, "free": 40}
    assert found["sequences"] == {"running": 2, "waiting": 0, "swapped": 0, "finished": 1}
    # A prompt of 10, two of which the first 8 are known, and one more token in each of 12, 12 and 6 later steps.
    assert found["tokens"] == {"computed": 10 + 2 + 2 + 12 + 12 + 6, "sampled": 13 + 13 + 7}
    times = [1 + i % 3 for i in range(14)]  # ms
    assert found["step_seconds"] == {
        "last": 0.002, "mean": pytest.approx(sum(times) / 14e3), "max": 0.003, "total": sum(times) / 1e3,
    }  # fmt: skip
    assert found["tokens_per_second"] == pytest.approx(1e3 * found["tokens"]["sampled"] / sum(times))
    slots = 4 * 4  # 2 held 15 tokens, in 4 blocks, when it was swapped out
    assert found["swap"] == {
        "slots_out": slots,
        "slots_in": slots,
        "bytes_out": slots * BYTES,
        "bytes_in": slots * BYTES,
    }
    assert found["preemptions"] == 1
    assert found["prefix_cache"] == {"hit_tokens": 16, "asked_tokens": 30, "hit_rate": 16 / 30, "evicted_blocks": 0}


@pytest.mark.parametrize("manager", MANAGERS)
def test_the_parts_are_those_of_the_snapshot(manager: str) -> None:
    monitor = Monitor()
    for event in hand_made(manager):
        monitor.take(event)
        assert sum(monitor.slots.values()) == monitor.num_slots
        assert sum(monitor.sequences.values()) <= 3
    assert monitor.hit_rate is None or manager == "paged"


def test_each_step_of_an_engine_is_timed() -> None:
    from paged_ref import LLM, SamplingParams

    events: list[Event] = []
    llm = LLM("tiny", block_size=4, kv_cache_tokens=64, log=events.append)
    llm.generate(["Once upon a time", "The cat"], SamplingParams(max_tokens=5))
    steps = [(type(event), event.step) for event in events if isinstance(event, (StepPlanned, StepTimed))]
    assert steps == [(kind, step) for step in range(5) for kind in (StepPlanned, StepTimed)]
    assert all(event.microseconds > 0 for event in events if isinstance(event, StepTimed))
    monitor = monitored(events)
    assert (monitor.sampled, monitor.finished) == (10, 2)
    assert sum(sample.sampled for sample in monitor.timed()) == 10


def test_it_knows_what_the_timeline_knows(logs: dict[str, list[Event]]) -> None:
    """Forks, swaps, prefix hits, beams and preemption by recompute, of real runs: the same memory and totals."""
    from paged_ref import LLM, SamplingParams

    searched: list[Event] = []
    llm = LLM("tiny", block_size=4, kv_cache_tokens=48, log=searched.append)
    beams, samples = SamplingParams(max_tokens=8, beam_width=3), SamplingParams(max_tokens=24, ignore_eos=True)
    llm.generate(["Once upon a time", "The cat", "One day", "Tom"], [beams, samples, samples, samples])
    for events in (*logs.values(), searched):
        monitor = monitored(events)
        (run,) = histories(events)
        end = run.moment(len(run)).state
        assert monitor.state.memory == end.memory
        assert monitor.state.totals == end.totals
        assert monitor.finished == sum(view.status == "finished" for view in end.sequences.values())
        assert monitor.num_steps == len(run.steps)
        assert not monitor.history.names  # all have finished
    assert monitor.state.totals.preemptions > 0
    assert monitor.state.totals.forks > 0


def test_a_finished_run_has_one_state(logs: dict[str, list[Event]]) -> None:
    """JSON, Prometheus text and screen say the same: nothing runs, and no slot holds a token of a sequence."""
    for events in logs.values():
        monitor = monitored(events)
        found = as_json(monitor, None)
        assert found["sequences"] == {"running": 0, "waiting": 0, "swapped": 0, "finished": 6}
        assert (found["slots"]["tokens"], found["slots"]["empty"]) == (0, 0)
        assert found["slots"]["free"] + found["slots"]["cached"] == 48
        assert 'state="running"} 0.0' in as_prometheus(monitor, None).replace(f'{found["model"]}",', "")
        shown = screen(monitor, 100, 30).plain
        assert "0 running, 0 waiting, 0 swapped, 6 finished  " in shown
        assert "█ 0 % tokens" in shown
        assert not monitor.state.memory.paged or " 0 used, " in shown


def test_every_number_is_of_the_moment() -> None:
    """A sequence that is admitted after the last step is counted immediately."""
    monitor = monitored(hand_made())
    before = monitor.sequences, monitor.slots
    monitor.take(SequenceFreed(1))
    assert monitor.sequences == before[0] | {"running": 1, "waiting": 1}
    assert monitor.slots["tokens"] < before[1]["tokens"]


def test_a_second_run_begins_anew() -> None:
    monitor = monitored([*hand_made(), *hand_made("standard")])
    assert (monitor.num_runs, monitor.state.memory.manager, monitor.state.totals.rows_out) == (2, "standard", 0)
    alone = as_json(monitored(hand_made("standard")), None)
    assert as_json(monitor, None) == alone | {"run": 2, "events": monitor.num_events}


def test_an_old_log_has_no_times() -> None:
    events = [event for event in hand_made() if not isinstance(event, StepTimed)]
    found = as_json(monitored(events), None)
    assert found["tokens_per_second"] is None
    assert set(found["step_seconds"].values()) == {None}
    assert "this log has no times" in screen(monitored(events), 80, 24).plain
    assert "step_seconds_total" not in as_prometheus(monitored(events), None)


def test_memory_stays_bounded_in_a_long_run() -> None:
    """Only the last samples are kept, and nothing of sequences that have finished."""
    events = hand_made()
    monitor = monitored(events)
    last = next(event for event in reversed(events) if isinstance(event, StepPlanned))
    for _ in range(2 * KEPT):
        monitor.take(last)
    assert len(monitor.samples) == KEPT
    assert set(monitor.state.sequences) == set(monitor.history.names) == {1, 2}


def test_a_log_that_contradicts_itself_is_refused() -> None:
    events = hand_made()
    first = next(i for i, event in enumerate(events) if isinstance(event, SequenceAdmitted))
    with pytest.raises(
        ValueError, match=r"event 6, TokensAppended, does not fit what came before: sequence 0 is not there"
    ):
        monitored(events[:first] + events[first + 1 :])


# --- Prometheus --------------------------------------------------------------------------------------------


def test_prometheus_text_is_what_its_own_parser_reads() -> None:
    monitor = monitored(hand_made())
    monitor.history.model = 'quoted "model" \\ of\ntwo lines'
    families = {family.name: family for family in text_string_to_metric_families(as_prometheus(monitor, H100))}
    found = as_json(monitor, H100)

    def value(name: str, **labels: str) -> float:
        for family in families.values():
            for sample in family.samples:
                if sample.name == f"paged_ref_{name}" and labels.items() <= sample.labels.items():
                    assert sample.labels["model"] == plain(monitor.history.model)
                    return float(sample.value)
        raise AssertionError(name)

    for part in monitor.slots:
        assert value("slots", part=part) == found["slots"][part]
    assert value("sequences", state="running") == 2
    assert value("tokens_sampled_total") == found["tokens"]["sampled"]
    assert value("step_seconds_total") == found["step_seconds"]["total"]
    assert value("swap_bytes_total", direction="in") == found["swap"]["bytes_in"]
    assert value("gpu_busy_ratio") == 0.87
    assert value("gpu_link_bytes_per_second", direction="in") == 1.2e9
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families.values())
    assert {f.type for f in families.values() if any(s.name.endswith("_total") for s in f.samples)} == {"counter"}


# --- the screen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("manager", MANAGERS)
def test_golden(manager: str, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    picture = screen(monitored(hand_made(manager)), *size, gpu=H100, status="following run.jsonl", keys="q quit")
    lines = picture.plain.split("\n")
    assert (len(lines), {cell_len(line) for line in lines}) == (size[1], {size[0]})
    text = "".join(line.rstrip() + "\n" for line in lines)
    file = GOLDEN / f"monitor_{manager}_{size[0]}x{size[1]}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "pytest --update-golden writes it anew; then look at the diff"


@pytest.mark.parametrize("manager", MANAGERS)
def test_every_screen_fills_its_window(manager: str) -> None:
    monitor = Monitor()
    for i, event in enumerate(hand_made(manager)):
        monitor.take(event)
        size = (*SIZES, (97, 33), (60, 17))[i % 5]
        lines = screen(monitor, *size, gpu="none").plain.split("\n")
        assert (len(lines), {cell_len(line) for line in lines}) == (size[1], {size[0]})


def test_before_the_first_event_and_in_a_small_window() -> None:
    assert "waiting for run.jsonl" in screen(Monitor(), 80, 24, status="waiting for run.jsonl").plain
    assert "at least 60x16 is needed" in " ".join(screen(Monitor(), 70, 5).plain.split())


# --- logs that grow ----------------------------------------------------------------------------------------


def test_a_log_is_read_as_it_grows_at_any_cut(tmp_path: Path) -> None:
    """However the bytes come, and in the middle of a character, too: the same events."""
    events: list[Event] = [*hand_made()[:40], TokenNamed(7, "·日本語")]
    data = "".join(to_json(event) + "\n" for event in events).encode()
    data = data.replace(b"\\u00b7\\u65e5\\u672c\\u8a9e", "·日本語".encode())
    for step in (1, 7, 64, len(data)):
        path = tmp_path / f"{step}.jsonl"
        follower = Follower(path)
        assert follower.poll() == []
        assert not follower.exists
        found = []
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), step):
                file.write(data[start : start + step])
                found += follower.poll(16)
        found += follower.poll(100)
        while follower.num_bytes:
            found += follower.poll(100)
        assert found == events
        assert not follower.in_partial_line
        follower.close()


def test_a_log_that_begins_anew_is_read_anew(log: Path) -> None:
    follower = Follower(log)
    first = follower.poll()
    written(log, hand_made()[:9])
    again = follower.poll()
    assert follower.restarted
    assert again == first[:9]
    assert follower.poll() == []
    assert not follower.restarted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a log of events as JSON lines is needed"),
        (b'{"event":"Pool', "has no whole line; a log of events"),
        (b"hello\n", "line 1: not JSON: Expecting value at column 1"),
        (b'{"a": 1}\n', "line 1: event is None; known are PoolOpened"),
        (b"\xff\xfe\x00\n", "is not a log: line 1 is no text"),
        (
            b'{"event":"TokenSampled","seq_id":0,"token_id":1}\n',
            "line 1: a run begins with PoolOpened; this is TokenSampled",
        ),
    ],
    ids=["empty", "half a line", "text", "other JSON", "bytes", "middle"],
)
@pytest.mark.parametrize("form", ["--once", "--prometheus", "--print"])
def test_what_is_no_log_is_one_sentence(
    content: bytes, message: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    assert main(["monitor", str(path), form]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert (printed.count("\n"), printed.count(str(path))) == (1, 1)


def test_a_log_that_breaks_in_the_middle_names_the_line(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:20], lines[20][:9] + "\n", *lines[21:]]))
    assert main(["monitor", str(log), "--once"]) == 2
    assert f"{log}, line 21: not JSON" in capsys.readouterr().err
    del lines[5]  # the admission of the first sequence
    log.write_text("".join(lines))
    assert main(["monitor", str(log), "--once"]) == 2
    assert f"{log}, event 6, TokensAppended, does not fit what came before" in capsys.readouterr().err


def test_a_log_cut_off_in_partial_line_is_read_up_to_there(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    assert main(["monitor", str(log), "--once"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False
    assert found["events"] == whole[: len(whole) // 2].count(b"\n")
    assert main(["monitor", str(log)]) == 0  # no terminal: the screen, once
    assert "log cut off" in capsys.readouterr().out


# --- the command -------------------------------------------------------------------------------------------


def test_without_a_terminal_it_prints_once(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(log), "--size", "80x24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), max(map(len, lines))) == (24, 80)
    assert main(["monitor", str(log), "--prometheus"]) == 0
    assert "\npaged_ref_steps_total{" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of FILE and --run COMMAND is needed"),
        (["FILE", "--run", "demo"], "one of FILE and --run COMMAND is needed"),
        (["nowhere/run.jsonl", "--once"], "nowhere/run.jsonl cannot be read: No such file"),
        ([".", "--once"], ". cannot be read: Is a directory"),
        (["/dev/zero", "--once"], "/dev/zero cannot be read: it is a pipe or a device; a regular file is needed"),
        (["--run"], "--run is ''; it begins with one of"),
        (["--run", "viz"], "--run is 'viz'; it begins with one of demo"),
        (["--run", "demo", "--record=x"], "--run has --record of its own"),
        (["FILE", "--size", "10x10"], "--size is 10x10; at least 60x16"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", *argv]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_compare_records_only_what_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--record", "x.jsonl"]) == 2
    assert "--record x.jsonl writes runs of the embedded model; --run makes them" in capsys.readouterr().err


def test_a_command_is_run_and_watched(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--prompt", "Four score and seven years ago our", "--max-tokens", "3", "--block-size", "4"]
    assert main(["monitor", "--once", "--run", *argv]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["tokens"]["sampled"] == 3
    assert found["sequences"]["finished"] == 1
    assert found["step_seconds"]["total"] > 0


def test_a_command_that_fails_says_so_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--once", "--run", "generate", "--prompt", ""]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "the prompt is empty" in printed.err


def test_a_reader_that_leaves_is_no_error(log: Path) -> None:
    command = f"{sys.executable} -m paged_ref monitor {log} --prometheus | head -c 6"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("# HELP", "")


# --- live, without a terminal ------------------------------------------------------------------------------


def test_live_follows_pauses_and_quits(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    live = Live(path)
    assert f"waiting for {path}" in live.draw(200, 24).plain
    events = hand_made()
    written(path, events[:20])
    live.tick()
    assert "20 events" in live.draw(80, 24).plain
    assert live.press(" ")
    assert "paused" in live.draw(80, 24).plain
    assert not live.playing
    live.press(" ")
    assert "following run.jsonl" in live.draw(200, 24).plain
    written(path, events)
    live.tick()
    assert f"{len(events)} events" in live.draw(80, 24).plain
    speed = live.speed
    live.press("+")
    live.press("-")
    live.press("x")
    assert live.speed == speed
    assert not live.press("q")
    written(path, events[:9])
    live.tick()
    assert "9 events" in live.draw(80, 24).plain  # begun anew


def test_live_says_when_all_have_finished(logs: dict[str, list[Event]], tmp_path: Path) -> None:
    live = Live(written(tmp_path / "run.jsonl", logs["paged"]))
    assert "all 6 sequences of run.jsonl finished" in live.draw(200, 24).plain


def test_live_says_why_its_command_failed(tmp_path: Path) -> None:
    """Before the first event in place of the screen, later in its last line."""
    script = "import sys; print('working'); print('paged-ref: error: it broke'); print(); sys.exit(2)"
    with (tmp_path / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=output, text=True)
        live = Live(tmp_path / "run.jsonl", Command(process, tmp_path / "run.jsonl", output))
        process.wait()
        assert "ended with status 2: paged-ref: error: it broke" in live.draw(80, 24).plain
        written(tmp_path / "run.jsonl", hand_made())
        live.tick()
        shown = live.draw(80, 24).plain.split("\n")
        assert "ended with status 2" in shown[0]
        assert shown[-1].strip() == "paged-ref: error: it broke"


def test_the_help_shows_how_prometheus_gets_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["monitor", "--help"])
    assert "paged-ref monitor run.jsonl --prometheus > DIR/run.tmp && mv DIR/run.tmp DIR/run.prom" in " ".join(
        capsys.readouterr().out.split()
    )


# --- the GPU's meter ---------------------------------------------------------------------------------------


class NVMLError(Exception):
    """As pynvml.NVMLError."""


def fake_nvml(**answers: Any) -> ModuleType:
    def answer(name: str) -> Any:
        def ask(*_: object) -> Any:
            if isinstance(answers.get(name), Exception):
                raise answers[name]
            return answers.get(name)

        return ask

    nvml = ModuleType("pynvml")
    nvml.NVMLError = NVMLError  # type: ignore[attr-defined]
    nvml.NVML_PCIE_UTIL_TX_BYTES, nvml.NVML_PCIE_UTIL_RX_BYTES = 0, 1  # type: ignore[attr-defined]
    for name in ("Init", "DeviceGetHandleByIndex", "DeviceGetName", "DeviceGetUtilizationRates", "DeviceGetMemoryInfo",
                 "DeviceGetPcieThroughput"):  # fmt: skip
        setattr(nvml, f"nvml{name}", answer(name))
    return nvml


def test_the_meter_reads_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    nvml = fake_nvml(
        DeviceGetName="NVIDIA L4",
        DeviceGetUtilizationRates=SimpleNamespace(gpu=50, memory=20),
        DeviceGetMemoryInfo=SimpleNamespace(used=3, total=9),
        DeviceGetPcieThroughput=2000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = GPUMeter(clock=lambda: now[0])
    first = meter.read()
    assert first == GPUReading("NVIDIA L4", 50, 20, 3, 9, 2000 * 1024, 2000 * 1024)
    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu=99, memory=20))
    assert meter.read() is first  # no more often than the driver samples
    now[0] += EVERY
    assert meter.read().busy == 99  # type: ignore[union-attr]


def test_what_a_gpu_does_not_say_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = dict.fromkeys(
        ("DeviceGetUtilizationRates", "DeviceGetMemoryInfo", "DeviceGetPcieThroughput"), NVMLError("no")
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(DeviceGetName=b"Old GPU", **refused))
    reading = GPUMeter().read()
    assert reading == GPUReading("Old GPU", None, None, None, None, None, None)
    assert " GPU       Old GPU " in screen(monitored(hand_made()), 80, 24, gpu=reading).plain
    assert "paged_ref_gpu" not in as_prometheus(monitored(hand_made()), reading)


def test_without_a_gpu_or_the_package_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(Init=NVMLError("no driver")))
    meter = GPUMeter()
    assert (meter.read(), meter.why_not) == (None, "none to read (no driver)")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = GPUMeter()
    assert meter.read() is None
    assert "nvidia-ml-py" in meter.why_not


@pytest.mark.gpu
def test_the_meter_reads_this_gpu() -> None:
    pytest.importorskip("pynvml")
    reading = GPUMeter().read()
    assert reading is not None
    assert reading.memory_used is None or 0 < reading.memory_used <= (reading.memory_total or 0)


def test_a_step_that_is_undone_counts_for_nothing() -> None:
    """Steps, new tokens and ends are those of the run without the exception."""
    from paged_ref import LLM, SamplingParams

    def run(fail_at: tuple[int, ...]) -> tuple[Monitor, list[Event]]:
        events: list[Event] = []
        steps = [0]

        def on_step(record: object) -> None:
            steps[0] += 1
            if steps[0] in fail_at:
                raise OSError("the disk is full")

        llm = LLM("tiny", block_size=4, kv_cache_tokens=200, log=events.append, on_step=on_step)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        for prompt in ("Once upon a time", "Lily"):
            llm.add_request(prompt, params)
        llm.add_request("Tom", SamplingParams(max_tokens=9))
        while llm.has_unfinished:
            if llm.engine.num_steps == 6:
                llm.abort(2)
                continue
            with suppress(OSError):
                llm.step()
        return monitored(events), events

    quiet, _ = run(())
    undone, events = run((2, 4, 5))  # at the fourth call, two sequences have just ended
    assert sum(isinstance(event, PoolCleared) for event in events) == 3
    assert (undone.num_steps, undone.sampled, undone.finished) == (quiet.num_steps, quiet.sampled, quiet.finished)
    assert (quiet.sampled, quiet.finished) == (4 + 4 + 6, 3)
    assert undone.all_finished
    assert sum(sample.sampled for sample in undone.samples) == undone.sampled
    assert len(undone.samples) == undone.num_steps
    undone.take(PoolCleared(tuple(range(50))))  # outside of a step: what was aborted before does not come back
    assert undone.sequences == quiet.sequences
    assert undone.all_finished
