"""Emitted sources on disk: one file a source, named by its hash, shared by all processes. Imports
them as modules and remembers which were used. Emits and launches nothing itself."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from hadagraph.codegen.emit import emit
from hadagraph.codegen.encode_spec import AnySpec
from hadagraph.compat import cache_dir

_EMITTED: dict[str, str] = {}


def source_directory() -> Path:
    """Where emitted kernels lie: under Inductor's cache, so that clearing one clears both."""
    return Path(cache_dir()) / "hadagraph"


def source_key(name: str, source: str) -> str:
    """The kernel's name and a hash of its source: variants of one kernel share the name only."""
    return f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:10]}"


def write_source(source: str, name: str, directory: Path) -> Path:
    """The path of a file with that source; written under a temporary name and then renamed, so
    that no other process reads half a file."""
    path = directory / f"{source_key(name, source)}.py"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(source)
    os.replace(temporary, path)
    return path


def load_module(path: Path) -> ModuleType:
    """The emitted file as a module (not entered in `sys.modules`)."""
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@cache
def kernel_module(spec: AnySpec) -> ModuleType:
    """The module of the spec's kernel: function `spec.name`, `OPTIONS` and `SIGNATURE`."""
    source = emit(spec)
    _EMITTED[source_key(spec.name, source)] = source
    return load_module(write_source(source, spec.name, source_directory()))


def emitted_sources() -> dict[str, str]:
    """Name and hash -> source of every kernel that this process has used so far."""
    return dict(_EMITTED)
