"""A model's chat template: it turns messages into text.

Templates are the model's own code. They are rendered in jinja's sandbox and under bounds (base/renderer.py). An error
there is a bad row; a template that goes beyond its bounds is not asked again. Which characters of the text are the
assistant's answers is found in answer_places.py.
"""

from collections.abc import Sequence
from typing import Any

from mbf_mlx.base.apply_template import bound_template
from mbf_mlx.base.chat_templates import dated
from mbf_mlx.base.renderer import TemplateLimitError
from mbf_mlx.data.row import BadRow, Row

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]]
Job = tuple[Row, Messages, Tools]  # what is rendered, and the row that it comes from


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        date: The day that the template writes, as "2026-12-01"; "" is today.
    """

    def __init__(self, tokenizer: Any, date: str):
        self._tokenizer, self._dated = tokenizer, dated(tokenizer, date)
        bound_template(tokenizer)

    def text(self, job: Job, *, ask: bool) -> str | BadRow:
        """Return messages as text; with `ask`, the text ends with the beginning of an answer to be generated.

        Raises:
            TemplateLimitError: the template takes too much time or memory for them.
        """
        row, messages, tools = job
        try:
            return str(self._apply(list(messages), tools, ask))
        except TemplateLimitError as error:
            raise TemplateLimitError(f"{row.file}:{row.line}: {error}" if row.line else str(error)) from None
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return BadRow(f"the model's chat template refuses the row: {reason}")

    def texts(self, jobs: Sequence[Job], *, ask: bool) -> list[str | BadRow]:
        """Return the text of each job, as `text` does; rendering all of them in one call is faster."""
        if not any(tools for _, _, tools in jobs):
            try:
                texts = self._apply([list(messages) for _, messages, _ in jobs], (), ask)
                if isinstance(texts, list) and len(texts) == len(jobs):
                    return texts
            except Exception:  # one of the jobs is to blame: it is found below
                pass
        return [self.text(job, ask=ask) for job in jobs]

    def _apply(self, messages: Any, tools: Tools, ask: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=ask, **self._dated
        )
