"""The report, made from a run folder written by hand: no network is trained here, and none is needed."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sublens import FileError
from sublens.answers import Answer, Bars, Histogram, Lines, Matrix, Picture, Series, Spread, Table
from sublens.report import answer_figures, figures, read, sentences, write_report

SIZES = {"layers.0.weight": 16_800, "layers.1.weight": 160_000, "layers.2.weight": 80_000, "layers.3.weight": 4_000}
KEPT = {
    "all": dict(zip(SIZES, (0.701, 0.362, 0.489, 0.914), strict=True)),
    "add": dict(zip(SIZES, (0.552, 0.231, 0.329, 0.862), strict=True)),
    "mul": dict(zip(SIZES, (0.688, 0.371, 0.462, 0.907), strict=True)),
}
SHARED = dict(zip(SIZES, (0.74, 0.36, 0.41, 0.94), strict=True))  # of the add mask's weights: kept by the mul mask too
ACCURACY = {"all": (0.995, 0.986), "add": (0.998, 0.014), "mul": (0.011, 0.998)}
INVERSE = {"all": (0.009, 0.011), "add": (0.021, 0.118), "mul": (0.034, 0.012)}
HALF = {"all": (0.996, 0.989), "add": (0.999, 0.204), "mul": (0.087, 0.997)}
LATE = {"all": (0.997, 0.991), "add": (0.999, 0.311), "mul": (0.342, 0.998)}


def tasks(pair: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("add", "mul"), pair, strict=True))


def band(mean: float, spread: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def overlap_values(size: int, first: float, second: float, both: float) -> dict[str, Any]:
    """Overlap of masks that keep the fractions ``first`` and ``second``; ``both`` is the fraction that both keep."""
    chance, spread = first * second, 2 * math.sqrt(first * (1 - first) * second * (1 - second) / size)
    union = first + second - chance
    return {
        "iou": both / (first + second - both),
        "iomin": both / min(first, second),
        "shared": both / first,
        "size": size,
        "chance": {
            "iou": band(chance / union, spread / union),
            "iomin": band(chance / min(first, second), spread / min(first, second)),
            "shared": band(chance / first, spread / first),
        },
    }


def answers(add: float, mul: float) -> dict[str, float]:
    return {"add": add, "mul": mul, "neither": 1 - add - mul}


def answer(figure: Any, *tables: Table) -> Answer:
    return Answer(title=f"The question of {figure.title}", sentence="The answer.", figures=[figure], tables=tables)


SERIES = [
    Series(name="on add", values=[0.98, Spread(0.97, 0.93, 0.99), None], chance=[0.01, Spread(0.1, 0.02, 0.2), None]),
    Series(name="on mul", values=[0.11, 0.52, 0.3]),
]
ANSWERS = {
    "bars": answer(Bars(title="bars", label="accuracy", groups=["all", "add", "mul"], series=SERIES)),
    "lines": answer(
        Lines(title="lines", label="kept", x_label="alpha", x=[1e-5, 1e-4, 1e-3], log=True, series=SERIES),
        Table(title="a table", columns=["what", "n", "share"], rows=[["some", 3, 0.25], ["none", None, 0]],
              percent=["share"]),
    ),
    "named-lines": answer(Lines(title="named", label="kept", x_label="part", x=["a", "b", "c"], series=SERIES)),
    "histogram": answer(Histogram(title="bins", label="gates", x_label="p", edges=[0, 0.1, 0.5, 1], series=SERIES)),
    "matrix": answer(Matrix(title="m", row_label="of", column_label="on", rows=["a", "b"], columns=["x", "y"],
                            values=[[0.1, None], [-0.2, 1]], diverging=True)),
    "picture": answer(Picture(title="p", row_label="out", column_label="in", masks=["add", "mul"],
                              cells=["0123", "3210", "0003"])),
}  # fmt: skip


def result() -> dict[str, Any]:
    total = sum(SIZES.values())
    whole = {name: sum(kept[layer] * SIZES[layer] for layer in SIZES) / total for name, kept in KEPT.items()}
    both = sum(SHARED[layer] * KEPT["add"][layer] * SIZES[layer] for layer in SIZES) / total
    return {
        "study": "add-mul",
        "seed": 0,
        "settings": {"preset": "quick", "widths": [400, 400, 200], "alpha": 1e-4, "mask_steps": 5000, "samples": 4},
        "versions": {"sublens": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "seconds": {"network": 91.2, "masks": 214.9, "analysis": 11.3, "total": 317.4},
        "network": {"accuracy": tasks((1.0, 0.9998))},
        "masks": {
            name: {
                "accuracy": tasks(ACCURACY[name]),
                "inverse_accuracy": tasks(INVERSE[name]),
                "half_accuracy": tasks(HALF[name]),
                "late_half_accuracy": tasks(LATE[name]),
                "random_accuracy": {task: {"mean": 0.0102, "low": 0.0089, "high": 0.0117} for task in ("add", "mul")},
                "kept": whole[name],
                "kept_per_layer": dict(KEPT[name]),
            }
            for name in ("all", "add", "mul")
        },
        "overlap": {
            "masks": ["add", "mul"],
            **overlap_values(total, whole["add"], whole["mul"], both),
            "per_layer": {
                layer: overlap_values(size, KEPT["add"][layer], KEPT["mul"][layer], SHARED[layer] * KEPT["add"][layer])
                for layer, size in SIZES.items()
            },
        },
        "repeats": {
            "add": {
                "overlap": {
                    "masks": ["add", "add-repeat"],
                    **overlap_values(total, whole["add"], whole["add"], 0.68 * whole["add"]),
                    "per_layer": {
                        layer: overlap_values(size, KEPT["add"][layer], KEPT["add"][layer], 0.7 * KEPT["add"][layer])
                        for layer, size in SIZES.items()
                        if layer != "layers.3.weight"
                    },
                },
            },
        },
        "confusion": {
            "network": {"add": answers(1.0, 0.0), "mul": answers(0.0, 1.0)},
            "add": {"add": answers(0.998, 0.0), "mul": answers(0.917, 0.014)},
            "mul": {"add": answers(0.011, 0.934), "mul": answers(0.0, 0.998)},
        },
    }


def result_with_answers() -> dict[str, Any]:
    verdict = {
        "specialize": {"verdict": "holds", "because": "add and mul share 0.41 of it."},
        "reuse": {"verdict": "undecided", "because": "no two tasks <ask> the same."},
        "pairs": [{"tasks": ["add", "mul"], "index": {"mean": 0.41, "low": 0.4, "high": 0.42}}],
        "reused": [{"task": "mul", "share": {"mean": 0.25, "low": 0.2, "high": 0.3}}, {"task": "add", "share": None}],
    }
    answers = {name: answer.as_json() for name, answer in ANSWERS.items()}
    return {**result(), "verdict": verdict, "analysis": {"bars": answers["bars"]}, "answers": answers}


def history() -> list[dict[str, Any]]:
    lines = []
    for name, end in (("all", 0.446), ("add", 0.289), ("mul", 0.434)):
        for step in range(0, 5000, 100):
            fall = math.exp(-step / 1600)
            wave = 1 + 0.25 * math.sin(step / 7.0 + len(name))
            lines.append(
                {
                    "part": name,
                    "step": step,
                    "loss": (0.02 + 1.4 * math.exp(-step / 260)) * wave,
                    "penalty": 0.1 * fall,
                    "kept": end + (0.997 - end) * fall,
                    "gradient_norm": (0.02 + 0.2 * math.exp(-step / 300)) * wave,
                }
            )
    return lines


def folder_of(path: Path, content: dict[str, Any], lines: list[dict[str, Any]] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "result.json").write_text(json.dumps(content), encoding="utf-8")
    if lines is not None:
        (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    return folder_of(tmp_path / "run", result_with_answers(), history())


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(run):
    seen = page(run)
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    for name, value in seen.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value is not None and value.startswith(("#", "data:image/png;base64,")), value
    text = (run / "report.html").read_text(encoding="utf-8")
    assert seen.tags.count("image") == text.count("data:image/png") == 1
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"url\(#([^)]+)\)", text) + [
        v[1:] for n, v in seen.attributes if n == "href" and v and v.startswith("#")
    ]:
        assert reference in ids


def test_figures_are_files_too_and_well_formed(run):
    page(run)
    names = {
        "curves",
        "kept-per-layer",
        "overlap-per-layer",
        "analysis-bars-1",
        *(f"answer-{kind}-1" for kind in ANSWERS),
    }
    assert {path.name for path in (run / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("svg", "pdf")
    }
    for path in (run / "figures").iterdir():
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF-")
        else:
            assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run, other = (folder_of(tmp_path / name, result(), history()) for name in ("run", "other"))
    assert write_report(run).read_bytes() == write_report(other).read_bytes()
    for path in (run / "figures").iterdir():
        assert path.read_bytes() == (other / "figures" / path.name).read_bytes()


EVIL = "<script>alert(1)</script>\"'&$x^2$"


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [renamed(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize(
    "name", ["add-mul", "add", "layers.0.weight", "neither", "quick", "preset", "2.13.0", "network"]
)
def test_text_from_files_is_escaped(tmp_path, name):
    names = {name: f"{EVIL}{name}"}
    content = renamed(result(), names) | {"network": renamed(result()["network"], names)}
    folder = folder_of(tmp_path / "run", content, renamed(history(), names))
    seen = page(folder)
    assert "script" not in seen.tags
    assert f"{EVIL}{name}" in seen.text
    for path in (folder / "figures").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(path).iter()}
        assert "script" not in tags
        text = "".join(ET.parse(path).getroot().itertext())
        assert (
            name in ("add-mul", "neither", "quick", "preset", "2.13.0", "network")
            or "alert(1)" in text
            or (name == "layers.0.weight" and path.stem == "curves")
        )


def test_characters_that_cannot_be_shown_are_replaced(tmp_path):
    names = {"layers.0.weight": "a\x00b\ud800c\u202ed", "add": "_足し算"}
    seen = page(folder_of(tmp_path / "run", renamed(result(), names), renamed(history(), names)))
    assert "a\ufffdb\ufffdc\ufffdd" in seen.text
    assert "_足し算 mask" in seen.text


def test_answers_stand_beside_their_sentences(tmp_path):
    seen = page(folder_of(tmp_path / "run", result_with_answers()))
    for name, shown in ANSWERS.items():
        assert shown.title in seen.text, name
    assert seen.tags.count("figure") >= len(ANSWERS)
    assert re.search(r"some\s*3\s*25.0\s%\s*none\s*\u2013\s*0.0\s%", seen.text)


def test_the_verdict_stands_on_top(run):
    seen = page(run)
    assert "different weights): holds. Add and mul share 0.41 of it." in " ".join(seen.text.split())
    assert "the same weights): undecided. No two tasks <ask> the same." in " ".join(seen.text.split())
    assert seen.text.index("Verdict") < seen.text.index(ANSWERS["bars"].title) < seen.text.index("Weights kept")
    assert read(run).sharing == {"add and mul": 0.41}
    assert read(run).reused == {"mul": 0.25}


def test_what_tasks_never_saw_stands_beside_the_verdict(tmp_path):
    content = result_with_answers()
    content["excluded"] = [
        {"task": "easy", "kind": "held_back", "network": 0.735, "control": 0.65, "mask": 0.27,
         "random": {"mean": 0.125, "low": 0.0, "high": 0.5}},
        {"task": "hard", "kind": "left_out", "network": 1.0, "control": 0.5, "mask": 0.0, "random": None},
    ]  # fmt: skip
    text = " ".join(page(folder_of(tmp_path / "run", content)).text.split()).replace("\u00a0", " ")
    assert "easy, held back 73.5 % 65.0 % 27.0 % 12.5 % (0.0 % to 50.0 %)" in text
    assert "hard, left out 100.0 % 50.0 % 0.0 % \u2013" in text


def test_the_sentence_on_training_says_what_was_measured():
    once = [{"step": 60, "kept": 0.699}]
    twice = [{"step": 100, "kept": 0.731}, {"step": 800, "kept": 0.306}]
    said = sentences.curves({"rows": once, "columns": twice}).replace("\u00a0", " ")
    assert said == (
        "The rows mask kept 69.9 % after 60 steps; the columns mask kept 73.1 % after 100 steps and 30.6 % after 800"
        " (\u221242.5 points over the last tenth)."
    )


def test_every_sentence_follows_its_numbers(tmp_path):
    """Each sentence changes when its own numbers do, and only then."""

    def sentences_of(change: Any) -> dict[str, str]:
        content, lines = result(), history()
        change(content, lines)
        run = read(folder_of(tmp_path / "run", content, lines))
        return {
            "accuracy": sentences.accuracy(run),
            "inverse": sentences.inverse(run),
            "confusion": sentences.confusion(run.confusion["add"], "add"),
            "kept": sentences.kept(run),
            "overlap": sentences.overlap(run.overlaps[0], run.repeats),
            "curves": sentences.curves(run.history),
        }

    before = sentences_of(lambda content, lines: None)
    changes = {
        "accuracy": lambda content, lines: content["masks"]["add"]["accuracy"].update(mul=0.7),
        "inverse": lambda content, lines: content["masks"]["add"]["inverse_accuracy"].update(mul=0.7),
        "confusion": lambda content, lines: content["confusion"]["add"]["mul"].update(mul=0.95),
        "kept": lambda content, lines: content["masks"]["add"]["kept_per_layer"].update({"layers.0.weight": 0.99}),
        "overlap": lambda content, lines: content["overlap"].update(iou=0.1),
        "curves": lambda content, lines: lines[-1].update(kept=0.5),
    }
    for name, change in changes.items():
        after = sentences_of(change)
        assert {key for key in before if before[key] != after[key]} == {name}


def test_sentences_say_what_the_numbers_are(run):
    content = read(run)
    assert "the add mask has 99.8\xa0% on its own task (0.2 points below the network), and 1.4\xa0% on mul" in (
        sentences.accuracy(content)
    )
    assert "told mul, it answers add in 91.7\xa0% of cases" in sentences.confusion(content.confusion["add"], "add")
    assert "above the band in layers.0.weight and layers.3.weight and below it in layers.1.weight" in (
        sentences.overlap(content.overlaps[0], {})
    )


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (1.0, "100.0"), (0.99999, ">99.9"), (0.0, "0.0"), (-0.0, "0.0"), (0.00001, "<0.1"), (-0.00001, ">-0.1"),
        (0.1234, "12.3"), (-0.05, "-5.0"),
    ],
)  # fmt: skip
def test_percent_rounds_nothing_to_all_or_none(fraction, text):
    assert sentences.percent(fraction) == f"{text}\xa0%"


def test_what_was_not_measured_is_left_out(tmp_path):
    content = result()
    bare = {"study": "bare", "network": {"accuracy": {}}, "masks": {}}
    assert "bare" in page(folder_of(tmp_path / "bare", bare)).text
    del content["confusion"], content["repeats"], content["overlap"]["chance"]
    for values in content["overlap"]["per_layer"].values():
        del values["chance"]
    seen = page(folder_of(tmp_path / "run", content | {"overlap": None}))
    assert "Overlap of" not in seen.text
    assert "Training of the masks" not in seen.text


def test_many_pairs_have_a_section_each(tmp_path):
    content = result()
    content["overlaps"] = [content["overlap"], {**content["overlap"], "masks": ["add", "all"]}]
    seen = page(folder_of(tmp_path / "run", content, history()))
    assert "Overlap of add and mul" in seen.text
    assert "Overlap of add and all" in seen.text


def test_very_many_pairs_are_one_matrix(tmp_path):
    content = result()
    pair = content["overlap"]
    ious = {"a": 0.25, "b": 0.5, "c": 0.75, "d": 0.3, "e": 0.35, "f": 0.4, "g": 0.45}
    content["overlaps"] = [{**pair, "masks": ["add", name], "iou": iou} for name, iou in ious.items()]
    folder = folder_of(tmp_path / "run", content, history())
    seen = page(folder)
    assert "Overlap of all masks" in seen.text
    assert "Overlap of add and a" not in seen.text
    assert (folder / "figures" / "overlaps.svg").is_file()
    assert not (folder / "figures" / "overlap-per-layer.svg").exists()
    (sentence,) = sentences.overlaps(read(folder).overlaps)
    assert sentence.startswith("The 7 pairs of masks have an IoU from 0.250 (add and a) to 0.750 (add and c); random")
    assert sentence.replace("&", "&amp;") in seen.text


def damaged(change: Any) -> dict[str, Any]:
    content = result_with_answers()
    change(content)
    return content


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[1", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "a list instead of an object"),
        ("{}", "lacks study, network, masks"),
        (json.dumps(damaged(lambda c: c["masks"].update(add=3))), "a mask is a number"),
        (json.dumps(damaged(lambda c: c["masks"]["add"].update(kept="<b>"))), "kept is text"),
        (json.dumps(damaged(lambda c: c["masks"]["add"]["accuracy"].update(add=None))), "accuracy.add is missing"),
        (json.dumps(damaged(lambda c: c["overlap"].pop("masks"))), "does not name its two masks"),
        (json.dumps(damaged(lambda c: c["overlap"]["chance"].update(iou=[]))), "iou is a list"),
        (
            json.dumps(damaged(lambda c: c["verdict"]["reuse"].update(verdict="maybe"))),
            "verdict.reuse is none",
        ),
        (
            json.dumps(damaged(lambda c: c["verdict"].update(pairs=[{"tasks": ["add"]}]))),
            "does not name its two tasks",
        ),
        (json.dumps(damaged(lambda c: c["verdict"].update(reused={"mul": 1}))), "verdict.reused is an object"),
        (json.dumps(damaged(lambda c: c.update(excluded={"mul": 1}))), "excluded is an object instead of a list"),
        (json.dumps(damaged(lambda c: c.update(excluded=[{"task": "a", "kind": "left_out"}]))), "excluded.network is"),
        (
            json.dumps(damaged(lambda c: c["answers"].update(bars={}))),
            "the answer to bars cannot be shown: Answer: lacks",
        ),
        (json.dumps(damaged(lambda c: c["answers"].update({"../x": {}}))), "'../x' cannot be the name of a question"),
        (json.dumps(damaged(lambda c: c.update(confusion={"add": {"add": 1}}))), "confusion.add.add is a number"),
    ],
)
def test_a_damaged_result_is_a_file_error_in_one_line(tmp_path, text, said):
    (tmp_path / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=re.escape(said)) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"part": "add", "step": "one"}'])
def test_a_damaged_history_is_a_file_error_that_names_the_line(run, line):
    with (run / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(FileError, match="line 151"):
        write_report(run)


def test_a_folder_without_a_result_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match="not the folder of a finished run"):
        write_report(tmp_path)
    (tmp_path / "study.py").write_text("")
    with pytest.raises(FileError, match=r"study\.py is a file, not the folder of a finished run"):
        read(tmp_path / "study.py")


def test_long_histories_are_drawn_by_means(monkeypatch):
    steps, values = figures._series([{"step": float(step), "loss": float(step % 2)} for step in range(4000)], "loss")
    assert len(steps) == len(values) == 400
    assert steps[-1] == 3999
    assert set(values) == {0.5}


def test_the_report_does_not_load_torch(run):
    program = f"import sys, sublens.report; sublens.report.write_report({str(run)!r}); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "False", ended.stderr


if __name__ == "__main__":  # python tests/test_report.py FOLDER: the page of the run above, to be looked at
    print(write_report(folder_of(Path(sys.argv[1]), result_with_answers(), history())))


@pytest.mark.parametrize(
    "names", [["a", "b"], [f"permutation-{k}" for k in range(1, 12)], [f"t{k}" for k in range(12)]]
)
def test_names_under_lines_do_not_run_into_each_other(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[Any] = []
    angles: set[float] = set()

    def drawn(figure: Any, name: str) -> Any:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        angles.update(label.get_rotation() for label in axes.get_xticklabels())
        boxes.extend(label.get_window_extent() for label in axes.get_xticklabels())
        return original(figure, name)

    original = answer_figures.drawn
    monkeypatch.setattr(answer_figures, "drawn", drawn)
    lines = Lines(title="t", label="y", x_label="x", x=names, series=[Series(name="s", values=[0.5] * len(names))])
    answer_figures.draw(lines, "figure")
    assert len(boxes) == len(names)
    if angles == {0.0}:
        assert all(before.x1 < after.x0 for before, after in pairwise(boxes))
    else:  # slanted names lie beside each other if they begin further apart than they are high
        assert all(after.x1 - before.x1 > 11 for before, after in pairwise(boxes))
    assert angles == ({30.0} if len(names[-1]) > 3 else {0.0})
