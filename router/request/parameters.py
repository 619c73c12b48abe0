"""Parameters of a request that travel to the backend, by OpenAI's names, and their valid values. No I/O.

The model `Parameters` is the one list of them: to each field belong a capability, a field of the backend and
a line of the documents, which tests check.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import Self

MAX_TOOLS = 128
MAX_STOPS = 4
MAX_PAIRS = 16  # of metadata, as in OpenAI's API
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
_SEED_LIMIT = 2**63

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Penalty = Annotated[_Number, Field(ge=-2, le=2)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=MAX_STOPS),
]


class _Part(BaseModel):
    """Part of a parameter; unknown keys are passed on."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Function(_Part):
    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(_Part):
    type: Literal["function"]
    function: _Function


class _ToolName(_Part):
    name: str = Field(pattern=_NAME)


class _ToolChoice(_Part):
    type: Literal["function"]
    function: _ToolName


class JsonSchema(_Part):
    """Named JSON schema of an answer."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """Format of an answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and is needed there")
        return self


class Parameters(BaseModel):
    """Validated parameters; `None` counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEED_LIMIT, lt=_SEED_LIMIT)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[_Number, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[_Number, Field(ge=-100, le=100)]] | None = None
    stop: Stops | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[_Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    service_tier: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_PAIRS),
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _tools_are_given(self) -> Self:
        if self.tool_choice is not None and not self.tools and self.tool_choice not in {"none", "auto"}:
            raise ValueError("tool_choice needs tools")
        return self
