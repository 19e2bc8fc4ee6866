"""``jvlm serve`` as a process, and its options."""

import base64
import io
import json

import pytest

import jvlm
from jvlm.cli import deploy, serve
from jvlm.errors import UserError
from jvlm.inference import warm_up
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineStats
from jvlm.server.arguments import ServerArguments, engine_config, settings_of
from jvlm.server.progress import progress_line
from jvlm.server.settings import KeyLimits
from jvlm.swift import words as swift_words
from tests.data.video.test_reader import clip
from tests.families import qwen3_vl
from tests.server.process import ONE_AT_A_TIME, ServerProcess
from tests.support import GOLDEN, picture


@pytest.fixture
def started(monkeypatch):
    """(options of the model, settings) of each command that would start."""
    found = []

    def start(options, arguments, verb, words):
        settings = settings_of(arguments, name="dir", adapters=(), max_model_len=1)
        found.append((options, arguments, settings))
        return 0

    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(deploy, "start", start)
    return found


def test_options_have_the_names_of_vllm(started):
    words = "DIR --port 9 --served-model-name a b --lora x=y --allowed-media-domains a.example --limit-media image=3"
    serve.run([*words.split(), "--max-num-seqs=4", "--no-page"])
    ((options, arguments, settings),) = started
    assert (options.model, options.adapters, arguments.port, arguments.max_num_seqs) == ("DIR", ("x=y",), 9, 4)
    assert (settings.model_name, settings.aliases, settings.page) == ("a", ("b",), False)
    assert (settings.media.domains, settings.media.images, settings.media.videos) == (("a.example",), 3, 1)
    assert "127.0.0.1" in settings.hosts


def test_deploy_has_those_of_ms_swift(started):
    words = "--model DIR --host 0.0.0.0 --api_key secret-of-this-test --adapters x=y --max_pixels 100352"
    deploy.run(words.split())
    ((options, _, settings),) = started
    assert (options.adapters, options.images.max_pixels) == (("x=y",), 100352)
    assert settings.keys == (("api_key", "secret-of-this-test"),)
    assert settings.hosts == ()


