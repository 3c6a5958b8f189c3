"""The one exception a user is meant to see: a sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import NoReturn


class UsageError(Exception):
    """A flag, a file or a missing package that the user can put right; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def import_optional(module: str, needed_for: str, install: str) -> ModuleType:
    """Import a package that the example can do without.

    Args:
        module: Name of the module to import, such as ``"tokenizers"``.
        needed_for: What asks for it, such as ``"--tokenizer bpe"``.
        install: What to type to get it.

    Raises:
        UsageError: The module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise UsageError(f"{needed_for} needs {module}, which could not be loaded: {error}") from None
        raise UsageError(f"{needed_for} needs the package {module}: {install}") from None
