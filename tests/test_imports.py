"""The order of the road: a module imports only what lies before it, and graders stay light."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "adpo_jax"

# From the ground up to the road and the command line. Those of a line do not import each other,
# except from left to right.
ROAD = [
    "clu_without_tensorflow exit_codes host_memory compilation_cache metric_names",
    "sharding distributed rope groups safetensors_files hlo flops chips",
    "rewards data arithmetic redaction metrics trackers profiling progress",
    "config config_checks command_line batch_plan",
    "prompts grpo rloo losses anchor",
    "attention model_config parameters lora cpu packing tile_attention attention_kernels",
    "layer_functions model log_probs",
    "hf_families hf_config hf_tensors hf_weights hf policy",
    "lora_files optimizer digests checkpoint_files checkpoints run_identity run_folder guard",
    "interruption",
    "sampling kv_cache kernels decode schedule cache_plan generation engine continuous text_stream",
    "layouts offload update rollout recording filtering sft cold_start learner evaluation",
    "loading pretrained serve setup dry_run_report dry_run preparation train evaluate report",
    "adapters main",
]


def modules():
    return {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()
    }


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module (or the files of a subpackage) imports."""
    folder = PACKAGE / name
    files = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{name}.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adpo_jax"):
                parts = node.module.split(".")
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            if isinstance(node, ast.Import):
                names = [alias.name.split(".") for alias in node.names]
                found |= {n[1] for n in names if n[0] == "adpo_jax" and len(n) > 1}
    return found - {name}


def test_every_module_is_on_the_road_and_imports_run_one_way():
    order = [name for line in ROAD for name in line.split()]
    assert len(order) == len(set(order))
    assert modules() - {"__init__"} <= set(order)
    wrong = [
        f"{name} imports {other}"
        for place, name in enumerate(order)
        if name in modules()
        for other in imports_of(name) & modules()
        if order.index(other) > place
    ]
    assert not wrong


def test_only_the_top_of_the_road_reads_the_config():
    readers = {
        name
        for name in modules() - {"config", "config_checks", "batch_plan"}
        if (PACKAGE / f"{name}.py").exists()
        and "ml_collections" in (PACKAGE / f"{name}.py").read_text()
    }
    # The run folder keeps it.
    keepers = {"run_identity", "run_folder"}
    top = {"loading", "setup", "dry_run", "preparation", "train", "evaluate", "main"}
    assert readers == keepers | top


def test_a_grading_process_imports_neither_jax_nor_sympy():
    code = "import sys, adpo_jax.rewards; print([m for m in ('jax', 'sympy') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_public_names_are_there():
    import adpo_jax

    for name in adpo_jax.__all__:
        assert callable(getattr(adpo_jax, name))
