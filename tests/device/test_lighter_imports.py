"""The command line starts without transformers and torch; what mlx-lm takes from them is there when it is used."""

import subprocess
import sys

import pytest

from tests.support.house import ROOT

BEGIN = "import sys\nfrom mbf_mlx.device import backend, lighter_imports\n"
COMPLETE = """
import mlx_lm.tokenizer_utils as own, mlx_lm.tuner.datasets as data, sys
assert "transformers" not in sys.modules
tokenizer = own.load(__import__("pathlib").Path(sys.argv[1]))
import transformers
assert tokenizer.encode("a") and own.AutoTokenizer is transformers.AutoTokenizer
assert data.PreTrainedTokenizer is transformers.PreTrainedTokenizer
assert sys.modules["mlx_lm.generate"].PreTrainedTokenizer is transformers.PreTrainedTokenizer
assert issubclass(own.NewlineTokenizer, transformers.PreTrainedTokenizerFast)
assert transformers.models.auto.tokenization_auto.REGISTERED_TOKENIZER_CLASSES["NewlineTokenizer"]
assert "torch" not in sys.modules
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    assert torch.zeros(1).sum() == 0
"""


def python(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mlx_lm_gets_the_real_names_when_it_loads_a_tokenizer(tiny_llama):
    python(f"{BEGIN}lighter_imports.allow(); backend.setup()\n{COMPLETE}", tiny_llama)


def test_a_library_imports_mlx_lm_as_it_is():
    code = f"{BEGIN}backend.setup(); import mlx_lm.tokenizer_utils as own; import transformers\n"
    python(f"{code}assert own.AutoTokenizer is transformers.AutoTokenizer")


@pytest.mark.parametrize("first", ["import transformers", "import mlx_lm"])
def test_what_is_imported_already_stays(first):
    code = f"{first}\n{BEGIN}lighter_imports.allow(); backend.setup(); import mlx_lm.tokenizer_utils as own\n"
    python(f"{code}import transformers; assert own.AutoTokenizer is transformers.AutoTokenizer")


COMMANDS = {
    "check": ["check", "TASK", "--model", "BASE"],
    "generate": ["generate", "STREAM", "hello", "--max-tokens", "2"],
    "learn": ["learn", "STREAM", "TASK", "--iters", "1", "--again", "--score-rows", "1"],
}
MAIN = """
import atexit, sys
from mbf_mlx.commands import main
atexit.register(lambda: print("\\nheavy:", *({"torch", "transformers"} & sys.modules.keys())))
main()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_on_a_llama_imports_transformers_or_torch(command, tiny_llama, tmp_path, write_jsonl):
    rows = [{"prompt": f"say {i}", "completion": "yes"} for i in range(8)]
    names = {"TASK": write_jsonl("task.jsonl", rows), "BASE": tiny_llama, "STREAM": tmp_path / "stream"}
    if "STREAM" in COMMANDS[command]:
        first = ["learn", "STREAM", "TASK", "--iters", "1", "--model", "BASE", "--score-rows", "1"]
        python(MAIN, *(names.get(word, word) for word in first))
    printed = python(MAIN, *(names.get(word, word) for word in COMMANDS[command]))
    assert printed.splitlines()[-1].strip() == "heavy:"
