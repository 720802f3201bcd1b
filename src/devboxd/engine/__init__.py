"""The engine: isolated boxes on this machine, by an OCI runtime, overlayfs, cgroups and network namespaces."""
