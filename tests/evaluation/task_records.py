"""A record of every task's files in its true form, with a right and a wrong answer.

Fields are those that the tasks' own code, lmms-eval 0.7 or VLMEvalKit read.
"""

from __future__ import annotations

import base64
from typing import Any

from jvlm.evaluation import registry
from tests.evaluation.benchmarks import picture, png

TASKS = registry.tasks()
IMAGE = {"image": picture()}
B64 = base64.b64encode(png()).decode()
ABCD = {"A": "red", "B": "blue", "C": "green", "D": "black"}
CHOICE = {"question": "Which?", "options": ["red", "blue"], "answer": "B", **IMAGE}
OPEN = {"question": "What?", "answer": "cat", **IMAGE}
TEN = [{"answer": "cat", "answer_id": n} for n in range(10)]
CLICK = {"instruction": "press", **IMAGE}
BOX = '[{"bbox_2d": [30, 2, 50, 10], "label": "x"}]'
FAR = '[{"bbox_2d": [0, 20, 4, 24], "label": "x"}]'
REFER = {"question_id": "1", "answer": ["the cat", "a cat"], "bbox": [30, 2, 20, 8], **IMAGE}
PROBLEM = {"id": "1", "question": "Sum?", "answer": "7", "options": [], "subject": "algebra", "level": 1}

