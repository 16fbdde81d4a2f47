"""The kit for a machine with a GPU: stages in order of importance, one JSON, a report made from it anywhere.

It imports torch, torchvision, transformers, Triton, timm and this package without its image stack. It needs no network.
A stage whose packages lack is skipped by name, as is each of the other libraries that ours is compared with. From the
most important: the GPU tests, whole networks, the forms of layers, the optimizer's step, 512 of 16,384 samples,
captured steps, peers (`vmap(grad)`, Opacus, BackPACK, on networks without BatchNorm), ClarsTrainer beside Trainer.
"""
