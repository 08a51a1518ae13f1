"""The package calls only those names of mlx that are public and that Metal and CUDA have, too.

This is read from the source. Nothing here has run on a Mac; without one we can only check that no call needs what
its GPU does not have.
"""

import ast
import functools
from collections import defaultdict

import pytest

from mbf_mlx import methods
from tests.support.house import modules

# Names that may be used anywhere: documented, and there on every backend. Look a name up before adding it here.
ANYWHERE = {
    "mlx.core": """abs add addmm all any arange argmax argmin argpartition argsort array array_equal async_eval bfloat16
        bool_ broadcast_to checkpoint clear_cache clip compile concatenate contiguous cos custom_function depends
        dequantize divide equal eval exp expand_dims finfo flatten float16 float32 floating full gather_mm gather_qmm
        get_active_memory get_cache_memory get_peak_memory grad greater greater_equal inf int16 int32 int64 int8 integer
        isfinite isinf isnan issubdtype less less_equal load log log_softmax logaddexp logical_and logical_not
        logical_or logsumexp matmul max maximum mean min minimum multiply negative not_equal ones ones_like outer pad
        put_along_axis quantize quantized_matmul reciprocal repeat reset_peak_memory reshape rsqrt save_safetensors
        sigmoid sign sin softmax sort split sqrt square squeeze stack stop_gradient subtract sum swapaxes synchronize
        take take_along_axis tanh tile topk transpose tree_flatten tril triu uint16 uint32 uint64 uint8 value_and_grad
        var view vjp jvp where zeros zeros_like Dtype""",
    "mlx.core.fast": "layer_norm rms_norm rope scaled_dot_product_attention",
    "mlx.core.random": "bernoulli categorical key normal permutation randint seed split state uniform",
    "mlx.core.distributed": "Group all_gather all_max all_min all_sum init is_available",
    "mlx.nn": """Dropout Embedding LayerNorm Linear Module QuantizedEmbedding QuantizedLinear RMSNorm RoPE gelu quantize
        silu utils.checkpoint value_and_grad losses.cross_entropy""",
    "mlx.optimizers": "Adam AdamW clip_grad_norm cosine_decay join_schedules linear_schedule",
    "mlx.utils": "tree_flatten tree_map tree_map_with_path tree_reduce tree_unflatten",
}
# One file handles devices and their limits. These files look at one, too, and why.
DEVICES = set(
    """Device cpu cuda cuda.is_available default_device default_stream device_info get_memory_limit gpu is_available
    metal metal.is_available new_stream set_cache_limit set_default_device set_default_stream set_memory_limit
    set_wired_limit stream""".split()
)
LOOKS_AT_DEVICES = {
    "export.quality.live_model": {"set_cache_limit"},  # while it measures, and back
}
# MLX has these only on the CPU.
ON_THE_CPU = {"cholesky", "cholesky_inv", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor", "pinv", "qr",
              "solve", "solve_triangular", "svd", "tri_inv"}  # fmt: skip


def chain(node):
    """Return the names of `a.b.c`, outermost first; [] if it does not begin with a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


@functools.cache
def used():
    """Return every name of mlx that the package uses, "mlx.core.vjp" -> the modules that do."""
    found = defaultdict(set)
    for module, file in modules().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        known = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known |= {each.asname: each.name for each in node.names if each.name.partition(".")[0] == "mlx"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mlx":
                known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        for node in ast.walk(tree):
            names = chain(node) if isinstance(node, (ast.Attribute, ast.Name)) else []
            if names and names[0] in known:
                found[".".join([known[names[0]], *names[1:]])].add(module)
    return dict(found)


def allowed():
    names = {f"{space}.{name}" for space, words in ANYWHERE.items() for name in words.split()}
    return names | {name.rpartition(".")[0] for name in names} | set(ANYWHERE)


def test_every_name_of_mlx_that_is_used_is_public_and_on_every_backend():
    assert {"mlx.core.vjp", "mlx.optimizers.AdamW", "mlx.utils.tree_flatten"} <= set(used()), "the scan finds nothing"
    devices = {f"mlx.core.{name}" for name in DEVICES}
    odd = {name: sorted(users) for name, users in used().items() if name not in allowed() | devices}
    assert odd == {}, "not known to be there on Metal and CUDA: look, then add them to ANYWHERE, or use something else"
    assert [name for name in used() if any(part.startswith("_") for part in name.split("."))] == []


def test_what_is_used_is_there_in_the_installed_mlx(mx):
    import importlib

    for name in used():
        space = next(each for each in ("mlx.core", "mlx.nn", "mlx.optimizers", "mlx.utils") if name.startswith(each))
        value = importlib.import_module(space)
        for part in filter(None, name.removeprefix(space).split(".")):
            value = getattr(value, part, None)
            assert value is not None, f"{name} is not in this mlx"


def test_devices_and_limits_are_the_backends():
    for name, users in used().items():
        short = name.removeprefix("mlx.core.")
        if short in DEVICES:
            others = {module for module in users - {"device.backend"} if short not in LOOKS_AT_DEVICES.get(module, ())}
            assert others == set(), f"{name} belongs into device/backend.py"


def test_no_factorization_is_called_on_mlx_itself():
    """reference.py calls them on the array's own library, everything else on NumPy."""
    assert [name for name in used() if ".linalg" in name] == []
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = chain(node) if isinstance(node, ast.Attribute) else []
            if "linalg" in names[1:-1] and names[-1] in ON_THE_CPU:
                assert names[0] == "np" or (names[0] == "xp" and module == "reference"), f"{module}: {'.'.join(names)}"


def calls(node):
    """Yield the names of what a piece of code calls: functions, methods of the same object, factorizations."""
    for each in ast.walk(node):
        names = chain(each.func) if isinstance(each, ast.Call) else []
        if len(names) == 1 or names[:1] == ["self"] or "linalg" in names:
            yield names[-1]


@functools.cache
def functions():
    """Return what each function of the methods and of the shared math calls, by the function's name."""
    found = defaultdict(set)
    for module, file in modules().items():
        if module == "reference" or module.startswith("methods."):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    found[node.name] |= set(calls(node))
    return found


def reached(name):
    """Return everything that a function of this name calls, directly or through others."""
    seen, todo = set(), {name}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= functions().get(name, set()) - seen
    return seen


@pytest.mark.parametrize("hook", ["penalty", "effective"])
def test_what_a_method_does_on_the_gpu_reaches_no_factorization(hook):
    """These hooks run on MLX arrays inside a training step. start and finish run on NumPy arrays, once a task."""
    assert any(hasattr(methods.make(name), hook) for name in methods.names())
    assert reached(hook) & ON_THE_CPU == set()
    assert {"qr", "svd"} <= reached("finish"), "the scan finds nothing"


def test_factors_that_methods_start_and_finish_with_are_numpys(mx, tiny_llama):
    import numpy as np

    from mbf_mlx.base.load import load_base
    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.engine.lora_layers import attach
    from mbf_mlx.learning.tuning import Tuning
    from mbf_mlx.methods import State

    model = load_base(tiny_llama, dequantize=True, dtype="float32").model
    layers = attach(model, LoRAConfig(rank=4))
    method = methods.make("slao")
    state = State(t=0, layers=layers, rank=4, seed=0, deployed={}, kept={})
    tuned = Tuning(model, method, state).named()
    assert {type(array) for pair in tuned.values() for array in pair} == {np.ndarray}
    after = method.finish(state, tuned)
    assert {type(array) for pair in after.deployed.values() for array in pair} == {np.ndarray}
