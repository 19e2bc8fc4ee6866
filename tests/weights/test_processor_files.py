"""Settings of pictures and videos: read where transformers reads them, with its pixels; the rest is refused."""

import json
import shutil
import warnings

import numpy as np
import pytest
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import jvlm
from jvlm.errors import UserError
from jvlm.weights import hf
from tests import idefics2, support

FLAT, NESTED, VIDEO = "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"
QWEN = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
IDEFICS2 = {"image_processor_type": "Idefics2ImageProcessor", "processor_class": "Idefics2Processor"}
SMALL = {"size": {"shortest_edge": 42, "longest_edge": 112}}
PICTURES = [support.picture(150, 90), support.picture(140, 84, 1), support.picture(30, 65, 2)]


@pytest.fixture(scope="module")
def idefics2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics2")
    idefics2.write_folder(folder, split=False)
    return folder


@pytest.fixture
def lay(tiny, idefics2_folder, tmp_path):
    """Makes a folder with these processor files and no others."""

    def make(files, *, family="qwen"):
        folder = tmp_path / "folder"
        shutil.copytree(tiny.folder if family == "qwen" else idefics2_folder, folder)
        for name in (FLAT, NESTED, VIDEO):
            (folder / name).unlink(missing_ok=True)
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values))
        return folder

    return make


def read(folder):
    """(model configuration, processor), without the weights."""
    config = hf.read_config(folder)
    return config, hf.load_processor(folder, config)


def normalised(patches, encoder):
    """float64 pixels [n, channel, ...] of patches, as the device makes them."""
    mean, std = (np.asarray(v)[:, None] for v in (encoder.image_mean, encoder.image_std))
    return (patches.reshape(len(patches), 3, -1) / 255 - mean) / std


