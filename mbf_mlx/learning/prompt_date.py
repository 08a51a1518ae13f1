"""The day that a stream's prompts say, where the base's chat template writes one: chosen once, and kept."""

import datetime
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mbf_mlx.base.chat_templates import writes_date
from mbf_mlx.config import LearnConfig
from mbf_mlx.stream.folder import StreamFolder


def with_date(stream: StreamFolder, tokenizer: Any, settings: LearnConfig, say: Callable[[str], None]) -> LearnConfig:
    """Return the settings with the day that the chat template writes, and say what the user should know about it.

    It is the day that the user gave, else the stream's or that of the run to go on with, else today; none where the
    template writes none.
    """
    given, kept = settings.data.date, stream.date()
    if settings.data.template == "none" or not writes_date(tokenizer.chat_template):
        if given:
            say("--date without effect: prompts say no date with this base's chat template")
        return replace(settings, data=replace(settings.data, date=""))
    saved = None if settings.restart else stream.saves.load()
    if saved and not (given or kept) and "date" not in saved.run:
        return settings  # a version of mbf-mlx that kept no date has begun this run
    date = given or kept or (saved.run["date"] if saved else datetime.date.today().isoformat())
    if date != kept:
        say(f"the chat template writes a date: prompts of this stream say {date} (--date)")
    return replace(settings, data=replace(settings.data, date=date))
