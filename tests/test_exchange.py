import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from mbf_mlx import exchange
from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.adapters import peft
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair, make
from mbf_mlx.reference import orthogonal_init
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import verify_all
from tests.support.elsewhere import trained, write
from tests.support.streams import contents, learn, new_stream, record, tune


def rows_cosines(one, other):
    return [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("kind", exchange.FORMATS)
@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_a_task_trained_elsewhere_is_merged_as_one_trained_here(tmp_path, kind, tasks):
    stream = learn(new_stream(tmp_path / "s"), tasks)
    start = make("slao").start(stream.state())
    handed = write(exchange.next_start(stream, kind), tmp_path / "start")
    read = peft.read_peft(handed) if kind == "peft" else adapter.read_adapter(handed)
    for name, pair in start.items():
        np.testing.assert_array_equal(read.factors[name].a, pair.a)
        np.testing.assert_array_equal(read.factors[name].b, pair.b)
    folder, tuned = trained(stream, tmp_path / "tuned", kind)
    expected = make("slao").finish(stream.state(), tuned)
    with stream.writer():
        done = exchange.absorb(stream, folder, "mail")
    file = folder / (peft.WEIGHTS if kind == "peft" else adapter.WEIGHTS)
    assert done.record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    cosines = [rows_cosines(pair.a, tuned[name].a) for name, pair in start.items()]
    assert done.cosine == pytest.approx(np.mean(cosines), abs=1e-7)
    state = StreamFolder.open(tmp_path / "s").state()
    assert state.t == tasks + 1 == done.record.t
    for name, pair in expected.deployed.items():
        np.testing.assert_array_equal(state.deployed[name].a, pair.a)
        np.testing.assert_array_equal(state.deployed[name].b, pair.b)
        np.testing.assert_array_equal(state.kept["tuned_b"][name], expected.kept["tuned_b"][name])


def test_a_stream_goes_on_learning_after_an_absorbed_task(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, _ = trained(stream, tmp_path / "tuned", "peft")
    with stream.writer():
        exchange.absorb(stream, folder, "mail")
    learn(stream)
    assert [record.name for record in stream.history()] == ["task1", "mail", "task3"]


@pytest.mark.parametrize("tasks", [0, 1, 2])
@pytest.mark.parametrize("kind", exchange.FORMATS)
def test_an_absorbed_task_is_undone_and_absorbed_again_to_the_same_bytes(tmp_path, kind, tasks):
    """As the first task of a stream, too; a second step back is refused."""
    stream = learn(new_stream(tmp_path / "s"), tasks)
    before = contents(stream.current().folder)
    folder, _ = trained(stream, tmp_path / "tuned", kind)

    def absorb():
        with stream.writer():
            exchange.absorb(stream, folder, "mail")
        return contents(stream.current().folder)

    absorbed = absorb()
    with stream.writer():
        assert stream.undo().name == "mail"
        assert contents(stream.current().folder) == before
        with pytest.raises(
            InputError, match="only one step back is kept, and it is used up|nothing to undo: it has learned"
        ):
            stream.undo()
    again = absorb()
    assert again == absorbed
    learn(stream)
    with stream.writer():
        assert stream.undo().t == tasks + 2
    assert contents(stream.current().folder) == again


def test_another_scale_goes_into_b(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, tuned = trained(stream, tmp_path / "tuned", "mlx")
    config = json.loads((folder / adapter.CONFIG).read_text())
    config["lora_parameters"]["scale"] = 8.0
    (folder / adapter.CONFIG).write_text(json.dumps(config))
    read = exchange.read_tuned(stream, folder)
    for name, pair in tuned.items():
        np.testing.assert_array_equal(read.factors[name].b, 4 * pair.b)
    assert read.notes == ("its scale is 8, the stream's 2: the ratio goes into B",)


def as_bfloat16(array):
    """An array's upper halves of 16 bits, as bfloat16 stores them; cut, not rounded."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def as_safetensors(tensors, dtype):
    """A safetensors file of a type that NumPy has no name for: `dtype` as the format calls it."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


# Name in the format -> (to what is stored, back to float32).
HALVES = {
    "F16": (lambda x: x.astype(np.float16), lambda x: x.astype(np.float32)),
    "BF16": (as_bfloat16, lambda x: (x.astype(np.uint32) << 16).view(np.float32)),
}


@pytest.mark.parametrize("kind", exchange.FORMATS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_adapters_are_absorbed_too(tmp_path, dtype, kind):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, tuned = trained(stream, tmp_path / "tuned", kind)
    store, back = HALVES[dtype]
    file = folder / (peft.WEIGHTS if kind == "peft" else adapter.WEIGHTS)
    stored = {name: store(tensor) for name, tensor in safetensors.numpy.load_file(file).items()}
    file.write_bytes(as_safetensors(stored, dtype))
    with stream.writer():
        exchange.absorb(stream, folder, "mail")
    kept = StreamFolder.open(tmp_path / "s").state().kept["tuned_b"]
    for name, pair in tuned.items():
        np.testing.assert_array_equal(kept[name], back(store(pair.b)))


def test_the_way_through_another_tools_files_changes_no_byte_of_the_state(tmp_path):
    """Float32 adapters, whose scale times rank is a whole number: what PEFT stores beside the factors."""
    states = {}
    for kind in (None, *exchange.FORMATS):
        stream = learn(new_stream(tmp_path / f"s-{kind}"), 1)
        if kind is None:  # trained here
            learn(stream)
        else:
            folder, _ = trained(stream, tmp_path / f"tuned-{kind}", kind)
            with stream.writer():
                exchange.absorb(stream, folder, "task2")
        current = stream.path / "current"
        states[kind] = [(current / name).read_bytes() for name in ("state.safetensors", "adapter/adapters.safetensors")]
    assert states["peft"] == states["mlx"] == states[None]


@pytest.mark.parametrize("name", ["ewc", "replay", "o-lora", "joint"])
def test_a_method_that_takes_part_in_training_says_so(tmp_path, name):
    stream = new_stream(tmp_path / "s", method=name, method_options=make(name).options)
    message = (
        rf"method {name}: expected a method that only merges \(slao, .*\); this one takes part in the training"
        " itself, so its tasks cannot be trained elsewhere\nhint: mbf learn trains them here"
    )
    with pytest.raises(InputError, match=message):
        exchange.next_start(stream, "peft")
    with stream.writer(), pytest.raises(InputError, match=message):
        exchange.absorb(stream, tmp_path, "mail")


@pytest.mark.parametrize("name", ["slao", "sequential", "products", "running-mean", "task-arithmetic", "magmax", "ties",
                                  "dare", "opcm"])  # fmt: skip
def test_every_method_that_only_merges_absorbs(tmp_path, name):
    stream = learn(new_stream(tmp_path / "s", method=name, method_options=make(name).options), 1)
    folder, _ = trained(stream, tmp_path / "tuned", "peft")
    with stream.writer():
        exchange.absorb(stream, folder, "mail")
    there = learn(new_stream(tmp_path / "t", method=name, method_options=make(name).options), 2)
    for layer, pair in there.state().deployed.items():
        np.testing.assert_array_equal(
            stream.state().deployed[layer].b @ stream.state().deployed[layer].a, pair.b @ pair.a
        )


@pytest.mark.parametrize(("name", "options"), [("anchored", {}), ("products", {"metric": "inputs"})])
def test_a_method_that_measures_inputs_asks_for_the_rows(tmp_path, name, options):
    stream = new_stream(tmp_path / "s", method=name, method_options=make(name, options).options)
    folder, _ = trained(stream, tmp_path / "tuned", "peft")
    message = f"--task: method {name} measures .* expected the task file that the adapter was trained on, got none"
    refused(stream, folder, message)


@pytest.mark.parametrize("kind", exchange.FORMATS)
def test_an_adapter_of_another_architecture_is_refused_where_its_base_is_here(tmp_path, kind):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, _ = trained(stream, tmp_path / "tuned", kind)
    base = tmp_path / "qwen"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen2"}')
    file = folder / (peft.CONFIG if kind == "peft" else adapter.CONFIG)
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(base), "model": str(base)}))
    refused(
        stream, folder, rf"trained on {base}: expected architecture 'llama', got 'qwen2' \(--force absorbs it anyway"
    )
    (base / "config.json").write_text('{"model_type": "mistral"}')  # what mlx-lm loads as a Llama
    assert exchange.read_tuned(stream, folder)
    (base / "config.json").write_text('{"model_type": "qwen2"}')
    with stream.writer():
        assert exchange.absorb(stream, folder, "mail", force=True).record.t == 2


def refused(stream, folder, message, **options):
    before = contents(stream.path)
    with stream.writer(), pytest.raises(InputError, match=message):
        exchange.absorb(stream, folder, "mail", **options)
    assert contents(stream.path) == before


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-6, 1e-9, 0])
def test_the_start_is_compared_without_making_its_basis_however_near_its_rows_are(spread):
    """From independent rows to rows that are one and the same, where only QR has a basis."""
    generator = np.random.default_rng(3)
    shared, own, tuned = (generator.normal(size=shape) for shape in ((1, 32), (4, 32), (4, 32)))
    a = (shared + spread * own).astype(np.float32)
    basis = orthogonal_init(a.astype(np.float64))
    np.testing.assert_allclose(exchange._basis_cosines(a, tuned), rows_cosines(basis, tuned), atol=1e-5)


