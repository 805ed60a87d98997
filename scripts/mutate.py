"""Changes one operator or constant of a module at a time and lists the changes no test notices.

    python scripts/mutate.py --modules guard,losses --sample 20

Each mutant is a change of the syntax tree: a comparison with its bound moved or turned round, `and`
for `or`, + for -, a condition negated, a number off by one, a boolean turned, min for max. The
tests of its module run in a copy of the repository until the first of them fails. One JSON line
tells each survivor, and one line a module how many there were. A survivor is a hole in the tests,
or a change that means the same: docs/reliability.md says which of ours are of that kind.
"""

import argparse
import ast
import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

_ANY_CUT = (
    "tests/test_distillation.py::"
    "test_any_cut_of_a_batch_gives_the_gradient_of_the_divergence_from_the_teacher"
)

# The modules, and the tests that have to notice a change of them, the quick ones first: files or
# single tests, then pytest's -k.
MODULES: dict[str, tuple[list[str], list[str], str]] = {
    "losses": (
        [
            f"losses/{name}.py"
            for name in (
                *("shared", "tokens", "parameters", "algorithm", "flat", "policy_gradient"),
                *("adpo", "grpo", "ratios", "rloo", "opd", "imitation"),
            )
        ],
        [
            "tests/test_losses_vectors.py",
            "tests/test_losses_others.py",
            "tests/test_losses.py",
            "tests/test_sft.py::test_a_step_descends_the_mean_over_tokens_however_the_batch_is_cut",
            "tests/test_distillation.py::"
            "test_the_reverse_kl_has_the_gradient_of_log_policy_over_teacher",
            _ANY_CUT,
            "tests/test_new_algorithm.py",
        ],
        "",
    ),
    "sampling": (["engine/sampling.py"], ["tests/test_sampling.py", "tests/test_engine.py"], ""),
    "packing": (
        ["update/packing.py", "update/streams.py", "update/stream_sizes.py"],
        ["tests/test_packing.py"],
        "",
    ),
    "update": (
        ["update/step.py", "update/gradient.py"],
        [
            "tests/test_mixtures.py::"
            "test_the_load_of_a_batch_is_measured_by_hand_and_its_balance_is_a_mean_over_tokens",
            "tests/test_mixtures.py::"
            "test_the_auxiliary_loss_evens_out_the_experts_and_replayed_ones_are_counted",
            "tests/test_update.py",
            _ANY_CUT,
            "tests/test_packing.py",
        ],
        "",
    ),
    "guard": (["run/guard.py"], ["tests/test_faults.py"], "guard or count or bad_update"),
    "filtering": (["rollouts/filtering.py"], ["tests/test_filtering.py"], ""),
    "checkpoints": (["run/checkpoints.py"], ["tests/test_checkpoints.py"], ""),
}

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", default=",".join(MODULES))
    parser.add_argument("--sample", type=int, default=0, help="mutants a module; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timeout_s", type=int, default=0, help="0 for twice what the unchanged code takes"
    )
    return parser.parse_args()


def changed(node: ast.AST) -> ast.AST | None:
    """The node with one change, or None where there is none to make."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            new.ops = [_COMPARISONS[type(op)]()]
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            new.op = _OPERATORS[type(op)]()
        case ast.BoolOp(op=op):
            new.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            return new.operand
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            new.test = ast.UnaryOp(ast.Not(), test)
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value) | float(value)):
            new.value = value + 1
        case ast.Attribute(attr=name) if name in _NAMES:
            new.attr = _NAMES[name]
        case ast.Name(id=name) if name in _NAMES:
            new.id = _NAMES[name]
        case _:
            return None
    return new


def mutants(source: str) -> Iterator[tuple[int, str, str, str]]:
    """(line, the text there, the text instead, the whole changed source) of each mutant."""
    tree = ast.parse(source)
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        new = None if id(node) in annotations else changed(node)
        if new is None:
            continue

        class Swap(ast.NodeTransformer):
            def visit(self, visited, node=node, new=new):
                return new if visited is node else self.generic_visit(visited)

        mutated = ast.unparse(ast.fix_missing_locations(Swap().visit(copy_of(tree, node))))
        was, now = (ast.unparse(n).splitlines()[0] for n in (node, new))
        yield node.lineno, was, now, mutated


def copy_of(tree: ast.AST, keep: ast.AST) -> ast.AST:
    """A deep copy of the tree in which `keep` is the very node, so that it can be found."""
    return copy.deepcopy(tree, {id(keep): keep})


def survives(folder: Path, tests: list[str], selection: str, timeout_s: int) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-n0", "-q", "--no-header", *tests]
    command += [f"--basetemp={folder / 'tmp'}", "-p", "no:cacheprovider"]
    command += ["-k", selection] if selection else []
    # Most programs are the same in most mutants: compiled once, they are read afterwards.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    try:
        done = subprocess.run(
            command,
            cwd=folder / "repo",
            env=os.environ | cache,
            capture_output=True,
            timeout=timeout_s or None,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main():
    a = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        listed = subprocess.check_output(["git", "ls-files"], cwd=REPO, text=True).splitlines()
        for name in listed:
            target = scratch / "repo" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target)
        shared = REPO.parent / "shared"
        if shared.exists():
            os.symlink(shared, scratch / "shared")
        for module in a.modules.split(","):
            files, tests, selection = MODULES[module]
            start = time.monotonic()
            if not survives(scratch, tests, selection, a.timeout_s):
                sys.exit(f"the tests of {module} fail or take too long before anything is changed")
            timeout_s = a.timeout_s or math.ceil(2 * (time.monotonic() - start))
            found = []
            for file in files:
                path = scratch / "repo" / "adpo_jax" / file
                source = path.read_text()
                found += [(path, source, file, *mutant) for mutant in mutants(source)]
            total = len(found)
            if a.sample:
                found = random.Random(a.seed).sample(found, min(a.sample, total))
            alive = 0
            for path, source, file, line, was, now, mutated in found:
                path.write_text(mutated)
                if survives(scratch, tests, selection, timeout_s):
                    alive += 1
                    told = {"survivor": f"{file}:{line}", "was": was, "now": now}
                    print(json.dumps(told), flush=True)
                path.write_text(source)
            told = {"module": module, "mutants": total, "tried": len(found), "survived": alive}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
