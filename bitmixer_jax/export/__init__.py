"""Exports: a trained network for other engines, checked in them (import the module you need)."""
