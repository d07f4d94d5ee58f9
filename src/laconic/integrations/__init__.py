"""Compression inside other people's training loops: one file each for Lightning, the Hugging Face Trainer, Accelerate.

Nothing is imported here: each file needs a package that laconic itself does not.
"""
