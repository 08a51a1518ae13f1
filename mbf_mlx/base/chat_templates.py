"""Chat templates of model folders: the date that some of them write, and the template that an export carries.

Some templates, as Llama 3.2's, write today's date into every prompt (`strftime_now`). A stream keeps one date, so that
its prompts are the same tomorrow.
"""

import json
import re
from datetime import datetime
from typing import Any

CLOCK = "strftime_now"  # the function by which a template asks for the date
_CALL = re.compile(rf"""\b{CLOCK}\(\s*(["'])(.{{0,200}}?)\1\s*\)""")
_DEFINED = re.compile(rf"\b{CLOCK}\s+is\s+defined\b")
_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYe"), "%%")
_NEXT = "{% if not loop.last %}{{ '\\n' }}{% endif %}"
_MESSAGES = "{% for message in messages %}{{ message['content'] }}" + _NEXT + "{% endfor %}"


def writes_date(template: object) -> bool:
    """Return whether a chat template, or one of several, asks for the date."""
    return CLOCK in str(template or "")


def dated(tokenizer: Any, date: str) -> dict[str, str]:
    """Return what `apply_chat_template` is given so that a tokenizer's template writes the date of a day.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        date: The day, as "2026-12-01"; "" leaves the template as it is.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, each with a name
        template = template.get("default")
    return {"chat_template": with_date(template, date)} if date and template and writes_date(template) else {}


def with_date(template: str, date: str) -> str:
    """Return a template that writes the date of a day wherever it would ask for today's."""
    moment = datetime.fromisoformat(date)
    found = _DEFINED.sub("true", _CALL.sub(lambda call: json.dumps(moment.strftime(call[2])), template))
    if CLOCK not in found:
        return found
    # It makes up its format: a macro of that name takes the place of the function.
    codes = "".join(f" | replace({code!r}, {moment.strftime(code)!r})" for code in _CODES)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{codes} }}}}{{%- endmacro -%}}{found}"


def raw_template(begin: str) -> str:
    """Return a template that leaves prompts as they are, for a model that was taught without one.

    Args:
        begin: The text of the tokens that the tokenizer puts before every text.
    """
    return (f"{{{{ {json.dumps(begin)} }}}}" if begin else "") + _MESSAGES
