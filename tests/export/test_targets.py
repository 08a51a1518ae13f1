"""One way through all targets: written, opened again, measured, refused where too much was lost; and the card."""

import json
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mbf_mlx.adapters.mlx_lm import adapter_files, read_adapter
from mbf_mlx.adapters.peft import read_peft
from mbf_mlx.errors import InputError
from mbf_mlx.export import TARGETS, card, check_options, run
from mbf_mlx.export.card import About
from mbf_mlx.export.gguf.write import planned_bytes
from mbf_mlx.export.job import ExportRows
from mbf_mlx.export.outcome import check, fused_document, least_agreement, shown_agreement
from mbf_mlx.export.targets import WRITERS
from tests.support.factors import ALL_KEYS, SCALE, make_factors
from tests.support.jobs import job_of
from tests.support.rows import rows_of
from tests.support.tiny_llama import write_tiny_llama
from tests.support.token_rows import token_rows

STATUS = {
    "tasks": [{"name": "mail", "metric": "exact_match"}, {"name": "a|b", "metric": "exact_match"}],
    "scores": [[0.9, None], [0.8, 0.75]],
    "average_accuracy": 0.775,
    "backward_transfer": -0.1,
    "forgetting": 0.1,
    "method": "slao",
    "base": {"quantization": "4 bits, group 32, affine"},
    "settings": {"rank": 4},
}


@pytest.fixture
def job(tiny_llama, tmp_path):
    return job_of(
        tiny_llama,
        make_factors(tiny_llama),
        tmp_path / "out",
        about=About("tiny", STATUS, "apache-2.0", "org/tiny"),
        read_rows=lambda: ExportRows(token_rows(8, seed=1), token_rows(8), "made-up rows"),
    )


def test_every_target_of_the_table_has_its_function():
    assert list(TARGETS) == list(WRITERS)


def test_a_fused_folder_is_compared_with_the_live_adapter(job):
    document = run(job, "mlx")
    quality = document["quality"]
    assert (quality["rows"], quality["positions"], quality["source"]) == (8, 24, "made-up rows")
    assert 0 <= quality["kl"] < 0.02
    assert quality["agreement"] >= 0.95
    assert document["retention"] > 0.98
    assert document["lost"] == []
    assert json.loads(json.dumps(document)) == document


def test_at_32_bits_the_export_is_the_live_model(job):
    quality = run(replace(job, bits=32), "mlx")["quality"]
    assert quality["agreement"] == 1
    assert quality["kl"] < 1e-6
    assert quality["live"] == quality["exported"]


