"""Adapters by the names of models, and those that come and go while the server runs."""

import pytest

import jvlm
from jvlm.adapters.attach import attach
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.several import AdapterRoom
from jvlm.errors import UserError
from jvlm.inference.adapter_slots import AdapterSlots
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig
from jvlm.server.adapters import AdapterAdmin
from tests.adapters.random_adapter import random_adapter
from tests.server.scripted import MODEL, Served

KEYS = (("ann", "a-key-of-twenty-letters"), ("root", "another-key-of-letters"))
ROOT = {"authorization": f"Bearer {KEYS[1][1]}"}
SIZES = EngineConfig(max_slots=2, max_model_len=128, prefill_tokens=(64,), encode_patches=(256,), decode_slots=(2,))
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def weights(tiny):
    return {"cats": random_adapter(tiny.model, 1, rank=4), "dogs": random_adapter(tiny.model, 2, rank=8)}


@pytest.fixture(scope="module")
def root(tiny, weights, tmp_path_factory):
    """A folder with adapters below it, and one that is wider than there is room for."""
    top = tmp_path_factory.mktemp("adapters")
    for name, one in {**weights, "wide": random_adapter(tiny.model, 3, rank=16)}.items():
        write_peft(one, tiny.model.config, top / "some" / name)
    (top / "outside").mkdir()
    return top


@pytest.fixture(scope="module")
def served(tiny, root):
    """A server with a place for two adapters, of which one is there from the beginning."""
    with _served(tiny, root) as server:
        yield server


@pytest.fixture(scope="module")
def warm(tiny, root):
    """The same with all its programs compiled."""
    with _served(tiny, root, warm=True) as server:
        yield server


def _served(tiny, root, warm=False):
    slots = AdapterSlots(tiny.model, {"cats": str(root / "some/cats")}, places=2, room=AdapterRoom(8))
    engine = Engine(slots.model, tiny.processor, SIZES)
    if warm:
        engine.warm_up()
    options = {"adapters": ("cats",), "keys": KEYS, "admins": ("root",), "adapter_root": str(root / "some")}

    def admin(service):
        return AdapterAdmin(service, slots, engine.load)

    return Served(engine, tiny.processor, vocabulary=352, max_model_len=128, admin=admin, **options)


def text(served, model):
    body = {"model": model, "messages": [{"role": "user", "content": "what?"}], "temperature": 0, "max_tokens": 8}
    answer = served.post("/v1/chat/completions", body, headers=ROOT)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def names(served):
    return [card["id"] for card in served.get("/v1/models", headers=ROOT).json()["data"]]


@pytest.mark.slow
def test_adapters_come_and_go_without_a_compilation_and_answer_as_alone(warm, tiny, weights):
    served = warm
    example = {"messages": [{"role": "user", "content": "what?"}]}
    alone = {
        name: jvlm.generate(attach(tiny.model, one), tiny.processor, [example], max_new_tokens=8)[0]
        for name, one in weights.items()
    }
    base = jvlm.generate(tiny.model, tiny.processor, [example], max_new_tokens=8)[0]
    assert len({base, *alone.values()}) == 3
    assert (text(served, MODEL), text(served, "cats")) == (base, alone["cats"])
    loaded = served.post(LOAD, {"lora_name": "dogs", "lora_path": "dogs"}, headers=ROOT)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'dogs' added successfully.")
    assert names(served) == [MODEL, "cats", "dogs"]
    assert (text(served, "dogs"), text(served, "cats"), text(served, MODEL)) == (alone["dogs"], alone["cats"], base)
    assert served.post(LOAD, {"lora_name": "more", "lora_path": "dogs"}, headers=ROOT).status_code == 400
    assert served.post(UNLOAD, {"lora_name": "cats"}, headers=ROOT).status_code == 200
    gone = served.post("/v1/chat/completions", {"model": "cats", "messages": example["messages"]}, headers=ROOT)
    assert gone.status_code == 404
    # the name comes back with another adapter: nothing of the old one is in a cache
    assert served.post(LOAD, {"lora_name": "cats", "lora_path": "dogs"}, headers=ROOT).status_code == 200
    assert text(served, "cats") == alone["dogs"]
    assert served.post(UNLOAD, {"lora_name": "dogs"}, headers=ROOT).status_code == 200
    assert (text(served, "cats"), text(served, MODEL)) == (alone["dogs"], base)
    assert served.engine.stats().compilations_after_ready == 0
    assert 'adapters="cats"' in served.get("/metrics", headers=ROOT).text


def test_only_named_keys_load_and_only_from_below_the_folder(served, root):
    ann = {"authorization": f"Bearer {KEYS[0][1]}"}
    body = {"lora_name": "new", "lora_path": "dogs"}
    assert served.post(LOAD, body, headers=ann).status_code == 403
    assert served.post(UNLOAD, {"lora_name": "cats"}, headers=ann).status_code == 403
    assert served.post(LOAD, body).status_code == 401
    paths = ("../some/../outside", str(root / "outside"), "/etc", "absent", "dogs\0", ".")
    texts = {served.post(LOAD, {**body, "lora_path": path}, headers=ROOT).text for path in paths}
    assert len(texts) == 1
    assert "no adapter below" in texts.pop()
    wide = served.post(LOAD, {**body, "lora_path": "wide"}, headers=ROOT)
    assert (wide.status_code, "rank 16" in wide.text, str(root) in wide.text) == (400, True, False)
    assert served.post(LOAD, {**body, "lora_name": MODEL}, headers=ROOT).status_code == 400
    assert served.post(UNLOAD, {"lora_name": "new"}, headers=ROOT).status_code == 404


def test_without_the_operator_there_is_no_such_route(serve):
    assert serve().post(LOAD, {"lora_name": "a", "lora_path": "a"}).status_code == 404


def test_more_adapters_than_places_and_those_that_do_not_fit_are_refused(tiny, root, tmp_path):
    two = {name: str(root / "some" / name) for name in ("cats", "dogs")}
    with pytest.raises(UserError, match="2 adapters are given and --max_loras is 1"):
        AdapterSlots(tiny.model, two, places=1, room=AdapterRoom(8))
    with pytest.raises(UserError, match="rank 8, and room is kept for rank 4"):
        AdapterSlots(tiny.model, two, places=2, room=AdapterRoom(4))
    write_peft(random_adapter(tiny.model, 4, rank=4, use_dora=True), tiny.model.config, tmp_path / "dora")
    write_peft(random_adapter(tiny.model, 5, ("qkv",), rank=4), tiny.model.config, tmp_path / "tower")
    tower = {"tower": str(tmp_path / "tower")}
    with pytest.raises(UserError, match=r"a target encoder\..*, and room is kept for decoder"):
        AdapterSlots(tiny.model, tower, places=1, room=AdapterRoom(8))
    AdapterSlots(tiny.model, tower, places=1, room=AdapterRoom.of_model(8, towers=True))
    with pytest.raises(UserError, match="for which no room is kept"):
        AdapterSlots(tiny.model, {"dora": str(tmp_path / "dora")}, places=1, room=AdapterRoom(8))
