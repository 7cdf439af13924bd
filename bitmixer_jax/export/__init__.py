"""Exports of a trained network to other software, and what runs them."""
