"""Every parameter of a model, declared in a table: one row for each form that it has on disk.

The rows decide the tree of random parameters (`random_weights`), its layout on a mesh
(`logical_axes`), the tensors of a Hugging Face folder (`hf/tensors.py`), adapters (`lora`), weight
decay (`update/optimizer.py`), the dtypes of decoding (`engine/verbs.py`) and the matrices that a
CPU joins (`cpu`). A new parameter is a row of `parameter_table` and a line in the function that
uses it. Here is what is asked of the table.
"""

from collections.abc import Mapping
from typing import Any

import jax

from adpo_jax.model import parameter_table
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.parameter_row import Parameter

# The place of a parameter in the tree: ("embed",) or ("layers", "q").
Path = tuple[str, ...]


def of_model(config: ModelConfig) -> dict[Path, Parameter]:
    """The parameters of a model without adapters, in the order of the table."""
    top = {(row.name,): row for row in parameter_table.TOP if row.when(config)}
    return top | {("layers", row.name): row for row in parameter_table.LAYER if row.when(config)}


def plain_name(name: str) -> str:
    """The name of a parameter without a prefix of `parameter_table.PREFIXES`."""
    return name.removeprefix(next(filter(name.startswith, parameter_table.PREFIXES), ""))


def has(config: ModelConfig, name: str) -> bool:
    """Whether the layers of a model have a parameter of this name."""
    return any(row.name == name and row.when(config) for row in parameter_table.LAYER)


def at(path: Path) -> Parameter:
    """The row of a place in some model's tree, adapters included.

    Raises:
      ValueError: for a place that no row names.
    """
    if path[0] != "layers":
        rows = parameter_table.TOP if len(path) == 1 else ()
    elif is_adapter(path[-1]):
        rows = (row for weight in adaptable().values() for row in adapter_rows(weight))
    else:
        rows = parameter_table.LAYER
    for row in rows:
        if row.name == path[-1]:
            return row
    raise ValueError(f"no row of the table of parameters is named {'/'.join(path)}")


def by_path(params) -> dict[Path, Any]:
    """A parameter tree as a flat dict."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def logical_axes(params) -> Any:
    """The tree of logical axes of a parameter tree.

    Raises:
      ValueError: naming the parameters that the table does not have.
    """
    uncovered = []

    def axes_of(path, leaf):
        path = tuple(key.key for key in path)
        try:
            axes = at(path).logical_axes
        except ValueError:
            uncovered.append(f"{'/'.join(path)} {tuple(leaf.shape)}")
            return ()
        return ("layers", *axes) if path[0] == "layers" else axes

    axes = jax.tree_util.tree_map_with_path(axes_of, params)
    if uncovered:
        raise ValueError("no logical axes for the parameters: " + ", ".join(uncovered))
    return axes


def check_params(params: Any) -> None:
    """Refuses what is no parameter tree of a policy.

    Raises:
      TypeError: saying what it is.
    """
    if not isinstance(params, Mapping) or "layers" not in params:
        raise TypeError(
            "params is the policy's parameter tree, the second of what Policy.from_pretrained "
            f"returns; given {type(params).__name__}"
        )


# --- adapters


def adaptable(config: ModelConfig | None = None) -> Mapping[str, Parameter]:
    """The weights of a layer that may have an adapter, by name; those of any model without one."""
    found: dict[str, Parameter] = {}
    for row in _with_adapters():
        if config is None or row.when(config):
            found.setdefault(row.name, row)
    return found


def of_module(hf_module: str) -> tuple[str, ...]:
    """The names of the weights with adapters that a Hugging Face module holds, in its order."""
    return tuple(row.name for row in _with_adapters() if row.hf_module == hf_module)


def adapted_modules() -> tuple[str, ...]:
    """The Hugging Face modules, of any model, whose weights may have an adapter."""
    return tuple(dict.fromkeys(row.hf_module for row in _with_adapters()))


def _with_adapters() -> list[Parameter]:
    return [row for row in parameter_table.LAYER if row.adapter_inputs]


def adapter_rows(weight: Parameter) -> tuple[Parameter, Parameter]:
    """The rows of a weight's A [*in, R] and B [R, *out], which peft keeps as [R, in], [out, R]."""
    experts, axes = weight.experts, weight.axes.removeprefix(weight.experts)
    inputs, outputs = axes[: weight.adapter_inputs], axes[weight.adapter_inputs :]

    def row(name, axes, tensor, hf_axes):
        hf_axes = f"{experts} {hf_axes}".strip()
        hf_name = f"{weight.hf_module}.{tensor}.weight"
        return Parameter(name, experts + axes, hf_name, hf_axes, init=None, layers=weight.layers)

    a, b = adapter_names(weight.name)
    return (
        row(a, f"{inputs}R", "lora_A", f"R {inputs}"),
        row(b, f"R{outputs}", "lora_B", f"{outputs} R"),
    )


def adapter_names(name: str) -> tuple[str, str]:
    """The names of a weight's A and B."""
    return f"{name}_lora_a", f"{name}_lora_b"


def is_adapter(name: str) -> bool:
    """Whether a parameter of a layer is an A or a B."""
    return name.endswith(adapter_names(""))
