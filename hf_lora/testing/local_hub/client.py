"""Points the Hugging Face libraries of this process at another Hub, and back.

They read the environment when they are imported: `huggingface_hub.constants` first, and copies of
its values in modules of diffusers and others. So the values change where they are, in the modules
that are loaded; whatever is imported in the meantime is put right on the way back.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from huggingface_hub import close_session, constants

__all__ = ["environment", "pointed_at", "values"]

_PACKAGES = ("accelerate", "diffusers", "huggingface_hub", "peft", "transformers")
# Variables that would lead a process elsewhere, or sign it in as somebody else.
_UNSET = (
    "HF_ASSETS_CACHE",
    "HF_DEBUG",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_MODULES_CACHE",
    "HF_OIDC_RESOURCE",
    "HF_TOKEN_PATH",
    "HUGGINGFACE_ASSETS_CACHE",
    "HUGGINGFACE_CO_STAGING",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "TRANSFORMERS_CACHE",
    "TRANSFORMERS_OFFLINE",
)
# A list that the client asks the Hub for once a day unless it lies in its home.
_LIST, _EMPTY_LIST = ".agent_harnesses.json", '{"standardEnvVars": [], "harnesses": {}}'
_LIST_READ = ("huggingface_hub.utils._detect_agent", "_registry")
# Objects that keep the endpoint they were made with: module and name.
_KEEPERS = (
    ("huggingface_hub.hf_api", "api"),
    ("huggingface_hub.hf_file_system", "hffs"),
    ("transformers.utils.hub", "_hf_api"),
)


def environment(endpoint: str, token: str, home: Path) -> dict[str, str | None]:
    """Returns the variables that a process needs to use a Hub; None is one that must not be set.

    Args:
        endpoint: Address of the Hub.
        token: Token of the user.
        home: Folder for the cache and all else the libraries keep.
    """
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    aside = ",".join(filter(None, (direct, "127.0.0.1")))
    return {
        **dict.fromkeys(_UNSET),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": aside,
        "no_proxy": aside,
    }


def values(endpoint: str, home: Path) -> dict[str, object]:
    """Returns what the libraries make of those variables: name of a module's global to value."""
    cache, assets, token = str(home / "hub"), str(home / "assets"), str(home / "token")
    hosts: frozenset[str] = getattr(constants, "HF_URL_HOSTS", frozenset())
    return {
        "AGENT_HARNESSES_PATH": str(home / _LIST),
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HUGGINGFACE_CO_RESOLVE_ENDPOINT": endpoint,
        "HF_URL_HOSTS": hosts | {"127.0.0.1"},
        "HF_HOME": str(home),
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "HF_ASSETS_CACHE": assets,
        "HUGGINGFACE_ASSETS_CACHE": assets,
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_TOKEN_PATH": token,
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }


def _as_imported() -> dict[str, object]:
    """Returns what the libraries made of the environment as it is now, under the same names."""
    known = {name: vars(constants)[name] for name in values("", Path()) if hasattr(constants, name)}
    modules = os.path.join(constants.HF_HOME, "modules")
    return {
        "HUGGINGFACE_CO_RESOLVE_ENDPOINT": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "HF_MODULES_CACHE": os.environ.get("HF_MODULES_CACHE", modules),
        **known,
    }


def _modules() -> list[ModuleType]:
    loaded = list(sys.modules.items())
    return [module for name, module in loaded if module and name.partition(".")[0] in _PACKAGES]


@contextmanager
def set_values(wanted: Mapping[str, object]) -> Iterator[None]:
    """Changes globals of the libraries, wherever a copy is, until it is left."""
    before = _as_imported()
    kept: dict[int, list[tuple[ModuleType, str, object]]] = {}
    for module in _modules():
        held = vars(module)
        names = [n for n in wanted if n in held and n in before and held[n] == before[n]]
        kept[id(module)] = [(module, name, held[name]) for name in names]
        held.update({name: wanted[name] for name in names})
    try:
        yield
    finally:
        for module in _modules():
            held = vars(module)
            if id(module) in kept:
                held.update({name: value for _, name, value in kept[id(module)]})
                continue
            # imported in the meantime
            names = [n for n in wanted if n in before and n in held and held[n] == wanted[n]]
            held.update({name: before[name] for name in names})


def _keep_endpoint(endpoint: str) -> None:
    """Gives an endpoint to the objects that keep one, as far as their modules are loaded."""
    for module, name in _KEEPERS:
        keeper = vars(sys.modules[module]).get(name) if module in sys.modules else None
        for owner in (keeper, getattr(keeper, "_api", None)):
            if owner is not None:
                owner.endpoint = endpoint
        if keeper is not None and hasattr(keeper, "invalidate_cache"):
            keeper.invalidate_cache()


@contextmanager
def set_environment(wanted: Mapping[str, str | None]) -> Iterator[None]:
    """Changes variables of this process until it is left; None removes one."""
    before = {name: os.environ.get(name) for name in wanted}
    try:
        _put(wanted)
        yield
    finally:
        _put(before)


def _put(wanted: Mapping[str, str | None]) -> None:
    for name, value in wanted.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _list_in(home: Path) -> Iterator[None]:
    """Puts the client's list, empty, into its home, and lets it read its own again afterwards."""
    (home / _LIST).write_text(_EMPTY_LIST, encoding="utf-8")
    name, read = _LIST_READ
    before = getattr(sys.modules.get(name), read, None)
    try:
        yield
    finally:
        if name in sys.modules and hasattr(sys.modules[name], read):
            setattr(sys.modules[name], read, before)


@contextmanager
def pointed_at(endpoint: str, token: str, home: Path) -> Iterator[None]:
    """Points the libraries of this process at a Hub until it is left.

    Args:
        endpoint: Address of the Hub.
        token: Token of the user.
        home: Folder for the cache and all else the libraries keep.
    """
    importlib.import_module("huggingface_hub.hf_api")  # its `api` reads the endpoint once
    elsewhere = constants.ENDPOINT
    wanted = values(endpoint, home)
    variables = environment(endpoint, token, home)
    with set_values(wanted), set_environment(variables), _list_in(home):
        close_session()  # connections, and proxies as the environment had them
        _keep_endpoint(endpoint)
        try:
            yield
        finally:
            close_session()
            _keep_endpoint(elsewhere)
