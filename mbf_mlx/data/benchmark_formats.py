"""Readers for the JSON of two published benchmarks: Super-NaturalInstructions and O-LoRA's.

Both become prompt/completion rows, with the prompts that the paper's experiments use.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mbf_mlx.data.formats import Found, Reader, row_or_reason
from mbf_mlx.data.json_stream import Element, element_at, elements, read_document
from mbf_mlx.data.row import EXAMPLES, BadRow, Row, Skipped, check_text
from mbf_mlx.errors import InputError


class SuperNaturalInstructions(Reader):
    """A task of Super-NaturalInstructions: a Definition, and Instances, each an input with its outputs.

    The prompt is that of the paper's SuperNI benchmark. The space after "Output:" belongs to the completion, so that it
    is tokenized as the model would generate it. The first output is learned; every output counts as right.
    """

    example = '{"Definition": ["Name the colour."], "Instances": [{"id": "1", "input": "Grass", "output": ["green"]}]}'

    def __init__(self, file: Path):
        super().__init__(file)
        self.definition = ""

    def scan(self) -> Iterator[Found]:
        """Read the definition, then yield the row of every instance."""
        text = read_document(self.file, self.sha256.update)
        members = {item.key: item for item in elements(self.file, text, "Instances") if item.key != "Instances"}
        self.definition = self._read_definition(members.get("Definition"))
        for key, offset, line, instance in elements(self.file, text, "Instances"):
            if key == "Instances":
                yield Found(offset, line, row_or_reason(self._row, instance, line))

    def read(self, handle: BinaryIO, offset: int, line: int) -> Row:
        """Return the row of the element at `offset`."""
        return self._row(element_at(handle, offset), line)

    def _read_definition(self, found: Element | None) -> str:
        parts = found.value if found and isinstance(found.value, list) else [found.value if found else None]
        words = [part for part in parts if isinstance(part, str) and part.strip()]
        if not words or len(words) < len(parts):
            raise InputError(
                f'{self.file}: an object in a .json file is read as Super-NaturalInstructions: expected a "Definition" '
                f"in words; other rows go one a line into a .jsonl file\n  a file that fits: {self.example}"
            )
        try:
            return check_text("\n".join(words), '"Definition"').strip()
        except BadRow as error:
            raise InputError(f"{self.file}: {error}") from error

    def _row(self, instance: object, line: int) -> Row:
        if not isinstance(instance, dict) or "input" not in instance or "output" not in instance:
            raise BadRow('expected an instance {"input": …, "output": […]}')
        prompt = check_text(instance["input"], '"input"')
        outputs = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
        answers = tuple(" " + check_text(output, '"output"').strip() for output in outputs if output != "")
        if not answers:
            raise Skipped("the output is empty")
        prompt = f"Definition: {self.definition}\n\nNow complete the following example -\nInput: {prompt}\nOutput:"
        return Row("completion", self.file, line, prompt, answers[0], answers)


# The instruction for each group of data sets in O-LoRA's benchmark; COPA's sentences bring their own.
_INSTRUCTIONS = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.',
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.",
    "COPA": "",
}
_GROUPS = {
    **{name.lower(): name for name in _INSTRUCTIONS},
    **dict.fromkeys(("mnli", "cb", "rte"), "NLI"),
    **dict.fromkeys(("amazon", "yelp", "imdb", "sst-2"), "SC"),
    **dict.fromkeys(("agnews", "dbpedia", "yahoo"), "TC"),
}


class OLora(Reader):
    """A data set of O-LoRA's benchmark: a list of labels and sentences, with `labels.json` beside it.

    The instruction is that of the data set's group, which the folder names (`TC/agnews/train.json`).
    """

    example = '[{"label": "Sports", "sentence": "Title: The final\\nText: They won."}], in a folder like TC/agnews/'

    def __init__(self, file: Path):
        super().__init__(file)
        self.labels: list[str] = []
        self.instruction = ""

    def scan(self) -> Iterator[Found]:
        """Read labels and instruction, then yield the row of every element."""
        text = read_document(self.file, self.sha256.update)
        first = next(elements(self.file, text, None), None)
        if first and not (isinstance(first.value, dict) and {"label", "sentence"} <= first.value.keys()):
            raise InputError(
                f"{self.file}: a list in a .json file is read as O-LoRA's benchmark, objects of label and sentence; "
                f"other rows go one a line into a .jsonl file\n  a row that fits there: {EXAMPLES['completion']}"
            )
        self.labels = self._read_labels()
        self.instruction = self._find_instruction()
        self.sha256.update(json.dumps([self.labels, self.instruction]).encode())
        for _, offset, line, item in elements(self.file, text, None):
            yield Found(offset, line, row_or_reason(self._row, item, line))

    def read(self, handle: BinaryIO, offset: int, line: int) -> Row:
        """Return the row of the element at `offset`."""
        return self._row(element_at(handle, offset), line)

    def _read_labels(self) -> list[str]:
        file = self.file.with_name("labels.json")
        if not file.exists():
            raise InputError(f'{self.file}: expected labels.json beside it: a list such as ["True", "False"]')
        try:
            labels = [check_text(item.value, "a label") for item in elements(file, read_document(file), None)]
        except BadRow as error:
            raise InputError(f"{file}: {error}") from error
        if not labels:
            raise InputError(f'{file}: expected a list of labels such as ["True", "False"], got an empty one')
        return labels

    def _find_instruction(self) -> str:
        folders = self.file.absolute().parts[-3:-1]
        for folder in folders:
            if folder.lower() in _GROUPS:
                return _INSTRUCTIONS[_GROUPS[folder.lower()]]
        raise InputError(
            f"{self.file}: rows of label and sentence take their instruction from the folder: expected it in a folder "
            f"of one of {', '.join(_INSTRUCTIONS)}, as in TC/agnews/train.json\n"
            f"  your own tasks: rows such as {EXAMPLES['completion']} in a .jsonl file"
        )

    def _row(self, item: object, line: int) -> Row:
        if not isinstance(item, dict) or "label" not in item or "sentence" not in item:
            raise BadRow('expected {"label": …, "sentence": …}')
        label, sentence = check_text(item["label"], '"label"'), check_text(item["sentence"], '"sentence"')
        if label == "-":
            raise Skipped('the label is "-": its annotators did not agree')
        if label not in self.labels:
            raise BadRow(f'"label": expected one of labels.json, got {json.dumps(label[:40])}')
        instruction = f"{self.instruction}\n" if self.instruction else ""
        prompt = f"{instruction}Option: {', '.join(self.labels)} \n{sentence}\nAnswer:"
        return Row("completion", self.file, line, prompt, " " + label, (" " + label,))
