"""The hash of the code: what makes numbers is in it, what explains or shows them is not."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minipersona.files import PACKAGE
from minipersona.study.code_digest import CARRY_OUT, code_digest, covered_modules

Digest = Callable[[dict[str, str]], str]


@pytest.fixture
def digest_with(tmp_path: Path) -> Digest:
    """The digest of a copy of the package in which these files have other contents."""

    def digest(contents: dict[str, str]) -> str:
        copy = tmp_path / str(time.monotonic_ns())
        for file in PACKAGE.rglob("*.py"):
            if "shipped" not in file.parts:
                target = copy / file.relative_to(PACKAGE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        for name, text in contents.items():
            assert (copy / name).is_file()
            (copy / name).write_text(text)
        return code_digest(copy)

    return digest


def file_of(module: str) -> str:
    """Where a module is written, within the package."""
    path = Path(*module.split(".")[1:])
    return str(path.with_suffix(".py") if (PACKAGE / path.with_suffix(".py")).is_file() else path / "__init__.py")


def source(file: str) -> str:
    return (PACKAGE / file).read_text()


class OtherDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value += " And another word."
        return node


class OtherOperator(ast.NodeTransformer):
    """Puts another operator into the first sum, difference, product or quotient."""

    done = False

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not self.done and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            self.done = True
            node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return node


def test_the_copy_of_a_package_has_its_digest(digest_with: Digest) -> None:
    assert digest_with({}) == code_digest() and len(code_digest()) == 64


def test_comments_and_docstrings_are_not_in_it(digest_with: Digest) -> None:
    """Every covered module is written anew: without its comments, in other lines, with other docstrings."""
    rewritten = {}
    for module, tree in covered_modules().items():
        rewritten[file_of(module)] = "# a comment\n" + ast.unparse(OtherDocstrings().visit(tree))
        assert "And another word" in rewritten[file_of(module)] or "__init__" in file_of(module)
    assert digest_with(rewritten) == code_digest()


def test_an_operator_in_any_covered_module_is_in_it(digest_with: Digest) -> None:
    mutated = {}
    for module, tree in covered_modules().items():
        change = OtherOperator()
        text = ast.unparse(change.visit(tree))
        if change.done:
            mutated[file_of(module)] = text
    assert len(mutated) > 30
    chosen = [file for file in mutated if Path(file).parts[0] == "objective"][:2]  # imported far below
    chosen += list(mutated)[:: len(mutated) // 5]
    assert len({digest_with({file: mutated[file]}) for file in chosen} | {code_digest()}) == len(set(chosen)) + 1


@pytest.mark.parametrize("file", ["config.py", "records.py", "training/__init__.py"])
def test_what_a_cell_imports_is_in_it(digest_with: Digest, file: str) -> None:
    assert digest_with({file: source(file) + "\nmore = 1\n"}) != code_digest()


def test_what_stands_above_a_cell_is_not_in_it(digest_with: Digest) -> None:
    files = ("report/write.py", "verdict/verdict.py", "study/recipes.py", "cli/__init__.py", "tiny/build.py")
    assert digest_with({file: source(file) + "\nmore = 1\n" for file in files}) == code_digest()


def test_neither_help_texts_nor_the_version_are_in_it(digest_with: Digest) -> None:
    command, package = source("cli/__init__.py"), source("__init__.py")
    texts = {"cli/__init__.py": command.replace('help="', 'help="more '), "__init__.py": package.replace("0.1", "7.1")}
    assert texts["cli/__init__.py"] != command and texts["__init__.py"] != package
    assert digest_with(texts) == code_digest()


def test_everything_below_a_cell_is_covered_and_nothing_above_it() -> None:
    covered = set(covered_modules())
    assert {*CARRY_OUT, "minipersona.config", "minipersona.training.loop"} <= covered
    folders = {name.split(".")[1] for name in covered}
    assert {"model", "chat", "corpus", "objective", "training", "geometry", "behaviour", "run"} <= folders
    assert not folders & {"report", "verdict", "study", "cli", "tiny", "__main__"}


def test_every_module_that_python_imports_for_a_cell_is_covered() -> None:
    code = (
        f"import sys, {', '.join(CARRY_OUT)}\nprint(*[name for name in sys.modules if name.startswith('minipersona.')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) > 50 and set(loaded) <= set(covered_modules())


def test_the_digest_is_quick_and_then_remembered() -> None:
    code_digest.cache_clear()
    began = time.process_time()
    code_digest()
    assert time.process_time() - began < 1.0
    began = time.process_time()
    code_digest()
    assert time.process_time() - began < 0.01
