"""What users get wrong, one row each, with the whole message: adapters, streams, names, flags.

Wrong task files are in tests/data/, wrong model folders and GGUF files in tests/base/. The file is long because of its
tables."""

# ruff: noqa: E501  a message stands in its row

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mbf_mlx import exchange
from mbf_mlx.adapters.mlx_lm import adapter_files, decode_tensors, read_adapter
from mbf_mlx.adapters.peft import read_peft
from mbf_mlx.commands import app
from mbf_mlx.data.task import read_task
from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import Identity, Manifest, TaskRecord, parse
from tests.support.streams import contents, identity, learn, new_stream, tune

LAYER = "model.layers.0.self_attn.q_proj"
CONFIG = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
PEFT_A, PEFT_B = (f"base_model.model.{LAYER}.lora_{half}.weight" for half in "AB")


def save(folder, config=CONFIG, weights=None, **tensors):
    """Write an adapter in mlx-lm's layout with the factors of one layer, or with what `tensors` and `weights` give."""
    folder.mkdir()
    if config is not None:
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is None:
        weights = safetensors.numpy.save(
            {name.replace("__", "."): value for name, value in tensors.items()} or {
                f"{LAYER}.lora_a": np.ones((16, 4), "f4"), f"{LAYER}.lora_b": np.ones((4, 24), "f4")
            }
        )  # fmt: skip
    (folder / "adapters.safetensors").write_bytes(weights)


