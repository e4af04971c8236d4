"""The Prefect face of the production line."""
