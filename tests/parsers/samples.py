"""For each of vLLM's parsers, an answer in its model's format, as the parser's source describes it.

They contain what breaks when a parser gets several tokens at once: characters of several bytes, nested objects, text
that begins like a marker, and a second call if the format allows one.
"""

# ruff: noqa: RUF001 (models have such characters in their markers)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# The calls that the answers make.
FIRST = '{"city": "Zürich", "days": 3, "options": {"units": ["°C", "m/s"], "exact": true}}'
SECOND = '{"city": "東京", "days": 1}'
TEXT = "Let me look."
REASONING = "Hm, 3 days < 4: is it {cold}?"
PLAIN = "1, 2, 3: Zürich, 東京 😀 and then some. One more, and that is all of it, 7 8 9."
# A request with this seed gets this answer, without any other field.
PLAIN_SEED = 4711
ANSWER = "Yes, 5 °C <b>or</b> less."

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "options": {"type": "object"},
                },
                "required": ["city", "days"],
            },
        },
    }
]

# Tokens of these models' own vocabularies, each of them one token here too. Special ones are left out of an answer's
# text unless the parser asks for them.
SPECIAL_TOKENS = [
    *("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
    *("<|action_start|>", "<|action_end|>", "<|plugin|>", "<|python_tag|>", "<|tool_call|>"),
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|message_model|>", "<|content_text|>", "<|content_thinking|>", "<|content_invoke_tool_json|>"),
    *("<|content_model_end_sampling|>", "<|end_message|>", "<|content_invoke_tool_text|>", "<|content_tool_error|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    *("<|tool_call_argument_begin|>", "<|open|>", "<|close|>", "<|sep|>"),
    *("<|tool_call_start|>",),
    *("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
    *(
        "<｜tool_calls_begin｜>",
        "<｜tool_calls_end｜>",
        "<｜tool_call_begin｜>",
        "<｜tool_call_end｜>",
        "<｜tool_sep｜>",
    ),
    *("<|message_sep|>", "<|role_sep|>", "<|function_call|>"),
    *("<assistant>", "<|tools_prefix|>", "<|tools_suffix|>"),
]
TOKENS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<tool_sep>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<response>", "</response>", "<0x0A>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    *("｜DSML｜", "<dots_function_call>", "</dots_function_call>", "<longcat_tool_call>", "</longcat_tool_call>"),
    *("<start_function_call>", "<end_function_call>", "<escape>", "<function_call>"),
    *("<ifm|think>", "</ifm|think>", "<ifm|tool_calls>", "</ifm|tool_calls>", "<ifm|tool_call>", "</ifm|tool_call>"),
    *("<ifm|arg_key>", "</ifm|arg_key>", "<ifm|arg_value>", "</ifm|arg_value>", "<ifm|arg_type>", "</ifm|arg_type>"),
    *("<ifm|think_fast>", "</ifm|think_fast>", "<ifm|think_faster>", "</ifm|think_faster>"),
    *("<minimax:tool_call>", "</minimax:tool_call>", "]<]minimax[>[", "<mm:think>", "</mm:think>"),
    *("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
    *("<|plamo:begin_", "<|plamo:end_", ":plamo|>", "<|plamo:constrain|>", "<|plamo:msg|>", "<|plamo:tag|>"),
    *("<|python_start|>", "<|python_end|>", "Ġ</", "</", "think"),
    # Words of samples, which would be tokens of a letter or two each.
    *("weather", "function", "parameter", "argument", "options", "invoke", "units", "exact", "name", "city", "days"),
    *("true", "string", "steptml", "plamo", "tool", "call", "begin", "end", "_value", "_key"),
]
RESPONSE_TEMPLATE = {
    "start_anchor": "<|im_start|>assistant<|im_sep|>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
# One of the parsers knows its markers by these numbers.
HUNYUAN_THINK, HUNYUAN_ANSWER = [14023, 771, 397], [198, 524, 27963, 397, 27, 9399, 397]
HUNYUAN_END = [198, 524, 9399, 29]
VOCABULARY = 28_032


@dataclass(frozen=True)
class Sample:
    """An answer, and additional fields of its request.

    Attributes:
        answer: its text, or a list of texts and token ids.
        request: fields of the request.
    """

    answer: str | list[str | int]
    request: dict[str, Any] = field(default_factory=dict)


def _named(arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "weather", "{key}": {arguments}}}'


def _both(around: str = "{}", key: str = "arguments", between: str = "\n") -> str:
    return between.join(around.replace("{}", _named(arguments, key)) for arguments in (FIRST, SECOND))


def _parameters(form: str) -> list[str]:
    """The arguments of the first call and those of the second, each written in this form: NAME, VALUE, STRING, TYPE."""
    units = '{"units": ["°C", "m/s"], "exact": true}'
    calls = [[("city", "Zürich"), ("days", "3"), ("options", units)], [("city", "東京"), ("days", "1")]]
    types = {"city": "string", "days": "number", "options": "object"}
    return [
        "".join(
            form.replace("NAME", name)
            .replace("VALUE", value)
            .replace("STRING", str(name == "city").lower())
            .replace("TYPE", types[name])
            for name, value in call
        )
        for call in calls
    ]


def _calls(form: str, parameter: str, between: str = "\n") -> str:
    """Both calls in this form, which holds PARAMETERS."""
    return between.join(form.replace("PARAMETERS", parameters) for parameters in _parameters(parameter))


_QWEN = _calls(
    "<tool_call>\n<function=weather>\nPARAMETERS</function>\n</tool_call>", "<parameter=NAME>\nVALUE\n</parameter>\n"
)
# vLLM holds the model to this form, without line breaks.
_GLM = _calls("<tool_call>weatherPARAMETERS</tool_call>", "<arg_key>NAME</arg_key><arg_value>VALUE</arg_value>")
_HERMES = _both("<tool_call>\n{}\n</tool_call>")
_PYTHONIC = (
    'weather(city="Zürich", days=3, options={"units": ["°C", "m/s"], "exact": True}), weather(city="東京", days=1)'
)
_DSML = _calls(
    '<｜DSML｜invoke name="weather">\nPARAMETERS</｜DSML｜invoke>',
    '<｜DSML｜parameter name="NAME" string="STRING">VALUE</｜DSML｜parameter>\n',
)
_M3 = "]<]minimax[>["


def _plamo(arguments: str) -> str:
    return (
        "<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>weather<|plamo:end_tool_name:plamo|>"
        "<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>"
        f"{arguments}<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>"
    )


def _kimi_k3() -> str:
    form = '<|open|>call tool="weather" index="1"<|sep|>PARAMETERS<|close|>call<|sep|>'
    parameter = '<|open|>argument key="NAME" type="TYPE"<|sep|>VALUE<|close|>argument<|sep|>'
    calls = _calls(form, parameter, "").replace('index="1"', 'index="2"').replace('index="2"', 'index="1"', 1)
    return f"<|open|>response<|sep|>{TEXT}<|close|>response<|sep|><|open|>tools<|sep|>{calls}<|close|>tools<|sep|>"


def _muse() -> str:
    call = '<atem:invoke name="weather">\nPARAMETERS</atem:invoke>'
    calls = _calls(call, '<atem:parameter name="NAME">VALUE</atem:parameter>\n')
    return f" to=weather<|message|><atem:function_calls>\n{calls}\n</atem:function_calls><|eot|>"


_GEMMA = "<|tool_call>call:weather{ARGUMENTS}<tool_call|>"
_GEMMA_FIRST = 'city:<|"|>Zürich<|"|>,days:3,options:{units:[<|"|>°C<|"|>,<|"|>m/s<|"|>],exact:true}'

TOOL_SAMPLES = {
    "apertus": Sample(f'{TEXT}<|tools_prefix|>[{{"weather": {FIRST}}}, {{"weather": {SECOND}}}]<|tools_suffix|>'),
    "deepseek_v3": Sample(
        f"{TEXT}<｜tool▁calls▁begin｜>"
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{FIRST}\n```<｜tool▁call▁end｜>\n"
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{SECOND}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": Sample(
        f"{TEXT}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{FIRST}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{SECOND}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v32": Sample(f"{TEXT}\n\n<｜DSML｜function_calls>\n{_DSML}\n</｜DSML｜function_calls>"),
    "deepseek_v4": Sample(f"{TEXT}\n\n<｜DSML｜tool_calls>\n{_DSML}\n</｜DSML｜tool_calls>"),
    "deepseek_v41": Sample(
        f"{TEXT}\n\n<｜DSML｜ calls>\n"
        + _DSML.replace("｜DSML｜invoke", "｜DSML｜ invoke").replace("｜DSML｜parameter", "｜DSML｜ parameter")
        + "\n</｜DSML｜ calls>"
    ),
    "dots": Sample(
        f"{TEXT}<dots_function_call>\n"
        + _calls('<invoke name="weather">\nPARAMETERS</invoke>', '<parameter name="NAME">VALUE</parameter>\n')
        + "\n</dots_function_call>"
    ),
    "ernie45": Sample(f"{TEXT}\n{_HERMES}"),
    "functiongemma": Sample(
        _calls(
            "<start_function_call>call:weather{PARAMETERS}<end_function_call>", "NAME:<escape>VALUE<escape>,", ""
        ).replace(",}", "}")
    ),
    "gemma4": Sample(
        TEXT + _GEMMA.replace("ARGUMENTS", _GEMMA_FIRST) + _GEMMA.replace("ARGUMENTS", 'city:<|"|>東京<|"|>,days:1')
    ),
    "gigachat3": Sample(f"{TEXT}<|function_call|>{_named(FIRST)}"),
    "glm45": Sample(f"{TEXT}\n{_GLM}"),
    "glm47": Sample(f"{TEXT}{_GLM}"),
    "granite": Sample(f"{TEXT}<|tool_call|>[{_both(between=', ')}]"),
    "granite-20b-fc": Sample(_both("<function_call> {}", between=" ")),
    "granite4": Sample(f"{TEXT}{_HERMES}"),
    "hermes": Sample(f"{TEXT}\n{_HERMES}"),
    "hf": Sample(f"{TEXT}\n" + _both("<tool_call>{}</tool_call>")),
    "hunyuan_a13b": Sample(f"<tool_calls>[{_both(between=', ')}]</tool_calls>"),
    "hy_v3": Sample(
        f"{TEXT}<tool_calls>\n"
        + _calls(
            "<tool_call>weather<tool_sep>\nPARAMETERS</tool_call>",
            "<arg_key>NAME</arg_key>\n<arg_value>VALUE</arg_value>\n",
        )
        + "\n</tool_calls>"
    ),
    "hy_v4": Sample(
        f"{TEXT}<tool_calls>"
        + _calls(
            "<tool_call>weatherPARAMETERS</tool_call>",
            "<arg_key>NAME</arg_key><arg_value>VALUE</arg_value>",
            between="",
        )
        + "</tool_calls>"
    ),
    "inkling": Sample(
        f"<|message_model|><|content_text|>{TEXT}<|end_message|>"
        + _both("<|message_model|><|content_invoke_tool_json|>{}<|end_message|>", "args", between="")
    ),
    "internlm": Sample(f"{TEXT}<|action_start|><|plugin|>\n{_named(FIRST, 'parameters')}<|action_end|>"),
    "jamba": Sample(f"{TEXT}<tool_calls>[{_both(between=', ')}]</tool_calls>"),
    "k2_horizon": Sample(
        f"{TEXT}<ifm|tool_calls>\n"
        + _calls(
            "<ifm|tool_call>weather\nPARAMETERS</ifm|tool_call>",
            "<ifm|arg_key>NAME</ifm|arg_key>\n<ifm|arg_value>VALUE</ifm|arg_value>\n",
        )
        + "\n</ifm|tool_calls>"
    ),
    "kimi_k2": Sample(
        f"{TEXT}<|tool_calls_section_begin|>"
        f"<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{FIRST}<|tool_call_end|>"
        f"<|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{SECOND}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ),
    "kimi_k3": Sample(_kimi_k3()),
    "lfm2": Sample(f"{TEXT}<|tool_call_start|>[{_PYTHONIC}]<|tool_call_end|>Done, it is {{cold}}."),
    "ling3": Sample(f"{TEXT}\n{_GLM}"),
    "llama3_json": Sample(f"<|python_tag|>{_both(key='parameters', between='; ')}"),
    "llama4_json": Sample(_both(key="parameters", between="; ")),
    "llama4_pythonic": Sample(f"<|python_start|>[{_PYTHONIC}]<|python_end|>"),
    "longcat": Sample(_both("<longcat_tool_call>\n{}\n</longcat_tool_call>")),
    "mimo": Sample(
        f"{TEXT}\n"
        + _calls(
            "<tool_call>\n<function=weather>\nPARAMETERS</function>\n</tool_call>",
            "<parameter=NAME>VALUE</parameter>\n",
        )
    ),
    "minicpm5": Sample(
        f"{TEXT}\n" + _calls('<function name="weather">PARAMETERS</function>', '<param name="NAME">VALUE</param>')
    ),
    "minimax_m2": Sample(
        f"{TEXT}\n<minimax:tool_call>\n"
        + _calls('<invoke name="weather">\nPARAMETERS</invoke>', '<parameter name="NAME">VALUE</parameter>\n')
        + "\n</minimax:tool_call>"
    ),
    "minimax_m3": Sample(
        f"{TEXT}\n{_M3}<tool_call>\n"
        f'{_M3}<invoke name="weather">\n{_M3}<city>Zürich{_M3}</city>\n{_M3}<days>3{_M3}</days>\n{_M3}<options>'
        f"{_M3}<units>{_M3}<item>°C{_M3}</item>{_M3}</units>{_M3}</options>\n{_M3}</invoke>\n"
        f'{_M3}<invoke name="weather">\n{_M3}<city>東京{_M3}</city>\n{_M3}</invoke>\n{_M3}</tool_call>'
    ),
    "mistral": Sample(f"{TEXT}[TOOL_CALLS]weather[ARGS]{FIRST}[TOOL_CALLS]weather[ARGS]{SECOND}"),
    "muse_glimmer": Sample(_muse()),
    "olmo3": Sample(f"<function_calls>{_PYTHONIC.replace('), ', ')' + chr(10))}</function_calls>"),
    "phi4_mini_json": Sample(f"functools[{_both(between=', ')}]"),
    "plamo3": Sample(
        f"{TEXT}<|plamo:begin_tool_requests:plamo|>{_plamo(FIRST)}{_plamo(SECOND)}<|plamo:end_tool_requests:plamo|>"
    ),
    "poolside_v1": Sample(f"{TEXT}\n{_GLM}"),
    "pythonic": Sample(f"[{_PYTHONIC}]"),
    "qwen3_coder": Sample(f"{TEXT}\n{_QWEN}"),
    "qwen3_json": Sample(_HERMES),
    "qwen3_xml": Sample(_QWEN),
    "seed_oss": Sample(
        f"{TEXT}\n" + _QWEN.replace("<tool_call>", "<seed:tool_call>").replace("</tool_call>", "</seed:tool_call>")
    ),
    "step3": Sample(
        f"{TEXT}<｜tool_calls_begin｜>"
        + _calls(
            '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="weather">PARAMETERS</steptml:invoke>'
            "<｜tool_call_end｜>",
            '<steptml:parameter name="NAME">VALUE</steptml:parameter>',
        )
        + "<｜tool_calls_end｜>"
    ),
    "step3p5": Sample(f"{TEXT}\n{_QWEN}"),
    "xlam": Sample(f"[{_both(between=', ')}]"),
}

_THINK = Sample(f"<think>\n{REASONING}\n</think>\n\n{ANSWER}")
_THINKS = {"chat_template_kwargs": {"thinking": True, "enable_thinking": True}}
_THINKS_ON_REQUEST = Sample(_THINK.answer, _THINKS)

REASONING_SAMPLES = {
    "deepseek_r1": _THINK,
    "deepseek_v3": _THINKS_ON_REQUEST,
    "deepseek_v4": _THINKS_ON_REQUEST,
    "deepseek_v41": _THINKS_ON_REQUEST,
    "ernie45": Sample(f"<think>\n{REASONING}\n</think>\n\n<response>\n{ANSWER}\n</response>\n"),
    "gemma4": Sample(f"<|channel>thought\n{REASONING}<channel|>{ANSWER}", _THINKS),
    "glm45": _THINK,
    "glm47": _THINK,
    "granite": Sample(f"Here is my thought process: {REASONING} Here it ends. Here is my response: {ANSWER}"),
    "granite_thinking_parser": _THINK,
    "hf": _THINK,
    "holo2": _THINK,
    "hunyuan_a13b": Sample([*HUNYUAN_THINK, REASONING, *HUNYUAN_ANSWER, ANSWER, *HUNYUAN_END]),
    "hy_v3": Sample(_THINK.answer, {"chat_template_kwargs": {"reasoning_effort": "high"}}),
    "hy_v4": Sample(_THINK.answer, {"chat_template_kwargs": {"reasoning_effort": "high"}}),
    "inkling": Sample(
        f"<|message_model|><|content_thinking|>{REASONING}<|end_message|>"
        f"<|message_model|><|content_text|>{ANSWER}<|end_message|>"
    ),
    "k2_horizon": Sample(f"<ifm|think>{REASONING}</ifm|think>{ANSWER}"),
    "kimi_k2": _THINK,
    "kimi_k3": Sample(
        f"<|open|>think<|sep|>{REASONING}<|close|>think<|sep|><|open|>response<|sep|>{ANSWER}<|close|>response<|sep|>"
    ),
    "ling3": _THINK,
    "mimo": _THINK,
    "minicpmv": _THINKS_ON_REQUEST,
    "minimax_m2": Sample(f"{REASONING}</think>{ANSWER}"),
    "minimax_m2_append_think": Sample(f"{REASONING}</think>{ANSWER}"),
    "minimax_m3": Sample(f"<mm:think>{REASONING}</mm:think>{ANSWER}"),
    "mistral": Sample(f"[THINK]{REASONING}[/THINK]{ANSWER}"),
    "muse_glimmer": Sample(
        f" to=self<|message|>{REASONING}<|eom|><|start|>assistant to=user<|message|>{ANSWER}<|eot|>"
    ),
    "nemotron_v3": _THINK,
    "olmo3": Sample(f"<think>{REASONING}</think>{ANSWER}"),
    "plamo3": Sample(f"<|plamo:begin_think:plamo|>{REASONING}<|plamo:end_think:plamo|>{ANSWER}"),
    "poolside_v1": _THINKS_ON_REQUEST,
    "qwen3": _THINK,
    "seed_oss": Sample(f"<seed:think>{REASONING}</seed:think>{ANSWER}"),
    "step3": _THINK,
    "step3p5": _THINK,
}

_COHERE = "needs cohere_melody, which vLLM does not install"
_HARMONY = "is a placeholder: vLLM parses harmony with HarmonyParser, and only for gpt-oss models"
NOT_HERE = {
    "tool": {"cohere_command3": _COHERE, "cohere_command4": _COHERE, "openai": _HARMONY},
    "reasoning": {"cohere_command3": _COHERE, "cohere_command4": _COHERE, "openai_gptoss": _HARMONY},
}
