"""The tasks that come with jvlm; one file for each group of alike tasks, and the suites of papers."""

from __future__ import annotations

from collections.abc import Mapping

from jvlm.evaluation.task import Task
from jvlm.evaluation.tasks import (
    base_models,
    conversations,
    documents,
    general,
    gui,
    in_context,
    reasoning,
    referring,
    screens,
    text,
    video,
)

TASKS: tuple[Task, ...] = (
    *general.TASKS,
    *documents.TASKS,
    *gui.TASKS,
    *referring.TASKS,
    *screens.TASKS,
    *video.TASKS,
    *conversations.TASKS,
    *reasoning.TASKS,
    *text.TASKS,
    *base_models.TASKS,
    *in_context.TASKS,
)

_MIMO = """
mmmu_val mmmu_pro_standard mmmu_pro_vision mmbench_en_test mmbench_cn_test mantis mme_realworld mme_realworld_cn ai2d
blink_val cv_bench vibe_eval vl_rewardbench vstar vlms_are_blind pixmo_count countbench refcoco_val refcoco_plus_val
refcocog_val chartqa charxiv_reasoning charxiv_descriptive docvqa_val infovqa_val seedbench_2_plus ocrbench
visualwebbench websrc_val screenspot screenspot_v2 screenspot_pro screenspot_pro_cn osworld_g videomme video_mmmu
egoschema charades_sta gpqa_diamond supergpqa drop mmlu_pro ifeval olympiadbench mathvision mathverse_vision_only
dynamath wemath logicvista mathvista_testmini math500 aime24 aime25
"""

# Suites of papers: their score is the plain mean over their tasks, as MM1.5's category averages are (arXiv 2409.20566).
SUITES: Mapping[str, tuple[str, ...]] = {
    "mimo_vl": tuple(_MIMO.split()),
    "idefics2_base": ("vqav2_8shot", "textvqa_8shot", "okvqa_8shot", "coco_8shot"),
    "idefics2_instruct": ("mmmu_val", "mathvista_testmini", "textvqa", "mmbench_en_dev", "docvqa_val", "vqav2_val"),
    "mm1_5_general": ("mme", "seedbench_img", "pope", "llava_wild", "mmvet", "realworldqa"),
    "mm1_5_text_rich": ("wtq", "tabfact", "ocrbench", "chartqa", "textvqa", "docvqa_val", "infovqa_val"),
    "mm1_5_knowledge": ("ai2d", "scienceqa_img", "mathvista_testmini", "mmmu_val"),
    "mm1_5_grounding": (
        *(task.name for task in gui.TASKS if task.group == "grounding"),
        *("flickr30k_test", "lvis_ref_box", "lvis_ref_point", "ferret_bench"),
    ),
    "mm1_5_multi_image": ("qbench2", "mantis", "nlvr2", "blink_val", "mvbench", "muirbench"),
    "mm1_5_in_context": tuple(task.name for task in in_context.TASKS),
    "mm1_5_video": ("nextqa_mc", "intentqa", "activitynetqa", "videomme", "egoschema"),
    "mm1_5_vcgbench": tuple(task.name for task in conversations.TASKS if task.name.startswith("vcgbench")),
    "mm1_5_llava_hound": tuple(task.name for task in conversations.TASKS if task.name.startswith("llava_hound")),
    "mm1_5_ui": ("screen2words", "widgetcap", *(task.name for task in screens.TASKS)),
}
# what a paper averages over suites: MM1.5's MMBase
MEANS_OF_SUITES: Mapping[str, tuple[str, ...]] = {
    "mm1_5_base": ("mm1_5_general", "mm1_5_text_rich", "mm1_5_knowledge"),
}