def save_peft(folder, config=PEFT, **tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    halves = {"A": np.ones((4, 16), "f4"), "B": np.ones((24, 4), "f4"), **tensors}
    named = {f"base_model.model.{LAYER}.lora_{half}.weight": array for half, array in halves.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(named))


def zipped():
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../outside.txt", "I left my folder")
        archive.writestr("archive/data.pkl", b"")
    return out.getvalue()


def header(text, data=b""):
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def link(folder, target):
    folder.symlink_to(target)


BAD_CONFIG = "OUT/adapter_config.json: expected lora_parameters with rank and scale, got "
BAD_FILE = "OUT/adapters.safetensors: not a safetensors file"
DAMAGED = "OUT/adapters.safetensors: damaged safetensors file: "
CODE = ": a zip or pickle file, which may hold code and is never read"
NOT_LORA = "OUT/adapters.safetensors is not a plain LoRA adapter:\n"
MISSING = (
    "OUT/adapter_config.json: missing; expected an adapter folder with adapter_config.json and adapters.safetensors"
)
FIT = "OUT does not fit STREAM (rank 4, base tiny):\n"
REST = "".join(
    f"  model.layers.{layer}.self_attn.{key}: missing\n" for layer, key in ((0, "v_proj"), (1, "q_proj"), (1, "v_proj"))
)[:-1]
NAN = np.full((4, 24), np.nan, "f4")
ADAPTERS = {
    "no folder": (lambda out: None, MISSING),
    "an empty folder": (lambda out: out.mkdir(), MISSING),
    "a file": (lambda out: out.write_text("x"), "OUT/adapter_config.json: cannot read: a part of the path is a file\n"
               "hint: choose another path"),
    "a link in a circle": (lambda out: link(out, out), "OUT/adapter_config.json: cannot read: its links lead in a"
                           " circle\nhint: choose another path"),
    "a folder as its configuration": (lambda out: (out / "adapter_config.json").mkdir(parents=True),
                                      "OUT/adapter_config.json: cannot read: a folder is there\nhint: choose another"
                                      " path"),
    "a configuration that is no JSON": (lambda out: save(out, "{"), "OUT/adapter_config.json: not JSON: Expecting"
                                        " property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "an empty configuration": (lambda out: save(out, ""), "OUT/adapter_config.json: not JSON: Expecting value: line 1"
                               " column 1 (char 0)"),
    "a list as configuration": (lambda out: save(out, "[]"), "OUT/adapter_config.json: expected a JSON object, got list"),
    "a number as configuration": (lambda out: save(out, "7"), "OUT/adapter_config.json: expected a JSON object, got int"),
    "no parameters": (lambda out: save(out, {}), BAD_CONFIG + "None"),
    "parameters as a list": (lambda out: save(out, {"lora_parameters": []}), BAD_CONFIG + "[]"),
    "no scale": (lambda out: save(out, {"lora_parameters": {"rank": 4}}), BAD_CONFIG + "{'rank': 4}"),
    "a scale in words": (lambda out: save(out, {"lora_parameters": {"scale": "2"}}), BAD_CONFIG + "{'scale': '2'}"),
    "a scale that is true": (lambda out: save(out, {"lora_parameters": {"scale": True}}), BAD_CONFIG + "{'scale': True}"),
    "a scale that is no number": (lambda out: save(out, '{"lora_parameters": {"scale": NaN}}'),
                                  BAD_CONFIG + "{'scale': nan}"),
    "a scale without end": (lambda out: save(out, '{"lora_parameters": {"scale": Infinity}}'),
                            BAD_CONFIG + "{'scale': inf}"),
    "DoRA": (lambda out: save(out, {**CONFIG, "fine_tune_type": "dora"}), "OUT/adapter_config.json: fine_tune_type:"
             " expected 'lora', got 'dora'; only plain LoRA can be merged"),
    "full weights": (lambda out: save(out, {**CONFIG, "fine_tune_type": "full"}), "OUT/adapter_config.json:"
                     " fine_tune_type: expected 'lora', got 'full'; only plain LoRA can be merged"),
    "no weights": (lambda out: (save(out), (out / "adapters.safetensors").unlink()), "OUT/adapters.safetensors: missing"),
    "empty weights": (lambda out: save(out, weights=b""), BAD_FILE + "*"),
    "text as weights": (lambda out: save(out, weights=b"hello, world"), BAD_FILE + "*"),
    "a zip archive whose names leave the folder": (lambda out: save(out, weights=zipped()), BAD_FILE + CODE),
    "a pickle": (lambda out: save(out, weights=pickle.dumps({"a": 1})), BAD_FILE + CODE),
    "a header that ends early": (lambda out: save(out, weights=(99).to_bytes(8, "little") + b"{}"), BAD_FILE + "*"),
    "a header that is no JSON": (lambda out: save(out, weights=header("{]")), DAMAGED + "*"),
    "a header that is no UTF-8": (lambda out: save(out, weights=header(b"\xff\xfe")), DAMAGED + "*"),
    "whole numbers": (lambda out: save(out, x__lora_a=np.ones((2, 2), "i4")), "OUT/adapters.safetensors: x.lora_a:"
                      " expected one of F64, F32, F16, BF16, got I32"),
    "one half": (lambda out: save(out, x__lora_a=np.ones((2, 2), "f4")), NOT_LORA + "  x: expected lora_a and lora_b"),
    "halves that do not fit": (lambda out: save(out, x__lora_a=np.ones((16, 4), "f4"), x__lora_b=np.ones((3, 24), "f4")),
                               NOT_LORA + "  x: expected (in, rank) and (rank, out), got (16, 4) and (3, 24)"),
    "halves of one dimension": (lambda out: save(out, x__lora_a=np.ones(4, "f4"), x__lora_b=np.ones(4, "f4")),
                                NOT_LORA + "  x: expected (in, rank) and (rank, out), got (4,) and (4,)"),
    "NaN": (lambda out: save(out, x__lora_a=np.ones((16, 4), "f4"), x__lora_b=NAN),
            NOT_LORA + "  x: holds NaN or infinite values"),
    "infinity": (lambda out: save(out, x__lora_a=np.ones((16, 4), "f4"), x__lora_b=
                 np.full((4, 24), np.inf, "f4")), NOT_LORA + "  x: holds NaN or infinite values"),
    "other tensors": (lambda out: save(out, x__weight=np.ones((2, 2), "f4")),
                      NOT_LORA + "  x: expected lora_a and lora_b\n  x.weight: not a LoRA factor"),
    "no tensors": (lambda out: save(out, weights=safetensors.numpy.save({})), NOT_LORA + "  no factors at all"),
    "two ranks": (lambda out: save(out, x__lora_a=np.ones((16, 4), "f4"), x__lora_b=np.ones((4, 24), "f4"),
                  y__lora_a=np.ones((16, 2), "f4"), y__lora_b=np.ones((2, 24), "f4")),
                  NOT_LORA + "  expected one rank, got [2, 4]"),
    "one layer of four": (save, FIT + REST),
    "another rank": (lambda out: save(out, **{f"{LAYER}.lora_a": np.ones((16, 2), "f4"), f"{LAYER}.lora_b":
                     np.ones((2, 24), "f4")}), FIT + f"  {LAYER}: expected A (4, 16) and B (24, 4), got (2, 16) and"
                     " (24, 2)\n" + REST),
    "another base": (lambda out: save(out, **{f"{LAYER}.lora_a": np.ones((32, 4), "f4"), f"{LAYER}.lora_b":
                     np.ones((4, 48), "f4")}), FIT + f"  {LAYER}: expected A (4, 16) and B (24, 4), got (4, 32) and"
                     " (48, 4)\n" + REST),
    "a layer that is none": (lambda out: save(out, **{"../../x.lora_a": np.ones((16, 4), "f4"), "../../x.lora_b":
                             np.ones((4, 24), "f4")}), "OUT/adapters.safetensors: ../../x: expected a layer inside a block, as in"
                             " model.layers.0.self_attn.q_proj"),
    "PEFT: a pickle": (lambda out: (out.mkdir(), (out / "adapter_model.bin").write_bytes(b"x")), "OUT: adapter_model.bin"
                       " is a pickle, which can run code; save it as safetensors"),
    "PEFT: no configuration": (lambda out: (save_peft(out), (out / "adapter_config.json").unlink()) and None,
                               "OUT/adapter_config.json: missing; expected a PEFT folder with adapter_config.json and"
                               " adapter_model.safetensors"),
    "PEFT: no JSON": (lambda out: save_peft(out, "nothing"), "OUT/adapter_config.json: not JSON: Expecting value: line 1"
                      " column 1 (char 0)"),
    "PEFT: another kind": (lambda out: save_peft(out, {**PEFT, "peft_type": "IA3"}), "OUT/adapter_config.json: peft_type:"
                           " expected 'LORA', got 'IA3'; only LoRA can be merged"),
    "PEFT: another rank in words": (lambda out: save_peft(out, {**PEFT, "r": 8}), "OUT/adapter_model.safetensors is not a"
                                    f" plain LoRA adapter:\n  {LAYER}: expected factors of rank 8 and an alpha, got 4 and"
                                    " 8"),
    "PEFT: no alpha": (lambda out: save_peft(out, {"peft_type": "LORA", "r": 4}), "OUT/adapter_model.safetensors is not a"
                       f" plain LoRA adapter:\n  {LAYER}: expected factors of rank 4 and an alpha, got 4 and None"),
    "PEFT: alpha NaN": (lambda out: save_peft(out, '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}'),
                        f"OUT/adapter_model.safetensors is not a plain LoRA adapter:\n  {LAYER}: expected factors of"
                        " rank 4 and an alpha, got 4 and nan"),
    "PEFT: a pattern that is a list": (lambda out: save_peft(out, {**PEFT, "alpha_pattern": [1]}),
                                       "OUT/adapter_config.json: alpha_pattern: expected values by layer, got [1]"),
    "PEFT: a pattern that is none": (lambda out: save_peft(out, {**PEFT, "rank_pattern": {"(": 4}}),
                                     "OUT/adapter_config.json: rank_pattern: '(' is no regular expression: missing ),"
                                     " unterminated subpattern at position 7"),
    "PEFT: a pattern that never ends": (lambda out: save_peft(out, {**PEFT, "rank_pattern": {"([a-z_.0-9]+)+!": 4}}),
                                        "OUT/adapter_config.json: rank_pattern: '([a-z_.0-9]+)+!' is too complex for the"
                                        " name of a layer"),
    "PEFT: NaN": (lambda out: save_peft(out, A=np.full((4, 16), np.nan, "f4")), "OUT/adapter_model.safetensors is not a"
                  f" plain LoRA adapter:\n  {LAYER}: holds NaN or infinite values"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_cannot_be_absorbed_is_refused_in_these_words(quick_path, case):
    make, message = ADAPTERS[case]
    stream = learn(new_stream(quick_path / "s"), 1)
    before, out = contents(stream.path), quick_path / "out"
    make(out)
    with stream.writer(), pytest.raises(InputError) as caught:
        exchange.absorb(stream, out, "mail", force=True)
    said, expected = str(caught.value), message.replace("OUT", str(out)).replace("STREAM", str(stream.path))
    # A star means the safetensors library's own words, which change between its versions.
    assert said == expected or (expected.endswith("*") and said.startswith(expected[:-1]))
    assert contents(stream.path) == before
    assert {path.name for path in quick_path.iterdir()} <= {"s", "out"}


def rewrite(path, **changes):
    document = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in document.items() if value is not None}, sort_keys=True) + "\n"
    )