def assert_qwen_pixels(folder, pictures):
    config, processor = read(folder)
    for picture in pictures:
        theirs = Qwen2VLImageProcessorPil.from_pretrained(str(folder))([picture], return_tensors="np")
        media = processor.image_processor.image(picture, processor.image_config)
        t, h, w = theirs["image_grid_thw"][0]
        assert media.grid == (t, h // 2, w // 2)
        ours = normalised(media.patches, config.encoder).reshape(len(media.vision_index), -1)
        expected = theirs["pixel_values"].reshape(len(media.vision_index), -1)
        np.testing.assert_allclose(ours[media.vision_index], expected, rtol=1e-5, atol=1e-5)


def assert_idefics2_pixels(folder, pictures):
    config, processor = read(folder)
    for picture in pictures:
        theirs = Idefics2ImageProcessorPil.from_pretrained(str(folder))([[picture]], return_tensors="np")
        media = processor.image_processor.image(picture, processor.image_config)
        frames = list(zip(theirs["pixel_values"][0], theirs["pixel_attention_mask"][0], strict=True))
        assert media.segment_ids[-1] == len(frames)
        for number, (pixels, mask) in enumerate(frames, 1):
            h, w = (int(n) // 14 for n in (mask[:, 0].sum(), mask[0].sum()))
            cells = (
                pixels[:, : h * 14, : w * 14].reshape(3, h, 14, w, 14).transpose(1, 3, 0, 2, 4).reshape(h * w, 3, -1)
            )
            ours = normalised(media.patches[media.segment_ids == number], config.encoder)
            np.testing.assert_allclose(ours, cells.reshape(h * w, 3, -1), rtol=1e-5, atol=1e-5)


# what changes pixels, of either family; the bytes 0 to 255 stay as they are in the last ones
PIXELS = [
    *({"resample": number} for number in range(6)),
    {"do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"rescale_factor": 1.0},
    {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    {"image_mean": 0.25, "image_std": 0.5},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    {"do_rescale": False, "do_normalize": False, "image_mean": [0.1, 0.2, 0.3]},
    {"do_convert_rgb": False, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "do_pad": False},
]
QWEN_SIZES = [
    {},
    {"min_pixels": None, "max_pixels": None, "size": None},
    {"max_pixels": 6272},
    {"min_pixels": 50176},
    {"size": {"shortest_edge": 784, "longest_edge": 7840}},
    {"size": {"shortest_edge": 784, "longest_edge": 7840}, "max_pixels": 3136},
    {"size": {"min_pixels": 1, "max_pixels": 2, "shortest_edge": 3}, "min_pixels": 784, "max_pixels": 7840},
    {"image_processor_type": "Qwen2VLImageProcessorFast"},
]


@pytest.mark.parametrize("file", [FLAT, NESTED])
@pytest.mark.parametrize("settings", [*PIXELS, *QWEN_SIZES], ids=str)
def test_pictures_of_qwen_have_the_pixels_of_transformers(lay, file, settings):
    values = {**QWEN, **settings}
    folder = lay({file: {"image_processor": values} if file == NESTED else values})
    assert_qwen_pixels(folder, PICTURES)


@pytest.mark.parametrize("file", [FLAT, NESTED])
@pytest.mark.parametrize(
    "settings",
    [
        *({**SMALL, "do_pad": True, **{k: v for k, v in s.items() if k != "do_pad"}} for s in PIXELS),
        {**SMALL, "do_image_splitting": True},
        {"size": {"shortest_edge": 84, "longest_edge": 98}, "do_image_splitting": True, "resample": 3},
        {"do_resize": False},
        {"do_resize": False, "do_image_splitting": True},
    ],
    ids=str,
)
def test_pictures_of_idefics2_have_the_pixels_of_transformers(lay, file, settings):
    values = {**IDEFICS2, **settings}
    folder = lay({file: {"image_processor": values} if file == NESTED else values}, family="idefics2")
    assert_idefics2_pixels(folder, [support.picture(150, 90), support.picture(56, 70, 1)])


@pytest.mark.parametrize("null", ["image_mean", "image_std", "resample", "rescale_factor", "size", "max_pixels"])
@pytest.mark.parametrize("file", [FLAT, NESTED])
def test_null_is_the_processor_s_own_value(lay, file, null):
    # as in transformers 4; 5 raises an error with the first picture
    folder = lay({file: {"image_processor": {**QWEN, null: None}} if file == NESTED else {**QWEN, null: None}})
    config, processor = read(folder)
    theirs = Qwen2VLImageProcessorPil(**QWEN)([PICTURES[0]], return_tensors="np")
    media = processor.image_processor.image(PICTURES[0], processor.image_config)
    ours = normalised(media.patches, config.encoder).reshape(len(media.vision_index), -1)[media.vision_index]
    np.testing.assert_allclose(ours, theirs["pixel_values"].reshape(ours.shape), atol=1e-5)


def test_pictures_that_are_not_resized_must_be_whole_patches(lay):
    folder = lay({FLAT: {**QWEN, "do_resize": False}})
    assert_qwen_pixels(folder, [support.picture(112, 84)])
    _, processor = read(folder)
    with pytest.raises(UserError, match=r"100 x 84 pixels are not whole patches of 28, and do_resize is off"):
        processor.pack([{"messages": [{"role": "user", "content": "<image>"}], "images": [support.picture(100, 84)]}])


def test_what_processor_config_json_nests_counts_before_the_other_files(lay):
    inner = {"image_processor": {**QWEN, "max_pixels": 12544, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    folder = lay({FLAT: {**QWEN, "max_pixels": 50176}, NESTED: inner})
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
    config, processor = read(folder)
    assert processor.image_config.max_pixels == theirs.size.longest_edge == 12544
    assert config.encoder.image_mean == theirs.image_mean
    assert_qwen_pixels(folder, PICTURES)


AREA = {"min_pixels": 784, "max_pixels": 7840}


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, (100352, 602112)),
        ({FLAT: QWEN}, (100352, 602112)),
        ({FLAT: {**QWEN, "min_pixels": 3136, "max_pixels": 50176}}, (3136, 50176)),
        ({FLAT: {**QWEN, "max_pixels": 200704}}, (100352, 200704)),
        ({FLAT: {**QWEN, "min_pixels": 3136, "max_pixels": 50176}, VIDEO: {}}, (100352, 602112)),
        ({FLAT: {**QWEN, "min_pixels": 3136, "max_pixels": 50176}, VIDEO: AREA}, (784, 7840)),
        ({FLAT: QWEN, VIDEO: {"min_pixels": 3136}, NESTED: {"video_processor": AREA}}, (784, 7840)),
        ({NESTED: {"image_processor": QWEN, "video_processor": {"size": {"shortest_edge": 784, "longest_edge": 7840}}}},
         (784, 7840)),
    ],
    ids=str,
)  # fmt: skip
def test_video_limits_come_from_the_first_of_three_places(lay, files, limits):
    _, processor = read(lay(files))
    assert (processor.image_config.video_min_pixels, processor.image_config.video_max_pixels) == limits


def test_the_frame_rate_is_read(lay):
    assert read(lay({FLAT: QWEN, VIDEO: {"fps": 4.0}}))[1].image_config.fps == 4.0


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ({"image_mean": [0.5] * 3}, r"mean of videos is \(0.5, 0.5, 0.5\), of images \(0.48"),
        ({"rescale_factor": 1.0}, "std of videos"),
        ({"resample": 2}, "resample of videos is 2, of images 3"),
        ({"do_resize": False}, "resize of videos is False"),
        ({"patch_size": 16}, "patch_size of videos is 16, of images 14"),
        ({"do_sample_frames": True}, "do_sample_frames is on"),
        ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame is on"),
        ({"video_processor_type": "Qwen3VLVideoProcessor"}, "video_processor_type is Qwen3VLVideoProcessor"),
    ],
)
def test_videos_that_would_be_made_otherwise_are_refused_and_pictures_are_not(lay, tmp_path, video, says):
    folder = lay({NESTED: {"image_processor": QWEN, "video_processor": {**video, **AREA}}})
    model, processor = jvlm.load(folder)
    jvlm.save(model, processor, tmp_path / "again")
    for source in (folder, tmp_path / "again"):
        processor = read(source)[1]
        picture = {"messages": [{"role": "user", "content": "<image>"}], "images": PICTURES[:1]}
        assert processor.pack([picture]).patches.size
        with pytest.raises(UserError, match=rf"processor_config.json, video_processor: .*{says}"):
            processor.pack([{"messages": [{"role": "user", "content": "<video>"}], "videos": [PICTURES[:1] * 2]}])


REFUSED = [
    ("qwen", {"resample": "bicubic"}, "resample is 'bicubic'"),
    ("qwen", {"resample": 9}, "resample is 9"),
    ("qwen", {"resample": True}, "resample is True"),
    ("qwen", {"do_normalize": "no"}, "do_normalize is 'no'"),
    ("qwen", {"do_resize": 1}, "do_resize is 1"),
    *(("qwen", {key: None}, f"{key} is None") for key in ("do_resize", "do_rescale", "do_normalize")),
    ("qwen", {"rescale_factor": 0}, "rescale_factor is 0"),
    ("qwen", {"rescale_factor": float("nan")}, "rescale_factor is nan"),
    ("qwen", {"image_std": [0.5, 0.5, 0]}, "image_std .* divided by 0"),
    ("qwen", {"image_mean": [0.5, 0.5]}, "image_mean is .* write 3 numbers"),
    ("qwen", {"image_mean": "clip"}, "image_mean is 'clip'"),
    ("qwen", {"patch_size": 16}, "patch_size is 16: .* the model has 14"),
    ("qwen", {"merge_size": 1}, "merge_size is 1: .* the model has 2"),
    ("qwen", {"temporal_patch_size": 1}, "temporal_patch_size is 1: .* the model has 2"),
    ("qwen", {"min_pixels": 50176, "max_pixels": 784}, "50176 exceeds the most, 784"),
    ("qwen", {"max_pixels": 0}, "max_pixels is 0"),
    ("qwen", {"max_pixels": "50176"}, "max_pixels is '50176'"),
    ("qwen", {"max_pixels": float("inf")}, "max_pixels is inf"),
    ("qwen", {"size": 224}, "size is 224"),
    ("qwen", {"size": {"shortest_edge": 784}}, "size is .*longest_edge must be"),
    ("qwen", {"size": {"height": 224, "width": 224}}, "size is .*height, width cannot be used"),
    ("qwen", {"size": {"min_pixels": 784, "max_pixels": 7840}}, "size is .*max_pixels, min_pixels cannot be used"),
    ("qwen", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'"),
    ("idefics2", {"size": {"height": 224, "width": 224}}, "size is .*height, width cannot be used"),
    ("idefics2", {"size": {"longest_edge": 980}}, "size is .*shortest_edge must be"),
    ("idefics2", {"do_image_splitting": "yes"}, "do_image_splitting is 'yes'"),
    (
        "idefics2",
        {"image_processor_type": "Idefics3ImageProcessor"},
        "image_processor_type is 'Idefics3ImageProcessor'",
    ),
]


@pytest.mark.parametrize("file", [FLAT, NESTED])
@pytest.mark.parametrize(("family", "settings", "says"), REFUSED, ids=str)
def test_a_setting_without_meaning_is_refused_with_its_key_and_file(lay, family, file, settings, says):
    values = {**(QWEN if family == "qwen" else IDEFICS2), **settings}
    folder = lay({file: {"image_processor": values} if file == NESTED else values}, family=family)
    with pytest.raises(UserError, match=rf"{file}.*: .*{says}"):
        jvlm.load(folder)


def test_another_number_of_image_tokens_than_the_model_s_is_refused(lay):
    folder = lay({FLAT: IDEFICS2, NESTED: {"image_seq_len": 64}}, family="idefics2")
    with pytest.raises(UserError, match=r"processor_config.json: image_seq_len is 64: .* the model has 4"):
        jvlm.load(folder)


@pytest.mark.parametrize("name", [FLAT, NESTED, VIDEO])
@pytest.mark.parametrize("text", ['{"min_pixels": 3136', "[1, 2]", "\udcff"])
def test_a_damaged_processor_file_is_named(lay, name, text):
    folder = lay({FLAT: QWEN})
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=name):
        jvlm.load(folder)


@pytest.mark.parametrize("file", [FLAT, VIDEO])
def test_an_edited_file_of_an_export_counts_and_the_difference_is_told(tiny, tmp_path, file):
    jvlm.save(tiny.model, tiny.processor, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jvlm.load(tmp_path)[1].config == tiny.processor.config
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**values, "max_pixels": 12544}))
    with pytest.warns(UserWarning, match=r"jvlm_processor.json differs from .*max_pixels: 50176 -> 12544"):
        _, processor = read(tmp_path)
    assert (processor.image_config.max_pixels if file == FLAT else processor.image_config.video_max_pixels) == 12544


