"""The chat templates that mergekit has under a name, in words of our own that render to the same text.

What mergekit's render besides, spaces and empty lines where its lines are indented, is part of that text.
"""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') ~ '<|start_header_id|>' ~ message.role"
    " ~ '<|end_header_id|>\\n\\n' ~ (message.content | trim) ~ '<|eot_id|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_ALPACA = (
    "{% set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}"
    "{% set systems = messages | selectattr('role', 'equalto', 'system') | list %}"
    "{{ (systems[-1].content | trim if systems else '') ~ '\\n\\n' }}"
    "{% for message in messages %}{% if message.role in titles %}"
    "{{ '### ' ~ titles[message.role] ~ ':\\n' ~ (message.content | trim) ~ ('' if loop.last else '\\n\\n') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
)
_EXAONE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}{{ '        [|system|][|endofturn|]\\n\\n' }}{% endif %}"
    "{{ '    [|' ~ message.role ~ '|]' ~ message.content ~ '\\n' }}"
    "{{ '        ' ~ ('' if message.role == 'user' else '[|endofturn|]') ~ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '    [|assistant|]\\n' }}{% endif %}"
)
_MISTRAL = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}{{ bos_token }}"
    "{% for turn in turns %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant have to take turns, behind one system message at most') }}{% endif %}"
    "{% if turn.role == 'user' %}{{ ' [INST] ' ~ (messages[0].content ~ '\\n\\n' if loop.first and"
    " messages[0].role == 'system' else '') ~ turn.content ~ ' [/INST]' }}"
    "{% elif turn.role == 'assistant' %}{{ ' ' ~ turn.content ~ eos_token }}"
    "{% else %}{{ raise_exception('a role is user or assistant, and system for the first message') }}{% endif %}"
    "{% endfor %}"
)
CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
