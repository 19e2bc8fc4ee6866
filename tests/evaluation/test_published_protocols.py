"""The fifty tasks of MiMo-VL's report and Idefics2's four: metric, judge, runs, examples, lengths, published scores.

Tables 2 and 3 and section 4.1 of arXiv 2506.03569, and the prompts of its authors' fork of lmms-eval; table 8 of arXiv
2405.02246.
"""

from __future__ import annotations

import re

import pytest

from jvlm.data.content import Image, Text
from jvlm.evaluation import registry
from jvlm.evaluation.files import Rows
from jvlm.evaluation.prompting import prompt, shown
from jvlm.evaluation.run import Settings, _Demonstrations
from jvlm.evaluation.task import Item
from jvlm.evaluation.tasks import SUITES
from tests.evaluation.benchmarks import parquet, picture
from tests.support import ROOT

TASKS = registry.tasks()
# task, metric, judged, SFT, RL, Qwen2.5-VL of 7B or, of reasoning, 72B
TABLE = """
mmmu_val mmmu judged 64.6 66.7 58.6
mmmu_pro_standard choice - 45.2 46.2 34.7
mmmu_pro_vision choice - 39.4 40.3 29.4
mmbench_en_test choice - 84.5 84.4 83.5
mmbench_cn_test choice - 81.9 82.0 83.4
mantis maths_or_choice - 78.8 78.3 74.7
mme_realworld choice - 57.4 59.1 57.4
mme_realworld_cn choice - 55.0 55.5 51.2
ai2d choice - 83.2 83.5 83.9
blink_val choice - 62.5 62.4 56.4
cv_bench choice - 81.8 82.3 75.4
vibe_eval rouge_l judged 47.2 54.7 47.7
vl_rewardbench judgment - 61.9 62.7 47.3
vstar choice - 80.6 81.7 73.8
vlms_are_blind exact - 78.0 79.4 37.4
pixmo_count count - 79.4 79.4 60.7
countbench count - 87.0 90.4 74.1
refcoco_val box_iou50 - 85.7 89.6 87.1
chartqa relaxed judged 92.9 91.7 90.2
charxiv_reasoning exact_document judged 54.4 56.5 42.5
charxiv_descriptive exact_document judged 87.0 86.8 73.9
docvqa_val anls judged 95.2 95.7 95.5
infovqa_val anls judged 87.2 88.0 81.4
seedbench_2_plus choice - 71.9 72.4 70.7
ocrbench ocrbench judged 87.6 86.6 89.7
visualwebbench visualwebbench - 80.2 80.2 72.9
websrc_val squad_f1 - 96.5 95.3 94.6
screenspot point_in_box - 87.3 87.2 84.7
screenspot_v2 point_in_box - 89.5 90.5 88.0
screenspot_pro point_in_box - 39.9 41.9 29.0
osworld_g point_in_box - 54.7 56.1 37.5
videomme choice - 66.9 67.4 65.1
video_mmmu mmmu - 53.1 43.3 47.4
egoschema choice - 60.4 59.6 62.4
charades_sta temporal_iou - 38.5 50.0 43.6
gpqa_diamond choice - 56.3 58.3 30.3
supergpqa choice - 42.6 44.3 25.4
drop drop_f1 - 82.7 85.1 67.6
mmlu_pro choice - 59.8 64.8 48.7
ifeval ifeval - 75.3 75.9 75.1
olympiadbench maths - 59.4 59.4 37.2
mathvision maths_or_choice - 57.9 60.4 38.1
mathverse_vision_only maths_or_choice judged 67.1 71.5 57.6
dynamath dynamath - 46.9 45.9 38.1
wemath choice - 65.1 66.3 50.6
logicvista choice - 61.2 61.4 57.1
mathvista_testmini mathvista judged 81.8 81.5 74.8
math500 maths - 95.0 95.4 83.0
aime24 maths - 66.4 67.5 16.7
aime25 maths - 50.9 52.5 10.8
"""
ROWS = {line.split()[0]: line.split()[1:] for line in TABLE.split("\n") if line}
TEXT = ("gpqa_diamond", "supergpqa", "drop", "mmlu_pro", "ifeval", "math500", "aime24", "aime25")
# what the fork says after a question
LETTER = "Answer the question with option letter from given choices. Put your final answer within \\boxed{}."
SAYS = {
    "mmmu_val": LETTER,
    "mmbench_en_test": LETTER,
    "countbench": "Please count the objects by grounding. Put your answer in \\boxed{}.",
    "docvqa_val": "Put your final answer in \\boxed{}.",
    "chartqa": "Put your final answer in \\boxed{}.",
    "refcoco_val": 'Output a JSON in the format [{"bbox_2d": [...], "label": "{the_whole_description}"}, ...].',
    "screenspot": 'Output a JSON in the format [{"bbox_2d": [...], "label": "{the_whole_command}"}, ...].',
    "charades_sta": "The answer should be in the format [mm:ss, mm:ss] and placed in \\boxed{}.",
}


def test_the_suite_has_the_fifty_tasks_and_the_parts_that_they_are_means_of():
    assert len(ROWS) == 50
    parts = {"refcoco_plus_val", "refcocog_val", "screenspot_pro_cn"}
    assert set(SUITES["mimo_vl"]) == set(ROWS) | parts


