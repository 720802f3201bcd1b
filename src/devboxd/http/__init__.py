"""HTTP: one table of operations becomes routing, decoding, de-duplication, OpenAPI and a page of documentation."""

import os

# The server below has an allocator of its own, which reads this when it is loaded. By itself it keeps what a crowd of
# clients took until there is the next one, and more each time.
os.environ.setdefault("_RJEM_MALLOC_CONF", "dirty_decay_ms:500,muzzy_decay_ms:0,background_thread:true")
