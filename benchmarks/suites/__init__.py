"""Runs that join all stages. This folder alone may import everything; nothing imports it."""