REPAIR = "\nhint: mbf status STREAM --repair restores it from an undamaged generation"
BACK = "\nhint: mbf status STREAM --repair goes back to the previous generation, if that one is undamaged"
CURRENT = "generations/000001/manifest.json"
STREAMS = {
    "nothing": (lambda s: os.rename(s, s.with_name("gone")), "STREAM: no such stream\nhint: mbf learn STREAM TASK --model"
                " BASE makes one"),
    "another folder": (lambda s: (os.rename(s, s.with_name("gone")), s.mkdir()), "STREAM: not a stream: stream.json is"
                       " missing"),
    "a file": (lambda s: (os.rename(s, s.with_name("gone")), s.write_text("")), "STREAM/stream.json: cannot read: a part"
               " of the path is a file\nhint: choose another path"),
    "a link in a circle": (lambda s: (os.rename(s, s.with_name("gone")), s.symlink_to(s)), "STREAM/stream.json: cannot"
                           " read: its links lead in a circle\nhint: choose another path"),
    "a newer one": (lambda s: rewrite(s / "stream.json", format_version=2), "STREAM/stream.json: format version 2,"
                    " written by a newer mbf-mlx; this mbf-mlx reads versions up to 1\nhint: upgrade with: pip install -U"
                    " mbf-mlx\nhint: this mbf-mlx reads the stream's generations, so the file may be damaged instead: mbf"
                    " status STREAM --repair restores it"),
    "a newer generation": (lambda s: rewrite(s / CURRENT, format_version=3, written_by="mbf-mlx 4.1"),
                           f"STREAM/{CURRENT}: format version 3, written by mbf-mlx 4.1; this mbf-mlx reads versions up"
                           " to 2\nhint: upgrade with: pip install -U mbf-mlx"),
    "a field too many": (lambda s: rewrite(s / "stream.json", extra=1), "STREAM/stream.json: damaged: extra: extra inputs"
                         " are not permitted" + REPAIR),
    "a field too few": (lambda s: rewrite(s / "stream.json", rank=None), "STREAM/stream.json: damaged: rank: field"
                        " required" + REPAIR),
    "another rank": (lambda s: rewrite(s / "stream.json", rank=5), "STREAM/stream.json: damaged: its content is not what"
                     " was committed" + REPAIR),
    "another id": (lambda s: rewrite(s / "stream.json", id="b"), "STREAM/generations/000001: damaged: it belongs to"
                   " another stream" + BACK),
    "no JSON": (lambda s: (s / "stream.json").write_text("version: 1"), "STREAM/stream.json: damaged: not JSON (Expecting"
                " value: line 1 column 1 (char 0))" + REPAIR),
    "brackets without end": (lambda s: (s / "stream.json").write_text("[" * 100_000), None),
    "a list": (lambda s: (s / "stream.json").write_text("[]"), "STREAM/stream.json: damaged: document: input should be a"
               " valid dictionary or instance of identity" + REPAIR),
    "bytes": (lambda s: (s / "stream.json").write_bytes(b"\xff\x00"), None),
    "no manifest": (lambda s: (s / CURRENT).unlink(), f"STREAM/{CURRENT}: damaged: missing" + BACK),
    "a manifest of nothing": (lambda s: (s / CURRENT).write_text("{}"), f"STREAM/{CURRENT}: damaged: format_version:"
                              " field required" + BACK),
    "files that leave the folder": (lambda s: rewrite(s / CURRENT, files={"../../../x": {"bytes": 1, "sha256": "a"}}),
                                    f"STREAM/{CURRENT}: damaged: its content is not what was committed" + BACK),
}  # fmt: skip