# task -> (record, right answer, wrong answer, form of its files)
RECORDS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "mmmu_val": (
        {"id": "validation_Art_1", "question": "See <image 1>?", "options": "['red', 'blue']", "answer": "B"}
        | {"question_type": "multiple-choice", "image_1": picture()},
        "(B)",
        "(A)",
        "hub",
    ),
    "mmmu_pro_standard": (
        {"id": "test_Art_1", "question": "<image 1> which?", "options": "['red', 'blue']", "answer": "B"}
        | {"image_1": picture(), "subject": "Art"},
        "B",
        "A",
        "hub",
    ),
    "mmmu_pro_vision": (
        {"id": "1", "options": "['red', 'blue']", "answer": "B", "subject": "Art", **IMAGE},
        "B",
        "A",
        "hub",
    ),
    "mmbench_en_test": (
        {"index": 1, "question": "Which?", "hint": "Look.", **ABCD, "answer": "B", "category": "c", **IMAGE},
        "B. blue",
        "A",
        "hub",
    ),
    "mantis": ({**CHOICE, "question_type": "multi-choice", "images": [picture(), picture(1)]}, "B", "A", "hub"),
    "mme_realworld": (
        {"index": 1, "question": "Which?", "multi-choice options": ["(A) red", "(B) blue"], "answer": "B"}
        | {"bytes": B64, "category": "c"},
        "B",
        "A",
        "hub",
    ),
    "ai2d": ({"question": "How many?", "options": ["2", "1", "0"], "answer": "2", **IMAGE}, "C", "A", "hub"),
    "blink_val": (
        {"idx": "1", "prompt": "Which? (A) red (B) blue", "choices": ["red", "blue"], "answer": "(B)"}
        | {"sub_task": "Counting", "image_1": picture(), "image_2": picture(1)},
        "(B)",
        "A",
        "hub",
    ),
    "cv_bench": (
        {
            "idx": 1,
            "type": "2D",
            "task": "Count",
            "question": "Which?",
            "choices": ["1", "2"],
            "answer": "(B)",
            **IMAGE,
        },
        "B",
        "A",
        "hub",
    ),
    "vibe_eval": (
        {"example_id": "1", "category": "hard", "prompt": "Tell.", "reference": "a red cat", **IMAGE},
        "a red cat",
        "xyz",
        "hub",
    ),
    "vl_rewardbench": (
        {"id": "wildvision-1", "query": "Which?", "response": ["good", "bad"], "human_ranking": [0, 1], **IMAGE},
        "Hm. **Overall Judgment: Answer 2 is better.**",
        "Overall Judgment: Answer 1 is better.",
        "hub",
    ),
    "vstar": (
        {"question_id": "1", "text": "Which?\n(A) red\n(B) blue", "label": "B", "category": "c", **IMAGE},
        "B",
        "A",
        "hub",
    ),
    "vlms_are_blind": ({"prompt": "Count.", "groundtruth": "3", "task": "t", **IMAGE}, "{3}", "{4}", "hub"),
    "pixmo_count": ({"question": "How many?", "answer": 3, **IMAGE}, "There are three.", "2", "hub"),
    "countbench": ({"question": "How many?", "number": 3, **IMAGE}, "3", "3 or 4", "hub"),
    "mme": (
        {"question_id": "a.png", "question": "Is it?", "answer": "Yes", "category": "color", **IMAGE},
        "Yes.",
        "No",
        "hub",
    ),
    "seedbench_img": (
        {"question_id": "1", "question": "Which?", "choice_a": "red", "choice_b": "blue", "answer": "B"}
        | {"data_type": "image", "image": [picture()]},
        "B",
        "A",
        "hub",
    ),
    "pope": ({"question": "Is it?", "answer": "no", "category": "random", **IMAGE}, "No, there is none", "yes", "hub"),
    "realworldqa": ({"question": "Which? A. x B. y", "answer": "B", **IMAGE}, "B", "A", "hub"),
    "scienceqa_img": (
        {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": "h", "subject": "s", **IMAGE},
        "B",
        "A",
        "hub",
    ),
    "muirbench": ({**CHOICE, "idx": "1", "image_list": [picture(), picture(1)], "task": "t"}, "B", "A", "hub"),
    "nlvr2": (
        {"uid": "1", "question": "Both are red.", "answer": "True", "left_image": picture(), "right_image": picture(1)},
        "true",
        "false",
        "hub",
    ),
    "mmvet": (
        {"question_id": "1", "question": "Tell.", "answer": "a red cat", "capability": "ocr", **IMAGE},
        "a red cat",
        "x",
        "hub",
    ),
    "llava_wild": (
        {"question_id": 1, "question": "Tell.", "gpt_answer": "a red cat", **IMAGE},
        "a red cat",
        "x",
        "hub",
    ),
    "docvqa_val": (
        {"questionId": "1", "question": "What?", "answers": ["cat"], "docId": 3, **IMAGE},
        "Cat",
        "x",
        "hub",
    ),
    "infovqa_val": (
        {"index": "1", "question": "What?", "answer": "['cat', 'a cat']", "image": B64},
        "a cat",
        "x",
        "tsv",
    ),
    "chartqa": ({"question": "How much?", "answer": "100", "type": "human_test", **IMAGE}, "104", "106", "hub"),
    "charxiv_reasoning": (
        {"figure_path": "a.jpg", "reasoning_q": "What?", "reasoning_a": "Cat", "reasoning_q_source": 1, **IMAGE},
        "cat.",
        "x",
        "hub",
    ),
    "charxiv_descriptive": ({"index": 1, "question": "What?", "answer": "cat", "image": B64}, "Cat", "x", "tsv"),
    "seedbench_2_plus": (
        {"question_id": "1", "question": "Which?", "choice_A": "red", "choice_B": "blue", "answer": "B"}
        | {"question_image_type": "map", **IMAGE},
        "B",
        "A",
        "hub",
    ),
    "ocrbench": (
        {"dataset": "HME100k", "question": "Write it.", "question_type": "Handwritten", "answer": ["x^2"], **IMAGE},
        "x ^ 2",
        "X^2",
        "hub",
    ),
    "ocrbench_v2": (
        {"id": 1, "dataset_name": "d", "type": "key information extraction en", "question": "Give JSON.", **IMAGE}
        | {"answers": ["{'total': ['12.50', '$12.50'], 'date': ['May 1']}"], "eval": "None"},
        '{"total": "$ 12.50", "date": "may 1"}',
        '{"total": "13", "other": "x"}',
        "hub",
    ),
    "visualwebbench": (
        {"id": "1", "task_type": "action_ground", "instruction": "go", "options": ["a", "b"], "answer": 1, **IMAGE},
        "B",
        "A",
        "hub",
    ),
    "websrc_val": (
        {"id": "1", "question": "What?", "answer": "red cat", "domain": "d", "page_id": "1", "image": B64},
        "the red cat",
        "dog",
        "hub",
    ),
    "textvqa": (
        {"question_id": 1, "question": "What?", "answers": ["cat"] * 10, "image_id": "a", **IMAGE},
        "cat",
        "x",
        "hub",
    ),
    "tabfact": ({"id": 1, "statement": "so", "label": 1, "image": "a.png"}, "Yes", "no", "json"),
    "wtq": ({"id": 1, "question": "What?", "answers": ["cat", "1,200"], "image": "a.png"}, "1200, Cat", "cat", "json"),
    "screenspot": ({**CLICK, "bbox": [0.5, 0.0, 1.0, 0.5], "data_type": "icon", "data_source": "ios"}, BOX, FAR, "hub"),
    "screenspot_v2": (
        {"img_filename": "a.png", "bbox": [28, 0, 28, 14], "instruction": "press", "data_type": "icon"},
        BOX,
        FAR,
        "json",
    ),
    "screenspot_pro": (
        {"id": "1", "img_filename": "a.png", "bbox": [28, 0, 56, 14], "instruction": "press", "instruction_cn": "an"},
        BOX,
        FAR,
        "hub",
    ),
    "osworld_g": (
        {"id": "1", "box_type": "polygon", "box_coordinates": [28, 0, 56, 0, 56, 14, 28, 14], **CLICK},
        "[40, 6]",
        "[2, 2]",
        "hub",
    ),
    "refcoco_val": (REFER, "[30, 2, 50, 10]", f"{BOX} [0, 0, 5, 5]", "hub"),
    "videomme": (
        {"videoID": "abc", "question_id": "1-1", "question": "Which?", "options": ["A. red", "B. blue"], "answer": "B"}
        | {"duration": "short", "domain": "d", "task_type": "t"},
        "B",
        "A",
        "hub",
    ),
    "video_mmmu": (
        {"id": "dev_Art_1", "question": "Which?", "options": ["red", "blue"], "answer": "B"}
        | {"question_type": "multiple-choice"},
        "B",
        "A",
        "hub",
    ),
    "egoschema": (
        {"question_idx": "1", "video_idx": "abc", "question": "Which?", "option": ["A. red", "B. blue"], "answer": "1"},
        "B",
        "A",
        "hub",
    ),
    "charades_sta": (
        {"video": "abc", "caption": "a person sits", "timestamp": [60.0, 70.0]},
        "[01:00, 01:10]",
        "[00:00, 00:10]",
        "hub",
    ),
    "mvbench": (
        {"video": "a.mp4", "question": "Which?", "candidates": ["red", "blue"], "answer": "blue"},
        "B",
        "A",
        "json",
    ),
    "nextqa_mc": (
        {"video": "1", "question": "Which?", "options": ["red", "blue"], "answer": 1, "type": "C"},
        "B",
        "A",
        "hub",
    ),
    "activitynetqa": (
        {"video_name": "a", "question_id": "1", "question": "What?", "answer": "cat", "type": "1"},
        "cat",
        "x",
        "hub",
    ),
    "gpqa_diamond": (
        {"Record ID": "r", "Question": "Which?", "Correct Answer": "blue", "Incorrect Answer 1": "red"}
        | {"Incorrect Answer 2": "green", "Incorrect Answer 3": "black"},
        "\\boxed{blue}",
        "\\boxed{red}",
        "json",
    ),
    "supergpqa": (
        {"uuid": "1", "question": "Which?", "options": ["red", "blue"], "answer_letter": "B"},
        "B",
        "A",
        "hub",
    ),
    "drop": (
        {"section_id": "s", "query_id": "q", "passage": "P.", "question": "How many?"}
        | {"answers_spans": {"spans": ["4", "four"], "types": ["number", "number"]}},
        "4",
        "5",
        "hub",
    ),
    "mmlu_pro": (
        {"question_id": 1, "question": "Which?", "options": ["red", "blue"], "answer": "B", "category": "law"},
        "\\boxed{B}",
        "\\boxed{A}",
        "hub",
    ),
    "ifeval": (
        {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "no comma",
        "one, comma",
        "hub",
    ),
    "math500": (
        {"unique_id": "u", "problem": "Sum?", "answer": "\\frac{1}{2}", "subject": "a", "level": 1},
        "\\boxed{0.5}",
        "\\boxed{2}",
        "hub",
    ),
    "aime24": ({"id": 1, "problem": "Sum?", "answer": "204"}, "\\boxed{204}", "\\boxed{205}", "hub"),
    "aime25": ({"id": "1", "problem": "Sum?", "answer": "70"}, "\\boxed{70}", "\\boxed{71}", "hub"),
    "olympiadbench": (
        {"id": 1, "question": "Sum of <image_1>?", "final_answer": ["$7$"], "image_1": picture(), "subject": "Math"},
        "\\boxed{7}",
        "\\boxed{8}",
        "hub",
    ),
    "mathvision": ({**PROBLEM, "image": "images/1.jpg", "decoded_image": picture()}, "\\boxed{7}", "\\boxed{8}", "hub"),
    "mathverse_vision_only": (
        {"sample_index": "1", "problem_version": "Vision Only", "question": "", "query_cot": "Solve.", "answer": "B"}
        | {"question_type": "multi-choice", **IMAGE},
        "\\boxed{B}",
        "\\boxed{A}",
        "hub",
    ),
    "dynamath": (
        {"id": "5", "question": "Sum?", "ground_truth": "1.5", "answer_type": "float", "decoded_image": picture()},
        "\\boxed{1.5004}",
        "\\boxed{1.6}",
        "hub",
    ),
    "wemath": (
        {"ID": "1", "key": "2steps_multi", "question": "Which?", "option": "A. 1; B. 2", "answer": "B"}
        | {"image_path": picture()},
        "\\boxed{B}",
        "\\boxed{A}",
        "hub",
    ),
    "logicvista": (
        {"question": "Which?", "answer": "A, C", "skill": ["inductive"], **IMAGE},
        "\\boxed{A, C}",
        "\\boxed{A}",
        "hub",
    ),
    "mathvista_testmini": (
        {"pid": "1", "query": "Sum?", "question": "Sum?", "question_type": "free_form", "answer_type": "float"}
        | {"precision": 1.0, "answer": "1.2", "choices": None, "decoded_image": picture(), "metadata": {"task": "t"}},
        "\\boxed{1.21}",
        "\\boxed{1.3}",
        "hub",
    ),
    "vqav2_8shot": (
        {"question_id": 1, "question": "What?", "answers": TEN, "image_id": 1, **IMAGE},
        " cat\nQuestion: more",
        "dog",
        "hub",
    ),
    "textvqa_8shot": ({"question_id": 1, "question": "What?", "answers": ["cat"] * 10, **IMAGE}, "cat", "x", "hub"),
    "okvqa_8shot": ({"question_id": 1, "question": "What?", "answers": ["cat"] * 10, **IMAGE}, "cat", "x", "hub"),
    "qbench2": (
        {"id": "1", "question": "Which is sharper?", "option0": "The first", "option1": "The second", "option2": "N/A"}
        | {"option3": "N/A", "correct_choice": "B", "image1": picture(), "image2": picture(1)},
        "B",
        "A",
        "hub",
    ),
    "intentqa": (
        {"video_id": "12", "question": "why?", "answer": "1", "qid": "3", "type": "CW"}
        | {f"a{n}": f"reason {n}" for n in range(5)},
        "B",
        "A",
        "json",
    ),
    "flickr30k_test": (
        {"id": 7, "file_name": "a.png", "caption": "Two men near a bus.", "original_img_id": 5, "sentence_id": 1}
        | {"annotations": [{"bbox": [28, 0, 28, 14], "tokens_positive": [[0, 7]]}]},
        "[28, 0, 40, 14] [40, 0, 56, 14]",
        FAR,
        "json",
    ),
    "lvis_ref_box": (
        {"id": 1, "image_path": "coco/val2017/a.png", "name": "bow_(ribbons)", "neg_class": "traffic_light"}
        | {"synonyms": ["bow_(ribbons)", "knot"], "width": 56, "height": 28, "bbox_norm": [0.5, 0, 1, 0.5]}
        | {"sample_point": [40, 6]},
        "It is a Bow.",
        "A bow, not a traffic light",
        "json",
    ),
    "ferret_bench": (
        {"question_id": 0, "category": "refer_desc", "question": "What is at [0.500, 0.000, 1.000, 0.500]?", **IMAGE}
        | {"gpt_answer": "a red cat"},
        "a red cat",
        "x",
        "hub",
    ),
    "vqav2_val": (
        {"question_id": 1, "question": "What?", "answers": TEN, "image_id": 1, "answer_type": "other", **IMAGE},
        "cat",
        "dog",
        "hub",
    ),
    "taperception": (
        {"img_id": "7", "object_id": "baf602f", "label": "0", "raters_marked_tappable": "5", "split": "test"},
        "Yes.",
        "No",
        "json",
    ),
    "ferret_ui_ref_iphone": (
        {"id": 0, "image": "a.png", "image_h": 28, "image_w": 56, "box_x1y1x2y2": [[[28, 0, 56, 14]], []]}
        | {"conversations": [{"from": "human", "value": "<image>\nWhat's the UI type of the widget <bbox_location0>?"}]}
        | {"label": "Button"},
        "button.",
        "a button or a tab",
        "json",
    ),
    "ferret_ui_grd_iphone": (
        {"id": 0, "image": "a.png", "image_h": 28, "image_w": 56, "box_x1y1x2y2": [[], [[28, 0, 56, 14]]]}
        | {
            "conversations": [
                {"from": "human", "value": "<image>\nWhere is the Games Tab located?"},
                {"from": "gpt", "value": "<bbox_location0>"},
            ]
        },
        "[30, 2, 50, 14]",
        FAR,
        "json",
    ),
    "vcgbench_correctness": (
        {"video_name": "v_a", "question_id": "1", "question": "What happens?", "answer": "a red cat sits"},
        "a red cat sits",
        "x",
        "hub",
    ),
    "vcgbench_consistency": (
        {"video_name": "v_a", "question_1": "None", "question_2": "What sits?", "answer": "a red cat"},
        "a red cat",
        "x",
        "hub",
    ),
    "llava_hound_msvd": (
        {"id": "8467_2_0", "video": "/elsewhere/frames/v1", "caption": "A red cat sits."}
        | {
            "conversations": [
                {"from": "human", "value": "<video>\nWhat sits?"},
                {"from": "gpt", "value": "A red cat sits."},
            ]
        },
        "a red cat sits",
        "x",
        "hub",
    ),
    "vl_icl_open_mi": (
        {"id": "q1", "image": ["a.png"], "question": "This is a", "answer": "dax", "classes": ["dax", "blicket"]}
        | {"support": {"dax": {"images": ["a.png"]}, "blicket": {"images": ["a.png"]}}},
        "Dax.",
        "blicket",
        "hub",
    ),
    "vl_icl_operator_induction": (
        {"id": "q1", "image": ["a.png"], "question": "What is the result?", "answer": 12, "operator": "x"},
        "12",
        "7",
        "hub",
    ),
    "vl_icl_matching_mi": (
        {"id": "q1", "image": ["a.png", "a.png"], "question": "", "answer": "yes"},
        "Yes",
        "no",
        "hub",
    ),
}
SAME = {
    "mmbench_en_test": ("mmbench_cn_test", "mmbench_en_dev", "mmbench_cn_dev"),
    "mme_realworld": ("mme_realworld_cn",),
    "screenspot_pro": ("screenspot_pro_cn",),
    "flickr30k_test": ("flickr30k_val",),
    "lvis_ref_box": ("lvis_ref_point",),
    "ferret_ui_ref_iphone": ("ferret_ui_ref_android",),
    "ferret_ui_grd_iphone": ("ferret_ui_grd_android",),
    "vcgbench_correctness": ("vcgbench_detail", "vcgbench_context", "vcgbench_temporal"),
    "llava_hound_msvd": tuple(n for n in TASKS if n.startswith("llava_hound") and n != "llava_hound_msvd"),
    "vl_icl_operator_induction": ("vl_icl_operator_induction_interleaved", "vl_icl_clevr", "vl_icl_textocr"),
    "refcoco_val": tuple(n for n in TASKS if n.startswith("refcoco") and n != "refcoco_val"),
}
# tasks whose files' names say what is in them
FILES = {"ferret_ui_ref": "ocr_test.json", "ferret_ui_grd": "find_text.json"}
ALL = {**RECORDS, **{name: RECORDS[like] for like, names in SAME.items() for name in names}}
