"""Small chat templates in the shapes of the models people use, and what the assistant says in each.

They are written for these tests, from what the models' own templates do; no text of those is in here.
"""

import json
import shutil
from dataclasses import dataclass

# Tokens that the templates end turns with or build their headers from, all of them special to the tokenizer.
SPECIAL = (
    "<s>", "</s>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|turn|>", "<|bot|>",
    "<|done|>", "<|role|>", "<|/role|>", "<|channel|>", "<|message|>", "<|return|>",
)  # fmt: skip
THOUGHTS = ("<think>", "</think>")  # tokens, but not special ones


@dataclass(frozen=True)
class Shape:
    """A chat template and what is supervised of a conversation in it."""

    template: str
    ends: tuple[str, ...]  # tokens at which generation stops
    last: str = "{}"  # what is supervised of the last answer; {} is its content
    earlier: str | None = None  # the same of earlier answers; None: as the last
    system: bool = True  # takes a system message
    call: str = ""  # how a call of a tool is written, as `last` has it; {} are its arguments as JSON
    thoughts: str = ""  # what becomes of thoughts: "" they are like any text, "last" only the last answer keeps them

    def says(self, content, *, last):
        """What is supervised of an answer without thoughts."""
        return (self.last if last or self.earlier is None else self.earlier).replace("{}", content)


def base_with(template, source, folder):
    """Copy a model folder, with another chat template; return the copy."""
    shutil.copytree(source, folder)
    place = folder / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": template}))
    return folder


CHATML_ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"

