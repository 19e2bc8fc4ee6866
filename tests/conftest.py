"""Fixtures of the whole suite. Shape annotations of jvlm and its kernels are checked in every test."""

import gc
import logging
import os
import tempfile

from tests import compilation

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# no test reaches the Hub; those of downloads have a server of their own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compilation.FAST}".strip()
# Tests start processes and build the same small models again and again: each program is compiled once. The workers
# of a session inherit the folder of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="jvlm-test-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

from jaxtyping import install_import_hook

from tests import shape_checks

# Before anything imports jvlm: the hooks rewrite modules as they are loaded. The first checks array annotations, in all
# modules that have any (in the others it would only cost time); the second, which comes before it, all annotations.
_ALL_ANNOTATIONS = "layers vlm presets registry encoders connectors decoders".split()
install_import_hook(shape_checks.annotated_modules(), f"{shape_checks.__name__}.check_arrays")
install_import_hook([*(f"jvlm.models.{name}" for name in _ALL_ANNOTATIONS), "jvlm_kernels"], "beartype.beartype")

import fsspec
import pytest
import torch

from tests import support
from tests.bucket import Bucket

torch.set_num_threads(1)
# JAX, torch and transformers hold half a million objects; looking through them for garbage took a tenth of the time.
gc.set_threshold(20_000, 20, 20)

# Files that take longest, in that order. They begin first, so that no worker is left alone with one of them at the end.
LONGEST = """
parallel/test_hosts kernels/test_segment_attention training/test_train parallel/test_meshes tools/test_plan
parallel/test_adapters server/test_process data/test_soak rl/test_processes rl/test_meshes server/test_hostile
preference/test_rlhf server/test_front tools/test_plan_adapters models/test_mm1_5 weights/test_real_backbones
kernels/test_block_pairs kernels/test_hopper kernels/test_compile kernels/test_decode
kernels/test_linear_cross_entropy kernels/test_grouped_matmul models/test_packed_sequences models/test_cross_attention
adapters/test_training adapters/test_several training/test_checkpoint test_job training/test_nonfinite
inference/test_command_line test_wheel adapters/test_golden training/test_resume training/test_mixtures
training/test_held_out training/test_frozen adapters/test_experts data/test_check data/test_copied
training/test_trainer parallel/test_recipes kernels/test_sharding
""".split()


def pytest_collection_modifyitems(items):
    folder = support.ROOT / "tests"
    gone = [name for name in LONGEST if not (folder / f"{name}.py").is_file()]
    if gone:
        raise pytest.UsageError(f"tests/conftest.py: LONGEST names files that do not exist: {', '.join(gone)}")
    order = {folder / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    # of flax's own annotations, which beartype reads along with ours
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
    # of huggingface_hub's own, which hands bytes to its client as the older one took them
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning:httpx")
    # what Orbax leaves behind where a test damaged its files: reads that nobody waits for any more
    left = "(?s)Exception ignored in.*(_read_array_index_and_device_put|Event loop is closed)"
    config.addinivalue_line("filterwarnings", f"ignore:{left}:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _children_without_torch(request):
    """Processes that tests start have no torch, as users have none: transformers would import it, which takes seconds.

    `make test` puts without_torch.pth among the environment's packages, which reads the variable. Those of `every_*.py`
    ask other libraries, which need torch.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name.startswith("every_"):
            yield
            return
        patch.setenv("JVLM_TESTS_WITHOUT_TORCH", "1")
        patch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a small byte-level BPE tokenizer of the Qwen2 kind."""
    return support.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer_folder):
    """A random checkpoint with its own head, loaded in transformers and in jvlm."""
    return support.Tiny.create(tmp_path_factory.mktemp("tiny"), tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory, tokenizer_folder):
    """As `tiny`, with the head tied to the embedding and other sizes."""
    return support.Tiny.create(
        tmp_path_factory.mktemp("tied"),
        tokenizer_folder,
        tie_word_embeddings=True,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        rope_theta=640000.0,
        vision_config={"depth": 2, "fullatt_block_indexes": [0], "window_size": 56},
    )


@pytest.fixture(scope="session")
def bucket_server():
    """gs://bucket on this machine, for gcsfs and tensorstore of this process and of those it starts."""
    with Bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        # no listing of one test's bucket is known to the next; gcsfs keeps one for each thread
        patch.setitem(fsspec.config.conf, "gs", {"use_listings_cache": False})
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns at each request that nobody is logged in
        yield bucket


@pytest.fixture
def bucket(bucket_server):
    """The same, empty."""
    bucket_server.objects.clear()
    yield bucket_server
    assert bucket_server.unknown == []
