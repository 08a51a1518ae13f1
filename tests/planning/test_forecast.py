"""What learning would take, as planning/forecast.py says it."""

import pytest

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.planning.forecast import Forecaster, free_bytes, usable, verdict
from tests.support.rows import rows_of

GB = 10**9


def forecaster(**changes):
    return Forecaster(**{"lora": {}, "train": TrainConfig(), "data": DataConfig(), **changes})


@pytest.mark.parametrize(("peak", "says"), [(80, "fits"), (81, "tight"), (100, "tight"), (101, "no")])
def test_fits_is_up_to_four_fifths_and_tight_up_to_all(peak, says):
    assert verdict(peak, 100) == says


@pytest.mark.parametrize(
    ("memory", "device", "gigabytes"), [(24, "cpu", 24), (24, "cuda", 24), (24, "metal", 16), (36, "metal", 27)]
)
def test_metal_may_take_a_part_of_a_macs_memory(memory, device, gigabytes):
    assert usable(memory * GB, device) == gigabytes * GB


def test_a_device_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="--device: expected one of cpu, metal, cuda, got 'tpu'"):
        forecaster(device="tpu")


def test_the_free_space_of_a_folder_that_is_not_there_is_its_disks(tmp_path):
    assert free_bytes(tmp_path / "no" / "such") > 0


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_a_smaller_batch_and_checkpoints_take_less_memory(device, tiny_llama):
    def peak(batch_size, grad_checkpoint):
        train = TrainConfig(batch_size=batch_size, grad_checkpoint=grad_checkpoint)
        return forecaster(train=train, device=device).for_model(str(tiny_llama), 16 * GB)["peak_bytes"]

    assert peak(1, False) < peak(8, False) and peak(8, True) < peak(8, False)


def test_a_model_that_is_not_fetched_is_forecast_without_rows(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.setenv("MBF_MODELS", str(tmp_path / "models"))
    task = write_jsonl("words/train.jsonl", rows_of(4)).parent
    document = forecaster().for_tasks(tmp_path / "s", [task], "llama-3.2-1b-instruct", 16 * GB)
    assert document["note"] == "the model is not fetched: rows were not counted" and "tasks" not in document


def test_a_stream_that_is_there_is_forecast_with_its_own_settings(tiny_llama, tmp_path, write_jsonl):
    from mbf_mlx import Stream

    Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(rank=2), template="none", method="replay")
    task = write_jsonl("words/train.jsonl", rows_of(20)).parent
    given = forecaster(lora={"rank": 16}, device="cpu", time=False)
    own = given.for_tasks(tmp_path / "s", [task], None)
    new = given.for_tasks(tmp_path / "new", [task], str(tiny_llama))
    assert own["parts"]["factors"] * 8 == new["parts"]["factors"]
    assert own["tasks"][0]["longest"] < new["tasks"][0]["longest"]  # without the chat template
    assert not (tmp_path / "new").exists()
