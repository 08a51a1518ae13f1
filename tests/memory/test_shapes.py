"""The shape of a model, from a recipe and from a folder."""

import json

import pytest

from mbf_mlx.base.recipe import recipes
from mbf_mlx.errors import InputError
from mbf_mlx.memory.shapes import shape_of_folder, shape_of_recipe


def test_every_recipe_describes_a_model_of_about_the_size_that_it_downloads():
    for name, recipe in recipes().items():
        assert shape_of_recipe(recipe).file_bytes == pytest.approx(recipe.download_bytes, rel=0.12), name


def test_an_architecture_without_these_numbers_is_refused(tmp_path, tiny_llama):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot plan for this architecture: KeyError\\('intermediate_size'\\)"):
        shape_of_folder(folder)