SHAPES = {
    "Llama 2": Shape(
        "{% set ns = namespace(sys='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.sys = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
        "<s>[INST] {{ ns.sys + m.content | trim }} [/INST]{% set ns.sys = '' %}{% else %} {{ m.content | trim }} </s>"
        "{% endif %}{% endfor %}",
        ("</s>",),
        " {} </s>",
    ),
    "Llama 3": Shape(
        "{% for m in messages %}{% if loop.first %}<s>{% endif %}" + HEADER + "{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|eot_id|>", "<|im_end|>"),
        "{}<|eot_id|>",
    ),
    "Llama 3.1": Shape(
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
        "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
        "{% endif %}<|eot_id|>{% for m in messages %}{% if loop.first and tools %}" + HEADER + "Tools you may call: "
        "{{ tools | tojson }}\n\n{{ m.content | trim }}<|eot_id|>{% elif m.tool_calls %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
        "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>{% elif m.role == 'tool' %}"
        "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% else %}" + HEADER
        + "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|eot_id|>", "<|eom_id|>"),
        "{}<|eot_id|>",
        call='{"name": "add", "parameters": {}}<|eot_id|>',
    ),
    "ChatML": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        + CHATML_ANSWER,
        ("<|im_end|>",),
        "{}<|im_end|>",
    ),
    "ChatML with a first message of its own": Shape(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '' if loop.last else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_end|>"),
        "{}<|im_end|>",
    ),
    "ChatML that generation does not stop at": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + CHATML_ANSWER,
        ("<|endoftext|>",),
        "{}<|im_end|><|endoftext|>",
        "{}<|im_end|>",
    ),
    "Mistral": Shape(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system message') }}"
        "{% endif %}{% endfor %}",
        ("</s>",),
        " {}</s>",
        system=False,
    ),
    "Mistral with the system message in the last question": Shape(
        "{% set sys = '' %}{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% set asked = messages | selectattr('role', 'equalto', 'user') "
        "| list %}<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ sys if m == asked[-1] else '' }}"
        "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ("</s>",),
        " {}</s>",
    ),
    "Mistral with the system message where an answer is asked for": Shape(
        "{% set sys = '' %}{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}<s>{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{{ sys if loop.last else '' }}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ("</s>",),
        " {}</s>",
    ),
    "Gemma": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<|endoftext|>", "<end_of_turn>"),
        "{}<end_of_turn>",
        system=False,
    ),
    "Phi-3": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        ("<|endoftext|>", "<|end|>"),
        "{}<|end|>",
    ),
    "Phi-3 that stops at the end of a text alone": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        ("<|endoftext|>",),
        "{}<|end|>\n<|endoftext|>",
        "{}<|end|>",
    ),
    "Phi-4 that thinks": Shape(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].lstrip() }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        ("<|end|>",),
        "{}<|end|>",
        thoughts="last",
    ),
    "Qwen 2.5": Shape(
        "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You help.' }}"
        "{% if tools %}{{ '\n\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
        "<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}"
        "{{ '\n' + m.content }}{% endif %}{% for call in m.tool_calls %}{{ '\n<tool_call>\n' }}"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
        "{{ m.content }}\n</tool_response><|im_end|>\n{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}" + CHATML_ANSWER,
        ("<|im_end|>", "<|endoftext|>"),
        "{}<|im_end|>",
        call='<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>',
    ),
    "Qwen 3": Shape(
        "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = '' %}"
        "{% set said = m.content %}{% if '</think>' in said %}"
        "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
        "{% if loop.index0 > ns.asked and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
        "{{ said }}{% for call in m.tool_calls %}{{ '\n' if said or not loop.first else '' }}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
        "{{ m.content }}\n</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}" + CHATML_ANSWER,
        ("<|im_end|>", "<|endoftext|>"),
        "<think>\n\n</think>\n\n{}<|im_end|>",
        "{}<|im_end|>",
        call='<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>',
        thoughts="last",
    ),
    "R1 distilled": Shape(
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|turn|>"
        "{{ m.content }}{% else %}<|bot|>{{ m.content.split('</think>')[-1] }}<|done|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}",
        ("<|done|>",),
        "{}<|done|>",
        thoughts="last",
    ),
    "Zephyr": Shape(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + eos_token }}"
        "{% elif m.role == 'system' %}{{ '<|system|>\n' + m.content + eos_token }}"
        "{% else %}{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% else %}{{ '\n' }}{% endif %}"
        "{% endfor %}",
        ("</s>",),
        "{}</s>",
    ),
    "Vicuna": Shape(
        "{% if messages[0].role == 'system' %}{{ messages[0].content }} {% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{{ 'USER: ' + m.content if m.role == 'user' else ' ASSISTANT: ' + m.content + '</s>' }}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}",
        ("</s>",),
        " {}</s>",
    ),
    "Alpaca": Shape(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
        "### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}"
        "{{ '</s>' if loop.last else '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        ("</s>",),
        "{}</s>",
        "{}",
    ),
    "words alone": Shape(
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}",
        ("</s>",),
        "{}</s>",
        "{}",
    ),
    "DeepSeek": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        ("</s>",),
        " {}</s>",
    ),
    "OpenChat": Shape(
        "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m.role | title + ': ' + m.content + '<|done|>' }}"
        "{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        ("<|done|>",),
        " {}<|done|>",
    ),
    "Command R": Shape(
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}"
        "{{ m.content | trim }}<|done|>{% endfor %}{% if add_generation_prompt %}<|turn|><|bot|>{% endif %}",
        ("<|done|>",),
        "{}<|done|>",
    ),
    "Granite": Shape(
        "{% for m in messages %}<|role|>{{ m.role }}<|/role|>{{ m.content }}<|done|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant<|/role|>{% endif %}",
        ("<|done|>",),
        "{}<|done|>",
    ),
    "channels": Shape(
        "{% for m in messages %}<|turn|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant{% endif %}",
        ("<|return|>", "<|end|>"),
        "<|channel|>final<|message|>{}<|return|>",
        "<|channel|>final<|message|>{}<|end|>",
    ),
    "an end in plain letters": Shape(
        "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n###\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}",
        ("</s>",),
        "{}\n###</s>",
        "{}\n###",
    ),
}  # fmt: skip
