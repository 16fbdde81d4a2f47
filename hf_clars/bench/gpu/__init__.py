"""The kit for a machine with a GPU: stages in order of importance, one JSON, a report made from it anywhere.

It imports torch, torchvision, transformers, Triton, timm and this package without its image stack. It needs no network.
"""
