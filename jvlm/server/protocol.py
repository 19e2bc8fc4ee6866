"""The bodies of requests. Unknown fields are accepted, as other servers do, and counted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]
# fields that change what is answered and that are not done here: ignoring them would be wrong
REFUSED = frozenset(
    "functions function_call best_of suffix use_beam_search prompt_embeds image_embeds audio chat_template tokenize "
    "documents logits_processors truncate_prompt_tokens web_search_options prediction".split()
)
# values of them that mean nothing
_NOTHING = (None, False, [], {}, "")


class Body(BaseModel):
    """A body of JSON."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def refused(self) -> list[str]:
        """Return the fields of the body that cannot be honoured."""
        extra = self.model_extra or {}
        names = [name for name in REFUSED if name in extra and extra[name] not in _NOTHING]
        return sorted(name for name in names if not (name == "best_of" and extra[name] == 1))

    def unknown(self) -> list[str]:
        """Return the other fields that are not read."""
        return sorted((self.model_extra or {}).keys() - REFUSED)


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(Body):
    """How answers are made, of every route that generates."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[str, Field(max_length=128)] | list[Annotated[str, Field(max_length=128)]] | None = None
    bad_words: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=256)] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    skip_special_tokens: bool = True
    logit_bias: Annotated[dict[str, Number], Field(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(max_length=128)] | None = None
    request_id: Annotated[str, Field(max_length=128)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    service_tier: str | None = None


class ChatMessages(BaseModel):
    """A conversation, of the routes that take one."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    images: list[Any] | None = None
    videos: list[Any] | None = None
    objects: dict[str, Any] | None = None


class ChatRequest(Sampling, ChatMessages):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    modalities: list[str] | None = None
    echo: bool = False


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = (
    str
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1, max_length=256)]
    | Annotated[list[Ids], Field(min_length=1, max_length=256)]
)


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: bool = True


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
    images: list[Any] | None = None
    videos: list[Any] | None = None
    objects: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class ResponsesRequest(Body):
    """POST /v1/responses, its stateless part."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    include: list[str] | None = None
    truncation: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None


class LoadAdapterRequest(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapterRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
