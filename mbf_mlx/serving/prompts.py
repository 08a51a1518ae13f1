"""From a checked request to the tokens of its prompt, in the request's own thread.

Whatever a chat template or a tokenizer says against a request is an answer to that request alone. What a template has
no place for is refused: a model would never see it.
"""

import inspect
import re
from typing import Any

from mlx_lm.server import CompletionRequest, GenerationArguments
from transformers import PreTrainedTokenizerBase

from mbf_mlx.errors import InputError
from mbf_mlx.serving.generator import Generator, Prepared
from mbf_mlx.serving.request_checks import Asked, Refused
from mbf_mlx.serving.speaker import plain_text

_ORDINARY = {"user", "assistant"}  # roles that every template writes
# What a template is given by its tokenizer and by us, so no request may set it.
_RESERVED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *inspect.signature(PreTrainedTokenizerBase.__call__).parameters,
    *("messages", "bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now", "tools"),
}


def prepare(generator: Generator, asked: Asked, args: GenerationArguments) -> tuple[Prepared, int]:
    """Return a request's prompt, and how many tokens its answer may have.

    Raises:
        Refused: the template or the tokenizer does not take it, the template goes beyond its bounds on time and memory,
            or the base cannot read so many tokens.
    """
    provider = generator.model_provider
    tokenizer, chat = provider.words, asked.prompt is None
    plain = chat and (provider.folder.identity.template == "none" or not tokenizer.has_chat_template)
    if plain and (asked.tools or asked.template_values):
        raise Refused(400, "tools, chat_template_kwargs: this stream was taught without a chat template")
    if not chat or plain:
        text = plain_text(asked.messages) if chat else asked.prompt
        request = CompletionRequest("text", text or "", [], None, None)
    else:
        _check_template(tokenizer, asked, provider.cli_args.chat_template_args)
        request = CompletionRequest("chat", "", asked.messages, asked.tools or None, None)
    try:
        parts = generator.prepare(tokenizer, request, args)
    except InputError as error:
        raise Refused(400, _one_line(error)) from None
    except Exception as error:  # a template may raise anything
        raise Refused(400, f"messages: the chat template does not take them: {error}" if chat else str(error)) from None
    tokens = parts[0]
    if not tokens or not all(0 <= token < provider.vocabulary for token in tokens):
        raise Refused(400, "the prompt has no tokens" if not tokens else "the prompt has tokens that the model lacks")
    room = provider.context - len(tokens)
    if room < 1:
        raise Refused(
            400,
            f"expected a prompt of fewer than the {provider.context:,} tokens that the model can read,"
            f" got {len(tokens):,}",
        )
    made = Prepared(request.request_type, request.prompt, request.messages, request.tools, None, parts)
    return made, min(asked.max_tokens, room)


def _check_template(tokenizer: Any, asked: Asked, own_values: dict[str, Any]) -> None:
    template = str(tokenizer.chat_template)
    for name in asked.template_values:
        if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
            raise Refused(400, f"chat_template_kwargs: the chat template takes no {name[:60]!r} from a request")
    if asked.tools and not (tokenizer.has_tool_calling or re.search(r"\btools\b", template)):
        raise Refused(400, "tools: the chat template of this stream has no place for them")
    if {message["role"] for message in asked.messages} <= _ORDINARY:
        return
    marks = {f"mbf{number}mark": message for number, message in enumerate(asked.messages)}
    marked = [message | {"content": mark} for mark, message in marks.items()]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, **asked.template_values, **own_values)
    except InputError as error:
        raise Refused(400, _one_line(error)) from None
    except Exception:
        return  # with these words it may be the words' fault; the real ones are rendered next
    for mark, message in marks.items():
        if message["role"] not in _ORDINARY and message["content"] and mark not in text:
            raise Refused(400, f"messages: the chat template has no place for the role {message['role'][:60]!r}")


def _one_line(error: InputError) -> str:
    return "messages: " + str(error).partition("\n")[0]
