"""Holds constraints.txt against pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.constraints import CONSTRAINTS, HEAD, ROOT, constraints

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def required(texts: list[str]) -> Iterator[Requirement]:
    """Requirements, with those of our own extras in place of `moe-offload[...]`."""
    for requirement in map(Requirement, texts):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                yield from required(EXTRAS[extra])
        else:
            yield requirement


def test_every_dependency_is_pinned_to_a_release_that_the_project_allows() -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").removeprefix(HEAD).splitlines()
    pinned = dict(re.split("[=<]=", line) for line in lines)
    versions = {canonicalize_name(name): Version(text) for name, text in pinned.items()}
    requirements = [*required(PROJECT["dependencies"]), *required(EXTRAS["dev"])]
    assert len(requirements) > 20
    for requirement in requirements:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


def test_pins_fit_every_machine() -> None:
    text = CONSTRAINTS.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    for line in text.removeprefix(HEAD).splitlines():
        pattern = r"triton<=[\d.]+" if line.startswith("triton") else r"[\w.-]+==[\w.]+"
        assert re.fullmatch(pattern, line), line  # no build such as +cpu, no address
        assert not line.startswith(("nvidia-", "cuda-", "moe-offload=")), line


def test_what_torch_brings_is_not_pinned() -> None:
    names = ["torch", "triton", "Jinja2", "nvidia-cublas", "cuda-toolkit", "setuptools"]
    text = constraints(dict.fromkeys([*names, "moe-offload"], "1.0"), "3.0")
    assert text == HEAD + "Jinja2==1.0\ntorch==1.0\ntriton<=3.0\n"
