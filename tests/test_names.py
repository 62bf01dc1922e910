"""What `import masformer` gives: everything by name, and no more than is asked for."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import masformer


def test_the_work_is_reached_by_name():
    for name in ("search_layers", "perplexity", "compare_plans", "retrieve", "summarize", "load_recipe", "train"):
        assert inspect.isfunction(getattr(masformer, name)), name
    for name in ("generate", "export_model"):
        assert inspect.isfunction(getattr(masformer, name)), name
    with pytest.raises(AttributeError, match="module 'masformer' has no attribute 'serch'"):
        masformer.serch  # noqa: B018


@pytest.mark.parametrize("name", masformer.__all__)
def test_every_name_is_there_and_listed(name):
    found = getattr(masformer, name)
    assert found.__doc__
    assert name in dir(masformer)
    if name in masformer._LATER:
        assert found is getattr(import_module(masformer._LATER[name]), name)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(masformer.__file__).read_text(encoding="utf-8"))
    (block,) = [part for part in tree.body if isinstance(part, ast.If)]
    seen = {alias.name: part.module for part in block.body for alias in part.names}
    assert {*seen, "MasformerError"} == {*masformer.__all__}
    assert seen == masformer._LATER
    assert sorted(masformer.__all__) == masformer.__all__


def test_what_is_named_is_not_imported_before():
    heavy = sorted({*masformer._LATER.values(), "torch", "transformers"})
    code = f"import sys, masformer; dir(masformer); print([name for name in {heavy} if name in sys.modules])"
    code += "; masformer.generate; print('masformer.generation' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr
