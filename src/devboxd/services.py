"""All parts of a running server, built in one visible order, for the server itself and for tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol

from devboxd import boot
from devboxd.access.files import Files
from devboxd.access.uploads import Early
from devboxd.budget import commands_within, open_files, streams_within
from devboxd.concurrency.clock import Clock
from devboxd.concurrency.tasks import Tasks
from devboxd.config import Settings
from devboxd.devboxes.changes import Changes
from devboxd.devboxes.incidents import Incidents
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.devboxes.logs.tail import LogTail
from devboxd.devboxes.snapshots import Snapshots
from devboxd.devboxes.supervisor import Means, Supervisor
from devboxd.devboxes.warm import Warm
from devboxd.engine.base import Image
from devboxd.engine.instance import Instance
from devboxd.engine.network import Network
from devboxd.engine.oci import OciEngine
from devboxd.engine.recipe import base_environment
from devboxd.executions.box import Boxes
from devboxd.executions.journals import Journals
from devboxd.executions.looking import Looking
from devboxd.executions.records import Records
from devboxd.executions.running import Executions
from devboxd.executions.watch import Watcher
from devboxd.http.requests import Requests
from devboxd.http.streams import Closing, Places
from devboxd.metrics import Metrics
from devboxd.store.db import FILE_NAME, Store


class ImageSource(Protocol):
    """Where images of devboxes are found by name."""

    def default(self) -> Image | None:
        """The image of a devbox that names none; None before it is built."""
        ...

    def named(self, name: str) -> Image | None:
        """The image of this name; None when it is gone."""
        ...


@dataclass(frozen=True)
class Services:
    """The parts that handlers of requests and the server ask for, each by its type."""

    store: Store
    engine: OciEngine
    closing: Closing
    requests: Requests
    places: Places
    metrics: Metrics
    boxes: Boxes
    looking: Looking
    executions: Executions
    files: Files
    early: Early
    incidents: Incidents
    devboxes: Devboxes
    snapshots: Snapshots
    tailing: LogTail

    def all(self) -> list[object]:
        """Every part."""
        return [getattr(self, field.name) for field in fields(self)]


@contextlib.asynccontextmanager
async def build(
    settings: Settings, instance: Instance, images: ImageSource, clock: Clock | None = None
) -> AsyncIterator[Services]:
    """The parts of a server on a claimed state folder, as long as the block lasts. Nothing is started yet: the engine,
    the devboxes and the snapshots are opened by the caller, in this order. Raises SetupError for a store that cannot be
    opened.
    """
    async with contextlib.AsyncExitStack() as stack:
        store = Store.open(settings.state / FILE_NAME)
        stack.callback(store.close)
        closing, watcher, background = Closing(), Watcher(), Tasks()
        stack.push_async_callback(background.close)
        background.start(watcher.run(), "journal watcher")
        available = open_files()
        requests, places = Requests(), Places(streams_within(available))

        journals = Journals(settings.state / "journals", settings.journal_cap_bytes, settings.journals_per_box_bytes)
        boxes = Boxes()
        looking = Looking(store, boxes, journals, watcher, closing)
        records = Records(store, settings.state / "shells")
        bounds = {"per_box": settings.executions_per_box, "in_all": commands_within(available)}
        executions = Executions(store, boxes, journals, records, looking, **bounds)
        stack.push_async_callback(executions.close)

        engine = OciEngine(settings, instance, Network(settings, instance), partial(boot.note_storage, settings.state))
        files = Files(engine.entrances)
        incidents = Incidents(engine, journals.folder)
        changes = Changes(store, clock or Clock())
        environment = base_environment(settings)
        means = Means(
            changes, engine, executions, looking, files, incidents, closing,
            environment, settings.suspend_keep_memory_seconds,
            lambda name: images.named(name) if name else images.default(),
        )  # fmt: skip
        warm = Warm(engine, images.default, environment, settings.warm_boxes)
        parts = (store, engine, executions, changes, Supervisor(means), warm, closing, incidents)
        devboxes = Devboxes(*parts, retention_s=settings.retention_seconds)
        snapshots = Snapshots(store, engine, devboxes)
        tailing = LogTail(devboxes, looking, incidents, boxes, journals, watcher, closing)

        metrics = Metrics()
        metrics.register(store, requests, places, executions, devboxes, changes, warm, incidents, snapshots)
        yield Services(
            store, engine, closing, requests, places, metrics, boxes, looking, executions, files, Early(settings.state),
            incidents, devboxes, snapshots, tailing,
        )  # fmt: skip
