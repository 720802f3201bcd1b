"""devboxd: a self-hosted server of devboxes that speaks the Runloop API."""

__version__ = "0.1.0"
