"""OpenAI's own client against the server."""

import openai
import pytest

from tests.server.scripted import MODEL

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]


@pytest.fixture
def served(serve):
    return serve("<think>hm</think>the answer is two.", reasoning="on")


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_models_chat_and_completions(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"top_k": 5, "min_p": 0.1})
    message = answer.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("the answer is two.", "hm", "hm")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=3).choices[0].text


def test_streams(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "the answer is two."
    assert chunks[-1].usage.total_tokens > 0
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "the answer is two."


def test_errors_are_those_of_its_classes(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert found.value.param == "temperature"


def test_responses(client):
    answer = client.responses.create(model=MODEL, input="hi", instructions="be short", store=False)
    assert (answer.output_text, answer.status) == ("the answer is two.", "completed")
    assert answer.output[0].type == "reasoning"
    with client.responses.stream(model=MODEL, input="hi") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "the answer is two."
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds
    assert "response.reasoning_text.delta" in kinds
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")
