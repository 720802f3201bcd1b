"""The parameters of paths and queries that more than one operation has, with what they mean."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Limit = Annotated[int, Meta(description="How many of a page, 1 to 5000.", examples=[20])]
StartingAfter = Annotated[
    str | None,
    Meta(description="The id of the last one of the page before; null: the first page.", examples=[None]),
]
IncludeTotalCount = Annotated[
    bool, Meta(description="Whether `total_count` is worked out; it costs a little.", examples=[True])
]
LastLines = Annotated[
    str | None,
    Meta(description="How many lines of output are told, from the end; null: as many as fit.", examples=["100"]),
]
OfExecution = Annotated[
    str | None, Meta(description="Only what belongs to this execution.", examples=["exe_0BwT25a4ESR05DXUEbW3kZ"])
]
OfShell = Annotated[str | None, Meta(description="Only what belongs to this named shell.", examples=["main"])]
Offset = Annotated[
    str | None,
    Meta(description="The byte of the stream to begin with, from 0; null: from its beginning.", examples=["0"]),
]
Encoding = Annotated[
    str | None,
    Meta(
        description="How output is sent: `text`, or `base64` for the bytes themselves, an extension of this server.",
        examples=["base64"],
    ),
]

PATH = {
    "devbox_id": ("The devbox.", "dbx_0BwT25a4ESR05DXUEbW3kZ"),
    "execution_id": ("The execution.", "exe_0BwT25a4ESR05DXUEbW3kZ"),
    "snapshot_id": ("The snapshot.", "snp_0BwT25a4ESR05DXUEbW3kZ"),
    "key": ("The key of the metadata; a slash in it is written `%2F`.", "team"),
}
"""By the name in braces: what it means, and an example."""
