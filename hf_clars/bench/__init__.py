"""Benchmarks: what per-sample gradient norms cost here and elsewhere, in one process, against a plain training step.

`scripts/benchmark_grad_norms.py` runs them. Other libraries (Opacus, BackPACK, timm, pytorch_optimizer) are imported
only by what measures them; without them their rows say "not installed".
"""