@pytest.mark.parametrize("case", STREAMS)
def test_a_folder_that_is_no_stream_of_ours_is_refused_in_these_words(quick_path, case):
    make, message = STREAMS[case]
    stream = learn(new_stream(quick_path / "s"), 1)
    make(stream.path)
    with pytest.raises(InputError) as caught:
        StreamFolder.open(stream.path)
    said = str(caught.value)
    if message is None:  # json's own words, which change between versions of Python
        assert said.startswith(f"{stream.path}/stream.json: damaged: not JSON (") and said.endswith(
            REPAIR.replace("STREAM", str(stream.path))
        )
    else:
        assert said == message.replace("STREAM", str(stream.path))


S = "assistant"
NONE = f"{S}: no such stream\nhint: mbf learn {S} TASK --model BASE makes one"
NO_TASK = (
    "mail.jsonl: No such file or directory (a task is a .jsonl, .csv, .tsv or .json file, or a folder with train.*)"
)
LONG = "x" * 300
COUNT = "expected a whole number of at least"
# Words of the command, its exit code, and its message. With code 1 that is the whole message; with code 2, from typer,
# it is the end of the last line.
FLAGS = {
    "an unknown stream": (["status", S], 1, NONE),
    "undo of nothing": (["undo", S], 1, NONE),
    "an unknown stream to eval": (["eval", S], 1, NONE),
    "no prompt for no stream": (["generate", S, "hi"], 1, NONE),
    "a name over 255 bytes": (["status", LONG], 1, f"{LONG}/stream.json: cannot read: the name is too long\nhint: choose another path"),
    "a name over 255 bytes to undo": (["undo", "é" * 200], 1, f"{'é' * 200}/stream.json: cannot use: the name is too long\nhint: choose another path"),
    "no task": (["learn", S], 2, "Missing argument 'TASK...'"),
    "no task there": (["learn", S, "mail.jsonl"], 1, NO_TASK),
    "one name for two tasks": (["learn", S, "a", "b", "--name", "c"], 1, "--name: expected one task to name, got 2"),
    "rank zero": (["learn", S, "TASK", "--model", "m", "--rank", "0"], 1, f"LoRAConfig.rank: {COUNT} 1, got 0"),
    "rank in words": (["learn", S, "TASK", "--rank", "eight"], 2, "Invalid value for '--rank': Input should be a valid integer"),
    "an unknown flag": (["learn", S, "TASK", "--rnak", "4"], 2, "No such option: --rnak"),
    "an unknown command": (["lern", S], 2, "No such command 'lern'"),
    "no epochs": (["learn", S, "TASK", "--epochs", "0"], 1, f"TrainConfig.epochs: {COUNT} 1, got 0"),
    "a rate of zero": (["learn", S, "TASK", "--learning-rate", "0"], 1, "TrainConfig.learning_rate: expected a number above 0, got 0.0"),
    "a rate that is no number": (["learn", S, "TASK", "--learning-rate", "nan"], 1, "TrainConfig.learning_rate: expected a number above 0, got nan"),
    "a rate without end": (["learn", S, "TASK", "--learning-rate", "1e400"], 1, "TrainConfig.learning_rate: expected a number above 0, got inf"),
    "a batch of nothing": (["learn", S, "TASK", "--batch-size", "0"], 1, f"TrainConfig.batch_size: {COUNT} 1, got 0"),
    "no passes": (["learn", S, "TASK", "--grad-accumulation-steps", "0"], 1, f"TrainConfig.grad_accumulation_steps: {COUNT} 1, got 0"),
    "no steps": (["learn", S, "TASK", "--iters", "0"], 1, f"TrainConfig.iters: {COUNT} 1, got 0"),
    "a seed below zero": (["learn", S, "TASK", "--seed", "-1"], 1, "TrainConfig.seed: expected a whole number from 0 to 4,294,967,295, got -1"),
    "a seed beyond them": (["learn", S, "TASK", "--seed", str(1 << 32)], 1, f"TrainConfig.seed: expected a whole number from 0 to 4,294,967,295, got {1 << 32}"),
    "sometimes": (["learn", S, "TASK", "--save-every", "often"], 1, "TrainConfig.save_every: expected steps as in 200 or seconds as in 60s, got 'often'"),
    "never in minus": (["learn", S, "TASK", "--save-every", "-3"], 1, "TrainConfig.save_every: expected steps as in 200 or seconds as in 60s, got '-3'"),
    "a warmup of all": (["learn", S, "TASK", "--warmup", "2"], 1, "TrainConfig.warmup: expected a share of the steps in [0, 1), got 2.0"),
    "a patience below zero": (["learn", S, "TASK", "--patience", "-1"], 1, f"TrainConfig.patience: {COUNT} 0, got -1"),
    "a decay below zero": (["learn", S, "TASK", "--weight-decay", "-1"], 1, "TrainConfig.weight_decay: expected a number of at least 0, got -1.0"),
    "a row of no tokens": (["learn", S, "TASK", "--max-seq-length", "0"], 1, "DataConfig.max_seq_length: expected a whole number of at least 8 tokens, got 0"),
    "dropout of all": (["learn", S, "TASK", "--model", "m", "--dropout", "1"], 1, "LoRAConfig.dropout: expected a number in [0, 1), got 1.0"),
    "a scale of zero": (["learn", S, "TASK", "--model", "m", "--scale", "0"], 1, "LoRAConfig.scale: expected a number above 0, got 0.0"),
    "no blocks": (["learn", S, "TASK", "--model", "m", "--num-layers", "0"], 1, "LoRAConfig.num_layers: expected -1 or at least 1, got 0"),
    "no keys": (["learn", S, "TASK", "--model", "m", "--keys", ","], 1, "LoRAConfig.keys: expected names of layers, got ()"),
    "no stream and no base": (["learn", S, "TASK"], 1, NONE),
    "a template that is none": (["learn", S, "TASK", "--model", "m", "--template", "x"], 1, "DataConfig.template: expected chat or none, got 'x'"),
    "a start for no stream": (["next", S, "out"], 1, NONE),
    "absorb without a name": (["absorb", S, "out"], 2, "Missing option '--name'"),
    "absorb into nothing": (["absorb", S, "out", "--name", "x"], 1, NONE),
    "export to nowhere": (["export", S, "mlx"], 2, "Missing argument 'OUT'"),
    "a report of nothing": (["report", "a"], 1, "a: expected a stream or the results of mbf experiment, got neither"),
    "a device as settings": (["learn", S, "TASK", "--config", os.devnull], 1, f"{os.devnull}: cannot read: a device, pipe or socket is there\nhint: choose another path"),
    "settings that are not there": (["learn", S, "TASK", "--config", "x.toml"], 1, "x.toml: no such file\nhint: --config takes a TOML file with the names of the flags"),
    "a device as an experiment": (["experiment", os.devnull], 1, f"{os.devnull}: cannot read: a device, pipe or socket is there\nhint: choose another path"),
    "a file as the folder of a quickstart": (["quickstart", "--out", "mail.csv"], 1, "mail.csv: cannot write: something else is there\nhint: choose another path"),
    "a file as a stream": (["status", "mail.csv"], 1, "mail.csv/stream.json: cannot read: a part of the path is a file\nhint: choose another path"),
    "memory in words": (["plan", S, "TASK", "--memory", "lots"], 1, "--memory: expected a size as in 16GB or 900MB, got 'lots'"),
    "less than no memory": (["learn", S, "TASK", "--model", "m", "--memory-limit", "-5GB"], 1, "--memory-limit: expected a size as in 16GB or 900MB, got '-5GB'"),
    "a method's option without a value": (["learn", S, "TASK", "--model", "m", "--method-options", "x"], 1, "--method-options: expected KEY=VALUE,KEY=VALUE, got 'x'"),
    "a method's option that it does not have": (["learn", S, "TASK", "--model", "m", "--method", "ewc", "--method-options", "lamda=2"], 1, "method ewc: expected options of strength, fading, first_a, got 'lamda'"),
    "an option that another method has": (["learn", S, "TASK", "--model", "m", "--method", "sequential", "--method-options", "rate=2"], 1, "method sequential: expected options of first_a, got 'rate'"),
    "saves after a number with an exponent": (["learn", S, "TASK", "--save-every", "1e3"], 1, "TrainConfig.save_every: expected steps as in 200 or seconds as in 60s, got '1e3'"),
    "saves after seconds without end": (["learn", S, "TASK", "--save-every", "infs"], 1, "TrainConfig.save_every: expected steps as in 200 or seconds as in 60s, got 'infs'"),
    "a norm that is no number": (["learn", S, "TASK", "--max-grad-norm", "nan"], 1, "TrainConfig.max_grad_norm: expected a number of at least 0, got nan"),
    "two models to check with": (["check", "TASK", "--model", "m", "--stream", S], 1, "--model and --stream: expected one of them (a stream has its own model)"),
    "a task as an experiment": (["experiment", "TASK"], 1, "mail.csv: not readable as TOML: Expected '=' after a key in a key/value pair (at line 1, column 7)"),
    "a folder as an experiment": (["experiment", "a"], 1, "a: cannot read: a folder is there\nhint: choose another path"),
    "a recipe outside the recipes": (["learn", S, "TASK", "--model", ""], 1, ".: not a model folder: expected a config.json in it"),
    "a link of a hub as a task": (["check", "https://hub/x.jsonl"], 1, NO_TASK.replace("mail.jsonl", "https:/hub/x.jsonl")),
    "a task to check that is not there": (["check", "mail.jsonl"], 1, NO_TASK),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_do_not_fit_end_with_their_code_and_one_message(quick_path, monkeypatch, case):
    words, code, message = FLAGS[case]
    monkeypatch.chdir(quick_path)
    (quick_path / "mail.csv").write_text("prompt,completion\na,b\nc,d\n")
    (quick_path / "a").mkdir()
    done = CliRunner().invoke(app, ["mail.csv" if word == "TASK" else word for word in words])
    assert done.exit_code == code, done.output
    if code == 1:
        assert done.stderr == f"error: {message}\n"
    else:
        assert f"Error: {message}" in done.stderr
    assert sorted(path.name for path in quick_path.iterdir()) == ["a", "mail.csv"]


def test_a_recipe_that_is_none_is_told_all_there_are():
    from mbf_mlx.base.recipe import recipes

    done = CliRunner().invoke(app, ["fetch", "gpt-7"])
    names = ", ".join(recipes())
    assert (
        done.stderr
        == f"error: gpt-7: no such recipe: expected one of {names}\nhint: mbf learn --model takes hub ids, too\n"
    )


def test_the_tables_hold_well_over_100_wrong_inputs_with_their_whole_messages():
    """The tables for task files, models, GGUF and safetensors files are in tests/data/ and tests/base/."""
    assert len([case for case in FLAGS.values() if case[1] == 1] + [*ADAPTERS, *STREAMS, *NAMES]) >= 125


NAMES = ["", "a/b", "a\\b", "..", ".", "a\nb", "a\0b", "x" * 101, " a", "a\t", "\u202etxt", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_task_s_name_that_could_be_mistaken_for_something_else_is_refused(quick_path, name):
    stream = learn(new_stream(quick_path / "s"), 1)
    start = exchange.next_start(stream, "mlx")
    save(quick_path / "out", weights=start["adapters.safetensors"])
    before = contents(stream.path)
    done = CliRunner().invoke(app, ["absorb", str(stream.path), str(quick_path / "out"), "--name", name])
    assert done.exit_code == 1, done.output
    assert done.stderr == (
        f"error: task name {name[:101]!r}: expected 1 to 100 letters without slashes, control characters or white space"
        " around them (--name gives a task another name)\n"
    )
    assert contents(stream.path) == before


@pytest.mark.parametrize("name", ["two words", "é", "日本語", "a.b.c", "-x", "a" * 100, "it's", "100%", "$HOME", "*"])
def test_streams_and_tasks_of_any_printable_name_work(quick_path, name):
    stream = new_stream(quick_path / name)
    files = adapter_files(tune(stream.state(), StreamTools.start(stream)), scale=2.0, num_layers=2, base="tiny")
    out = quick_path / f"{name} out"
    out.mkdir()
    for file, data in files.items():
        (out / file).write_bytes(data)
    words = ["absorb", "--name", name, "--", str(stream.path), str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert [record.name for record in StreamFolder.open(stream.path).history()] == [name]


class StreamTools:
    @staticmethod
    def start(stream):
        from mbf_mlx.methods import make

        return make("slao").start(stream.state())


# Whatever a file holds, our readers take it or refuse it with an InputError.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused_or_read(read):
    try:
        return read()
    except InputError as error:
        assert str(error)


@QUICK
@given(st.data())
def test_any_change_to_a_record_is_refused_or_read(data):
    kind = data.draw(st.sampled_from([Identity, Manifest, TaskRecord]))
    document = data.draw(st.dictionaries(st.sampled_from(sorted(kind.model_fields)) | st.text(max_size=5), json_values))
    whole = json.loads(identity().to_json()) if kind is Identity else {}
    read = refused_or_read(lambda: parse(kind, json.dumps({**whole, **document}).encode(), "here"))
    assert read is None or parse(kind, read.to_json(), "here").to_json() == read.to_json()


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_record_a_task_or_tensors(quick_path, data):
    refused_or_read(lambda: parse(Manifest, data, "here"))
    refused_or_read(lambda: decode_tensors(data, "here"))
    for suffix in (".jsonl", ".csv", ".tsv", ".json"):
        file = quick_path / f"task{suffix}"
        file.write_bytes(data)
        refused_or_read(lambda file=file: read_task(file))


@QUICK
@given(json_values, st.sampled_from([CONFIG, PEFT]), st.text(max_size=6))
def test_any_configuration_of_an_adapter_is_refused_or_read(quick_path, value, config, key):
    import shutil

    key = key or "lora_parameters"
    shutil.rmtree(quick_path / "out", ignore_errors=True)
    (save if config is CONFIG else save_peft)(quick_path / "out", {**config, key: value})
    read = read_adapter if config is CONFIG else read_peft
    for name in {key, *config, "alpha_pattern", "rank_pattern"}:
        (quick_path / "out/adapter_config.json").write_text(json.dumps({**config, name: value}))
        refused_or_read(lambda: read(quick_path / "out"))


@QUICK
@given(st.integers(0, 400), st.integers(0, 255))
def test_any_changed_byte_of_an_adapter_is_refused_or_read(quick_path, at, byte):
    import shutil

    shutil.rmtree(quick_path / "out", ignore_errors=True)
    save(quick_path / "out")
    path = quick_path / "out/adapters.safetensors"
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    refused_or_read(lambda: read_adapter(quick_path / "out"))
