"""`paged-ref long` and what `viz` shows of it: the table's numbers, the frames, one sentence for bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from paged_ref.cli import main
from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.interop.checkpoints import load
from paged_ref.timeline.events import PagesAttended, PagesPlaced
from paged_ref.timeline.history import History, read_histories
from paged_ref.views.viz.frames.screen import FRAMES_OF_PAGES, SMALLEST, screen
from paged_ref.views.viz.narration import narrate
from paged_ref.views.viz.player import Player
from paged_ref.views.viz.scene import Scene
from paged_ref.views.viz.source_links import function_for_event, place_of

CONFIG = load("tiny").config
WATCH = (CONFIG.num_layers - 1, CONFIG.num_heads - 1)


@pytest.fixture(scope="session")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of the last run of a small `paged-ref long`."""
    path = tmp_path_factory.mktemp("long") / "run.jsonl"
    argv = [
        "--tokens",
        "120",
        "--new-tokens",
        "3",
        "--block-size",
        "4",
        "--attend",
        "0.2",
        "--watch",
        "{}:{}".format(*WATCH),
    ]
    assert main(["long", *argv, "--record", str(path)]) == 0
    return path


@pytest.fixture
def run(long_log: Path) -> History:
    (history,) = read_histories(long_log)
    return history


def table(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, list[str]]:
    assert main(["long", *argv]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_the_table_says_what_was_saved_and_what_it_cost(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(
        capsys, "--tokens", "300", "--new-tokens", "5", "--device-blocks", "3", "--attend", "all", "--attend", "4"
    )
    assert rows["attend"] == ["resident", "all", "4"]
    assert rows["tokens agree"][:2] == ["100.0%", "100.0%"]
    assert float(rows["logits differ at most by"][1]) < 1e-4
    assert float(rows["logits differ at most by"][2]) > 1e-4
    assert rows["attention mass covered"][:2] == ["100.0%", "100.0%"]
    assert 0 < float(rows["attention mass covered"][2].rstrip("%")) < 100
    memory = [float(cell.replace(",", "")) for cell in rows["device memory, KiB"]]
    assert memory[1] < memory[2] < memory[0]  # the bounds cost something
    bytes_in = [float(cell.replace(",", "")) for cell in rows["from the host, KiB/token"]]
    block = 16 * kv_bytes_per_token(CONFIG, "float32") / 1024
    assert (19 - 3) * block <= bytes_in[1] <= 20 * block  # 301 to 305 tokens in 19 or 20 blocks; 3 can stay
    assert 0 == bytes_in[0] < bytes_in[2] < bytes_in[1]


def test_it_says_what_the_model_was_trained_for(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--new-tokens", "2", "--attend", "all", "--block-size", "16"]
    assert main(["long", "--tokens", "60", *small]) == 0
    assert re.search(r"trained for \d+ tokens; all of this lies within", capsys.readouterr().out)


def test_beyond_the_context(stories260k: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(stories260k), "--tokens", "560", "--new-tokens", "2", "--attend", "all"]
    assert main(["long", *argv]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The model was trained for 512 tokens and has 570 here: what it says beyond 512 is not" in out
    assert "whether the same model, with less memory, says the same" in out


def test_recall_is_a_table_of_shares(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "--tokens", "400", "--new-tokens", "2", "--recall", "--block-size", "8")
    assert rows["budget"] == ["oracle", "relevance", "random", "recent"]
    for budget in ("5%", "10%", "25%", "50%"):
        oracle, relevance, *_ = (float(cell.rstrip("%")) for cell in rows[budget])
        assert 0 < relevance <= oracle <= 100


def test_a_text_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a cat. " * 30, encoding="utf-8")
    assert main(["long", "--text", str(file), "--tokens", "100", "--new-tokens", "2", "--attend", "0.5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "100 tokens of text, then 2 new ones, timed, and 8 more, observed: all 10 are compared" in printed


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["long", "--tokens", "90", "--new-tokens", "2"]) == 0
    captured = capsys.readouterr().out
    assert "…" not in captured
    assert "resident" in captured


REFUSED = [
    (["--recall", "--attend", "0.1"], "--attend is given with --recall, which has no use for it"),
    (["--tokens", "1"], "--tokens is 1; at least 2"),
    (["--new-tokens", "0"], "--new-tokens is 0; at least 1"),
    (["--block-size", "0"], "--block-size is 0; at least 1"),
    (["--tokens", "90", "--device-blocks", "0"], "--device-blocks is 0; at least 1"),
    (["--tokens", "90", "--host-blocks", "-1"], "--host-blocks is -1; at least 0"),
    (["--tokens", "90", "--host-blocks", "2"], "can need 144 slots of KV cache; the cache has"),
    (["--tokens", "90", "--full-layers", "-1"], "--full-layers is -1; at least 0"),
    (["--tokens", "90", "--watch", "x"], "--watch is 'x'; LAYER:HEAD is needed"),
    (["--tokens", "90", "--watch", "99:0"], "--watch is 99:0; the model has layers 0 to"),
    (["--tokens", "90", "--watch", "0:0"], "--watch is 0:0; --record FILE is needed"),
    (["--tokens", "90", "--backend", "abacus"], "backend is 'abacus'; known are"),
    (["--tokens", "90", "--text", "/nowhere/text"], "--text /nowhere/text cannot be read"),
]


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_gets_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["long", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("paged-ref: error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("attend", ["0", "0.0", "1.5", "-3", "much"])
def test_a_budget_that_cannot_be_is_refused(attend: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["long", "--attend", attend])
    assert stopped.value.code == 2
    assert "'all', a budget of at least 1 block, or a share above 0 and up to 1 is needed" in capsys.readouterr().err


def test_a_text_too_short_says_how_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time", encoding="utf-8")
    assert main(["long", "--text", str(file)]) == 2
    assert re.search(r"text.txt has \d+ tokens; --tokens asks for 2048", capsys.readouterr().err)
    file.write_bytes(b"\xff\xfe\xfa")
    assert main(["long", "--text", str(file)]) == 2
    assert "is not text in UTF-8: byte 0 is wrong" in capsys.readouterr().err


# --- the frames ----------------------------------------------------------------------------------------


def test_every_frame_at_every_event_fills_its_window(run: History) -> None:
    for position in range(len(run)):
        frame = position % len(FRAMES_OF_PAGES)
        size = ((80, 24), SMALLEST, (97, 33), (141, 61))[position % 4]
        scene = Scene(run.moment(position), [run])
        lines = screen(scene, frame, *size).plain.split("\n")
        assert (len(lines), {cell_len(line) for line in lines}) == (size[1], {size[0]})
        assert screen(scene, frame, *size).plain.split("\n") == lines


def test_each_event_has_its_sentence_and_its_function(run: History) -> None:
    for position in range(len(run)):
        moment = run.moment(position)
        sentence = narrate(moment)
        assert sentence.endswith((".", "”"))
        assert sentence != type(moment.event).__name__
        place = place_of(function_for_event(moment))
        assert place.file.startswith("paged_ref/")
    files = {place_of(function_for_event(run.moment(p))).name for p in range(len(run))}
    assert {"Residency.need", "StreamingManager.prepare", "StreamedKV.attend", "StreamingManager.append"} <= files


def test_residency_shows_each_page_where_it_is(run: History) -> None:
    """The cells of the first frame, counted, are the places that the events name."""
    checked = 0
    for position, event in enumerate(run.events):
        if not isinstance(event, PagesPlaced) or position % 7:
            continue
        moment = run.moment(position)
        pages = moment.state.memory.pages
        rows = screen(Scene(moment, [run]), 0, 100, 60).plain.split("\n")
        cells = "".join(line.split(maxsplit=2)[2] for line in rows if re.match(r" L\d+ +h\d", line)).replace(" ", "")
        if not cells:
            continue
        named = {page for table in pages.tables.values() for page in table}
        places = [place for page, place in pages.places.items() if page in named]
        assert cells.count("#") == sum(device >= 0 > host for device, host in places)
        assert cells.count("=") == sum(device >= 0 <= host for device, host in places)
        assert cells.count(".") == sum(device < 0 for device, _ in places)
        checked += 1
    assert checked > 5


def test_attention_shows_mass_beside_what_was_chosen(run: History) -> None:
    position, event = [(p, e) for p, e in enumerate(run.events) if isinstance(e, PagesAttended)][-1]
    assert (event.layer, event.head) == WATCH
    assert len(event.chosen) == 7  # a fifth of 33 blocks, rounded up
    lines = screen(Scene(run.moment(position), [run]), 1, 80, 24).plain.split("\n")
    chosen = next(line for line in lines if line.startswith(" chosen"))
    assert [i for i, cell in enumerate(chosen[11:]) if cell == "^"] == list(event.chosen)
    device = next(line for line in lines if line.startswith(" device"))
    assert [i for i, cell in enumerate(device[11:]) if cell == "#"] == list(event.resident)
    covered = sum(event.mass[block] for block in event.chosen) / 1e6
    assert any(f"Chosen: 7, which hold {covered:.1%} of the attention" in line for line in lines)
    top = max(range(len(event.mass)), key=lambda block: event.mass[block])
    first = lines[next(i for i, line in enumerate(lines) if "most attention" in line) + 1]
    assert re.match(rf" [ ^] +{top} +{event.mass[top] / 1e4:.1f}% (host|device)", first)


def test_the_player_has_the_frames_of_pages(run: History) -> None:
    player = Player([run])
    assert "[1 residency]" in player.draw(80, 24).plain
    player.press("2")
    assert "[2 attention]" in player.draw(80, 24).plain
    player.press("n")
    assert isinstance(player.moment().event, PagesAttended)
    player.press("5")
    assert "no such key" in player.draw(80, 24).plain


def test_viz_takes_the_log(long_log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", str(long_log), "--frame", "attention", "--at", "A", "--size", "80x24"]) == 0
    assert "Layer {}, query head {} of A".format(*WATCH) in capsys.readouterr().out
    assert main(["viz", str(long_log), "--frame", "tables"]) == 2
    assert "known are 1 residency, 2 attention, 3 timeline" in capsys.readouterr().err
