"""Public functions that take or return arrays say their shapes, so that `tests/shape_checks.py` can check them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# arrays of devices, which jaxtyping has no dtype for
ALLOWED = {"jvlm/parallel/mesh.py: arrange"}


def _is_bare(annotation: ast.expr) -> bool:
    """Return whether an annotation is an array without a shape, alone, optional, or in a tuple."""
    if isinstance(annotation, ast.BinOp):
        return _is_bare(annotation.left) or _is_bare(annotation.right)
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value)
        if name == "tuple" and isinstance(annotation.slice, ast.Tuple):
            return any(map(_is_bare, annotation.slice.elts))
        return False
    return ast.unparse(annotation).rpartition(".")[2] in ("Array", "ndarray")


def _functions() -> list[tuple[str, ast.FunctionDef]]:
    """Return the public functions of all modules with their names for `ALLOWED`."""
    files = sorted((ROOT / "jvlm").glob("**/*.py"))
    defined = ((path, node) for path in files for node in ast.parse(path.read_text()).body)
    return [
        (f"{path.relative_to(ROOT)}: {node.name}", node)
        for path, node in defined
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def test_arrays_of_public_functions_have_shapes():
    without = set()
    for name, function in _functions():
        arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        annotations = [function.returns, *(argument.annotation for argument in arguments)]
        if any(annotation is not None and _is_bare(annotation) for annotation in annotations):
            without.add(name)
    assert without == ALLOWED


def test_what_counts_as_bare():
    bare = ("np.ndarray", "jax.Array | None", "tuple[int, Array]")
    shaped = ('Float[Array, "a b"]', 'Int[np.ndarray, " n"] | None', "dict[str, np.ndarray]", "int")
    assert all(_is_bare(ast.parse(text, mode="eval").body) for text in bare)
    assert not any(_is_bare(ast.parse(text, mode="eval").body) for text in shaped)
