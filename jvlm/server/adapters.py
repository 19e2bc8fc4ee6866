"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, below one folder and for named keys."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jvlm.errors import UserError
from jvlm.server.errors import APIError, bad
from jvlm.server.service import Service


class Adapters(Protocol):
    """Keeps the adapters of a model; `jvlm.inference.adapter_slots.AdapterSlots` does."""

    def load(self, name: str, folder: str) -> Callable[[], Any]:
        """Read an adapter, and return what makes the model have it. Raises UserError."""
        ...

    def unload(self, name: str) -> Callable[[], Any]:
        """Return what makes the model lose an adapter. Raises UserError."""
        ...


class AdapterAdmin:
    """Loads and unloads adapters, one after another.

    Args:
      adapters: of the model.
      take: gives the engine a model; called in its thread.
    """

    def __init__(self, service: Service, adapters: Adapters, take: Callable[[Any], None]):
        self._service, self._adapters, self._take = service, adapters, take
        self._lock = asyncio.Lock()

    async def load(self, owner: str, name: str, path: str) -> str:
        """Load an adapter from a folder; returns what the caller is told. Raises APIError."""
        self._check(owner)
        if name in self._service.names:
            raise bad("this name is taken", "lora_name")
        folder = self._folder(path)
        async with self._lock:
            await self._change(functools.partial(self._adapters.load, name, str(folder)), str(folder))
            self._service.adapters.append(name)
        return f"Success: LoRA adapter {name!a} added successfully."

    async def unload(self, owner: str, name: str) -> str:
        """Unload an adapter that no answer uses; returns what the caller is told. Raises APIError."""
        self._check(owner)
        async with self._lock:
            if name not in self._service.adapters:
                raise APIError(404, "no such adapter", "lora_name")
            self._service.adapters.remove(name)  # no new request takes it
            if self._service.engine.answers_with(name):
                self._service.adapters.append(name)
                raise APIError(409, "answers of this adapter still run", "lora_name", {"retry-after": "1"})
            try:
                await self._change(functools.partial(self._adapters.unload, name), name)
            except APIError:
                self._service.adapters.append(name)
                raise
        return f"Success: LoRA adapter {name!a} removed successfully."

    async def _change(self, prepare: Callable[[], Callable[[], Any]], folder: str) -> None:
        try:
            change = await asyncio.to_thread(prepare)  # reads files
        except UserError as error:
            raise bad(str(error).replace(folder, "the folder")[:500], "lora_path") from error
        await self._service.engine.call(lambda: self._take(change()))

    def _check(self, owner: str) -> None:
        settings = self._service.settings
        if settings.keys and owner not in settings.admins:
            raise APIError(403, "this key may not load adapters")
        self._service.check_ready()

    def _folder(self, path: str) -> Path:
        """Return the folder that a path below the root names. Raises APIError with one text for all that is wrong."""
        root = Path(self._service.settings.adapter_root or "").resolve()
        refused = bad("no adapter below --adapter_root is there", "lora_path")
        if "\0" in path:
            raise refused
        folder = (root / path).resolve()
        if not folder.is_relative_to(root) or not (folder / "adapter_config.json").is_file():
            raise refused
        return folder