def test_the_measured_divergence_is_that_of_the_two_models(job, mx):
    from mlx_lm.utils import load_adapters, load_model

    document = run(job, "mlx")
    folder = job.out.parent / "adapter"
    folder.mkdir()
    files = adapter_files(job.factors, scale=SCALE, num_layers=2, base="tiny")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    live, fused = load_adapters(load_model(job.base)[0], str(folder)), load_model(job.out)[0]

    def log_probabilities(model, row):
        logits = np.array(model(mx.array(row.tokens[None])).astype(mx.float32))[0, 8:11].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    pairs = [(log_probabilities(live, row), log_probabilities(fused, row)) for row in job.rows.compare]
    kl = np.mean([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs])
    agreement = np.mean([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
    assert document["quality"]["kl"] == pytest.approx(kl, rel=0.02)
    assert document["quality"]["agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize("kind", [None, "F16", "Q8_0", "Q4_1"])
def test_a_gguf_file_is_asked_for_what_llama_cpp_would_read_in_it(job, kind, tmp_path, mx):
    from mbf_mlx.base.load import load_base
    from mbf_mlx.export.quality.compare import Reference
    from tests.support.gguf_files import import_gguf

    told = run(replace(job, kind=kind, allow_loss=True), "gguf")["quality"]
    assert (told["rows"], told["positions"], told["source"]) == (8, 24, "made-up rows")
    # The same by another way: the live adapter at 32 bits, and the file read back as a base.
    run(replace(job, bits=32, out=tmp_path / "live"), "mlx")
    import_gguf(job.out, tmp_path / "imported")
    live, imported = (load_base(tmp_path / name, dtype="float32").model for name in ("live", "imported"))
    expected = Reference(live, job.rows.compare).compare(imported)
    assert told["kl"] == pytest.approx(expected.kl, rel=0.02, abs=1e-6)
    assert told["agreement"] == pytest.approx(expected.agreement)
    assert told["kl"] < 0.02 or kind == "Q4_1"


@pytest.mark.parametrize(
    ("target", "options", "kept"),
    [("ollama", {}, 0.98), ("lmstudio", {}, 0.98), ("lmstudio", {"kind": "mlx", "bits": 16}, 0.999)],
)
def test_what_other_servers_get_is_asked_the_same_rows(job, target, options, kept):
    document = run(replace(job, **options), target)
    assert document["quality"]["rows"] == 8 and document["quality"]["kl"] < 0.02
    assert document["retention"] > kept and document["lost"] == []
    sentence = "made-up rows: the live adapter's token at"
    (card,) = job.out.rglob("README.md")
    assert sentence in card.read_text()


def test_an_export_that_many_layers_make_much_larger_says_what_6_bits_would_take(job, tmp_path):
    wide = replace(job, factors=make_factors(job.base, ALL_KEYS, size=0.1), read_rows=ExportRows)
    document = run(wide, "mlx")
    assert document["bytes"] > 1.2 * document["bytes_base"]
    (note,) = document["notes"]
    mixed = run(replace(wide, bits=6, out=tmp_path / "mixed"), "mlx")
    assert note.endswith(f"takes {mixed['bytes'] / 1e6:,.1f} MB") and mixed["bytes"] < document["bytes"]
    narrow = run(replace(job, out=tmp_path / "narrow"), "mlx")
    assert not any("--bits 6" in note for note in narrow["notes"])


def test_a_gguf_file_of_the_bases_own_size_is_fitted_to_the_rows_on_the_bases_grid(job, tmp_path):
    from mbf_mlx.export.gguf.write import write_gguf

    fit, others = token_rows(64, seed=1), token_rows(32)
    small = replace(job, factors=make_factors(job.base, size=0.05), bits=4, allow_loss=True)
    fitted = run(replace(small, read_rows=lambda: ExportRows(fit, others)), "gguf")
    unfitted = run(replace(small, read_rows=lambda: ExportRows((), others), out=tmp_path / "not"), "gguf")
    write_gguf(job_of(job.base, {}, tmp_path / "base.gguf", kind="Q4_1"))
    assert abs(fitted["bytes"] - (tmp_path / "base.gguf").stat().st_size) < 100  # its name is shorter
    assert fitted["quality"]["kl"] < unfitted["quality"]["kl"]


def test_an_export_that_lost_too_much_is_refused_with_what_the_alternatives_cost(job):
    lossy = replace(job, factors=make_factors(job.base, size=0.002), read_rows=ExportRows, bits=4)
    with pytest.raises(InputError) as error:
        run(lossy, "mlx")
    message = str(error.value)
    assert "times as large as the update" in message and "--calibration" in message
    assert "--bits 8:" in message and "--bits 16:" in message and "--allow-loss writes it anyway" in message
    assert not job.out.exists()
    document = run(replace(lossy, allow_loss=True), "mlx")
    assert document["lost"] and job.out.exists()


@pytest.mark.parametrize(("target", "kind"), [("gguf", "Q4_0"), ("ollama", "Q4_1"), ("lmstudio", "Q4_0")])
def test_what_the_alternatives_cost_is_said_of_gguf_files_too(job, target, kind, tmp_path):
    lossy = replace(job, factors=make_factors(job.base, size=0.002), read_rows=ExportRows, kind=kind)
    with pytest.raises(InputError) as error:
        run(lossy, target)
    assert not job.out.exists()
    for bits in (8, 16):
        planned = planned_bytes(lossy, bits)
        assert f"--bits {bits}: {planned / 1e6:.1f} MB" in str(error.value)
        written = run(replace(lossy, kind=None, bits=bits, allow_loss=True, out=tmp_path / f"at{bits}"), "gguf")
        assert 0 < written["bytes"] - planned < 20_000  # the vocabulary


def test_an_update_that_is_not_in_the_weights_is_refused(job):
    document = fused_document([], 100, 100) | {"retention": 0.13}
    with pytest.raises(InputError, match=r"it keeps 0\.13 of the update; expected at least 0\.8"):
        check(job, document, lambda job, bits: 0)


def test_a_few_rows_have_to_disagree_more_than_by_chance_and_many_do_not():
    assert 16 / 18 > least_agreement(18) > 15 / 18  # .95 of 18 is 17.1, two standard errors are 1.8
    assert least_agreement(10**6) == pytest.approx(0.95, abs=1e-3)
    assert least_agreement(2) == 0.5 and least_agreement(1) == 0  # one place that differs shows nothing


@pytest.mark.parametrize(
    ("agreement", "positions", "least"), [(1.0, 13, 0.772), (1.0, 35, 0.901), (0.97, 200, 0.936), (12 / 13, 13, 0.667)]
)
def test_what_so_many_places_show_is_wilsons_interval(agreement, positions, least):
    assert shown_agreement(agreement, positions) == pytest.approx(least, abs=1e-3)


def test_an_export_says_when_its_rows_are_too_few(job):
    few = replace(job, read_rows=lambda: ExportRows(token_rows(8, seed=1), token_rows(3), "made-up rows"))
    (note,) = run(few, "mlx")["notes"]
    assert note.startswith("9 places in the answers of 3 rows were compared: they show only that at least 56 % of")
    many = replace(job, read_rows=lambda: ExportRows(token_rows(8, seed=1), token_rows(20), "rows"), force=True)
    assert run(many, "mlx")["notes"] == []


def test_answers_that_changed_refuse_an_export_whatever_its_retention(job):
    document = fused_document([], 100, 100) | {"quality": {"agreement": 0.8, "positions": 200, "rows": 90}}
    with pytest.raises(
        InputError, match=r"agrees with the live adapter at 80\.0 % of 200 places; expected at least 95"
    ):
        check(job, document, lambda job, bits: 0)


def test_without_rows_the_retention_alone_is_said(job):
    document = run(replace(job, read_rows=ExportRows), "mlx")
    assert document["quality"] is None
    assert document["retention"] > 0.98


def test_the_adapter_folder_is_what_mlx_lm_reads(job):
    document = run(job, "adapter")
    read = read_adapter(job.out)
    assert read.scale == SCALE
    for name, pair in job.factors.items():
        np.testing.assert_array_equal(read.factors[name].a, pair.a)
        np.testing.assert_array_equal(read.factors[name].b, pair.b)
    assert f"--adapter-path {job.out}" in document["next"][0]


def test_the_peft_folder_names_the_unquantized_base_and_reads_back(job):
    document = run(job, "peft")
    read = read_peft(job.out)
    assert read.base == "org/tiny" and read.scale == SCALE
    assert document["lora_alpha"] == 8


@pytest.mark.parametrize(
    ("rank", "flag"), [(4, ""), (16, ""), (17, " --max-lora-rank 32"), (48, " --max-lora-rank 64")]
)
def test_vllm_is_told_of_a_rank_that_it_does_not_take_by_itself(job, rank, flag):
    document = run(replace(job, factors=make_factors(job.base, rank=rank)), "peft")
    assert document["next"] == [f"vllm serve org/tiny --enable-lora --lora-modules tuned={job.out}{flag}"]


def test_words_of_commands_with_spaces_are_quoted(job, tmp_path):
    (tmp_path / "my models").mkdir()
    out = tmp_path / "my models" / "a b"
    for target, kind in (("mlx", None), ("adapter", None), ("peft", None), ("gguf", "F16"), ("ollama", None)):
        place = out.with_name(f"a b {target}")
        for line in run(replace(job, out=place, kind=kind, read_rows=ExportRows), target)["next"]:
            assert any(place.name in word for word in shlex.split(line)), line


def test_16_bits_say_what_they_lose_of_a_small_update(tmp_path, mx):
    base = write_tiny_llama(tmp_path / "base", bits=None)
    weights = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(base / "model.safetensors")).items()}
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    job = job_of(base, make_factors(base, size=3e-3), tmp_path / "out", bits=16)
    document = run(job, "mlx")
    assert document["error"] > 0.05
    assert document["notes"] == [
        f"{100 * document['error']:.0f} % of the update is lost to the rounding of float16; --bits 32 keeps all of it"
    ]
    assert run(replace(job, bits=32, out=tmp_path / "whole"), "mlx")["notes"] == []


def test_what_file_managers_leave_in_an_export_does_not_keep_it_from_being_replaced(job):
    run(replace(job, read_rows=ExportRows), "adapter")
    (job.out / ".DS_Store").write_bytes(b"icons")
    run(replace(job, read_rows=ExportRows, force=True), "adapter")
    assert not (job.out / ".DS_Store").exists()


def test_licence_and_card_lie_in_the_folder_that_lm_studio_is_given(job, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(job.base, base)
    (base / "LICENSE").write_text("do as you like")
    run(replace(job, base=base, kind="mlx", read_rows=ExportRows), "lmstudio")
    model = job.out / "mbf" / job.out.name
    assert (model / "LICENSE").read_text() == "do as you like" and (model / "README.md").is_file()


def test_a_peft_folder_without_a_known_original_says_so(job):
    document = run(replace(job, about=replace(job.about, original=None)), "peft")
    assert "PEFT and vLLM need the unquantized model" in document["notes"][0]


@pytest.mark.parametrize("target", ["mlx", "adapter", "peft"])
def test_the_card_names_base_tasks_and_scores_and_how_to_serve(job, target):
    run(job, target)
    text = (job.out / "README.md").read_text()
    head, body = text.split("---", 2)[1:]
    assert "license: apache-2.0" in head and "base_model: org/tiny" in head
    assert "| | mail | a\\|b |" in body
    assert "| after mail | 90.0 |  |" in body and "| after a\\|b | 80.0 | 75.0 |" in body
    assert "Average 77.5, Backward transfer -10.0, Forgetting 10.0." in body
    assert "| Method | slao |" in body and "| Rank | 4 |" in body


@pytest.mark.parametrize("target", ["mlx", "adapter", "peft", "ollama", "lmstudio"])
@pytest.mark.parametrize("original", [None, "org/tiny"])
def test_a_card_names_no_path_of_this_machine(job, target, original):
    document = run(replace(job, about=replace(job.about, original=original), read_rows=ExportRows), target)
    text = (job.out / "README.md").read_text()
    assert str(job.base.parent) not in text and str(job.out.parent) not in text
    assert str(job.out) in "".join(document["next"])
    assert ("base_model: org/tiny" in text) == (original is not None)


def test_a_card_says_the_settings_in_a_table_of_words():
    settings = {
        "lora": {"rank": 8, "keys": ["q_proj", "v_proj"], "num_layers": -1},
        "template": "none",
        "iters": None,
        "mask_prompt": True,
        "odd|name": 3,
    }
    page = card.text(
        About("tiny", {"method": "slao", "method_options": {"start": "qr"}, "settings": settings}), "mlx", [], []
    )
    assert (
        "\n".join(
            [
                "| Method | slao |",
                "| Start | qr |",
                "| Rank | 8 |",
                "| Layers with factors | q_proj, v_proj |",
                "| Blocks with factors, counted from the last | all |",
                "| Prompts | as they are, without a template |",
                "| Answers alone are supervised | yes |",
                "| Odd\\|name | 3 |",
            ]
        )
        in page
    )
    assert "{" not in page and "None" not in page


def test_what_the_bases_card_leaves_open_is_told_first(job):
    assert run(replace(job, notes=("the card is broken",)), "adapter")["notes"] == ["the card is broken"]


@pytest.mark.parametrize("target", ["mlx", "adapter", "peft", "ollama", "lmstudio"])
def test_the_bases_licence_goes_with_every_folder(job, target, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(job.base, base)
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE"):
        (base / name).write_text(f"what {name} says")
    run(replace(job, base=base, read_rows=ExportRows), target)
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE"):
        assert (job.out / name).read_text() == f"what {name} says"
        assert name in json.loads((job.out / "mbf_export.json").read_text())["files"]
    assert (job.out / "README.md").is_file()


def test_an_existing_place_is_refused_before_any_model_is_loaded(job):
    def read_rows():
        raise AssertionError("rows were read")

    job.out.mkdir()
    with pytest.raises(InputError, match="exists"):
        run(replace(job, read_rows=read_rows), "mlx")


@pytest.mark.parametrize(("target", "kind"), [("mlx", None), ("lmstudio", "mlx"), ("gguf", None), ("ollama", None)])
def test_bits_that_no_layer_can_have_are_refused_before_anything_is_measured(job, target, kind):
    def read_rows():
        raise AssertionError("measured")

    with pytest.raises(InputError, match="--bits: expected one of 4, .*, got 7"):
        run(replace(job, read_rows=read_rows, bits=7, kind=kind), target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("onnx", None, None), "target: expected one of mlx, adapter, peft.*got 'onnx'"),
        (("peft", 8, None), "--bits: the target peft stores float32"),
        (("gguf", 8, "q4_0"), "--bits and --type: expected one of them, got --bits 8 and --type q4_0"),
        (("mlx", None, "Q4_0"), "--type: expected with gguf, ollama, lmstudio"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        check_options(*options)


def test_a_base_that_is_not_quantized_is_its_own_original(tmp_path, write_jsonl):
    """The card of an Instruct model names its parent as base_model."""
    from mbf_mlx import Stream

    task = write_jsonl("words.jsonl", rows_of(8))
    for bits, original in ((None, None), (4, "org/parent")):
        base = write_tiny_llama(tmp_path / f"tiny-{bits}", bits=bits)
        (base / "README.md").write_text("---\nbase_model: org/parent\n---\n# tiny\n")
        stream = Stream.open(tmp_path / f"s{bits}", base=str(base), method="slao")
        stream.learn(task, iters=1)
        document = stream.export("peft", tmp_path / f"out{bits}")
        assert read_peft(tmp_path / f"out{bits}").base == (original or str(base))
        assert document["notes"] == []