def test_memory_keys_and_adapters_have_their_limits(started, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("ann a-key-of-twenty-letters\nroot another-key-of-letters\n")
    words = f"DIR --gpu-memory-utilization 0.8 --quantization int8 --compile_cache {tmp_path} --log-interval 5"
    more = f"--adapter-root {tmp_path} --admin root --api-key-file {keys} --api-key a-third-key-of-letters"
    limits = "--key-max-requests 2 --key-tokens-per-minute 1000 --key-media-mb-per-minute 3"
    serve.run(f"{words} {more} {limits} --max-loras 3 --data-parallel 1 --kv-cache-dtype fp8 --deterministic".split())
    ((options, arguments, settings),) = started
    assert (options.quantization, arguments.max_loras) == ("int8", 3)
    sizes = engine_config(arguments, on_cpu=False)
    assert (sizes.memory_fraction, sizes.kv_cache_dtype, sizes.deterministic) == (0.8, "float8_e4m3fn", True)
    assert (settings.admins, settings.adapter_root, settings.log_interval) == (("root",), str(tmp_path), 5)
    assert [name for name, _ in settings.keys] == ["api_key", "ann", "root"]
    assert settings.key_limits == KeyLimits(2, 1000, 3 * 2**20)


def test_a_cpu_has_programs_of_more_sizes_up_to_those_of_the_options():
    arguments = ServerArguments(max_num_batched_tokens=600, max_num_seqs=12)
    sizes = engine_config(arguments, on_cpu=True)
    assert (sizes.prefill_tokens, sizes.decode_slots) == ((64, 128, 256, 512, 600), (1, 8, 12))
    assert engine_config(arguments, on_cpu=False).prefill_tokens == (256, 600)


@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_a_cpu_compiles_at_most_forty_large_programs_whatever_the_context(tiny, monkeypatch, length):
    engine, found = (
        Engine(tiny.model, tiny.processor, engine_config(ServerArguments(max_model_len=length), on_cpu=True)),
        [],
    )
    monkeypatch.setattr(
        warm_up, "warm_up", lambda state, report: found.extend(name for name, *_ in warm_up._large(state))
    )
    engine.warm_up()
    assert len(found) == len(set(found)) <= 40
    assert {name.split()[0] for name in found} == {"encode", "prefill", "decode"}


def test_deploy_takes_the_names_that_ms_swift_gives_vllm(started, capsys):
    words = "--model DIR --infer_backend vllm --vllm_gpu_memory_utilization 0.7 --vllm_max_model_len 4096"
    deploy.run(
        f"{words} --vllm_max_num_seqs 8 --vllm_enforce_eager true --log_interval 20 --torch_dtype bfloat16".split()
    )
    ((options, arguments, _),) = started
    assert (arguments.memory_fraction, arguments.max_model_len, arguments.max_num_seqs) == (0.7, 4096, 8)
    assert options.param_dtype == "bfloat16"
    notes = capsys.readouterr().err
    assert "--vllm_enforce_eager has no use here" in notes
    assert "max_model_len" not in notes


def test_the_processes_of_several_engines_have_the_options_of_the_first():
    words = (
        "--model DIR --port 9 --host=0.0.0.0 --data-parallel 2 --served-model-name a b --limit-media image=3".split()
    )
    kept = swift_words.without(words, ("host", "port", "data_parallel_size"))
    assert kept == "--model DIR --served-model-name a b --limit-media image=3".split()


def test_the_line_of_the_log_has_what_was_done_meanwhile():
    before = EngineStats(generation_tokens=100, prompt_tokens=50, prefix_cache_queries=40, prefix_cache_hits=10)
    after = EngineStats(
        generation_tokens=2100, prompt_tokens=550, prefix_cache_queries=80, prefix_cache_hits=30, num_requests_running=3
    )
    line = progress_line(before, after, 2.0)
    assert "250 tokens/s of prompts (50% cached), 1,000 tokens/s generated; 3 running, 0 waiting" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("DIR --kv-cache-dtype int3", "fp8_e5m2"),
        ("DIR --adapter-root DIR", "--max_loras"),
        ("DIR --admin nobody", "no key has this name"),
        ("DIR --adapter-root DIR --max-loras 1 --api-key a-key-of-twenty-letters", "--admin NAME"),
        ("DIR --backends http://127.0.0.1:1", "models of their own"),
        ("DIR --data-parallel 0", "--data_parallel_size"),
        ("DIR --host 0.0.0.0", "--api-key-file"),
        ("DIR --limit-media x", "image=16"),
        ("DIR --lora x", "NAME=FOLDER"),
        ("DIR --max-queue 0", "--max_queue"),
        ("--port 1", "--model"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(started, words, said):
    with pytest.raises(UserError, match=said):
        serve.run(words.split())
    assert started == []


def _data(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.slow
def test_images_videos_and_tools_of_qwen3_vl_are_answered_as_without_a_server(tmp_path, tokenizer_folder):
    tiny = qwen3_vl.Tiny.create(tmp_path / "model", tokenizer_folder, "qwen3_vl")
    settings = json.loads((tiny.folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (GOLDEN / "chat_templates/qwen3_vl.jinja").read_text()
    (tiny.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, processor = jvlm.load(tiny.folder)
    image, film = io.BytesIO(), clip(tmp_path / "film.mp4")
    picture(96, 64).save(image, "PNG")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    parts = {
        "image": {"type": "image_url", "image_url": {"url": _data("image/png", image.getvalue())}},
        "video": {"type": "video_url", "video_url": {"url": _data("video/mp4", film.read_bytes())}},
    }
    examples = {
        "image": {"messages": [{"role": "user", "content": "<image>what is it?"}], "images": [picture(96, 64)]},
        "video": {"messages": [{"role": "user", "content": "<video>what is it?"}], "videos": [str(film)]},
        "tools": {"messages": [{"role": "user", "content": "what is it?"}], "tools": json.dumps(tools)},
    }
    prompts = {name: processor.encode(example, generation_prompt=True) for name, example in examples.items()}
    expected = jvlm.generate(model, processor, list(examples.values()), max_new_tokens=8, temperature=0.0)
    words = {"type": "text", "text": "what is it?"}
    with ServerProcess(tiny.folder, sizes=ONE_AT_A_TIME) as server:
        for (name, prompt), text in zip(prompts.items(), expected, strict=True):
            fields = {"tools": tools} if name == "tools" else {}
            content = [parts[name], words] if name in parts else "what is it?"
            answer = server.chat(content, max_tokens=8, **fields).json()
            assert answer["usage"]["prompt_tokens"] == prompt.length, name
            assert (answer["choices"][0]["message"]["content"] or "").strip() == text.strip(), name