def test_an_adapter_that_started_elsewhere_is_refused_unless_forced(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    generator = np.random.default_rng(5)
    other = {
        name: Pair(*(generator.normal(size=f.shape).astype(np.float32) for f in pair))
        for name, pair in make("slao").start(stream.state()).items()
    }
    folder = write(adapter.adapter_files(other, scale=2.0, num_layers=2, base="tiny"), tmp_path / "other")
    refused(stream, folder, r"start of task 2 \(mean cosine of A's rows at least 0.3\), got -?0\.\d\d\nhint: mbf next")
    with stream.writer():
        assert exchange.absorb(stream, folder, "mail", force=True).cosine < 0.3


def test_an_adapter_that_does_not_fit_is_refused_with_everything_that_is_wrong(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    _, tuned = trained(stream, tmp_path / "good", "mlx")
    layers = list(tuned)
    wrong = dict(tuned)
    del wrong[layers[0]]
    wrong[layers[1]] = Pair(tuned[layers[1]].a[:, :-1], tuned[layers[1]].b)
    wrong["model.layers.7.mlp.up_proj"] = tuned[layers[2]]
    folder = write(adapter.adapter_files(wrong, scale=2.0, num_layers=2, base="tiny"), tmp_path / "wrong")
    message = (
        rf"does not fit .*rank 4, base tiny.*:\n  {layers[0]}: missing\n  {layers[1]}: expected A \(4, 16\) and B"
        r" \(24, 4\), got \(4, 15\) and \(24, 4\)\n  model.layers.7.mlp.up_proj: not a layer of this stream"
    )
    refused(stream, folder, message)


def test_an_adapter_of_another_rank_or_with_nan_is_refused(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    _, tuned = trained(stream, tmp_path / "good", "mlx")
    short = {name: Pair(pair.a[:2], pair.b[:, :2]) for name, pair in tuned.items()}
    folder = write(adapter.adapter_files(short, scale=2.0, num_layers=2, base="tiny"), tmp_path / "short")
    refused(stream, folder, r"expected A \(4, 16\) and B \(24, 4\), got \(2, 16\) and \(24, 2\)")
    nan = {name: Pair(pair.a, pair.b * np.nan) for name, pair in tuned.items()}
    refused(
        stream,
        write(adapter.adapter_files(nan, scale=2.0, num_layers=2, base="tiny"), tmp_path / "nan"),
        "holds NaN or infinite values",
    )


def test_a_name_that_is_taken_and_a_layout_that_is_none_are_refused(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, _ = trained(stream, tmp_path / "tuned", "mlx")
    with stream.writer(), pytest.raises(InputError, match="has learned a task named 'task1'; choose another name, or"):
        exchange.absorb(stream, folder, "task1")
    with pytest.raises(InputError, match="--format: expected peft or mlx, got 'gguf'"):
        exchange.next_start(stream, "gguf")
    with stream.writer():
        exchange.absorb(stream, folder, "task1", again=True)


def test_next_and_absorb_run_where_mlx_and_torch_are_not_there(tiny_llama, tmp_path):
    """The whole way on a plain install: a stream made for the first task, trained elsewhere, absorbed, shown."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    block = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('mlx', 'mlx_lm', 'torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from mbf_mlx.commands import main\nmain()"
    )

    def mbf(*words):
        command = [sys.executable, "-c", block, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = mbf("next", tmp_path / "s", tmp_path / "start", "--model", tiny_llama, "--rank", 4)
    assert done.returncode == 0, done.stderr
    start = peft.read_peft(tmp_path / "start")
    tuned = tune(StreamFolder.open(tmp_path / "s").state(), start.factors)
    write(peft.peft_files(tuned, 2.0, base="tiny", num_blocks=2), tmp_path / "tuned")
    done = mbf("absorb", tmp_path / "s", tmp_path / "tuned", "--name", "mail")
    assert done.returncode == 0, done.stderr
    assert "absorbed mail as task 1" in done.stdout
    done = mbf("status", tmp_path / "s", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"][0]["name"] == "mail"


KINDS = {
    "exact_match": [{"prompt": word, "completion": "yes"} for word in ("red", "green", "blue")],
    "rouge_l": [
        {"prompt": word, "completion": "the stream keeps what it has learned " * 4} for word in ("red", "blue")
    ],
    "loss": [{"text": text} for text in ("red green", "green blue", "blue red")],
}


@pytest.mark.parametrize("metric", KINDS)
def test_a_task_tuned_elsewhere_is_scored_by_the_metric_that_fits_it(tmp_path, write_jsonl, metric):
    """Without a tokenizer by its words; the next test has the base's own."""
    stream = new_stream(tmp_path / "s")
    folder, _ = trained(stream, tmp_path / "tuned", "peft")
    with stream.writer():
        record = exchange.absorb(stream, folder, "mail", source=str(write_jsonl("mail.jsonl", KINDS[metric]))).record
    assert record.metric == metric


@pytest.mark.parametrize("metric", KINDS)
def test_an_absorbed_task_has_the_metric_of_a_learned_one(tiny_llama, tmp_path, write_jsonl, metric):
    from mbf_mlx import Stream

    write_jsonl("mail/test.jsonl", KINDS[metric][:1])
    task = write_jsonl("mail/train.jsonl", KINDS[metric][1:]).parent
    learned = Stream.open(tmp_path / "learned", base=str(tiny_llama), method="slao")
    absorbing = Stream.open(tmp_path / "absorbing", base=str(tiny_llama), method="slao")
    folder, _ = trained(absorbing.folder, tmp_path / "tuned", "peft")
    assert absorbing.absorb(folder, "mail", task=task).record.metric == metric
    assert learned.learn(task, iters=1)[0].metric == metric
    assert [each["metric"] for each in absorbing.evaluate()["tasks"]] == [metric]


@pytest.mark.parametrize("kind", exchange.FORMATS)
@pytest.mark.parametrize(("tasks", "scale"), [(0, 2.0), (2, 2.0), (2, 0.3)])
def test_the_start_that_was_handed_out_is_no_task(tmp_path, kind, tasks, scale):
    stream = learn(new_stream(tmp_path / "s", scale=scale), tasks)
    start = write(exchange.next_start(stream, kind), tmp_path / "start")
    before = contents(stream.path)
    message = "it is the start of task|its update is zero in every layer"
    with stream.writer(), pytest.raises(InputError, match=message):
        exchange.absorb(stream, start, "mail")
    assert contents(stream.path) == before
    with stream.writer():
        assert exchange.absorb(stream, start, "mail", force=True).record.t == tasks + 1


@pytest.mark.parametrize("kind", exchange.FORMATS)
def test_a_scale_of_0_is_no_task(tmp_path, kind):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, _ = trained(stream, tmp_path / "tuned", kind)
    place = folder / ("adapter_config.json")
    config = json.loads(place.read_text())
    if kind == "peft":
        config["lora_alpha"] = 0
    else:
        config["lora_parameters"]["scale"] = 0.0
    place.write_text(json.dumps(config))
    with stream.writer(), pytest.raises(InputError, match="its update is zero in every layer .a scale of 0"):
        exchange.absorb(stream, folder, "mail")
    assert stream.state().t == 1


@pytest.mark.parametrize("kind", exchange.FORMATS)
def test_numbers_that_float32_cannot_hold_are_refused_by_name(tmp_path, kind):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, _ = trained(stream, tmp_path / "tuned", kind)
    place = folder / (peft.WEIGHTS if kind == "peft" else adapter.WEIGHTS)
    tensors = {name: value.astype(np.float64) for name, value in safetensors.numpy.load_file(place).items()}
    next(iter(tensors.values()))[0, 0] = 1e39
    safetensors.numpy.save_file(tensors, place)
    with stream.writer(), pytest.raises(InputError, match="expected numbers that float32 can hold, got 1e.39"):
        exchange.absorb(stream, folder, "mail")
    assert stream.state().t == 1


def test_verify_finds_numbers_that_are_not_finite(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    state = stream.state()
    next(iter(state.kept["tuned_b"].values()))[0, 0] = np.inf
    with stream.writer():
        stream.commit(stream.current(), replace(state, t=2), record(2), "models/tiny", {})
    with pytest.raises(InputError, match="000002: holds numbers that are not finite, first in model.layers"):
        verify_all(stream)


def test_an_update_beyond_float32_is_refused_even_if_forced(tmp_path):
    stream = learn(new_stream(tmp_path / "s"), 1)
    factors = {
        name: Pair(np.full((4, inner), 1e30, np.float32), np.full((out, 4), 1e30, np.float32))
        for name, (out, inner) in stream.identity.layers.items()
    }
    folder = write(peft.peft_files(factors, 2.0, base="tiny", num_blocks=2), tmp_path / "tuned")
    with stream.writer(), pytest.raises(InputError, match="is beyond float32; the stream is unchanged|not finite"):
        exchange.absorb(stream, folder, "mail", force=True)
    assert stream.state().t == 1


@pytest.mark.parametrize("kind", exchange.FORMATS)
def test_a_huge_file_is_refused_before_it_is_read(tmp_path, kind):
    stream = learn(new_stream(tmp_path / "s"), 1)
    folder, _ = trained(stream, tmp_path / "tuned", kind)
    place = folder / (peft.WEIGHTS if kind == "peft" else adapter.WEIGHTS)
    with open(place, "r+b") as file:
        file.truncate(3 << 30)  # sparse
    with stream.writer(), pytest.raises(InputError, match="expected factors of rank 4, at most .* got 3,221,225,472"):
        exchange.absorb(stream, folder, "mail")
