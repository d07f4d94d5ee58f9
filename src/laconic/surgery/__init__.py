"""Changing a model: build factors, swap layers, carry optimizer state, record and replay what was done."""