@pytest.mark.parametrize("name", ROWS)
def test_a_task_has_the_metric_and_the_scores_of_the_report(name):
    metric, judged, *scores = ROWS[name]
    task = TASKS[name]
    assert (task.metric, "judged" if task.judge else "-") == (metric, judged)
    published = [
        next(score for model, score in task.published.items() if model.startswith(start))
        for start in ("MiMo-VL-7B-SFT", "MiMo-VL-7B-RL", "Qwen2.5-VL")
    ]
    assert published == [float(score) for score in scores]
    applied = Settings(style="boxed").applied(task)
    assert applied.decoding.max_new_tokens == 32768
    sampled = (0.6, 0.95) if name in TEXT else (0.0, 1.0)
    assert (task.decoding.temperature, task.decoding.top_p) == sampled
    assert task.runs == {"aime24": 32, "aime25": 32, "gpqa_diamond": 8, "ifeval": 8}.get(name, 1)
    assert task.shots == (3 if name == "drop" else 0)


@pytest.mark.parametrize("name", SAYS)
def test_the_boxed_style_says_what_the_authors_fork_does(name):
    item = Item("1", (Image("a.png"), Text("What?")), "A", boxed=None)
    (turn,) = prompt(TASKS[name], item, style="boxed").messages
    assert turn.text == f"What?\n{SAYS[name]}"
    open_item = Item("1", (Image("a.png"), Text("What?")), ["4"], boxed="Put your final answer in \\boxed{}.")
    (turn,) = prompt(TASKS["mmmu_val"], open_item, style="boxed").messages
    assert turn.text == "What?\nPut your final answer in \\boxed{}."


def test_idefics2_is_asked_after_eight_examples_of_other_images_as_one_text(tmp_path):
    assert SUITES["idefics2_base"] == ("vqav2_8shot", "textvqa_8shot", "okvqa_8shot", "coco_8shot")
    published = [TASKS[name].published["Idefics2-8B-base"] for name in SUITES["idefics2_base"]]
    assert published == [70.3, 57.9, 54.6, 116.0]
    assert all(TASKS[name].shots == 8 and not TASKS[name].turns for name in SUITES["idefics2_base"])
    task = TASKS["vqav2_8shot"]
    answers = [{"answer": word, "answer_id": n} for n, word in enumerate(["dog", "cat", "cat"])]
    rows = [
        {"question_id": n, "question": f"What is {n}?", "answers": answers, "image_id": n // 2, "image": picture(n)}
        for n in range(24)
    ]
    parquet(tmp_path / "lmms-lab" / "VQAv2" / "data" / "validation-00000-of-00001.parquet", rows)
    read = Rows(task.files, tmp_path, task.name)
    (item,) = task.items(read[4])
    shots = _Demonstrations(task, read, tmp_path).of(item)
    assert len({shot.id for shot in shots}) == 8
    assert not any(shot.group == item.group for shot in shots), "its own image answers for it"
    document = prompt(task, item, shots)
    text = shown(document.content)
    assert text.count("<image>Question: What is ") == 9
    assert text.count(" Answer: cat\n\n") == 8
    assert text.endswith("<image>Question: What is 4? Answer:")
    assert [part.index for part in document.images] == list(range(9))
    assert [one.id for one in _Demonstrations(task, read, tmp_path).of(item)] == [shot.id for shot in shots]


# the sets of the tables of MM1.5 (arXiv 2409.20566) and of Idefics2 beside those of MiMo-VL
MM1_5 = """MME; SEED-IMG; POPE; LLaVA-W; MM-Vet; RealWorldQA; WTQ; TabFact; OCRBench; ChartQA; TextVQA; DocVQA test;
InfoVQA test; AI2D; ScienceQA; MathVista; MMMU; RefCOCO; RefCOCO+; RefCOCOg; Flickr30k; LVIS-Ref; Ferret-Bench; QBench2;
Mantis; NLVR2; BLINK; MVBench; MuirBench; VL-ICL; NExTQA; IntentQA; ActivityNet-QA; VCGBench; LLaVA-Hound in domain;
LLaVA-Hound out of domain; VideoMME; EgoSchema; Screen2Words; WidgetCap; Taperception; Ref-i; Ref-A; Grd-i; Grd-A"""
IDEFICS2 = """VQAv2, 8 examples; TextVQA, 8 examples; OKVQA, 8 examples; COCO, 8 examples; MMMU; MathVista; TextVQA;
MMBench; DocVQA test; VQAv2 test-dev"""


def _table(section: str) -> dict[str, list[str]]:
    """Set -> tasks, of a table of the page."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line[:1] == "|"]
    head, rows = rows[0], rows[2:]
    named, task = head.index("set"), head.index("task")
    assert len({row[named] for row in rows}) == len(rows)
    return {row[named]: re.findall(r"`(\w+)`", row[task]) for row in rows}


def test_every_set_of_the_papers_has_its_task_or_a_reason_on_the_page(capsys):
    from jvlm import cli

    assert cli.main(["evaluate", "--list"]) == 0
    listed = set(re.findall(r"^  (\w+) ", capsys.readouterr().out, re.M))
    _, mimo, mm1_5, idefics2 = (ROOT / "docs" / "benchmarks_of_papers.md").read_text().split("\n## ")
    tables = [_table(section) for section in (mimo, mm1_5, idefics2)]
    assert all(tasks and set(tasks) <= listed for table in tables for tasks in table.values())
    assert len(tables[0]) == 50
    assert {task for tasks in tables[0].values() for task in tasks} == set(SUITES["mimo_vl"])
    for table, sets, prefix in ((tables[1], MM1_5, "mm1_5"), (tables[2], IDEFICS2, "idefics2")):
        assert set(table) == {one.strip() for one in sets.replace("\n", " ").split(";")}
        suites = {task for name, tasks in SUITES.items() if name.startswith(prefix) for task in tasks}
        assert {task for tasks in table.values() for task in tasks} == suites - {"flickr30k_val"}