SOURCES = {
    "4.x": {FLAT: {**QWEN, "max_pixels": 12544, "resample": 2}, VIDEO: {**AREA, "resample": 2}},
    "5.x": {NESTED: {"image_processor": {**QWEN, "max_pixels": 12544}, "video_processor": AREA, **QWEN}},
    "bytes": {FLAT: {**QWEN, "do_rescale": False, "do_normalize": False}},
    "not resized": {FLAT: {**QWEN, "do_resize": False}},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("into", [*SOURCES, "itself", "new"])
def test_an_export_over_an_older_folder_says_only_its_own_settings(lay, tmp_path, source, into):
    folder = lay(SOURCES[source])
    model, processor = jvlm.load(folder)
    target = folder if into == "itself" else tmp_path / "target"
    target.mkdir(exist_ok=True)
    for name, values in SOURCES.get(into, {}).items():
        (target / name).write_text(json.dumps(values))
    jvlm.save(model, processor, target)
    assert not (target / NESTED).exists()
    config, again = read(target)
    assert again.config == processor.config
    np.testing.assert_allclose(config.encoder.image_std, model.config.encoder.image_std, rtol=1e-12)
    assert_qwen_pixels(target, [support.picture(112, 84)])


@pytest.mark.parametrize("nested", [True, False])
def test_an_export_of_idefics2_says_only_its_own_settings(lay, tmp_path, nested):
    values = {**IDEFICS2, **SMALL, "do_image_splitting": True, "resample": 3}
    nest = {NESTED: {"image_processor": values, "image_seq_len": 4}}
    folder = lay(nest if nested else {FLAT: values}, family="idefics2")
    model, processor = jvlm.load(folder)
    (tmp_path / "target").mkdir()
    stale = {"image_processor": {**IDEFICS2, "do_image_splitting": False}, "chat_template": "stale"}
    (tmp_path / "target" / NESTED).write_text(json.dumps(stale))
    jvlm.save(model, processor, tmp_path / "target")
    assert read(tmp_path / "target")[1].config == processor.config
    assert_idefics2_pixels(tmp_path / "target", PICTURES[:1])
