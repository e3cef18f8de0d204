"""Contexts longer than the device's memory."""
