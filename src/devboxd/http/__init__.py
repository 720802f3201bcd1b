"""HTTP: one table of operations becomes routing, decoding, de-duplication, OpenAPI and a page of documentation."""
