"""Traces: every form that is read, every way in which a file can be wrong, and what is done to them."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from statistics import mean, pstdev

import pytest
from conftest import SHARED

from paged_ref.planner.trace_files import read_trace
from paged_ref.planner.traces import (
    MEANS,
    RequestTrace,
    TraceRequest,
    at_rate,
    clipped,
    drawn,
    first,
    generated,
    scaled,
    spread,
    with_prefix,
)

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 1500, "input_length": 512, "output_length": 7, "hash_ids": [0]}\n'
)
SHAREGPT = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def lengths(trace: RequestTrace) -> list[tuple[int, int]]:
    return [(each.prompt_len, each.output_len) for each in trace.requests]


def test_azure_columns(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "azure.csv", AZURE))
    assert (trace.name, trace.timed, lengths(trace)) == ("azure.csv", True, [(374, 44), (396, 109)])
    assert [each.arrival for each in trace.requests] == [0.0, pytest.approx(4.314579, abs=1e-6)]


def test_mooncake_lines(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "m.jsonl", MOONCAKE))
    assert trace.requests == (TraceRequest(0.0, 600, 5, (0, 1)), TraceRequest(1.5, 512, 7, (0,)))
    assert trace.hash_block == 512


def test_sharegpt_columns(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "s.csv", SHAREGPT))
    assert (trace.timed, lengths(trace)) == (False, [(74, 918)])


@pytest.mark.parametrize("text", ["3,4\n5,6\n", "in,out\n3,4\n5,6", "3 4\n\n5\t6\n", "\ufeff3,4\r\n5,6\r\n"])
def test_two_columns_with_or_without_a_header(tmp_path: Path, text: str) -> None:
    trace = read_trace(write(tmp_path / "plain.txt", text))
    assert (trace.timed, lengths(trace)) == (False, [(3, 4), (5, 6)])


def test_gzip_is_seen_by_its_content(tmp_path: Path) -> None:
    for name in ("azure.csv.gz", "azure.csv"):
        (tmp_path / name).write_bytes(gzip.compress(AZURE.encode()))
        assert read_trace(tmp_path / name).name == "azure.csv"
        assert lengths(read_trace(tmp_path / name)) == [(374, 44), (396, 109)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("\n \n", "it is empty"),
        ("a,b\n", "a header and no requests"),
        (AZURE.splitlines()[0] + "\n", "a header and no requests"),
        ("a,b,c\n1,2,3\n", "line 1 begins none of the known forms"),
        (AZURE + "2023-11-16 18:15:51,879\n", "line 4 has 2 columns; 3 needed"),
        (AZURE + "2023-11-16 18:15:51,eight,55\n", "line 4: ContextTokens is 'eight'; a whole number from 1 to"),
        (AZURE + "2023-11-16 18:15:51,879,0\n", "line 4: GeneratedTokens is '0'; a whole number from 1 to"),
        (AZURE + "2023-11-16 18:15:51,-9,5\n", "line 4: ContextTokens is '-9'"),
        (AZURE + "soon,879,55\n", "line 4: TIMESTAMP is 'soon'; seconds, or a date and time, are needed"),
        (AZURE + "2023-11-16 18:15:50.5,9,5\n", "line 4: times out of order; it is 0.495 s before the request above"),
        ("3,4\n5,6,7\n", "line 2 has 3 columns; 2 needed"),
        ("3,4\n5,1.5\n", "line 2: output_tokens is '1.5'"),
        (SHAREGPT + "1,,2,3\n", "line 3: num_decode_tokens is ''"),
        (MOONCAKE + "{nonsense\n", "line 3 is not JSON: .* at column 2"),
        (MOONCAKE + "[1]\n", "line 3 is not a JSON object"),
        (MOONCAKE + '{"timestamp": 2000, "input_length": 5}\n', "line 3: output_length is None"),
        (MOONCAKE + '{"timestamp": 2000, "input_length": true, "output_length": 1}\n', "line 3: input_length is True"),
        (MOONCAKE + '{"timestamp": 900, "input_length": 5, "output_length": 1}\n', "line 3: times out of order"),
        (
            '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [0]}',
            "line 1 has 1 hash_id; input_length 513 asks for 2",
        ),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}',
            "line 1: hash_ids is not a list",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "trace", text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"trace {path}")
    assert "\n" not in str(caught.value)


OWN = "time,prompt_tokens,output_tokens,prefix_group,prefix_tokens\n"


def test_the_own_form_as_csv_and_as_json_lines(tmp_path: Path) -> None:
    table = OWN + "10.25,900,120,help,512\n10.75,100,20,,\n11,700,5,help,256\n12.5,512,1,other,512\n"
    row = '{"time": %s, "prompt_tokens": %d, "output_tokens": %d, "prefix_group": %s, "prefix_tokens": %s}\n'
    values = [
        ("10.25", 900, 120, '"help"', "512"),
        ("10.75", 100, 20, "null", "null"),
        ("11", 700, 5, '"help"', "256"),
        ("12.5", 512, 1, '"other"', "512"),
    ]
    lines = "".join(row % each for each in values)
    for name, text in (("own.csv", table), ("own.jsonl", lines)):
        trace = read_trace(write(tmp_path / name, text))
        assert [each.arrival for each in trace.requests] == [0.0, 0.5, 0.75, 2.25]
        assert lengths(trace) == [(900, 120), (100, 20), (700, 5), (512, 1)]
        assert trace.timed
        assert trace.hash_block == 256  # the largest that divides every beginning
        assert [each.hash_ids for each in trace.requests] == [(0, 1), (), (0,), (2, 3)]


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,API log\n"
    trace = read_trace(write(tmp_path / "burst.csv", burst + rows))
    assert lengths(trace) == [(472, 18), (1087, 230)]
    assert [each.arrival for each in trace.requests] == [0.0, 40.5]
    assert trace.notes == ("columns that are not used: Model, Total tokens, Log Type",)
    vidur = "arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,10,2\n2.0,11,3\n"
    trace = read_trace(write(tmp_path / "vidur.csv", vidur))
    assert [each.arrival for each in trace.requests] == [0.0, 0.5]
    assert trace.timed
    assert trace.notes == ()


def test_quoted_rows_float_times_and_three_columns_without_a_header(tmp_path: Path) -> None:
    quoted = '"TIMESTAMP","ContextTokens","GeneratedTokens"\n"2023-11-16 18:15:46.6805900","374","44"\n'
    quoted += '"2023-11-16 18:15:50","9","5"\n'
    assert lengths(read_trace(write(tmp_path / "quoted.csv", quoted))) == [(374, 44), (9, 5)]
    seconds = "TIMESTAMP,ContextTokens,GeneratedTokens\n0.5,374,44\n1e1,9,5\n"
    trace = read_trace(write(tmp_path / "seconds.csv", seconds))
    assert [each.arrival for each in trace.requests] == [0.0, 9.5]
    trace = read_trace(write(tmp_path / "plain.csv", "0.5,374,44\n0.75,9,5\n"))
    assert lengths(trace) == [(374, 44), (9, 5)]
    assert trace.timed


def test_bad_rows_stop_or_are_left_out_and_counted(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:15:51,879,0\n2023-11-16 18:15:52,7,5\n2023-11-16 18:15:40,7,5\nsoon,1,1\n"
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(ValueError, match="line 4: GeneratedTokens is '0'"):
        read_trace(path)
    trace = read_trace(path, skip_bad_rows=True)
    assert lengths(trace)[-1] == (7, 5)
    assert len(trace.requests) == len(read_trace(write(tmp_path / "good.csv", AZURE)).requests) + 1
    (note,) = trace.notes
    assert note.startswith("3 of 6 rows cannot be read and are left out; the first: line 4: GeneratedTokens is '0'")
    with pytest.raises(ValueError, match="none of its rows can be read; line 2: time is 'x'"):
        read_trace(write(tmp_path / "bad.csv", OWN + "x,1,1,,\n"), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        ('{"time": 1, "prompt_tokens": 5, "output_tokens": 2, "user": 7}\n', "user"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 2, "id": 7}\n', "id"),
        ("time,prompt_tokens,output_tokens,prefix_tokens\n0,5,2,4\n", "prefix_tokens"),  # of no group
    ],
)
def test_what_is_not_used_is_named(tmp_path: Path, text: str, unused: str) -> None:
    assert read_trace(write(tmp_path / "a", text)).notes == (f"columns that are not used: {unused}",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.5,2.5\n", "line 1: prompt_tokens is '1.5'; a whole number from 1 to 1,000,000,000 is needed"),
        (f"{10**23},1\n", f"line 1: prompt_tokens is '{10**23}'; a whole number from 1 to"),
        (OWN + "inf,1,1,,\n", "line 2: time is 'inf'; seconds, or a date and time, are needed"),
        (OWN + "1,100,1,a,200\n", "line 2: prefix_tokens is 200; the length of the prompt is 100"),
        (OWN + "1,100,1,a,\n", "line 2: prefix_tokens is ''; a whole number"),
        ('{"time": 1, "prompt_tokens": 5}\n', "line 1 has no output_tokens"),
        ("time,Time,prompt_tokens,output_tokens\n1,2,3,4\n", "line 1 has 2 columns time; one is needed"),
        ("time,length\n1,2,3\n", "line 2 has 3 columns; 2 needed"),
        ("a,b,c\n1,2,3\n", "line 1 begins none of the known forms"),
    ],
)
def test_a_wrong_row_of_the_own_form(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_trace(write(tmp_path / "t", text))


def test_a_sample_is_spread_over_the_trace() -> None:
    requests = tuple(TraceRequest(float(at), at + 1, 1) for at in range(1000))
    sample = spread(RequestTrace("t", requests, timed=True), 100)
    assert len(sample.requests) == 100
    assert [each.prompt_len for each in sample.requests[:6]] == [1, 2, 3, 4, 5, 51]
    gaps = [b.arrival - a.arrival for a, b in zip(sample.requests, sample.requests[1:], strict=False)]
    assert gaps == pytest.approx([1.0] * 99)
    assert sample.notes == ("100 of 1,000 requests: 20 runs of 5, spread evenly",)
    assert spread(sample, 100) is sample
    assert len(spread(sample, 7).requests) == 7
    with pytest.raises(ValueError, match="requests is 0"):
        spread(sample, 0)


def test_what_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_trace(tmp_path / "binary")
    packed = gzip.compress(AZURE.encode() * 50)
    for name, data in (("cut.gz", packed[:-20]), ("bent.gz", packed[:30] + b"\0\0\0" + packed[33:])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "rows", "prompts", "outputs", "rate"),
    [
        ("azure2023_conv.csv.gz", 19_366, 1154.7, 211.1, 5.53),
        ("mooncake_conversation.jsonl.gz", 12_031, 12035, 343, 3.40),
        ("sharegpt_8k.csv.gz", 30_731, 2340, 439, None),
    ],
)
def test_the_published_traces(name: str, rows: int, prompts: float, outputs: float, rate: float | None) -> None:
    """As ../shared/paper/numbers.md counts them."""
    path = SHARED / "traces" / name
    if not path.is_file():
        pytest.skip(f"no ../shared/traces/{name} beside the project")
    trace = read_trace(path)
    assert len(trace.requests) == rows
    assert mean(each.prompt_len for each in trace.requests) == pytest.approx(prompts, abs=0.5)
    assert mean(each.output_len for each in trace.requests) == pytest.approx(outputs, abs=0.5)
    assert trace.timed == (rate is not None)
    if rate is not None:
        assert trace.rate == pytest.approx(rate, abs=0.01)


# --- what is done to a trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEANS)
def test_drawn_lengths_have_the_published_means(name: str) -> None:
    trace = generated(name, 20_000)
    for mean_length, values in zip(MEANS[name], zip(*lengths(trace), strict=True), strict=True):
        assert mean(values) == pytest.approx(mean_length, rel=0.02)
        assert pstdev(values) == pytest.approx(mean_length, rel=0.05)  # geometric: as spread as its mean
    assert max(map(sum, lengths(trace))) <= 2048
    assert trace == generated(name, 20_000)
    assert trace != generated(name, 20_000, seed=1)


def test_drawing_one_token_gives_one_token() -> None:
    assert lengths(drawn("ones", 1, 1, 5)) == [(1, 1)] * 5


def test_poisson_arrivals_have_their_rate() -> None:
    trace = at_rate(generated("alpaca", 20_000), 4.0)
    assert trace.rate == pytest.approx(4.0, rel=0.03)
    gaps = [b.arrival - a.arrival for a, b in zip(trace.requests, trace.requests[1:], strict=False)]
    assert pstdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert "Poisson arrivals, 4 per second, seed 0" in trace.notes


def test_a_timed_trace_keeps_its_bursts_at_another_rate(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "m.jsonl", MOONCAKE))
    faster = at_rate(trace, 2 * trace.rate)
    assert [each.arrival for each in faster.requests] == [0.0, 0.75]
    assert faster.notes == ("arrival times x 0.5, for 1.33 requests per second",)
    assert "1.33 per second" in faster.describe()
    together = at_rate(trace, float("inf"))
    assert [each.arrival for each in together.requests] == [0.0, 0.0]
    assert "all at the same time" in together.describe()
    assert "no times" in generated("alpaca", 3).describe()


def test_scaling_keeps_prefixes_where_blocks_stay_whole(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "m.jsonl", MOONCAKE))
    small = scaled(trace, 1 / 32)
    assert small.hash_block == 16
    assert [(each.prompt_len, each.output_len, each.hash_ids) for each in small.requests] == [
        (19, 1, (0, 1)),
        (16, 1, (0,)),
    ]
    assert all(each.hash_ids == () for each in scaled(trace, 0.3).requests)


def test_clipping_cuts_outputs_first_and_says_how_many() -> None:
    trace = RequestTrace("t", tuple(TraceRequest(0.0, p, o) for p, o in ((5, 5), (5, 9), (20, 3))), timed=False)
    cut = clipped(trace, 10)
    assert lengths(cut) == [(5, 5), (5, 5), (9, 1)]
    assert cut.notes == ("2 requests cut to 10 tokens",)
    assert clipped(cut, 10) is cut


def test_the_first_requests_and_a_shared_prefix() -> None:
    trace = generated("alpaca", 5)
    assert first(trace, 5) is trace
    assert first(trace, 2).notes[-1] == "the first 2 of 5 requests"
    longer = with_prefix(trace, 7)
    assert [p - q for (p, _), (q, _) in zip(lengths(longer), lengths(trace), strict=True)] == [7] * 5
    assert ({each.hash_ids for each in longer.requests}, longer.hash_block) == ({(0,)}, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trace: first(trace, 0), "requests is 0"),
        (lambda trace: at_rate(trace, 0.0), "rate is 0.0"),
        (lambda trace: at_rate(trace, float("nan")), "rate is nan"),
        (lambda trace: scaled(trace, -1), "scale is -1"),
        (lambda trace: clipped(trace, 1), "has 1 token; at least 2"),
        (lambda trace: with_prefix(trace, 0), "has 0 tokens"),
        (lambda trace: generated("nobody", 3), "trace is 'nobody'; a file or one of sharegpt, alpaca"),
        (lambda trace: generated("alpaca", 0), "requests is 0"),
    ],
)
def test_what_cannot_be_is_refused(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(generated("alpaca", 3))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1000 + "]" * 1000, "line 2 is not JSON: nested more than 100 deep at column 101"),
        ('{"timestamp": 1' + "0" * 400 + "}", "line 2 is not JSON: a number that needs more than 64 bits at column 15"),
        ('{"timestamp": 5, "input_length": [1], "output_length": 1}', r"line 2: input_length is \[1\]; a whole number"),
    ],
)
def test_json_of_any_kind_is_one_sentence_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n' + text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"trace .*trace.jsonl: {message}"):
        read_trace(path)


def test_a_device_a_pipe_and_a_bomb_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"trace {path} cannot be read: it is a pipe or a device; a regular"):
            read_trace(path)
    bomb = tmp_path / "bomb.csv.gz"
    bomb.write_bytes(gzip.compress(bytes(1 << 26)) * 64)  # 4 MB, and 4 GiB unpacked
    with pytest.raises(ValueError, match=r"bomb\.csv\.gz has \d+ bytes and unpacks to more than \d+; at most"):
        read_trace(bomb)
