"""Every task reads a record of its files' true form, and scores a right and a wrong answer to it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jvlm.data.boxes import Sizes
from jvlm.data.content import Image, ObjectBox, Text, Video
from jvlm.data.errors import ExampleError, Origin
from jvlm.evaluation.clients import Boxes, EndpointClient
from jvlm.evaluation.endpoint import Endpoint
from jvlm.evaluation.files import Row, Rows
from jvlm.evaluation.metrics import METRICS, Answered, verifier
from jvlm.evaluation.prompting import prompt, shown
from jvlm.evaluation.summaries import SUMMARIES, Scored
from jvlm.evaluation.tasks import SUITES
from jvlm.evaluation.tasks.referring import with_regions
from tests.evaluation.benchmarks import png
from tests.evaluation.task_records import ALL, CLICK, FILES, IMAGE, RECORDS, REFER, TASKS

HIERARCHY = {
    "activity": {
        "root": {
            "pointer": "1",
            "bounds": [0, 0, 1440, 2560],
            "children": [None, {"pointer": "baf602f", "bounds": [720, 0, 1500, 1280]}],
        }
    }
}


@pytest.fixture(scope="module", autouse=True)
def mathematics():
    with verifier():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.png").write_bytes(png())
    (folder / "7.jpg").write_bytes(png())
    (folder / "7.json").write_text(json.dumps(HIERARCHY))
    for part in ("actnet", "vidal", "webvid", "msrvtt", "msvd", "tgif", "ssv2"):
        frames = folder / "test" / part / "v1"
        frames.mkdir(parents=True)
        for number in (10, 2, 1):
            (frames / f"c01_{number:04d}.jpeg").write_bytes(png())
    return folder


def test_every_task_but_captions_has_a_record_here():
    assert set(TASKS) - set(ALL) == {"coco_8shot", "screen2words", "widgetcap"}
    assert {name for names in SUITES.values() for name in names} <= set(TASKS)


@pytest.mark.parametrize("name", ALL)
def test_a_record_of_the_true_form_is_read_and_scored(name, folder):
    task, (record, right, wrong, form) = TASKS[name], ALL[name]
    file = next((file for start, file in FILES.items() if name.startswith(start)), "data.json")
    row = Row(record, Origin(str(folder / file), 1), form, str(folder))
    first = task.items(row)[0]
    assert first.id
    given = [Answered(first, text, task.parser, (Sizes((56, 28), (56, 28)),)) for text in (right, wrong)]
    values = [score.value for score in METRICS[task.metric].scores(given)]
    assert values[0] == pytest.approx(1)
    assert values[1] < 0.5
    media = [part for part in first.content if isinstance(part, Image | Video)]
    assert bool(media) == (task.group != "text")
    if task.group != "text":
        assert len({part.index for part in media}) == len(media)
    assert "None" not in shown(first.content)


@pytest.mark.parametrize(
    ("name", "changed", "field"),
    [
        ("mathvista_testmini", {"answer": "1/5"}, "answer"),
        ("mathvista_testmini", {"precision": "two"}, "precision"),
        ("dynamath", {"ground_truth": "x + 1", "answer_type": "float"}, "ground_truth"),
    ],
)
def test_a_reference_that_no_scorer_can_read_is_refused_with_its_record(name, changed, field):
    record = {**ALL[name][0], **changed}
    with pytest.raises(ExampleError, match=rf"data\.json.*{field}.*no number"):
        TASKS[name].items(Row(record, Origin("data.json", 7), "hub"))


def test_numbers_of_a_table_of_vlmevalkit_are_texts():
    record, right, wrong, _ = ALL["mathvista_testmini"]
    item = TASKS["mathvista_testmini"].items(Row({**record, "precision": "1.0"}, Origin("x.tsv", 1), "tsv"))[0]
    given = [Answered(item, text, "boxed") for text in (right, wrong)]
    assert [score.value for score in METRICS["mathvista"].scores(given)] == [1, 0]


def test_several_questions_of_one_record(folder):
    items = TASKS["refcoco_val"].items(Row(REFER, Origin("x", 1)))
    assert [item.id for item in items] == ["1:0", "1:1"]
    assert len({item.group for item in items}) == 1
    pairs = [
        {"query_id": f"q{n}", "question": "?", "answer": answer, "validated_answers": []}
        for n, answer in enumerate(
            [
                {"number": "4", "spans": [], "date": {}},
                {"spans": ["a", "b"]},
                {"date": {"day": "1", "month": "May", "year": ""}},
            ]
        )
    ]
    items = TASKS["drop"].items(Row({"key": "p", "passage": "P.", "qa_pairs": pairs}, Origin("x", 1), "json"))
    assert [item.gold for item in items] == [[["4"]], [["a", "b"]], [["1 May"]]]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mathverse_vision_only", {"problem_version": "Text Dominant"}),
        ("osworld_g", {"box_type": "refusal"}),
        ("wemath", {"key": "1steps_1"}),
        ("seedbench_img", {"data_type": "video"}),
        ("taperception", {"split": "train"}),
        ("vcgbench_consistency", {"question_2": "None"}),
        ("ferret_ui_ref_iphone", {}),  # of a file whose name says no kind
    ],
)
def test_records_of_other_parts_are_no_questions(name, change):
    record, *_, form = RECORDS[name]
    assert TASKS[name].items(Row({**record, **change}, Origin("x", 1), form)) == []


def test_a_box_in_another_layout_is_refused_and_not_guessed(folder):
    row = Row({**CLICK, "bbox": [28, 0, 56, 14]}, Origin("x", 1))
    with pytest.raises(ExampleError, match="no shares of the image"):
        TASKS["screenspot"].items(row)


def test_an_answer_that_is_no_option_is_named():
    with pytest.raises(ExampleError, match=r"answer 'Z' is none of its 2 options"):
        TASKS["mmlu_pro"].items(Row({"question": "Which?", "options": ["x", "y"], "answer": "Z"}, Origin("x", 1)))


@pytest.mark.parametrize("name", ["coco_8shot", "screen2words", "widgetcap"])
def test_captions_are_scored_over_all_that_was_asked(name):
    task = TASKS[name]
    captions = ["a red cat sits on a mat", "two dogs run on the beach", "a man rides a horse"]
    items = [
        task.items(
            Row(
                {"id": n, "answer": [text, f"{text} today"], "captions": [text, f"{text} today"], **IMAGE}
                | {"screenId": n, "bbox": [0.1, 0.1, 0.5, 0.5]},
                Origin("x", n),
            )
        )[0]
        for n, text in enumerate(captions)
    ]
    scores = METRICS["cider"].scores(
        [Answered(i, f"{t}\nmore", "first_line") for i, t in zip(items, captions, strict=True)]
    )
    assert all(score.value > 0.5 for score in scores)


def test_the_authors_lines_of_charades_sta(tmp_path):
    (tmp_path / "charades_sta_test.txt").write_text(
        "3MSZA 24.3 30.4##person turn a light on.\n\nAB 0.0 5.5##a person sits.\n"
    )
    task = TASKS["charades_sta"]
    rows = Rows(task.files, tmp_path, task.name)
    items = [task.items(rows[n])[0] for n in range(len(rows))]
    assert [(item.group, item.gold, item.answer) for item in items] == [
        ("3MSZA", [24.3, 30.4], "[00:24, 00:30]"),
        ("AB", [0.0, 5.5], "[00:00, 00:05]"),
    ]
    assert "description: person turn a light on." in shown(items[0].content)
    assert items[0].content[0].file == "3MSZA.mp4"


def test_a_region_of_a_question_is_told_in_the_form_of_the_model(folder):
    row = Row(ALL["lvis_ref_box"][0], Origin(str(folder / "data.json"), 1), "json", str(folder))
    (item,) = TASKS["lvis_ref_box"].items(row)
    assert (
        shown(item.content)
        == "<image>Is the object [0.5, 0.0, 1.0, 0.5] of the image a bow (ribbons) or a traffic light?"
    )
    (flipped,) = TASKS["lvis_ref_box"].items(Row(row.values, Origin(row.origin.file, 2), "json", str(folder)))
    assert "a traffic light or a bow" in shown(flipped.content)
    (point,) = TASKS["lvis_ref_point"].items(row)
    assert "object [0.714, 0.214] of" in shown(point.content)
    example = prompt(TASKS["lvis_ref_box"], item)
    for form, words in (("json", "object [28, 0, 56, 14] of"), ("ferret", "object [500, 0, 999, 500] of")):
        client = EndpointClient(Endpoint("http://127.0.0.1:1/v1", "x"), boxes=Boxes(form, factor=28, min_pixels=784))
        (message,), _ = client._messages(example)
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
        assert words in message["content"][1]["text"]
    assert [type(part) for part in with_regions("Is [0.1, 0.2, 0.3, 0.4] it?")] == [Text, ObjectBox, Text]


def test_captions_of_flickr_and_their_boxes_are_joined(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "caption": "Two men near a bus.", "sentence_id": n} for n in (1, 2)]
    boxes = [
        {"image_id": 2, "bbox": [0, 0, 10, 10], "tokens_positive": [[0, 7]]},
        {"image_id": 2, "bbox": [20, 5, 10, 10], "tokens_positive": [[0, 7]]},
        {"image_id": 2, "bbox": [1, 2, 3, 4], "tokens_positive": [[13, 18]]},
    ]
    values = {"images": images, "annotations": boxes}
    (tmp_path / "final_flickr_mergedGT_test.json").write_text(json.dumps(values))
    task = TASKS["flickr30k_test"]
    rows = Rows(task.files, tmp_path, task.name)
    assert [len(task.items(rows[n])) for n in range(len(rows))] == [0, 2]
    first, second = task.items(rows[1])
    assert (first.gold, second.gold) == ([0, 0, 30, 15], [1, 2, 4, 6])
    assert shown(second.content).endswith('Where in the image is "a bus"?')
    assert first.group == second.group


def test_demonstrations_in_context_are_those_of_the_question():
    rng = np.random.default_rng(0)
    rows = [
        Row({"id": n, "image": ["a.png"], "question": "?", "answer": [n + 1, n - 1, n]}, Origin("x", n))
        for n in range(6)
    ]
    (item,) = TASKS["vl_icl_operator_induction"].items(Row(ALL["vl_icl_operator_induction"][0], Origin("x", 1)))
    found = TASKS["vl_icl_operator_induction"].demonstrate(item, rows, rng, 4)
    assert len({one.id for one in found}) == 4
    assert all(one.answer == one.id for one in found), "of an x, the third of the answers"
    (item,) = TASKS["vl_icl_open_mi"].items(Row(ALL["vl_icl_open_mi"][0], Origin("x", 1)))
    found = TASKS["vl_icl_open_mi"].demonstrate(item, rows, rng, 1)
    assert sorted(one.answer for one in found) == ["blicket", "dax"]
    pair = {"image": ["a.png", "a.png"], "question": ""}
    both = {"id": 1, "same": {**pair, "answer": "yes"}, "diff": {**pair, "answer": "no"}}
    pairs = [Row(both, Origin("x", 1), media="there")]
    found = TASKS["vl_icl_matching_mi"].demonstrate(item, pairs, rng, 1)
    assert [one.answer for one in found] == ["yes", "no"]
    conversation = prompt(TASKS["vl_icl_matching_mi"], item, found)
    images = list(conversation.images)
    assert [(part.index, part.folder) for part in images] == [(n, "there" if n < 4 else None) for n in range(5)]


def test_an_element_is_told_where_the_view_hierarchy_has_it(folder):
    row = Row(ALL["taperception"][0], Origin(str(folder / "x.csv"), 1), "json", str(folder))
    (item,) = TASKS["taperception"].items(row)
    text = shown(item.content)
    assert text == "<image>Can the element [0.5, 0.0, 1.0, 0.5] of this screen of a mobile app be tapped?"
    assert (item.gold, item.facts, item.group) == (["yes"], {"positive": True}, "7")
    for change, problem in (({"object_id": "ffff"}, "has no element ffff"), ({"img_id": "8"}, r"8\.json is not there")):
        with pytest.raises(ExampleError, match=problem):
            TASKS["taperception"].items(Row({**row.values, **change}, row.origin, "json", str(folder)))


def test_f1_is_that_of_the_elements_that_can_be_tapped():
    def answers(pairs):
        return [
            Scored(str(n), 0, value, "ok", "stop", "", {}, {"positive": positive})
            for n, (positive, value) in enumerate(pairs)
        ]

    mixed = [(True, 1.0)] * 6 + [(True, 0.0)] * 2 + [(False, 0.0)] + [(False, 1.0)] * 5
    precision, recall = 6 / 7, 6 / 8
    assert SUMMARIES["f1"](answers(mixed)) == pytest.approx(2 * precision * recall / (precision + recall))
    assert SUMMARIES["f1"](answers([(False, 1.0)])) == 0


def test_a_screen_of_ferret_ui_asks_and_answers_with_boxes_in_pixels(folder):
    record = ALL["ferret_ui_ref_iphone"][0]
    (item,) = TASKS["ferret_ui_ref_iphone"].items(Row(record, Origin(str(folder / "OCR.json"), 1), "json", str(folder)))
    assert shown(item.content) == "<image>What's the UI type of the widget [0.5, 0.0, 1.0, 0.5]?"
    assert item.categories == {"category": "ocr"}
    unlabelled = {name: value for name, value in record.items() if name != "label"}
    with pytest.raises(ExampleError, match="no answer"):
        TASKS["ferret_ui_ref_iphone"].items(Row(unlabelled, Origin("ocr.json", 1), "json", str(folder)))
    with pytest.raises(ExampleError, match="0 boxes of the answer, not one"):
        TASKS["ferret_ui_grd_iphone"].items(Row(record, Origin("find_icons.json", 1), "json", str(folder)))


def test_files_of_ferret_ui_lie_beside_their_pictures(tmp_path, folder):
    phone = tmp_path / "ferretui" / "iphone"
    (phone / "images").mkdir(parents=True)
    (phone / "images" / "a.png").write_bytes(png())
    for name in ("ocr", "find_text"):
        record = ALL["ferret_ui_ref_iphone" if name == "ocr" else "ferret_ui_grd_iphone"][0]
        (phone / f"{name}.json").write_text(json.dumps([record]))
    for task in (TASKS["ferret_ui_ref_iphone"], TASKS["ferret_ui_grd_iphone"]):
        rows = Rows(task.files, tmp_path, task.name)
        (item,) = [item for n in range(len(rows)) for item in task.items(rows[n])]
        assert item.content[0].folder == str(phone / "images")


def test_frames_of_a_folder_are_a_video_and_files_are_found_in_the_form_that_is_there(folder, tmp_path):
    row = Row(ALL["llava_hound_msvd"][0], Origin(str(folder / "x.jsonl"), 1), "hub", str(folder))
    (item,) = TASKS["llava_hound_msvd"].items(row)
    assert [frame.rpartition("_")[2] for frame in item.content[0].frames] == ["0001.jpeg", "0002.jpeg", "0010.jpeg"]
    assert item.content[0].file is None
    assert item.facts["caption"] == "A red cat sits."
    (tmp_path / "v_a.mkv").touch()
    given = Row({"video_name": "v_a", "other": "v_b.c"}, Origin("x", 1), "hub", str(tmp_path))
    assert given.video("video_name", suffix=".mp4").file == "v_a.mkv"
    assert given.video("other", suffix=".mp4").file == "v_b.c.mp4"
    (tmp_path / "v_c").mkdir()
    with pytest.raises(ExampleError, match="holds no frames"):
        Row({"video": "v_c"}, Origin("x", 1), "hub", str(tmp_path)).video("video")


def test_two_questions_with_one_answer_are_a_pair_in_both_forms_of_their_files():
    task = TASKS["vcgbench_consistency"]
    official = {"video_name": "v_a", "Q1": "What sits?", "Q2": "Who is sitting?", "A": "a cat"}
    pair = task.items(Row(official, Origin("consistency_qa.json", 1), "json", "x"))
    halves = [
        task.items(Row({"video_name": "v_a", "answer": "a cat", "question_1": "None", "question_2": "None", **own}, o))[
            0
        ]
        for own, o in (({"question_1": "What sits?"}, Origin("x", 1)), ({"question_2": "Who sits?"}, Origin("x", 2)))
    ]
    for items in (pair, halves):
        assert len({item.group for item in items}) == 1
        assert len({item.id for item in items}) == 2
        assert all(item.content[0].file == "v_a.mp4" for item in items)
